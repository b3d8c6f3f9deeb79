//! Values as the commands that build them, for values too large for one `RESTORE` and for targets
//! that cannot load their type. Option support source: the commands' documented histories.

mod writer;

use std::fmt::Write;

use crate::hold::Holding;
use crate::version::{Flavor, ServerVersion};

use self::writer::Batch;
use super::error::{Fault, RdbError};
use super::event::{Items, Run};
use super::packed::Entry;
use super::walk::{self, Pending, Sink, StreamId, StreamState};

/// A command is closed before it would hold more elements …
const MAX_ELEMENTS: usize = 512;
/// … or more bytes; a single longer element goes alone.
const MAX_BYTES: usize = 1 << 20;

/// What a target's commands know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// `XSETID … ENTRIESADDED … MAXDELETEDID`, `XGROUP CREATE … ENTRIESREAD` (7.0).
    pub stream_counters: bool,
    /// `XGROUP CREATECONSUMER` (6.2).
    pub create_consumer: bool,
    /// `HPEXPIREAT` (Redis 7.4, Valkey 9.0). Without it the expiries of fields are left out.
    pub field_expiry: bool,
    /// `HSET` of several fields (4.0), which replaced `HMSET`.
    pub variadic_hset: bool,
    /// Not of the target: whether expiries of fields are held.
    pub holding: Holding,
}

impl Dialect {
    /// Built by commands, a value of this type does without the expiries of its fields.
    pub fn loses_field_expiry(&self, type_byte: u8) -> bool {
        matches!(type_byte, 22..=25) && !self.field_expiry
    }

    pub fn of(target: ServerVersion) -> Self {
        Dialect {
            stream_counters: target.has_redis(7, 0),
            create_consumer: target.has_redis(6, 2),
            variadic_hset: target.has_redis(4, 0),
            holding: Holding::default(),
            field_expiry: target.has_field_expiry(),
        }
    }
}

/// Appends the commands that build `value` at `key`, which must not exist, as RESP: how many.
///
/// Each command has at most 512 elements and about 1 MiB, unless one element is longer. The key's
/// expiry is left to the caller. What commands cannot say is lost: times consumers were seen, who
/// produced which stream entry (8.6), pending entries whose stream entry is deleted. On an error
/// `out` is as it was.
pub fn value_to_commands(
    type_byte: u8,
    value: &[u8],
    flavor: Flavor,
    key: &[u8],
    dialect: Dialect,
    out: &mut Vec<u8>,
) -> Result<u64, RdbError> {
    write(type_byte, key, dialect, out, |commands| walk::value(type_byte, value, flavor, commands))
}

impl Items<'_> {
    /// Appends the commands that add these elements to `key`, as [`value_to_commands`] does for a
    /// whole value. Runs must be applied in order to a key that does not exist at the first.
    pub fn append_commands(&self, key: &[u8], dialect: Dialect, out: &mut Vec<u8>) -> Result<u64, RdbError> {
        match self.0 {
            Run::Piece { bytes, first } => write(0, key, dialect, out, |commands| {
                commands.piece(bytes, first);
                Ok(())
            }),
            Run::Elements { elements, bytes, type_byte } => write(type_byte, key, dialect, out, |commands| {
                walk::elements(type_byte, elements, bytes, commands)
            }),
            Run::StreamTail { bytes, type_byte } => {
                write(type_byte, key, dialect, out, |commands| walk::stream_tail(type_byte, bytes, commands))
            }
        }
    }
}

fn write(
    type_byte: u8,
    key: &[u8],
    dialect: Dialect,
    out: &mut Vec<u8>,
    fill: impl FnOnce(&mut Commands<'_>) -> Result<(), RdbError>,
) -> Result<u64, RdbError> {
    let start = out.len();
    let mut commands = Commands {
        key,
        dialect,
        out,
        count: 0,
        batch: Batch::default(),
        expiries: Vec::new(),
        text: String::new(),
        more_text: String::new(),
        group: Vec::new(),
        consumer: Vec::new(),
        refused: None,
    };
    let filled = fill(&mut commands);
    commands.close();
    let (count, refused) = (commands.count, commands.refused);
    let refused = refused.map(|fault| RdbError::Value { type_byte, offset: 0, fault });
    match filled.err().or(refused) {
        None => Ok(count),
        Some(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

struct Commands<'a> {
    key: &'a [u8],
    dialect: Dialect,
    out: &'a mut Vec<u8>,
    count: u64,
    /// The collection command being filled.
    batch: Batch,
    /// `HPEXPIREAT`s for fields of `batch`; they go behind it.
    expiries: Vec<(i64, Vec<u8>)>,
    text: String,
    more_text: String,
    group: Vec<u8>,
    consumer: Vec<u8>,
    refused: Option<Fault>,
}

impl Commands<'_> {
    fn piece(&mut self, bytes: &[u8], mut first: bool) {
        let mut rest = bytes;
        loop {
            let (piece, after) = rest.split_at(rest.len().min(MAX_BYTES));
            let name: &[u8] = if first { b"SET" } else { b"APPEND" };
            self.command(&[name, self.key, piece]);
            if after.is_empty() {
                return;
            }
            (first, rest) = (false, after);
        }
    }

    fn command(&mut self, args: &[&[u8]]) {
        crate::resp::encode_command(args, self.out);
        self.count += 1;
    }

    /// Makes room for an element of `bytes` in a command of this name.
    #[inline]
    fn room(&mut self, name: &'static [u8], bytes: usize) {
        if self.batch.elements >= MAX_ELEMENTS || self.batch.len() + bytes > MAX_BYTES {
            self.close();
        }
        if self.batch.elements == 0 {
            self.batch.begin(&[name, self.key]);
        }
        self.batch.elements += 1;
    }

    fn close(&mut self) {
        if self.batch.elements == 0 {
            return;
        }
        self.batch.flush(self.out);
        self.count += 1;
        if self.expiries.is_empty() {
            return;
        }
        self.expiries.sort();
        let mut digits = itoa::Buffer::new();
        let mut count_digits = itoa::Buffer::new();
        for same in self.expiries.chunk_by(|a, b| a.0 == b.0) {
            let Some((at, _)) = same.first() else { continue };
            let at = digits.format(*at).as_bytes();
            let count = count_digits.format(same.len()).as_bytes();
            self.batch.begin(&[b"HPEXPIREAT", self.key, at, b"FIELDS", count]);
            same.iter().for_each(|(_, field)| self.batch.arg(field));
            self.batch.flush(self.out);
            self.count += 1;
        }
        self.expiries.clear();
    }
}

impl Sink for Commands<'_> {
    fn string(&mut self, bytes: &[u8]) {
        self.piece(bytes, true);
    }

    fn item(&mut self, item: &[u8]) {
        self.room(b"RPUSH", item.len());
        self.batch.arg(item);
    }

    fn member(&mut self, member: &[u8]) {
        self.room(b"SADD", member.len());
        self.batch.arg(member);
    }

    fn scored(&mut self, member: &[u8], score: f64) {
        self.room(b"ZADD", member.len());
        self.text.clear();
        write_score(&mut self.text, score);
        self.batch.arg(self.text.as_bytes());
        self.batch.arg(member);
    }

    fn field(&mut self, field: &[u8], value: &[u8], expire_at_ms: Option<i64>) {
        let name: &'static [u8] = if self.dialect.variadic_hset { b"HSET" } else { b"HMSET" };
        self.room(name, field.len() + value.len());
        self.batch.arg(field);
        self.batch.arg(value);
        if let Some(at) = expire_at_ms.filter(|_| self.dialect.field_expiry) {
            self.expiries.push((self.dialect.holding.field(at), field.to_vec()));
        }
    }

    fn entry(&mut self, id: StreamId, fields: &[(Entry<'_>, Entry<'_>)]) {
        set(&mut self.text, id);
        self.batch.begin(&[b"XADD", self.key, self.text.as_bytes()]);
        let mut digits = itoa::Buffer::new();
        for (field, value) in fields {
            self.batch.arg(field.text(&mut digits));
            self.batch.arg(value.text(&mut digits));
        }
        self.batch.flush(self.out);
        self.count += 1;
    }

    fn stream(&mut self, state: StreamState) {
        if state.length == 0 {
            // A stream is made by adding to it; this leaves it empty.
            self.command(&[b"XADD", self.key, b"MAXLEN", b"0", b"0-1", b"x", b"y"]);
        }
        set(&mut self.text, state.last);
        self.batch.begin(&[b"XSETID", self.key, self.text.as_bytes()]);
        if let Some((max_deleted, added)) = state.counters.filter(|_| self.dialect.stream_counters) {
            set(&mut self.text, added);
            set(&mut self.more_text, max_deleted);
            self.batch.arg(b"ENTRIESADDED");
            self.batch.arg(self.text.as_bytes());
            self.batch.arg(b"MAXDELETEDID");
            self.batch.arg(self.more_text.as_bytes());
        }
        self.batch.flush(self.out);
        self.count += 1;
    }

    fn group(&mut self, name: &[u8], last: StreamId, entries_read: Option<u64>) {
        self.group.clear();
        self.group.extend_from_slice(name);
        set(&mut self.text, last);
        self.batch.begin(&[b"XGROUP", b"CREATE", self.key, name, self.text.as_bytes()]);
        if let Some(read) = entries_read.filter(|_| self.dialect.stream_counters) {
            set(&mut self.text, read);
            self.batch.arg(b"ENTRIESREAD");
            self.batch.arg(self.text.as_bytes());
        }
        self.batch.flush(self.out);
        self.count += 1;
    }

    fn consumer(&mut self, name: &[u8]) {
        self.consumer.clear();
        self.consumer.extend_from_slice(name);
        if self.dialect.create_consumer {
            self.batch.begin(&[b"XGROUP", b"CREATECONSUMER", self.key, &self.group, name]);
        } else {
            // Whoever asks for what is pending to it is a consumer from then on.
            self.batch.begin(&[b"XREADGROUP", b"GROUP", &self.group, name, b"COUNT", b"1"]);
            [b"STREAMS".as_slice(), self.key, b"0"].iter().for_each(|arg| self.batch.arg(arg));
        }
        self.batch.flush(self.out);
        self.count += 1;
    }

    fn pending(&mut self, pending: Pending) {
        set(&mut self.text, pending.id);
        self.batch.begin(&[b"XCLAIM", self.key, &self.group, &self.consumer, b"0", self.text.as_bytes()]);
        self.batch.arg(b"TIME");
        let mut digits = itoa::Buffer::new();
        self.batch.arg(digits.format(pending.delivered_at_ms).as_bytes());
        self.batch.arg(b"RETRYCOUNT");
        self.batch.arg(digits.format(pending.deliveries).as_bytes());
        self.batch.arg(b"FORCE");
        self.batch.arg(b"JUSTID");
        self.batch.flush(self.out);
        self.count += 1;
    }

    fn module(&mut self, _: &[u8]) {
        self.refused = Some(Fault::RefusedType(super::event::TYPE_MODULE_2, "module data has no commands"));
    }
}

fn set(text: &mut String, value: impl std::fmt::Display) {
    text.clear();
    // Writing to a String cannot fail.
    let _ = write!(text, "{value}");
}

/// The shortest decimal that reads back as the same number; with an exponent where that is much
/// shorter. Servers refuse "nan", which no sorted set should hold.
pub(super) fn write_score(text: &mut String, score: f64) {
    let plain = score == 0.0 || (1e-5..1e17).contains(&score.abs());
    let _ = if plain || !score.is_finite() {
        write!(text, "{}", Lower(score))
    } else {
        write!(text, "{score:e}")
    };
}

/// Rust writes "NaN", Redis "nan".
struct Lower(f64);

impl std::fmt::Display for Lower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_nan() { f.write_str("nan") } else { write!(f, "{}", self.0) }
    }
}

#[cfg(test)]
mod tests;
