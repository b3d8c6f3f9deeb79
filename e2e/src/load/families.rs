//! The commands, by the kind of key they work on. Kinds do not mix, so that no command meets a
//! value of another type.
//!
//! Left out on purpose, because real replicas differ too: expiries of less than minutes on keys that
//! are written again, approximate trimming, and entries deleted while they are pending.

use anyhow::Result;
use rand::Rng;

use super::Step;
use crate::Client;

const SCRIPT: &str =
    "redis.call('INCR', KEYS[1]) redis.call('RPUSH', KEYS[2], ARGV[1]) return redis.call('LLEN', KEYS[2])";
const LIBRARY: &str = "#!lua name=load\nredis.register_function('load_bump', function(keys, args) return redis.call('INCRBY', keys[1], args[1]) end)";

/// Library that FCALL needs, on every node.
pub(super) fn prepare(client: &mut Client) -> Result<()> {
    if client.version.has(7, 0) {
        for node in &mut client.nodes {
            node.run(args!["FUNCTION", "LOAD", "REPLACE", LIBRARY])?;
        }
    }
    Ok(())
}

pub(super) fn any(s: &mut Step) {
    match s.random.random_range(0..100) {
        0..12 => strings(s),
        12..20 => numbers(s),
        20..26 => bitmaps(s),
        26..42 => lists(s),
        42..51 => sets(s),
        51..62 => hashes(s),
        62..75 => sorted_sets(s),
        75..83 if s.version.has(5, 0) => streams(s),
        83..86 => loglogs(s),
        86..91 => keys(s),
        91..96 => transaction(s),
        _ => script(s),
    }
}

fn strings(s: &mut Step) {
    let (k, v) = (s.key("s"), s.value());
    let newer = s.version.has(6, 2);
    match s.random.random_range(0..14) {
        0 => s.add(args!["SETEX", k, "7000", v]),
        1 => s.add(args!["PSETEX", k, "7000000", v]),
        2 => s.add(args!["SET", k, v, "PX", "5000000", "NX"]),
        3 => s.add(args!["SET", k, v, "EX", "4000", "XX"]),
        4 => s.add(args!["GETSET", k, v]),
        5 => s.add(args!["APPEND", k, "+more"]),
        6 => s.add(args!["SETRANGE", k, "5", "range"]),
        7 => {
            let other = s.other("s");
            s.add(args!["MSET", k, v, other, "both"]);
        }
        8 => {
            let (one, two) = (s.once("s"), s.other("s"));
            s.add(args!["MSETNX", one, v, two, "neither"]);
        }
        9 if newer => s.add(args!["GETEX", k, "EX", "3000"]),
        10 if newer => s.add(args!["GETDEL", k]),
        11 if newer => s.add(args!["SET", k, v, "KEEPTTL"]),
        12 => {
            let once = s.once("short");
            s.add(args!["SET", once, v, "PX", "1500"]);
        }
        _ => s.add(args!["SET", k, v]),
    }
}

fn numbers(s: &mut Step) {
    let (k, n) = (s.key("n"), s.below(1000));
    match s.random.random_range(0..6) {
        0 => s.add(args!["INCR", k]),
        1 => s.add(args!["DECRBY", k, n]),
        2 => s.add(args!["INCRBY", k, n]),
        3 => {
            let k = s.key("f");
            s.add(args!["INCRBYFLOAT", k, format!("{n}.25")]);
        }
        4 => s.add(args!["SETNX", k, n]),
        _ => s.add(args!["DECR", k]),
    }
}

fn bitmaps(s: &mut Step) {
    let (k, n) = (s.key("b"), s.below(2000));
    match s.random.random_range(0..4) {
        0 if s.version.has(3, 2) => {
            s.add(args![
                "BITFIELD", k, "INCRBY", "u8", n, "7", "SET", "i16", "#3", "-9", "OVERFLOW", "SAT", "INCRBY",
                "u4", "0", "3"
            ]);
        }
        1 => {
            let (a, b) = (s.other("b"), s.other("b"));
            let operation = if s.random.random() { "XOR" } else { "OR" };
            s.add(args!["BITOP", operation, k, a, b]);
        }
        _ => {
            let bit = if s.random.random() { "1" } else { "0" };
            s.add(args!["SETBIT", k, n, bit]);
        }
    }
}

fn lists(s: &mut Step) {
    let (k, v) = (s.key("l"), s.value());
    match s.random.random_range(0..18) {
        0 => s.add(args!["LPOP", k]),
        1 => s.add(args!["RPOP", k]),
        2 => s.add(args!["LTRIM", k, "0", "60"]),
        3 => s.add(args!["LSET", k, "1", v]),
        4 => {
            s.add(args!["RPUSH", k, "pivot"]);
            s.add(args!["LINSERT", k, "BEFORE", "pivot", v]);
        }
        5 => s.add(args!["LREM", k, "-1", "pivot"]),
        6 => {
            let other = s.other("l");
            s.add(args!["RPOPLPUSH", k, other]);
        }
        7 if s.version.has(6, 2) => {
            let other = s.other("l");
            s.add(args!["LMOVE", k, other, "LEFT", "RIGHT"]);
        }
        8 if s.version.has(6, 2) => s.add(args!["LPOP", k, "3"]),
        9 if s.version.has(7, 0) => s.add(args!["LMPOP", "1", k, "RIGHT", "COUNT", "2"]),
        10 => {
            s.add(args!["LPUSH", k, v]);
            s.add(args!["BLPOP", k, "1"]);
        }
        11 => {
            let other = s.other("l");
            s.add(args!["RPUSH", k, v]);
            s.add(args!["BRPOPLPUSH", k, other, "1"]);
        }
        12 => s.add(args!["LPUSHX", k, v]),
        13 => {
            let sorted = s.key("sorted");
            s.add(args!["SORT", k, "ALPHA", "LIMIT", "0", "7", "STORE", sorted]);
        }
        14 | 15 => s.add(args!["LPUSH", k, v, "a", "b"]),
        _ => s.add(args!["RPUSH", k, v]),
    }
}

fn sets(s: &mut Step) {
    let (k, a, b) = (s.key("set"), s.below(60), s.below(60));
    match s.random.random_range(0..9) {
        0 => s.add(args!["SREM", k, a, b]),
        1 => s.add(args!["SPOP", k]),
        2 if s.version.has(3, 2) => s.add(args!["SPOP", k, "3"]),
        3 => {
            let other = s.other("set");
            s.add(args!["SMOVE", k, other, a]);
        }
        4 => {
            let (one, two) = (s.other("set"), s.other("set"));
            let command = ["SUNIONSTORE", "SINTERSTORE", "SDIFFSTORE"][s.random.random_range(0..3)];
            s.add(args![command, k, one, two]);
        }
        5 => s.add(args!["SADD", k, format!("text {a}"), format!("text {b}")]),
        _ => s.add(args!["SADD", k, a, b]),
    }
}

fn hashes(s: &mut Step) {
    let (k, f, v) = (s.key("h"), s.below(40), s.value());
    match s.random.random_range(0..11) {
        0 => s.add(args!["HMSET", k, f, v, "second", "2"]),
        1 => s.add(args!["HSETNX", k, f, v]),
        2 => s.add(args!["HINCRBY", k, "count", f]),
        3 => s.add(args!["HINCRBYFLOAT", k, "sum", format!("{f}.5")]),
        4 => s.add(args!["HDEL", k, f, "second"]),
        5 if s.version.has_field_expiry() => {
            s.add(args!["HPEXPIRE", k, "8000000", "FIELDS", "2", f, "count"])
        }
        6 if s.version.has_field_expiry() => s.add(args!["HPERSIST", k, "FIELDS", "1", f]),
        7 if s.version.has(8, 0) || s.version.valkey && s.version.major >= 9 => {
            s.add(args!["HSETEX", k, "EX", "6000", "FIELDS", "1", f, v]);
        }
        _ => s.add(args!["HSET", k, f, v]),
    }
}

fn sorted_sets(s: &mut Step) {
    let (k, m, score) = (s.key("z"), s.below(50), s.below(1000));
    match s.random.random_range(0..18) {
        0 => s.add(args!["ZINCRBY", k, "1.5", m]),
        1 => s.add(args!["ZREM", k, m]),
        2 => s.add(args!["ZREMRANGEBYRANK", k, "0", "1"]),
        3 => s.add(args!["ZREMRANGEBYSCORE", k, "(990", "+inf"]),
        4 => s.add(args!["ZREMRANGEBYLEX", k, "[a", "[b"]),
        5 if s.version.has(5, 0) => s.add(args!["ZPOPMIN", k]),
        6 if s.version.has(5, 0) => s.add(args!["ZPOPMAX", k, "2"]),
        7 => {
            let (a, b) = (s.other("z"), s.other("z"));
            s.add(args!["ZUNIONSTORE", k, "2", a, b, "WEIGHTS", "1", "2", "AGGREGATE", "MAX"]);
        }
        8 => {
            let (a, b) = (s.other("z"), s.other("z"));
            s.add(args!["ZINTERSTORE", k, "2", a, b]);
        }
        9 if s.version.has(6, 2) => {
            let from = s.other("z");
            s.add(args!["ZRANGESTORE", k, from, "0", "20"]);
        }
        10 if s.version.has(6, 2) => s.add(args!["ZADD", k, "GT", "CH", score, m]),
        11 if s.version.has(3, 2) => {
            let geo = s.key("geo");
            s.add(args!["GEOADD", geo, format!("13.{m}"), format!("38.{score}"), m]);
            let from = s.other("geo");
            s.add(args!["GEORADIUS", from, "13.3", "38.3", "60", "km", "STORE", k]);
        }
        12 if s.version.has(6, 2) => {
            let from = s.other("geo");
            s.add(args!["GEOSEARCHSTORE", k, from, "FROMLONLAT", "13", "38", "BYRADIUS", "99", "km"]);
        }
        13 => s.add(args!["ZADD", k, "-inf", m, "inf", "top"]),
        14 if s.version.has(3, 2) => s.add(args!["ZADD", k, "NX", score, m]),
        15 if s.version.has(7, 0) => s.add(args!["ZMPOP", "1", k, "MIN"]),
        _ => s.add(args!["ZADD", k, score, m, "2.25", "quarter"]),
    }
}

fn streams(s: &mut Step) {
    let v = s.value();
    match s.random.random_range(0..6) {
        0 => {
            let k = s.key("x");
            s.add(args!["XADD", k, "MAXLEN", "30", "*", "f", v]);
        }
        1 => {
            let k = s.key("x");
            s.add(args!["XTRIM", k, "MAXLEN", "12"]);
        }
        2 => {
            let once = s.once("x");
            s.add(args!["XADD", once, "5-1", "f", v]);
            s.add(args!["XADD", once, "5-2", "f", "w"]);
            s.add(args!["XDEL", once, "5-1"]);
        }
        choice => {
            let (k, consumer) = (s.key("g"), s.below(3));
            s.add(args!["XGROUP", "CREATE", k, "readers", "$", "MKSTREAM"]);
            s.add(args!["XADD", k, "*", "f", v]);
            // Something is delivered for sure: a consumer made for nothing is not replicated.
            s.add(args!["XREADGROUP", "GROUP", "readers", consumer, "COUNT", "4", "STREAMS", k, ">"]);
            if choice == 3 {
                let once = s.once("g");
                s.add(args!["XADD", once, "1-1", "f", v]);
                s.add(args!["XGROUP", "CREATE", once, "readers", "0"]);
                s.add(args!["XREADGROUP", "GROUP", "readers", "one", "STREAMS", once, ">"]);
                s.add(args!["XCLAIM", once, "readers", "two", "0", "1-1"]);
                s.add(args!["XACK", once, "readers", "1-1"]);
            }
            if choice == 4 && s.version.has(6, 2) {
                s.add(args!["XAUTOCLAIM", k, "readers", consumer, "0", "0", "COUNT", "2"]);
            }
        }
    }
}

fn loglogs(s: &mut Step) {
    let (k, v) = (s.key("p"), s.value());
    match s.random.random_range(0..4) {
        0 => s.add(args!["PFCOUNT", k]),
        // Before 5.0 its result was always dense, since then as sparse as its sources: a newer target differs.
        1 if s.version.has(5, 0) => {
            let other = s.other("p");
            s.add(args!["PFMERGE", k, other]);
        }
        _ => s.add(args!["PFADD", k, v, "x"]),
    }
}

fn keys(s: &mut Step) {
    let kind = ["s", "l", "set", "h", "z", "n"][s.random.random_range(0..6)];
    let (k, other) = (s.key(kind), s.other(kind));
    match s.random.random_range(0..11) {
        0 => s.add(args!["EXPIRE", k, "5000"]),
        1 => s.add(args!["PEXPIRE", k, "6000000"]),
        2 => s.add(args!["EXPIREAT", k, "4000000000"]),
        3 => s.add(args!["PERSIST", k]),
        4 => s.add(args!["RENAME", k, other]),
        5 => s.add(args!["RENAMENX", k, other]),
        6 if s.version.has(4, 0) => s.add(args!["UNLINK", k, other]),
        7 if s.version.has(6, 2) && k != other => s.add(args!["COPY", k, other, "REPLACE"]),
        8 => s.add(args!["EXPIRE", k, "-1"]),
        9 => s.add(args!["PUBLISH", "channel", "message"]),
        _ => s.add(args!["DEL", k]),
    }
}

fn transaction(s: &mut Step) {
    let (n, l, h, z) = (s.key("n"), s.other("l"), s.other("h"), s.other("z"));
    s.add(args!["MULTI"]);
    s.add(args!["INCR", n]);
    s.add(args!["RPUSH", l, "in", "transaction"]);
    s.add(args!["HINCRBY", h, "count", "1"]);
    s.add(args!["ZADD", z, "7", "transaction"]);
    s.add(args!["EXEC"]);
}

fn script(s: &mut Step) {
    let (n, l, v) = (s.key("n"), s.key("l"), s.value());
    if s.version.has(7, 0) && s.random.random() {
        s.add(args!["FCALL", "load_bump", "1", n, "3"]);
    } else {
        s.add(args!["EVAL", SCRIPT, "2", n, l, v]);
    }
}

/// MOVE, SWAPDB and FLUSHDB; the connection stands in the database that the turn says.
pub(super) fn across(s: &mut Step, databases: &[u32], turn: usize) {
    let (Some(first), Some(last)) = (databases.first(), databases.last()) else { return };
    let here = databases.get(turn % databases.len()).copied().unwrap_or(0);
    let there = databases.get((turn + 1) % databases.len()).copied().unwrap_or(0);
    match turn / 8 % 4 {
        0 if s.version.has(4, 0) => s.add(args!["SWAPDB", first.to_string(), last.to_string()]),
        1 => {
            s.add(args!["SELECT", last.to_string()]);
            s.add(args!["FLUSHDB"]);
            s.add(args!["SELECT", here.to_string()]);
        }
        // 2.8 loses the expiry of what it moves, a newer target keeps it.
        _ if here != there && s.version.has(3, 0) => {
            for _ in 0..5 {
                let k = s.key("s");
                s.add(args!["MOVE", k, there.to_string()]);
            }
        }
        _ => {}
    }
}
