//! PURE. Many keys in few allocations, and the sample that `Sample` mode picks.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

/// Keys one behind the other in one buffer, so that a page of them costs no allocation per key.
#[derive(Clone, Debug, Default)]
pub struct KeyArena {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl KeyArena {
    pub fn push(&mut self, key: &[u8]) {
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// Empty past the end.
    pub fn key(&self, index: usize) -> &[u8] {
        let start = match index.checked_sub(1) {
            None => 0,
            Some(before) => self.ends.get(before).copied().unwrap_or(self.bytes.len()),
        };
        let end = self.ends.get(index).copied().unwrap_or(self.bytes.len());
        self.bytes.get(start..end).unwrap_or_default()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.key(index))
    }

    /// Bytes in use, the bookkeeping included.
    pub fn footprint(&self) -> usize {
        self.bytes.len() + self.ends.len() * size_of::<usize>()
    }
}

/// Keys under suspicion, by pair of databases. Bounded: what does not fit is only counted.
#[derive(Debug)]
pub struct Suspects {
    /// Indexed as the pairs of databases are.
    lists: Vec<KeyArena>,
    limit: usize,
    dropped: u64,
}

impl Suspects {
    pub fn new(pairs: usize, limit: usize) -> Self {
        Self { lists: vec![KeyArena::default(); pairs], limit, dropped: 0 }
    }

    pub fn push(&mut self, pair: usize, key: &[u8]) {
        let used: usize = self.lists.iter().map(KeyArena::footprint).sum();
        match self.lists.get_mut(pair) {
            Some(list) if used + key.len() + size_of::<usize>() <= self.limit => list.push(key),
            _ => self.dropped += 1,
        }
    }

    pub fn len(&self) -> usize {
        self.lists.iter().map(KeyArena::len).sum()
    }

    /// Suspects that did not fit. Not zero: only another scan can tell what became of them.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The lists, each key once: scans may meet a key twice, and both sides may suspect it.
    pub fn into_lists(self) -> Vec<KeyArena> {
        self.lists.into_iter().map(distinct).collect()
    }
}

fn distinct(list: KeyArena) -> KeyArena {
    let mut seen = HashSet::with_capacity(list.len());
    let mut kept = KeyArena::default();
    for key in list.iter() {
        if seen.insert(key) {
            kept.push(key);
        }
    }
    kept
}

/// Picks the same share of keys on both sides and in every run: by a hash of the key alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    threshold: u64,
}

impl Sample {
    /// `percent` from 0 to 100; more counts as 100.
    pub fn percent(percent: u32) -> Self {
        Self { threshold: (u64::MAX / 100).saturating_mul(u64::from(percent.min(100))) }
    }

    pub fn picks(&self, key: &[u8]) -> bool {
        // The keys of this hasher are fixed, unlike those of a HashMap.
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        hasher.finish() <= self.threshold
    }
}

/// A key for people: printable, and short enough for a status.
pub fn printable(key: &[u8]) -> String {
    const SHOWN: usize = 200;
    let mut text = key.get(..SHOWN).unwrap_or(key).escape_ascii().to_string();
    if let Ok(utf8) = std::str::from_utf8(key)
        && utf8.chars().count() <= SHOWN
        && !utf8.chars().any(char::is_control)
    {
        text = utf8.to_owned();
    } else if key.len() > SHOWN {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_keeps_keys_apart() {
        let mut arena = KeyArena::default();
        for key in [&b"a"[..], b"", b"long key", b"z"] {
            arena.push(key);
        }
        let keys: Vec<&[u8]> = arena.iter().collect();
        assert_eq!(keys, [&b"a"[..], b"", b"long key", b"z"]);
        assert_eq!(arena.key(9), b"");
    }

    #[test]
    fn suspects_are_bounded_and_distinct() {
        let mut suspects = Suspects::new(2, 40);
        suspects.push(0, b"one");
        suspects.push(1, b"one");
        suspects.push(0, b"one");
        suspects.push(0, b"a longer key");
        assert_eq!(suspects.dropped(), 1);
        let lists = suspects.into_lists();
        assert_eq!(lists[0].len(), 1);
        assert_eq!(lists[1].key(0), b"one");
    }

    #[test]
    fn sample_is_a_stable_share() {
        let picked = |percent| {
            let sample = Sample::percent(percent);
            (0..20_000u32).filter(|key| sample.picks(format!("key:{key}").as_bytes())).count()
        };
        assert_eq!(picked(100), 20_000);
        assert!((1_700..2_300).contains(&picked(10)));
        assert!(picked(0) <= 1);
    }

    #[test]
    fn keys_print_short_and_safe() {
        assert_eq!(printable("ключ:1".as_bytes()), "ключ:1");
        assert_eq!(printable(b"a\xff\n"), "a\\xff\\n");
        assert!(printable(&[b'k'; 5000]).chars().count() < 220);
    }
}
