//! Goes through a value's elements, whatever encoding holds them.
//! Format source: Redis rdb.c `rdbLoadObject`; for stream nodes `t_stream.c`, `streamAppendItem`.

use std::fmt;

use crate::version::Flavor;

use super::cursor::{Cursor, Stop};
use super::error::{Fault, RdbError};
use super::layout::{Elements, Layout, layout, stream_layout};
use super::packed::{Entry, Packed};

/// Takes a value's elements in order. A collection calls one method only; a stream calls `entry`,
/// then `stream`, then `group` with the group's `consumer`s, each followed by its `pending`.
pub(super) trait Sink {
    fn string(&mut self, bytes: &[u8]);
    fn item(&mut self, item: &[u8]);
    fn member(&mut self, member: &[u8]);
    fn scored(&mut self, member: &[u8], score: f64);
    fn field(&mut self, field: &[u8], value: &[u8], expire_at_ms: Option<i64>);
    fn entry(&mut self, id: StreamId, fields: &[(Entry<'_>, Entry<'_>)]);
    fn stream(&mut self, state: StreamState);
    fn group(&mut self, name: &[u8], last: StreamId, entries_read: Option<u64>);
    fn consumer(&mut self, name: &[u8]);
    fn pending(&mut self, pending: Pending);
    /// The whole value of a module.
    fn module(&mut self, value: &[u8]);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StreamId {
    pub ms: u64,
    pub seq: u64,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamState {
    pub length: u64,
    pub last: StreamId,
    /// Known from 7.0 on: greatest deleted id, and entries ever added.
    pub counters: Option<(StreamId, u64)>,
}

/// An entry that a consumer has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub id: StreamId,
    pub delivered_at_ms: i64,
    pub deliveries: u64,
}

/// Hands the elements of a whole value to `sink`.
pub(super) fn value<S: Sink>(
    type_byte: u8,
    value: &[u8],
    flavor: Flavor,
    sink: &mut S,
) -> Result<(), RdbError> {
    within_value(type_byte, Cursor::new(value), |walk| {
        match layout(type_byte, flavor).map_err(|fault| walk.cursor.fault(fault))? {
            Layout::Blob => walk.blob(type_byte, sink),
            Layout::ExpiryBlob => {
                walk.cursor.take(8)?;
                walk.blob(type_byte, sink)
            }
            Layout::Counted(elements) => {
                let (elements, count) = elements.prologue(&mut walk.cursor)?;
                for _ in 0..count {
                    walk.element(elements, sink)?;
                }
                if elements == Elements::StreamNodes { walk.stream_tail(type_byte, sink) } else { Ok(()) }
            }
            Layout::Module => {
                sink.module(value);
                walk.cursor.at = value.len();
                Ok(())
            }
        }
    })
}

/// Hands a run of elements to `sink`.
pub(super) fn elements<S: Sink>(
    type_byte: u8,
    elements: Elements,
    bytes: &[u8],
    sink: &mut S,
) -> Result<(), RdbError> {
    within_value(type_byte, Cursor::new(bytes), |walk| {
        while !walk.cursor.is_at_end() {
            walk.element(elements, sink)?;
        }
        Ok(())
    })
}

/// Hands what follows the nodes of a stream to `sink`.
pub(super) fn stream_tail<S: Sink>(type_byte: u8, bytes: &[u8], sink: &mut S) -> Result<(), RdbError> {
    within_value(type_byte, Cursor::new(bytes), |walk| walk.stream_tail(type_byte, sink))
}

struct Walk<'a> {
    cursor: Cursor<'a>,
    /// Strings stored as number or compressed are put together here: one for each of a pair.
    first: Vec<u8>,
    second: Vec<u8>,
}

fn within_value<'a>(
    type_byte: u8,
    cursor: Cursor<'a>,
    run: impl FnOnce(&mut Walk<'a>) -> Result<(), Stop>,
) -> Result<(), RdbError> {
    let mut walk = Walk { cursor, first: Vec::new(), second: Vec::new() };
    let length = cursor.bytes.len();
    let (offset, fault) = match run(&mut walk) {
        Ok(()) if walk.cursor.at == length => return Ok(()),
        Ok(()) => (walk.cursor.at, Fault::Trailing(length.saturating_sub(walk.cursor.at))),
        Err(Stop::Fault { fault, at }) => (at, fault),
        Err(Stop::NeedMore(_)) => (length, Fault::Missing("its rest")),
    };
    Err(RdbError::Value { type_byte, offset, fault })
}

impl Walk<'_> {
    #[inline]
    fn element<S: Sink>(&mut self, elements: Elements, sink: &mut S) -> Result<(), Stop> {
        let Walk { cursor, first, second } = self;
        let limit = u64::MAX;
        match elements {
            Elements::List => sink.item(cursor.bytes_in(limit, first)?),
            Elements::Set => sink.member(cursor.bytes_in(limit, first)?),
            Elements::ZsetText => {
                let member = cursor.bytes_in(limit, first)?;
                sink.scored(member, score_text(cursor)?);
            }
            Elements::Zset => {
                let member = cursor.bytes_in(limit, first)?;
                sink.scored(member, f64::from_le_bytes(cursor.array()?));
            }
            Elements::Hash => {
                let field = cursor.bytes_in(limit, first)?;
                sink.field(field, cursor.bytes_in(limit, second)?, None);
            }
            Elements::HashExpiryRc => {
                let at = cursor.length()?;
                let field = cursor.bytes_in(limit, first)?;
                sink.field(field, cursor.bytes_in(limit, second)?, (at != 0).then_some(at as i64));
            }
            Elements::HashExpiry { min_expire } => {
                let after = cursor.length()?;
                let at = (after != 0).then(|| min_expire.wrapping_add(after as i64).wrapping_sub(1));
                let field = cursor.bytes_in(limit, first)?;
                sink.field(field, cursor.bytes_in(limit, second)?, at);
            }
            Elements::HashExpiryValkey => {
                let field = cursor.bytes_in(limit, first)?;
                let value = cursor.bytes_in(limit, second)?;
                let at = i64::from_le_bytes(cursor.array()?);
                sink.field(field, value, (at != -1).then_some(at));
            }
            Elements::Quicklist => {
                let at = cursor.at;
                let node = cursor.bytes_in(limit, first)?;
                faulty(at, items(Packed::ziplist(node), |item| sink.item(item)))?;
            }
            Elements::Quicklist2 => {
                let at = cursor.at;
                let container = cursor.length()?;
                let node = cursor.bytes_in(limit, first)?;
                match container {
                    1 => sink.item(node),
                    2 => faulty(at, items(Packed::listpack(node), |item| sink.item(item)))?,
                    _ => return Err(Stop::Fault { fault: Fault::Malformed("quicklist node"), at }),
                }
            }
            Elements::StreamNodes => {
                let at = cursor.at;
                let master = match cursor.bytes_in(limit, first)?.as_chunks::<8>() {
                    ([ms, seq], []) => {
                        StreamId { ms: u64::from_be_bytes(*ms), seq: u64::from_be_bytes(*seq) }
                    }
                    _ => return Err(Stop::Fault { fault: Fault::Malformed("stream node id"), at }),
                };
                faulty(at, stream_node(master, cursor.bytes_in(limit, second)?, sink))?;
            }
        }
        Ok(())
    }

    fn blob<S: Sink>(&mut self, type_byte: u8, sink: &mut S) -> Result<(), Stop> {
        let at = self.cursor.at;
        let blob = self.cursor.bytes_in(u64::MAX, &mut self.first)?;
        let walked = match type_byte {
            0 => {
                sink.string(blob);
                Ok(())
            }
            9 => fields(Packed::zipmap(blob), sink),
            10 => items(Packed::ziplist(blob), |item| sink.item(item)),
            11 => items(Packed::intset(blob), |member| sink.member(member)),
            12 => scored(Packed::ziplist(blob), sink),
            13 => fields(Packed::ziplist(blob), sink),
            16 => fields(Packed::listpack(blob), sink),
            17 => scored(Packed::listpack(blob), sink),
            20 => items(Packed::listpack(blob), |member| sink.member(member)),
            _ => expiring_fields(Packed::listpack(blob), sink),
        };
        faulty(at, walked)
    }

    fn stream_tail<S: Sink>(&mut self, type_byte: u8, sink: &mut S) -> Result<(), Stop> {
        let Walk { cursor, first, second } = self;
        let version = stream_layout(type_byte);
        let length = cursor.length()?;
        let last = stream_id(cursor)?;
        let counters = if version >= 2 {
            stream_id(cursor)?;
            Some((stream_id(cursor)?, cursor.length()?))
        } else {
            None
        };
        sink.stream(StreamState { length, last, counters });
        let mut pending = Vec::new();
        for _ in 0..cursor.length()? {
            let name = cursor.bytes_in(u64::MAX, first)?;
            let last = stream_id(cursor)?;
            let entries_read = if version >= 2 { Some(cursor.length()?) } else { None };
            sink.group(name, last, entries_read.filter(|&read| read != u64::MAX));
            pending.clear();
            for _ in 0..cursor.length()? {
                pending.push(Pending {
                    id: raw_stream_id(cursor)?,
                    delivered_at_ms: i64::from_le_bytes(cursor.array()?),
                    deliveries: cursor.length()?,
                });
            }
            pending.sort_unstable_by_key(|pending| pending.id);
            for _ in 0..cursor.length()? {
                sink.consumer(cursor.bytes_in(u64::MAX, second)?);
                cursor.take(if version >= 3 { 16 } else { 8 })?;
                for _ in 0..cursor.length()? {
                    let at = cursor.at;
                    let id = raw_stream_id(cursor)?;
                    let found = pending.binary_search_by_key(&id, |pending| pending.id).ok();
                    let found = found.and_then(|index| pending.get(index));
                    let fault = Fault::Missing("a consumer's entry in its group's pending list");
                    sink.pending(*found.ok_or(Stop::Fault { fault, at })?);
                }
            }
        }
        if version >= 4 {
            self.pass_producers()?;
        }
        Ok(())
    }

    /// Who wrote which entry, so that a repeated write is recognised; no command sets it.
    fn pass_producers(&mut self) -> Result<(), Stop> {
        let Walk { cursor, first, .. } = self;
        cursor.length()?;
        cursor.length()?;
        for _ in 0..cursor.length()? {
            cursor.bytes_in(u64::MAX, first)?;
            for _ in 0..cursor.length()? {
                cursor.bytes_in(u64::MAX, first)?;
                stream_id(cursor)?;
            }
        }
        cursor.length()?;
        cursor.length().map(drop)
    }
}

fn faulty<T>(at: usize, result: Result<T, Fault>) -> Result<T, Stop> {
    result.map_err(|fault| Stop::Fault { fault, at })
}

fn items(packed: Result<Packed<'_>, Fault>, mut take: impl FnMut(&[u8])) -> Result<(), Fault> {
    let mut packed = packed?;
    let mut digits = itoa::Buffer::new();
    while let Some(entry) = packed.next()? {
        take(entry.text(&mut digits));
    }
    Ok(())
}

fn fields<S: Sink>(packed: Result<Packed<'_>, Fault>, sink: &mut S) -> Result<(), Fault> {
    let mut packed = packed?;
    let (mut digits, mut more_digits) = (itoa::Buffer::new(), itoa::Buffer::new());
    while let Some(field) = packed.next()? {
        let value = packed.expect("a field's value")?;
        sink.field(field.text(&mut digits), value.text(&mut more_digits), None);
    }
    Ok(())
}

fn expiring_fields<S: Sink>(packed: Result<Packed<'_>, Fault>, sink: &mut S) -> Result<(), Fault> {
    let mut packed = packed?;
    let (mut digits, mut more_digits) = (itoa::Buffer::new(), itoa::Buffer::new());
    while let Some(field) = packed.next()? {
        let value = packed.expect("a field's value")?;
        let at = packed.expect_int("a field's expiry")?;
        sink.field(field.text(&mut digits), value.text(&mut more_digits), (at != 0).then_some(at));
    }
    Ok(())
}

fn scored<S: Sink>(packed: Result<Packed<'_>, Fault>, sink: &mut S) -> Result<(), Fault> {
    let mut packed = packed?;
    let mut digits = itoa::Buffer::new();
    while let Some(member) = packed.next()? {
        let score = match packed.expect("a member's score")? {
            Entry::Int(number) => number as f64,
            Entry::Bytes(text) => number(text)?,
        };
        sink.scored(member.text(&mut digits), score);
    }
    Ok(())
}

/// A stream node's listpack: a master entry with count, deleted and the names of fields, then the
/// entries, which leave those names out when they have the same.
fn stream_node<S: Sink>(master: StreamId, blob: &[u8], sink: &mut S) -> Result<(), Fault> {
    const DELETED: i64 = 1;
    const SAME_FIELDS: i64 = 2;
    let mut packed = Packed::listpack(blob)?;
    packed.expect_int("a stream node's count")?;
    packed.expect_int("a stream node's deleted count")?;
    let mut names = Vec::new();
    for _ in 0..packed.expect_int("a stream node's field count")? {
        names.push(packed.expect("a stream node's field name")?);
    }
    packed.expect_int("the end of a stream node's master entry")?;
    let mut pairs = Vec::new();
    while let Some(flags) = packed.next()? {
        let Entry::Int(flags) = flags else { return Err(Fault::Unexpected("a stream entry's flags")) };
        let id = StreamId {
            ms: master.ms.wrapping_add(packed.expect_int("a stream entry's time")? as u64),
            seq: master.seq.wrapping_add(packed.expect_int("a stream entry's sequence")? as u64),
        };
        pairs.clear();
        if flags & SAME_FIELDS != 0 {
            for name in &names {
                pairs.push((*name, packed.expect("a stream entry's value")?));
            }
        } else {
            for _ in 0..packed.expect_int("a stream entry's field count")? {
                let name = packed.expect("a stream entry's field")?;
                pairs.push((name, packed.expect("a stream entry's value")?));
            }
        }
        packed.expect_int("a stream entry's length")?;
        if flags & DELETED == 0 {
            sink.entry(id, &pairs);
        }
    }
    Ok(())
}

fn stream_id(cursor: &mut Cursor<'_>) -> Result<StreamId, Stop> {
    Ok(StreamId { ms: cursor.length()?, seq: cursor.length()? })
}

fn raw_stream_id(cursor: &mut Cursor<'_>) -> Result<StreamId, Stop> {
    Ok(StreamId { ms: u64::from_be_bytes(cursor.array()?), seq: u64::from_be_bytes(cursor.array()?) })
}

fn score_text(cursor: &mut Cursor<'_>) -> Result<f64, Stop> {
    let at = cursor.at;
    match cursor.byte()? {
        253 => Ok(f64::NAN),
        254 => Ok(f64::INFINITY),
        255 => Ok(f64::NEG_INFINITY),
        length => faulty(at, number(cursor.take(usize::from(length))?)),
    }
}

fn number(text: &[u8]) -> Result<f64, Fault> {
    let fault = Fault::Malformed("sorted set score");
    std::str::from_utf8(text).map_err(|_| fault)?.trim_start().parse().map_err(|_| fault)
}
