//! A shard that is worked on in another process than the one that coordinates its migration.
//!
//! Both processes look the migration's servers up by themselves. What goes between them is small: the coordinator's
//! [`Orders`], and what the worker tells ([`Report`]). How that is carried is not known here.

mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::checkpoints::{self, Checkpoints};
use super::coordinator::spool_setup;
use super::identity::{KnownShard, identify};
use super::state::{self, Shard};
use super::{DataDir, MigrationError, setup};
use crate::api::Plan;
use crate::api::conditions::reason;
use crate::api::plan::CopiedBy;
use crate::api::status::ShardStatus;
use crate::loss::Loss;
use crate::slot::SlotRanges;
use crate::target::lane::LaneLimits;
use crate::worker::progress::Asked;
use crate::worker::turn::Turns;
use crate::worker::{self, Checkpoint, Failed, ShardProgress, Stopped, WorkerSetup};

pub use report::{Over, Report, unattended};

/// Decides in which process the worker of each shard runs.
pub trait Placement: std::fmt::Debug + Send + Sync {
    /// All shards, before the first of them is to be run.
    fn begin(&self, shards: &[WorkerSetup]);

    /// As [`worker::run`], wherever that is; to be called again after a failure that the coordinator mends.
    fn run(
        &self,
        setup: WorkerSetup,
        progress: Arc<ShardProgress>,
        drain: watch::Receiver<bool>,
    ) -> BoxFuture<'static, Result<Stopped, Failed>>;

    /// The run ends as it was asked to, and not the migration: workers in other processes need not be drained if
    /// another coordinator follows.
    fn may_leave(&self);
}

/// What a worker elsewhere begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Start {
    /// The shard's id in the status.
    pub shard: String,
    pub lineage: String,
    /// Which slots are followed, as far as the target does not tell.
    pub slots: SlotRanges,
    /// What the shard serves now, by which it is found again.
    pub serves: SlotRanges,
    pub resume: Option<Checkpoint>,
    pub restarted: bool,
    pub anew: bool,
    pub own_keys: bool,
    /// Told by the workers before.
    pub quarantined: u64,
    pub kinds: BTreeMap<Loss, u64>,
    pub adoptions: u64,
    /// As the coordinator has it.
    pub copied_by: CopiedBy,
    pub full_resyncs: u64,
    pub full_resync_reason: String,
    pub resumes: u64,
}

impl Start {
    /// `None`: the shard's slots are not known, so that nobody else would find it.
    pub fn of(plan: &Plan, setup: &WorkerSetup, progress: &ShardProgress) -> Option<Self> {
        let shard = setup.feed.upstream().and_then(|upstream| upstream.shard.as_ref());
        let serves = shard.and_then(|shard| shard.now()).map(|at| at.serves);
        let (quarantined, kinds) = progress.lacking(setup.anew);
        let link = progress.link.borrow().clone();
        Some(Self {
            shard: setup.shard.clone(),
            lineage: setup.lineage.clone(),
            slots: setup.slots.clone()?,
            serves: serves.filter(|serves| !serves.is_empty()).or_else(|| setup.serves.clone())?,
            resume: setup.resume.clone(),
            restarted: setup.restarted,
            anew: setup.anew,
            own_keys: setup.own_keys,
            quarantined,
            kinds,
            adoptions: progress.following.borrow().adoptions,
            copied_by: plan.copied_by.clone(),
            full_resyncs: link.full_resyncs,
            full_resync_reason: link.full_resync_reason,
            resumes: link.resumes,
        })
    }
}

/// What the coordinator wants of a worker elsewhere. Each of them says all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Orders {
    pub start: Start,
    /// Of the spec by which it works.
    pub generation: i64,
    /// Come to an end.
    pub drain: bool,
    pub release: bool,
    pub wanted: Option<SlotRanges>,
    pub asked: Asked,
}

impl Orders {
    /// What the coordinator has put down in `progress`.
    pub fn of(start: Start, generation: i64, drain: bool, progress: &ShardProgress) -> Self {
        Self {
            start,
            generation,
            drain,
            release: *progress.release.borrow(),
            wanted: progress.wanted.borrow().clone(),
            asked: *progress.asked.borrow(),
        }
    }

    /// Puts down for the worker what is ordered.
    pub fn put_into(&self, progress: &ShardProgress) {
        let news = |release: &mut bool| !std::mem::replace(release, self.release) && self.release;
        progress.release.send_if_modified(news);
        progress.wanted.send_if_modified(|wanted| {
            let news = *wanted != self.wanted;
            wanted.clone_from(&self.wanted);
            news
        });
    }
}

/// A worker that is ready to begin.
pub struct Post {
    setup: WorkerSetup,
    shard: Shard,
    limits: LaneLimits,
    turns: Turns,
    _temporary: Option<RemoveFolder>,
}

impl Post {
    /// Looks both sides up, changing nothing.
    pub async fn prepare(
        plan: &Plan,
        data_dir: Option<&DataDir>,
        start: &Start,
    ) -> Result<Self, MigrationError> {
        // A script in a ConfigMap may be another by now.
        checkpoints::goes_on(&start.copied_by, plan)?;
        let report = setup::preflight(plan, false).await?;
        let (source, _) = setup::sides(&report)?;
        let (spool, temporary) = spool_setup(data_dir, plan).map_err(|error| MigrationError {
            reason: reason::PREFLIGHT_FAILED,
            message: format!("no folder for the spool: {error}; give one with --data-dir"),
            transient: false,
        })?;
        let known = KnownShard {
            id: start.shard.clone(),
            lineage: start.lineage.clone(),
            slots: start.serves.clone(),
        };
        let mut shards = identify(&source.topology, &[known], |_| false);
        let ours = |shard: &KnownShard| shard.id == start.shard && shard.lineage == start.lineage;
        let index = shards.iter().position(ours);
        let slots =
            index.and_then(|index| source.topology.shards.get(index)).map(|shard| shard.slots.clone());
        let (Some(index), Some(serves)) = (index, slots) else {
            return Err(MigrationError {
                reason: reason::SOURCE_UNREACHABLE,
                message: format!("no shard of the source serves most of the slots {}", start.serves),
                transient: true,
            });
        };
        if let Some(shard) = shards.get_mut(index) {
            shard.slots = start.slots.clone();
        }
        let begun = start.own_keys || start.resume.is_some();
        let resume = start.resume.clone().map(|place| (start.shard.clone(), place));
        let left = Checkpoints { begun, shards: resume.into_iter().collect(), ..Checkpoints::default() };
        let mut setups = setup::workers(plan, &report, &spool, &left, &shards).await?;
        if index >= setups.len() {
            return Err(MigrationError {
                reason: reason::SOURCE_UNREACHABLE,
                message: "a shard of the source is not there any more".to_owned(),
                transient: true,
            });
        }
        let mut setup = setups.swap_remove(index);
        setup.restarted = start.restarted;
        setup.anew = start.anew;
        setup.own_keys = start.own_keys;
        let upstream = setup.feed.upstream().ok_or_else(|| MigrationError {
            reason: reason::PREFLIGHT_FAILED,
            message: "a file cannot be followed elsewhere: this is a bug".to_owned(),
            transient: false,
        })?;
        let progress = ShardProgress::new();
        progress.numbers.send_modify(|numbers| {
            (numbers.quarantined, numbers.kinds) = (start.quarantined, start.kinds.clone());
        });
        progress.following.send_modify(|following| following.adoptions = start.adoptions);
        progress.link.send_modify(|link| {
            (link.full_resyncs, link.resumes) = (start.full_resyncs, start.resumes);
            link.full_resync_reason.clone_from(&start.full_resync_reason);
        });
        let shard = Shard {
            id: setup.shard.clone(),
            slots: serves.to_string(),
            source: upstream.address.clone(),
            watch: upstream.shard.clone(),
            dialer: upstream.dialer.clone(),
            progress,
        };
        let (limits, turns) = (setup.lane.clone(), setup.turns.clone());
        Ok(Self { setup, shard, limits, turns, _temporary: temporary })
    }

    pub fn progress(&self) -> Arc<ShardProgress> {
        Arc::clone(&self.shard.progress)
    }

    /// Tells of the worker while it runs.
    pub fn view(&self) -> View {
        View { shard: self.shard.clone(), limits: self.limits.clone(), turns: self.turns.clone() }
    }

    pub async fn work(self, drain: watch::Receiver<bool>) -> Result<Stopped, Failed> {
        worker::run(self.setup, self.shard.progress, drain).await
    }
}

/// A running worker, as those beside it see it.
pub struct View {
    shard: Shard,
    limits: LaneLimits,
    turns: Turns,
}

impl View {
    /// Its entry in the status. `worker`: this process's name.
    pub fn status(&self, worker: &str) -> ShardStatus {
        let (status, _) = state::entry(&self.shard, &self.shard.numbers(), &self.shard.link());
        ShardStatus { worker: worker.to_owned(), ..status }
    }

    /// Takes up what may change while it runs.
    pub fn adopt(&self, plan: &Plan) {
        self.limits.set(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
        self.limits.pace().set(plan.limits.bytes_per_second, plan.limits.keys_per_second);
        self.turns.set(plan.limits.parallel_shards, plan.limits.source);
    }
}

pub(super) struct RemoveFolder(pub PathBuf);

impl Drop for RemoveFolder {
    fn drop(&mut self) {
        // It exists only if the spool needed the disk; the workers' own folders in it are gone already.
        let _ = std::fs::remove_dir(&self.0);
    }
}
