//! Values that a target cannot load, put together anew as a type that it can, so that they still go as one
//! RESTORE. Lists, sets, hashes and sorted sets become the plain types that every version loads; streams lose
//! what older ones do not know (how many entries were ever added or read, when consumers were active last).
//! Format source: Redis rdb.c `rdbSaveObject` of 2.8, 7.0 and 8.2, Valkey 9 rdb.c for its type 22.

use super::commands::write_score;
use super::compat::{Fit, TargetFormat};
use super::cursor::{Cursor, Stop, bounded};
use super::error::{Fault, RdbError};
use super::layout::stream_layout;
use super::packed::Entry;
use super::walk::{self, Pending, Sink, StreamId, StreamState};
use crate::loss::Loss;
use crate::version::Flavor;

/// A value that grows beyond this, as compressed ones may, is not rewritten: servers close the connection of
/// those who send more than 512 MiB at once.
const LARGEST: usize = if cfg!(test) { 1 << 16 } else { 256 << 20 };

/// What a value became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recoded {
    pub type_byte: u8,
    /// Its fields had expiries, which are gone.
    pub lost_field_expiry: bool,
}

/// Why a target cannot have a value.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotRecoded {
    #[error("the target cannot have {0}")]
    NoEquivalent(Loss),
    #[error(transparent)]
    Damaged(#[from] RdbError),
    #[error("it takes more than {LARGEST} B once rewritten for the target; lower limits.maxRestoreBytes")]
    TooLarge,
}

/// Appends the value as the target can load it, in the target's own numbering of types. On an error `out` is
/// as it was.
pub fn recode(
    type_byte: u8,
    value: &[u8],
    flavor: Flavor,
    target: &TargetFormat,
    out: &mut Vec<u8>,
) -> Result<Recoded, NotRecoded> {
    let start = out.len();
    let recoded = match target.fit(type_byte, flavor) {
        Fit::AsItIs => {
            out.extend_from_slice(value);
            Ok(Recoded { type_byte, lost_field_expiry: false })
        }
        Fit::As(wanted) if stream_layout(wanted) > 0 => stream(type_byte, value, wanted, out),
        Fit::As(wanted) => collection(type_byte, value, flavor, wanted, out),
        Fit::Never(loss) => Err(NotRecoded::NoEquivalent(loss)),
    };
    if recoded.is_err() {
        out.truncate(start);
    }
    recoded
}

fn collection(
    type_byte: u8,
    value: &[u8],
    flavor: Flavor,
    wanted: u8,
    out: &mut Vec<u8>,
) -> Result<Recoded, NotRecoded> {
    // What stands before the elements depends on all of them.
    let mut survey = Survey::default();
    walk::value(type_byte, value, flavor, &mut survey)?;
    if wanted == 24 {
        out.extend_from_slice(&survey.first_expiry.to_le_bytes());
    }
    append_length(survey.elements, out);
    let limit = out.len().saturating_add(LARGEST);
    let mut body =
        Body { wanted, out, limit, least: survey.first_expiry, text: String::new(), overflow: false };
    walk::value(type_byte, value, flavor, &mut body)?;
    if body.overflow {
        return Err(NotRecoded::TooLarge);
    }
    let keeps = matches!(wanted, 22 | 24);
    Ok(Recoded { type_byte: wanted, lost_field_expiry: survey.expires && !keeps })
}

#[derive(Default)]
struct Survey {
    elements: u64,
    expires: bool,
    /// The least expiry of a field, Unix ms; 0: none has one.
    first_expiry: i64,
}

impl Survey {
    fn add(&mut self) {
        self.elements += 1;
    }
}

impl Sink for Survey {
    fn string(&mut self, _: &[u8]) {}
    fn item(&mut self, _: &[u8]) {
        self.add();
    }
    fn member(&mut self, _: &[u8]) {
        self.add();
    }
    fn scored(&mut self, _: &[u8], _: f64) {
        self.add();
    }
    fn field(&mut self, _: &[u8], _: &[u8], expire_at_ms: Option<i64>) {
        self.add();
        if let Some(at) = expire_at_ms {
            self.first_expiry = if self.expires { self.first_expiry.min(at) } else { at };
            self.expires = true;
        }
    }
    fn entry(&mut self, _: StreamId, _: &[(Entry<'_>, Entry<'_>)]) {}
    fn stream(&mut self, _: StreamState) {}
    fn group(&mut self, _: &[u8], _: StreamId, _: Option<u64>) {}
    fn consumer(&mut self, _: &[u8]) {}
    fn pending(&mut self, _: Pending) {}
    fn module(&mut self, _: &[u8]) {}
}

struct Body<'a> {
    wanted: u8,
    out: &'a mut Vec<u8>,
    limit: usize,
    least: i64,
    text: String,
    overflow: bool,
}

impl Body<'_> {
    fn has_room(&mut self, bytes: usize) -> bool {
        self.overflow |= self.out.len().saturating_add(bytes) > self.limit;
        !self.overflow
    }

    fn string(&mut self, bytes: &[u8]) {
        if self.has_room(bytes.len()) {
            append_string(bytes, self.out);
        }
    }
}

impl Sink for Body<'_> {
    fn string(&mut self, _: &[u8]) {}

    fn item(&mut self, item: &[u8]) {
        self.string(item);
    }

    fn member(&mut self, member: &[u8]) {
        self.string(member);
    }

    fn scored(&mut self, member: &[u8], score: f64) {
        self.string(member);
        if self.wanted == 5 {
            self.out.extend_from_slice(&score.to_le_bytes());
            return;
        }
        text_score(score, &mut self.text, self.out);
    }

    fn field(&mut self, field: &[u8], value: &[u8], expire_at_ms: Option<i64>) {
        if self.wanted == 24 {
            let after = expire_at_ms.map_or(0, |at| at.wrapping_sub(self.least).wrapping_add(1));
            append_length(after as u64, self.out);
        }
        self.string(field);
        self.string(value);
        if self.wanted == 22 {
            self.out.extend_from_slice(&expire_at_ms.unwrap_or(-1).to_le_bytes());
        }
    }

    fn entry(&mut self, _: StreamId, _: &[(Entry<'_>, Entry<'_>)]) {}
    fn stream(&mut self, _: StreamState) {}
    fn group(&mut self, _: &[u8], _: StreamId, _: Option<u64>) {}
    fn consumer(&mut self, _: &[u8]) {}
    fn pending(&mut self, _: Pending) {}
    fn module(&mut self, _: &[u8]) {}
}

/// The nodes are the same in all versions; what follows them grew.
fn stream(type_byte: u8, value: &[u8], wanted: u8, out: &mut Vec<u8>) -> Result<Recoded, NotRecoded> {
    let mut copy = Copy { cursor: Cursor::new(value), out };
    let copied = copy.stream(stream_layout(type_byte), stream_layout(wanted));
    let (offset, fault) = match copied {
        Ok(()) if copy.cursor.is_at_end() => {
            return Ok(Recoded { type_byte: wanted, lost_field_expiry: false });
        }
        Ok(()) => (copy.cursor.at, Fault::Trailing(value.len().saturating_sub(copy.cursor.at))),
        Err(Stop::Fault { fault, at }) => (at, fault),
        Err(Stop::NeedMore(_)) => (value.len(), Fault::Missing("its rest")),
    };
    Err(NotRecoded::Damaged(RdbError::Value { type_byte, offset, fault }))
}

/// Takes parts over, or leaves them out.
struct Copy<'a, 'o> {
    cursor: Cursor<'a>,
    out: &'o mut Vec<u8>,
}

impl Copy<'_, '_> {
    fn stream(&mut self, from: u8, to: u8) -> Result<(), Stop> {
        for _ in 0..self.length(true)? {
            self.text(true)?;
            self.text(true)?;
        }
        // Length and last id.
        self.lengths(3, true)?;
        if from >= 2 {
            // First id, greatest deleted id, entries ever added.
            self.lengths(5, to >= 2)?;
        }
        for _ in 0..self.length(true)? {
            self.text(true)?;
            self.lengths(2, true)?;
            if from >= 2 {
                self.lengths(1, to >= 2)?;
            }
            for _ in 0..self.length(true)? {
                self.raw(24, true)?;
                self.lengths(1, true)?;
            }
            for _ in 0..self.length(true)? {
                self.text(true)?;
                self.raw(8, true)?;
                if from >= 3 {
                    self.raw(8, to >= 3)?;
                }
                for _ in 0..self.length(true)? {
                    self.raw(16, true)?;
                }
            }
        }
        if from >= 4 {
            self.producers()?;
        }
        Ok(())
    }

    /// Only servers of the same kind would take them.
    fn producers(&mut self) -> Result<(), Stop> {
        self.lengths(2, false)?;
        for _ in 0..self.length(false)? {
            self.text(false)?;
            for _ in 0..self.length(false)? {
                self.text(false)?;
                self.lengths(2, false)?;
            }
        }
        self.lengths(2, false)
    }

    fn length(&mut self, keep: bool) -> Result<u64, Stop> {
        let start = self.cursor.at;
        let length = self.cursor.length()?;
        self.keep(start, keep);
        Ok(length)
    }

    fn lengths(&mut self, count: usize, keep: bool) -> Result<(), Stop> {
        for _ in 0..count {
            self.length(keep)?;
        }
        Ok(())
    }

    fn text(&mut self, keep: bool) -> Result<(), Stop> {
        let start = self.cursor.at;
        self.cursor.text(u64::MAX)?;
        self.keep(start, keep);
        Ok(())
    }

    fn raw(&mut self, count: u64, keep: bool) -> Result<(), Stop> {
        let start = self.cursor.at;
        self.cursor.take(bounded("stream part", count, u64::MAX, start)?)?;
        self.keep(start, keep);
        Ok(())
    }

    fn keep(&mut self, start: usize, keep: bool) {
        if keep {
            self.out.extend_from_slice(self.cursor.bytes.get(start..self.cursor.at).unwrap_or_default());
        }
    }
}

/// A score as text, with its length in a byte. `text`: to be used again.
pub(super) fn text_score(score: f64, text: &mut String, out: &mut Vec<u8>) {
    match score {
        _ if score.is_nan() => out.push(253),
        f64::INFINITY => out.push(254),
        f64::NEG_INFINITY => out.push(255),
        _ => {
            text.clear();
            write_score(text, score);
            // At most some 30 letters.
            out.push(text.len() as u8);
            out.extend_from_slice(text.as_bytes());
        }
    }
}

/// A string as it is, without compression: Redis `rdb.c`, `rdbSaveRawString`.
pub fn append_string(bytes: &[u8], out: &mut Vec<u8>) {
    append_length(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// An RDB length: Redis `rdb.c`, `rdbSaveLen`.
pub fn append_length(length: u64, out: &mut Vec<u8>) {
    match (u8::try_from(length), u16::try_from(length), u32::try_from(length)) {
        (Ok(short @ ..0x40), _, _) => out.push(short),
        (_, Ok(middle @ ..0x4000), _) => out.extend_from_slice(&(middle | 0x4000).to_be_bytes()),
        (_, _, Ok(long)) => {
            out.push(0x80);
            out.extend_from_slice(&long.to_be_bytes());
        }
        _ => {
            out.push(0x81);
            out.extend_from_slice(&length.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
