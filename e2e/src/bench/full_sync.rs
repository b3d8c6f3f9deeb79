//! Rows of workload F: full sync to a standalone server and to a cluster, its CPU, memory and verification.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::client::{info_field, poll};
use crate::figures::{Row, Unit};
use crate::prepared::Prepared;
use crate::server::{Server, Target, dbsize};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};
use crate::workload;

pub const ROWS: [&str; 8] = [STANDALONE, CLUSTER, REPLICAOF, CPU, MEMORY, VERIFY, SCAN, SCAN_MEMORY];

const STANDALONE: &str = "F-standalone";
const CLUSTER: &str = "F-cluster";
const REPLICAOF: &str = "F-replicaof";
const CPU: &str = "F-cpu";
const MEMORY: &str = "F-memory";
const VERIFY: &str = "F-verify";
const SCAN: &str = "F-scan";
const SCAN_MEMORY: &str = "F-scan-memory";

/// Rows that come out of the tool's run into a standalone target.
const OF_STANDALONE: [&str; 7] = [STANDALONE, REPLICAOF, CPU, MEMORY, VERIFY, SCAN, SCAN_MEMORY];
const OF_SCAN: [&str; 2] = [SCAN, SCAN_MEMORY];

const LONGEST: Duration = Duration::from_secs(300);

/// All rows asked for. Within a run the measurements alternate, so that a slow moment hits both sides of a ratio.
pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut rows = [
        Row::new(STANDALONE, "F → standalone, until InSync", "prepared RESTORE").within(1.5, 1.15),
        Row::new(CLUSTER, "F → 3-node cluster, until InSync", "prepared RESTORE").within(1.5, 1.15),
        Row::new(REPLICAOF, "F → standalone, until InSync", "REPLICAOF").within(1.1, 0.85),
        Row::new(CPU, "F, CPU of the tool", "CPU of the target").within(0.3, 0.15),
        Row::new(MEMORY, "F, peak memory", "").absolute(Unit::Mebibytes).within(150.0, 100.0),
        Row::new(VERIFY, "F, full verification", "full sync").within(3.0, 1.0),
        Row::new(SCAN, "F by SCAN → standalone, until InSync", "full sync").within(3.0, 2.0),
        Row::new(SCAN_MEMORY, "F by SCAN, peak memory", "").absolute(Unit::Mebibytes).within(150.0, 100.0),
    ];
    let [standalone, cluster, replicaof, cpu, memory, verify, scan, scan_memory] = &mut rows;
    let source = source(settings)?;
    for run in 1..=settings.runs {
        say(&format!("workload F, run {run} of {}", settings.runs));
        let before = match settings.wants_any(&[STANDALONE, CLUSTER]) {
            true => Some(limit(settings, &source)?),
            false => None,
        };
        if settings.wants(REPLICAOF) {
            replicaof.limit.push(replicate(&source)?);
        }
        if settings.limits_only {
            standalone.limit.extend(before);
            cluster.limit.extend(before);
            continue;
        }
        if settings.wants_any(&OF_STANDALONE) {
            let target = Target::standalone()?;
            match synchronise(&source, &target, run == 1, &[]) {
                Ok(sync) => {
                    standalone.record(&sync, sync.seconds);
                    replicaof.record(&sync, sync.seconds);
                    cpu.record(&sync, sync.cpu);
                    cpu.limit.push(sync.target_cpu);
                    memory.record(&sync, sync.peak as f64 / 1_048_576.0);
                    if settings.wants(VERIFY) {
                        match compare(&source, &target) {
                            Ok(compared) => {
                                verify.record(&compared, compared.seconds);
                                verify.limit.push(sync.seconds);
                            }
                            Err(error) => verify.fail(&error),
                        }
                    }
                    if settings.wants_any(&OF_SCAN) {
                        // Notifications, so that one pass is enough.
                        let fields = [
                            ("/spec/source/type", "Scan".into()),
                            ("/spec/source/redis/keyspaceNotifications", "Enable".into()),
                        ];
                        drop(target);
                        let target = Target::standalone()?;
                        match synchronise(&source, &target, run == 1, &fields) {
                            Ok(scanned) => {
                                scan.record(&scanned, scanned.seconds);
                                scan.limit.push(sync.seconds);
                                scan_memory.record(&scanned, scanned.peak as f64 / 1_048_576.0);
                            }
                            Err(error) => {
                                scan.fail(&error);
                                scan_memory.fail(&error);
                            }
                        }
                    }
                }
                Err(error) => {
                    for row in [&mut *standalone, &mut *replicaof, &mut *cpu, &mut *memory, &mut *verify] {
                        row.fail(&error);
                    }
                }
            }
        }
        if settings.wants(CLUSTER) {
            let target = Target::cluster()?;
            match synchronise(&source, &target, run == 1, &[]) {
                Ok(sync) => cluster.record(&sync, sync.seconds),
                Err(error) => cluster.fail(&error),
            }
        }
        if let Some(before) = before {
            // On both sides of what it is the limit of, as the speed of a machine drifts.
            let mean = f64::midpoint(before, limit(settings, &source)?);
            standalone.limit.push(mean);
            cluster.limit.push(mean);
        }
    }
    Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect())
}

/// One run of the tool.
struct Sync {
    seconds: f64,
    cpu: f64,
    peak: u64,
    target_cpu: f64,
}

impl Row {
    fn record(&mut self, sync: &Sync, value: f64) {
        self.ours.push(value);
        self.cpu.push(sync.cpu);
        self.peak.push(sync.peak);
    }
}

/// The source with workload F, made once and then loaded from the cache.
pub fn source(settings: &Settings) -> Result<Server> {
    let file = settings.cached("rdb");
    if file.is_file() {
        return Server::holding(&file);
    }
    say("making workload F");
    let started = Instant::now();
    let source = Server::start()?;
    workload::fill(source.port(), settings.scale)?;
    let memory = source.client()?.info("memory", "used_memory_human")?;
    // Renamed into place, so that a cached file is always a whole one.
    let partial = file.with_extension("partial");
    let size = fs::copy(source.save()?, &partial)?;
    fs::rename(&partial, &file)?;
    say(&format!("made in {:.1?}: {memory} in memory, RDB {} MB", started.elapsed(), size / 1_000_000));
    Ok(source)
}

pub fn limit(settings: &Settings, source: &Server) -> Result<f64> {
    // Loaded anew each time: 400 MB kept by this process would weigh on the rest of the run.
    let prepared = Prepared::load(&settings.cached("restore"), source)?;
    let target = Server::start()?;
    let seconds = prepared.pipe_into(&target)?.as_secs_f64();
    let (keys, arrived) = (prepared.keys() as i64, dbsize(&target)?);
    if keys != arrived || keys != dbsize(source)? {
        bail!("{keys} prepared commands made {arrived} keys");
    }
    say(&format!("prepared RESTORE, {} MB: {seconds:.2} s", prepared.size() / 1_000_000));
    Ok(seconds)
}

/// Redis's own full sync, until the link is up and the offsets are equal.
fn replicate(source: &Server) -> Result<f64> {
    source.settle()?;
    let replica = Server::start()?;
    let (mut near, mut far) = (source.client()?, replica.client()?);
    let started = Instant::now();
    far.call(&["REPLICAOF", "127.0.0.1", &source.port().to_string()])?;
    poll("the replica is in sync", Duration::from_millis(5), LONGEST, || {
        let text = String::from_utf8_lossy(&far.call(&["INFO", "replication"])?.into_bytes()?).into_owned();
        let up = info_field(&text, "master_link_status").as_deref() == Some("up");
        let done = up
            && info_field(&text, "slave_repl_offset")
                == Some(near.info("replication", "master_repl_offset")?);
        Ok(done.then_some(()))
    })?;
    let seconds = started.elapsed().as_secs_f64();
    say(&format!("REPLICAOF: {seconds:.2} s"));
    Ok(seconds)
}

fn synchronise(source: &Server, target: &Target, check: bool, fields: &[(&str, Value)]) -> Result<Sync> {
    source.settle()?;
    let before = target.cpu_seconds()?;
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let mut tool = Tool::start_with(&Task::UntilInSync, &route, fields)?;
    let seconds = tool.condition("InSync", LONGEST)?.as_secs_f64();
    let target_cpu = target.cpu_seconds()? - before;
    let usage = tool.finish(Duration::from_secs(30))?;
    if check {
        target.must_equal(source)?;
    }
    let nodes = target.nodes.len();
    say(&format!("the tool to {nodes} node(s): {seconds:.2} s, CPU {:.2} s of {target_cpu:.2} s", usage.cpu));
    Ok(Sync { seconds, cpu: usage.cpu, peak: usage.peak, target_cpu })
}

fn compare(source: &Server, target: &Target) -> Result<Sync> {
    source.settle()?;
    let before = target.cpu_seconds()?;
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let usage = Tool::start(&Task::Verify, &route)?.finish(LONGEST)?;
    let target_cpu = target.cpu_seconds()? - before;
    Ok(Sync { seconds: usage.elapsed.as_secs_f64(), cpu: usage.cpu, peak: usage.peak, target_cpu })
}
