//! Digests of values, equal for equal values however they are encoded.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hasher};

use crate::hold::true_field;
use crate::version::Flavor;

use super::error::RdbError;
use super::packed::Entry;
use super::walk::{self, Pending, Sink, StreamId, StreamState};

/// Field expiries this far apart count as equal.
pub const EXPIRY_TOLERANCE_MS: u64 = 1000;

/// What is compared of a value. Only meaningful within one process.
///
/// - String: its bytes; of a HyperLogLog the registers: not the cached cardinality, which reading it changes,
///   nor whether they are stored sparsely, which is another thing after PFMERGE before Redis 5.
/// - List: its items in order. Set, hash: their members in any order. Sorted set: members with
///   scores, −0 being 0.
/// - Stream: entries, last id, groups with their last ids, and which consumer has which entry
///   pending. Left out is what a replica of the source does not have either: consumers with nothing
///   pending, the entries-read counters, and times and counts of deliveries.
#[derive(Clone, Debug)]
pub struct ValueDigest {
    pub content: u128,
    /// Greatest deleted id and entries ever added of a stream; types before 7.0 do not say.
    stream_counters: Option<(StreamId, u64)>,
    /// Fields of a hash with an expiry, by the hash of the field; expiry in Unix milliseconds.
    field_expiries: Vec<(u64, i64)>,
}

impl ValueDigest {
    /// Whether both are digests of equal values.
    pub fn matches(&self, other: &Self) -> bool {
        self.content == other.content && self.counters_match(other) && self.expiries_match(other)
    }

    /// For a target that has no expiries of fields.
    pub fn without_field_expiries(mut self) -> Self {
        self.field_expiries = Vec::new();
        self
    }

    fn counters_match(&self, other: &Self) -> bool {
        match (self.stream_counters, other.stream_counters) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        }
    }

    fn expiries_match(&self, other: &Self) -> bool {
        let close = |a: &(u64, i64), b: &(u64, i64)| a.0 == b.0 && a.1.abs_diff(b.1) <= EXPIRY_TOLERANCE_MS;
        self.field_expiries.len() == other.field_expiries.len()
            && self.field_expiries.iter().zip(&other.field_expiries).all(|(a, b)| close(a, b))
    }
}

/// The digest of a value of this type, as a server of that flavour wrote it.
pub fn canonical(type_byte: u8, value: &[u8], flavor: Flavor) -> Result<ValueDigest, RdbError> {
    let mut sink = DigestSink::default();
    walk::value(type_byte, value, flavor, &mut sink)?;
    Ok(sink.finish())
}

/// What a digest begins with, so that values of different kinds differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    None,
    String,
    List,
    Set,
    Zset,
    Hash,
    Stream,
    Module,
}

#[derive(Default)]
struct DigestSink {
    kind: Kind,
    ordered: Twin,
    /// Sum of the hashes of what has no order.
    unordered: u128,
    count: u64,
    group: Option<Group>,
    stream_counters: Option<(StreamId, u64)>,
    field_expiries: Vec<(u64, i64)>,
}

struct Group {
    head: u128,
    pending: u128,
    consumer: u128,
}

impl DigestSink {
    fn add(&mut self, kind: Kind, hash: u128) {
        self.kind = kind;
        self.count += 1;
        self.unordered = self.unordered.wrapping_add(hash);
    }

    fn close_group(&mut self) {
        if let Some(Group { head, pending, .. }) = self.group.take() {
            let mut twin = Twin::default();
            twin.number(head as u64);
            twin.number((head >> 64) as u64);
            twin.number(pending as u64);
            twin.number((pending >> 64) as u64);
            self.unordered = self.unordered.wrapping_add(twin.finish());
        }
    }

    fn finish(mut self) -> ValueDigest {
        self.close_group();
        let mut twin = self.ordered;
        twin.number(self.kind as u64);
        twin.number(self.count);
        twin.number(self.unordered as u64);
        twin.number((self.unordered >> 64) as u64);
        self.field_expiries.sort_unstable();
        ValueDigest {
            content: twin.finish(),
            stream_counters: self.stream_counters,
            field_expiries: self.field_expiries,
        }
    }
}

impl Sink for DigestSink {
    fn string(&mut self, bytes: &[u8]) {
        self.kind = Kind::String;
        match hyperloglog(bytes) {
            Some((head, registers)) => {
                self.ordered.bytes(head);
                self.ordered.bytes(&registers);
            }
            None => self.ordered.bytes(bytes),
        }
    }

    fn item(&mut self, item: &[u8]) {
        self.kind = Kind::List;
        self.count += 1;
        self.ordered.bytes(item);
    }

    fn member(&mut self, member: &[u8]) {
        self.add(Kind::Set, Twin::of(|twin| twin.bytes(member)));
    }

    fn scored(&mut self, member: &[u8], score: f64) {
        // Adding zero makes −0 to 0.
        let bits = (score + 0.0).to_bits();
        let hash = Twin::of(|twin| {
            twin.bytes(member);
            twin.number(bits);
        });
        self.add(Kind::Zset, hash);
    }

    fn field(&mut self, field: &[u8], value: &[u8], expire_at_ms: Option<i64>) {
        let hash = Twin::of(|twin| {
            twin.bytes(field);
            twin.bytes(value);
        });
        self.add(Kind::Hash, hash);
        // A target's may be held.
        if let Some(at) = expire_at_ms.map(|at| true_field(at).unwrap_or(at)) {
            self.field_expiries.push((Twin::of(|twin| twin.bytes(field)) as u64, at));
        }
    }

    fn entry(&mut self, id: StreamId, fields: &[(Entry<'_>, Entry<'_>)]) {
        self.count += 1;
        self.ordered.id(id);
        self.ordered.number(fields.len() as u64);
        let mut digits = itoa::Buffer::new();
        for (field, value) in fields {
            self.ordered.bytes(field.text(&mut digits));
            self.ordered.bytes(value.text(&mut digits));
        }
    }

    fn stream(&mut self, state: StreamState) {
        self.kind = Kind::Stream;
        self.ordered.id(state.last);
        self.stream_counters = state.counters;
    }

    fn group(&mut self, name: &[u8], last: StreamId, _: Option<u64>) {
        self.close_group();
        let head = Twin::of(|twin| {
            twin.bytes(name);
            twin.id(last);
        });
        self.group = Some(Group { head, pending: 0, consumer: 0 });
    }

    fn consumer(&mut self, name: &[u8]) {
        if let Some(group) = &mut self.group {
            group.consumer = Twin::of(|twin| twin.bytes(name));
        }
    }

    fn pending(&mut self, pending: Pending) {
        if let Some(group) = &mut self.group {
            let hash = Twin::of(|twin| {
                twin.number(group.consumer as u64);
                twin.number((group.consumer >> 64) as u64);
                twin.id(pending.id);
            });
            group.pending = group.pending.wrapping_add(hash);
        }
    }

    fn module(&mut self, value: &[u8]) {
        self.kind = Kind::Module;
        self.ordered.bytes(value);
    }
}

/// A HyperLogLog's magic and registers, without the cardinality that is cached between them; what is not well
/// formed counts as it stands. `None`: another string.
fn hyperloglog(bytes: &[u8]) -> Option<(&[u8], Cow<'_, [u8]>)> {
    if !bytes.starts_with(b"HYLL") || *bytes.get(4)? > 1 {
        return None;
    }
    let (encoding, body) = (*bytes.get(4)?, bytes.get(16..)?);
    Some(match registers(encoding, body) {
        Some(registers) => (bytes.get(..4)?, Cow::Owned(registers)),
        None => (bytes.get(..5)?, Cow::Borrowed(body)),
    })
}

/// One byte for each register. Source: Redis `hyperloglog.c`, `struct hllhdr` and the comment on the sparse
/// representation.
fn registers(encoding: u8, body: &[u8]) -> Option<Vec<u8>> {
    const REGISTERS: usize = 1 << 14;
    let mut registers = Vec::with_capacity(REGISTERS + 3);
    if encoding == 0 {
        // Six bits each, least significant first.
        for group in body.chunks(3).take(REGISTERS / 4) {
            let [a, b, c] = [0, 1, 2].map(|at| group.get(at).copied().unwrap_or_default());
            registers.extend([a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2]);
        }
    } else {
        let mut body = body.iter();
        while let Some(&code) = body.next() {
            let (value, run) = match code >> 6 {
                0 => (0, usize::from(code & 63) + 1),
                1 => (0, (usize::from(code & 63) << 8 | usize::from(*body.next()?)) + 1),
                _ => ((code >> 2 & 31) + 1, usize::from(code & 3) + 1),
            };
            if run > REGISTERS - registers.len() {
                return None;
            }
            registers.resize(registers.len() + run, value);
        }
    }
    (registers.len() == REGISTERS).then_some(registers)
}

/// Two SipHashes with different beginnings: 128 bits.
#[derive(Clone)]
struct Twin(DefaultHasher, DefaultHasher);

impl Default for Twin {
    fn default() -> Self {
        let mut second = DefaultHasher::new();
        second.write_u64(0x9e37_79b9_7f4a_7c15);
        Twin(DefaultHasher::new(), second)
    }
}

impl Twin {
    #[inline]
    fn of(fill: impl FnOnce(&mut Self)) -> u128 {
        let mut twin = Twin::default();
        fill(&mut twin);
        twin.finish()
    }

    /// Bytes with their length, so that neighbours cannot run together.
    #[inline]
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.write(bytes);
        self.1.write(bytes);
    }

    #[inline]
    fn number(&mut self, number: u64) {
        self.0.write_u64(number);
        self.1.write_u64(number);
    }

    fn id(&mut self, id: StreamId) {
        self.number(id.ms);
        self.number(id.seq);
    }

    #[inline]
    fn finish(self) -> u128 {
        u128::from(self.0.finish()) << 64 | u128::from(self.1.finish())
    }
}

#[cfg(test)]
mod tests;
