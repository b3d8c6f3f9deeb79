//! All that has to be known before the first worker starts. Nothing is changed yet on either side.

use std::path::PathBuf;

use crate::api::Plan;
use crate::api::conditions::{self, reason};
use crate::api::plan::Delivery;
use crate::migration::checkpoints::{self, Checkpoints};
use crate::migration::identity::{KnownShard, identify};
use crate::migration::state::State;
use crate::migration::{MigrationError, RunOptions, kept, setup};
use crate::preflight::PreflightReport;
use crate::worker::WorkerSetup;

/// What there is to know before the first worker starts.
pub(super) struct Prepared {
    pub report: PreflightReport,
    pub setups: Vec<WorkerSetup>,
    /// The shards, in the order of `setups`.
    pub known: Vec<KnownShard>,
    pub temporary: Option<RemoveFolder>,
}

pub(super) async fn prepare(
    plan: &Plan,
    options: &RunOptions,
    state: &mut State,
) -> Result<Prepared, MigrationError> {
    let impossible =
        |message: String| MigrationError { reason: reason::PREFLIGHT_FAILED, message, transient: false };
    let mut earlier = match &options.data_dir {
        Some(data_dir) => {
            checkpoints::load(data_dir, &plan.uid).map_err(|error| impossible(error.to_string()))?
        }
        None => Checkpoints::default(),
    };
    if let Some(told) = &options.earlier {
        earlier.learn(told, plan.delivery);
    }
    let report = setup::preflight(plan, !earlier.begun).await.inspect_err(|error| {
        state.set(conditions::PREFLIGHT_PASSED, false, error.reason, &error.message);
    })?;
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    state.set(conditions::PREFLIGHT_PASSED, true, reason::COMPLETED, &report.warnings.join("; "));
    state.expect_keys(report.source.as_ref().map_or(0, |source| source.keys));
    let (folder, temporary) = spool_folder(options, plan)
        .map_err(|error| impossible(format!("no folder for the spool: {error}; give one with --data-dir")))?;
    let (source, target) = setup::sides(&report)?;
    let (topology, target) = (&source.topology, &target.topology);
    let keeps = plan.delivery == Delivery::ExactlyOnce && topology.is_cluster();
    let target_dialer = setup::target_dialer(plan);
    if keeps && earlier.known.is_empty() {
        let known = kept::earlier_shards(plan, &target_dialer, target).await;
        earlier.known = known.map_err(|error| MigrationError {
            reason: reason::TARGET_UNREACHABLE,
            message: format!("the target cannot be asked which shards an earlier run knew: {error}"),
            transient: error.is_transient(),
        })?;
    }
    let known = identify(topology, &earlier.known, |id| earlier.shards.contains_key(id));
    if keeps && let Err(error) = kept::remember(plan, &target_dialer, target, &known).await {
        tracing::warn!(%error, "a run without this one's data directory may not recognise the shards again");
    }
    let spool = (folder.as_path(), temporary.is_none());
    let setups = setup::workers(plan, &report, spool, &earlier, &known).await?;
    Ok(Prepared { report, setups, known, temporary })
}

/// The folder for segment files; a temporary one is removed with its guard.
fn spool_folder(options: &RunOptions, plan: &Plan) -> std::io::Result<(PathBuf, Option<RemoveFolder>)> {
    match &options.data_dir {
        Some(data_dir) => {
            let folder = data_dir.join("spool");
            std::fs::create_dir_all(&folder)?;
            Ok((folder, None))
        }
        None => {
            let name = format!("redis-migration-{}-{}", plan.uid, std::process::id());
            let folder = std::env::temp_dir().join(name);
            Ok((folder.clone(), Some(RemoveFolder(folder))))
        }
    }
}

pub(super) struct RemoveFolder(PathBuf);

impl Drop for RemoveFolder {
    fn drop(&mut self) {
        // It exists only if the spool needed the disk; the workers' own folders in it are gone already.
        let _ = std::fs::remove_dir(&self.0);
    }
}
