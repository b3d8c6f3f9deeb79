//! Values with the expiries of their fields held, byte for byte where they stand: a span is added to every
//! time, which changes neither its width nor the order that packed hashes keep.

use crate::hold::{FIELD, Holding};
use crate::version::Flavor;

use super::cursor::{Cursor, Stop};
use super::error::Fault;
use super::layout::{Elements, Layout, layout};
use super::packed::{Entry, Packed};
use super::recode::append_length;

/// The listpack encoding of numbers of eight bytes, which all times since 1970-01-25 are.
const LISTPACK_INT64: u8 = 0xf4;

/// Appends `value` with all field expiries held; false, and nothing appended, when the type has none or the
/// value is malformed, for the target to refuse.
pub fn hold_fields(type_byte: u8, value: &[u8], flavor: Flavor, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let held = match layout(type_byte, flavor) {
        Ok(Layout::ExpiryBlob) => packed(value, out),
        Ok(Layout::Counted(Elements::HashExpiry { .. })) => relative(value, out),
        Ok(Layout::Counted(Elements::HashExpiryValkey)) => absolute(value, out),
        _ => return false,
    };
    if held.is_err() {
        out.truncate(start);
    }
    held.is_ok()
}

fn held(at: i64) -> i64 {
    Holding::ALL.field(at)
}

/// Redis: eight bytes of least expiry, which all others count from.
fn relative(value: &[u8], out: &mut Vec<u8>) -> Result<(), Stop> {
    let mut cursor = Cursor::new(value);
    let least = i64::from_le_bytes(cursor.array()?);
    // As 0, the least expiry of a hash that has none, may stand for the first time there is.
    let least = if least < FIELD { least.max(0) + FIELD } else { least };
    out.extend_from_slice(&least.to_le_bytes());
    out.extend_from_slice(value.get(cursor.at..).unwrap_or_default());
    Ok(())
}

/// Valkey: eight bytes behind each field and value.
fn absolute(value: &[u8], out: &mut Vec<u8>) -> Result<(), Stop> {
    let mut cursor = Cursor::new(value);
    let mut copied = 0;
    for _ in 0..cursor.length()? {
        cursor.text(u64::MAX)?;
        cursor.text(u64::MAX)?;
        let at = i64::from_le_bytes(cursor.array()?);
        if at != -1 {
            let before = value.get(copied..cursor.at.saturating_sub(8)).unwrap_or_default();
            out.extend_from_slice(before);
            out.extend_from_slice(&held(at).to_le_bytes());
            copied = cursor.at;
        }
    }
    out.extend_from_slice(value.get(copied..).unwrap_or_default());
    Ok(())
}

/// Redis: eight bytes of least expiry, and a listpack of field, value and expiry.
fn packed(value: &[u8], out: &mut Vec<u8>) -> Result<(), Stop> {
    let mut cursor = Cursor::new(value);
    let least = i64::from_le_bytes(cursor.array()?);
    let least = if least == 0 { 0 } else { held(least) };
    out.extend_from_slice(&least.to_le_bytes());
    let mut scratch = Vec::new();
    let blob = cursor.bytes_in(u64::MAX, &mut scratch)?;
    append_length(blob.len() as u64, out);
    let start = out.len();
    out.extend_from_slice(blob);
    let fault = |fault| Stop::Fault { fault, at: 8 };
    let mut entries = Packed::listpack(blob).map_err(fault)?;
    while entries.next().map_err(fault)?.is_some() {
        entries.expect("hash value").map_err(fault)?;
        let place = entries.at();
        match entries.expect("field expiry").map_err(fault)? {
            Entry::Int(0) => {}
            Entry::Int(at) if blob.get(place) == Some(&LISTPACK_INT64) => {
                if let Some(bytes) = out.get_mut(start + place + 1..start + place + 9) {
                    bytes.copy_from_slice(&held(at).to_le_bytes());
                }
            }
            _ => return Err(fault(Fault::Unexpected("field expiry"))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
