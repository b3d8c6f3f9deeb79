//! Replies out of a byte stream. Only RESP2 is spoken: no HELLO is ever sent, so a RESP3 marker is a fault.

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use super::Reply;

/// Longest bulk string accepted. Servers refuse to take in more than `proto-max-bulk-len` (512 MB by
/// default), but a DUMP of a large collection may exceed what they would take in.
const MAX_BULK: i64 = 4 << 30;
/// Most elements in one array.
const MAX_ELEMENTS: i64 = 64 << 20;
/// Longest status, error, number or length line.
const MAX_LINE: usize = 64 << 10;
/// Deepest nesting; COMMAND DOCS, the deepest known, nests fewer than ten.
const MAX_DEPTH: usize = 32;
/// Elements for which memory is taken before they are known to be there.
const ELEMENTS_AHEAD: usize = 4096;

/// What a peer sent is not RESP2, or goes past a limit.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RespError {
    #[error("a reply cannot start with byte 0x{0:02x}; the other side does not speak RESP2")]
    UnknownMarker(u8),
    #[error("a {0} is not a decimal number")]
    BadNumber(&'static str),
    #[error("a {what} of {length} is past the limit of {limit}")]
    TooLong { what: &'static str, length: i64, limit: i64 },
    #[error("a line of more than {MAX_LINE} bytes without CRLF")]
    EndlessLine,
    #[error("a bulk string is not followed by CRLF")]
    MissingTerminator,
    #[error("arrays nested deeper than {MAX_DEPTH}")]
    TooDeep,
}

/// Takes one complete reply from the front of `buffer`. `None`: more bytes are needed; nothing was taken.
pub fn parse_reply(buffer: &mut BytesMut) -> Result<Option<Reply>, RespError> {
    ReplyDecoder::default().next(buffer)
}

/// [`parse_reply`] that remembers how far it looked, so that a long reply arriving in many reads is
/// scanned once. The same buffer must be passed each time, with nothing but appended bytes between.
#[derive(Clone, Debug, Default)]
pub struct ReplyDecoder {
    extent: ReplyExtent,
}

impl ReplyDecoder {
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Reply>, RespError> {
        let Some(length) = self.extent.advance(buffer)? else { return Ok(None) };
        self.extent = ReplyExtent::default();
        let whole = buffer.split_to(length).freeze();
        let mut at = 0;
        build(&whole, &mut at).map(Some)
    }
}

/// Finds where a reply ends without building it: for readers that compare bytes in place.
#[derive(Clone, Debug, Default)]
pub struct ReplyExtent {
    /// Bytes already looked at; always at the start of an element.
    scanned: usize,
    /// Elements still to come in each open array, outermost first.
    open: [u32; MAX_DEPTH],
    depth: usize,
    started: bool,
}

impl ReplyExtent {
    /// Length of the reply at the front of `buffer`, `None` while it is incomplete. Start the next
    /// reply with a new value.
    pub fn advance(&mut self, buffer: &[u8]) -> Result<Option<usize>, RespError> {
        while !(self.started && self.depth == 0) {
            let rest = buffer.get(self.scanned..).unwrap_or_default();
            let Some(element) = element(rest)? else { return Ok(None) };
            self.started = true;
            self.scanned += element.length;
            self.close_finished();
            if element.children > 0 {
                let slot = self.open.get_mut(self.depth).ok_or(RespError::TooDeep)?;
                *slot = element.children;
                self.depth += 1;
            } else {
                self.pop_empty();
            }
        }
        Ok(Some(self.scanned))
    }

    /// Counts the element just read against the array it stands in.
    fn close_finished(&mut self) {
        if let Some(slot) = self.depth.checked_sub(1).and_then(|top| self.open.get_mut(top)) {
            *slot = slot.saturating_sub(1);
        }
    }

    fn pop_empty(&mut self) {
        while self.depth > 0 && self.open.get(self.depth - 1) == Some(&0) {
            self.depth -= 1;
        }
    }
}

/// Extent of one element without its children.
struct Element {
    length: usize,
    children: u32,
}

fn element(bytes: &[u8]) -> Result<Option<Element>, RespError> {
    let Some(&marker) = bytes.first() else { return Ok(None) };
    if !matches!(marker, b'+' | b'-' | b':' | b'$' | b'*') {
        return Err(RespError::UnknownMarker(marker));
    }
    let Some((line, length)) = line(bytes)? else { return Ok(None) };
    let leaf = Ok(Some(Element { length, children: 0 }));
    match marker {
        b':' => number(line, "integer").and(leaf),
        b'$' => {
            let body = bounded(number(line, "bulk length")?, "bulk string", MAX_BULK)?;
            let Some(body) = body else { return leaf };
            let end = length.saturating_add(body);
            let Some(terminator) = bytes.get(end..end.saturating_add(2)) else { return Ok(None) };
            if terminator != b"\r\n" {
                return Err(RespError::MissingTerminator);
            }
            Ok(Some(Element { length: end + 2, children: 0 }))
        }
        b'*' => {
            let count = bounded(number(line, "array length")?, "array", MAX_ELEMENTS)?;
            let children = u32::try_from(count.unwrap_or(0)).unwrap_or(u32::MAX);
            Ok(Some(Element { length, children }))
        }
        _ => leaf,
    }
}

/// The text between marker and CRLF, and the length of all of it.
fn line(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, RespError> {
    let window = bytes.get(..MAX_LINE.min(bytes.len())).unwrap_or(bytes);
    match memchr::memchr(b'\n', window) {
        Some(end) if end >= 2 && bytes.get(end - 1) == Some(&b'\r') => {
            Ok(Some((bytes.get(1..end - 1).unwrap_or_default(), end + 1)))
        }
        Some(_) => Err(RespError::MissingTerminator),
        None if window.len() >= MAX_LINE => Err(RespError::EndlessLine),
        None => Ok(None),
    }
}

fn number(line: &[u8], what: &'static str) -> Result<i64, RespError> {
    std::str::from_utf8(line).ok().and_then(|text| text.parse().ok()).ok_or(RespError::BadNumber(what))
}

/// `None` for -1, which marks null.
fn bounded(length: i64, what: &'static str, limit: i64) -> Result<Option<usize>, RespError> {
    match length {
        -1 => Ok(None),
        0.. if length <= limit => {
            usize::try_from(length).map(Some).map_err(|_| RespError::TooLong { what, length, limit })
        }
        _ => Err(RespError::TooLong { what, length, limit }),
    }
}

/// Builds the reply at `at` in `whole`, which [`ReplyExtent`] has found complete and within the limits.
fn build(whole: &Bytes, at: &mut usize) -> Result<Reply, RespError> {
    let rest = whole.get(*at..).unwrap_or_default();
    let marker = rest.first().copied().unwrap_or_default();
    let (text, length) = line(rest)?.ok_or(RespError::MissingTerminator)?;
    let start = *at + length;
    *at = start;
    match marker {
        b'+' => Ok(Reply::Simple(whole.slice_ref(text))),
        b'-' => Ok(Reply::Error(whole.slice_ref(text))),
        b':' => Ok(Reply::Integer(number(text, "integer")?)),
        b'$' => {
            let Some(body) = bounded(number(text, "bulk length")?, "bulk string", MAX_BULK)? else {
                return Ok(Reply::Bulk(None));
            };
            let bytes = whole.get(start..start + body).ok_or(RespError::MissingTerminator)?;
            *at = start + body + 2;
            Ok(Reply::Bulk(Some(whole.slice_ref(bytes))))
        }
        b'*' => {
            let Some(count) = bounded(number(text, "array length")?, "array", MAX_ELEMENTS)? else {
                return Ok(Reply::Array(None));
            };
            let mut items = Vec::with_capacity(count.min(ELEMENTS_AHEAD));
            for _ in 0..count {
                items.push(build(whole, at)?);
            }
            Ok(Reply::Array(Some(items)))
        }
        other => Err(RespError::UnknownMarker(other)),
    }
}

impl Reply {
    /// Bulk or status text.
    pub fn bytes(&self) -> Option<&Bytes> {
        match self {
            Reply::Simple(bytes) | Reply::Bulk(Some(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Bulk or status text that is UTF-8.
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// An integer, also when it arrives as text.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Reply::Integer(number) => Some(*number),
            other => other.text()?.parse().ok(),
        }
    }

    /// The elements of an array; none for anything else.
    pub fn items(&self) -> &[Reply] {
        match self {
            Reply::Array(Some(items)) => items,
            _ => &[],
        }
    }

    pub fn is_ok(&self) -> bool {
        matches!(self, Reply::Simple(text) if text.as_ref() == b"OK")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Result<Option<Reply>, RespError> {
        parse_reply(&mut BytesMut::from(bytes))
    }

    fn bulk(text: &'static str) -> Reply {
        Reply::Bulk(Some(Bytes::from_static(text.as_bytes())))
    }

    #[test]
    fn every_kind_of_reply() {
        assert_eq!(parse(b"+OK\r\n"), Ok(Some(Reply::Simple(Bytes::from_static(b"OK")))));
        assert_eq!(parse(b"-ERR no\r\n"), Ok(Some(Reply::Error(Bytes::from_static(b"ERR no")))));
        assert_eq!(parse(b":-42\r\n"), Ok(Some(Reply::Integer(-42))));
        assert_eq!(parse(b"$3\r\na\nb\r\n"), Ok(Some(bulk("a\nb"))));
        assert_eq!(parse(b"$0\r\n\r\n"), Ok(Some(bulk(""))));
        assert_eq!(parse(b"$-1\r\n"), Ok(Some(Reply::Bulk(None))));
        assert_eq!(parse(b"*-1\r\n"), Ok(Some(Reply::Array(None))));
        assert_eq!(parse(b"*0\r\n"), Ok(Some(Reply::Array(Some(vec![])))));
    }

    #[test]
    fn nested_arrays_leave_the_next_reply_in_the_buffer() {
        let mut buffer = BytesMut::from(&b"*3\r\n*2\r\n:1\r\n*0\r\n$1\r\nx\r\n*1\r\n*1\r\n+y\r\n:9\r\n"[..]);
        let first = parse_reply(&mut buffer).unwrap().unwrap();
        assert_eq!(
            first,
            Reply::Array(Some(vec![
                Reply::Array(Some(vec![Reply::Integer(1), Reply::Array(Some(vec![]))])),
                bulk("x"),
                Reply::Array(Some(vec![Reply::Array(Some(vec![Reply::Simple(Bytes::from_static(b"y"))]))])),
            ]))
        );
        assert_eq!(&buffer[..], b":9\r\n");
    }

    #[test]
    fn faults_are_named() {
        assert_eq!(parse(b"\x15\x03\x01"), Err(RespError::UnknownMarker(0x15)));
        assert_eq!(parse(b"$x\r\n"), Err(RespError::BadNumber("bulk length")));
        assert_eq!(parse(b"$3\r\nabcd\r\n"), Err(RespError::MissingTerminator));
        assert!(matches!(parse(b"$99999999999999\r\n"), Err(RespError::TooLong { what: "bulk string", .. })));
        assert!(matches!(parse(b"*-2\r\n"), Err(RespError::TooLong { what: "array", .. })));
        assert_eq!(parse(&b"*1\r\n".repeat(MAX_DEPTH + 1)), Err(RespError::TooDeep));
        assert_eq!(parse(&[b'+'; MAX_LINE + 1]), Err(RespError::EndlessLine));
    }

    #[test]
    fn an_announced_million_elements_take_no_memory_before_they_come() {
        assert_eq!(parse(b"*60000000\r\n:1\r\n"), Ok(None));
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let text = || "[a-zA-Z0-9 ]{0,12}".prop_map(|s| Bytes::from(s.into_bytes()));
        let leaf = prop_oneof![
            text().prop_map(Reply::Simple),
            text().prop_map(Reply::Error),
            any::<i64>().prop_map(Reply::Integer),
            proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20))
                .prop_map(|bytes| Reply::Bulk(bytes.map(Bytes::from))),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            proptest::option::of(proptest::collection::vec(inner, 0..5)).prop_map(Reply::Array)
        })
    }

    fn write(reply: &Reply, out: &mut Vec<u8>) {
        match reply {
            Reply::Simple(text) => out.extend([b"+", text.as_ref(), b"\r\n"].concat()),
            Reply::Error(text) => out.extend([b"-", text.as_ref(), b"\r\n"].concat()),
            Reply::Integer(number) => out.extend(format!(":{number}\r\n").bytes()),
            Reply::Bulk(None) => out.extend(b"$-1\r\n"),
            Reply::Bulk(Some(bytes)) => crate::resp::bulk(bytes, out),
            Reply::Array(None) => out.extend(b"*-1\r\n"),
            Reply::Array(Some(items)) => {
                crate::resp::array_header(items.len(), out);
                items.iter().for_each(|item| write(item, out));
            }
        }
    }

    proptest! {
        #[test]
        fn results_do_not_depend_on_how_reads_split(replies in proptest::collection::vec(any_reply(), 1..4), step in 1usize..9) {
            let mut wire = Vec::new();
            replies.iter().for_each(|reply| write(reply, &mut wire));
            let (mut buffer, mut decoder, mut seen) = (BytesMut::new(), ReplyDecoder::default(), Vec::new());
            for piece in wire.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(reply) = decoder.next(&mut buffer).unwrap() {
                    seen.push(reply);
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(seen, replies);
        }

        #[test]
        fn any_bytes_end_in_a_value_or_an_error(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), proptest::sample::select(b"*$:+-0123\r\n".to_vec())], 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
