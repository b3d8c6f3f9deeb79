//! From plan and preflight to what each worker needs.

use std::path::Path;
use std::sync::Arc;

use super::checkpoints::Checkpoints;
use super::identity::KnownShard;
use super::kept;
use super::{CheckReport, Finding, FindingLevel, MigrationError};
use crate::api::Plan;
use crate::api::conditions::reason;
use crate::api::plan::{Delivery, ExistingKeys, FullResyncPolicy, ReadFrom};
use crate::command::DynamicTable;
use crate::connection::{Address, Dialer};
use crate::preflight::{
    self, PreflightError, PreflightInput, PreflightReport, SourceReport, SourceSide, TargetReport, TargetSide,
};
use crate::slot::SlotRanges;
use crate::source::watch::watch_source;
use crate::target::lane::LaneLimits;
use crate::topology::{SlotMap, TopologyKind};
use crate::worker::{SpoolSetup, TargetShape, WorkerSetup};

/// Names our connections to a server, in CLIENT LIST.
pub fn source_dialer(plan: &Plan) -> Dialer {
    Dialer::new(plan.source.access.clone(), format!("redis-migration:{}", plan.uid))
}

pub fn target_dialer(plan: &Plan) -> Dialer {
    Dialer::new(plan.target.access.clone(), format!("redis-migration:{}", plan.uid))
}

/// `first`: this is no continuation, so that keys on the target are somebody's.
pub async fn preflight(plan: &Plan, first: bool) -> Result<PreflightReport, MigrationError> {
    let mut input = PreflightInput {
        source: Some(SourceSide {
            access: plan.source.access.clone(),
            dialer: source_dialer(plan),
            prefer_replica: plan.source.read_from == ReadFrom::PreferReplica,
            psync_command: Some(plan.source.psync_command.clone()),
        }),
        target: Some(TargetSide {
            access: plan.target.access.clone(),
            dialer: target_dialer(plan),
            must_be_empty: first && plan.target.existing_keys == ExistingKeys::Fail,
        }),
        database_map: plan.database_map.clone(),
        include_databases: Vec::new(),
        exclude_databases: Vec::new(),
        filtered: false,
    };
    let failed = |error: PreflightError| MigrationError {
        reason: error.reason(),
        message: error.to_string(),
        transient: error.is_transient(),
    };
    let not_empty = match preflight::preflight(&input).await {
        Err(error @ PreflightError::TargetNotEmpty { .. }) if plan.delivery == Delivery::ExactlyOnce => error,
        result => return result.map_err(failed),
    };
    // They may be our own: the target itself tells, whatever became of the data directory.
    if let Some(target) = &mut input.target {
        target.must_be_empty = false;
    }
    let report = preflight::preflight(&input).await.map_err(failed)?;
    let (source, target) = sides(&report)?;
    let ours = kept::is_there(plan, &target_dialer(plan), &source.topology, &target.topology).await;
    // What cannot be asked is not ours.
    if ours.unwrap_or(false) { Ok(report) } else { Err(failed(not_empty)) }
}

/// The two sides of a report; both were asked for.
pub fn sides(report: &PreflightReport) -> Result<(&SourceReport, &TargetReport), MigrationError> {
    match (&report.source, &report.target) {
        (Some(source), Some(target)) => Ok((source, target)),
        _ => Err(MigrationError {
            reason: reason::PREFLIGHT_FAILED,
            message: "preflight looked at one side only: this is a bug".to_owned(),
            transient: false,
        }),
    }
}

pub fn findings(plan: &Plan, report: &PreflightReport) -> CheckReport {
    let mut findings = Vec::new();
    let mut passed = |subject: &str, detail: String| {
        findings.push(Finding { subject: subject.to_owned(), level: FindingLevel::Passed, detail });
    };
    if let Some(source) = &report.source {
        let topology = &source.topology;
        let shards = topology.shards.len();
        passed(
            "source",
            format!("{}, {:?}, {shards} shard(s), {} keys", topology.server, topology.kind, source.keys),
        );
        for (shard, origin) in topology.shards.iter().zip(&source.origins) {
            passed("replication", format!("shard {} is read from {origin}", shard.id));
        }
    }
    if let Some(target) = &report.target {
        let topology = &target.topology;
        let masters = topology.shards.len();
        passed(
            "target",
            format!("{}, {:?}, {masters} master(s), {} keys", topology.server, topology.kind, target.keys),
        );
    }
    passed("existing keys", format!("{:?}", plan.target.existing_keys));
    findings.extend(report.warnings.iter().map(|warning| Finding {
        subject: "warning".to_owned(),
        level: FindingLevel::Warning,
        detail: warning.clone(),
    }));
    CheckReport { findings }
}

/// One setup for each source shard; `identities` in their order. `lasts`: another run finds the spool's
/// folder again. From here on the source is watched.
pub async fn workers(
    plan: &Plan,
    report: &PreflightReport,
    (folder, lasts): (&Path, bool),
    checkpoints: &Checkpoints,
    identities: &[KnownShard],
) -> Result<Vec<WorkerSetup>, MigrationError> {
    let (source, target) = sides(report)?;
    let source_dialer = source_dialer(plan);
    let target_dialer = target_dialer(plan);
    let shape = if target.topology.is_cluster() {
        TargetShape::Cluster(SlotMap::new(&target.topology))
    } else {
        let master = target.topology.shards.first().map(|shard| shard.master.address.clone());
        let master = master.ok_or_else(|| MigrationError {
            reason: reason::TARGET_UNREACHABLE,
            message: "the target has no master".to_owned(),
            transient: true,
        })?;
        match target.topology.kind {
            TopologyKind::Sentinel => TargetShape::Watched(master),
            TopologyKind::Standalone | TopologyKind::Cluster => TargetShape::Standalone(master),
        }
    };
    let count = source.topology.shards.len();
    let prefer_replica = plan.source.read_from == ReadFrom::PreferReplica;
    let slots: Vec<SlotRanges> = identities.iter().map(|known| known.slots.clone()).collect();
    let watched = watch_source(&source_dialer, &source.topology, &slots, prefer_replica);
    let lane_limits = LaneLimits::new(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
    let mut workers = Vec::with_capacity(count);
    for (index, ((identity, source_shard), origin)) in
        identities.iter().zip(watched).zip(&source.origins).enumerate()
    {
        let topology_shard = source.topology.shards.get(index);
        workers.push(WorkerSetup {
            uid: plan.uid.clone(),
            exactly_once: plan.delivery == Delivery::ExactlyOnce,
            shard: identity.id.clone(),
            lineage: identity.lineage.clone(),
            file_name: file_name(&plan.uid, &identity.lineage),
            source: origin.clone(),
            source_shard: Some(source_shard),
            prefer_replica,
            source_dialer: source_dialer.clone(),
            psync_command: plan.source.psync_command.clone(),
            allow_full_resync: plan.failure_policy.on_full_resync == FullResyncPolicy::Allow,
            dynamic: Arc::new(commands_of(&source_dialer, origin).await),
            target: shape.clone(),
            target_dialer: target_dialer.clone(),
            target_version: target.topology.server,
            existing_keys: plan.target.existing_keys,
            database_map: plan.database_map.clone(),
            sole_source: count == 1,
            slots: source.topology.is_cluster().then(|| identity.slots.clone()),
            serves: topology_shard.filter(|_| source.topology.is_cluster()).map(|shard| shard.slots.clone()),
            lane: lane_limits.clone(),
            max_restore_bytes: plan.limits.max_restore_bytes,
            spool: SpoolSetup {
                memory: plan.limits.spool_memory as u64,
                disk: plan.limits.spool_disk,
                retain: plan.limits.spool_retain,
                folder: folder.to_path_buf(),
                lasts,
            },
            max_quarantined: plan.failure_policy.max_quarantined,
            resume: checkpoints.shards.get(&identity.id).cloned(),
            restarted: false,
            anew: false,
            own_keys: checkpoints.begun,
        });
    }
    Ok(workers)
}

/// What the source's COMMAND tells; a source that does not let us ask has none that we lack.
async fn commands_of(dialer: &Dialer, address: &Address) -> DynamicTable {
    let asked = async {
        let mut connection = dialer.connect(address).await.ok()?;
        let reply = connection.query(&[b"COMMAND"]).await.ok()?;
        DynamicTable::from_reply(&reply).ok()
    };
    asked.await.unwrap_or_default()
}

/// Letters, digits, `-` and `.` only.
fn file_name(uid: &str, lineage: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '-' };
    format!("{uid}.{}", lineage.chars().map(safe).collect::<String>())
}
