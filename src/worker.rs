//! One shard worker: the whole line from one source master to the target.
//!
//! The replication link and the applier run side by side, joined by the spool. The applier decodes what
//! the spool hands it, sends it down the lanes, and on a lost connection goes back to the last place that
//! every lane has acknowledged.

mod applier;
mod direct;
pub mod export;
mod keeper;
pub mod link;
#[cfg(test)]
mod live_tests;
mod mending;
mod outbox;
pub mod progress;
mod recopy;
mod release;
mod repair;
mod route;
mod snapshot;
mod stream;
mod takeover;
pub mod turn;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;

use crate::api::plan::ExistingKeys;
use crate::command::DynamicTable;
use crate::connection::{Address, Dialer};
use crate::rdb::RdbError;
use crate::resp::frame::FrameError;
use crate::slot::SlotRanges;
use crate::source::file::FileFeedError;
use crate::source::replication::{Acknowledged, ReplicationError};
use crate::source::scan::{ScanError, Undo};
use crate::spool::{SpoolError, SpoolLimits, Volume};
use crate::target::lane::LaneLimits;
use crate::topology::SlotMap;
use crate::transform::Transform;
use crate::transform::script::Script;
use crate::version::ServerVersion;

use applier::Applier;
pub use link::{Feed, Upstream};
use link::{Link, Resumed, Scanning};
pub use progress::{Following, Numbers, Order, ShardPhase, ShardProgress};
pub use repair::Refusal;
use route::Router;
use takeover::{Taken, open_spool, take_over};
use turn::{Turn, Turns};

/// Where a shard stopped, so that another run can go on from there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    pub replication_id: String,
    /// Everything up to this replication offset stands on the target.
    pub offset: i64,
    /// The source's database behind that offset.
    pub db: u64,
}

/// Where the data go.
#[derive(Clone, Debug)]
pub enum TargetShape {
    Standalone(Address),
    /// The master that Sentinels watch; after a lost connection they are asked again.
    Watched(Address),
    Cluster(SlotMap),
}

impl TargetShape {
    /// The one server; of a cluster, all nodes.
    pub fn addresses(&self) -> Vec<Address> {
        match self {
            Self::Standalone(address) | Self::Watched(address) => vec![address.clone()],
            Self::Cluster(map) => map.nodes().iter().map(|node| node.address.clone()).collect(),
        }
    }
}

/// All that one worker needs.
#[derive(Clone)]
pub struct WorkerSetup {
    /// The migration's.
    pub uid: String,
    /// The shard's id in the status.
    pub shard: String,
    /// Names the shard in keys on the target: short, safe in a key, different for each shard, and the same
    /// after a failover of the source, whether an earlier run is remembered or not. "0" without a cluster,
    /// else the lowest slot that the shard serves.
    pub lineage: String,
    /// Of the migration's other shards.
    pub siblings: Vec<String>,
    /// Keeps in the target what it takes so that nothing is applied twice or lost.
    pub exactly_once: bool,
    /// Safe in a key or file name, and different for each shard.
    pub file_name: String,
    pub feed: Feed,
    /// Commands of the source that the table does not know.
    pub dynamic: Arc<DynamicTable>,
    pub target: TargetShape,
    pub target_dialer: Dialer,
    pub target_version: ServerVersion,
    /// Keys of other databases than the target has are refused; `None`: that was seen to, or is not known.
    pub target_databases: Option<u64>,
    pub existing_keys: ExistingKeys,
    pub database_map: BTreeMap<u64, u64>,
    /// What is left out; `None`: nothing.
    pub transform: Option<Arc<Transform>>,
    /// No other worker writes to this target.
    pub sole_source: bool,
    /// The slots that an earlier run followed this shard for, or else that it serves at the source; `None`: all,
    /// without a cluster.
    pub slots: Option<SlotRanges>,
    /// The slots that it served when this run began.
    pub serves: Option<SlotRanges>,
    pub lane: LaneLimits,
    /// When a full sync may begin.
    pub turns: Turns,
    pub max_restore_bytes: u64,
    pub spool: SpoolSetup,
    pub max_quarantined: u64,
    pub resume: Option<Checkpoint>,
    /// An earlier worker of this run began already: a full sync is not the first.
    pub restarted: bool,
    /// What the target says of where an earlier one stopped is not to be believed.
    pub anew: bool,
    /// An earlier run broke off: keys on the target may be its own.
    pub own_keys: bool,
}

#[derive(Clone, Debug)]
pub struct SpoolSetup {
    pub memory: u64,
    pub disk: u64,
    pub retain: u64,
    /// Holds a folder for each shard.
    pub folder: PathBuf,
    pub volume: Volume,
    /// A later run looks there as well.
    pub lasts: bool,
}

/// A source that is asked for its data is asked no further ahead of the target than this.
const AHEAD: u64 = 8 << 20;

impl SpoolSetup {
    /// A file is the log itself, and a scan waits without harm to its source: what is lost can be read again. Only
    /// a master that sends must never be kept waiting.
    #[must_use]
    pub fn of(self, feed: &Feed) -> Self {
        match feed {
            Feed::Replication(_) => self,
            Feed::File(_) | Feed::Scan(..) => Self { memory: AHEAD.min(self.memory), disk: 0, ..self },
        }
    }

    fn limits(&self, file_name: &str) -> SpoolLimits {
        let Self { memory, disk, retain, ref folder, ref volume, lasts: _ } = *self;
        SpoolLimits { memory, disk, retain, folder: folder.join(file_name), volume: volume.clone() }
    }
}

#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Source(#[from] ReplicationError),
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    File(#[from] FileFeedError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("{shard}: the RDB ends at byte {position} in the middle of a key: it is truncated")]
    Truncated { shard: String, position: u64 },
    #[error("{shard}: the RDB is damaged or of an unknown kind: {source}")]
    Rdb { shard: String, source: RdbError },
    #[error(
        "{shard}: the RDB's checksum is {computed:016x}, its end says {stored:016x}: the transfer is damaged"
    )]
    Checksum { shard: String, computed: u64, stored: u64 },
    #[error("{shard}: the RDB ends at byte {position}, but the source {what}")]
    SnapshotEnd { shard: String, position: u64, what: &'static str },
    #[error("{shard}: command stream at offset {offset}: {source}")]
    Stream { shard: String, offset: i64, source: FrameError },
    #[error(
        "the target already has the key {key}, and existingKeys is Fail; empty the target, or choose Replace or Skip"
    )]
    KeyExists { key: String },
    #[error("{0}")]
    Target(String),
    #[error("{shard}: the target fell back to offset {offset}, which the spool no longer holds")]
    FellBack { shard: String, offset: i64 },
    #[error("{shard}: the target has lost what it had: {why}")]
    LostState { shard: String, why: &'static str },
    #[error("{shard}: commands overtook one that the target refused for a moment: {why}")]
    Overtaken { shard: String, why: String },
    /// Another process has this shard, or had it to the end.
    #[error("{0}")]
    Fenced(String),
    /// The target's user lacks a permission.
    #[error("{0}")]
    Denied(String),
    /// Told by a worker in another process.
    #[error("{message}")]
    Told {
        /// One of `api::conditions::reason`.
        reason: &'static str,
        message: String,
        /// Another full sync may do.
        resync: bool,
    },
    #[error(
        "{shard}: {count} commands were refused by the target, more than failurePolicy.maxQuarantined allows; the last: {last}"
    )]
    TooManyRefused { shard: String, count: u64, last: String },
}

impl WorkerError {
    /// True when another full sync may do: what arrived was damaged, or the spool was.
    pub fn calls_for_resync(&self) -> bool {
        match self {
            Self::Rdb { .. } | Self::Checksum { .. } | Self::SnapshotEnd { .. } | Self::Stream { .. } => true,
            Self::Truncated { .. } => true,
            Self::LostState { .. } | Self::Overtaken { .. } => true,
            Self::Spool(error) => matches!(error, SpoolError::Corrupt { .. } | SpoolError::Gone { .. }),
            Self::Told { resync, .. } => *resync,
            Self::Source(_)
            | Self::Scan(_)
            | Self::File(_)
            | Self::KeyExists { .. }
            | Self::Target(_)
            | Self::Denied(_)
            | Self::FellBack { .. }
            | Self::Fenced(_)
            | Self::TooManyRefused { .. } => false,
        }
    }

    /// True when another run may go on with what was received.
    fn leaves_spool(&self) -> bool {
        match self {
            Self::Source(ReplicationError::Spool(_) | ReplicationError::FullResyncForbidden { .. }) => false,
            Self::Source(_) | Self::Target(_) | Self::Denied(_) | Self::TooManyRefused { .. } => true,
            Self::Scan(_) => false,
            // A key that was the target's own must not pass for one of ours.
            Self::KeyExists { .. } => false,
            Self::Fenced(_) | Self::FellBack { .. } => false,
            // A file is there to be read again.
            Self::File(_) | Self::Truncated { .. } => false,
            Self::Spool(_) | Self::Rdb { .. } | Self::Checksum { .. } | Self::SnapshotEnd { .. } => false,
            Self::Stream { .. } | Self::LostState { .. } | Self::Overtaken { .. } => false,
            Self::Told { .. } => false,
        }
    }

    /// True when the same worker may begin anew from what the target says.
    pub fn calls_for_restart(&self) -> bool {
        matches!(self, Self::FellBack { .. })
    }
}

/// How a worker that was asked to stop left things.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// `None`: the snapshot does not stand yet.
    pub checkpoint: Option<Checkpoint>,
    /// What was received and is not applied is on disk for another run.
    pub spooled: bool,
}

/// A worker that could not go on.
#[derive(Debug)]
pub struct Failed {
    pub error: WorkerError,
    /// Without a checkpoint where a full sync is needed anyway.
    pub left: Stopped,
}

/// Works until `drain` turns true (then what was received is brought to the target first, as far as it
/// is quick) or an error that a retry cannot mend.
pub async fn run(
    mut setup: WorkerSetup,
    progress: Arc<ShardProgress>,
    mut drain: watch::Receiver<bool>,
) -> Result<Stopped, Failed> {
    let mut router = match &setup.target {
        TargetShape::Standalone(_) | TargetShape::Watched(_) => Router::Single,
        TargetShape::Cluster(map) => Router::Slots(map.clone()),
    };
    let mut taken = match take_over(&mut setup, &mut router, &progress, &mut drain).await {
        Ok(Some(taken)) => taken,
        Ok(None) => return Ok(Stopped { checkpoint: setup.resume, ..Stopped::default() }),
        Err(error) => {
            return Err(Failed { error, left: Stopped { checkpoint: setup.resume, ..Stopped::default() } });
        }
    };
    forget_scan(&mut setup, &mut taken);
    // Not before: another process may still write there.
    let (writer, reader, left) = open_spool(&setup, &taken).await;
    progress.look_at(reader.view());
    let turn = if let (None, None, Some(upstream)) = (&setup.resume, &left, setup.feed.upstream()) {
        let tell = |why: &str| progress.numbers.send_modify(|numbers| numbers.waiting = why.to_owned());
        tokio::select! {
            turn = setup.turns.begin(&upstream.dialer, &upstream.address, tell) => Some(turn),
            Ok(_) = drain.wait_for(|asked| *asked) => return Ok(Stopped::default()),
        }
    } else {
        None
    };
    let (acknowledge, acknowledged) = watch::channel(Acknowledged::default());
    let source = setup.feed.upstream().map(|upstream| upstream.dialer.clone());
    let scan = Scanning { progress: Arc::clone(&progress.scan), undo: Undo::default() };
    let undo = scan.undo.clone();
    let resumed =
        Resumed { from: setup.resume.as_ref(), left: left.as_ref(), restarted: setup.restarted, scan };
    let link = Link::new(setup.feed.clone(), resumed, acknowledged, progress.link.clone());
    let keeps = setup.spool.lasts;
    let runner = setup.transform.as_ref().and_then(|transform| transform.script.as_ref()).map(Script::runner);
    let runner = match runner.transpose() {
        Ok(runner) => runner,
        // It ran when the spec was read.
        Err(error) => {
            let error = WorkerError::Target(format!("spec.filter.lua: {error}"));
            return Err(Failed { error, left: Stopped { checkpoint: setup.resume, ..Stopped::default() } });
        }
    };
    let mut applier = Applier::new(setup, router, reader, acknowledge, Arc::clone(&progress), taken.keeper);
    applier.follow_script(runner);
    if let Some(left) = left {
        progress.link.send_modify(|link| link.snapshot_bytes = left.snapshot_bytes());
        applier.take_up(left);
    }
    let numbers = progress.numbers.subscribe();
    // The link ends when the applier does, and the other way round.
    let result = tokio::select! {
        never = until_synced(turn, numbers) => match never {},
        error = link.run(writer) => Err(error),
        stopped = applier.run(drain) => stopped,
    };
    if let Some(source) = source {
        undo.restore(&source).await;
    }
    let keeps = keeps && result.as_ref().err().is_none_or(WorkerError::leaves_spool);
    let spooled = keeps && applier.leave_spool().await;
    let result = match result {
        Ok(stopped) => Ok(Stopped { spooled, ..stopped }),
        Err(error) if error.calls_for_resync() => Err(Failed { error, left: Stopped::default() }),
        // What stands on the target is known, whatever the reason.
        Err(error) => Err(Failed { error, left: Stopped { spooled, ..applier.stopped() } }),
    };
    progress.numbers.send_modify(|numbers| numbers.stopped = true);
    result
}

/// A scan cannot be gone on with: nobody remembers what its keys were like.
fn forget_scan(setup: &mut WorkerSetup, taken: &mut Taken) {
    if matches!(setup.feed, Feed::Scan(..)) {
        setup.own_keys |= taken.loading.take().is_some();
        setup.restarted |= setup.resume.take().is_some();
    }
}

/// Gives the turn back when the full sync is over.
async fn until_synced(turn: Option<Turn>, mut numbers: watch::Receiver<Numbers>) -> Infallible {
    // An error: nobody is left to tell.
    let _ = numbers.wait_for(|numbers| numbers.phase == ShardPhase::IncrementalSync).await;
    drop(turn);
    std::future::pending().await
}
