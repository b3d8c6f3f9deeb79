//! Whether the slots of a source cluster stay where they are while its shards are read into files: a key that goes
//! from one to the other meanwhile may be in two files, or in none.

use std::future::pending;

use crate::backoff::Backoff;
use crate::slot::SlotRanges;
use crate::source::watch::{Seen, SourceShard};

/// Masters that one look is sure to ask.
const MASTERS: usize = 16;

/// What the files were begun with.
#[derive(Clone)]
pub struct Steady {
    shard: SourceShard,
    /// Of all shards, in the watch's order.
    slots: Vec<SlotRanges>,
}

impl Steady {
    /// `None`: there are no slots.
    pub fn of(shard: Option<&SourceShard>, slots: &[SlotRanges]) -> Option<Self> {
        let shard = shard.filter(|_| slots.iter().any(|slots| !slots.is_empty()))?;
        Some(Self { shard: shard.clone(), slots: slots.to_vec() })
    }

    /// Asks every master: the slots that are not where they were, or on their way. `failed` is told why it has to
    /// be asked again.
    pub async fn look(&self, failed: impl Fn(&str)) -> SlotRanges {
        let mut moving = SlotRanges::default();
        for _ in 0..self.slots.len().div_ceil(MASTERS) {
            let mut backoff = Backoff::default();
            loop {
                self.shard.look().await;
                let failure = self.shard.failure();
                failed(&failure);
                if failure.is_empty() {
                    break;
                }
                backoff.wait().await;
            }
            moving = moving.with(&moved(&self.shard.subscribe().borrow(), &self.slots));
        }
        moving
    }

    /// Ends with the first slots that are seen to move.
    pub async fn moves(&self) -> SlotRanges {
        let mut seen = self.shard.subscribe();
        loop {
            let moving = moved(&seen.borrow_and_update(), &self.slots);
            if !moving.is_empty() {
                return moving;
            }
            if seen.changed().await.is_err() {
                return pending().await;
            }
        }
    }
}

/// PURE. `slots`: what each shard served.
fn moved(seen: &Seen, slots: &[SlotRanges]) -> SlotRanges {
    let mut moving = SlotRanges::default();
    for (shard, slots) in seen.shards.iter().zip(slots) {
        let went = slots.without(&shard.serves);
        let came = shard.serves.without(slots);
        moving = moving.with(&went).with(&came).with(&shard.leaving);
    }
    moving
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Address;
    use crate::source::watch::Whereabouts;

    #[test]
    fn slots_that_went_came_or_are_on_their_way_are_told() {
        let slots = |text: &str| text.parse::<SlotRanges>().unwrap();
        let shard = |serves: &str, leaving: &str| Whereabouts {
            master: Address::new("h", 1),
            replicas: Vec::new(),
            members: Default::default(),
            serves: slots(serves),
            leaving: slots(leaving),
            strange: SlotRanges::default(),
        };
        for (first, second, told) in [
            (shard("0-99", ""), shard("100-199", ""), ""),
            (shard("0-99", "7"), shard("100-199", ""), "7"),
            (shard("0-98", ""), shard("99-199", ""), "99"),
            (shard("0-98", ""), shard("100-199", "150-151"), "99,150-151"),
            (shard("0-99,300", ""), shard("100-199", ""), "300"),
        ] {
            let seen = Seen { shards: vec![first, second], ..Seen::default() };
            let moving = moved(&seen, &[slots("0-99"), slots("100-199")]);
            assert_eq!(moving, slots(told), "{told}");
        }
    }
}
