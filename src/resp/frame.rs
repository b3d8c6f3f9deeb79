//! Command frames out of a replication stream.
//!
//! A master sends RESP arrays of bulk strings; bare newlines may stand between them (keep-alives).
//! Protocol source: Redis `networking.c` (processMultibulkBuffer), `replication.c`.

use thiserror::Error;

use super::{Args, Span};

/// Bulk strings past the largest that any server accepts (`proto-max-bulk-len`, 512 MB by default,
/// raised by some) are refused before memory is taken.
pub const MAX_BULK: usize = 1 << 30;
/// Servers from 7.0 accept up to 2^31 - 1 arguments; a span costs 8 bytes, so this bounds memory at 64 MiB.
pub const MAX_ARGUMENTS: usize = 8 << 20;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("byte {byte:#04x} where a command must start with '*'")]
    NotAnArray { byte: u8 },
    #[error("argument {index} starts with byte {byte:#04x} instead of '$'")]
    NotABulk { index: usize, byte: u8 },
    #[error("length of {what} is not a number between 0 and {most}")]
    Length { what: &'static str, most: usize },
    #[error("argument {index} is not followed by CRLF")]
    MissingCrlf { index: usize },
    #[error("command of more than {most} bytes")]
    TooLong { most: usize },
}

/// What stands at the front of the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// At least this many more bytes are needed.
    NeedMore(usize),
    /// A keep-alive newline or an empty array, of this many bytes: counted in the offset, nothing to apply.
    Blank(usize),
    /// A command of this many bytes; the spans point into them.
    Command(usize),
}

/// Visits every command of `frames` that is whole, up to the first that is none.
pub fn each_frame(frames: &[u8], mut visit: impl FnMut(&Args<'_>)) {
    let (mut spans, mut at) = (Vec::new(), 0);
    while let Some(rest) = frames.get(at..).filter(|rest| !rest.is_empty()) {
        let Ok(Parsed::Command(length)) = parse_frame(rest, &mut spans) else { return };
        visit(&Args { frame: rest.get(..length).unwrap_or_default(), spans: &spans });
        at += length;
    }
}

/// Parses one frame at the front of `input`; `spans` is cleared and filled. Pure: the same bytes give
/// the same result however they were split before.
pub fn parse_frame(input: &[u8], spans: &mut Vec<Span>) -> Result<Parsed, FrameError> {
    spans.clear();
    let Some(&first) = input.first() else { return Ok(Parsed::NeedMore(1)) };
    match first {
        b'*' => {}
        b'\n' => return Ok(Parsed::Blank(1)),
        b'\r' => {
            return Ok(match input.get(1) {
                Some(_) => Parsed::Blank(1),
                None => Parsed::NeedMore(1),
            });
        }
        byte => return Err(FrameError::NotAnArray { byte }),
    }
    let Some((count, mut at)) = number(input, 1, "the command", MAX_ARGUMENTS)? else {
        return Ok(Parsed::NeedMore(1));
    };
    if count == 0 {
        return Ok(Parsed::Blank(at));
    }
    for index in 0..count {
        match input.get(at) {
            None => return Ok(Parsed::NeedMore(1 + 5 * (count - index - 1))),
            Some(b'$') => {}
            Some(&byte) => return Err(FrameError::NotABulk { index, byte }),
        }
        let Some((length, start)) = number(input, at + 1, "an argument", MAX_BULK)? else {
            return Ok(Parsed::NeedMore(1));
        };
        let end = start + length;
        if end + 2 > u32::MAX as usize {
            return Err(FrameError::TooLong { most: u32::MAX as usize });
        }
        match input.get(end..end + 2) {
            None => return Ok(Parsed::NeedMore(end + 2 - input.len())),
            Some(b"\r\n") => {}
            Some(_) => return Err(FrameError::MissingCrlf { index }),
        }
        spans.push(Span { start: start as u32, end: end as u32 });
        at = end + 2;
    }
    Ok(Parsed::Command(at))
}

/// Reads `digits CRLF` at `at`; gives the number and the place behind it, `None` when bytes are missing.
fn number(
    input: &[u8],
    at: usize,
    what: &'static str,
    most: usize,
) -> Result<Option<(usize, usize)>, FrameError> {
    let bad = FrameError::Length { what, most };
    let mut value = 0usize;
    let mut place = at;
    loop {
        match input.get(place) {
            None => return Ok(None),
            Some(digit @ b'0'..=b'9') => {
                value = value * 10 + usize::from(digit - b'0');
                if value > most {
                    return Err(bad);
                }
                place += 1;
            }
            Some(b'\r') if place > at => break,
            Some(_) => return Err(bad),
        }
    }
    match input.get(place + 1) {
        None => Ok(None),
        Some(b'\n') => Ok(Some((value, place + 2))),
        Some(_) => Err(bad),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::resp::{Args, encode_command};

    fn parse(input: &[u8]) -> (Parsed, Vec<Vec<u8>>) {
        let mut spans = Vec::new();
        let parsed = parse_frame(input, &mut spans).unwrap();
        let args = Args { frame: input, spans: &spans };
        (parsed, args.iter().map(<[u8]>::to_vec).collect())
    }

    #[test]
    fn finds_a_command_and_what_follows_stays() {
        let (parsed, args) = parse(b"*2\r\n$3\r\nDEL\r\n$1\r\nk\r\n*1\r\n");
        assert_eq!(parsed, Parsed::Command(20));
        assert_eq!(args, [b"DEL".to_vec(), b"k".to_vec()]);
    }

    #[test]
    fn keep_alives_are_blank() {
        assert_eq!(parse(b"\n*1").0, Parsed::Blank(1));
        assert_eq!(parse(b"*0\r\n").0, Parsed::Blank(4));
    }

    #[test]
    fn faults_are_named() {
        let fault = |input: &[u8]| parse_frame(input, &mut Vec::new()).unwrap_err();
        assert_eq!(fault(b"PING\r\n"), FrameError::NotAnArray { byte: b'P' });
        assert_eq!(fault(b"*1\r\n:1\r\n"), FrameError::NotABulk { index: 0, byte: b':' });
        assert_eq!(fault(b"*1\r\n$1\r\nxyz"), FrameError::MissingCrlf { index: 0 });
        assert!(matches!(fault(b"*1\r\n$99999999999\r\n"), FrameError::Length { .. }));
        assert!(matches!(fault(b"*-1\r\n"), FrameError::Length { .. }));
        assert!(matches!(fault(b"*\r\n"), FrameError::Length { .. }));
    }

    proptest! {
        #[test]
        fn every_prefix_needs_more_and_the_hint_is_never_too_long(
            args in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
        ) {
            let mut frame = Vec::new();
            encode_command(&args, &mut frame);
            let mut spans = Vec::new();
            for cut in 0..frame.len() {
                match parse_frame(&frame[..cut], &mut spans).unwrap() {
                    Parsed::NeedMore(more) => prop_assert!(more >= 1 && cut + more <= frame.len()),
                    other => prop_assert!(false, "{other:?} from a prefix"),
                }
            }
            let (parsed, found) = parse(&frame);
            prop_assert_eq!(parsed, Parsed::Command(frame.len()));
            prop_assert_eq!(found, args);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_frame(&bytes, &mut Vec::new());
        }
    }
}
