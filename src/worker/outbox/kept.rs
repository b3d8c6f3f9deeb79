//! What goes out with the data so that nothing is applied twice (PURE).

use crate::slot::SLOT_COUNT;
use crate::target::keys::KeyNames;

/// What is kept in the target beside the data, with `delivery: ExactlyOnce`.
#[derive(Debug)]
pub struct Kept {
    pub names: KeyNames,
    /// The full sync that all of it belongs to.
    pub history: u64,
    /// Replication offset minus spool position.
    pub shift: i64,
    pub(super) at: Vec<u8>,
    pub(super) chain: Vec<u8>,
    /// Key and value.
    pub(super) epoch: (Vec<u8>, Vec<u8>),
    /// Batches go out as a chain: the stream to a single server.
    pub(super) chained: bool,
    /// Units of a slot that end here or before were applied by an earlier attempt; empty: none were.
    guards: Vec<u64>,
    /// Of the units before that of its guard, some may not have been applied.
    doubtful: bool,
    /// No guard lies behind this position.
    guarded_to: u64,
    /// By slot, where the last unit ends that was sent with a guard; empty: none was.
    sent_guarded: Vec<u64>,
}

impl Kept {
    pub fn new(names: KeyNames, epoch: u64, history: u64) -> Self {
        let (at, chain) = (names.at(0), names.chain());
        let epoch = (names.epoch(0), epoch.to_string().into_bytes());
        let guards = Vec::new();
        Self {
            names,
            history,
            shift: 0,
            at,
            chain,
            epoch,
            chained: false,
            guards,
            doubtful: false,
            guarded_to: 0,
            sent_guarded: Vec::new(),
        }
    }

    /// A unit of the slot goes out with its guard.
    pub(super) fn send_guarded(&mut self, slot: u16, end: u64) {
        self.sent_guarded.resize(usize::from(SLOT_COUNT), 0);
        if let Some(sent) = self.sent_guarded.get_mut(usize::from(slot)) {
            *sent = end;
        }
    }

    /// Where the last unit of the slot ends that went out with its guard.
    pub(super) fn sent_guarded(&self, slot: u16) -> u64 {
        self.sent_guarded.get(usize::from(slot)).copied().unwrap_or_default()
    }

    pub(super) fn forget_sent(&mut self) {
        self.sent_guarded.clear();
    }

    /// `guards`: slot, history and offset, as they were found on the target. `doubtful`: what is before them may
    /// have been refused.
    pub fn set_guards(&mut self, guards: &[(u16, u64, i64)], doubtful: bool) {
        self.guards.clear();
        self.doubtful = doubtful;
        self.guarded_to = 0;
        for &(slot, history, offset) in guards {
            let position = u64::try_from(offset.saturating_sub(self.shift)).unwrap_or_default();
            if history != self.history || position == 0 || slot >= SLOT_COUNT {
                continue;
            }
            self.guards.resize(usize::from(SLOT_COUNT), 0);
            if let Some(guard) = self.guards.get_mut(usize::from(slot)) {
                *guard = position.max(*guard);
            }
            self.guarded_to = self.guarded_to.max(position);
        }
    }

    pub(super) fn is_guarded(&self, slot: u16, end: u64) -> bool {
        end <= self.guarded_to && self.guards.get(usize::from(slot)).is_some_and(|guard| end <= *guard)
    }

    /// Its guard says of the unit that it stands, but was set by a later one.
    pub(super) fn is_doubtful(&self, slot: u16, end: u64) -> bool {
        self.doubtful && self.guards.get(usize::from(slot)).is_some_and(|guard| end < *guard)
    }

    pub fn offset(&self, position: u64) -> i64 {
        position as i64 + self.shift
    }
}
