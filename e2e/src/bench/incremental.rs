//! Rows of workload I: commands piped into the source as fast as it takes them, until the target has the last one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::client::{Client, Pipe, Reply, poll};
use crate::figures::Row;
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};
use crate::workload;

pub const ROWS: [&str; 2] = [STANDALONE, CLUSTER];

const STANDALONE: &str = "I-standalone";
const CLUSTER: &str = "I-cluster";

const LONGEST: Duration = Duration::from_secs(180);

/// Asking every node this often costs each less than a thousandth of its time.
const POLL: Duration = Duration::from_millis(2);

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut standalone =
        Row::new(STANDALONE, "I → standalone, until caught up", "REPLICAOF").within(1.5, 1.15);
    let mut cluster = Row::new(CLUSTER, "I → 3-node cluster, until caught up", "REPLICAOF").within(1.8, 1.3);
    let (commands, count) = workload::incremental(settings.scale);
    for run in 1..=settings.runs {
        say(&format!(
            "workload I, run {run} of {}: {count} commands, {} MB",
            settings.runs,
            commands.len() / 1_000_000
        ));
        let check = run == 1;
        let limit = replica(&commands, count, check)?;
        say(&format!("REPLICAOF: {limit:.2} s"));
        for row in [&mut standalone, &mut cluster] {
            row.limit.push(limit);
            if settings.limits_only || !settings.wants(row.id) {
                continue;
            }
            let target = if row.id == CLUSTER { Target::cluster()? } else { Target::standalone()? };
            match migrate(&target, &commands, count, check, &[]) {
                Ok(run) => {
                    say(&format!("{}: {:.2} s, CPU {:.2} s", row.id, run.seconds, run.cpu));
                    row.ours.push(run.seconds);
                    row.cpu.push(run.cpu);
                    row.peak.push(run.peak);
                }
                Err(error) => row.fail(&error),
            }
        }
    }
    Ok([standalone, cluster].into_iter().filter(|row| settings.wants(row.id)).collect())
}

/// What a run of the tool took.
pub struct Run {
    pub seconds: f64,
    pub cpu: f64,
    pub peak: u64,
}

/// Workload I through the tool with these manifest fields; `check`: both sides are compared.
pub fn migrate(
    target: &Target,
    commands: &[u8],
    count: u64,
    check: bool,
    fields: &[(&str, Value)],
) -> Result<Run> {
    let source = Server::start()?;
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let mut tool = Tool::start_with(&Task::Follow, &route, fields)?;
    tool.condition("InSync", Duration::from_secs(60))?;
    let cpu = tool.cpu_seconds()?;
    let seconds = until_caught_up(&source, target, commands, count)?;
    let cpu = tool.cpu_seconds()? - cpu;
    acknowledged(&source)?;
    let usage = tool.stop()?;
    if check {
        target.must_equal(&source)?;
    }
    Ok(Run { seconds, cpu, peak: usage.peak })
}

fn replica(commands: &[u8], count: u64, check: bool) -> Result<f64> {
    let (source, target) = (Server::start()?, Target::standalone()?);
    attach(&source, &target)?;
    let seconds = until_caught_up(&source, &target, commands, count)?;
    acknowledged(&source)?;
    if check {
        target.must_equal(&source)?;
    }
    Ok(seconds)
}

/// Makes a standalone target a replica of the source and waits for the link.
pub fn attach(source: &Server, target: &Target) -> Result<()> {
    let mut client = target.nodes.first().context("no target")?.client()?;
    client.call(&["REPLICAOF", "127.0.0.1", &source.port().to_string()])?;
    poll("the replica is attached", Duration::from_millis(5), LONGEST, || {
        Ok((client.info("replication", "master_link_status")? == "up").then_some(()))
    })
}

/// From the first byte piped until a last write has reached every node of the target, in seconds.
fn until_caught_up(source: &Server, target: &Target, commands: &[u8], count: u64) -> Result<f64> {
    let mut watched = Vec::new();
    for node in &target.nodes {
        watched.push((node.client()?, marker_of(node, target)?));
    }
    let started = Instant::now();
    let mut pipe = Pipe::open(source.port())?;
    pipe.write_all(commands)?;
    for (_, marker) in &watched {
        pipe.command(&["SET", marker, "arrived"])?;
    }
    pipe.finish(count + watched.len() as u64)?;
    for (client, marker) in &mut watched {
        poll("the last write arrives", POLL, LONGEST, || Ok(has(client, marker)?.then_some(())))?;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// A key that this node of the target owns: as each node is fed in order, its arrival says all arrived.
fn marker_of(node: &Server, target: &Target) -> Result<String> {
    if target.nodes.len() == 1 {
        return Ok("marker".to_owned());
    }
    let mut client = node.client()?;
    for number in 0..1000 {
        let key = format!("marker:{number}");
        client.queue(&["EXISTS", &key]);
        client.flush()?;
        // A node that does not own the slot answers MOVED.
        if let Reply::Integer(_) = client.reply()? {
            return Ok(key);
        }
    }
    bail!("no key of a thousand belongs to 127.0.0.1:{}", node.port())
}

pub fn has(client: &mut Client, key: &str) -> Result<bool> {
    Ok(client.call(&["EXISTS", key])? == Reply::Integer(1))
}

/// Waits until the source has heard that everything it sent was applied. Not part of the time: it is told once a second.
pub fn acknowledged(source: &Server) -> Result<()> {
    let mut client = source.client()?;
    poll("the offsets are equal", Duration::from_millis(20), Duration::from_secs(15), || {
        let replica = client.info("replication", "slave0")?;
        let offset = replica.split(',').find_map(|field| field.strip_prefix("offset=")).map(str::to_owned);
        Ok((offset == Some(client.info("replication", "master_repl_offset")?)).then_some(()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_of_a_cluster_is_watched_by_a_key_of_its_own() {
        let target = Target::cluster().unwrap();
        let markers: Vec<String> =
            target.nodes.iter().map(|node| marker_of(node, &target).unwrap()).collect();
        for (node, own) in target.nodes.iter().zip(&markers) {
            let mut client = node.client().unwrap();
            for marker in &markers {
                // Only the owner takes it: the others answer MOVED.
                assert_eq!(client.call(&["SET", marker, "arrived"]).is_ok(), marker == own);
            }
            assert!(has(&mut client, own).unwrap());
        }
    }

    #[test]
    fn a_replica_fed_with_the_workload_catches_up_and_is_equal() {
        let (commands, count) = workload::incremental(0.001);
        assert!(replica(&commands, count, true).unwrap() > 0.0);
    }
}
