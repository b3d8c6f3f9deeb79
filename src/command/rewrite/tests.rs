use super::*;
use crate::command::lookup;
use crate::command::test_args::{TestArgs, printed};
use crate::hold;
use proptest::prelude::*;

const CLOCK: Clock = Clock {
    received_at_ms: 1_000_000,
    now_ms: 1_004_000,
    holding: Holding { keys: false, fields: false },
    together: true,
};

fn redis(major: u16, minor: u16) -> ServerVersion {
    ServerVersion { flavor: Flavor::Redis, major, minor, patch: 0 }
}

fn valkey(major: u16, minor: u16) -> ServerVersion {
    ServerVersion { flavor: Flavor::Valkey, major, minor, patch: 0 }
}

/// The commands that `target` gets, joined by `; `. `=`: as it came. `-`: none.
fn sent(command: &str, target: ServerVersion) -> String {
    sent_at(command, target, CLOCK)
}

/// The same with expiries held: times that are are written `+time`.
fn held(command: &str, target: ServerVersion) -> String {
    let sent = sent_at(command, target, Clock { holding: Holding::ALL, ..CLOCK });
    let word = |word: &str| match word.parse::<i64>() {
        Ok(at) if at > hold::KEY / 2 => format!("+{}", at - hold::KEY),
        Ok(at) if at > hold::FIELD / 2 => format!("+{}", at - hold::FIELD),
        _ => word.to_owned(),
    };
    let commands = sent.split("; ").map(|sent| sent.split(' ').map(word).collect::<Vec<_>>().join(" "));
    commands.collect::<Vec<_>>().join("; ")
}

fn sent_at(command: &str, target: ServerVersion, clock: Clock) -> String {
    let args = TestArgs::new(command);
    let spec = lookup(args.args().name()).unwrap();
    let mut out = Vec::new();
    match rewrite(spec, &args.args(), clock, target, &mut out) {
        Rewrite::Unchanged => {
            assert!(out.is_empty(), "{command}");
            "=".to_owned()
        }
        Rewrite::Drop => {
            assert!(out.is_empty(), "{command}");
            "-".to_owned()
        }
        Rewrite::Lossy(0) => {
            assert!(out.is_empty(), "{command}");
            "lossy".to_owned()
        }
        Rewrite::Replaced(count) => {
            let commands = printed(&out);
            assert_eq!(commands.len(), count as usize, "{command}");
            commands.into_iter().map(without_script).collect::<Vec<_>>().join("; ")
        }
        Rewrite::Lossy(count) => {
            assert_eq!(printed(&out).len(), count as usize, "{command}");
            format!("lossy {}", printed(&out).join("; "))
        }
    }
}

/// Keys and arguments tell enough.
fn without_script(command: String) -> String {
    let behind = |end: &str| command.rfind(end).map(|at| at + end.len());
    match behind(" end ").max(behind("#r==0 ")) {
        Some(at) if command.starts_with("EVAL ") => format!("EVAL script {}", &command[at..]),
        _ => command,
    }
}

#[test]
fn expiries_count_from_the_receipt() {
    for (command, new, old) in [
        ("setex k 10 v", "SET k v PXAT 1010000", "SET k v PX 6000"),
        ("PSETEX k 10500 v", "SET k v PXAT 1010500", "SET k v PX 6500"),
        ("SET k v ex 10", "SET k v PXAT 1010000", "SET k v PX 6000"),
        ("SET k v NX PX 3000", "SET k v PXAT 1003000", "SET k v PX 1"),
        ("SET k v PX 3000 GET XX", "SET k v PXAT 1003000", "SET k v PX 1"),
        ("SET k v PXAT 1010000", "=", "SET k v PX 6000"),
        ("SET k v EXAT 1010", "=", "SET k v PX 6000"),
        ("SET k v NX", "SET k v", "SET k v"),
        ("SET k v", "=", "="),
        ("SET k v KEEPTTL", "=", "EVAL script 1 k v"),
        ("SET k v IFEQ NX", "SET k v", "SET k v"),
        ("SET k v IFEQ EX KEEPTTL", "SET k v KEEPTTL", "EVAL script 1 k v"),
        ("EXPIRE k 10", "PEXPIREAT k 1010000", "PEXPIREAT k 1010000"),
        ("EXPIRE k -5", "PEXPIREAT k 995000", "PEXPIREAT k 995000"),
        ("PEXPIRE k 10 GT", "PEXPIREAT k 1000010", "PEXPIREAT k 1000010"),
        ("PEXPIREAT k 5", "=", "="),
        ("PEXPIREAT k 5 XX", "PEXPIREAT k 5", "PEXPIREAT k 5"),
        ("EXPIREAT k 5 XX", "PEXPIREAT k 5000", "PEXPIREAT k 5000"),
        ("GETEX k EX 10", "PEXPIREAT k 1010000", "PEXPIREAT k 1010000"),
        ("GETEX k PXAT 77", "PEXPIREAT k 77", "PEXPIREAT k 77"),
        ("GETEX k PERSIST", "PERSIST k", "PERSIST k"),
        ("GETEX k", "-", "-"),
        ("RESTORE k 0 p", "=", "RESTORE k 0 p"),
        ("RESTORE k 0 p REPLACE", "=", "RESTORE k 0 p REPLACE"),
        ("RESTORE k 9000 p REPLACE", "RESTORE k 1009000 p REPLACE ABSTTL", "RESTORE k 5000 p REPLACE"),
        ("RESTORE k 1010000 p ABSTTL IDLETIME 5", "=", "RESTORE k 6000 p"),
        ("RESTORE k 5 p ABSTTL", "=", "RESTORE k 1 p"),
        ("RESTORE-ASKING k 0 p REPLACE", "RESTORE k 0 p REPLACE", "RESTORE k 0 p REPLACE"),
        (
            "restore-asking k 1010000 p REPLACE ABSTTL",
            "RESTORE k 1010000 p REPLACE ABSTTL",
            "RESTORE k 6000 p REPLACE",
        ),
        ("RESTORE-ASKING k 9000 p", "RESTORE k 1009000 p ABSTTL", "RESTORE k 5000 p"),
    ] {
        assert_eq!(sent(command, redis(7, 0)), new, "{command} → 7.0");
        assert_eq!(sent(command, valkey(8, 1)), new, "{command} → Valkey 8.1");
        assert_eq!(sent(command, redis(4, 0)), old, "{command} → 4.0");
    }
    assert_eq!(sent("SETEX k 10 v", redis(6, 2)), "SET k v PXAT 1010000");
    assert_eq!(sent("SETEX k 10 v", redis(6, 0)), "SET k v PX 6000");
    assert_eq!(sent("RESTORE k 9000 p REPLACE", redis(2, 8)), "DEL k; RESTORE k 5000 p");
    assert_eq!(sent("RESTORE k 9000 p", redis(5, 0)), "RESTORE k 1009000 p ABSTTL");
}

#[test]
fn field_expiries_count_from_the_receipt() {
    let new = redis(8, 2);
    assert_eq!(sent("HEXPIRE h 10 FIELDS 1 f", new), "HPEXPIREAT h 1010000 FIELDS 1 f");
    assert_eq!(sent("HPEXPIRE h 10 GT FIELDS 2 f g", new), "HPEXPIREAT h 1000010 GT FIELDS 2 f g");
    assert_eq!(sent("HSETEX h FNX EX 10 FIELDS 1 f v", new), "HSETEX h PXAT 1010000 FIELDS 1 f v");
    for command in ["HSETEX h PXAT 77 FIELDS 1 f v", "HSETEX h KEEPTTL FIELDS 1 f v"] {
        assert_eq!(sent(command, new), "=");
    }
    let before_hsetex = redis(7, 4);
    assert_eq!(sent("HSETEX h KEEPTTL FIELDS 1 f v", before_hsetex), "=");
    assert_eq!(sent("HSETEX h FIELDS 1 f v", before_hsetex), "HSET h f v");
    assert_eq!(
        sent("HSETEX h PXAT 77 FIELDS 2 f v g w", before_hsetex),
        "HSET h f v g w; HPEXPIREAT h 77 FIELDS 2 f g"
    );
    for old in [redis(7, 2), valkey(8, 1)] {
        assert_eq!(sent("HSETEX h KEEPTTL FIELDS 2 f v g w", old), "HSET h f v g w");
        assert_eq!(sent("HSETEX h PXAT 77 FIELDS 1 f v", old), "lossy HSET h f v");
        for command in ["HEXPIRE h 10 FIELDS 1 f", "HPEXPIREAT h 10 FIELDS 1 f", "HGETEX h EX 1 FIELDS 1 f"] {
            assert_eq!(sent(command, old), "lossy", "{command}");
        }
        // There is none.
        assert_eq!(sent("HPERSIST h FIELDS 1 f", old), "-");
        assert_eq!(sent("HGETEX h PERSIST FIELDS 1 f", old), "-");
    }
    assert_eq!(sent("HSETEX h KEEPTTL FIELDS 2 f v g w", redis(3, 2)), "HMSET h f v g w");
}

#[test]
fn whatever_expires_is_held() {
    for (command, new, old) in [
        ("setex k 10 v", "SET k v PXAT +1010000", "SET k v PX +6000"),
        ("PSETEX k 10500 v", "SET k v PXAT +1010500", "SET k v PX +6500"),
        ("SET k v ex 10", "SET k v PXAT +1010000", "SET k v PX +6000"),
        ("SET k v NX PX 3000", "SET k v PXAT +1003000", "SET k v PX +-1000"),
        ("SET k v PXAT 1010000", "SET k v PXAT +1010000", "SET k v PX +6000"),
        ("SET k v EXAT 1010 GET", "SET k v PXAT +1010000", "SET k v PX +6000"),
        ("SET k v PXAT 77", "SET k v PXAT +77", "SET k v PX +-1003923"),
        ("SET k v", "=", "="),
        ("SET k v KEEPTTL", "=", "EVAL script 1 k v"),
        ("EXPIRE k 10", "PEXPIREAT k +1010000", "PEXPIREAT k +1010000"),
        ("PEXPIRE k 10 GT", "PEXPIREAT k +1000010", "PEXPIREAT k +1000010"),
        ("PEXPIREAT k 5", "PEXPIREAT k +5", "PEXPIREAT k +5"),
        ("PEXPIREAT k -5", "PEXPIREAT k +1", "PEXPIREAT k +1"),
        ("pexpireat k 5 lt", "PEXPIREAT k +5", "PEXPIREAT k +5"),
        ("EXPIREAT k 5 XX", "PEXPIREAT k +5000", "PEXPIREAT k +5000"),
        ("PEXPIREAT k 5 HOW", "=", "="),
        ("PERSIST k", "=", "="),
        ("GETEX k EX 10", "PEXPIREAT k +1010000", "PEXPIREAT k +1010000"),
        ("GETEX k PXAT 77", "PEXPIREAT k +77", "PEXPIREAT k +77"),
        ("GETEX k PERSIST", "PERSIST k", "PERSIST k"),
        ("RESTORE k 0 p", "=", "RESTORE k 0 p"),
        ("RESTORE k 9000 p REPLACE", "RESTORE k +1009000 p REPLACE ABSTTL", "RESTORE k +5000 p REPLACE"),
        ("RESTORE k 1010000 p ABSTTL FREQ 5", "RESTORE k +1010000 p ABSTTL FREQ 5", "RESTORE k +6000 p"),
        (
            "restore-asking k 1010000 p REPLACE ABSTTL",
            "RESTORE k +1010000 p REPLACE ABSTTL",
            "RESTORE k +6000 p REPLACE",
        ),
    ] {
        assert_eq!(held(command, redis(7, 0)), new, "{command} → 7.0");
        assert_eq!(held(command, valkey(8, 1)), new, "{command} → Valkey 8.1");
        assert_eq!(held(command, redis(4, 0)), old, "{command} → 4.0");
    }
    for (command, expected) in [
        ("HEXPIRE h 10 FIELDS 1 f", "HPEXPIREAT h +1010000 FIELDS 1 f"),
        ("HPEXPIREAT h 5 FIELDS 1 f", "HPEXPIREAT h +5 FIELDS 1 f"),
        // It may hold for some of the fields only.
        ("hpexpireat h 5 GT FIELDS 2 f g", "HPEXPIREAT h +5 GT FIELDS 2 f g"),
        ("HEXPIREAT h 5 FIELDS 1 f", "HPEXPIREAT h +5000 FIELDS 1 f"),
        ("HSETEX h PXAT 77 FIELDS 1 f v", "HSETEX h PXAT +77 FIELDS 1 f v"),
        ("HSETEX h FNX EX 10 FIELDS 1 f v", "HSETEX h PXAT +1010000 FIELDS 1 f v"),
        ("HSETEX h KEEPTTL FIELDS 1 f v", "="),
        ("HGETEX h PXAT 77 FIELDS 2 f g", "HPEXPIREAT h +77 FIELDS 2 f g"),
        ("HGETEX h EX 10 FIELDS 1 f", "HPEXPIREAT h +1010000 FIELDS 1 f"),
        ("HGETEX h PERSIST FIELDS 1 f", "HPERSIST h FIELDS 1 f"),
        ("HGETEX h FIELDS 1 f", "-"),
        ("MSETEX 2 a 1 b 2 PXAT 77", "MSETEX 2 a 1 b 2 PXAT +77"),
    ] {
        assert_eq!(held(command, valkey(9, 1)), expected, "{command}");
    }
    assert_eq!(held("MSETEX 2 a 1 b 2 EX 10", redis(8, 0)), "SET a 1 PXAT +1010000; SET b 2 PXAT +1010000");
    // Conditions of a key compare true times with held ones.
    assert_eq!(sent("PEXPIREAT k 1010000 GT", redis(7, 0)), "PEXPIREAT k 1010000");
}

#[test]
fn a_hash_that_is_restored_has_its_fields_held() {
    let value = [&1_000_000_i64.to_le_bytes()[..], b"\x01\x01\x01f\x01v"].concat();
    let mut payload = Vec::new();
    crate::rdb::append_restore_payload(&mut payload, 24, &value, 12);
    let mut frame = Vec::new();
    crate::resp::encode_command(&[b"RESTORE".as_slice(), b"h", b"0", &payload], &mut frame);
    let mut spans = Vec::new();
    crate::resp::frame::parse_frame(&frame, &mut spans).unwrap();
    let args = Args { frame: &frame, spans: &spans };
    let (spec, mut out) = (lookup(b"RESTORE").unwrap(), Vec::new());
    let clock = Clock { holding: Holding::ALL, ..CLOCK };
    assert_eq!(rewrite(spec, &args, clock, redis(8, 2), &mut out), Rewrite::Replaced(1));
    let value = [&(1_000_000 + hold::FIELD).to_le_bytes()[..], b"\x01\x01\x01f\x01v"].concat();
    let (mut held, mut expected) = (Vec::new(), Vec::new());
    crate::rdb::append_restore_payload(&mut held, 24, &value, 12);
    crate::resp::encode_command(&[b"RESTORE".as_slice(), b"h", b"0", &held], &mut expected);
    assert_eq!(out, expected);
}

#[test]
fn pairs_with_an_expiry() {
    let command = "MSETEX 2 a 1 b 2 EX 10";
    assert_eq!(sent(command, redis(8, 4)), "MSETEX 2 a 1 b 2 PXAT 1010000");
    assert_eq!(sent(command, valkey(9, 1)), "MSETEX 2 a 1 b 2 PXAT 1010000");
    assert_eq!(sent(command, valkey(9, 0)), "SET a 1 PXAT 1010000; SET b 2 PXAT 1010000");
    assert_eq!(sent(command, redis(5, 0)), "SET a 1 PX 6000; SET b 2 PX 6000");
    assert_eq!(sent("MSETEX 2 a 1 b 2 KEEPTTL", redis(5, 0)), "EVAL script 1 a 1; EVAL script 1 b 2");
    assert_eq!(sent("MSETEX 1 a NX XX PXAT 5", redis(8, 4)), "=");
    assert_eq!(sent("MSETEX 1 a 1 NX KEEPTTL", redis(8, 0)), "SET a 1 KEEPTTL");
    assert_eq!(sent("MSETEX 1 a 1", redis(8, 0)), "SET a 1");
    assert_eq!(sent("MSETEX 9 a 1", redis(8, 0)), "=");
}

#[test]
fn what_the_target_does_not_know() {
    for (command, before, at, since) in [
        ("UNLINK a b", "DEL a b", "=", (4, 0)),
        ("GETDEL a", "DEL a", "=", (6, 2)),
        ("LPOP l 2", "LTRIM l 2 -1", "=", (6, 2)),
        ("rpop l 2", "LTRIM l 0 -3", "=", (6, 2)),
        ("LPOP l", "=", "=", (6, 2)),
        ("ZPOPMIN z", "ZREMRANGEBYRANK z 0 0", "=", (5, 0)),
        ("ZPOPMAX z 3", "ZREMRANGEBYRANK z -3 -1", "=", (5, 0)),
        ("LMOVE a b RIGHT left", "RPOPLPUSH a b", "=", (6, 2)),
        ("LMOVE a b LEFT LEFT", "EVAL script 2 a b LPOP LPUSH", "=", (6, 2)),
        ("LMOVE a b LEFT right", "EVAL script 2 a b LPOP RPUSH", "=", (6, 2)),
        ("BLMOVE a b RIGHT RIGHT 0", "EVAL script 2 a b RPOP RPUSH", "LMOVE a b RIGHT RIGHT", (6, 2)),
        ("COPY a b", "EVAL script 2 a b", "=", (6, 2)),
        ("COPY a b DB 3 REPLACE", "EVAL script 2 a b 3", "=", (6, 2)),
        ("MOVE a 3", "EVAL script 1 a 3", "=", (3, 0)),
        ("HSET h f v g w", "HMSET h f v g w", "=", (4, 0)),
        ("HSET h f v", "=", "=", (4, 0)),
        ("LPUSHX l a b", "LPUSH l a b", "=", (4, 0)),
        ("RPUSHX l a", "=", "=", (4, 0)),
        ("SPUBLISH c m", "-", "=", (7, 0)),
        ("SCRIPT FLUSH ASYNC", "SCRIPT FLUSH", "=", (6, 2)),
        ("SCRIPT LOAD x", "=", "=", (6, 2)),
        ("ZADD z GT 1 m", "ZADD z 1 m", "=", (6, 2)),
        ("ZADD z GT CH 1 m 2 n", "EVAL script 1 z \"\" GT 1 m 2 n", "=", (6, 2)),
        ("ZADD z XX LT 1 m 2 n", "EVAL script 1 z XX LT 1 m 2 n", "=", (6, 2)),
        ("ZADD z LT INCR 1 m", "ZINCRBY z 1 m", "=", (6, 2)),
        ("ZADD z 1 m 2 n", "=", "=", (6, 2)),
        ("ZRANGESTORE d s 0 -1", "EVAL script 2 d s ZRANGE s 0 -1", "=", (6, 2)),
        (
            "ZRANGESTORE d s (1 5 BYSCORE REV LIMIT 0 3",
            "EVAL script 2 d s ZREVRANGEBYSCORE s (1 5 LIMIT 0 3",
            "=",
            (6, 2),
        ),
        ("ZDIFFSTORE d 2 a b", "EVAL script 3 d a b", "=", (6, 2)),
        ("ZDIFFSTORE d 3 a b", "=", "=", (6, 2)),
        (
            "GEOSEARCHSTORE d s FROMLONLAT 1 2 BYRADIUS 9 km COUNT 5 ASC STOREDIST",
            "DEL d; GEORADIUS s 1 2 9 km COUNT 5 ASC STOREDIST d",
            "=",
            (6, 2),
        ),
        (
            "GEOSEARCHSTORE d s FROMMEMBER m BYRADIUS 9 km",
            "DEL d; GEORADIUSBYMEMBER s m 9 km STORE d",
            "=",
            (6, 2),
        ),
        ("GEOSEARCHSTORE d d FROMMEMBER m BYRADIUS 9 km", "GEORADIUSBYMEMBER d m 9 km STORE d", "=", (6, 2)),
        ("georadius s 1 2 9 km STORE d", "DEL d; GEORADIUS s 1 2 9 km STORE d", "=", (6, 2)),
        ("GEORADIUS s 1 2 9 km STORE s", "=", "=", (6, 2)),
        ("GEORADIUS s 1 2 9 km WITHDIST ASC", "=", "=", (6, 2)),
        ("GEORADIUSBYMEMBER s m 9 km STORE d", "DEL d; GEORADIUSBYMEMBER s m 9 km STORE d", "=", (6, 2)),
        ("GEOSEARCHSTORE d s FROMMEMBER m BYBOX 9 9 km", "=", "=", (6, 2)),
        ("GEOSEARCHSTORE d s FROMMEMBER m BYRADIUS 9 km COUNT 5 ANY", "=", "=", (6, 2)),
        ("BLMOVE a b RIGHT LEFT 0", "RPOPLPUSH a b", "LMOVE a b RIGHT LEFT", (6, 2)),
        ("BRPOPLPUSH a b 0", "RPOPLPUSH a b", "RPOPLPUSH a b", (6, 2)),
        ("FLUSHALL ASYNC", "FLUSHALL", "=", (4, 0)),
        ("FLUSHDB SYNC", "FLUSHDB", "=", (6, 2)),
        ("FLUSHDB", "=", "=", (6, 2)),
        ("XADD s NOMKSTREAM 1-1 f v", "XADD s 1-1 f v", "=", (6, 2)),
        ("XADD s MAXLEN 5 1-1 f v", "=", "=", (6, 2)),
        (
            "XADD s MAXLEN = 5 LIMIT 9 1-1 f v",
            "XADD s MAXLEN = 5 1-1 f v",
            "XADD s MAXLEN = 5 1-1 f v",
            (6, 2),
        ),
        ("XADD s MINID = 1-0 2-1 f v", "XADD s 2-1 f v; EVAL script 1 s 0-18446744073709551615", "=", (6, 2)),
        ("XTRIM s MINID = 7-3", "EVAL script 1 s 7-2", "=", (6, 2)),
        ("XTRIM s MINID 0", "-", "=", (6, 2)),
        ("XTRIM s MAXLEN = 5", "=", "=", (6, 2)),
        ("XTRIM s MAXLEN = 5 LIMIT 9", "XTRIM s MAXLEN = 5", "XTRIM s MAXLEN = 5", (6, 2)),
        ("XTRIM s MAXLEN ~ 5", "=", "=", (6, 2)),
        ("XTRIM s MAXLEN = 5 KEEPREF", "XTRIM s MAXLEN = 5", "=", (8, 2)),
        ("XADD s DELREF MAXLEN = 5 1-1 f v", "=", "=", (8, 2)),
        ("XDELEX s KEEPREF IDS 2 1-1 2-1", "XDEL s 1-1 2-1", "=", (8, 2)),
        ("XDELEX s ACKED IDS 1 1-1", "=", "=", (8, 2)),
        ("XGROUP CREATECONSUMER s g c", "XREADGROUP GROUP g c COUNT 1 STREAMS s 0", "=", (6, 2)),
        ("XGROUP SETID s g 1-1 ENTRIESREAD 5", "XGROUP SETID s g 1-1", "=", (7, 0)),
        ("XGROUP CREATE s g 0 MKSTREAM ENTRIESREAD 5", "XGROUP CREATE s g 0 MKSTREAM", "=", (7, 0)),
        ("XSETID s 1-1 ENTRIESADDED 5 MAXDELETEDID 0-0", "XSETID s 1-1", "=", (7, 0)),
        ("HGETDEL h FIELDS 2 f g", "HDEL h f g", "HDEL h f g", (8, 0)),
    ] {
        let (major, minor) = since;
        assert_eq!(sent(command, redis(major - 1, 0)), before, "{command} before {major}.{minor}");
        assert_eq!(sent(command, redis(major, minor)), at, "{command} from {major}.{minor}");
    }
}

#[test]
fn nonsense_is_left_to_the_target() {
    for command in [
        "SETEX k x v",
        "SETEX k 0 v",
        "SETEX k 9223372036854775807 v",
        "SET k v EX",
        "SET k v EX x",
        "SET k v EX 9223372036854775807",
        "SET k v NEWOPTION",
        "EXPIRE k x",
        "PEXPIRE k 9223372036854775807",
        "RESTORE k x p",
        "LPOP l -1",
        "LPOP l x",
        "ZPOPMAX z -9223372036854775808",
        "HSETEX h WHAT EX 5 FIELDS 1 f v",
        "MSETEX x a b c",
    ] {
        assert_eq!(sent(command, redis(2, 8)), "=", "{command}");
        assert_eq!(sent(command, redis(8, 4)), "=", "{command}");
    }
}

#[test]
fn no_script_spans_slots() {
    let clock = Clock { together: false, ..CLOCK };
    for command in ["COPY a b", "LMOVE a b LEFT LEFT", "ZRANGESTORE a b 0 1", "ZDIFFSTORE a 1 b"] {
        assert_eq!(sent_at(command, redis(5, 0), clock), "=", "{command}");
    }
}

/// A payload of one kind of server, on another.
#[test]
fn restored_values_are_made_to_fit() {
    let sent = |type_byte: u8, value: &[u8], version: u16, target: ServerVersion| {
        let (mut payload, mut frame, mut spans, mut out) = (vec![], vec![], vec![], vec![]);
        crate::rdb::append_restore_payload(&mut payload, type_byte, value, version);
        crate::resp::encode_command(&[b"RESTORE".as_slice(), b"k", b"0", &payload], &mut frame);
        crate::resp::frame::parse_frame(&frame, &mut spans).unwrap();
        let args = Args { frame: &frame, spans: &spans };
        let rewritten = rewrite(lookup(b"RESTORE").unwrap(), &args, CLOCK, target, &mut out);
        if rewritten == Rewrite::Unchanged {
            return (rewritten, 0, 0);
        }
        crate::resp::frame::parse_frame(&out, &mut spans).unwrap();
        let payload = Args { frame: &out, spans: &spans }.arg(3).unwrap().to_vec();
        let dump = crate::rdb::parse_dump(&payload).unwrap();
        (rewritten, dump.type_byte, dump.version)
    };
    let list = b"\x01\x01\x01a";
    assert_eq!(sent(18, list, 12, redis(6, 2)), (Rewrite::Replaced(1), 1, 9));
    assert_eq!(sent(18, list, 12, redis(2, 8)), (Rewrite::Replaced(1), 1, 6));
    assert_eq!(sent(18, list, 12, valkey(9, 1)), (Rewrite::Replaced(1), 18, 80));
    assert_eq!(sent(18, list, 10, valkey(9, 1)), (Rewrite::Unchanged, 0, 0));
    assert_eq!(sent(2, b"\x01\x01a", 6, redis(3, 2)).0, Rewrite::Replaced(1), "3.2.0 takes 7 only");
    let hash = [&5i64.to_le_bytes()[..], b"\x01\x01\x01f\x01v"].concat();
    assert_eq!(sent(24, &hash, 12, valkey(9, 1)), (Rewrite::Replaced(1), 22, 80));
    assert_eq!(sent(24, &hash, 12, redis(7, 0)), (Rewrite::Lossy(1), 4, 10));
    // The target says what it does not have.
    assert_eq!(sent(21, b"\x00", 12, redis(3, 0)), (Rewrite::Replaced(1), 21, 12));
}

#[test]
fn plain_commands_are_not_looked_at() {
    for (command, may) in
        [("SET k v", false), ("SADD s m", false), ("LPOP l", false), ("SET k v PXAT 1", true)]
    {
        let args = TestArgs::new(command);
        assert_eq!(may_rewrite(lookup(args.args().name()).unwrap(), &args.args()), may, "{command}");
    }
}

proptest! {
    /// Whatever stands in a command, the rewriter neither fails nor writes broken frames.
    #[test]
    fn any_arguments_give_whole_frames(
        at in 0..crate::command::all().len(),
        words in prop::collection::vec(
            "[0-9]{1,2}|-?[0-9]{18,20}|EX|PX|PXAT|EXAT|NX|XX|GT|IFEQ|KEEPTTL|FIELDS|ABSTTL|REPLACE|FREQ|RIGHT|LEFT|ENTRIESREAD|NOMKSTREAM|MINID|MAXLEN|=|LIMIT|IDS|KEEPREF|DB|BYSCORE|BYRADIUS|FROMMEMBER|CREATECONSUMER|FLUSH|[a-z]?",
            0..9,
        ),
        old in any::<bool>(),
        holds in any::<bool>(),
    ) {
        let spec = &crate::command::all()[at];
        let args = TestArgs::of(std::iter::once(spec.name.to_string()).chain(words));
        let mut out = b"*1\r\n$4\r\nPING\r\n".to_vec();
        let target = if old { redis(2, 8) } else { redis(8, 4) };
        let clock = Clock { holding: Holding { keys: holds, fields: holds }, ..CLOCK };
        let commands = match rewrite(spec, &args.args(), clock, target, &mut out) {
            Rewrite::Replaced(count) | Rewrite::Lossy(count) => count,
            Rewrite::Unchanged | Rewrite::Drop => 0,
        };
        prop_assert_eq!(printed(&out).len(), 1 + commands as usize);
    }
}
