//! Rows of one write at rest: from before the source is asked until the target has it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::client::Reply;
use crate::figures::{Row, Unit, percentile};
use crate::incremental::attach;
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};

pub const ROWS: [&str; 2] = [P50, P99];

const P50: &str = "latency-p50";
const P99: &str = "latency-p99";

const WRITES: u64 = 1000;

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let row = |id, what| Row::new(id, what, "REPLICAOF").absolute(Unit::Milliseconds);
    let mut p50 = row(P50, "one write at rest, p50").within(1.0, 0.3);
    let mut p99 = row(P99, "one write at rest, p99").within(3.0, 1.0);
    for run in 1..=settings.runs {
        say(&format!("one write at rest, run {run} of {}", settings.runs));
        let reference = replica()?;
        p50.limit.extend(percentile(&reference, 0.5));
        p99.limit.extend(percentile(&reference, 0.99));
        if settings.limits_only {
            continue;
        }
        match migrate() {
            Ok(times) => {
                p50.ours.extend(percentile(&times, 0.5));
                p99.ours.extend(percentile(&times, 0.99));
            }
            Err(error) => {
                p50.fail(&error);
                p99.fail(&error);
            }
        }
    }
    Ok([p50, p99].into_iter().filter(|row| settings.wants(row.id)).collect())
}

fn replica() -> Result<Vec<f64>> {
    let (source, target) = (Server::start()?, Target::standalone()?);
    attach(&source, &target)?;
    write_and_watch(&source, &target)
}

fn migrate() -> Result<Vec<f64>> {
    let (source, target) = (Server::start()?, Target::standalone()?);
    let mut tool =
        Tool::start(&Task::Follow, &Route { source: source.endpoint(), target: target.endpoint()? })?;
    tool.condition("InSync", Duration::from_secs(60))?;
    let times = write_and_watch(&source, &target)?;
    tool.stop()?;
    Ok(times)
}

/// Times of single writes, in milliseconds.
///
/// The target announces the key by client-side caching's broadcast in the very cycle that applies the write:
/// nothing asks it, so nothing disturbs what is measured, and a replica announces alike.
fn write_and_watch(source: &Server, target: &Target) -> Result<Vec<f64>> {
    let mut writer = source.client()?;
    let mut watcher = target.nodes.first().context("no target")?.client()?;
    watcher.call(&["HELLO", "3"])?;
    watcher.call(&["CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", "write:"])?;
    let mut times = Vec::new();
    for number in 0..WRITES {
        let key = format!("write:{number}");
        let announced = Reply::Bulk(Some(key.clone().into_bytes()));
        writer.queue(&["SET", &key, "value"]);
        let started = Instant::now();
        writer.flush()?;
        loop {
            let push = watcher.reply()?.into_array()?;
            if push.iter().any(|item| matches!(item, Reply::Array(keys) if keys.contains(&announced))) {
                break;
            }
        }
        times.push(started.elapsed().as_secs_f64() * 1000.0);
        writer.reply()?;
        // At rest means that nothing is under way; uneven, so as not to fall into step with someone's timer.
        thread::sleep(Duration::from_micros(1000 + number * 7919 % 4000));
    }
    Ok(times)
}
