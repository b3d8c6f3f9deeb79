//! What a worker leaves out of its source's stream (PURE): keys of slots that are not its own, and keys that
//! wait to be copied again.

use std::collections::{BTreeMap, HashSet};

use crate::command::{CommandSpec, keys};
use crate::resp::Args;
use crate::resp::frame::each_frame;
use crate::slot::{SlotRanges, slot};
use crate::target::keys::PREFIX;

/// Keys that may wait at once, and what their names may take together.
const MOST_KEYS: usize = 200_000;
const MOST_BYTES: usize = 64 << 20;

/// More keys wait to be copied again than is kept in mind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

#[derive(Debug, Default)]
pub struct Gate {
    /// `None`: all, as the source is no cluster.
    owned: Option<SlotRanges>,
    /// By database of the target. What the stream does to them is left out, as they are about to be
    /// replaced; whatever shares a command with one of them becomes one, as it lacks that command.
    spoiled: BTreeMap<u64, HashSet<Vec<u8>>>,
    count: usize,
    bytes: usize,
    /// Some were spoiled by `doubt` since somebody asked.
    doubted: bool,
}

impl Gate {
    pub fn new(owned: Option<SlotRanges>) -> Self {
        Self { owned, ..Self::default() }
    }

    pub fn owned(&self) -> Option<&SlotRanges> {
        self.owned.as_ref()
    }

    pub fn set_owned(&mut self, owned: SlotRanges) {
        self.owned = Some(owned);
    }

    /// True when everything passes.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.count == 0 && self.owned.is_none()
    }

    pub fn owns(&self, key: &[u8]) -> bool {
        self.owned.as_ref().is_none_or(|owned| owned.contains(slot(key)))
    }

    pub fn spoil(&mut self, db: u64, key: Vec<u8>) {
        let length = key.len();
        // Keys of the tool's own are not of the data.
        if !key.starts_with(PREFIX) && self.spoiled.entry(db).or_default().insert(key) {
            self.count += 1;
            self.bytes += length;
        }
    }

    /// Keys of a command that may or may not stand.
    pub fn doubt(&mut self, db: u64, keys: Vec<Vec<u8>>) {
        self.doubted = true;
        keys.into_iter().for_each(|key| self.spoil(db, key));
    }

    pub fn take_doubted(&mut self) -> bool {
        std::mem::take(&mut self.doubted)
    }

    /// Databases that keys wait in.
    pub fn databases(&self) -> impl Iterator<Item = u64> + '_ {
        self.spoiled.iter().filter(|(_, keys)| !keys.is_empty()).map(|(db, _)| *db)
    }

    pub fn check(&self) -> Result<(), TooMany> {
        if self.count > MOST_KEYS || self.bytes > MOST_BYTES { Err(TooMany) } else { Ok(()) }
    }

    /// The key stands as the source has it.
    pub fn restored(&mut self, db: u64, key: &[u8]) {
        if self.spoiled.get_mut(&db).is_some_and(|keys| keys.remove(key)) {
            self.count -= 1;
            self.bytes -= key.len();
        }
    }

    pub fn forget_spoiled(&mut self) {
        self.spoiled.clear();
        (self.count, self.bytes) = (0, 0);
    }

    /// Those of `slots` only.
    pub fn forget_spoiled_of(&mut self, slots: &SlotRanges) {
        for keys in self.spoiled.values_mut() {
            keys.retain(|key| !slots.contains(slot(key)));
        }
        self.count = self.spoiled.values().map(HashSet::len).sum();
        self.bytes = self.spoiled.values().flatten().map(Vec::len).sum();
    }

    pub fn spoiled(&self) -> usize {
        self.count
    }

    /// Some of those that wait, all of one database, and of one slot where the source is a cluster: no more
    /// than `most`.
    pub fn some_spoiled(&self, most: usize) -> Option<(u64, Vec<Vec<u8>>)> {
        let (&db, keys) = self.spoiled.iter().find(|(_, keys)| !keys.is_empty())?;
        let one = self.owned.as_ref().and_then(|_| keys.iter().next()).map(|key| slot(key));
        let fits = keys.iter().filter(|key| one.is_none_or(|one| slot(key) == one));
        Some((db, fits.take(most).cloned().collect()))
    }

    /// True when the command is to be followed. `db`: of the target.
    pub fn admits(&mut self, spec: &CommandSpec, args: &Args<'_>, db: u64) -> bool {
        let (mut foreign, mut touched) = (false, false);
        let owned = self.owned.as_ref();
        let spoiled = self.spoiled.get(&db).filter(|keys| !keys.is_empty());
        // Keys that cannot be told are not looked for: such a command finds no slot either.
        let _ = keys(spec, args, &mut |index| {
            let key = args.arg(index).unwrap_or_default();
            foreign |= owned.is_some_and(|owned| !owned.contains(slot(key)));
            touched |= spoiled.is_some_and(|spoiled| spoiled.contains(key));
        });
        if !foreign && touched {
            let mut all = Vec::new();
            let _ = keys(spec, args, &mut |index| all.push(args.arg(index).unwrap_or_default().to_vec()));
            all.into_iter().for_each(|key| self.spoil(db, key));
        }
        !foreign && !touched
    }

    /// The same for keys that were found already.
    pub fn admits_keys(&mut self, db: u64, keys: Vec<Vec<u8>>) -> bool {
        let touched =
            self.spoiled.get(&db).is_some_and(|spoiled| keys.iter().any(|key| spoiled.contains(key)));
        if touched {
            keys.into_iter().for_each(|key| self.spoil(db, key));
        }
        !touched
    }
}

/// Keys of the data that the commands touch. `known`: what a command is that the table lacks.
pub fn keys_of_frames<'s>(
    frames: &[u8],
    known: impl Fn(&Args<'_>) -> Option<&'s CommandSpec>,
    found: &mut Vec<Vec<u8>>,
) {
    each_frame(frames, |args| match known(args) {
        // An error ends the list; the target refuses that command then.
        Some(spec) => {
            let _ = keys(spec, args, &mut |index| found.extend(args.arg(index).map(<[u8]>::to_vec)));
        }
        // Its first argument is its key, or it would not have found its slot.
        None => found.extend(args.arg(1).map(<[u8]>::to_vec)),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::lookup;
    use crate::resp::encode_command;
    use crate::resp::frame::{Parsed, parse_frame};

    fn admits(gate: &mut Gate, words: &[&str]) -> bool {
        let (mut frame, mut spans) = (Vec::new(), Vec::new());
        encode_command(words, &mut frame);
        assert!(matches!(parse_frame(&frame, &mut spans), Ok(Parsed::Command(_))));
        let args = Args { frame: &frame, spans: &spans };
        gate.admits(lookup(args.name()).unwrap(), &args, 0)
    }

    #[test]
    fn keys_of_other_slots_are_left_out() {
        let mut gate = Gate::new(Some([slot(b"mine")].into_iter().collect()));
        assert!(!gate.is_open());
        assert!(admits(&mut gate, &["INCR", "mine"]));
        assert!(!admits(&mut gate, &["INCR", "theirs"]));
        assert!(!admits(&mut gate, &["DEL", "mine", "theirs"]));
        assert!(admits(&mut gate, &["FLUSHALL"]), "what has no key is for everybody");
    }

    #[test]
    fn what_shares_a_command_with_a_spoiled_key_is_spoiled() {
        let mut gate = Gate::default();
        assert!(gate.is_open());
        gate.spoil(0, b"a".to_vec());
        assert!(admits(&mut gate, &["INCR", "b"]));
        assert!(!admits(&mut gate, &["SUNIONSTORE", "b", "c", "a"]));
        assert!(!admits(&mut gate, &["INCR", "b"]) && !admits(&mut gate, &["INCR", "c"]));
        assert_eq!(gate.spoiled(), 3);
        for key in ["a", "b", "c"] {
            gate.restored(0, key.as_bytes());
        }
        assert!(gate.is_open() && admits(&mut gate, &["INCR", "b"]));
    }

    #[test]
    fn a_cluster_is_asked_for_keys_of_one_slot() {
        let mut gate = Gate::new(Some(SlotRanges::all()));
        for key in ["{a}1", "{a}2", "{b}1", "{b}2"] {
            gate.spoil(0, key.as_bytes().to_vec());
        }
        let (_, keys) = gate.some_spoiled(10).unwrap();
        assert!(keys.len() == 2 && slot(&keys[0]) == slot(&keys[1]), "{keys:?}");
    }

    #[test]
    fn what_may_not_stand_is_left_out_from_there_on() {
        let mut gate = Gate::default();
        gate.doubt(3, vec![b"a".to_vec(), b"b".to_vec()]);
        assert!(gate.take_doubted() && !gate.take_doubted());
        assert_eq!((gate.spoiled(), gate.databases().collect::<Vec<_>>()), (2, vec![3]));
    }

    #[test]
    fn databases_do_not_mix() {
        let mut gate = Gate::default();
        gate.spoil(1, b"a".to_vec());
        assert!(admits(&mut gate, &["INCR", "a"]));
        assert_eq!(gate.some_spoiled(10), Some((1, vec![b"a".to_vec()])));
    }
}
