//! PURE. Proof that two sets of keys are equal without asking either side for the other's keys:
//! every key the source has is added, every key the target has is subtracted, in a bucket chosen
//! by the key. A bucket that ends at zero held the same keys on both sides, but for a collision of
//! 64-bit hashes whose seed nobody knows. Keys of the other buckets have to be asked for.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) struct Ledger {
    /// A power of two.
    buckets: Box<[AtomicU64]>,
    seed: RandomState,
}

impl Ledger {
    /// `buckets` is rounded up to a power of two; each takes 8 bytes.
    pub fn new(buckets: usize) -> Self {
        let buckets = (0..buckets.next_power_of_two()).map(|_| AtomicU64::new(0)).collect();
        Self { buckets, seed: RandomState::new() }
    }

    pub fn add(&self, key: &[u8]) {
        let (bucket, hash) = self.place(key);
        if let Some(bucket) = bucket {
            bucket.fetch_add(hash, Ordering::Relaxed);
        }
    }

    pub fn subtract(&self, key: &[u8]) {
        let (bucket, hash) = self.place(key);
        if let Some(bucket) = bucket {
            bucket.fetch_sub(hash, Ordering::Relaxed);
        }
    }

    /// False for keys whose bucket held the same on both sides.
    pub fn is_open(&self, key: &[u8]) -> bool {
        self.place(key).0.is_none_or(|bucket| bucket.load(Ordering::Relaxed) != 0)
    }

    pub fn is_balanced(&self) -> bool {
        self.buckets.iter().all(|bucket| bucket.load(Ordering::Relaxed) == 0)
    }

    pub fn clear(&self) {
        self.buckets.iter().for_each(|bucket| bucket.store(0, Ordering::Relaxed));
    }

    fn place(&self, key: &[u8]) -> (Option<&AtomicU64>, u64) {
        let hash = self.seed.hash_one(key);
        let index = (hash >> 32) as usize & (self.buckets.len() - 1);
        // Odd, so that it is never zero and adds even to a bucket that wraps.
        (self.buckets.get(index), hash | 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_balance_and_others_stay_open() {
        let ledger = Ledger::new(1000);
        assert_eq!(ledger.buckets.len(), 1024);
        for key in 0..5000u32 {
            ledger.add(&key.to_le_bytes());
        }
        for key in (0..5000u32).rev() {
            ledger.subtract(&key.to_le_bytes());
        }
        assert!(ledger.is_balanced());
        ledger.subtract(b"extra");
        ledger.add(b"missing");
        assert!(ledger.is_open(b"extra"));
        assert!(ledger.is_open(b"missing"));
        assert!(!ledger.is_balanced());
        let open = (0..5000u32).filter(|key| ledger.is_open(&key.to_le_bytes())).count();
        assert!(open < 50, "{open}");
        ledger.clear();
        assert!(ledger.is_balanced());
    }
}
