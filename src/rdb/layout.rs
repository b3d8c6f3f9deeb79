//! How object types are laid out; their numbers from 22 on mean different things to Redis and Valkey.
//! Format source: Redis rdb.h and rdb.c, `rdbLoadObject`; Valkey 9 rdb.c for its type 22.

use crate::version::Flavor;

use super::cursor::{Cursor, Stop};
use super::error::Fault;
use super::event::LargeKind;

/// The elements that a collection is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elements {
    List,
    Set,
    /// Scores as decimal text, as ≤3.2 wrote them.
    ZsetText,
    Zset,
    Hash,
    /// Nodes, each a ziplist.
    Quicklist,
    /// Nodes, each one plain element or a listpack.
    Quicklist2,
    /// Redis 7.4 release candidates: absolute field expiries.
    HashExpiryRc,
    /// Redis ≥7.4: field expiries relative to the least one.
    HashExpiry {
        min_expire: i64,
    },
    /// Valkey ≥9.
    HashExpiryValkey,
    /// Nodes of a stream, each a master id and a listpack.
    StreamNodes,
}

impl Elements {
    pub fn kind(self) -> LargeKind {
        match self {
            Elements::List | Elements::Quicklist | Elements::Quicklist2 => LargeKind::List,
            Elements::Set => LargeKind::Set,
            Elements::ZsetText | Elements::Zset => LargeKind::Zset,
            Elements::Hash
            | Elements::HashExpiryRc
            | Elements::HashExpiry { .. }
            | Elements::HashExpiryValkey => LargeKind::Hash,
            Elements::StreamNodes => LargeKind::Stream,
        }
    }

    /// Reads what stands before the first element: the elements, and how many there are.
    pub fn prologue(self, cursor: &mut Cursor<'_>) -> Result<(Self, u64), Stop> {
        let elements = match self {
            Elements::HashExpiry { .. } => {
                Elements::HashExpiry { min_expire: i64::from_le_bytes(cursor.array()?) }
            }
            other => other,
        };
        Ok((elements, cursor.length()?))
    }

    pub fn pattern(self) -> &'static [Atom] {
        use Atom::{Fixed, Length, ScoreText, Text};
        match self {
            Elements::List | Elements::Set | Elements::Quicklist => &[Text],
            Elements::ZsetText => &[Text, ScoreText],
            Elements::Zset => &[Text, Fixed(8)],
            Elements::Hash | Elements::StreamNodes => &[Text, Text],
            Elements::Quicklist2 => &[Length, Text],
            Elements::HashExpiryRc | Elements::HashExpiry { .. } => &[Length, Text, Text],
            Elements::HashExpiryValkey => &[Text, Text, Fixed(8)],
        }
    }
}

/// How the value of an object type is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One string: the value of a string, or a collection packed into a blob.
    Blob,
    /// As `Blob`, behind eight bytes of least field expiry.
    ExpiryBlob,
    Counted(Elements),
    Module,
}

/// The layout of `type_byte`; numbers from 22 on mean different things to Redis and Valkey.
pub(super) fn layout(type_byte: u8, flavor: Flavor) -> Result<Layout, Fault> {
    let redis = flavor == Flavor::Redis;
    Ok(match type_byte {
        0 | 9..=13 | 16 | 17 | 20 => Layout::Blob,
        1 => Layout::Counted(Elements::List),
        2 => Layout::Counted(Elements::Set),
        3 => Layout::Counted(Elements::ZsetText),
        4 => Layout::Counted(Elements::Hash),
        5 => Layout::Counted(Elements::Zset),
        6 => return Err(Fault::RefusedType(6, "module data of a 4.0 release candidate")),
        7 => Layout::Module,
        14 => Layout::Counted(Elements::Quicklist),
        18 => Layout::Counted(Elements::Quicklist2),
        15 | 19 | 21 => Layout::Counted(Elements::StreamNodes),
        22 if redis => Layout::Counted(Elements::HashExpiryRc),
        22 => Layout::Counted(Elements::HashExpiryValkey),
        23 if redis => Layout::Blob,
        24 if redis => Layout::Counted(Elements::HashExpiry { min_expire: 0 }),
        25 if redis => Layout::ExpiryBlob,
        26 if redis => Layout::Counted(Elements::StreamNodes),
        27..=33 if redis => return Err(Fault::RefusedType(type_byte, "written by Redis 8.8 or newer")),
        _ => return Err(Fault::UnknownType(type_byte, flavor)),
    })
}

/// The version of the stream layout that a stream type has.
pub(super) fn stream_layout(type_byte: u8) -> u8 {
    match type_byte {
        15 => 1,
        19 => 2,
        21 => 3,
        26 => 4,
        _ => 0,
    }
}

/// The smallest parts that a value is made of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Atom {
    Text,
    Length,
    Fixed(usize),
    /// One length byte, then that much text; 253 to 255 stand alone.
    ScoreText,
    /// A length that says how often the next stage repeats.
    Count,
    /// One tagged item of a module; item 0 ends the list.
    ModuleItem,
}
