//! From plan and preflight to what each worker needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::checkpoints::Checkpoints;
use super::identity::KnownShard;
use super::kept;
use super::{CheckReport, Finding, FindingLevel, MigrationError};
use crate::api::Plan;
use crate::api::conditions::reason;
use crate::api::plan::{
    CutoverMode, Delivery, ExistingKeys, FullResyncPolicy, KeyspaceNotifications, ReadFrom, RedisSource,
    SourceWay,
};
use crate::command::DynamicTable;
use crate::connection::{Address, ConnectionError, Dialer};
use crate::preflight::{
    self, Claimed, PreflightError, PreflightInput, PreflightReport, SourceReport, SourceSide, TargetReport,
    TargetSide,
};
use crate::slot::SlotRanges;
use crate::source::scan::ScanRules;
use crate::source::watch::watch_source;
use crate::target::lane::LaneLimits;
use crate::topology::{SlotMap, Topology, TopologyKind};
use crate::transform::Transform;
use crate::version::ServerVersion;
use crate::worker::turn::Turns;
use crate::worker::{Feed, SpoolSetup, TargetShape, Upstream, WorkerSetup};

/// Names our connections to a server, in CLIENT LIST.
pub fn source_dialer(plan: &Plan) -> Result<Dialer, MigrationError> {
    Ok(Dialer::new(source(plan)?.access.clone(), format!("redis-migration:{}", plan.uid)))
}

pub fn target_dialer(plan: &Plan) -> Result<Dialer, MigrationError> {
    let target = plan.target.redis().ok_or_else(|| no_server("target"))?;
    Ok(Dialer::new(target.access.clone(), format!("redis-migration:{}", plan.uid)))
}

fn source(plan: &Plan) -> Result<&RedisSource, MigrationError> {
    plan.source.redis().ok_or_else(|| no_server("source"))
}

fn no_server(side: &str) -> MigrationError {
    let message = format!("the {side} is no server: this is a bug");
    MigrationError { reason: reason::PREFLIGHT_FAILED, message, transient: false }
}

/// `first`: this is no continuation, so that keys on the target are somebody's.
pub async fn preflight(plan: &Plan, first: bool) -> Result<PreflightReport, MigrationError> {
    look(plan, first, |report| {
        report.source.as_ref().map(|source| kept::lineages(&source.topology)).unwrap_or_default()
    })
    .await
}

/// Looks at the sides that are servers. A target that must be empty and is not may hold what an earlier run
/// left for `lineages`: the target itself tells, whatever became of the data directory.
pub async fn look(
    plan: &Plan,
    first: bool,
    lineages: impl FnOnce(&PreflightReport) -> Vec<String>,
) -> Result<PreflightReport, MigrationError> {
    let transform = plan.transform.as_ref();
    let databases = transform.map(|transform| &transform.databases);
    let source = match plan.source.redis() {
        Some(from) => Some(SourceSide {
            access: from.access.clone(),
            dialer: source_dialer(plan)?,
            prefer_replica: from.read_from == ReadFrom::PreferReplica,
            psync_command: (from.way == SourceWay::Replication).then(|| from.psync_command.clone()),
            pauses: plan.target.redis().is_some()
                && plan.cutover.mode != CutoverMode::Never
                && plan.cutover.pause_source_writes,
        }),
        None => None,
    };
    let target = match plan.target.redis() {
        Some(to) => Some(TargetSide {
            access: to.access.clone(),
            dialer: target_dialer(plan)?,
            must_be_empty: first && plan.target.existing_keys == ExistingKeys::Fail,
            claimed: transform.map(|transform| claimed(transform, &plan.database_map)),
        }),
        None => None,
    };
    let mut input = PreflightInput {
        source,
        target,
        database_map: plan.database_map.clone(),
        include_databases: databases.and_then(|databases| databases.named()).unwrap_or_default().to_vec(),
        exclude_databases: databases.map(|databases| databases.excluded().to_vec()).unwrap_or_default(),
        filtered: transform.is_some(),
        nothing_may_be_lost: plan.failure_policy.max_quarantined == 0,
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
    if let Some(target) = &mut input.target {
        target.must_be_empty = false;
    }
    let report = preflight::preflight(&input).await.map_err(failed)?;
    let target = target_of(&report)?;
    match kept::is_there(plan, &target_dialer(plan)?, &lineages(&report), &target.topology).await {
        Ok(true) => Ok(report),
        // A later attempt may learn whose keys they are.
        Err(error) if error.is_transient() => Err(unasked(&error)),
        Ok(false) | Err(_) => Err(failed(not_empty)),
    }
}

/// Keys of the target that may have come from the source, by their database there.
fn claimed(transform: &Arc<Transform>, map: &BTreeMap<u64, u64>) -> Claimed {
    let (transform, map) = (Arc::clone(transform), map.clone());
    Arc::new(move |db, key| transform.claims(&map, db, key))
}

/// What the target keeps cannot be told.
pub fn unasked(error: &ConnectionError) -> MigrationError {
    MigrationError {
        reason: reason::TARGET_UNREACHABLE,
        message: format!("the target cannot be asked what it keeps of this migration: {error}"),
        transient: true,
    }
}

/// The target's side of a report, which was asked for.
pub fn target_of(report: &PreflightReport) -> Result<&TargetReport, MigrationError> {
    report.target.as_ref().ok_or_else(one_side)
}

fn one_side() -> MigrationError {
    MigrationError {
        reason: reason::PREFLIGHT_FAILED,
        message: "preflight looked at one side only: this is a bug".to_owned(),
        transient: false,
    }
}

/// The two sides of a report; both were asked for.
pub fn sides(report: &PreflightReport) -> Result<(&SourceReport, &TargetReport), MigrationError> {
    match (&report.source, &report.target) {
        (Some(source), Some(target)) => Ok((source, target)),
        _ => Err(one_side()),
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

/// How each shard of the source is read, in the order of `identities`. From here on the source is watched.
pub fn upstreams(
    plan: &Plan,
    source: &SourceReport,
    identities: &[KnownShard],
    allow_full_resync: bool,
) -> Result<Vec<Upstream>, MigrationError> {
    let (from, dialer) = (self::source(plan)?, source_dialer(plan)?);
    let prefer_replica = from.read_from == ReadFrom::PreferReplica;
    let slots: Vec<SlotRanges> = identities.iter().map(|known| known.slots.clone()).collect();
    let watched = watch_source(&dialer, &source.topology, &slots, prefer_replica);
    let upstreams = watched.into_iter().zip(&source.origins).map(|(shard, address)| Upstream {
        address: address.clone(),
        shard: Some(shard),
        prefer_replica,
        dialer: dialer.clone(),
        psync_command: from.psync_command.clone(),
        allow_full_resync,
    });
    Ok(upstreams.collect())
}

/// How a shard is scanned. `target`: `None` for a file, into which no changes are followed. `folder`: for names.
pub fn scan_rules(
    plan: &Plan,
    source: &SourceReport,
    target: Option<ServerVersion>,
    folder: &Path,
    file_name: &str,
) -> Result<ScanRules, MigrationError> {
    let notifications = match target {
        Some(_) => self::source(plan)?.keyspace_notifications,
        None => KeyspaceNotifications::Ignore,
    };
    Ok(ScanRules {
        notifications,
        cluster: source.topology.is_cluster(),
        // A key of the target's own is left alone only by what writes it in one go.
        whole_values: target.is_none()
            || plan.target.existing_keys == ExistingKeys::Skip
            || plan.transform.as_ref().is_some_and(|transform| transform.script.is_some()),
        eviction_data: self::source(plan)?.eviction_data,
        transform: plan.transform.clone(),
        big_above: ScanRules::big_above(plan.limits.max_restore_bytes),
        target,
        folder: folder.to_path_buf(),
        file_name: file_name.to_owned(),
    })
}

/// One setup for each source shard; `identities` in their order. From here on the source is watched.
pub async fn workers(
    plan: &Plan,
    report: &PreflightReport,
    spool: &SpoolSetup,
    checkpoints: &Checkpoints,
    identities: &[KnownShard],
) -> Result<Vec<WorkerSetup>, MigrationError> {
    let (source, target) = sides(report)?;
    let from = self::source(plan)?;
    let target_dialer = target_dialer(plan)?;
    let shape = shape(&target.topology)?;
    let count = source.topology.shards.len();
    let allow_full_resync = plan.failure_policy.on_full_resync == FullResyncPolicy::Allow;
    let upstreams = upstreams(plan, source, identities, allow_full_resync)?;
    let lane_limits = LaneLimits::new(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
    lane_limits.pace().set(plan.limits.bytes_per_second, plan.limits.keys_per_second);
    let turns = Turns::new(plan.limits.parallel_shards, plan.limits.source);
    let mut workers = Vec::with_capacity(count);
    for (index, (identity, upstream)) in identities.iter().zip(upstreams).enumerate() {
        let topology_shard = source.topology.shards.get(index);
        let dynamic = Arc::new(commands_of(&upstream.dialer, &upstream.address).await);
        let file_name = file_name(&plan.uid, &identity.lineage);
        let feed = match from.way {
            SourceWay::Replication => Feed::Replication(upstream),
            SourceWay::Scan => {
                let rules =
                    scan_rules(plan, source, Some(target.topology.server), &spool.folder, &file_name)?;
                Feed::Scan(upstream, rules)
            }
        };
        workers.push(WorkerSetup {
            uid: plan.uid.clone(),
            exactly_once: plan.delivery == Delivery::ExactlyOnce,
            shard: identity.id.clone(),
            lineage: identity.lineage.clone(),
            siblings: {
                let others = identities.iter().filter(|other| other.lineage != identity.lineage);
                others.map(|other| other.lineage.clone()).collect()
            },
            file_name,
            spool: spool.clone().of(&feed),
            feed,
            dynamic,
            target: shape.clone(),
            target_dialer: target_dialer.clone(),
            target_version: target.topology.server,
            target_databases: None,
            existing_keys: plan.target.existing_keys,
            database_map: plan.database_map.clone(),
            transform: plan.transform.clone(),
            sole_source: count == 1,
            slots: source.topology.is_cluster().then(|| identity.slots.clone()),
            serves: topology_shard.filter(|_| source.topology.is_cluster()).map(|shard| shard.slots.clone()),
            lane: lane_limits.clone(),
            turns: turns.clone(),
            max_restore_bytes: plan.limits.max_restore_bytes,
            max_quarantined: plan.failure_policy.max_quarantined,
            resume: checkpoints.shards.get(&identity.id).cloned(),
            restarted: false,
            anew: false,
            own_keys: checkpoints.begun,
        });
    }
    Ok(workers)
}

pub fn shape(target: &Topology) -> Result<TargetShape, MigrationError> {
    if target.is_cluster() {
        return Ok(TargetShape::Cluster(SlotMap::new(target)));
    }
    let master = target.shards.first().map(|shard| shard.master.address.clone());
    let master = master.ok_or_else(|| MigrationError {
        reason: reason::TARGET_UNREACHABLE,
        message: "the target has no master".to_owned(),
        transient: true,
    })?;
    Ok(match target.kind {
        TopologyKind::Sentinel => TargetShape::Watched(master),
        TopologyKind::Standalone | TopologyKind::Cluster => TargetShape::Standalone(master),
    })
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
pub fn file_name(uid: &str, lineage: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '-' };
    format!("{uid}.{}", lineage.chars().map(safe).collect::<String>())
}
