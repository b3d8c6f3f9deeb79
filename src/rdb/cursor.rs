//! Lengths and strings out of bytes that may not all be there yet.
//! Format source: Redis rdb.c, `rdbLoadLenByRef` and `rdbGenericLoadStringObject`.

use super::error::Fault;
use super::lzf;

/// Strings longer than this once expanded are refused: no server stores them by default
/// (`proto-max-bulk-len` is 512 MiB), and expanding takes memory.
const MAX_EXPANDED: u64 = 512 << 20;
/// Why reading stopped. `NeedMore` holds the least length the input must have to get on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    NeedMore(usize),
    Fault { fault: Fault, at: usize },
}

/// An RDB string as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Text<'a> {
    Raw(&'a [u8]),
    Int(i64),
    Lzf { compressed: &'a [u8], length: u64 },
}

/// How a string is stored, and how many bytes follow its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextHead {
    Raw { length: u64 },
    Int { width: u8 },
    Lzf { compressed: u64, length: u64 },
}

impl TextHead {
    #[inline]
    pub fn payload(self) -> u64 {
        match self {
            TextHead::Raw { length } => length,
            TextHead::Int { width } => u64::from(width),
            TextHead::Lzf { compressed, .. } => compressed,
        }
    }

    /// Bytes of the string itself; of a number, those stored.
    #[inline]
    pub fn expanded(self) -> u64 {
        match self {
            TextHead::Lzf { length, .. } => length,
            _ => self.payload(),
        }
    }
}

/// Reads forward; after an error its place is undefined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    #[cold]
    pub fn fault(&self, fault: Fault) -> Stop {
        Stop::Fault { fault, at: self.at }
    }

    #[inline]
    pub fn byte(&mut self) -> Result<u8, Stop> {
        let byte = *self.bytes.get(self.at).ok_or(Stop::NeedMore(self.at + 1))?;
        self.at += 1;
        Ok(byte)
    }

    #[inline]
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.checked_add(count).ok_or(Stop::NeedMore(usize::MAX))?;
        let taken = self.bytes.get(self.at..end).ok_or(Stop::NeedMore(end))?;
        self.at = end;
        Ok(taken)
    }

    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let taken = self.take(N)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    /// A plain length; the string encodings (0xC0…) are a fault here.
    #[inline]
    pub fn length(&mut self) -> Result<u64, Stop> {
        let start = self.at;
        let first = self.byte()?;
        match first >> 6 {
            0 => Ok(u64::from(first)),
            1 => Ok(u64::from(first & 0x3f) << 8 | u64::from(self.byte()?)),
            _ => self.long_length(first, start),
        }
    }

    fn long_length(&mut self, first: u8, start: usize) -> Result<u64, Stop> {
        match first {
            0x80 => Ok(u64::from(u32::from_be_bytes(self.array()?))),
            0x81 => Ok(u64::from_be_bytes(self.array()?)),
            _ => Err(Stop::Fault { fault: Fault::LengthEncoding(first), at: start }),
        }
    }

    /// What stands before a string's bytes.
    #[inline]
    pub fn text_head(&mut self) -> Result<TextHead, Stop> {
        match self.bytes.get(self.at) {
            Some(&first @ 0xc0..=0xff) => {
                self.at += 1;
                match first {
                    0xc0 => Ok(TextHead::Int { width: 1 }),
                    0xc1 => Ok(TextHead::Int { width: 2 }),
                    0xc2 => Ok(TextHead::Int { width: 4 }),
                    0xc3 => Ok(TextHead::Lzf { compressed: self.length()?, length: self.length()? }),
                    _ => Err(Stop::Fault { fault: Fault::LengthEncoding(first), at: self.at - 1 }),
                }
            }
            _ => Ok(TextHead::Raw { length: self.length()? }),
        }
    }

    /// A string of at most `limit` stored bytes.
    #[inline]
    pub fn text(&mut self, limit: u64) -> Result<Text<'a>, Stop> {
        let start = self.at;
        let head = self.text_head()?;
        let payload = bounded("string", head.payload(), limit, start)?;
        let bytes = self.take(payload)?;
        Ok(match head {
            TextHead::Raw { .. } => Text::Raw(bytes),
            TextHead::Int { .. } => Text::Int(little_endian(bytes)),
            TextHead::Lzf { length, .. } => Text::Lzf { compressed: bytes, length },
        })
    }

    /// A string's bytes: borrowed when stored raw, else written to `scratch`.
    pub fn bytes_in<'s>(&mut self, limit: u64, scratch: &'s mut Vec<u8>) -> Result<&'s [u8], Stop>
    where
        'a: 's,
    {
        let start = self.at;
        match self.text(limit)? {
            Text::Raw(bytes) => Ok(bytes),
            other => {
                scratch.clear();
                other.append_to(scratch, limit, start)?;
                Ok(scratch)
            }
        }
    }
}

impl Text<'_> {
    /// Appends the string itself, expanding to at most `limit` bytes. `at` is its place, for errors.
    pub fn append_to(self, out: &mut Vec<u8>, limit: u64, at: usize) -> Result<(), Stop> {
        match self {
            Text::Raw(bytes) => out.extend_from_slice(bytes),
            Text::Int(number) => out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes()),
            Text::Lzf { compressed, length } => {
                let length = bounded("expanded string", length, limit.min(MAX_EXPANDED), at)?;
                lzf::expand(compressed, length, out).map_err(|fault| Stop::Fault { fault, at })?;
            }
        }
        Ok(())
    }
}

/// `length` as a size, when it is within `limit`.
#[inline]
pub(super) fn bounded(what: &'static str, length: u64, limit: u64, at: usize) -> Result<usize, Stop> {
    match usize::try_from(length) {
        Ok(size) if length <= limit => Ok(size),
        _ => Err(Stop::Fault { fault: Fault::TooLong { what, length, limit }, at }),
    }
}

/// A signed little-endian number of at most 8 bytes.
#[inline]
pub(super) fn little_endian(bytes: &[u8]) -> i64 {
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let start = if negative { -1 } else { 0 };
    bytes.iter().rev().fold(start, |number, &byte| number << 8 | i64::from(byte))
}
