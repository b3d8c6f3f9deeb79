//! `RESTORE` payloads: type, value, two bytes of RDB version, eight of CRC-64.
//! Source: Redis `cluster.c`, `createDumpPayload` and `verifyDumpPayload`.

use super::checksum::crc64;
use super::cursor::{Cursor, Text};
use super::error::RdbError;
use super::event::TYPE_STRING;

const FOOTER: usize = 10;

/// A `DUMP` reply taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dump<'a> {
    pub type_byte: u8,
    pub value: &'a [u8],
    /// The RDB version it is stamped with.
    pub version: u16,
}

/// A string value that need not be expanded to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainString<'a> {
    Raw(&'a [u8]),
    /// Its text is this number in decimal.
    Int(i64),
}

/// Appends the payload of `RESTORE`, stamped with `rdb_version`. `out` may hold other bytes before.
///
/// The CRC is that of the payload alone: servers check it, but not where the value ends, so
/// `value` must be the exact extent that the decoder found.
#[inline]
pub fn append_restore_payload(out: &mut Vec<u8>, type_byte: u8, value: &[u8], rdb_version: u16) {
    let start = out.len();
    out.reserve(1 + value.len() + FOOTER);
    out.push(type_byte);
    out.extend_from_slice(value);
    out.extend_from_slice(&rdb_version.to_le_bytes());
    let crc = crc64(out.get(start..).unwrap_or_default());
    out.extend_from_slice(&crc.to_le_bytes());
}

/// The length of what [`append_restore_payload`] appends.
#[inline]
pub fn restore_payload_len(value: &[u8]) -> usize {
    1 + value.len() + FOOTER
}

/// Takes a `DUMP` reply apart. The CRC is not checked: the reply came over a reliable connection.
pub fn parse_dump(payload: &[u8]) -> Result<Dump<'_>, RdbError> {
    let too_short = RdbError::DumpTooShort { length: payload.len() };
    let end = payload.len().checked_sub(FOOTER).ok_or(too_short.clone())?;
    match (payload.get(..end), payload.get(end..)) {
        (Some([type_byte, value @ ..]), Some([low, high, ..])) if !value.is_empty() => {
            Ok(Dump { type_byte: *type_byte, value, version: u16::from_le_bytes([*low, *high]) })
        }
        _ => Err(too_short),
    }
}

/// The string in a value of type 0, unless it is compressed or malformed.
#[inline]
pub fn plain_string(type_byte: u8, value: &[u8]) -> Option<PlainString<'_>> {
    if type_byte != TYPE_STRING {
        return None;
    }
    let mut cursor = Cursor::new(value);
    let text = cursor.text(u64::MAX).ok()?;
    match text {
        _ if !cursor.is_at_end() => None,
        Text::Raw(bytes) => Some(PlainString::Raw(bytes)),
        Text::Int(number) => Some(PlainString::Int(number)),
        Text::Lzf { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SET k v`, `DUMP k` on Redis 7.0.15.
    const DUMP_OF_V: &[u8] = b"\x00\x01v\x0a\x00\x91\x08\xce\xb2\x198\x8a\xce";

    #[test]
    fn payload_is_what_parse_dump_takes_apart() {
        let mut out = b"before".to_vec();
        append_restore_payload(&mut out, 0, b"\x01v", 10);
        assert_eq!(out.len(), 6 + restore_payload_len(b"\x01v"));
        let dump = parse_dump(&out[6..]).unwrap();
        assert_eq!(dump, Dump { type_byte: 0, value: b"\x01v", version: 10 });
        assert_eq!(&out[6..], DUMP_OF_V);
    }

    #[test]
    fn short_dumps_are_refused() {
        for length in 0..=11 {
            let payload = vec![0; length];
            assert_eq!(parse_dump(&payload), Err(RdbError::DumpTooShort { length }));
        }
        assert!(parse_dump(&[0; 12]).is_ok());
    }

    #[test]
    fn plain_strings() {
        assert_eq!(plain_string(0, b"\x01v"), Some(PlainString::Raw(b"v")));
        assert_eq!(plain_string(0, b"\xc1\x00\x80"), Some(PlainString::Int(-32768)));
        assert_eq!(plain_string(0, b"\xc3\x02\x01\x00a"), None);
        assert_eq!(plain_string(0, b"\x01vx"), None);
        assert_eq!(plain_string(1, b"\x01\x01v"), None);
    }
}
