//! PURE. What the keys of the source were like when they were read last: 12 bytes a key, so that another
//! pass can tell which have changed, and which are gone.
//!
//! Names are not kept, only 62 bits of their hash beside 42 bits of a digest of value and expiry. Two keys
//! that share those 62 bits look like one key that changes all the time: they are copied on every pass.

/// Parts grow one by one, so that growing never takes much more memory than the table itself.
const PARTS: usize = 1 << PART_BITS;
const PART_BITS: u32 = 10;
/// Bits of the name's hash that are kept beside the low 32.
const NAME_BITS: u32 = 20;
/// Bits of the digest; below them two of the mark.
const DIGEST_BITS: u32 = 42;
const DIGEST: u64 = (1 << DIGEST_BITS) - 1;

/// Not met in the current pass. An empty slot is all zeros, so that no mark is.
const OLDER: u64 = 1;
const SEEN: u64 = 2;
const MARK: u64 = 3;

/// Digest of a key that was deleted on the target.
const GONE: u64 = 0;

/// What is new about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Never met before.
    New,
    Changed,
    Same,
}

#[derive(Debug, Default)]
pub struct Table {
    parts: Vec<Part>,
    keys: u64,
    seen: u64,
}

#[derive(Clone, Debug, Default)]
struct Part {
    /// The low half of the name's hash; more of it, the digest and the mark.
    slots: Vec<[u32; 3]>,
    used: usize,
}

impl Table {
    pub fn new() -> Self {
        Self { parts: vec![Part::default(); PARTS], keys: 0, seen: 0 }
    }

    pub fn len(&self) -> u64 {
        self.keys
    }

    /// Keys that were not met since the pass began.
    pub fn unseen(&self) -> u64 {
        self.keys.saturating_sub(self.seen)
    }

    /// From here on no key counts as met.
    pub fn begin_pass(&mut self) {
        for slot in self.parts.iter_mut().flat_map(|part| &mut part.slots) {
            let (name, packed) = unpacked(*slot);
            if packed & MARK == SEEN {
                *slot = pack(name, packed & !MARK | OLDER);
            }
        }
        self.seen = 0;
    }

    /// Meets a key. It is the same as before if the digest that is kept is one of `alike`; else `digest` is kept.
    pub fn meet(&mut self, name: u64, digest: u64, alike: [u64; 2]) -> News {
        let digest = significant(digest);
        let Some(part) = self.parts.get_mut(part_of(name)) else { return News::Changed };
        part.make_room();
        let Some(slot) = part.find(name) else { return News::Changed };
        let (_, packed) = unpacked(*slot);
        if packed == 0 {
            *slot = pack(name as u32, wanted(name) | digest << 2 | SEEN);
            part.used += 1;
            self.keys += 1;
            self.seen += 1;
            return News::New;
        }
        if packed & MARK == OLDER {
            self.seen += 1;
        }
        let kept = packed >> 2 & DIGEST;
        let same = kept != GONE && alike.iter().any(|digest| significant(*digest) == kept);
        let digest = if same { kept } else { digest };
        *slot = pack(name as u32, wanted(name) | digest << 2 | SEEN);
        if same { News::Same } else { News::Changed }
    }

    /// A key that is gone: true if it was there as far as is known.
    pub fn forget(&mut self, name: u64) -> bool {
        let Some(part) = self.parts.get_mut(part_of(name)).filter(|part| part.used > 0) else { return false };
        let Some(slot) = part.find(name) else { return false };
        let (_, packed) = unpacked(*slot);
        if packed == 0 {
            return false;
        }
        *slot = pack(name as u32, packed & !(DIGEST << 2));
        packed >> 2 & DIGEST != GONE
    }

    /// True for a key that an earlier pass met and the current one did not.
    pub fn is_unseen(&self, name: u64) -> bool {
        self.packed(name) & MARK == OLDER
    }

    pub fn contains(&self, name: u64) -> bool {
        self.packed(name) != 0
    }

    /// Forgets all keys that the current pass did not meet.
    pub fn drop_unseen(&mut self) {
        for part in &mut self.parts {
            let stays = |slot: &[u32; 3]| unpacked(*slot).1 & MARK == SEEN;
            if part.slots.iter().any(|slot| unpacked(*slot).1 & MARK == OLDER) {
                let slots: Vec<[u32; 3]> = part.slots.iter().copied().filter(stays).collect();
                part.refill(&slots, part.slots.len());
            }
        }
        self.keys = self.seen;
    }

    fn packed(&self, name: u64) -> u64 {
        let part = self.parts.get(part_of(name)).filter(|part| part.used > 0);
        part.and_then(|part| part.slots.get(part.place(name))).map_or(0, |slot| unpacked(*slot).1)
    }
}

impl Part {
    /// At least one slot stays empty, where a search ends.
    fn make_room(&mut self) {
        let length = self.slots.len();
        if (self.used + 1) * 5 > length * 4 {
            let slots: Vec<[u32; 3]> =
                self.slots.iter().copied().filter(|slot| unpacked(*slot).1 != 0).collect();
            self.refill(&slots, (length + length / 2).max(8));
        }
    }

    fn refill(&mut self, slots: &[[u32; 3]], length: usize) {
        self.slots = vec![[0; 3]; length];
        self.used = slots.len();
        for slot in slots {
            let (low, packed) = unpacked(*slot);
            let place = self.place_of(low, packed);
            if let Some(free) = self.slots.get_mut(place) {
                *free = *slot;
            }
        }
    }

    fn find(&mut self, name: u64) -> Option<&mut [u32; 3]> {
        let place = self.place(name);
        self.slots.get_mut(place)
    }

    fn place(&self, name: u64) -> usize {
        self.place_of(name as u32, wanted(name))
    }

    /// The slot of this name, or the empty one where it would be.
    fn place_of(&self, low: u32, packed: u64) -> usize {
        let length = self.slots.len();
        let mut place = ((u64::from(low) * length as u64) >> 32) as usize;
        while let Some(slot) = self.slots.get(place) {
            let (here, there) = unpacked(*slot);
            if there == 0 || (here == low && (there ^ packed) >> (DIGEST_BITS + 2) == 0) {
                break;
            }
            place = if place + 1 < length { place + 1 } else { 0 };
        }
        place
    }
}

fn part_of(name: u64) -> usize {
    (name >> (64 - PART_BITS)) as usize
}

/// Bits 32 to 51 of the hash, in their place.
fn wanted(name: u64) -> u64 {
    (name >> 32 & ((1 << NAME_BITS) - 1)) << (DIGEST_BITS + 2)
}

/// Never the one of a key that is gone.
fn significant(digest: u64) -> u64 {
    (digest & DIGEST).max(1)
}

fn pack(low: u32, packed: u64) -> [u32; 3] {
    [low, (packed >> 32) as u32, packed as u32]
}

fn unpacked([low, high, rest]: [u32; 3]) -> (u32, u64) {
    (low, u64::from(high) << 32 | u64::from(rest))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn meet(table: &mut Table, name: u64, digest: u64) -> News {
        table.meet(name, digest, [digest, digest])
    }

    #[test]
    fn a_pass_tells_what_is_new_changed_and_gone() {
        let mut table = Table::new();
        assert_eq!(meet(&mut table, 5, 50), News::New);
        assert_eq!(meet(&mut table, 6, 60), News::New);
        // SCAN gives a key twice.
        assert_eq!(meet(&mut table, 5, 50), News::Same);
        assert_eq!(meet(&mut table, 5, 51), News::Changed);
        table.begin_pass();
        assert_eq!(table.unseen(), 2);
        assert_eq!(meet(&mut table, 5, 51), News::Same);
        assert!(table.is_unseen(6) && !table.is_unseen(5) && !table.is_unseen(7));
        table.drop_unseen();
        assert_eq!((table.len(), table.contains(5), table.contains(6)), (1, true, false));
    }

    #[test]
    fn a_deleted_key_is_new_again_whatever_its_value() {
        let mut table = Table::new();
        meet(&mut table, 5, 50);
        assert!(table.forget(5) && !table.forget(5) && !table.forget(6));
        assert_eq!(meet(&mut table, 5, 50), News::Changed);
    }

    #[test]
    fn an_expiry_that_is_told_inexactly_is_no_change() {
        let mut table = Table::new();
        assert_eq!(table.meet(5, 50, [50, 51]), News::New);
        assert_eq!(table.meet(5, 49, [49, 50]), News::Same);
        // What is kept is the first, so that many small steps are a change.
        assert_eq!(table.meet(5, 48, [48, 49]), News::Changed);
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0u64..400, 1u64..4, 0u8..10), 0..2000)) {
            let mut table = Table::new();
            let mut model: HashMap<u64, (u64, bool)> = HashMap::new();
            for (name, digest, step) in steps {
                // In few parts, with few low halves, so that they meet.
                let name = (name << 32) | (name % 7) | (name << 62);
                match step {
                    0 => {
                        table.begin_pass();
                        model.values_mut().for_each(|value| value.1 = false);
                    }
                    1 => {
                        table.drop_unseen();
                        model.retain(|_, value| value.1);
                    }
                    2 => {
                        let known = model.get_mut(&name).is_some_and(|value| std::mem::take(&mut value.0) != 0);
                        prop_assert_eq!(table.forget(name), known);
                    }
                    _ => {
                        let news = match model.insert(name, (digest, true)) {
                            None => News::New,
                            Some((before, _)) if before == digest => News::Same,
                            Some(_) => News::Changed,
                        };
                        prop_assert_eq!(meet(&mut table, name, digest), news);
                    }
                }
                prop_assert_eq!(table.len(), model.len() as u64);
                let unseen = model.values().filter(|value| !value.1).count();
                prop_assert_eq!(table.unseen(), unseen as u64);
            }
            for (name, (_, seen)) in &model {
                prop_assert_eq!(table.is_unseen(*name), !seen);
            }
        }
    }
}
