//! One migration from preflight to its outcome: all shard workers, the phases, verification, cutover.

mod backlog;
mod checkpoints;
mod coordinator;
mod cutover;
mod data_dir;
mod degraded;
mod files;
mod identity;
mod kept;
mod setup;
pub mod shard;
mod standing;
mod state;
mod territory;
mod verification;

use std::sync::Arc;

use tokio::sync::watch;

use crate::api::{Plan, Status};
use crate::telemetry::EngineGauges;
pub use data_dir::{DataDir, SpoolLeft, spool_name};
pub use shard::Placement;

/// When a run that goes well ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Until {
    /// Every shard caught up, and the verification that the plan asks for passed.
    InSync,
    /// What the plan's cutover says.
    #[default]
    Finished,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopRequest {
    #[default]
    Run,
    /// Drain, checkpoint, stop within 10 seconds.
    Drain,
    /// Stop at once.
    Now,
}

/// What the command line, not the manifest, decides about a run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    pub until: Until,
    /// Where the spool goes when it needs the disk; `None`: a temporary directory.
    pub data_dir: Option<DataDir>,
    pub stop: watch::Receiver<StopRequest>,
    /// Newer plans of the same migration, where its spec may change meanwhile. What cannot be changed while
    /// running (both sides, `limits.maxRestoreBytes`, the spool's limits) stays as in the first.
    pub plans: Option<watch::Receiver<Arc<Plan>>>,
    /// What an earlier run of this migration told last, wherever it was.
    pub earlier: Option<Status>,
    /// `None`: every shard is worked on in this process.
    pub placement: Option<Arc<dyn Placement>>,
}

/// Where a running migration publishes what is observed of it.
#[derive(Clone, Debug)]
pub struct Observers {
    pub status: watch::Sender<Status>,
    pub gauges: watch::Sender<EngineGauges>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// `reason` is one of `api::conditions::reason`.
    Failed {
        reason: &'static str,
        message: String,
        /// Trying again later may do, with nothing changed.
        transient: bool,
    },
    /// Verification found more than the plan allows.
    Differences {
        count: u64,
    },
    /// Stopped on request, checkpoint kept.
    Stopped,
    /// Another process has taken the migration over.
    Superseded {
        message: String,
    },
}

/// Result of validation and preflight.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CheckReport {
    pub findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What was looked at, such as "source version".
    pub subject: String,
    pub level: FindingLevel,
    /// What was found, one line.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum FindingLevel {
    Passed,
    Warning,
    Failed,
}

/// Why a migration or a check could not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct MigrationError {
    /// One of `api::conditions::reason`.
    pub reason: &'static str,
    pub message: String,
    /// Trying again later may do, with nothing changed.
    pub transient: bool,
}

/// Moves the data and follows the source until the outcome.
pub async fn run(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    let mut stop = options.stop.clone();
    let at_once = async move {
        // An error means that nobody can ask any more.
        if stop.wait_for(|stop| *stop == StopRequest::Now).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        outcome = work(plan, options, observers) => outcome,
        () = at_once => Outcome::Stopped,
    }
}

async fn work(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    if between_servers(&plan) {
        coordinator::run(plan, options, observers).await
    } else {
        files::run(plan, options, observers).await
    }
}

fn between_servers(plan: &Plan) -> bool {
    plan.source.redis().is_some() && plan.target.redis().is_some()
}

/// Preflight only; changes nothing.
pub async fn check(plan: Arc<Plan>) -> Result<CheckReport, MigrationError> {
    if !between_servers(&plan) {
        return files::check(&plan).await;
    }
    let report = setup::preflight(&plan, true).await?;
    Ok(setup::findings(&plan, &report))
}

/// Shuts out whoever may still write, and removes what the migration keeps in its target. `told`: its last
/// status. The migration cannot be resumed afterwards.
pub async fn clean_up(plan: &Plan, told: &Status) -> Result<(), MigrationError> {
    kept::clean_up(plan, told).await
}

/// Says what the sources' backlogs still allow a stopped migration. `told`: its last status.
pub async fn backlog(plan: &Plan, told: &Status) -> String {
    backlog::room(plan, told).await
}

/// Removes what a migration that is over left in the data directory.
pub fn forget(data_dir: &DataDir, uid: &str) {
    if let Err(error) = checkpoints::clear(data_dir, uid) {
        tracing::warn!("{error}");
    }
    for spool in data_dir.spools_left().iter().filter(|spool| spool.uid == uid) {
        spool.remove();
    }
}

/// Compares both sides now; changes nothing.
pub async fn verify(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    verification::run_alone(plan, options, observers).await
}
