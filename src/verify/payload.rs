//! PURE. Whether two DUMP payloads hold the same value.
//!
//! Equal bytes prove it. Unequal ones prove nothing: sets and hashes depend on insertion order and
//! encoding, versions on each other; then both are decoded and compared by what they hold.

use std::hash::{Hash, Hasher};

use super::context::Abilities;
use crate::rdb::{ValueDigest, canonical, parse_dump};
use crate::version::Flavor;

/// RDB version and checksum, behind every payload.
const FOOTER: usize = 10;

/// True when the payloads hold equal bytes before their footers, or equal values.
pub(super) fn equal(ours: (&[u8], Flavor), theirs: (&[u8], Flavor), abilities: Abilities) -> bool {
    if let (Some(a), Some(b)) = (body(ours.0), body(theirs.0))
        && a == b
    {
        return true;
    }
    match (digest(ours.0, ours.1, abilities), digest(theirs.0, theirs.1, abilities)) {
        (Some(ours), Some(theirs)) => ours.matches(&theirs),
        _ => false,
    }
}

/// Stands for a value that is not kept.
#[derive(Clone, Debug)]
pub(super) struct ValueMark {
    /// Of the payload's bytes, without the footer.
    bytes: u64,
    /// 0 for what is too short to be a payload, and equals nothing.
    length: usize,
    /// `None`: of a type that cannot be decoded, such as a module's.
    digest: Option<ValueDigest>,
}

impl ValueMark {
    pub fn of(payload: &[u8], flavor: Flavor, abilities: Abilities) -> Self {
        let body = body(payload).unwrap_or_default();
        let mut hasher = std::hash::DefaultHasher::new();
        body.hash(&mut hasher);
        Self { bytes: hasher.finish(), length: body.len(), digest: digest(payload, flavor, abilities) }
    }

    pub fn agrees(&self, other: &ValueMark) -> bool {
        if self.length > 0 && self.length == other.length && self.bytes == other.bytes {
            return true;
        }
        match (&self.digest, &other.digest) {
            (Some(a), Some(b)) => a.matches(b),
            _ => false,
        }
    }

    /// False for a value of which only the bytes can be compared.
    pub fn is_decoded(&self) -> bool {
        self.digest.is_some()
    }
}

fn body(payload: &[u8]) -> Option<&[u8]> {
    payload.get(..payload.len().checked_sub(FOOTER)?)
}

fn digest(payload: &[u8], flavor: Flavor, abilities: Abilities) -> Option<ValueDigest> {
    let dump = parse_dump(payload).ok()?;
    let digest = canonical(dump.type_byte, dump.value, flavor).ok()?;
    Some(if abilities.field_expiries { digest } else { digest.without_field_expiries() })
}
