//! What a shard worker tells about itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::repair::Refusal;
use crate::slot::SlotRanges;
use crate::source::replication::LinkState;
use crate::spool::Full;

/// Refused commands that are described; all are counted.
const SAMPLES: usize = 20;

/// Where a shard stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShardPhase {
    #[default]
    Pending,
    FullSync,
    IncrementalSync,
}

/// Numbers of one shard at one moment. All are monotonic within one full sync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pub phase: ShardPhase,
    /// The worker is over; the numbers stay as it left them.
    pub stopped: bool,
    pub replication_id: String,
    /// Keys of the snapshot that stand on the target.
    pub keys: u64,
    /// Keys that the snapshot announced.
    pub keys_total: u64,
    /// Commands of the stream that stand on the target.
    pub commands: u64,
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
    pub quarantined: u64,
    /// Keys on the target do not have their own expiries, see `hold`.
    pub holding: bool,
    /// Keys and fields that got their own expiries back.
    pub released: u64,
    /// What the worker waits for, empty when it does not.
    pub waiting: String,
}

/// A command or key set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    pub offset: i64,
    pub db: u64,
    pub refusal: Refusal,
}

/// Which slots of a source cluster a worker follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

/// Shared between a worker and those who report on it.
#[derive(Debug)]
pub struct ShardProgress {
    pub numbers: watch::Sender<Numbers>,
    pub link: watch::Sender<LinkState>,
    /// Set when the keys on the target are to get their own expiries back.
    pub release: watch::Sender<bool>,
    quarantine: Mutex<Vec<Quarantined>>,
    /// Of a source cluster.
    pub following: watch::Sender<Following>,
    /// Which slots the worker shall follow; `None`: as it does.
    pub wanted: watch::Sender<Option<SlotRanges>>,
}

impl ShardProgress {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            numbers: watch::Sender::default(),
            link: watch::Sender::default(),
            release: watch::Sender::default(),
            quarantine: Mutex::default(),
            following: watch::Sender::default(),
            wanted: watch::Sender::default(),
        })
    }

    /// Counted by the caller in `numbers`; the first few are kept.
    pub fn quarantine(&self, entry: Quarantined) {
        let mut list = self.lock();
        if list.len() < SAMPLES {
            list.push(entry);
        }
    }

    pub fn quarantined(&self) -> Vec<Quarantined> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Quarantined>> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
