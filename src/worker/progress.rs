//! What a shard worker tells about itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::repair::Refusal;
use crate::clock::unix_millis;
use crate::loss::Loss;
use crate::slot::SlotRanges;
use crate::source::replication::LinkState;
use crate::source::scan::ScanProgress;
use crate::spool::{Full, SpoolGauges, SpoolView};
use crate::target::fence::Held;

/// Refused commands that are described; all are counted.
const SAMPLES: usize = 20;
/// A worker that has told nothing for so long is kept waiting by the target.
const STALE: Duration = Duration::from_millis(500);

/// Where a shard stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum ShardPhase {
    #[default]
    Pending,
    FullSync,
    IncrementalSync,
}

/// Numbers of one shard at one moment. All are monotonic within one full sync.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Numbers {
    pub phase: ShardPhase,
    /// The worker is over; the numbers stay as it left them.
    pub stopped: bool,
    pub replication_id: String,
    /// Keys of the snapshot that stand on the target.
    pub keys: u64,
    /// Keys that the snapshot announced.
    pub keys_total: u64,
    /// Bytes of a written file that were read back.
    pub read_back: u64,
    /// Commands of the stream that stand on the target.
    pub commands: u64,
    /// Keys of the snapshot, and commands of the stream, that the filter left out; commands also in part.
    pub keys_filtered: u64,
    pub commands_filtered: u64,
    /// Bytes of the RDB decoded.
    pub snapshot_read: u64,
    /// Offset received, and acknowledged by the target. Both 0 until the snapshot stands.
    pub received_offset: i64,
    pub applied_offset: i64,
    pub lag_bytes: u64,
    pub lag_millis: u64,
    pub sent_bytes: u64,
    pub batches: u64,
    pub target_reconnects: u64,
    pub spool_memory: u64,
    pub spool_disk: u64,
    pub spool_full: bool,
    /// What the spool waits for, when it is full.
    pub why_full: Option<Full>,
    /// Keys left as they were on the target (`existingKeys: Skip`).
    pub keys_skipped: u64,
    /// Keys left out because their time was over (`RdbFile`).
    pub keys_expired: u64,
    pub quarantined: u64,
    /// These by kind, and what was lost of data that stand.
    pub kinds: BTreeMap<Loss, u64>,
    /// Keys on the target do not have their own expiries, see `hold`.
    pub holding: bool,
    /// Keys and fields that got their own expiries back.
    pub released: u64,
    /// Keys that were copied again for an order, and the last order that was done.
    pub repaired: u64,
    pub orders_done: u64,
    /// What the worker waits for, empty when it does not.
    pub waiting: String,
    /// Of a worker in this process.
    #[serde(skip)]
    pub told: Option<Told>,
}

/// When a worker told its numbers, and of what in its spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    pub when: Instant,
    pub history: u64,
    /// Up to where the spool was filled then.
    pub end: u64,
    /// Up to where it stood on the target.
    pub stands: u64,
}

impl Numbers {
    /// What the spool holds, of which all before `stands` stands on the target. `arrived`: Unix ms at which
    /// the byte there came.
    pub fn of_spool(&mut self, spool: SpoolGauges, stands: u64, arrived: Option<u64>) {
        self.spool_memory = spool.memory_bytes;
        self.spool_disk = spool.disk_bytes;
        self.spool_full = spool.full;
        self.why_full = spool.why_full;
        (self.lag_bytes, self.lag_millis) = lag(spool.end, stands, arrived);
    }

    /// With what has arrived since the worker told them: while the target takes nothing, nobody tells.
    fn brought_up_to_date(mut self, spool: &SpoolView) -> Self {
        let Some(Told { when, history, end, stands }) = self.told else { return self };
        if self.stopped || when.elapsed() < STALE {
            return self;
        }
        let Some((gauges, arrived)) = spool.look(history, stands) else { return self };
        if self.phase == ShardPhase::IncrementalSync {
            self.received_offset =
                self.received_offset.saturating_add_unsigned(gauges.end.saturating_sub(end));
        }
        self.of_spool(gauges, stands, arrived);
        self
    }
}

/// Bytes that do not stand on the target, and the age of the oldest in ms.
pub fn lag(end: u64, stands: u64, arrived: Option<u64>) -> (u64, u64) {
    let bytes = end.saturating_sub(stands);
    match arrived {
        Some(arrived) if bytes > 0 => (bytes, unix_millis().saturating_sub(arrived)),
        _ => (bytes, 0),
    }
}

/// Keys that were found to differ, by the source's database. Those of other shards are among them.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Rises with each order; 0: none.
    pub number: u64,
    pub keys: Arc<Vec<(u64, Vec<u8>)>>,
}

/// A command or key set aside.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Quarantined {
    pub offset: i64,
    pub db: u64,
    pub refusal: Refusal,
}

/// Which slots of a source cluster a worker follows.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Following {
    /// False until the worker has found out.
    pub known: bool,
    /// Stand on the target, or will by what the worker does anyway.
    pub slots: SlotRanges,
    /// How often slots were copied for having moved.
    pub adoptions: u64,
    /// Why slots that are wanted cannot be copied; empty when nothing is known to be wrong.
    pub failure: String,
}

/// In which process a worker runs, as those see it who follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The process's name; empty: this one.
    pub worker: String,
    /// How often it was given to another process.
    pub moves: u64,
    /// Nothing can be heard of it now, though it may go on.
    pub silent: bool,
}

/// What a worker in another process is asked, as what it tells by itself may be some seconds old: to tell
/// its numbers once it has come so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Asked {
    /// Counts the questions.
    pub number: u64,
    /// `None`: once everything that was received is applied.
    pub offset: Option<i64>,
}

/// Shared between a worker and those who report on it.
#[derive(Debug)]
pub struct ShardProgress {
    pub numbers: watch::Sender<Numbers>,
    pub link: watch::Sender<LinkState>,
    /// Where the source is scanned.
    pub scan: Arc<ScanProgress>,
    /// Set when the keys on the target are to get their own expiries back.
    pub release: watch::Sender<bool>,
    /// Keys that are to be copied again.
    pub repair: watch::Sender<Order>,
    quarantine: Mutex<Vec<Quarantined>>,
    spool: Mutex<SpoolView>,
    /// Of a source cluster.
    pub following: watch::Sender<Following>,
    /// Which slots the worker shall follow; `None`: as it does.
    pub wanted: watch::Sender<Option<SlotRanges>>,
    pub seat: watch::Sender<Seat>,
    /// The newest question to a worker elsewhere.
    pub asked: watch::Sender<Asked>,
    /// The newest question that `numbers` answers.
    pub answered: watch::Sender<u64>,
    /// On the target, of the last worker in this process.
    pub epoch: Held,
}

impl ShardProgress {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            numbers: watch::Sender::default(),
            link: watch::Sender::default(),
            scan: Arc::default(),
            release: watch::Sender::default(),
            repair: watch::Sender::default(),
            quarantine: Mutex::default(),
            spool: Mutex::default(),
            following: watch::Sender::default(),
            wanted: watch::Sender::default(),
            seat: watch::Sender::default(),
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
            epoch: Held::default(),
        })
    }

    /// The numbers now.
    pub fn now(&self) -> Numbers {
        let spool = self.spool.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.numbers.borrow().clone().brought_up_to_date(&spool)
    }

    /// The worker's spool from now on.
    pub fn look_at(&self, spool: SpoolView) {
        *self.spool.lock().unwrap_or_else(PoisonError::into_inner) = spool;
    }

    /// Counted by the caller in `numbers`; the first few are kept.
    pub fn quarantine(&self, entry: Quarantined) {
        let mut list = self.lock();
        if list.len() < SAMPLES {
            list.push(entry);
        }
    }

    /// Adds what an earlier run told is lacking, by the kinds' names.
    pub fn has_lacked(&self, told: &BTreeMap<String, i64>) {
        let known = |(name, count): (&String, &i64)| Some((Loss::named(name)?, u64::try_from(*count).ok()?));
        self.numbers.send_modify(|numbers| {
            for (kind, count) in told.iter().filter_map(known) {
                let before = numbers.kinds.entry(kind).or_default();
                *before = before.saturating_add(count);
                if !kind.is_only_expiry() {
                    numbers.quarantined = numbers.quarantined.saturating_add(count);
                }
            }
        });
    }

    /// All is copied anew, what was lacking included.
    pub fn lacks_nothing(&self) {
        self.lock().clear();
    }

    /// What an earlier worker set aside is still lacking, unless all is copied `anew`.
    pub fn lacking(&self, anew: bool) -> (u64, BTreeMap<Loss, u64>) {
        let numbers = self.numbers.borrow();
        if anew { (0, BTreeMap::new()) } else { (numbers.quarantined, numbers.kinds.clone()) }
    }

    /// Asks a worker elsewhere for numbers of now; 0: it is here, and its numbers are.
    pub fn ask(&self, offset: Option<i64>) -> u64 {
        if self.seat.borrow().worker.is_empty() {
            return 0;
        }
        self.asked.send_modify(|asked| *asked = Asked { number: asked.number + 1, offset });
        self.asked.borrow().number
    }

    /// Whether the numbers are at least as new as the answer to that question.
    pub fn has_answered(&self, number: u64) -> bool {
        *self.answered.borrow() >= number || self.seat.borrow().worker.is_empty()
    }

    /// What was told of a worker elsewhere takes the place of what was known.
    pub fn replace_quarantined(&self, mut entries: Vec<Quarantined>) {
        entries.truncate(SAMPLES);
        *self.lock() = entries;
    }

    pub fn quarantined(&self) -> Vec<Quarantined> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Quarantined>> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_earlier_runs_told_is_lacking_adds_up() {
        let told = [("Commands", 2), ("Values", 1), ("FieldExpiry", 7), ("Unheard", 3), ("Streams", -1)];
        let told: BTreeMap<String, i64> =
            told.into_iter().map(|(kind, count)| (kind.to_owned(), count)).collect();
        let progress = ShardProgress::new();
        progress.has_lacked(&told);
        progress.has_lacked(&[("Values".to_owned(), 4)].into());
        let kinds = [(Loss::Commands, 2), (Loss::Values, 5), (Loss::FieldExpiry, 7)].into();
        assert_eq!(progress.lacking(false), (7, kinds));
        assert_eq!(progress.lacking(true), (0, BTreeMap::new()));
    }
}
