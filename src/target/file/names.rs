//! Which names stand in a file already: a hash of each, so that memory does not depend on how long they are.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// Sets that grow one by one, so that growing never takes much more memory than they do.
const PARTS: usize = 1 << PART_BITS;
const PART_BITS: u32 = 8;
/// 20 bytes each, at most.
const MOST: u64 = 40_000_000;

pub struct Names {
    seed: RandomState,
    parts: Vec<HashSet<u64>>,
    count: u64,
}

impl Default for Names {
    fn default() -> Self {
        Self { seed: RandomState::new(), parts: vec![HashSet::new(); PARTS], count: 0 }
    }
}

impl Names {
    /// False: it is there already. Two names of 64 bits alike are taken for one.
    pub fn add(&mut self, db: u64, name: &[u8]) -> bool {
        let hash = self.seed.hash_one((db, name));
        let part = self.parts.get_mut((hash >> (64 - PART_BITS)) as usize);
        let new = part.is_some_and(|part| part.insert(hash));
        self.count += u64::from(new);
        new
    }

    pub fn has_room(&self) -> bool {
        self.count < MOST
    }

    pub const fn most() -> u64 {
        MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_new_once_in_each_database() {
        let mut names = Names::default();
        for number in 0..20_000u32 {
            assert!(names.add(0, &number.to_be_bytes()));
        }
        assert!(names.add(1, &7u32.to_be_bytes()));
        assert!(!names.add(0, &7u32.to_be_bytes()) && !names.add(1, &7u32.to_be_bytes()));
        assert_eq!(names.count, 20_001);
    }
}
