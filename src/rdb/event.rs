//! What the decoder tells, and within which limits.

use crate::version::Flavor;

use super::layout::Elements;

/// The object type of a string; the only type that a target may be sent as `SET`.
pub const TYPE_STRING: u8 = 0;
/// The object type of module data.
pub const TYPE_MODULE_2: u8 = 7;

/// Bounds on what is believed and held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Values with more stored bytes than this come in parts, so the caller never has to hold more
    /// than about this much input.
    pub max_value: usize,
    /// The same for what a string, or a collection that is not packed into one, takes once expanded: for those who
    /// expand it. What cannot be parted (an element, a packed collection) may take this or `max_value`, whichever is
    /// more.
    pub max_expanded: u64,
    /// Longest key, AUX field or function source: these are always held whole.
    pub max_key: usize,
    /// Longest string at all, stored or expanded.
    pub max_string: u64,
    /// Most elements in one collection.
    pub max_elements: u64,
}

impl Limits {
    /// Most bytes that what cannot be parted takes once expanded.
    pub(super) fn max_undivided(&self) -> u64 {
        self.max_expanded.max(self.max_value as u64)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_value: 64 << 20,
            max_expanded: u64::MAX,
            max_key: 64 << 20,
            max_string: 16 << 30,
            max_elements: 1 << 33,
        }
    }
}

/// What [`Decoder::next`](super::Decoder::next) found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step<'a> {
    /// Nothing yet. Call again with the same bytes and more behind: at least `at_least` in all,
    /// which is a lower bound, never more than a value's limit and its key take.
    NeedMore { at_least: usize },
    /// `event`, after which `consumed` bytes of the input are done with. Zero is possible.
    Event { consumed: usize, event: Event<'a> },
}

/// One thing out of the stream. Slices borrow from the input, or from the decoder where a string
/// was stored as number or compressed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// The flavour is what the magic says. Valkey may write the Redis magic to old replicas, then
    /// an AUX `valkey-ver` follows; [`Decoder::flavor`](super::Decoder::flavor) knows.
    Header {
        flavor: Flavor,
        version: u16,
    },
    Aux {
        key: &'a [u8],
        value: &'a [u8],
    },
    SelectDb(u64),
    /// Hints only.
    ResizeDb {
        keys: u64,
        expires: u64,
    },
    /// Source of a function library, for `FUNCTION LOAD REPLACE`.
    Function {
        code: &'a [u8],
    },
    /// Data that a module keeps outside of keys; its body follows as [`Event::Skipped`].
    ModuleAux {
        module: super::ModuleId,
    },
    /// Redis ≥7.4 in cluster mode, before the first key of each slot. Hints only.
    SlotInfo {
        slot: u64,
        keys: u64,
        expires: u64,
    },
    /// Valkey 9: the snapshot was taken while slots were being imported.
    SlotImport {
        job: &'a [u8],
        ranges: u64,
    },
    Key(KeyRecord<'a>),
    /// A value beyond [`Limits::max_value`] begins; [`Event::LargeItems`] follow until
    /// [`Event::LargeEnd`] or [`Event::LargeUnsupported`].
    LargeBegin(LargeHead<'a>),
    LargeItems {
        key: &'a [u8],
        items: Items<'a>,
    },
    LargeEnd {
        key: &'a [u8],
    },
    /// The value cannot be passed in bounded memory. Its bytes follow as [`Event::Skipped`]; what
    /// came of it before is incomplete.
    LargeUnsupported {
        key: &'a [u8],
        type_byte: u8,
        why: &'static str,
    },
    /// Bytes that carry nothing, part of what an event before announced as skipped.
    Skipped,
    /// The end; only the first of the consumed bytes is covered by the checksum. `None`: the RDB is
    /// older than version 5, or its writer left the checksum out.
    End {
        crc: Option<u64>,
    },
}

/// One key with its whole value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRecord<'a> {
    pub key: &'a [u8],
    /// Unix time in milliseconds; may be past.
    pub expire_at_ms: Option<i64>,
    pub idle_seconds: Option<u64>,
    pub lfu: Option<u8>,
    pub type_byte: u8,
    /// The exact extent: `type_byte`, `value` and a footer are a `RESTORE` payload.
    pub value: &'a [u8],
}

/// What is known of a large value when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargeHead<'a> {
    pub key: &'a [u8],
    /// Unix time in milliseconds; may be past.
    pub expire_at_ms: Option<i64>,
    pub idle_seconds: Option<u64>,
    pub lfu: Option<u8>,
    pub type_byte: u8,
    pub kind: LargeKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LargeKind {
    String,
    List,
    Set,
    Zset,
    Hash,
    Stream,
}

/// A run of a large value's elements, still encoded;
/// [`Items::append_commands`](Items::append_commands) turns it into commands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Items<'a>(pub(super) Run<'a>);

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Run<'a> {
    /// Next bytes of a string, `first` when they are its beginning.
    Piece {
        bytes: &'a [u8],
        first: bool,
    },
    Elements {
        elements: Elements,
        bytes: &'a [u8],
        type_byte: u8,
    },
    /// What follows the entries of a stream.
    StreamTail {
        bytes: &'a [u8],
        type_byte: u8,
    },
}

impl Items<'_> {
    /// Encoded bytes in this run.
    pub fn len(&self) -> usize {
        match self.0 {
            Run::Piece { bytes, .. } | Run::Elements { bytes, .. } | Run::StreamTail { bytes, .. } => {
                bytes.len()
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
