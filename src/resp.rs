//! RESP2: command frames out of a byte stream, replies, and the encoding of both.
//! Protocol source: Redis documentation "Redis serialization protocol specification".

pub mod counter;
pub mod frame;
pub mod reply;
pub mod verdict;

pub use reply::{ReplyDecoder, ReplyExtent, RespError, parse_reply};
pub use verdict::{Next, ReplyVerdict};

use bytes::Bytes;

/// One argument's place inside its frame: `frame[start..end]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

/// A command borrowed from the buffer it arrived in; argument 0 is its name.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// The whole frame, `*n\r\n$len\r\n...`.
    pub frame: &'a [u8],
    pub spans: &'a [Span],
}

impl<'a> Args<'a> {
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    pub fn arg(&self, index: usize) -> Option<&'a [u8]> {
        let span = self.spans.get(index)?;
        self.frame.get(span.start as usize..span.end as usize)
    }

    pub fn name(&self) -> &'a [u8] {
        self.arg(0).unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a, '_> {
        (0..self.len()).filter_map(|index| self.arg(index))
    }
}

/// A server's reply, owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple(Bytes),
    /// The text after `-`, without CRLF.
    Error(Bytes),
    Integer(i64),
    /// `None`: null bulk string.
    Bulk(Option<Bytes>),
    /// `None`: null array.
    Array(Option<Vec<Reply>>),
}

/// Appends `args` as one command frame.
pub fn encode_command<A: AsRef<[u8]>>(args: &[A], out: &mut Vec<u8>) {
    array_header(args.len(), out);
    for arg in args {
        bulk(arg.as_ref(), out);
    }
}

/// Appends `*count\r\n`.
pub fn array_header(count: usize, out: &mut Vec<u8>) {
    header(b'*', count, out);
}

/// Appends `$length\r\nbytes\r\n`.
pub fn bulk(bytes: &[u8], out: &mut Vec<u8>) {
    header(b'$', bytes.len(), out);
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// Appends the marker, the decimal number and CRLF.
pub fn header(marker: u8, number: usize, out: &mut Vec<u8>) {
    out.push(marker);
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    out.extend_from_slice(b"\r\n");
}
