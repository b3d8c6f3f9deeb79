//! Which source shard's worker follows which slots (PURE).
//!
//! A slot that moves has keys in two streams that know no common order. So one worker at a time follows it: the
//! old owner's lets it go, and only then the new owner's takes it over, copying its keys. A slot on its way stays
//! with who had it: its stream tells what left, and what may come back.

use crate::slot::{SLOT_COUNT, SlotRanges};

/// One shard, as its worker and the newest look see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// What its worker follows.
    pub follows: SlotRanges,
    /// What its master serves, and of that what it is handing over.
    pub serves: SlotRanges,
    pub leaving: SlotRanges,
}

/// What each worker shall follow now.
pub fn wanted(shards: &[Holding]) -> Vec<SlotRanges> {
    let mut wanted: Vec<SlotRanges> = shards.iter().map(|shard| shard.follows.clone()).collect();
    if at_rest(shards) {
        return wanted;
    }
    wanted.fill(SlotRanges::default());
    for slot in 0..SLOT_COUNT {
        let moving = shards.iter().any(|shard| shard.leaving.contains(slot));
        let mut owners = shards
            .iter()
            .enumerate()
            .filter(|(_, shard)| shard.serves.contains(slot))
            .map(|(index, _)| index);
        let owner = match (owners.next(), owners.next()) {
            (Some(owner), None) if !moving => Some(owner),
            _ => None,
        };
        let free = |index: usize| {
            shards.iter().enumerate().all(|(other, shard)| other == index || !shard.follows.contains(slot))
        };
        for (index, (shard, wanted)) in shards.iter().zip(&mut wanted).enumerate() {
            let follows = shard.follows.contains(slot);
            let wants = match owner {
                Some(owner) => owner == index && (follows || free(index)),
                None => follows,
            };
            if wants {
                wanted.insert(slot, slot);
            }
        }
    }
    wanted
}

/// Every slot is followed where it is served.
pub fn at_rest(shards: &[Holding]) -> bool {
    shards.iter().all(|shard| shard.follows == shard.serves && shard.leaving.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(follows: &str, serves: &str, leaving: &str) -> Holding {
        let slots = |text: &str| text.parse().unwrap();
        Holding { follows: slots(follows), serves: slots(serves), leaving: slots(leaving) }
    }

    fn texts(shards: &[Holding]) -> Vec<String> {
        wanted(shards).iter().map(SlotRanges::to_string).collect()
    }

    #[test]
    fn the_old_owner_lets_go_before_the_new_one_takes_over() {
        let mut shards = [holding("0-99", "10-99", ""), holding("100-199", "0-9,100-199", "")];
        assert!(!at_rest(&shards));
        assert_eq!(texts(&shards), ["10-99", "100-199"]);
        shards[0].follows = "10-99".parse().unwrap();
        assert_eq!(texts(&shards), ["10-99", "0-9,100-199"]);
        shards[1].follows = "0-9,100-199".parse().unwrap();
        assert!(at_rest(&shards) && texts(&shards) == ["10-99", "0-9,100-199"]);
    }

    #[test]
    fn a_slot_on_its_way_stays_with_who_had_it() {
        let shards = [holding("0-99", "0-99", "7"), holding("100-199", "100-199", "")];
        assert_eq!(texts(&shards), ["0-99", "100-199"]);
        // It was let go, and is on its way back.
        let shards = [holding("0-6,8-99", "0-6,8-99", ""), holding("100-199", "7,100-199", "7")];
        assert_eq!(texts(&shards), ["0-6,8-99", "100-199"]);
    }

    #[test]
    fn a_slot_that_nobody_known_serves_stays_with_who_had_it() {
        let shards = [holding("0-99", "50-99", ""), holding("100-199", "100-199", "")];
        assert_eq!(texts(&shards), ["0-99", "100-199"]);
    }

    #[test]
    fn a_slot_that_two_follow_is_let_go_by_the_one_that_does_not_serve_it() {
        let shards = [holding("0-99", "0-98", ""), holding("99-199", "99-199", "")];
        assert_eq!(texts(&shards), ["0-98", "99-199"]);
    }
}
