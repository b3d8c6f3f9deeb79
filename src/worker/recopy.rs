//! Copying keys again, each at one exact place of its source's stream.
//!
//! The source is asked for the keys together with its offset ([`source`]); the applier goes on to just there,
//! waits until nothing is under way, writes them ([`put`]) and goes on. Two need it:
//!
//! - a command that the target refused for a moment and that others, which cannot be repeated, have overtaken:
//!   what shares a key with them is *spoiled*;
//! - slots that moved between the source's shards. Each worker follows only the slots it *owns* ([`gate`]). One
//!   whose slot went elsewhere lets it go; when it has, the new owner *adopts* the slot: at one place of its
//!   stream the slot becomes its own with all its keys spoiled, and these are copied.
//!
//! What the stream does to a spoiled key is left out until it was copied.

pub mod gate;
pub mod put;
pub mod source;

use std::time::{Duration, Instant};

use gate::Gate;
use put::Value;
use source::Source;

use crate::backoff::Backoff;
use crate::slot::SlotRanges;

/// Keys asked for at once, and the bytes their values may take: the source does nothing else meanwhile.
pub const PORTION_KEYS: usize = 1000;
pub const PORTION_BYTES: u64 = 4 << 20;
/// The same where the source does not tell sizes.
pub const BLIND_KEYS: usize = 16;
/// Slots listed at once, as long as they hold no more than so many keys.
pub const LISTED_SLOTS: usize = 128;
pub const LISTED_KEYS: u64 = 50_000;
/// Keys that others overtook and that could not be copied for so long mean a full sync.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What waits for the applier to come to its place.
#[derive(Debug)]
pub enum Awaited {
    /// Keys of a database of the target, with what the source holds.
    Values { db: u64, values: Vec<(Vec<u8>, Option<Value>)> },
    /// Slots that become our own there; these keys of theirs are on the source or the target.
    Slots { slots: SlotRanges, keys: Vec<Vec<u8>> },
}

pub struct Recopy {
    pub gate: Gate,
    /// Slots that are being adopted: of those in the gate, the ones of which nobody may know yet.
    pub adopting: SlotRanges,
    /// What is kept of the slots in the target, or told to others, is not what the gate says.
    pub untold: bool,
    /// Those that were ours when the history began.
    pub first: Option<SlotRanges>,
    /// Rises with every change of the slots.
    pub version: u64,
    /// Spool position to stop at, and what for.
    pub awaited: Option<(u64, Awaited)>,
    /// The place lies in a transaction; the EXEC that has to follow was counted in.
    pub inside: bool,
    /// Spoiled keys without which the target's guards say too much: nobody may go on from here.
    pub overtaken: Option<Instant>,
    /// Slots are let go once the stream was followed up to here.
    pub let_go_at: Option<i64>,
    pub source: Option<Source>,
    /// The server that the link reads from is asked, not the master.
    pub by_link: bool,
    /// Keys of commands that were refused and not sent again yet.
    pub late: Vec<(u64, Vec<u8>)>,
    /// To be written with the next records: nobody may go on from before it.
    pub barrier: Option<i64>,
    /// Not asked again before this.
    pub resting: Option<Instant>,
    pub backoff: Backoff,
    /// Keys that were copied again.
    pub copied: u64,
}

impl Recopy {
    pub fn new(owned: Option<SlotRanges>, version: u64) -> Self {
        Self {
            first: owned.clone(),
            gate: Gate::new(owned),
            adopting: SlotRanges::default(),
            untold: true,
            version,
            awaited: None,
            inside: false,
            overtaken: None,
            let_go_at: None,
            source: None,
            by_link: false,
            late: Vec::new(),
            barrier: None,
            resting: None,
            backoff: Backoff::default(),
            copied: 0,
        }
    }

    /// Position that must not be passed without stopping there.
    #[inline]
    pub fn stop_at(&self) -> u64 {
        self.awaited.as_ref().map_or(u64::MAX, |(at, _)| *at)
    }

    /// The slots that are known to be ours for good.
    pub fn settled(&self) -> Option<SlotRanges> {
        self.gate.owned().map(|owned| owned.without(&self.adopting))
    }

    /// Goes back to what is settled: what was being adopted is asked for anew. Keys that others overtook stay
    /// spoiled unless `all` is copied again.
    pub fn abandon(&mut self, all: bool) {
        if let Some(settled) = self.settled() {
            self.gate.set_owned(settled);
        }
        if all {
            self.gate.forget_spoiled();
            self.overtaken = None;
            self.late.clear();
            self.barrier = None;
        } else {
            self.gate.forget_spoiled_of(&self.adopting);
        }
        self.adopting = SlotRanges::default();
        self.awaited = None;
        self.inside = false;
        self.untold = true;
    }

    /// A target that fell back may have lost what was copied, and with it the word that the slots are ours: those
    /// are adopted again. `kept`: the slots that it tells.
    pub fn fall_back(&mut self, kept: Option<&SlotRanges>) {
        let Some(kept) = kept.or(self.first.as_ref()) else { return };
        if let Some(owned) = self.gate.owned() {
            let left = owned.iter().filter(|slot| kept.contains(*slot)).collect();
            self.gate.set_owned(left);
        }
    }

    pub fn rests(&mut self) -> bool {
        match self.resting {
            Some(until) if Instant::now() < until => true,
            _ => {
                self.resting = None;
                false
            }
        }
    }

    /// The source could not be asked.
    pub fn rest(&mut self) {
        self.source = None;
        self.resting = Some(Instant::now() + self.backoff.pause());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_a_target_lost_with_a_failover_are_not_ours_any_more() {
        let slots = |text: &str| text.parse::<SlotRanges>().unwrap();
        let mut recopy = Recopy::new(Some(slots("0-9")), 0);
        recopy.gate.set_owned(slots("0-4,20"));
        // 5-9 were let go, which stays so; 20 was adopted, which the target does not know any more.
        recopy.fall_back(Some(&slots("0-9")));
        assert_eq!(recopy.settled(), Some(slots("0-4")));
        recopy.gate.set_owned(slots("0-4,20"));
        recopy.fall_back(Some(&slots("0-4,20")));
        assert_eq!(recopy.settled(), Some(slots("0-4,20")));
        recopy.fall_back(None);
        assert_eq!(recopy.settled(), Some(slots("0-4")));
    }
}
