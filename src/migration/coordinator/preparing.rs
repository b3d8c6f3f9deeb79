//! All that has to be known before the first worker starts. Nothing is changed yet on either side.

use crate::api::conditions::{self, reason};
use crate::api::plan::Delivery;
use crate::api::{Plan, Status};
use crate::connection::Dialer;
use crate::migration::checkpoints::{self, Checkpoints, SetAside};
use crate::migration::identity::{KnownShard, identify};
use crate::migration::shard::RemoveFolder;
use crate::migration::state::State;
use crate::migration::{DataDir, MigrationError, RunOptions, kept, setup};
use crate::preflight::PreflightReport;
use crate::topology::Topology;
use crate::worker::{SpoolSetup, WorkerSetup};

/// What there is to know before the first worker starts.
pub(super) struct Prepared {
    pub report: PreflightReport,
    pub setups: Vec<WorkerSetup>,
    /// The shards, in the order of `setups`.
    pub known: Vec<KnownShard>,
    /// What an earlier run of this command left out.
    pub set_aside: SetAside,
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
    earlier.goes_on_with(plan)?;
    let report = setup::preflight(plan, !earlier.begun).await.inspect_err(|error| {
        state.set(conditions::PREFLIGHT_PASSED, false, error.reason, &error.message);
    })?;
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    state.set(conditions::PREFLIGHT_PASSED, true, reason::COMPLETED, &report.warnings.join("; "));
    state.expect_keys(report.source.as_ref().map_or(0, |source| source.keys));
    let (spool, temporary) = spool_setup(options.data_dir.as_ref(), plan)
        .map_err(|error| impossible(format!("no folder for the spool: {error}; give one with --data-dir")))?;
    let (source, target) = setup::sides(&report)?;
    let (topology, target_keys, target) = (&source.topology, target.keys, &target.topology);
    let keeps = plan.delivery == Delivery::ExactlyOnce && topology.is_cluster();
    let target_dialer = setup::target_dialer(plan)?;
    if keeps && earlier.known.is_empty() {
        let known = kept::earlier_shards(plan, &target_dialer, target).await;
        earlier.known = known.map_err(|error| MigrationError {
            reason: reason::TARGET_UNREACHABLE,
            message: format!("the target cannot be asked which shards an earlier run knew: {error}"),
            transient: error.is_transient(),
        })?;
    }
    let stood = |told: &Status| conditions::is_true(&told.conditions, conditions::FULL_SYNCED);
    if plan.delivery == Delivery::ExactlyOnce
        && target_keys > 0
        && options.earlier.as_ref().is_some_and(stood)
    {
        not_over(plan, &target_dialer, &kept::lineages(topology), target).await?;
    }
    let known = identify(topology, &earlier.known, |id| earlier.shards.contains_key(id));
    if keeps && let Err(error) = kept::remember(plan, &target_dialer, target, &known).await {
        tracing::warn!(%error, "a run without this one's data directory may not recognise the shards again");
    }
    let setups = setup::workers(plan, &report, &spool, &earlier, &known).await?;
    // Else the status has told it already.
    let set_aside = if options.earlier.is_none() { earlier.set_aside } else { SetAside::new() };
    Ok(Prepared { report, setups, known, set_aside, temporary })
}

/// A migration whose snapshot stood, and of which the target keeps nothing any more, was completed by a replica
/// that could not say so yet: to copy again would undo what clients have written to the target since.
async fn not_over(
    plan: &Plan,
    dialer: &Dialer,
    lineages: &[String],
    target: &Topology,
) -> Result<(), MigrationError> {
    match kept::is_there(plan, dialer, lineages, target).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(MigrationError {
            reason: reason::ABORTED,
            message: "the target has data, but no longer what this migration kept there: another process may have completed it. To copy again, delete the migration, empty the target and apply it anew".to_owned(),
            transient: true,
        }),
        Err(error) => Err(setup::unasked(&error)),
    }
}

/// Where segment files go; a temporary folder is removed with its guard.
pub(in crate::migration) fn spool_setup(
    data_dir: Option<&DataDir>,
    plan: &Plan,
) -> std::io::Result<(SpoolSetup, Option<RemoveFolder>)> {
    let folder = match data_dir {
        Some(data_dir) => data_dir.spools(),
        None => {
            let name = format!("redis-migration-{}-{}", plan.uid, std::process::id());
            std::env::temp_dir().join(name)
        }
    };
    let temporary = data_dir.is_none().then(|| RemoveFolder(folder.clone()));
    if temporary.is_none() {
        std::fs::create_dir_all(&folder)?;
    }
    let setup = SpoolSetup {
        memory: plan.limits.spool_memory as u64,
        disk: plan.limits.spool_disk,
        retain: plan.limits.spool_retain,
        folder,
        volume: data_dir.map(|data_dir| data_dir.volume.clone()).unwrap_or_default(),
        lasts: temporary.is_none(),
    };
    Ok((setup, temporary))
}
