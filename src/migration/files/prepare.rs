//! What has to be known before the first byte: which files there are, where they go, and whether they may.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::lineage;
use crate::api::Plan;
use crate::api::conditions::reason;
use crate::api::plan::{
    Delivery, ExistingKeys, SHARD, SourceFiles, SourcePlan, SourceWay, TargetFiles, TargetPlace,
    VerificationMode,
};
use crate::migration::identity::{KnownShard, identify};
use crate::migration::setup::{self, file_name, shape};
use crate::migration::{CheckReport, DataDir, Finding, FindingLevel, MigrationError};
use crate::object::{Destination, FileUri, ObjectError, SourceFile, find};
use crate::preflight::PreflightReport;
use crate::rdb::{Decoder, Event, Limits, Step};
use crate::slot::SlotRanges;
use crate::target::file::FileFormat;
use crate::target::lane::LaneLimits;
use crate::topology::Topology;
use crate::worker::export::ExportSetup;
use crate::worker::turn::Turns;
use crate::worker::{Feed, SpoolSetup, Upstream, WorkerSetup};

/// Files whose beginning is looked at beforehand.
const LOOKED_AT: usize = 8;
/// A look at a file or store takes this long at most.
const LONGEST: Duration = Duration::from_secs(5);

/// One shard's part of the work.
pub enum Part {
    Load(Box<WorkerSetup>),
    Export(Box<ExportSetup>),
}

impl Part {
    pub fn shard(&self) -> &str {
        match self {
            Self::Load(setup) => &setup.shard,
            Self::Export(setup) => &setup.shard,
        }
    }

    fn feed(&self) -> &Feed {
        match self {
            Self::Load(setup) => &setup.feed,
            Self::Export(setup) => &setup.feed,
        }
    }
}

/// Both sides as they were found.
pub struct Prepared {
    pub parts: Vec<Part>,
    pub report: PreflightReport,
    pub findings: CheckReport,
}

/// Preflight only; leaves nothing behind.
pub async fn check(plan: &Plan) -> Result<CheckReport, MigrationError> {
    Ok(prepare(plan, true, None).await?.findings)
}

/// `first`: no earlier run is known to have written to the target. `data_dir`: for the spool.
pub async fn prepare(
    plan: &Plan,
    first: bool,
    data_dir: Option<&DataDir>,
) -> Result<Prepared, MigrationError> {
    let files = match &plan.source {
        SourcePlan::Redis(_) => Vec::new(),
        SourcePlan::RdbFile(files) => look_for(files).await?,
    };
    let lineages = |_: &PreflightReport| {
        names(files.iter().map(|file| &file.uri)).iter().map(|id| lineage(id)).collect()
    };
    let report = setup::look(plan, first, lineages).await?;
    let folder = spool_folder(data_dir, &plan.uid);
    let feeds = feeds(plan, files, &report, &folder)?;
    let spool = SpoolSetup {
        memory: plan.limits.spool_memory as u64,
        disk: plan.limits.spool_disk,
        retain: 0,
        folder,
        volume: data_dir.map(|data_dir| data_dir.volume.clone()).unwrap_or_default(),
        lasts: false,
    };
    let slots: Vec<SlotRanges> = match &report.source {
        Some(source) if source.topology.is_cluster() => {
            source.topology.shards.iter().map(|shard| shard.slots.clone()).collect()
        }
        _ => Vec::new(),
    };
    let parts = match &plan.target.place {
        TargetPlace::Redis(_) => loads(plan, &feeds, &report, &spool)?,
        TargetPlace::RdbFile(to) => exports(plan, &feeds, to, FileFormat::Rdb, &spool, &slots).await?,
        TargetPlace::Json(to) => exports(plan, &feeds, to, FileFormat::Json, &spool, &slots).await?,
    };
    let findings = findings(plan, &report, &parts);
    Ok(Prepared { parts, report, findings })
}

async fn look_for(files: &SourceFiles) -> Result<Vec<SourceFile>, MigrationError> {
    let mut found: Vec<SourceFile> = Vec::new();
    for uri in &files.uris {
        let files = in_time(uri, find(uri, &files.credentials)).await;
        for file in files.map_err(|error| unreadable(&error))? {
            // Two globs may meet the same one.
            if found.iter().all(|known| known.uri != file.uri) {
                found.push(file);
            }
        }
    }
    let heads = found.iter().take(LOOKED_AT).map(looks_like_rdb);
    futures::future::try_join_all(heads).await?;
    Ok(found)
}

/// What is not told by then keeps people waiting.
async fn in_time<T>(
    uri: &FileUri,
    asked: impl Future<Output = Result<T, ObjectError>>,
) -> Result<T, ObjectError> {
    let text = || format!("no answer within {LONGEST:?}; see to its address and to the network");
    let silent = |_| ObjectError::Store { uri: uri.clone(), text: text(), transient: true };
    tokio::time::timeout(LONGEST, asked).await.map_err(silent)?
}

/// The beginning tells whether it is an RDB at all.
async fn looks_like_rdb(file: &SourceFile) -> Result<(), MigrationError> {
    let chunk = file.chunks(0).next().await.map_err(|error| unreadable(&error))?.unwrap_or_default();
    let mut decoder = Decoder::new(Limits::default());
    let why = match decoder.next(&chunk) {
        Ok(Step::Event { event: Event::Header { .. }, .. }) => return Ok(()),
        Ok(_) => "it is too short for an RDB".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(impossible(format!("{}: no RDB that can be read: {why}", file.uri)))
}

/// The id of each file's shard: its name, where that tells it from the others.
fn names<'a>(uris: impl Iterator<Item = &'a FileUri> + Clone) -> Vec<String> {
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for uri in uris.clone() {
        *count.entry(uri.name()).or_default() += 1;
    }
    let name = |uri: &FileUri| match count.get(uri.name()) {
        Some(1) => uri.name().to_owned(),
        _ => uri.to_string(),
    };
    let mut given: BTreeMap<String, usize> = BTreeMap::new();
    let mut alone = |name: String| {
        let times = given.entry(name.clone()).or_default();
        *times += 1;
        // URLs that differ in their query, which is not shown.
        if *times == 1 { name } else { format!("{name}#{times}") }
    };
    uris.map(name).map(&mut alone).collect()
}

/// The shards of the source.
fn feeds(
    plan: &Plan,
    files: Vec<SourceFile>,
    report: &PreflightReport,
    folder: &Path,
) -> Result<Vec<(String, Feed)>, MigrationError> {
    let Some(from) = plan.source.redis() else {
        return Ok(names(files.iter().map(|file| &file.uri))
            .into_iter()
            .zip(files.into_iter().map(Feed::File))
            .collect());
    };
    let source = report.source.as_ref();
    let source =
        source.ok_or_else(|| impossible("preflight looked at no source: this is a bug".to_owned()))?;
    let known = identify(&source.topology, &[], |_| false);
    // A snapshot that is not whole yet is begun again, whatever the policy says of one that stands.
    let upstreams = setup::upstreams(plan, source, &known, true)?;
    let feed = |(known, upstream): (KnownShard, Upstream)| {
        let feed = match from.way {
            SourceWay::Replication => Feed::Replication(upstream),
            SourceWay::Scan => {
                let file_name = file_name(&plan.uid, &lineage(&known.id));
                Feed::Scan(upstream, setup::scan_rules(plan, source, None, folder, &file_name)?)
            }
        };
        Ok((known.id, feed))
    };
    known.into_iter().zip(upstreams).map(feed).collect()
}

fn loads(
    plan: &Plan,
    feeds: &[(String, Feed)],
    report: &PreflightReport,
    spool: &SpoolSetup,
) -> Result<Vec<Part>, MigrationError> {
    let target = setup::target_of(report)?;
    let (shape, dialer) = (shape(&target.topology)?, setup::target_dialer(plan)?);
    let lane = LaneLimits::new(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
    lane.pace().set(plan.limits.bytes_per_second, plan.limits.keys_per_second);
    let sole_source = feeds.len() == 1;
    let turns = Turns::new(plan.limits.parallel_shards, plan.limits.source);
    let part = |(shard, feed): &(String, Feed)| {
        let lineage = lineage(shard);
        Part::Load(Box::new(WorkerSetup {
            siblings: Vec::new(),
            uid: plan.uid.clone(),
            shard: shard.clone(),
            file_name: file_name(&plan.uid, &lineage),
            lineage,
            exactly_once: plan.delivery == Delivery::ExactlyOnce,
            feed: feed.clone(),
            dynamic: Arc::default(),
            target: shape.clone(),
            target_dialer: dialer.clone(),
            target_version: target.topology.server,
            target_databases: databases(&target.topology),
            existing_keys: plan.target.existing_keys,
            database_map: plan.database_map.clone(),
            transform: plan.transform.clone(),
            sole_source,
            slots: None,
            serves: None,
            lane: lane.clone(),
            max_restore_bytes: plan.limits.max_restore_bytes,
            spool: spool.clone().of(feed),
            max_quarantined: plan.failure_policy.max_quarantined,
            resume: None,
            restarted: false,
            anew: false,
            own_keys: false,
            turns: turns.clone(),
        }))
    };
    Ok(feeds.iter().map(part).collect())
}

/// A cluster that does not say has one.
fn databases(target: &Topology) -> Option<u64> {
    target.databases.or(target.is_cluster().then_some(1))
}

async fn exports(
    plan: &Plan,
    feeds: &[(String, Feed)],
    to: &TargetFiles,
    format: FileFormat,
    spool: &SpoolSetup,
    slots: &[SlotRanges],
) -> Result<Vec<Part>, MigrationError> {
    let count = feeds.len();
    if count > 1 && !to.uri.contains(SHARD) {
        return Err(impossible(format!(
            "the target's uri names one file for {count} shards; write {SHARD} where the shard's name is to stand"
        )));
    }
    let mut parts = Vec::with_capacity(count);
    let turns = Turns::new(plan.limits.parallel_shards, plan.limits.source);
    let read_back = plan.verification.mode == VerificationMode::Full;
    let mut uris: BTreeMap<FileUri, &str> = BTreeMap::new();
    for (shard, feed) in feeds {
        let uri = to.uri.replace(SHARD, &safe(shard));
        let uri = FileUri::parse(&uri).map_err(|error| impossible(format!("the target's uri {error}")))?;
        if let Some(other) = uris.insert(uri.clone(), shard) {
            return Err(impossible(format!("{uri}: is the file of two shards, {other} and {shard}")));
        }
        let replace = plan.target.existing_keys == ExistingKeys::Replace;
        let destination = Destination::new(uri, to.credentials.clone(), replace, read_back);
        in_time(&destination.uri, destination.check()).await.map_err(|error| unwritable(&error))?;
        let lineage = lineage(shard);
        parts.push(Part::Export(Box::new(ExportSetup {
            shard: shard.clone(),
            feed: feed.clone(),
            slots: slots.to_vec(),
            destination,
            format,
            transform: plan.transform.clone(),
            spool: spool.clone().of(feed),
            file_name: file_name(&plan.uid, &lineage),
            max_quarantined: plan.failure_policy.max_quarantined,
            turns: turns.clone(),
        })));
    }
    Ok(parts)
}

/// As a part of a file's name.
fn safe(shard: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' };
    shard.chars().map(safe).collect()
}

fn findings(plan: &Plan, report: &PreflightReport, parts: &[Part]) -> CheckReport {
    let mut findings = setup::findings(plan, report).findings;
    let mut passed = |subject: &str, detail: String| {
        findings.push(Finding { subject: subject.to_owned(), level: FindingLevel::Passed, detail });
    };
    for part in parts {
        let Feed::File(file) = part.feed() else { continue };
        passed("source file", format!("{}, {} bytes, readable", file.uri, file.size));
    }
    for part in parts {
        if let Part::Export(setup) = part {
            passed("target file", format!("{}, writable, of shard {}", setup.destination.uri, setup.shard));
        }
    }
    CheckReport { findings }
}

fn unreadable(error: &ObjectError) -> MigrationError {
    let reason = if error.is_auth() { reason::AUTH_FAILED } else { reason::PREFLIGHT_FAILED };
    MigrationError { reason, message: format!("source: {error}"), transient: error.is_transient() }
}

fn unwritable(error: &ObjectError) -> MigrationError {
    let reason = match error {
        ObjectError::Exists { .. } => reason::TARGET_NOT_EMPTY,
        error if error.is_auth() => reason::AUTH_FAILED,
        _ => reason::PREFLIGHT_FAILED,
    };
    MigrationError { reason, message: format!("target: {error}"), transient: error.is_transient() }
}

fn impossible(message: String) -> MigrationError {
    MigrationError { reason: reason::PREFLIGHT_FAILED, message, transient: false }
}

/// Where an export from a server may keep what its file does not take yet.
pub fn spool_folder(data_dir: Option<&DataDir>, uid: &str) -> PathBuf {
    match data_dir {
        Some(data_dir) => data_dir.spools(),
        None => std::env::temp_dir().join(format!("redis-migration-{uid}-{}", std::process::id())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_has_an_id_of_its_own() {
        let named = |uris: &[&str]| {
            names(uris.iter().map(|uri| FileUri::parse(uri).unwrap()).collect::<Vec<_>>().iter())
        };
        assert_eq!(named(&["/a/1.rdb", "/a/2.rdb"]), ["1.rdb", "2.rdb"]);
        assert_eq!(named(&["/a/1.rdb", "/b/1.rdb"]), ["/a/1.rdb", "/b/1.rdb"]);
        // A query may hold a signature, and is never shown.
        let urls = ["http://h/f?node=1", "http://h/f?node=2", "http://h/g?node=2"];
        assert_eq!(named(&urls), ["http://h/f", "http://h/f#2", "g"]);
    }
}
