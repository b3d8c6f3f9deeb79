//! What became of a key since it was read last, and what the target has to be told.

use std::hash::BuildHasher;

use super::emit::Value;
use super::table::News;
use super::usage::Usage;
use super::{ScanError, Session, Work};
use crate::rdb::checksum::Crc;
use crate::target::keys::PREFIX;

/// Keys of one shard that are remembered: 600 MiB at most.
const MOST_KEYS: u64 = 40_000_000;
/// Where a server tells only how much time is left, two answers about the same expiry may be apart by as much.
const INEXACT: i64 = 128;

/// Tells values apart that only differ in length, too: the checksum of zeros alone is zero, however many.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut crc = begin();
    crc.update(bytes);
    crc.value().wrapping_add((bytes.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// A checksum that leading zeros change.
pub(super) fn begin() -> Crc {
    Crc::resume(u64::MAX)
}

impl Work {
    pub(super) fn name(&self, db: u32, key: &[u8]) -> u64 {
        self.seed.hash_one((db, key))
    }

    /// A key as it is now. False: the value is of a form that can only be passed on in pieces, which may not be.
    pub(super) fn take(
        &mut self,
        db: u32,
        key: &[u8],
        expire_at: Option<i64>,
        exact: bool,
        value: Value<'_>,
        usage: Usage,
    ) -> bool {
        if key.starts_with(PREFIX) {
            return true;
        }
        let digest = match value {
            Value::Text(text) => sum(text),
            // Without the footer, which tells nothing of the value; its type comes first.
            Value::Dump(payload) => {
                sum(payload.get(..payload.len().saturating_sub(10)).unwrap_or_default()) ^ 1
            }
        };
        let news = self.meets(db, key, digest, expire_at, exact);
        match news {
            News::New => self.names.push(db, key),
            News::Same => return true,
            // SCAN gave it before, with another value: once in the RDB is enough.
            News::Changed if self.emit.in_snapshot() => {
                self.table.forget(self.name(db, key));
                self.changed.add(db, key);
                return true;
            }
            News::Changed => {}
        }
        self.changes += 1;
        if !self.emit.value(db, key, expire_at, value, usage) {
            self.table.forget(self.name(db, key));
            if self.rules.whole_values {
                return false;
            }
            self.big.push((db, key.to_vec(), 0));
        }
        true
    }

    /// Notes that the key has a value with this digest.
    pub(super) fn meets(
        &mut self,
        db: u32,
        key: &[u8],
        digest: u64,
        expire_at: Option<i64>,
        exact: bool,
    ) -> News {
        let with = |at: i64| (digest.rotate_left(23) ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let (digest, alike) = match expire_at {
            None => (with(i64::MIN), [with(i64::MIN); 2]),
            Some(at) if exact => (with(at), [with(at); 2]),
            Some(at) => {
                // The first answer lies in the same span as the second, or in the one beside it.
                let span = |at: i64| at.div_euclid(4 * INEXACT);
                (with(span(at)), [with(span(at - INEXACT)), with(span(at + INEXACT))])
            }
        };
        let name = self.name(db, key);
        self.table.meet(name, digest, alike)
    }

    /// A key that is not there.
    pub(super) fn gone(&mut self, db: u32, key: &[u8]) {
        let name = self.name(db, key);
        if self.emit.in_snapshot() {
            if self.table.contains(name) {
                self.changed.add(db, key);
            }
        } else if self.table.forget(name) {
            self.emit.command(db, &[b"DEL", key]);
            self.changes += 1;
        }
    }

    pub(super) fn check_count(&self, session: &Session) -> Result<(), ScanError> {
        if self.table.len() <= MOST_KEYS {
            return Ok(());
        }
        Err(ScanError::TooMany { address: session.wire.address().clone(), most: MOST_KEYS })
    }
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn zeros_are_counted() {
        let zeros = [0; 64];
        let sums: std::collections::HashSet<u64> = (0..=64).map(|count| sum(&zeros[..count])).collect();
        assert_eq!(sums.len(), 65);
    }
}
