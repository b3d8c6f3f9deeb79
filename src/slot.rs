//! Cluster slots: the hash of a key, hash tags, sets of slot ranges.
//! Rules: "Redis cluster specification", sections "Key distribution model" and "Hash tags".

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use memchr::memchr;
use thiserror::Error;

/// Slots in every Redis and Valkey cluster, numbered from 0.
pub const SLOT_COUNT: u16 = 16384;

/// The slot of `key`, below [`SLOT_COUNT`].
pub fn slot(key: &[u8]) -> u16 {
    crc16(hash_tag(key)) % SLOT_COUNT
}

/// The part of `key` that is hashed: what stands between the first `{` and the first `}` after it,
/// or the whole key if there is no such pair or nothing inside it.
pub fn hash_tag(key: &[u8]) -> &[u8] {
    tag_between_braces(key).unwrap_or(key)
}

/// A short text without braces that hashes to `slot`, so that `…{tag}…` is a key of that slot.
/// Empty for a number that is no slot.
pub fn tag_for_slot(slot: u16) -> &'static str {
    static TAGS: OnceLock<Vec<u8>> = OnceLock::new();
    let start = usize::from(slot) * TAG_LENGTH;
    let tag = TAGS.get_or_init(tags_of_all_slots).get(start..start + TAG_LENGTH).unwrap_or_default();
    std::str::from_utf8(tag).unwrap_or_default()
}

/// A set of slots, kept as sorted ranges that neither overlap nor touch.
/// Displays as `0-5460,5462`, the form that [`SlotRanges::from_str`] reads; empty as "".
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotRanges {
    /// Both ends included; `first <= last < SLOT_COUNT`.
    ranges: Vec<(u16, u16)>,
}

/// Why a text names no slots.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SlotRangesError {
    #[error("{0:?} is not a slot or a range of slots: write for example 0-5460,5462")]
    NotARange(String),
    #[error("slot {0} does not exist: slots go from 0 to 16383")]
    NoSuchSlot(u64),
    #[error("range {0}-{1} ends before it starts")]
    Backwards(u16, u16),
}

impl SlotRanges {
    /// Every slot.
    pub fn all() -> Self {
        Self { ranges: vec![(0, SLOT_COUNT - 1)] }
    }

    /// Adds `first..=last`. Ends past the last slot are cut off; a backwards range adds nothing.
    pub fn insert(&mut self, first: u16, last: u16) {
        let (mut first, mut last) = (first, last.min(SLOT_COUNT - 1));
        if first > last {
            return;
        }
        let before = self.ranges.partition_point(|&(_, end)| end + 1 < first);
        let after = self.ranges.partition_point(|&(start, _)| start <= last + 1);
        if let (Some(&(start, _)), Some(&(_, end))) =
            (self.ranges.get(before), self.ranges.get(after.wrapping_sub(1)))
            && before < after
        {
            first = first.min(start);
            last = last.max(end);
        }
        self.ranges.splice(before..after, [(first, last)]);
    }

    pub fn contains(&self, slot: u16) -> bool {
        let index = self.ranges.partition_point(|&(_, last)| last < slot);
        self.ranges.get(index).is_some_and(|&(first, _)| first <= slot)
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of slots, at most [`SLOT_COUNT`].
    pub fn count(&self) -> usize {
        self.ranges.iter().map(|&(first, last)| usize::from(last - first) + 1).sum()
    }

    /// Those that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        self.iter().filter(|slot| !other.contains(*slot)).collect()
    }

    /// Those of either.
    pub fn with(&self, other: &Self) -> Self {
        let mut all = self.clone();
        other.ranges.iter().for_each(|&(first, last)| all.insert(first, last));
        all
    }

    /// The slots in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        self.ranges.iter().flat_map(|&(first, last)| first..=last)
    }

    /// The ranges in ascending order, both ends included.
    pub fn ranges(&self) -> &[(u16, u16)] {
        &self.ranges
    }

    /// Whether some slot is in both sets.
    pub fn intersects(&self, other: &Self) -> bool {
        self.ranges.iter().any(|&(first, last)| {
            let index = other.ranges.partition_point(|&(_, end)| end < first);
            other.ranges.get(index).is_some_and(|&(start, _)| start <= last)
        })
    }
}

impl FromStr for SlotRanges {
    type Err = SlotRangesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut slots = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (slot_number(first, part)?, slot_number(last, part)?);
            if first > last {
                return Err(SlotRangesError::Backwards(first, last));
            }
            slots.insert(first, last);
        }
        Ok(slots)
    }
}

impl fmt::Display for SlotRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl serde::Serialize for SlotRanges {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for SlotRanges {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromIterator<u16> for SlotRanges {
    fn from_iter<I: IntoIterator<Item = u16>>(slots: I) -> Self {
        let mut set = Self::default();
        for slot in slots {
            set.insert(slot, slot);
        }
        set
    }
}

fn slot_number(text: &str, part: &str) -> Result<u16, SlotRangesError> {
    let number: u64 = text.trim().parse().map_err(|_| SlotRangesError::NotARange(part.to_owned()))?;
    u16::try_from(number).ok().filter(|&slot| slot < SLOT_COUNT).ok_or(SlotRangesError::NoSuchSlot(number))
}

fn tag_between_braces(key: &[u8]) -> Option<&[u8]> {
    let tail = key.get(memchr(b'{', key)? + 1..)?;
    let tag = tail.get(..memchr(b'}', tail)?)?;
    (!tag.is_empty()).then_some(tag)
}

const TAG_LENGTH: usize = 3;

/// One tag after the other, in slot order. Three letters of 62 reach every slot (a test proves it);
/// two cannot, as there are only 3844 such texts.
fn tags_of_all_slots() -> Vec<u8> {
    const LETTERS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut tags = vec![0; usize::from(SLOT_COUNT) * TAG_LENGTH];
    for &a in LETTERS {
        for &b in LETTERS {
            for &c in LETTERS {
                let tag = [a, b, c];
                let start = usize::from(slot(&tag)) * TAG_LENGTH;
                if let Some(place) = tags.get_mut(start..start + TAG_LENGTH)
                    && place.first() == Some(&0)
                {
                    place.copy_from_slice(&tag);
                }
            }
        }
    }
    tags
}

/// CRC-16/XMODEM: polynomial 0x1021, not reflected, initial value and xor-out 0.
/// Eight bytes a step, because the byte-wise loop waits for one table load per byte.
fn crc16(bytes: &[u8]) -> u16 {
    let [t0, t1, t2, t3, t4, t5, t6, t7] = &CRC_TABLES;
    let (chunks, rest) = bytes.as_chunks::<8>();
    let mut crc = 0u16;
    for &[a, b, c, d, e, f, g, h] in chunks {
        let [high, low] = crc.to_be_bytes();
        crc = t7[usize::from(a ^ high)]
            ^ t6[usize::from(b ^ low)]
            ^ t5[usize::from(c)]
            ^ t4[usize::from(d)]
            ^ t3[usize::from(e)]
            ^ t2[usize::from(f)]
            ^ t1[usize::from(g)]
            ^ t0[usize::from(h)];
    }
    for &byte in rest {
        let [high, low] = crc.to_be_bytes();
        crc = u16::from_be_bytes([low, 0]) ^ t0[usize::from(byte ^ high)];
    }
    crc
}

/// `CRC_TABLES[k][b]` is the checksum of byte `b` followed by `k` zero bytes.
static CRC_TABLES: [[u16; 256]; 8] = crc_tables();

const fn crc_tables() -> [[u16; 256]; 8] {
    let mut tables = [[0u16; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut zeros = 0;
        while zeros < 8 {
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
                bit += 1;
            }
            tables[zeros][byte] = crc;
            zeros += 1;
        }
        byte += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `CLUSTER KEYSLOT` of Redis 7.0.15.
    #[test]
    fn slots_are_those_of_a_server() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        for (key, expected) in [
            ("", 0),
            ("foo", 12182),
            ("bar", 5061),
            ("123456789", 12739),
            ("user:1000:profile:settings:v2", 15347),
            ("{}{a}", 13650),
            ("{{a}}", 10276),
            ("a}b{c}", 7365),
        ] {
            assert_eq!(slot(key.as_bytes()), expected, "{key}");
        }
    }

    #[test]
    fn only_the_first_brace_pair_makes_a_tag() {
        for (key, hashed) in [
            ("{user}:a", "user"),
            ("a{user}b{other}", "user"),
            ("{}x", "{}x"),
            ("{}{a}", "{}{a}"),
            ("{{a}}", "{a"),
            ("a}b{c}", "c"),
            ("a{b", "a{b"),
            ("a}b", "a}b"),
            ("{", "{"),
        ] {
            assert_eq!(hash_tag(key.as_bytes()), hashed.as_bytes(), "{key}");
        }
    }

    #[test]
    fn every_slot_has_a_tag() {
        for slot_number in 0..SLOT_COUNT {
            let tag = tag_for_slot(slot_number);
            assert!(
                tag.len() == TAG_LENGTH && tag.bytes().all(|byte| byte.is_ascii_alphanumeric()),
                "{tag:?}"
            );
            assert_eq!(slot(format!("redis-migration:{{{tag}}}:x").as_bytes()), slot_number);
        }
        assert_eq!(tag_for_slot(SLOT_COUNT), "");
        assert_eq!(tag_for_slot(u16::MAX), "");
    }

    #[test]
    fn ranges_merge_and_print() {
        let slots: SlotRanges = "5462, 0-100,50-5460,5464".parse().unwrap();
        assert_eq!(slots.to_string(), "0-5460,5462,5464");
        assert_eq!(slots.count(), 5463);
        assert!(slots.contains(0) && slots.contains(5460) && slots.contains(5462));
        assert!(!slots.contains(5461) && !slots.contains(5463) && !slots.contains(16383));
        let joined: SlotRanges = "0-5460,5461,5462-16383".parse().unwrap();
        assert_eq!(joined, SlotRanges::all());
        assert_eq!(joined.count(), 16384);
        assert!("".parse::<SlotRanges>().unwrap().is_empty());
        assert!(slots.intersects(&joined) && !slots.intersects(&"5461,5463,6000-7000".parse().unwrap()));
    }

    #[test]
    fn texts_that_name_no_slots_are_refused() {
        for (text, error) in [
            ("x", SlotRangesError::NotARange("x".to_owned())),
            ("1-2-3", SlotRangesError::NotARange("1-2-3".to_owned())),
            ("-5", SlotRangesError::NotARange("-5".to_owned())),
            ("0-16384", SlotRangesError::NoSuchSlot(16384)),
            ("9-3", SlotRangesError::Backwards(9, 3)),
        ] {
            assert_eq!(text.parse::<SlotRanges>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn sliced_and_bytewise_checksums_agree(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let bytewise = bytes.iter().fold(0u16, |crc, &byte| {
                (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| {
                    if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
                })
            });
            prop_assert_eq!(crc16(&bytes), bytewise);
        }

        #[test]
        fn ranges_behave_as_a_set(picked in prop::collection::btree_set(0..SLOT_COUNT, 0..200), near in 0..SLOT_COUNT) {
            let mut order: Vec<u16> = picked.iter().copied().collect();
            order.rotate_left(picked.len() / 2);
            let slots: SlotRanges = order.into_iter().collect();
            prop_assert_eq!(slots.iter().collect::<Vec<_>>(), picked.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(slots.count(), picked.len());
            prop_assert_eq!(slots.contains(near), picked.contains(&near));
            prop_assert_eq!(slots.to_string().parse::<SlotRanges>(), Ok(slots));
        }
    }
}
