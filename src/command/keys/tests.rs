use std::collections::HashSet;

use super::*;
use crate::command::test_args::TestArgs;
use crate::command::{all, lookup};
use proptest::prelude::*;

/// What `COMMAND GETKEYS` of Redis 7.0.15 answers; "" where it says that there are no keys.
#[rustfmt::skip]
const GETKEYS: &[(&str, &str)] = &[
    ("PUBLISH c m", ""),
    ("SPUBLISH c m", ""),
    ("EVAL s 0", ""),
    ("EVAL s 2 a b x", "a b"),
    ("EVALSHA h 1 a", "a"),
    ("FCALL f 1 a x", "a"),
    ("SCRIPT LOAD s", ""),
    ("FUNCTION LOAD s", ""),
    ("FLUSHDB ASYNC", ""),
    ("SWAPDB 0 1", ""),
    ("MOVE a 1", "a"),
    ("DEL a b c", "a b c"),
    ("UNLINK a", "a"),
    ("TOUCH a b", "a b"),
    ("RENAME a b", "a b"),
    ("RENAMENX a b", "a b"),
    ("COPY a b DB 1 REPLACE", "a b"),
    ("PERSIST a", "a"),
    ("EXPIRE a 1", "a"),
    ("PEXPIRE a 1", "a"),
    ("EXPIREAT a 1", "a"),
    ("PEXPIREAT a 1", "a"),
    ("RESTORE a 0 p REPLACE", "a"),
    ("RESTORE-ASKING a 0 p", "a"),
    ("MIGRATE h 1 a 0 5 COPY", "a"),
    (r#"MIGRATE h 1 "" 0 5 COPY KEYS a b"#, "a b"),
    (r#"MIGRATE h 1 "" 0 5 AUTH KEYS KEYS a"#, "a"),
    (r#"MIGRATE h 1 "" 0 5 AUTH2 u KEYS KEYS a b"#, "a b"),
    ("SORT a", "a"),
    ("SORT a BY w_* LIMIT 0 5 GET STORE DESC STORE b", "a b"),
    ("SORT a STORE b STORE c", "a c"),
    ("SET a v", "a"),
    ("SETEX a 1 v", "a"),
    ("PSETEX a 1 v", "a"),
    ("SETNX a v", "a"),
    ("GETSET a v", "a"),
    ("GETDEL a", "a"),
    ("GETEX a EX 1", "a"),
    ("MSET a 1 b 2", "a b"),
    ("MSETNX a 1 b 2 c 3", "a b c"),
    ("APPEND a v", "a"),
    ("INCR a", "a"),
    ("DECR a", "a"),
    ("INCRBY a 1", "a"),
    ("DECRBY a 1", "a"),
    ("INCRBYFLOAT a 1", "a"),
    ("SETRANGE a 0 v", "a"),
    ("SETBIT a 0 1", "a"),
    ("BITFIELD a SET u8 0 1", "a"),
    ("BITOP AND a b c", "a b c"),
    ("BITOP NOT a b", "a b"),
    ("LPUSH a v", "a"),
    ("RPUSH a v", "a"),
    ("LPUSHX a v", "a"),
    ("RPUSHX a v", "a"),
    ("LPOP a 2", "a"),
    ("RPOP a", "a"),
    ("LINSERT a BEFORE p v", "a"),
    ("LSET a 0 v", "a"),
    ("LTRIM a 0 1", "a"),
    ("LREM a 0 v", "a"),
    ("RPOPLPUSH a b", "a b"),
    ("BRPOPLPUSH a b 0", "a b"),
    ("LMOVE a b LEFT RIGHT", "a b"),
    ("BLMOVE a b LEFT RIGHT 0", "a b"),
    ("BLPOP a b 0", "a b"),
    ("BRPOP a 0", "a"),
    ("LMPOP 2 a b LEFT COUNT 2", "a b"),
    ("BLMPOP 0 2 a b LEFT", "a b"),
    ("SADD a m", "a"),
    ("SREM a m", "a"),
    ("SPOP a 2", "a"),
    ("SMOVE a b m", "a b"),
    ("SINTERSTORE a b c", "a b c"),
    ("SUNIONSTORE a b", "a b"),
    ("SDIFFSTORE a b c d", "a b c d"),
    ("HSET a f v", "a"),
    ("HMSET a f v", "a"),
    ("HSETNX a f v", "a"),
    ("HDEL a f", "a"),
    ("HINCRBY a f 1", "a"),
    ("HINCRBYFLOAT a f 1", "a"),
    ("ZADD a NX 1 m", "a"),
    ("ZINCRBY a 1 m", "a"),
    ("ZREM a m", "a"),
    ("ZREMRANGEBYSCORE a 0 1", "a"),
    ("ZREMRANGEBYLEX a - +", "a"),
    ("ZREMRANGEBYRANK a 0 1", "a"),
    ("ZPOPMIN a", "a"),
    ("ZPOPMAX a 2", "a"),
    ("BZPOPMIN a b 0", "a b"),
    ("BZPOPMAX a 0", "a"),
    ("ZMPOP 1 a MIN", "a"),
    ("BZMPOP 0 2 a b MAX", "a b"),
    ("ZRANGESTORE a b 0 1", "a b"),
    ("ZUNIONSTORE a 2 b c WEIGHTS 1 2", "a b c"),
    ("ZINTERSTORE a 1 b", "a b"),
    ("ZDIFFSTORE a 3 b c d", "a b c d"),
    ("GEOADD a 1 2 m", "a"),
    ("GEORADIUS a 1 2 3 km", "a"),
    ("GEORADIUS a 1 2 3 km ASC STORE b", "a b"),
    ("GEORADIUSBYMEMBER a m 3 km STOREDIST b", "a b"),
    ("GEOSEARCHSTORE a b FROMMEMBER m BYRADIUS 1 km", "a b"),
    ("PFADD a v", "a"),
    ("PFCOUNT a b", "a b"),
    ("PFMERGE a b c", "a b c"),
    ("XADD a 1-1 f v", "a"),
    ("XTRIM a MAXLEN 5", "a"),
    ("XDEL a 1-1", "a"),
    ("XACK a g 1-1", "a"),
    ("XCLAIM a g c 0 1-1", "a"),
    ("XAUTOCLAIM a g c 0 0", "a"),
    ("XGROUP CREATE a g 0 MKSTREAM", "a"),
    ("XGROUP SETID a g 0", "a"),
    ("XGROUP DESTROY a g", "a"),
    ("XGROUP CREATECONSUMER a g c", "a"),
    ("XGROUP DELCONSUMER a g c", "a"),
    ("XSETID a 1-1", "a"),
    ("XREADGROUP GROUP STREAMS STREAMS COUNT 5 NOACK STREAMS a b > >", "a b"),
    ("XREADGROUP GROUP g c BLOCK 0 STREAMS a 0", "a"),
    ("SELECT 0", ""),
    ("REPLCONF GETACK *", ""),
    ("CLUSTER INFO", ""),
];

/// Commands that 7.0.15 does not have or does not ask for keys, by their documentation.
const DOCUMENTED: &[(&str, &str)] = &[
    ("PING", ""),
    ("OPINFO x", ""),
    ("MULTI", ""),
    ("EXEC", ""),
    ("FLUSHALL", ""),
    ("TRIMSLOTS RANGES 1 0 100", ""),
    ("PFMERGE a", "a"),
    ("MSETEX 2 a 1 b 2 NX PXAT 5", "a b"),
    ("HSETEX a PXAT 5 FIELDS 1 f v", "a"),
    ("HGETEX a PXAT 5 FIELDS 1 f", "a"),
    ("HGETDEL a FIELDS 1 f", "a"),
    ("HEXPIRE a 5 FIELDS 1 f", "a"),
    ("HPEXPIRE a 5 FIELDS 1 f", "a"),
    ("HEXPIREAT a 5 FIELDS 1 f", "a"),
    ("HPEXPIREAT a 5 FIELDS 1 f", "a"),
    ("HPERSIST a FIELDS 1 f", "a"),
    ("DELIFEQ a v", "a"),
    ("DELEX a IFEQ v", "a"),
    ("XDELEX a KEEPREF IDS 1 1-1", "a"),
    ("XACKDEL a g KEEPREF IDS 1 1-1", "a"),
    ("XCFGSET a IDMP-DURATION 5", "a"),
    ("VADD a VALUES 1 1.0 e", "a"),
    ("VREM a e", "a"),
    ("VSETATTR a e x", "a"),
    ("XREADGROUP GROUP g c CLAIM 5 STREAMS a b > >", "a b"),
];

fn found(command: &str) -> Result<String, CommandError> {
    let args = TestArgs::new(command);
    let spec = lookup(args.args().name()).unwrap_or_else(|| panic!("{command} is not in the table"));
    let mut names = Vec::new();
    keys(spec, &args.args(), &mut |index| {
        names.push(String::from_utf8_lossy(args.args().arg(index).unwrap()).into_owned());
    })?;
    Ok(names.join(" "))
}

#[test]
fn keys_stand_where_a_server_finds_them() {
    for (command, expected) in GETKEYS.iter().chain(DOCUMENTED) {
        assert_eq!(found(command).as_deref(), Ok(*expected), "{command}");
    }
}

#[test]
fn the_examples_cover_the_table() {
    let shown: HashSet<&str> =
        GETKEYS.iter().chain(DOCUMENTED).map(|(command, _)| command.split(' ').next().unwrap()).collect();
    let untested: Vec<_> =
        all().iter().map(|spec| &spec.name).filter(|name| !shown.contains(&***name)).collect();
    assert!(untested.is_empty(), "{untested:?}");
}

#[test]
fn commands_without_their_keys_are_refused() {
    for (command, index) in [
        ("SET", 1),
        ("DEL", 1),
        ("RENAME a", 2),
        ("BITOP AND", 2),
        ("BLPOP 0", 1),
        ("SORT a STORE", 3),
        ("XREADGROUP GROUP g c STREAMS", 5),
        ("XREADGROUP GROUP g c", 4),
        ("MIGRATE h 1", 3),
        ("EVAL s", 2),
    ] {
        let name = command.split(' ').next().unwrap().to_owned();
        let missing = CommandError::MissingArgument { command: name.into(), index };
        assert_eq!(found(command), Err(missing), "{command}");
    }
    for (command, index) in [
        ("EVAL s x a", 2),
        ("EVAL s -1 a", 2),
        ("EVAL s 2 a", 2),
        ("ZUNIONSTORE d 99999999999999999999 a", 2),
        ("ZUNIONSTORE d 9223372036854775807 a", 2),
        ("MSETEX 2 a 1 b", 1),
    ] {
        let name = command.split(' ').next().unwrap().to_owned();
        assert_eq!(
            found(command),
            Err(CommandError::BadKeyCount { command: name.into(), index }),
            "{command}"
        );
    }
}

#[test]
fn routes() {
    for (command, expected) in [
        ("SET foo 1", Route::Slot(12182)),
        ("DEL {foo}a {foo}b foo", Route::Slot(12182)),
        ("DEL foo bar foo", Route::CrossSlot),
        ("SPUBLISH foo m", Route::Slot(12182)),
        ("PUBLISH foo m", Route::Keyless),
        ("EVAL s 0 foo", Route::Keyless),
        ("FLUSHALL", Route::Keyless),
    ] {
        let args = TestArgs::new(command);
        let spec = lookup(args.args().name()).unwrap();
        assert_eq!(route(spec, &args.args()), Ok(expected), "{command}");
    }
}

#[test]
fn database_numbers() {
    for (command, expected) in [
        ("SELECT 3", vec![1]),
        ("MOVE a 3", vec![2]),
        ("SWAPDB 1 2", vec![1, 2]),
        ("COPY a b REPLACE db 3", vec![5]),
        ("COPY DB DB", vec![]),
        ("SET DB DB", vec![]),
    ] {
        let args = TestArgs::new(command);
        let mut indexes = Vec::new();
        database_args(lookup(args.args().name()).unwrap(), &args.args(), &mut |index| indexes.push(index));
        assert_eq!(indexes, expected, "{command}");
    }
}

proptest! {
    #[test]
    fn any_arguments_are_survived(
        at in 0..all().len(),
        words in prop::collection::vec("-?[0-9]{1,3}|[0-9]{18,20}|STORE|STREAMS|KEYS|AUTH2|GROUP|DB|[a-z]?", 0..9),
    ) {
        let spec = &all()[at];
        let args = TestArgs::of(std::iter::once(spec.name.to_string()).chain(words));
        let args = args.args();
        let mut within = true;
        let result = keys(spec, &args, &mut |index| within &= index > 0 && index < args.len());
        prop_assert!(within);
        prop_assert_eq!(result.is_ok(), route(spec, &args).is_ok());
        database_args(spec, &args, &mut |_| ());
        crate::command::class_of(spec, &args);
    }
}
