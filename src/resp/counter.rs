//! Replies counted, not built: a pipeline of writes only needs to know how many were answered and
//! which answers were errors.

use memchr::memchr;

/// An error's text is kept up to this many bytes.
const ERROR_TEXT: usize = 512;
/// Deepest nesting of arrays that is followed; EXEC gives 2, scripts may give more.
const MAX_DEPTH: usize = 32;

/// A fault in the reply stream itself; the connection is of no more use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CounterError {
    #[error("byte {byte:#04x} where a reply must start")]
    UnknownMarker { byte: u8 },
    #[error("length of a reply is not a number")]
    Length,
    #[error("replies nested deeper than {MAX_DEPTH}")]
    TooDeep,
}

/// What the counter tells its caller.
pub trait Replies {
    /// The reply that is being counted is this error, or holds it as (or in) this element (EXEC).
    fn error(&mut self, text: &[u8], element: Option<u32>);
    /// The reply is nil (`SET … NX` that met a key, an aborted EXEC).
    fn nil(&mut self);
    /// One whole top-level reply has gone by.
    fn answered(&mut self);
}

/// Follows a RESP2 reply stream across reads of any size.
#[derive(Debug, Default)]
pub struct ReplyCounter {
    state: State,
    /// Elements still to come, per open array, outermost first.
    open: Vec<u64>,
    /// Elements of the outermost open array.
    outermost: u64,
    line: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The next byte is a marker.
    #[default]
    Marker,
    /// Inside a line that started with this marker; its text gathers in `line`.
    Line(u8),
    /// This many bytes of a bulk string and its CRLF are still to pass.
    Bulk(u64),
}

impl ReplyCounter {
    /// Counts all of `input`.
    pub fn feed(&mut self, mut input: &[u8], replies: &mut impl Replies) -> Result<(), CounterError> {
        while !input.is_empty() {
            match self.state {
                State::Marker => {
                    // Most replies of a migration are +OK, and they come in runs.
                    if self.open.is_empty() {
                        while let Some(rest) = input
                            .strip_prefix(b"+QUEUED\r\n".as_slice())
                            .or_else(|| input.strip_prefix(b"+OK\r\n".as_slice()))
                        {
                            replies.answered();
                            input = rest;
                        }
                    }
                    let Some((&marker, rest)) = input.split_first() else { break };
                    match marker {
                        b'+' | b'-' | b':' | b'$' | b'*' => self.state = State::Line(marker),
                        byte => return Err(CounterError::UnknownMarker { byte }),
                    }
                    self.line.clear();
                    input = rest;
                }
                State::Line(marker) => {
                    let end = memchr(b'\n', input);
                    let part = end.and_then(|end| input.get(..end)).unwrap_or(input);
                    let room = ERROR_TEXT.saturating_sub(self.line.len());
                    self.line.extend_from_slice(&part[..part.len().min(room)]);
                    let Some(end) = end else { return Ok(()) };
                    input = input.get(end + 1..).unwrap_or_default();
                    self.line_done(marker, replies)?;
                }
                State::Bulk(left) => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    input = input.get(take..).unwrap_or_default();
                    let left = left - take as u64;
                    self.state = State::Bulk(left);
                    if left == 0 {
                        self.element_done(replies);
                    }
                }
            }
        }
        Ok(())
    }

    fn line_done(&mut self, marker: u8, replies: &mut impl Replies) -> Result<(), CounterError> {
        let text = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        match marker {
            b'-' => {
                let element = self.open.first().map(|left| self.outermost.saturating_sub(*left));
                replies.error(text, element.map(|element| u32::try_from(element).unwrap_or(u32::MAX)));
                self.element_done(replies);
            }
            b'$' => match length(text)? {
                None => {
                    if self.open.is_empty() {
                        replies.nil();
                    }
                    self.element_done(replies);
                }
                Some(length) => self.state = State::Bulk(length + 2),
            },
            b'*' => match length(text)? {
                Some(0) => self.element_done(replies),
                None => {
                    if self.open.is_empty() {
                        replies.nil();
                    }
                    self.element_done(replies);
                }
                Some(count) if self.open.len() < MAX_DEPTH => {
                    if self.open.is_empty() {
                        self.outermost = count;
                    }
                    self.open.push(count);
                    self.state = State::Marker;
                }
                Some(_) => return Err(CounterError::TooDeep),
            },
            _ => self.element_done(replies),
        }
        Ok(())
    }

    fn element_done(&mut self, replies: &mut impl Replies) {
        self.state = State::Marker;
        while let Some(left) = self.open.last_mut() {
            *left -= 1;
            if *left > 0 {
                return;
            }
            self.open.pop();
        }
        replies.answered();
    }
}

/// `None` for -1.
fn length(text: &[u8]) -> Result<Option<u64>, CounterError> {
    if text == b"-1" {
        return Ok(None);
    }
    let text = std::str::from_utf8(text).map_err(|_| CounterError::Length)?;
    text.parse::<u64>().ok().filter(|&length| length < 1 << 40).map(Some).ok_or(CounterError::Length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, Debug, PartialEq)]
    struct Seen {
        answered: usize,
        errors: Vec<(usize, String)>,
        nils: Vec<usize>,
    }

    impl Replies for Seen {
        fn error(&mut self, text: &[u8], _: Option<u32>) {
            self.errors.push((self.answered, String::from_utf8_lossy(text).into_owned()));
        }
        fn nil(&mut self) {
            self.nils.push(self.answered);
        }
        fn answered(&mut self) {
            self.answered += 1;
        }
    }

    const STREAM: &[u8] = b"+OK\r\n+OK\r\n:12\r\n$3\r\na\r\n\r\n$-1\r\n$0\r\n\r\n-ERR no\r\n*3\r\n+QUEUED\r\n*2\r\n:1\r\n-WRONGTYPE x\r\n$2\r\nhi\r\n*0\r\n*-1\r\n+OK\r\n";

    #[test]
    fn counts_every_kind_of_reply() {
        let mut seen = Seen::default();
        ReplyCounter::default().feed(STREAM, &mut seen).unwrap();
        assert_eq!(seen.answered, 11);
        assert_eq!(seen.nils, [4, 9]);
        assert_eq!(seen.errors, [(6, "ERR no".to_string()), (7, "WRONGTYPE x".to_string())]);
    }

    #[test]
    fn every_split_counts_the_same() {
        let mut whole = Seen::default();
        ReplyCounter::default().feed(STREAM, &mut whole).unwrap();
        for first in 0..STREAM.len() {
            for second in first..STREAM.len() {
                let mut seen = Seen::default();
                let mut counter = ReplyCounter::default();
                for part in [&STREAM[..first], &STREAM[first..second], &STREAM[second..]] {
                    counter.feed(part, &mut seen).unwrap();
                }
                assert_eq!(seen, whole);
            }
        }
    }

    #[test]
    fn faults_are_named() {
        let fault = |input: &[u8]| ReplyCounter::default().feed(input, &mut Seen::default()).unwrap_err();
        assert_eq!(fault(b"HTTP/1.1"), CounterError::UnknownMarker { byte: b'H' });
        assert_eq!(fault(b"$x\r\n"), CounterError::Length);
        assert_eq!(fault(&b"*1\r\n".repeat(40)), CounterError::TooDeep);
    }
}
