//! PURE. Replies borrowed from the bytes they arrived in: comparing millions of values must not
//! copy one of them. Protocol source: Redis documentation "Redis serialization protocol
//! specification", RESP2.

/// Elements of one reply, nested ones included. A page of keys or fields has a few thousand.
const MAX_ELEMENTS: usize = 4 << 20;

/// One complete reply, as bytes; elements of an array are walked with [`Elements`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Simple(&'a [u8]),
    /// The text after `-`, without CRLF.
    Error(&'a [u8]),
    Integer(i64),
    /// `None`: null bulk string.
    Bulk(Option<&'a [u8]>),
    /// `None`: null array.
    Array(Option<Elements<'a>>),
    /// A bulk string over the reader's limit, whose bytes were skipped; its length.
    TooLong(u64),
}

impl<'a> Frame<'a> {
    /// The first element in `bytes`, which must hold it completely.
    pub fn parse(bytes: &'a [u8]) -> Result<(Frame<'a>, &'a [u8]), FrameError> {
        let (marker, text, rest) = header(bytes)?.ok_or(FrameError::Truncated)?;
        Ok(match marker {
            b'+' => (Frame::Simple(text), rest),
            b'-' => (Frame::Error(text), rest),
            b':' => (Frame::Integer(number(text)?), rest),
            b'$' => match length(text)? {
                None => (Frame::Bulk(None), rest),
                Some(len) => {
                    let body = rest.get(..len).ok_or(FrameError::Truncated)?;
                    let rest = rest.get(len + 2..).ok_or(FrameError::Truncated)?;
                    (Frame::Bulk(Some(body)), rest)
                }
            },
            b'*' => match length(text)? {
                None => (Frame::Array(None), rest),
                Some(left) => {
                    let elements = Elements { left, bytes: rest };
                    (Frame::Array(Some(elements)), skip(rest, left)?)
                }
            },
            other => return Err(FrameError::Marker(other)),
        })
    }
}

/// Iterates over the elements of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elements<'a> {
    left: usize,
    bytes: &'a [u8],
}

impl<'a> Elements<'a> {
    pub fn len(&self) -> usize {
        self.left
    }

    /// The next element as a bulk string; null and other kinds answer an empty one.
    pub fn next_bulk(&mut self) -> Result<Option<&'a [u8]>, FrameError> {
        Ok(match self.next_frame()? {
            None => None,
            Some(Frame::Bulk(Some(bytes)) | Frame::Simple(bytes)) => Some(bytes),
            Some(_) => Some(b""),
        })
    }

    pub fn next_frame(&mut self) -> Result<Option<Frame<'a>>, FrameError> {
        if self.left == 0 {
            return Ok(None);
        }
        let (frame, rest) = Frame::parse(self.bytes)?;
        self.left -= 1;
        self.bytes = rest;
        Ok(Some(frame))
    }
}

/// Finds where a reply ends while it arrives; never looks at the same body twice.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Bytes already understood: headers and bodies that are complete.
    position: usize,
    /// Elements still open; 0 once the reply is complete.
    open: usize,
    elements: usize,
}

/// What [`Extent::advance`] says about the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Complete(usize),
    /// At least this many bytes in total are needed to go on.
    NeedMore(usize),
    /// The reply is one bulk string longer than the limit: header length, body length.
    TooLong(usize, u64),
}

impl Default for Extent {
    fn default() -> Self {
        Self { position: 0, open: 1, elements: 0 }
    }
}

impl Extent {
    /// `bytes` always starts at the reply; call again with more behind after `NeedMore`.
    pub fn advance(&mut self, bytes: &[u8], limit: usize) -> Result<Progress, FrameError> {
        while self.open > 0 {
            let tail = bytes.get(self.position..).unwrap_or_default();
            let Some((marker, text, rest)) = header(tail)? else {
                return Ok(Progress::NeedMore(bytes.len() + 1));
            };
            let head = tail.len() - rest.len();
            let mut body = 0;
            match marker {
                b'+' | b'-' | b':' => {}
                b'$' => {
                    if let Some(len) = length(text)? {
                        if self.position.saturating_add(len) > limit {
                            if self.elements == 0 {
                                return Ok(Progress::TooLong(head, len as u64));
                            }
                            return Err(FrameError::Length(len as u64));
                        }
                        body = len + 2;
                    }
                }
                b'*' => {
                    let count = length(text)?.unwrap_or(0);
                    self.elements = self.elements.saturating_add(count);
                    if self.elements > MAX_ELEMENTS {
                        return Err(FrameError::Length(count as u64));
                    }
                    self.open += count;
                }
                other => return Err(FrameError::Marker(other)),
            }
            let end = self.position + head + body;
            if end > bytes.len() {
                return Ok(Progress::NeedMore(end));
            }
            self.position = end;
            self.open -= 1;
        }
        Ok(Progress::Complete(self.position))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("byte 0x{0:02x} where a reply should begin")]
    Marker(u8),
    #[error("line longer than {MAX_LINE} bytes in a reply")]
    Line,
    #[error("not a number in a reply header")]
    Number,
    #[error("impossible length {0} in a reply")]
    Length(u64),
    #[error("reply ends inside an element")]
    Truncated,
}

/// Error texts and statuses are lines; servers keep them short.
const MAX_LINE: usize = 64 * 1024;

/// Marker, text of the first line, bytes behind it.
type Header<'a> = (u8, &'a [u8], &'a [u8]);

/// `None` when the first line is not complete.
fn header(bytes: &[u8]) -> Result<Option<Header<'_>>, FrameError> {
    let Some((&marker, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    match memchr::memchr(b'\n', rest) {
        Some(at) if at > 0 => {
            let (line, behind) = rest.split_at(at + 1);
            let text = line.get(..at - 1).unwrap_or_default();
            Ok(Some((marker, text, behind)))
        }
        Some(_) => Err(FrameError::Number),
        None if rest.len() > MAX_LINE => Err(FrameError::Line),
        None => Ok(None),
    }
}

fn skip(mut bytes: &[u8], count: usize) -> Result<&[u8], FrameError> {
    let mut open = count;
    while open > 0 {
        let (marker, text, rest) = header(bytes)?.ok_or(FrameError::Truncated)?;
        bytes = rest;
        match marker {
            b'$' => {
                if let Some(len) = length(text)? {
                    bytes = bytes.get(len + 2..).ok_or(FrameError::Truncated)?;
                }
            }
            b'*' => open = open.saturating_add(length(text)?.unwrap_or(0)),
            _ => {}
        }
        open -= 1;
    }
    Ok(bytes)
}

/// `None` for -1, the null length.
fn length(text: &[u8]) -> Result<Option<usize>, FrameError> {
    match number(text)? {
        -1 => Ok(None),
        // Room is left so that adding headers cannot overflow.
        len if (0..=i64::MAX / 4).contains(&len) => Ok(Some(len as usize)),
        len => Err(FrameError::Length(len as u64)),
    }
}

fn number(text: &[u8]) -> Result<i64, FrameError> {
    let (negative, digits) = match text.split_first() {
        Some((b'-', rest)) => (true, rest),
        _ => (false, text),
    };
    if digits.is_empty() {
        return Err(FrameError::Number);
    }
    let mut value: i64 = 0;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return Err(FrameError::Number);
        }
        // Accumulated negatively, as the smallest number has no positive counterpart.
        value = value
            .checked_mul(10)
            .and_then(|value| value.checked_sub(i64::from(digit - b'0')))
            .ok_or(FrameError::Number)?;
    }
    if negative { Ok(value) } else { value.checked_neg().ok_or(FrameError::Number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        b"+OK\r\n-ERR no\r\n:-12\r\n$5\r\nhe\r\no\r\n$-1\r\n*-1\r\n*2\r\n$1\r\n0\r\n*2\r\n$1\r\na\r\n$0\r\n\r\n";

    fn extents(step: usize) -> Vec<usize> {
        let mut ends = Vec::new();
        let mut start = 0;
        let mut extent = Extent::default();
        let mut seen = 0;
        while start < STREAM.len() {
            let bytes = &STREAM[start..seen.max(start)];
            match extent.advance(bytes, 1 << 20).unwrap() {
                Progress::Complete(len) => {
                    start += len;
                    ends.push(start);
                    extent = Extent::default();
                }
                Progress::NeedMore(total) => {
                    assert!(total > bytes.len());
                    seen = (seen.max(start) + step).min(STREAM.len());
                }
                Progress::TooLong(..) => unreachable!(),
            }
        }
        ends
    }

    #[test]
    fn extents_do_not_depend_on_how_reads_split() {
        let whole = extents(STREAM.len());
        assert_eq!(whole.len(), 7);
        for step in 1..STREAM.len() {
            assert_eq!(extents(step), whole);
        }
    }

    #[test]
    fn parses_each_kind() {
        let mut rest = STREAM;
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let (frame, behind) = Frame::parse(rest).unwrap();
            frames.push(frame);
            rest = behind;
        }
        assert_eq!(frames[0], Frame::Simple(b"OK"));
        assert_eq!(frames[1], Frame::Error(b"ERR no"));
        assert_eq!(frames[2], Frame::Integer(-12));
        assert_eq!(frames[3], Frame::Bulk(Some(b"he\r\no")));
        assert_eq!(frames[4], Frame::Bulk(None));
        assert_eq!(frames[5], Frame::Array(None));
        let Frame::Array(Some(mut scan)) = frames[6] else { panic!("array expected") };
        assert_eq!(scan.next_bulk().unwrap(), Some(&b"0"[..]));
        let Some(Frame::Array(Some(mut keys))) = scan.next_frame().unwrap() else {
            panic!("nested array expected")
        };
        assert_eq!(keys.next_bulk().unwrap(), Some(&b"a"[..]));
        assert_eq!(keys.next_bulk().unwrap(), Some(&b""[..]));
        assert_eq!(keys.next_bulk().unwrap(), None);
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for bytes in [&b"$-7\r\n"[..], b"*99999999999\r\n", b"$99999999999999999999\r\n", b"$x\r\n", b"?\r\n"]
        {
            assert!(Extent::default().advance(bytes, 1 << 20).is_err());
        }
        assert_eq!(
            Extent::default().advance(b"$2000000\r\nab", 1 << 20),
            Ok(Progress::TooLong(10, 2_000_000))
        );
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::sample::select(&b"*$:+-0123\r\nab"[..]), 0..64)) {
            let mut extent = Extent::default();
            if let Ok(Progress::Complete(len)) = extent.advance(&bytes, 1 << 20) {
                let _ = Frame::parse(&bytes[..len]);
            }
        }
    }
}
