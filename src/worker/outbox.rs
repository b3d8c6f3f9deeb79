//! What is on its way to the target: the commands gathered for each lane, the batches that are not yet
//! answered, and the marks that tell from where to replay.
//!
//! A *mark* is a place in the spool between two units, together with the decoder's state there. It becomes
//! the acknowledged place once every lane has answered everything that was sent before it.

mod kept;

use std::collections::VecDeque;

use tokio::sync::mpsc;

use crate::resp::{array_header, bulk};
use crate::target::chain;
use crate::target::keys::append_guard_value;
use crate::target::lane::{BATCHES_IN_WINDOW, Batch, Exception, Lane, LaneError, LaneReport, batch_of};

pub use kept::Kept;

/// A lane's batch is sent when it holds this much.
const BATCH_BYTES: usize = 64 << 10;
/// Buffers kept for reuse; larger ones are given back to the allocator.
const FREE_BUFFERS: usize = 16;
const LARGEST_FREE: usize = 2 * BATCH_BYTES;
/// Lanes hand in at most this many reports before they wait; the applier always drains them.
pub const REPORTS: usize = 64;

/// Commands gathered for one lane.
#[derive(Debug, Default)]
pub struct Pending {
    pub bytes: Vec<u8>,
    pub commands: u32,
    /// The database that the lane will be in behind these commands; `None`: not known.
    db: Option<u64>,
    /// The same before the first of them.
    first_db: Option<u64>,
    /// Of a chained batch: how many of the commands come before the first of the stream.
    head: u32,
    /// The batch does away with the chain's tokens.
    unchains: bool,
}

impl Pending {
    /// The buffer to append exactly one command to.
    pub fn command(&mut self) -> &mut Vec<u8> {
        self.commands += 1;
        &mut self.bytes
    }

    /// The buffer to append `count` commands to.
    pub fn commands(&mut self, count: u32) -> &mut Vec<u8> {
        self.commands += count;
        &mut self.bytes
    }

    /// In which database the lane will be is not certain any more.
    pub fn forget_db(&mut self) {
        self.db = None;
    }

    /// Makes the commands that follow run in `db`.
    pub fn select(&mut self, db: u64) {
        if self.db == Some(db) {
            return;
        }
        self.db = Some(db);
        let out = self.command();
        array_header(2, out);
        bulk(b"SELECT", out);
        bulk(itoa::Buffer::new().format(db).as_bytes(), out);
    }
}

/// A batch under way, as the outbox remembers it.
#[derive(Clone, Copy, Debug)]
struct Sent {
    sequence: u64,
    /// Spool position behind its last unit.
    end: u64,
    /// All of it stands on the target.
    done: bool,
}

#[derive(Debug, Default)]
struct Slot {
    lane: Option<Lane>,
    pending: Pending,
    /// Batches sent and not done, or behind one that is not done.
    sent: VecDeque<Sent>,
    /// Batches sent and not answered.
    unanswered: usize,
    last_sequence: u64,
    /// Every batch up to this one is done.
    answered: u64,
    /// Everything for this lane before this spool position is applied.
    applied_to: u64,
    /// Units that end here or before were applied by an earlier attempt.
    skip_to: u64,
    /// Answers are looked at even when nothing is wrong with them: something before them is.
    held: bool,
    /// Batches up to this one belong to a history that is over: only that they are answered matters.
    void_to: u64,
}

struct Mark<S> {
    state: S,
    sequences: Vec<u64>,
}

/// A batch with answers that need attention.
#[derive(Debug)]
pub struct Trouble {
    pub lane: usize,
    pub batch: Batch,
    pub exceptions: Vec<Exception>,
}

/// What a report meant.
#[derive(Debug)]
pub enum Heard {
    /// All well; marks may have been reached.
    Fine,
    Trouble(Trouble),
    Lost {
        lane: usize,
        error: LaneError,
    },
}

pub struct Outbox<S> {
    slots: Vec<Slot>,
    marks: VecDeque<Mark<S>>,
    reports: mpsc::Receiver<LaneReport>,
    pub reporter: mpsc::Sender<LaneReport>,
    free: Vec<Vec<u8>>,
    batch_commands: u32,
    /// Batches are those of a full sync.
    bulk: bool,
    /// Smaller ones, for a pace.
    most_commands: u32,
    most_bytes: usize,
    /// The first lane whose pending commands fill a batch.
    full: Option<usize>,
    pub batches: u64,
    /// Batches that were answered and need nothing more.
    pub done: u64,
    /// `None`: nothing is kept in the target.
    pub kept: Option<Kept>,
}

impl<S> Outbox<S> {
    /// `pipeline_commands`: commands a lane may have under way; a batch is a fraction of it.
    pub fn new(pipeline_commands: usize) -> Self {
        let (reporter, reports) = mpsc::channel(REPORTS);
        Self {
            slots: Vec::new(),
            marks: VecDeque::new(),
            reports,
            reporter,
            free: Vec::new(),
            batch_commands: u32::try_from(batch_of(pipeline_commands)).unwrap_or(u32::MAX),
            bulk: false,
            most_commands: u32::MAX,
            most_bytes: BATCH_BYTES,
            full: None,
            batches: 0,
            done: 0,
            kept: None,
        }
    }

    /// Lanes without connections.
    #[cfg(test)]
    pub fn with_lanes(lanes: usize) -> Self {
        let mut outbox = Self::new(64);
        outbox.slots.resize_with(lanes, Slot::default);
        outbox
    }

    /// Whether batches are of a full sync. Large ones spare the servers that share a machine many switches.
    pub fn set_bulk(&mut self, bulk: bool) {
        self.bulk = bulk;
    }

    /// Batches are no larger than this, and no larger than they would be anyway.
    pub fn limit_batches(&mut self, commands: u64, bytes: u64) {
        self.most_commands = u32::try_from(commands).unwrap_or(u32::MAX);
        self.most_bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(BATCH_BYTES);
    }

    pub fn lanes(&self) -> usize {
        self.slots.len()
    }

    /// Makes room for so many lanes; they are not open by that.
    pub fn reserve_lanes(&mut self, lanes: usize) {
        if self.slots.len() < lanes {
            self.slots.resize_with(lanes, Slot::default);
        }
    }

    /// Puts a lane in place; what an earlier one at this index left behind is forgotten.
    pub fn set_lane(&mut self, index: usize, lane: Lane) {
        while self.slots.len() <= index {
            self.slots.push(Slot::default());
        }
        if let Some(slot) = self.slots.get_mut(index) {
            slot.lane = Some(lane);
            slot.pending.db = None;
            slot.pending.first_db = None;
        }
    }

    /// Where the commands of a lane gather; in front of the first of a chained batch stands what chains it.
    #[inline]
    pub fn pending(&mut self, lane: usize) -> Option<&mut Pending> {
        Some(opened(self.slots.get_mut(lane)?, self.kept.as_ref()))
    }

    /// True while batches take effect in order or not at all.
    pub fn is_chained(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.chained)
    }

    /// From now on batches are chained; `begin` and `rewind` end that. Nothing may be pending. The tokens
    /// go out as a batch of their own, which has to be answered before the next.
    pub fn start_chain(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        kept.chained = true;
        for slot in &mut self.slots {
            let pending = &mut slot.pending;
            pending.select(chain::DATABASE);
            pending.commands += chain::seed(&kept.chain, slot.last_sequence + 2, &mut pending.bytes);
        }
    }

    /// The lane's batch does away with the chain's tokens (FLUSHALL, SWAPDB): it puts them back itself.
    pub fn unchains(&mut self, lane: usize) {
        if let Some(slot) = self.slots.get_mut(lane) {
            slot.pending.unchains = true;
        }
    }

    /// Appends one unit of the stream, `count` commands that end at spool position `end`. With `guard`,
    /// the unit's slot, it is applied once however often it is sent: in one transaction with its guard.
    pub fn append(
        &mut self,
        lane: usize,
        db: u64,
        (frames, count): (&[u8], u32),
        guard: Option<u16>,
        end: u64,
    ) {
        let kept = self.kept.as_ref();
        let Some(slot) = self.slots.get_mut(lane) else { return };
        let pending = opened(slot, kept);
        pending.select(db);
        match guard.zip(kept) {
            None => pending.commands(count).extend_from_slice(frames),
            Some((slot, kept)) => {
                let out = pending.commands(count + 4);
                out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
                // While the slot moves, a node has some of its keys and refuses others; a guard must not stand
                // when a command before it was refused. No node has this key, so all of these are refused.
                out.extend_from_slice(b"*2\r\n$6\r\nEXISTS\r\n");
                kept.names.append_none(slot, out);
                out.extend_from_slice(frames);
                out.extend_from_slice(b"*3\r\n$3\r\nSET\r\n");
                kept.names.append_guard(slot, out);
                append_guard_value(kept.history, kept.offset(end), out);
                out.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
            }
        }
        if let Some((slot, kept)) = guard.zip(self.kept.as_mut()) {
            kept.send_guarded(slot, end);
        }
        self.note(lane);
    }

    /// True while a unit of the slot is under way that must not be applied twice. While the slot moves it is refused,
    /// whatever keys it has; one that overtook it would change what it finds, so that it needs a guard as well.
    pub fn follows_guarded(&self, lane: usize, slot: u16) -> bool {
        let Some(kept) = self.kept.as_ref().filter(|kept| !kept.chained) else { return false };
        self.slots.get(lane).is_some_and(|lane| kept.sent_guarded(slot) > lane.applied_to)
    }

    /// Appends how far this shard has come on the lane's node, under the name for `slot`.
    pub fn append_record(&mut self, lane: usize, slot: u16, record: &[u8]) {
        let Some(key) = self.kept.as_ref().map(|kept| kept.names.at(slot)) else { return };
        let Some(pending) = self.slots.get_mut(lane).map(|slot| &mut slot.pending) else { return };
        if pending.db.is_none() {
            pending.select(0);
        }
        let out = pending.command();
        array_header(3, out);
        for word in [b"SET".as_slice(), &key, record] {
            bulk(word, out);
        }
    }

    /// Appends something else that is kept beside the data. To a chain it belongs as the data do.
    pub fn append_kept(&mut self, lane: usize, key: &[u8], value: &[u8]) {
        let Some(pending) = self.pending(lane) else { return };
        pending.select(0);
        let out = pending.command();
        array_header(3, out);
        for word in [b"SET".as_slice(), key, value] {
            bulk(word, out);
        }
    }

    /// False for a node that serves nothing any more.
    pub fn has_lane(&self, lane: usize) -> bool {
        self.slots.get(lane).is_some_and(|slot| slot.lane.is_some())
    }

    /// To be called after units were appended; cheap.
    pub fn note(&mut self, lane: usize) {
        let whole = if self.bulk { BATCHES_IN_WINDOW as u32 } else { 1 };
        if let Some(slot) = self.slots.get(lane)
            && (slot.pending.bytes.len() >= self.most_bytes
                || slot.pending.commands >= self.batch_commands.saturating_mul(whole)
                || slot.pending.commands.saturating_sub(slot.pending.head) >= self.most_commands)
        {
            self.full = Some(lane);
        }
    }

    /// A lane whose batch should go now.
    pub fn full(&self) -> Option<usize> {
        self.full
    }

    /// True when this lane had the unit that ends at `end` applied before the last replay began.
    pub fn is_applied(&self, lane: usize, slot: Option<u16>, end: u64) -> bool {
        self.slots.get(lane).is_some_and(|lane| end <= lane.skip_to)
            || slot.zip(self.kept.as_ref()).is_some_and(|(slot, kept)| kept.is_guarded(slot, end))
    }

    /// True when a unit that `is_applied` may not have been, all the same.
    pub fn is_doubtful(&self, lane: usize, slot: u16, end: u64) -> bool {
        self.slots.get(lane).is_some_and(|lane| end > lane.skip_to)
            && self.kept.as_ref().is_some_and(|kept| kept.is_doubtful(slot, end))
    }

    pub fn has_pending(&self) -> bool {
        self.slots.iter().any(|slot| slot.pending.commands > 0)
    }

    pub fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.unanswered == 0 || slot.lane.is_none())
    }

    /// True while every lane has at most one batch under way: worth sending small batches.
    pub fn is_quick(&self) -> bool {
        self.slots.iter().all(|slot| slot.unanswered < 2)
    }

    /// Takes the pending commands of `lane` as a batch; `end`: spool position behind its last unit;
    /// `record`: what a chained batch leaves under `at`.
    pub fn take_batch(&mut self, lane: usize, end: u64, record: &[u8]) -> Option<Batch> {
        if self.full == Some(lane) {
            self.full = None;
        }
        let free = self.free.pop().unwrap_or_default();
        let slot = self.slots.get_mut(lane)?;
        if slot.pending.commands == 0 {
            return None;
        }
        slot.last_sequence += 1;
        let sequence = slot.last_sequence;
        slot.sent.push_back(Sent { sequence, end, done: false });
        slot.unanswered += 1;
        let pending = &mut slot.pending;
        // The batch that brings the tokens has no head.
        if let Some(kept) = self.kept.as_ref().filter(|_| pending.head > 0) {
            let (epoch, value) = &kept.epoch;
            let again = std::mem::take(&mut pending.unchains).then_some((epoch.as_slice(), value.as_slice()));
            let record = (kept.at.as_slice(), record);
            pending.commands +=
                chain::close(&kept.chain, sequence, record, pending.db, again, &mut pending.bytes);
        }
        let head = std::mem::take(&mut pending.head);
        let commands = std::mem::take(&mut pending.commands);
        let db = std::mem::replace(&mut pending.first_db, pending.db);
        self.batches += 1;
        Some(Batch {
            bytes: std::mem::replace(&mut pending.bytes, free),
            commands,
            sequence,
            db,
            head,
            bulk: self.bulk,
        })
    }

    /// Hands a batch to its lane, and meanwhile takes reports, as lanes wait until theirs are taken.
    /// False: the lane is over; its report follows.
    pub async fn send(&mut self, lane: usize, batch: Batch, heard: &mut Vec<Heard>) -> bool {
        // The lane is taken out meanwhile, so that reports can be worked into the rest.
        let Some(sender) = self.slots.get_mut(lane).and_then(|slot| slot.lane.take()) else { return false };
        let mut lost = false;
        let sent = loop {
            tokio::select! {
                // Reports first: where a place is always free, nothing else would take them, and what stands would
                // seem to lie far back.
                biased;
                report = self.reports.recv() => {
                    if let Some(report) = report {
                        let what = self.hear(report);
                        lost |= matches!(what, Heard::Lost { lane: which, .. } if which == lane);
                        if !matches!(what, Heard::Fine) {
                            heard.push(what);
                        }
                    }
                }
                place = sender.place() => match place {
                    Some(place) => {
                        place.send(batch);
                        break true;
                    }
                    None => break false,
                },
            }
        };
        if let Some(slot) = self.slots.get_mut(lane).filter(|_| !lost) {
            slot.lane = Some(sender);
        }
        sent
    }

    /// Waits for the next report. Cancel-safe.
    pub async fn report(&mut self) -> LaneReport {
        match self.reports.recv().await {
            Some(report) => report,
            // Cannot happen: this struct holds a sender.
            None => std::future::pending().await,
        }
    }

    pub fn hear(&mut self, report: LaneReport) -> Heard {
        match report {
            LaneReport::Answered { lane, batch, exceptions } => {
                if let Some(slot) = self.slots.get_mut(lane) {
                    slot.unanswered = slot.unanswered.saturating_sub(1);
                }
                let void = self.slots.get(lane).is_some_and(|slot| batch.sequence <= slot.void_to);
                let held = self.slots.get(lane).is_some_and(|slot| slot.held);
                if void || (exceptions.is_empty() && !held) {
                    self.answered(lane, batch);
                    Heard::Fine
                } else {
                    Heard::Trouble(Trouble { lane, batch, exceptions })
                }
            }
            LaneReport::Lost { lane, error } => {
                if let Some(slot) = self.slots.get_mut(lane) {
                    slot.lane = None;
                }
                Heard::Lost { lane, error }
            }
        }
    }

    /// From now on every answer of this lane comes as [`Heard::Trouble`].
    pub fn hold(&mut self, lane: usize, held: bool) {
        if let Some(slot) = self.slots.get_mut(lane) {
            slot.held = held;
        }
    }

    pub fn holds(&self, lane: usize) -> bool {
        self.slots.get(lane).is_some_and(|slot| slot.held)
    }

    /// The batch stands on the target, or what does not was set aside.
    pub fn answered(&mut self, lane: usize, batch: Batch) {
        self.done += 1;
        let Some(slot) = self.slots.get_mut(lane) else { return };
        if let Some(sent) = slot.sent.iter_mut().find(|sent| sent.sequence == batch.sequence) {
            sent.done = true;
        }
        while let Some(sent) = slot.sent.front().copied().filter(|sent| sent.done) {
            slot.answered = sent.sequence;
            slot.applied_to = slot.applied_to.max(sent.end);
            slot.sent.pop_front();
        }
        let mut bytes = batch.bytes;
        if self.free.len() < FREE_BUFFERS && bytes.capacity() <= LARGEST_FREE {
            bytes.clear();
            self.free.push(bytes);
        }
    }

    /// Remembers `state` as a place to replay from, once all that was sent so far is answered.
    /// Pending commands must have been sent.
    pub fn mark(&mut self, state: S) {
        let sequences = self.slots.iter().map(|slot| slot.last_sequence).collect();
        self.marks.push_back(Mark { state, sequences });
    }

    /// The newest mark that every lane has reached, if any is newly reached.
    pub fn reached(&mut self) -> Option<S> {
        let mut newest = None;
        while let Some(mark) = self.marks.front() {
            let reached =
                self.slots.iter().zip(&mark.sequences).all(|(slot, &sequence)| slot.answered >= sequence);
            if !reached {
                break;
            }
            newest = self.marks.pop_front().map(|mark| mark.state);
        }
        newest
    }

    /// Everything not answered is forgotten, as it will be replayed. With `keep_applied`, units that a
    /// lane is known to have applied are skipped then.
    pub fn rewind(&mut self, keep_applied: bool) {
        self.marks.clear();
        self.full = None;
        // A lane that is just being ended may yet hand in a report, which must not be taken for one of
        // its successor: nobody reads that channel any more.
        (self.reporter, self.reports) = mpsc::channel(REPORTS);
        for slot in &mut self.slots {
            slot.lane = None;
            slot.held = false;
            slot.pending = Pending::default();
            slot.sent.clear();
            slot.unanswered = 0;
            slot.answered = slot.last_sequence;
            slot.skip_to = if keep_applied { slot.applied_to } else { 0 };
        }
        if let Some(kept) = &mut self.kept {
            kept.chained = false;
        }
    }

    /// Which lane has applied what is of no account any more: slots changed hands.
    pub fn apply_again(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.skip_to = 0);
    }

    /// A new history begins: spool positions start again, and nothing gathered or marked is of account.
    pub fn begin(&mut self) {
        self.marks.clear();
        self.full = None;
        for slot in &mut self.slots {
            let db = slot.pending.first_db;
            slot.pending = Pending { db, first_db: db, ..Pending::default() };
            slot.applied_to = 0;
            slot.skip_to = 0;
            slot.void_to = slot.last_sequence;
            // Their places are of the old history and say nothing about the new one.
            slot.sent.iter_mut().for_each(|sent| sent.end = 0);
        }
        if let Some(kept) = &mut self.kept {
            kept.chained = false;
            kept.set_guards(&[], false);
            kept.forget_sent();
        }
    }
}

/// Where the slot's commands gather, begun as [`Outbox::pending`] says.
#[inline]
fn opened<'a>(slot: &'a mut Slot, kept: Option<&Kept>) -> &'a mut Pending {
    let pending = &mut slot.pending;
    if pending.commands == 0
        && let Some(kept) = kept.filter(|kept| kept.chained)
    {
        pending.head = chain::open(&kept.chain, slot.last_sequence + 1, pending.db, &mut pending.bytes);
        pending.commands = pending.head;
        pending.db = pending.db.or(Some(chain::DATABASE));
    }
    pending
}

#[cfg(test)]
mod tests;
