//! What an RDB holds: keys and bytes by database, type and prefix, and the largest keys.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use super::Event;
use super::json::{kind_name, type_name};
use crate::version::Flavor;

/// Prefixes counted one by one; keys of further ones are counted together.
pub const MAX_PREFIXES: usize = 100_000;
/// Longer prefixes are cut.
const MAX_PREFIX_BYTES: usize = 256;

/// Keys and the bytes that their values take in the RDB, which is less than in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub keys: u64,
    pub bytes: u64,
    pub with_expiry: u64,
}

impl Share {
    fn add(&mut self, bytes: u64, expires: bool) {
        self.keys += 1;
        self.bytes += bytes;
        self.with_expiry += u64::from(expires);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BigKey {
    pub bytes: u64,
    pub key: Vec<u8>,
    pub db: u64,
    pub type_name: &'static str,
}

/// How keys are grouped.
#[derive(Clone, Debug)]
pub struct Grouping {
    /// Ends a part of a key, such as `:`.
    pub separator: u8,
    /// Parts that make a prefix; 0: none.
    pub depth: usize,
    /// How many of the largest keys are kept.
    pub top: usize,
}

#[derive(Debug)]
pub struct Statistics {
    grouping: Grouping,
    pub version: u16,
    pub databases: BTreeMap<u64, Share>,
    pub types: BTreeMap<&'static str, Share>,
    prefixes: HashMap<Vec<u8>, Share>,
    /// Keys without a separator, or beyond [`MAX_PREFIXES`].
    pub other_prefixes: Share,
    top: BinaryHeap<Reverse<BigKey>>,
    large: Option<(BigKey, bool)>,
    pub functions: u64,
    /// Values that cannot be decoded, with the reason of the last.
    pub unsupported: u64,
    pub last_unsupported: String,
}

impl Statistics {
    pub fn new(grouping: Grouping) -> Self {
        Self {
            grouping,
            version: 0,
            databases: BTreeMap::new(),
            types: BTreeMap::new(),
            prefixes: HashMap::new(),
            other_prefixes: Share::default(),
            top: BinaryHeap::new(),
            large: None,
            functions: 0,
            unsupported: 0,
            last_unsupported: String::new(),
        }
    }

    /// Counts one event of the database `db`, which took `bytes` of the file.
    pub fn add(&mut self, db: u64, flavor: Flavor, bytes: usize, event: &Event<'_>) {
        match event {
            Event::Header { version, .. } => self.version = *version,
            Event::Key(record) => {
                let name = type_name(record.type_byte, flavor);
                self.count(db, name, record.key, record.value.len() as u64, record.expire_at_ms.is_some());
            }
            Event::LargeBegin(head) => {
                let key = BigKey { bytes: 0, key: head.key.to_vec(), db, type_name: kind_name(head.kind) };
                self.large = Some((key, head.expire_at_ms.is_some()));
            }
            Event::LargeItems { .. } => {
                if let Some((key, _)) = &mut self.large {
                    key.bytes += bytes as u64;
                }
            }
            Event::LargeEnd { .. } => {
                if let Some((large, expires)) = self.large.take() {
                    self.count(db, large.type_name, &large.key, large.bytes, expires);
                }
            }
            Event::LargeUnsupported { key, type_byte, why } => {
                self.large = None;
                self.unsupported += 1;
                self.last_unsupported = (*why).to_owned();
                self.count(db, type_name(*type_byte, flavor), key, 0, false);
            }
            Event::Function { .. } => self.functions += 1,
            _ => {}
        }
    }

    fn count(&mut self, db: u64, name: &'static str, key: &[u8], bytes: u64, expires: bool) {
        self.databases.entry(db).or_default().add(bytes, expires);
        self.types.entry(name).or_default().add(bytes, expires);
        self.count_prefix(key, bytes, expires);
        let full = self.top.len() >= self.grouping.top;
        if full && self.top.peek().is_none_or(|Reverse(least)| least.bytes >= bytes) {
            return;
        }
        if full {
            self.top.pop();
        }
        self.top.push(Reverse(BigKey { bytes, key: key.to_vec(), db, type_name: name }));
    }

    fn count_prefix(&mut self, key: &[u8], bytes: u64, expires: bool) {
        let Grouping { separator, depth, .. } = self.grouping;
        let end = depth.checked_sub(1).and_then(|last| memchr::memchr_iter(separator, key).nth(last));
        let Some(prefix) = end.and_then(|end| key.get(..end.min(MAX_PREFIX_BYTES))) else {
            self.other_prefixes.add(bytes, expires);
            return;
        };
        if let Some(share) = self.prefixes.get_mut(prefix) {
            share.add(bytes, expires);
        } else if self.prefixes.len() < MAX_PREFIXES {
            self.prefixes.entry(prefix.to_vec()).or_default().add(bytes, expires);
        } else {
            self.other_prefixes.add(bytes, expires);
        }
    }

    pub fn total(&self) -> Share {
        self.types.values().fold(Share::default(), |sum, share| Share {
            keys: sum.keys + share.keys,
            bytes: sum.bytes + share.bytes,
            with_expiry: sum.with_expiry + share.with_expiry,
        })
    }

    /// The prefixes with most bytes, and how many there are in all.
    pub fn prefixes(&self, most: usize) -> (Vec<(&[u8], Share)>, usize) {
        let mut found: Vec<_> =
            self.prefixes.iter().map(|(prefix, share)| (prefix.as_slice(), *share)).collect();
        found.sort_unstable_by(|a, b| b.1.bytes.cmp(&a.1.bytes).then_with(|| a.0.cmp(b.0)));
        found.truncate(most);
        (found, self.prefixes.len())
    }

    /// Largest first.
    pub fn biggest(&self) -> Vec<&BigKey> {
        let mut found: Vec<_> = self.top.iter().map(|Reverse(key)| key).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::KeyRecord;

    fn with(keys: &[(&str, usize)], grouping: Grouping) -> Statistics {
        let mut statistics = Statistics::new(grouping);
        for (key, length) in keys {
            let record = KeyRecord {
                key: key.as_bytes(),
                expire_at_ms: (*length == 3).then_some(1),
                idle_seconds: None,
                lfu: None,
                type_byte: 0,
                value: &vec![0; *length],
            };
            statistics.add(2, Flavor::Redis, length + 10, &Event::Key(record));
        }
        statistics
    }

    #[test]
    fn keys_count_under_their_prefix_and_the_largest_are_kept() {
        let keys = [("user:1:a", 3), ("user:2", 9), ("order:7", 4), ("plain", 1)];
        let statistics = with(&keys, Grouping { separator: b':', depth: 1, top: 2 });
        let (prefixes, count) = statistics.prefixes(10);
        let share = |keys, bytes, with_expiry| Share { keys, bytes, with_expiry };
        assert_eq!(prefixes, [(b"user".as_slice(), share(2, 12, 1)), (b"order", share(1, 4, 0))]);
        assert_eq!((count, statistics.other_prefixes), (2, share(1, 1, 0)));
        assert_eq!(statistics.total(), share(4, 17, 1));
        assert_eq!(statistics.databases[&2].keys, 4);
        let biggest: Vec<_> = statistics.biggest().iter().map(|key| key.bytes).collect();
        assert_eq!(biggest, [9, 4]);
        let deeper = with(&keys, Grouping { separator: b':', depth: 2, top: 0 });
        assert_eq!(deeper.prefixes(10).0, [(b"user:1".as_slice(), share(1, 3, 1))]);
        assert!(deeper.biggest().is_empty());
    }

    #[test]
    fn a_value_in_parts_counts_once_with_all_its_bytes() {
        let mut statistics = Statistics::new(Grouping { separator: b':', depth: 1, top: 5 });
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rdb/testdata/redis-7.0.15.rdb");
        let rdb = std::fs::read(path).unwrap();
        let count = |max_value: usize, statistics: &mut Statistics| {
            let limits = crate::rdb::Limits { max_value, ..Default::default() };
            let counted = crate::file::each_event(&mut rdb.as_slice(), limits, |place, event| {
                statistics.add(place.db, place.flavor, place.bytes, &event);
                Ok(())
            });
            counted.unwrap();
            statistics.total().keys
        };
        let parts = count(600, &mut statistics);
        let mut whole = Statistics::new(Grouping { separator: b':', depth: 1, top: 5 });
        assert_eq!(parts, count(64 << 20, &mut whole));
        assert_eq!(whole.unsupported, 0);
    }
}
