//! Collections packed into one string: listpack, ziplist, zipmap, intset.
//! Format sources: Redis `listpack.c`, `ziplist.c`, `zipmap.c`, `intset.c`.

use super::cursor::{Cursor, Stop, little_endian};
use super::error::Fault;

/// One element: numbers are stored as such and stand for their decimal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry<'a> {
    Bytes(&'a [u8]),
    Int(i64),
}

impl Entry<'_> {
    pub fn text<'b>(&'b self, digits: &'b mut itoa::Buffer) -> &'b [u8] {
        match self {
            Entry::Bytes(bytes) => bytes,
            Entry::Int(number) => digits.format(*number).as_bytes(),
        }
    }
}

/// The elements of a packed collection, in order.
#[derive(Clone, Debug)]
pub(super) struct Packed<'a> {
    cursor: Cursor<'a>,
    form: Form,
    /// Elements that the header announces; `None` when it does not say.
    announced: Option<u64>,
    seen: u64,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Listpack,
    Ziplist,
    /// Next comes a value, not a field.
    Zipmap {
        value: bool,
    },
    Intset {
        width: usize,
    },
}

const LISTPACK: Fault = Fault::Malformed("listpack");
const ZIPLIST: Fault = Fault::Malformed("ziplist");
const ZIPMAP: Fault = Fault::Malformed("zipmap");
const INTSET: Fault = Fault::Malformed("intset");
/// The count of a listpack or ziplist with more elements than fit.
const UNCOUNTED: u16 = u16::MAX;
const END: u8 = 0xff;

impl<'a> Packed<'a> {
    pub fn listpack(blob: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(blob);
        let total = u32::from_le_bytes(within(cursor.array(), LISTPACK)?);
        let count = u16::from_le_bytes(within(cursor.array(), LISTPACK)?);
        Self::counted(cursor, Form::Listpack, total, count)
    }

    pub fn ziplist(blob: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(blob);
        let total = u32::from_le_bytes(within(cursor.array(), ZIPLIST)?);
        within(cursor.take(4), ZIPLIST)?;
        let count = u16::from_le_bytes(within(cursor.array(), ZIPLIST)?);
        Self::counted(cursor, Form::Ziplist, total, count)
    }

    /// Fields and values in turn.
    pub fn zipmap(blob: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(blob);
        let count = within(cursor.byte(), ZIPMAP)?;
        let announced = (count < 254).then_some(u64::from(count) * 2);
        Ok(Packed { cursor, form: Form::Zipmap { value: false }, announced, seen: 0 })
    }

    pub fn intset(blob: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(blob);
        let width = u32::from_le_bytes(within(cursor.array(), INTSET)?) as usize;
        let count = u64::from(u32::from_le_bytes(within(cursor.array(), INTSET)?));
        let rest = (blob.len() - cursor.at) as u64;
        if !matches!(width, 2 | 4 | 8) || count.checked_mul(width as u64) != Some(rest) {
            return Err(INTSET);
        }
        Ok(Packed { cursor, form: Form::Intset { width }, announced: Some(count), seen: 0 })
    }

    fn counted(cursor: Cursor<'a>, form: Form, total: u32, count: u16) -> Result<Self, Fault> {
        if total as usize != cursor.bytes.len() {
            return Err(form.fault());
        }
        let announced = (count != UNCOUNTED).then_some(u64::from(count));
        Ok(Packed { cursor, form, announced, seen: 0 })
    }

    #[inline]
    pub fn next(&mut self) -> Result<Option<Entry<'a>>, Fault> {
        let entry = match &mut self.form {
            Form::Listpack => within(listpack_entry(&mut self.cursor), LISTPACK)?,
            Form::Ziplist => within(ziplist_entry(&mut self.cursor), ZIPLIST)?,
            Form::Zipmap { value } => {
                let entry = within(zipmap_entry(&mut self.cursor, *value), ZIPMAP)?;
                *value = !*value;
                entry
            }
            Form::Intset { .. } if self.cursor.is_at_end() => None,
            Form::Intset { width } => {
                Some(Entry::Int(little_endian(within(self.cursor.take(*width), INTSET)?)))
            }
        };
        match entry {
            Some(_) => self.seen += 1,
            None if !self.cursor.is_at_end() => return Err(self.form.fault()),
            None if self.announced.is_some_and(|announced| announced != self.seen) => {
                return Err(self.form.fault());
            }
            None => {}
        }
        Ok(entry)
    }

    /// Where the next element begins.
    pub fn at(&self) -> usize {
        self.cursor.at
    }

    /// The next element, which must be there.
    #[inline]
    pub fn expect(&mut self, what: &'static str) -> Result<Entry<'a>, Fault> {
        self.next()?.ok_or(Fault::Missing(what))
    }

    pub fn expect_int(&mut self, what: &'static str) -> Result<i64, Fault> {
        match self.expect(what)? {
            Entry::Int(number) => Ok(number),
            Entry::Bytes(_) => Err(Fault::Unexpected(what)),
        }
    }
}

impl Form {
    fn fault(self) -> Fault {
        match self {
            Form::Listpack => LISTPACK,
            Form::Ziplist => ZIPLIST,
            Form::Zipmap { .. } => ZIPMAP,
            Form::Intset { .. } => INTSET,
        }
    }
}

/// What does not fit into the blob is a fault of the blob.
#[inline]
fn within<T>(read: Result<T, Stop>, fault: Fault) -> Result<T, Fault> {
    read.map_err(|_| fault)
}

#[inline]
fn listpack_entry<'a>(cursor: &mut Cursor<'a>) -> Result<Option<Entry<'a>>, Stop> {
    let start = cursor.at;
    let first = cursor.byte()?;
    let entry = match first {
        0..=0x7f => Entry::Int(i64::from(first)),
        0x80..=0xbf => Entry::Bytes(cursor.take(usize::from(first & 0x3f))?),
        0xc0..=0xdf => {
            let raw = i64::from(first & 0x1f) << 8 | i64::from(cursor.byte()?);
            Entry::Int(if raw >= 1 << 12 { raw - (1 << 13) } else { raw })
        }
        0xe0..=0xef => {
            let length = usize::from(first & 0x0f) << 8 | usize::from(cursor.byte()?);
            Entry::Bytes(cursor.take(length)?)
        }
        0xf0 => {
            let length = u32::from_le_bytes(cursor.array()?);
            Entry::Bytes(cursor.take(length as usize)?)
        }
        0xf1 => Entry::Int(little_endian(cursor.take(2)?)),
        0xf2 => Entry::Int(little_endian(cursor.take(3)?)),
        0xf3 => Entry::Int(little_endian(cursor.take(4)?)),
        0xf4 => Entry::Int(little_endian(cursor.take(8)?)),
        END => return Ok(None),
        _ => return Err(cursor.fault(LISTPACK)),
    };
    cursor.take(back_length(cursor.at - start))?;
    Ok(Some(entry))
}

/// Bytes of the length that follows an entry. The limits are one less than seven bits a byte could
/// hold, as `lpEncodeBacklen` has them.
#[inline]
fn back_length(entry: usize) -> usize {
    match entry {
        ..=127 => 1,
        128..16_383 => 2,
        16_383..2_097_151 => 3,
        2_097_151..268_435_455 => 4,
        _ => 5,
    }
}

#[inline]
fn ziplist_entry<'a>(cursor: &mut Cursor<'a>) -> Result<Option<Entry<'a>>, Stop> {
    match cursor.byte()? {
        END => return Ok(None),
        // The length of the entry before, in five bytes.
        254 => cursor.take(4).map(drop)?,
        _ => {}
    }
    let first = cursor.byte()?;
    let entry = match first {
        0..=0x3f => Entry::Bytes(cursor.take(usize::from(first))?),
        0x40..=0x7f => {
            let length = usize::from(first & 0x3f) << 8 | usize::from(cursor.byte()?);
            Entry::Bytes(cursor.take(length)?)
        }
        0x80 => {
            let length = u32::from_be_bytes(cursor.array()?);
            Entry::Bytes(cursor.take(length as usize)?)
        }
        0xc0 => Entry::Int(little_endian(cursor.take(2)?)),
        0xd0 => Entry::Int(little_endian(cursor.take(4)?)),
        0xe0 => Entry::Int(little_endian(cursor.take(8)?)),
        0xf0 => Entry::Int(little_endian(cursor.take(3)?)),
        0xfe => Entry::Int(little_endian(cursor.take(1)?)),
        0xf1..=0xfd => Entry::Int(i64::from(first - 0xf1)),
        _ => return Err(cursor.fault(ZIPLIST)),
    };
    Ok(Some(entry))
}

/// Behind a value's length stands the number of unused bytes behind the value.
fn zipmap_entry<'a>(cursor: &mut Cursor<'a>, value: bool) -> Result<Option<Entry<'a>>, Stop> {
    let length = match cursor.byte()? {
        END if value => return Err(cursor.fault(ZIPMAP)),
        END => return Ok(None),
        254 => u32::from_le_bytes(cursor.array()?) as usize,
        length => usize::from(length),
    };
    let unused = if value { usize::from(cursor.byte()?) } else { 0 };
    let bytes = cursor.take(length)?;
    cursor.take(unused)?;
    Ok(Some(Entry::Bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut packed: Packed<'_>) -> Result<Vec<String>, Fault> {
        let mut texts = Vec::new();
        while let Some(entry) = packed.next()? {
            let mut digits = itoa::Buffer::new();
            texts.push(String::from_utf8_lossy(entry.text(&mut digits)).into_owned());
        }
        Ok(texts)
    }

    fn listpack(count: u16, entries: &[u8]) -> Vec<u8> {
        let total = entries.len() as u32 + 7;
        [&total.to_le_bytes()[..], &count.to_le_bytes(), entries, &[END]].concat()
    }

    #[test]
    fn listpack_entries() {
        let entries =
            b"\x05\x01\x82ab\x03\xdf\xff\x02\xcf\xff\x02\xe0\x01x\x03\xf1\x00\x80\x03\xf2\x00\x00\x80\x04\
                        \xf3\x00\x00\x00\x80\x05\xf4\xff\xff\xff\xff\xff\xff\xff\x7f\x09";
        let blob = listpack(9, entries);
        let texts = all(Packed::listpack(&blob).unwrap()).unwrap();
        let expected =
            ["5", "ab", "-1", "4095", "x", "-32768", "-8388608", "-2147483648", "9223372036854775807"];
        assert_eq!(texts, expected);
        assert_eq!(all(Packed::listpack(&listpack(8, entries)).unwrap()), Err(LISTPACK));
        assert!(all(Packed::listpack(&listpack(UNCOUNTED, entries)).unwrap()).is_ok());
        assert_eq!(Packed::listpack(&blob[..blob.len() - 1]).err(), Some(LISTPACK));
    }

    #[test]
    fn listpack_back_lengths_at_their_limits() {
        for (length, back) in [(122, 1), (123, 2), (16_377, 2), (16_378, 3), (2_097_145, 3), (2_097_146, 4)] {
            let entry =
                [&[0xf0][..], &(length as u32).to_le_bytes(), &vec![b'x'; length], &vec![1; back]].concat();
            let blob = listpack(2, &[&entry[..], b"\x07\x01"].concat());
            let texts = all(Packed::listpack(&blob).unwrap()).unwrap();
            assert_eq!((texts[0].len(), &texts[1][..]), (length, "7"));
        }
    }

    #[test]
    fn ziplist_entries() {
        let entries = b"\x00\x02ab\x04\x40\x01c\x04\x80\x00\x00\x00\x01d\x07\xc0\xff\xff\x04\xd0\x00\x00\x01\x00\x06\
                        \xe0\x00\x00\x00\x00\x01\x00\x00\x00\xfe\x0a\x00\x00\x00\xf0\x00\x00\x80\x05\xfe\x80\x03\xf1\x02\xfd";
        let total = entries.len() as u32 + 11;
        let blob = [&total.to_le_bytes()[..], &[0; 4], &[10, 0], entries, &[END]].concat();
        let texts = all(Packed::ziplist(&blob).unwrap()).unwrap();
        assert_eq!(texts, ["ab", "c", "d", "-1", "65536", "4294967296", "-8388608", "-128", "0", "12"]);
    }

    #[test]
    fn zipmap_entries() {
        let blob = b"\x02\x01a\x02\x01xy.\xfe\x01\x00\x00\x00b\x00\x00\xff";
        assert_eq!(all(Packed::zipmap(blob).unwrap()).unwrap(), ["a", "xy", "b", ""]);
        assert_eq!(all(Packed::zipmap(b"\x01\x01a\xff").unwrap()), Err(ZIPMAP));
    }

    #[test]
    fn intset_entries() {
        let blob = b"\x02\x00\x00\x00\x02\x00\x00\x00\xff\xff\x07\x00";
        assert_eq!(all(Packed::intset(blob).unwrap()).unwrap(), ["-1", "7"]);
        assert_eq!(Packed::intset(&blob[..11]).err(), Some(INTSET));
        assert_eq!(Packed::intset(b"\x03\x00\x00\x00\x00\x00\x00\x00").err(), Some(INTSET));
    }
}
