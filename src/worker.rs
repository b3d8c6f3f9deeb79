//! One shard worker: the whole line from one source master to the target.
//!
//! The replication link and the applier run side by side, joined by the spool. The applier decodes what
//! the spool hands it, sends it down the lanes, and on a lost connection goes back to the last place that
//! every lane has acknowledged.

mod applier;
mod direct;
mod keeper;
#[cfg(test)]
mod live_tests;
mod mending;
mod outbox;
pub mod progress;
mod release;
mod repair;
mod route;
mod snapshot;
mod stream;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;

use crate::api::plan::ExistingKeys;
use crate::backoff::Backoff;
use crate::command::DynamicTable;
use crate::connection::{Address, Dialer};
use crate::rdb::RdbError;
use crate::resp::frame::FrameError;
use crate::slot::SlotRanges;
use crate::source::replication::{Acknowledged, Replication, ReplicationError};
use crate::source::watch::SourceShard;
use crate::spool::{Origin, SpoolError, SpoolLimits, spool};
use crate::target::lane::LaneLimits;
use crate::topology::{Role, SlotMap, discover, server_info};
use crate::version::ServerVersion;

use applier::Applier;
use keeper::{Found, Keeper};
pub use progress::{Numbers, ShardPhase, ShardProgress};
use route::Router;

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
    /// Keeps in the target what it takes so that nothing is applied twice or lost.
    pub exactly_once: bool,
    /// Safe in a key or file name, and different for each shard.
    pub file_name: String,
    /// Where to begin to read.
    pub source: Address,
    /// Where the shard is after a failover; `None`: always at `source`.
    pub source_shard: Option<SourceShard>,
    /// Read from a replica where one is fit.
    pub prefer_replica: bool,
    pub source_dialer: Dialer,
    pub psync_command: String,
    pub allow_full_resync: bool,
    /// Commands of the source that the table does not know.
    pub dynamic: Arc<DynamicTable>,
    pub target: TargetShape,
    pub target_dialer: Dialer,
    pub target_version: ServerVersion,
    pub existing_keys: ExistingKeys,
    pub database_map: BTreeMap<u64, u64>,
    /// No other worker writes to this target.
    pub sole_source: bool,
    /// The slots that this shard serves at the source; `None`: all, without a cluster.
    pub slots: Option<SlotRanges>,
    pub lane: LaneLimits,
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
}

#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Source(#[from] ReplicationError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
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
            Self::LostState { .. } | Self::Overtaken { .. } => true,
            Self::Spool(error) => matches!(error, SpoolError::Corrupt { .. } | SpoolError::Gone { .. }),
            Self::Source(_)
            | Self::KeyExists { .. }
            | Self::Target(_)
            | Self::Denied(_)
            | Self::FellBack { .. }
            | Self::Fenced(_)
            | Self::TooManyRefused { .. } => false,
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
    /// `None`: the snapshot does not stand yet, so another run has to start over.
    pub checkpoint: Option<Checkpoint>,
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
    let router = match &setup.target {
        TargetShape::Standalone(_) | TargetShape::Watched(_) => Router::Single,
        TargetShape::Cluster(map) => Router::Slots(map.clone()),
    };
    let keeper = match take_over(&mut setup, &router, &progress, &mut drain).await {
        Ok(Some(keeper)) => keeper,
        Ok(None) => return Ok(Stopped { checkpoint: setup.resume }),
        Err(error) => return Err(Failed { error, left: Stopped { checkpoint: setup.resume } }),
    };
    let (writer, reader) = spool(SpoolLimits {
        memory: setup.spool.memory,
        disk: setup.spool.disk,
        retain: setup.spool.retain,
        folder: setup.spool.folder.join(&setup.file_name),
    });
    let (acknowledge, acknowledged) = watch::channel(Acknowledged::default());
    let link = Replication {
        dialer: setup.source_dialer.clone(),
        address: setup.source.clone(),
        shard: setup.source_shard.clone(),
        prefer_replica: setup.prefer_replica,
        psync_command: setup.psync_command.clone(),
        resume: setup.resume.as_ref().map(|checkpoint| Origin {
            replication_id: checkpoint.replication_id.clone(),
            offset: checkpoint.offset,
        }),
        allow_full_resync: setup.allow_full_resync,
        restarted: setup.restarted,
        acknowledged,
        state: progress.link.clone(),
    };
    let mut applier = Applier::new(setup, router, reader, acknowledge, Arc::clone(&progress), keeper);
    // The link ends when the applier does, and the other way round.
    let result = tokio::select! {
        error = link.run(writer) => Err(WorkerError::from(error)),
        stopped = applier.run(drain) => stopped,
    };
    let result = result.map_err(|error| {
        // What stands on the target is known, whatever the reason.
        let left = if error.calls_for_resync() { Stopped::default() } else { applier.stopped() };
        Failed { error, left }
    });
    progress.numbers.send_modify(|numbers| numbers.stopped = true);
    result
}

/// Makes this worker the only one that writes, and finds out where an earlier one stopped. `None`: asked to
/// stop before that was known.
async fn take_over(
    setup: &mut WorkerSetup,
    router: &Router,
    progress: &ShardProgress,
    drain: &mut watch::Receiver<bool>,
) -> Result<Option<Option<Keeper>>, WorkerError> {
    if !setup.exactly_once {
        return Ok(Some(None));
    }
    let mut backoff = Backoff::default();
    let mut router = router.clone();
    let (mut keeper, found) = loop {
        let error = match Keeper::take(setup, &router).await {
            Ok(taken) => break taken,
            Err(error) => error,
        };
        let again = error.connection().is_some_and(|error| error.is_transient());
        if !again {
            let denied = error.connection().is_some_and(|error| error.is_auth());
            let text = error.to_string();
            return Err(match error.connection() {
                Some(_) if denied => WorkerError::Denied(text),
                Some(_) => WorkerError::Target(text),
                None => WorkerError::Fenced(text),
            });
        }
        tracing::warn!(shard = %setup.shard, %error, "the target cannot be asked where it stands, trying again");
        progress.numbers.send_modify(|numbers| numbers.waiting = error.to_string());
        tokio::select! {
            () = backoff.wait() => {}
            Ok(_) = drain.wait_for(|drain| *drain) => return Ok(None),
        }
        if let Router::Slots(map) = &mut router {
            // Slots may have changed hands; when that cannot be asked now, the next attempt does.
            let _ = map.refresh(&setup.target_dialer).await;
        }
        let dialer = &setup.target_dialer;
        if let TargetShape::Watched(address) = &mut setup.target
            && let Ok(found) = discover(dialer.access(), dialer, Role::Target).await
            && let Some(shard) = found.shards.first()
        {
            // The Sentinels may have promoted another server.
            *address = shard.master.address.clone();
        }
    };
    progress.numbers.send_modify(|numbers| numbers.waiting.clear());
    match found {
        Found::Nothing => {
            if setup.resume.take().is_some() {
                tracing::warn!(shard = %setup.shard, "the target has nothing of what an earlier run left there: it is copied again");
                setup.restarted = true;
            }
        }
        Found::Resume(_) if setup.anew => setup.own_keys = true,
        Found::Resume(checkpoint) => {
            tracing::info!(shard = %setup.shard, offset = checkpoint.offset, "going on from what the target has");
            // What an earlier run may have applied, it had received by now.
            let info = server_info(&setup.source_dialer, &setup.source).await;
            keeper.replay_until = info.map_or(i64::MAX, |info| info.offset.max(checkpoint.offset));
            setup.resume = Some(checkpoint);
        }
        Found::Begun(why) => {
            tracing::info!(shard = %setup.shard, why, "an earlier run was here: copying anew");
            setup.restarted |= setup.resume.take().is_some();
            setup.own_keys = true;
        }
    }
    Ok(Some(Some(keeper)))
}
