//! What the engine knows of each write command: where its keys stand, whether replaying it is
//! harmless, what it means for the stream, and how it is rewritten or split for the target.
//! Sources: `COMMAND` of Redis 7.0.15 and the `src/commands/*.json` of Redis 8.4 and Valkey 9.

mod class;
mod dynamic;
mod emulate;
mod keys;
mod narrow;
mod rewrite;
mod split;
mod table;
#[cfg(test)]
pub(crate) mod test_args;
mod transaction;

use std::borrow::Cow;

use thiserror::Error;

pub use class::class_of;
pub use dynamic::DynamicTable;
pub use emulate::{Emulation, IfMissing, Key, Step};
pub use keys::{Route, database_args, first_key_fast, keys, route};
pub use narrow::{Narrowed, narrow};
pub use rewrite::{Clock, Rewrite, may_rewrite, rewrite};
pub use split::{Piece, SplitPlan, Unsplittable, split};
pub use table::{all, lookup};
pub use transaction::{Part, group_transaction};

/// One command.
#[derive(Clone, Debug)]
pub struct CommandSpec {
    /// Upper case.
    pub name: Cow<'static, str>,
    /// As `COMMAND` tells it: arguments with the name; negative means at least that many.
    pub arity: i16,
    pub keys: KeySpec,
    /// The class while no argument makes it stricter; ask [`class_of`] for the command at hand.
    pub class: Class,
    pub kind: Kind,
    condition: Condition,
    rewriting: Rewriting,
    /// The fewest arguments, name included, with which `rewriting` can apply.
    rewrite_from: u8,
    across: Across,
}

/// Where a command's keys stand. Argument 0 is the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySpec {
    None,
    /// Argument 1 and no other.
    Single,
    /// As the triple of `COMMAND`; a negative `last` counts from the end, -1 being the last argument.
    Range {
        first: u16,
        last: i16,
        step: u16,
    },
    /// A count at argument `count`, right behind it that many keys, `step` apart; one more key at
    /// `dest` unless that is 0.
    Counted {
        dest: u16,
        count: u16,
        step: u16,
    },
    /// SORT: argument 1 and what follows the last STORE.
    Sort,
    /// GEORADIUS: argument 1 and what follows the last STORE or STOREDIST.
    Radius,
    /// XREADGROUP: the first half of what follows STREAMS.
    Streams,
    /// MIGRATE: argument 3, or what follows KEYS when that is empty.
    Migrate,
    /// Key specifications of `COMMAND`, Redis 7.0 and newer.
    Rules(Vec<KeyRule>),
    /// Only `COMMAND GETKEYS` on the source can tell.
    Unknown,
}

/// One key specification: where to begin, and which arguments from there are keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRule {
    pub begin: Begin,
    pub find: Find,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begin {
    Index(u32),
    /// The argument after `word`, looked for from `from` on; a negative `from` counts from the end
    /// and looks towards the start.
    Keyword {
        word: Vec<u8>,
        from: i32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Find {
    /// `last` is relative to the beginning; negative ones count from the end. A `limit` of n > 1
    /// takes only the first n-th of the arguments that remain.
    Range { last: i32, step: u32, limit: u32 },
    /// All three relative to the beginning: a count at `count`, keys from `first`, `step` apart.
    Counted { count: u32, first: u32, step: u32 },
}

/// What running a command a second time does, when everything after it is run again too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The data converges.
    Replayable,
    /// The data would be wrong: the command must be skipped if it was applied before.
    Guarded,
}

/// What a command means for the stream that carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Data,
    Select,
    Multi,
    Exec,
    /// Not data and not to be replayed: PING, REPLCONF, OPINFO.
    Noise,
    Publish,
    /// Argument 1 is a channel, which hashes to a slot as a key does but is none.
    ShardPublish,
    /// EVAL, EVALSHA, FCALL: opaque.
    Script,
    /// SCRIPT LOAD and FLUSH: concerns every node.
    ScriptCache,
    /// FUNCTION: concerns every node.
    Function,
    /// FLUSHALL, FLUSHDB: concerns every slot of the source.
    Flush,
    SwapDb,
    Move,
    /// The source's slots change owner; never to be replayed, never to be ignored.
    TopologyChange,
}

/// Which arguments turn a replayable command into a guarded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    None,
    Set,
    Expire,
    HashExpire,
    Msetex,
    SortedAdd,
    WithoutReplace,
    Bitfield,
    Merge,
    Trim,
    Claim,
    Group,
    Function,
}

/// Which rule of `rewrite.rs` applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rewriting {
    None,
    Set,
    SetWithExpiry { unit_ms: i64 },
    Expire { unit_ms: i64 },
    ExpireAt { unit_ms: i64 },
    Getex,
    Restore,
    RestoreAsking,
    HashExpire { unit_ms: i64 },
    HashExpireAt { unit_ms: i64 },
    Hgetex,
    Hsetex,
    Hgetdel,
    Msetex,
    Unlink,
    Getdel,
    ListPop,
    SortedPop,
    ListMove,
    BlockingListMove,
    BlockingRotate,
    Flush,
    Xadd,
    Xgroup,
    Xsetid,
    Xtrim,
    Xdelex,
    Move,
    Copy,
    ShardPublish,
    Script,
    PushExisting,
    Hset,
    Hpersist,
    SortedAdd,
    SortedRangeStore,
    SortedDiffStore,
    GeoSearchStore,
    GeoRadiusStore,
}

/// What to do when the keys lie in several slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Across {
    /// Nothing helps.
    Impossible,
    EachKey,
    EachPair,
    Msetex,
    Rename,
    Copy,
    MoveMember,
    /// RPOPLPUSH.
    Rotate,
    /// LMOVE: arguments 3 and 4 name the ends.
    ListMove,
    /// The first key is overwritten with what is derived from the others.
    StoreFirst,
    /// As `StoreFirst`, but it is the last key.
    StoreLast,
    /// The first key is overwritten with what is derived from all, itself included.
    Merge,
}

/// Why a command's keys could not be told.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    #[error("{command}: argument {index} is missing, where a key must stand")]
    MissingArgument { command: Cow<'static, str>, index: usize },
    #[error("{command}: argument {index} is not the number of keys that follow it")]
    BadKeyCount { command: Cow<'static, str>, index: usize },
    #[error("{command}: which arguments are keys depends on them; ask the source with COMMAND GETKEYS")]
    KeysUnknown { command: Cow<'static, str> },
    #[error("COMMAND reply, entry {entry}: {fault}")]
    BadCommandReply { entry: usize, fault: &'static str },
}

/// Whether `arg` is `word`, which is upper case, in any case.
fn is(arg: &[u8], word: &str) -> bool {
    arg.eq_ignore_ascii_case(word.as_bytes())
}

/// Whether `arg` is one of `words`, which are upper case, in any case.
pub fn is_any(arg: &[u8], words: &[&str]) -> bool {
    words.iter().any(|word| is(arg, word))
}

/// The number of a database, or the like.
pub fn decimal(arg: &[u8]) -> Option<u64> {
    std::str::from_utf8(arg).ok()?.parse().ok()
}

/// A decimal number as Redis writes it.
fn integer(arg: &[u8]) -> Option<i64> {
    std::str::from_utf8(arg).ok()?.parse().ok()
}
