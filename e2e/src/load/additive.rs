//! Commands whose loss or second run leaves another value behind: the ones that a resume must get
//! exactly right. Numbers that never come twice are part of what they write, so that what is missing,
//! doubled or out of order shows.

use rand::Rng;

use super::Step;

const SCRIPT: &str = "local n = redis.call('INCR', KEYS[1]) \
    redis.call('RPUSH', KEYS[2], n .. ' ' .. ARGV[1]) \
    redis.call('LTRIM', KEYS[2], -80, -1) \
    if n % 3 == 0 then redis.call('APPEND', KEYS[3], '.') end return n";

pub(super) fn any(s: &mut Step, renewals: bool) {
    s.serial += 1;
    let id = s.serial.to_string();
    match s.random.random_range(0..34) {
        0..4 => {
            let k = s.key("n");
            s.add(args!["INCR", k]);
        }
        4 | 5 => {
            let (k, n) = (s.key("n"), s.below(1000));
            s.add(args!["INCRBY", k, n]);
        }
        6 => {
            let k = s.key("f");
            s.add(args!["INCRBYFLOAT", k, "0.5"]);
        }
        7 | 8 => {
            let k = s.key("text");
            s.add(args!["APPEND", k, format!("{id} ")]);
        }
        9 => {
            // Shortens what APPEND lets grow, in a way that depends on its length.
            let (k, at) = (s.key("text"), s.below(300));
            s.add(args!["SETRANGE", k, at, format!("[{id}]")]);
            if id.ends_with('7') {
                s.add(args!["SET", k, id]);
            }
        }
        10 => {
            let (k, bit) = (s.key("b"), s.below(2000));
            s.add(args!["SETBIT", k, bit, "1"]);
            if s.version.has(3, 2) {
                s.add(args!["BITFIELD", k, "INCRBY", "u16", "#2", "3"]);
            }
        }
        11..14 => {
            let (k, word) = (s.key("q"), if s.random.random() { "LPUSH" } else { "RPUSH" });
            s.add(args![word, k, id, format!("{id}b")]);
        }
        14 | 15 => {
            let (k, word) = (s.key("q"), if s.random.random() { "LPOP" } else { "RPOP" });
            s.add(args![word, k]);
        }
        16 => {
            let (k, other) = (s.key("q"), s.other("q"));
            s.add(args!["RPOPLPUSH", k, other]);
        }
        17 if s.version.has(6, 2) => {
            let (k, other) = (s.key("q"), s.other("q"));
            s.add(args!["LMOVE", k, other, "LEFT", "LEFT"]);
        }
        18 => {
            let k = s.key("q");
            s.add(args!["LTRIM", k, "-50", "-1"]);
        }
        19 | 20 => {
            let (k, field) = (s.key("h"), s.below(10));
            s.add(args!["HINCRBY", k, format!("n{field}"), "1"]);
        }
        21 => {
            let (k, m) = (s.key("z"), s.below(30));
            s.add(args!["ZINCRBY", k, "0.25", m]);
        }
        22 => {
            let (k, m) = (s.key("set"), s.below(200));
            s.add(args!["SADD", k, m]);
            s.add(args!["SPOP", k]);
        }
        23 => {
            let (k, one, two) = (s.key("set"), s.other("set"), s.other("set"));
            let word = if s.random.random() { "SUNIONSTORE" } else { "SDIFFSTORE" };
            s.add(args![word, k, one, two]);
        }
        24 => {
            let kind = ["n", "q", "text", "h"][s.random.random_range(0..4)];
            let (k, other) = (s.key(kind), s.other(kind));
            s.add(args!["RENAME", k, other]);
        }
        25 if s.version.has(6, 2) => {
            let (k, other) = (s.key("q"), s.other("q"));
            if k != other {
                s.add(args!["COPY", k, other, "REPLACE"]);
            }
        }
        26 | 27 if s.version.has(5, 0) => {
            let k = s.key("x");
            s.add(args!["XADD", k, "MAXLEN", "40", "*", "id", id]);
        }
        28 | 29 => {
            let (n, q, text) = (s.key("n"), s.other("q"), s.other("text"));
            s.add(args!["MULTI"]);
            s.add(args!["INCR", n]);
            s.add(args!["RPUSH", q, format!("in transaction {id}")]);
            s.add(args!["APPEND", text, "|"]);
            s.add(args!["EXEC"]);
        }
        30 => {
            let (n, q, text) = (s.key("n"), s.key("q"), s.key("text"));
            s.add(args!["EVAL", SCRIPT, "3", n, q, text, id]);
        }
        31 if renewals => renewal(s, &id),
        // Soon gone, and never written again.
        32 => {
            let once = s.once("brief");
            s.add(args!["PSETEX", once, "900", id]);
        }
        _ => {
            let k = s.key("q");
            s.add(args!["RPUSH", k, id]);
        }
    }
}

fn renewal(s: &mut Step, id: &str) {
    let k = s.key("lease");
    match s.random.random_range(0..5) {
        0 | 1 => s.add(args!["PSETEX", k, "2500", id]),
        2 => s.add(args!["PEXPIRE", k, "600000"]),
        3 => s.add(args!["PERSIST", k]),
        _ => s.add(args!["APPEND", k, "+"]),
    }
}
