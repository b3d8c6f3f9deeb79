//! Keys as JSON lines, one a key, in the order read.
//!
//! `{"db":0,"key":"user:1","type":"hash","expireAt":1790000000000,"value":…}`. A byte string is a JSON
//! string when it is valid UTF-8, else `{"base64":"…"}`. Values that come in parts are written in parts;
//! of these a string is always base64, and a sorted set keeps the order of the file.

mod text;
mod values;

use super::error::RdbError;
use super::event::{Items, KeyRecord, LargeHead, LargeKind, Limits, Run};
use super::layout::{Layout, layout};
use super::module::module_of;
use super::walk;
use crate::version::Flavor;
use text::{Base64, byte_string, number};
use values::Values;

/// Writes lines; keeps what a value in parts needs between them.
#[derive(Debug, Default)]
pub struct JsonLines {
    large: Option<OpenLine>,
}

/// A line whose value is not whole yet.
#[derive(Debug)]
struct OpenLine {
    kind: LargeKind,
    /// Something stands in the current array.
    begun: bool,
    base64: Base64,
}

/// Values that take more than this once expanded are written in parts: in a line a byte may take six.
const EXPANDED: u64 = 16 << 20;

impl JsonLines {
    /// What it is to be given, so that it never writes much at a time.
    pub fn limits() -> Limits {
        Limits { max_expanded: EXPANDED, ..Limits::default() }
    }

    /// Appends the line of one whole key. On an error `out` is as it was.
    pub fn key(
        &mut self,
        db: u64,
        record: &KeyRecord<'_>,
        flavor: Flavor,
        out: &mut Vec<u8>,
    ) -> Result<(), RdbError> {
        let start = out.len();
        let written = Self::whole(db, record, flavor, out);
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    fn whole(db: u64, record: &KeyRecord<'_>, flavor: Flavor, out: &mut Vec<u8>) -> Result<(), RdbError> {
        let name = type_name(record.type_byte, flavor);
        head(db, record.key, name, record.expire_at_ms, out);
        if let Some(id) = module_of(record.type_byte, record.value) {
            out.extend_from_slice(b"{\"module\":");
            byte_string(&id.name(), out);
            out.extend_from_slice(b",\"encodingVersion\":");
            number(i64::from(id.encoding_version()), out);
            out.push(b',');
            text::base64_member(record.value, out);
            out.push(b'}');
        } else {
            let (open, close) = brackets(name);
            out.extend_from_slice(open);
            let mut values = Values::new(out, false, true);
            walk::value(record.type_byte, record.value, flavor, &mut values)?;
            values.finish();
            out.extend_from_slice(close);
        }
        out.extend_from_slice(b"}\n");
        Ok(())
    }

    /// Appends the line of a function library.
    pub fn function(code: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"type\":\"function\",\"value\":");
        byte_string(code, out);
        out.extend_from_slice(b"}\n");
    }

    /// Begins the line of a value that comes in parts.
    pub fn begin(&mut self, db: u64, large: &LargeHead<'_>, out: &mut Vec<u8>) {
        let name = kind_name(large.kind);
        let open = if large.kind == LargeKind::String { LARGE_STRING.0 } else { brackets(name).0 };
        head(db, large.key, name, large.expire_at_ms, out);
        out.extend_from_slice(open);
        self.large = Some(OpenLine { kind: large.kind, begun: false, base64: Base64::default() });
    }

    /// Appends some of its elements. On an error nothing is appended.
    pub fn items(&mut self, items: &Items<'_>, out: &mut Vec<u8>) -> Result<(), RdbError> {
        let Some(line) = &mut self.large else { return Ok(()) };
        let start = out.len();
        let mut values = Values::new(out, line.begun, false);
        let walked = match items.0 {
            Run::Piece { bytes, .. } => {
                line.base64.push(bytes, out);
                return Ok(());
            }
            Run::Elements { elements, bytes, type_byte } => {
                walk::elements(type_byte, elements, bytes, &mut values)
            }
            Run::StreamTail { bytes, type_byte } => walk::stream_tail(type_byte, bytes, &mut values),
        };
        let begun = values.finish();
        if walked.is_ok() {
            line.begun = begun;
        }
        if walked.is_err() {
            out.truncate(start);
        }
        walked
    }

    /// Ends the line; with `why` the value is not whole, and the line says so.
    pub fn end(&mut self, why: Option<&str>, out: &mut Vec<u8>) {
        let Some(mut line) = self.large.take() else { return };
        let close =
            if line.kind == LargeKind::String { LARGE_STRING.1 } else { brackets(kind_name(line.kind)).1 };
        line.base64.finish(out);
        out.extend_from_slice(close);
        if let Some(why) = why {
            out.extend_from_slice(b",\"error\":");
            byte_string(why.as_bytes(), out);
        }
        out.extend_from_slice(b"}\n");
    }

    /// True between [`JsonLines::begin`] and [`JsonLines::end`].
    pub fn is_open(&self) -> bool {
        self.large.is_some()
    }
}

const LARGE_STRING: (&[u8], &[u8]) = (b"{\"base64\":\"", b"\"}");

/// What stands around the elements of a value; a stream's tail begins another array than its entries do.
fn brackets(type_name: &str) -> (&'static [u8], &'static [u8]) {
    match type_name {
        "string" => (b"", b""),
        "stream" => (b"{\"entries\":[", b"]}"),
        _ => (b"[", b"]"),
    }
}

/// `string`, `list`, `set`, `zset`, `hash`, `stream` or `module`.
pub fn type_name(type_byte: u8, flavor: Flavor) -> &'static str {
    match layout(type_byte, flavor) {
        Ok(Layout::Counted(elements)) => kind_name(elements.kind()),
        Ok(Layout::Module) => "module",
        Ok(Layout::Blob | Layout::ExpiryBlob) => match type_byte {
            0 => "string",
            10 => "list",
            11 | 20 => "set",
            12 | 17 => "zset",
            _ => "hash",
        },
        Err(_) => "unknown",
    }
}

/// As [`type_name`], of a value in parts.
pub fn kind_name(kind: LargeKind) -> &'static str {
    match kind {
        LargeKind::String => "string",
        LargeKind::List => "list",
        LargeKind::Set => "set",
        LargeKind::Zset => "zset",
        LargeKind::Hash => "hash",
        LargeKind::Stream => "stream",
    }
}

fn head(db: u64, key: &[u8], name: &str, expire_at_ms: Option<i64>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"db\":");
    out.extend_from_slice(itoa::Buffer::new().format(db).as_bytes());
    out.extend_from_slice(b",\"key\":");
    byte_string(key, out);
    out.extend_from_slice(b",\"type\":\"");
    out.extend_from_slice(name.as_bytes());
    out.push(b'"');
    if let Some(at) = expire_at_ms {
        out.extend_from_slice(b",\"expireAt\":");
        number(at, out);
    }
    out.extend_from_slice(b",\"value\":");
}

#[cfg(test)]
mod tests;
