//! The table of write commands and the search in it.

use super::Class::{Guarded, Replayable};
use super::{Across, Class, CommandSpec, Condition, KeySpec, Kind, Rewriting};
use std::borrow::Cow;

/// The command called `name`, in any case. `None`: not a write command of Redis 2.8–8.4 or Valkey 7.2–9.1.
/// Neither allocates nor compares more than a few words.
pub fn lookup(name: &[u8]) -> Option<&'static CommandSpec> {
    let packed = pack(name)?;
    let mut place = place_of(packed);
    loop {
        // 0 marks a free place, and the index is at most half full: the walk ends.
        let entry = usize::from(INDEX[place]).checked_sub(1)?;
        if PACKED[entry] == packed {
            return TABLE.get(entry).filter(|spec| spec.name.len() == name.len());
        }
        place = (place + 1) % INDEX_SIZE;
    }
}

/// Every command of the table, in no particular order.
pub fn all() -> &'static [CommandSpec] {
    TABLE
}

const WORDS: usize = 3;
const LONGEST_NAME: usize = WORDS * 8;
const INDEX_BITS: u32 = 10;
const INDEX_SIZE: usize = 1 << INDEX_BITS;

static PACKED: [[u64; WORDS]; TABLE.len()] = pack_table();
/// Hash → position in the table, plus 1; linear probing.
static INDEX: [u8; INDEX_SIZE] = index_table();

/// The upper-case name in words, padded with zeros.
const fn pack(name: &[u8]) -> Option<[u64; WORDS]> {
    if name.len() > LONGEST_NAME {
        return None;
    }
    let mut words = [0u64; WORDS];
    let mut at = 0;
    while at < name.len() {
        words[at / 8] |= (name[at].to_ascii_uppercase() as u64) << (at % 8 * 8);
        at += 1;
    }
    Some(words)
}

const fn place_of([a, b, c]: [u64; WORDS]) -> usize {
    let mixed = (a ^ b.rotate_left(21) ^ c.rotate_left(43)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (u64::BITS - INDEX_BITS)) as usize
}

const fn pack_table() -> [[u64; WORDS]; TABLE.len()] {
    let mut packed = [[0; WORDS]; TABLE.len()];
    let mut at = 0;
    while at < TABLE.len() {
        if let Cow::Borrowed(name) = &TABLE[at].name
            && let Some(words) = pack(name.as_bytes())
        {
            packed[at] = words;
        }
        at += 1;
    }
    packed
}

const fn index_table() -> [u8; INDEX_SIZE] {
    assert!(TABLE.len() < u8::MAX as usize && TABLE.len() <= INDEX_SIZE / 2);
    let packed = pack_table();
    let mut index = [0; INDEX_SIZE];
    let mut at = 0;
    while at < TABLE.len() {
        let mut place = place_of(packed[at]);
        while index[place] != 0 {
            place = (place + 1) % INDEX_SIZE;
        }
        index[place] = at as u8 + 1;
        at += 1;
    }
    index
}

const NONE: KeySpec = KeySpec::None;
const ONE: KeySpec = KeySpec::Single;
const TWO: KeySpec = KeySpec::Range { first: 1, last: 2, step: 1 };
const ALL: KeySpec = KeySpec::Range { first: 1, last: -1, step: 1 };
const PAIRS: KeySpec = KeySpec::Range { first: 1, last: -1, step: 2 };
const BEFORE_TIMEOUT: KeySpec = KeySpec::Range { first: 1, last: -2, step: 1 };
const SECOND: KeySpec = KeySpec::Range { first: 2, last: 2, step: 1 };
const FROM_SECOND: KeySpec = KeySpec::Range { first: 2, last: -1, step: 1 };
const STORE_COUNTED: KeySpec = KeySpec::Counted { dest: 1, count: 2, step: 1 };
const COUNTED: KeySpec = KeySpec::Counted { dest: 0, count: 1, step: 1 };
const COUNTED_SECOND: KeySpec = KeySpec::Counted { dest: 0, count: 2, step: 1 };
const COUNTED_PAIRS: KeySpec = KeySpec::Counted { dest: 0, count: 1, step: 2 };

impl CommandSpec {
    pub(super) const fn new(name: Cow<'static, str>, arity: i16, keys: KeySpec, class: Class) -> Self {
        Self {
            name,
            arity,
            keys,
            class,
            kind: Kind::Data,
            condition: Condition::None,
            rewriting: Rewriting::None,
            rewrite_from: u8::MAX,
            across: Across::Impossible,
        }
    }

    /// XADD and the like.
    pub fn is_of_streams(&self) -> bool {
        matches!(self.name.as_bytes(), [b'X', ..])
    }

    const fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    const fn unless(mut self, condition: Condition) -> Self {
        self.condition = condition;
        self
    }

    const fn rewritten(mut self, rewriting: Rewriting, from: u8) -> Self {
        self.rewriting = rewriting;
        self.rewrite_from = from;
        self
    }

    const fn across(mut self, across: Across) -> Self {
        self.across = across;
        self
    }
}

const fn command(name: &'static str, arity: i16, keys: KeySpec, class: Class) -> CommandSpec {
    CommandSpec::new(Cow::Borrowed(name), arity, keys, class)
}

static TABLE: &[CommandSpec] = &[
    // The stream itself
    command("PING", -1, NONE, Replayable).kind(Kind::Noise),
    command("REPLCONF", -1, NONE, Replayable).kind(Kind::Noise),
    command("OPINFO", -1, NONE, Replayable).kind(Kind::Noise),
    command("SELECT", 2, NONE, Replayable).kind(Kind::Select),
    command("MULTI", 1, NONE, Replayable).kind(Kind::Multi),
    command("EXEC", 1, NONE, Replayable).kind(Kind::Exec),
    command("CLUSTER", -2, NONE, Guarded).kind(Kind::TopologyChange),
    command("TRIMSLOTS", -2, NONE, Guarded).kind(Kind::TopologyChange),
    command("PUBLISH", 3, NONE, Guarded).kind(Kind::Publish),
    command("SPUBLISH", 3, NONE, Guarded).kind(Kind::ShardPublish).rewritten(Rewriting::ShardPublish, 3),
    // Scripts and functions
    command("EVAL", -3, COUNTED_SECOND, Guarded).kind(Kind::Script),
    command("EVALSHA", -3, COUNTED_SECOND, Guarded).kind(Kind::Script),
    command("FCALL", -3, COUNTED_SECOND, Guarded).kind(Kind::Script),
    command("SCRIPT", -2, NONE, Replayable).kind(Kind::ScriptCache).rewritten(Rewriting::Script, 3),
    command("FUNCTION", -2, NONE, Replayable).kind(Kind::Function).unless(Condition::Function),
    // Keyspace
    command("FLUSHALL", -1, NONE, Replayable).kind(Kind::Flush).rewritten(Rewriting::Flush, 2),
    command("FLUSHDB", -1, NONE, Replayable).kind(Kind::Flush).rewritten(Rewriting::Flush, 2),
    command("SWAPDB", 3, NONE, Guarded).kind(Kind::SwapDb),
    command("MOVE", 3, ONE, Guarded).kind(Kind::Move).rewritten(Rewriting::Move, 3),
    command("DEL", -2, ALL, Replayable).across(Across::EachKey),
    command("UNLINK", -2, ALL, Replayable).across(Across::EachKey).rewritten(Rewriting::Unlink, 2),
    command("TOUCH", -2, ALL, Replayable).across(Across::EachKey),
    command("DELIFEQ", 3, ONE, Guarded),
    command("DELEX", -2, ONE, Guarded),
    command("RENAME", 3, TWO, Guarded).across(Across::Rename),
    command("RENAMENX", 3, TWO, Guarded).across(Across::Rename),
    command("COPY", -3, TWO, Guarded).across(Across::Copy).rewritten(Rewriting::Copy, 3),
    command("PERSIST", 2, ONE, Replayable),
    command("EXPIRE", -3, ONE, Replayable)
        .unless(Condition::Expire)
        .rewritten(Rewriting::Expire { unit_ms: 1000 }, 3),
    command("PEXPIRE", -3, ONE, Replayable)
        .unless(Condition::Expire)
        .rewritten(Rewriting::Expire { unit_ms: 1 }, 3),
    command("EXPIREAT", -3, ONE, Replayable)
        .unless(Condition::Expire)
        .rewritten(Rewriting::ExpireAt { unit_ms: 1000 }, 3),
    command("PEXPIREAT", -3, ONE, Replayable)
        .unless(Condition::Expire)
        .rewritten(Rewriting::ExpireAt { unit_ms: 1 }, 3),
    command("RESTORE", -4, ONE, Replayable)
        .unless(Condition::WithoutReplace)
        .rewritten(Rewriting::Restore, 4),
    command("RESTORE-ASKING", -4, ONE, Replayable)
        .unless(Condition::WithoutReplace)
        .rewritten(Rewriting::RestoreAsking, 4),
    command("MIGRATE", -6, KeySpec::Migrate, Guarded),
    command("SORT", -2, KeySpec::Sort, Guarded).across(Across::StoreLast),
    // Strings
    command("SET", -3, ONE, Replayable).unless(Condition::Set).rewritten(Rewriting::Set, 4),
    command("SETEX", 4, ONE, Replayable).rewritten(Rewriting::SetWithExpiry { unit_ms: 1000 }, 4),
    command("PSETEX", 4, ONE, Replayable).rewritten(Rewriting::SetWithExpiry { unit_ms: 1 }, 4),
    command("SETNX", 3, ONE, Guarded),
    command("GETSET", 3, ONE, Replayable),
    command("GETDEL", 2, ONE, Replayable).rewritten(Rewriting::Getdel, 2),
    command("GETEX", -2, ONE, Replayable).rewritten(Rewriting::Getex, 2),
    command("MSET", -3, PAIRS, Replayable).across(Across::EachPair),
    command("MSETNX", -3, PAIRS, Guarded).across(Across::EachPair),
    command("MSETEX", -4, COUNTED_PAIRS, Replayable)
        .unless(Condition::Msetex)
        .rewritten(Rewriting::Msetex, 4)
        .across(Across::Msetex),
    command("APPEND", 3, ONE, Guarded),
    command("INCR", 2, ONE, Guarded),
    command("DECR", 2, ONE, Guarded),
    command("INCRBY", 3, ONE, Guarded),
    command("DECRBY", 3, ONE, Guarded),
    command("INCRBYFLOAT", 3, ONE, Guarded),
    command("SETRANGE", 4, ONE, Replayable),
    command("SETBIT", 4, ONE, Replayable),
    command("BITFIELD", -2, ONE, Replayable).unless(Condition::Bitfield),
    command("BITOP", -4, FROM_SECOND, Guarded).across(Across::StoreFirst),
    // Lists
    command("LPUSH", -3, ONE, Guarded),
    command("RPUSH", -3, ONE, Guarded),
    command("LPUSHX", -3, ONE, Guarded).rewritten(Rewriting::PushExisting, 4),
    command("RPUSHX", -3, ONE, Guarded).rewritten(Rewriting::PushExisting, 4),
    command("LPOP", -2, ONE, Guarded).rewritten(Rewriting::ListPop, 3),
    command("RPOP", -2, ONE, Guarded).rewritten(Rewriting::ListPop, 3),
    command("LINSERT", 5, ONE, Guarded),
    command("LSET", 4, ONE, Replayable),
    command("LTRIM", 4, ONE, Guarded),
    command("LREM", 4, ONE, Guarded),
    command("RPOPLPUSH", 3, TWO, Guarded).across(Across::Rotate),
    command("BRPOPLPUSH", 4, TWO, Guarded).rewritten(Rewriting::BlockingRotate, 4).across(Across::Rotate),
    command("LMOVE", 5, TWO, Guarded).rewritten(Rewriting::ListMove, 5).across(Across::ListMove),
    command("BLMOVE", 6, TWO, Guarded).rewritten(Rewriting::BlockingListMove, 6).across(Across::ListMove),
    command("BLPOP", -3, BEFORE_TIMEOUT, Guarded),
    command("BRPOP", -3, BEFORE_TIMEOUT, Guarded),
    command("LMPOP", -4, COUNTED, Guarded),
    command("BLMPOP", -5, COUNTED_SECOND, Guarded),
    // Sets
    command("SADD", -3, ONE, Replayable),
    command("SREM", -3, ONE, Replayable),
    command("SPOP", -2, ONE, Guarded),
    command("SMOVE", 4, TWO, Guarded).across(Across::MoveMember),
    command("SINTERSTORE", -3, ALL, Guarded).across(Across::StoreFirst),
    command("SUNIONSTORE", -3, ALL, Guarded).across(Across::StoreFirst),
    command("SDIFFSTORE", -3, ALL, Guarded).across(Across::StoreFirst),
    // Hashes
    command("HSET", -4, ONE, Replayable).rewritten(Rewriting::Hset, 6),
    command("HMSET", -4, ONE, Replayable),
    command("HSETNX", 4, ONE, Guarded),
    command("HDEL", -3, ONE, Replayable),
    command("HINCRBY", 4, ONE, Guarded),
    command("HINCRBYFLOAT", 4, ONE, Guarded),
    command("HSETEX", -6, ONE, Replayable).unless(Condition::HashExpire).rewritten(Rewriting::Hsetex, 6),
    command("HGETEX", -5, ONE, Guarded).rewritten(Rewriting::Hgetex, 5),
    command("HGETDEL", -5, ONE, Replayable).rewritten(Rewriting::Hgetdel, 5),
    command("HEXPIRE", -6, ONE, Replayable)
        .unless(Condition::HashExpire)
        .rewritten(Rewriting::HashExpire { unit_ms: 1000 }, 6),
    command("HPEXPIRE", -6, ONE, Replayable)
        .unless(Condition::HashExpire)
        .rewritten(Rewriting::HashExpire { unit_ms: 1 }, 6),
    command("HEXPIREAT", -6, ONE, Replayable)
        .unless(Condition::HashExpire)
        .rewritten(Rewriting::HashExpireAt { unit_ms: 1000 }, 6),
    command("HPEXPIREAT", -6, ONE, Replayable)
        .unless(Condition::HashExpire)
        .rewritten(Rewriting::HashExpireAt { unit_ms: 1 }, 6),
    command("HPERSIST", -5, ONE, Replayable).rewritten(Rewriting::Hpersist, 5),
    // Sorted sets and geo
    command("ZADD", -4, ONE, Replayable).unless(Condition::SortedAdd).rewritten(Rewriting::SortedAdd, 5),
    command("ZINCRBY", 4, ONE, Guarded),
    command("ZREM", -3, ONE, Replayable),
    command("ZREMRANGEBYSCORE", 4, ONE, Replayable),
    command("ZREMRANGEBYLEX", 4, ONE, Replayable),
    command("ZREMRANGEBYRANK", 4, ONE, Guarded),
    command("ZPOPMIN", -2, ONE, Guarded).rewritten(Rewriting::SortedPop, 2),
    command("ZPOPMAX", -2, ONE, Guarded).rewritten(Rewriting::SortedPop, 2),
    command("BZPOPMIN", -3, BEFORE_TIMEOUT, Guarded),
    command("BZPOPMAX", -3, BEFORE_TIMEOUT, Guarded),
    command("ZMPOP", -4, COUNTED, Guarded),
    command("BZMPOP", -5, COUNTED_SECOND, Guarded),
    command("ZRANGESTORE", -5, TWO, Guarded)
        .across(Across::StoreFirst)
        .rewritten(Rewriting::SortedRangeStore, 5),
    command("ZUNIONSTORE", -4, STORE_COUNTED, Guarded).across(Across::StoreFirst),
    command("ZINTERSTORE", -4, STORE_COUNTED, Guarded).across(Across::StoreFirst),
    command("ZDIFFSTORE", -4, STORE_COUNTED, Guarded)
        .across(Across::StoreFirst)
        .rewritten(Rewriting::SortedDiffStore, 4),
    command("GEOADD", -5, ONE, Replayable).unless(Condition::SortedAdd),
    command("GEORADIUS", -6, KeySpec::Radius, Guarded)
        .across(Across::StoreLast)
        .rewritten(Rewriting::GeoRadiusStore, 8),
    command("GEORADIUSBYMEMBER", -5, KeySpec::Radius, Guarded)
        .across(Across::StoreLast)
        .rewritten(Rewriting::GeoRadiusStore, 7),
    command("GEOSEARCHSTORE", -8, TWO, Guarded)
        .across(Across::StoreFirst)
        .rewritten(Rewriting::GeoSearchStore, 8),
    // HyperLogLog. PFCOUNT is in the stream when it refreshed the cached count.
    command("PFADD", -2, ONE, Replayable),
    command("PFCOUNT", -2, ALL, Replayable).across(Across::EachKey),
    command("PFMERGE", -2, ALL, Replayable).unless(Condition::Merge).across(Across::Merge),
    // Streams
    command("XADD", -5, ONE, Guarded).rewritten(Rewriting::Xadd, 6),
    command("XTRIM", -4, ONE, Replayable).unless(Condition::Trim).rewritten(Rewriting::Xtrim, 4),
    command("XDEL", -3, ONE, Replayable),
    command("XDELEX", -5, ONE, Guarded).rewritten(Rewriting::Xdelex, 5),
    command("XACK", -4, ONE, Replayable),
    command("XACKDEL", -6, ONE, Guarded),
    command("XCLAIM", -6, ONE, Replayable).unless(Condition::Claim),
    command("XAUTOCLAIM", -6, ONE, Guarded),
    command("XGROUP", -2, SECOND, Replayable).unless(Condition::Group).rewritten(Rewriting::Xgroup, 5),
    command("XSETID", -3, ONE, Replayable).rewritten(Rewriting::Xsetid, 4),
    command("XREADGROUP", -7, KeySpec::Streams, Guarded),
    command("XCFGSET", -4, ONE, Guarded),
    // Vector sets, built into Redis 8
    command("VADD", -5, ONE, Guarded),
    command("VREM", 3, ONE, Guarded),
    command("VSETATTR", 4, ONE, Guarded),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn every_command_is_found_in_any_case() {
        let mut seen = HashSet::new();
        for spec in all() {
            assert!(seen.insert(spec.name.as_ref()), "{} stands twice", spec.name);
            assert!(!spec.name.is_empty() && spec.name.len() <= LONGEST_NAME);
            let mixed: String = spec
                .name
                .chars()
                .enumerate()
                .map(|(at, letter)| if at % 2 == 0 { letter.to_ascii_lowercase() } else { letter })
                .collect();
            assert!(std::ptr::eq(lookup(mixed.as_bytes()).unwrap(), spec), "{mixed}");
        }
    }

    #[test]
    fn other_names_are_not_found() {
        for name in ["", "GET", "SE", "SETT", "SET\0", "\0", "JSON.SET", "SET ", "RESTORE\rASKING"] {
            assert!(lookup(name.as_bytes()).is_none(), "{name:?}");
        }
        assert!(lookup(&[b'A'; 25]).is_none() && lookup(&[b'A'; 4096]).is_none());
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_a_plain_search(name in prop::collection::vec(any::<u8>(), 0..30)) {
            let plain = all().iter().find(|spec| name.eq_ignore_ascii_case(spec.name.as_bytes()));
            prop_assert_eq!(lookup(&name).map(|spec| &spec.name), plain.map(|spec| &spec.name));
        }
    }
}
