//! A key of an RDB up to its value. Source: Redis `rdb.c`, `rdbSaveKeyValuePair`.

use super::cursor::{Cursor, Stop};
use super::event::{KeyRecord, LargeHead};
use super::recode::{append_length, append_string};

const OPCODE_IDLE: u8 = 248;
const OPCODE_FREQUENCY: u8 = 249;
const OPCODE_EXPIRE_MS: u8 = 252;
const OPCODE_EXPIRE_SECONDS: u8 = 253;

/// What stands before a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead<'a> {
    pub key: &'a [u8],
    /// Unix time in milliseconds.
    pub expire_at_ms: Option<i64>,
    /// From RDB version 9 on, as is the next.
    pub idle_seconds: Option<u64>,
    pub lfu: Option<u8>,
    pub type_byte: u8,
}

impl RecordHead<'_> {
    pub fn append_to(&self, out: &mut Vec<u8>) {
        if let Some(at) = self.expire_at_ms {
            out.push(OPCODE_EXPIRE_MS);
            out.extend_from_slice(&at.to_le_bytes());
        }
        if let Some(seconds) = self.idle_seconds {
            out.push(OPCODE_IDLE);
            append_length(seconds, out);
        }
        if let Some(frequency) = self.lfu {
            out.extend_from_slice(&[OPCODE_FREQUENCY, frequency]);
        }
        out.push(self.type_byte);
        append_string(self.key, out);
    }
}

impl<'a> From<&KeyRecord<'a>> for RecordHead<'a> {
    fn from(record: &KeyRecord<'a>) -> Self {
        let KeyRecord { key, expire_at_ms, idle_seconds, lfu, type_byte, value: _ } = *record;
        Self { key, expire_at_ms, idle_seconds, lfu, type_byte }
    }
}

impl<'a> From<&LargeHead<'a>> for RecordHead<'a> {
    fn from(head: &LargeHead<'a>) -> Self {
        let LargeHead { key, expire_at_ms, idle_seconds, lfu, type_byte, kind: _ } = *head;
        Self { key, expire_at_ms, idle_seconds, lfu, type_byte }
    }
}

/// Where the value begins in the bytes of a key, which a decoder has passed. `None`: these are no key.
pub fn value_start(record: &[u8]) -> Option<usize> {
    fn find(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        loop {
            match cursor.byte()? {
                OPCODE_EXPIRE_MS => _ = cursor.take(8)?,
                OPCODE_EXPIRE_SECONDS => _ = cursor.take(4)?,
                OPCODE_IDLE => _ = cursor.length()?,
                OPCODE_FREQUENCY => _ = cursor.byte()?,
                _ => return cursor.text(u64::MAX).map(drop),
            }
        }
    }
    let mut cursor = Cursor::new(record);
    find(&mut cursor).ok().map(|()| cursor.at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::{Decoder, Event, Limits, Step};

    #[test]
    fn what_is_appended_is_decoded_and_ends_where_the_value_starts() {
        let long = vec![b'k'; 70_000];
        for (expire_at_ms, idle_seconds, lfu, key) in [
            (None, None, None, b"k".as_slice()),
            (Some(-5), Some(70_000), None, b""),
            (Some(1_900_000_000_000), None, Some(255), &long),
        ] {
            let head = RecordHead { key, expire_at_ms, idle_seconds, lfu, type_byte: 0 };
            let mut record = Vec::new();
            head.append_to(&mut record);
            assert_eq!(value_start(&record), Some(record.len()));
            record.extend_from_slice(b"\x01v");
            assert_eq!(value_start(&record), Some(record.len() - 2));
            let rdb = [b"REDIS0010".as_slice(), &record].concat();
            let mut decoder = Decoder::new(Limits::default());
            decoder.next(&rdb).unwrap();
            let Step::Event { event: Event::Key(found), .. } = decoder.next(&rdb[9..]).unwrap() else {
                panic!("no key");
            };
            assert_eq!((found.key, found.value, found.type_byte), (key, b"\x01v".as_slice(), 0));
            assert_eq!(
                (found.expire_at_ms, found.idle_seconds, found.lfu),
                (expire_at_ms, idle_seconds, lfu)
            );
        }
        assert_eq!(value_start(b"\xfc\x00"), None);
        // Compressed names, and times in seconds.
        assert_eq!(value_start(b"\xfd\x00\x00\x00\x00\x00\xc3\x02\x0a\x00a\x01v"), Some(11));
    }
}
