use super::*;
use crate::command::lookup;
use crate::command::test_args::TestArgs;

fn class(command: &str) -> Class {
    let args = TestArgs::new(command);
    class_of(lookup(args.args().name()).unwrap(), &args.args())
}

#[test]
fn absolute_commands_may_run_again() {
    for command in [
        "SET k v",
        "SET k NX",
        "SET k v PXAT 5",
        "SET k v KEEPTTL",
        "MSET a 1 b 2",
        "MSETEX 1 NX XX PXAT 5",
        "DEL a b",
        "PERSIST k",
        "PEXPIREAT k 5",
        "RESTORE k 0 p REPLACE ABSTTL",
        "RESTORE-ASKING k 0 p REPLACE",
        "BITFIELD k SET u8 0 1 GET u8 0 OVERFLOW FAIL SET u8 #1 2",
        "LSET l 0 v",
        "SADD s m",
        "HSET h f NX",
        "HSETEX h PXAT 5 FIELDS 1 FNX v",
        "HPEXPIREAT h 5 FIELDS 1 NX",
        "ZADD z 1 NX",
        "ZADD z CH 1 m",
        "GEOADD g 1 2 NX",
        "PFADD p NX",
        "PFMERGE p",
        "PFMERGE p p",
        "XDEL x 1-1",
        "XTRIM x MINID = 5-0",
        "XCLAIM x g c 0 1-1 TIME 5 RETRYCOUNT 1 FORCE JUSTID LASTID 1-1",
        "XGROUP CREATE x g 5-0",
        "XGROUP DESTROY x g",
        "XSETID x 5-0",
        "FUNCTION LOAD REPLACE s",
        "FUNCTION FLUSH",
        "FLUSHALL",
    ] {
        assert_eq!(class(command), Class::Replayable, "{command}");
    }
}

#[test]
fn what_depends_on_the_moment_is_guarded() {
    for command in [
        "SET k v NX",
        "SET k v PXAT 5 xx",
        "SET k v IFEQ w",
        "SETNX k v",
        "MSETNX a 1",
        "MSETEX 1 a 1 PXAT 5 NX",
        "PEXPIREAT k 5 GT",
        "RESTORE k 0 p",
        "INCR k",
        "APPEND k v",
        "BITFIELD k SET u8 0 1 INCRBY u8 0 1",
        "LPUSH l v",
        "LTRIM l 0 5",
        "RENAME a b",
        "MOVE a 1",
        "SUNIONSTORE d a",
        "SORT a STORE d",
        "HINCRBY h f 1",
        "HSETEX h FNX PXAT 5 FIELDS 1 f v",
        "HPEXPIREAT h 5 GT FIELDS 1 f",
        "ZADD z ch GT 1 m",
        "ZADD z INCR 1 m",
        "GEOADD g NX 1 2 m",
        "ZPOPMIN z",
        "PFMERGE p q",
        "XADD x 1-1 f v",
        "XTRIM x MAXLEN 5",
        "XTRIM x MINID ~ 5-0 LIMIT 5",
        "XCLAIM x g c 0 1-1 RETRYCOUNT 1",
        "XGROUP SETID x g $",
        "EVAL s 0",
        "FCALL f 0",
        "FUNCTION LOAD s",
        "FUNCTION DELETE l",
        "FUNCTION RESTORE p APPEND",
        "PUBLISH c m",
        "SWAPDB 0 1",
    ] {
        assert_eq!(class(command), Class::Guarded, "{command}");
    }
}
