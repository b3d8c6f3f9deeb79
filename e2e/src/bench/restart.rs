//! Rows of a restart. Every slot of a cluster has a guard, the tool is killed and started again, until it has applied
//! the first command that it had not. And under load: how far before what stands on the target it goes on.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use e2e::client::slot;

use crate::client::{Client, Pipe, Reply, info_field, poll};
use crate::figures::{Row, Unit};
use crate::incremental::{acknowledged, has};
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};

pub const ROWS: [&str; 2] = [RESTART, REPLAYS];

const RESTART: &str = "restart-guards";
const REPLAYS: &str = "restart-replays";

const SLOTS: u16 = 16_384;
const POLL: Duration = Duration::from_millis(2);
const LONGEST: Duration = Duration::from_secs(60);

/// Of the load under which the tool is killed.
const COMMANDS: u64 = 1_000_000;
const HASHES: u64 = 1000;
/// `limits.pipelineCommands`, by default, for each node of the target.
const WINDOW: f64 = 1024.0;

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let what = "SIGKILL and restart, guards in all slots, until the first command";
    let mut row = Row::new(RESTART, what, "").absolute(Unit::Seconds).within(1.0, 0.5);
    let what = "SIGKILL under load, to a cluster: sent again though they stood";
    let mut replays = Row { unit: Unit::Commands, ..Row::new(REPLAYS, what, "the windows") }.within(1.0, 0.5);
    for run in 1..=settings.runs {
        if settings.limits_only {
            break;
        }
        if settings.wants(REPLAYS) {
            match replayed() {
                Ok((commands, windows)) => {
                    replays.ours.push(commands);
                    replays.limit.push(windows);
                }
                Err(error) => replays.fail(&error),
            }
        }
        if !settings.wants(RESTART) {
            continue;
        }
        say(&format!("restart with a guard in each slot, run {run} of {}", settings.runs));
        match restart() {
            Ok(seconds) => {
                say(&format!("{RESTART}: {seconds:.3} s"));
                row.ours.push(seconds);
            }
            Err(error) => row.fail(&error),
        }
    }
    Ok([row, replays].into_iter().filter(|row| settings.wants(row.id)).collect())
}

/// From the start of the second process until the target has what was written between the two, in seconds.
fn restart() -> Result<f64> {
    let (source, target) = (Server::start()?, Target::cluster()?);
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let mut tool = Tool::start(&Task::Follow, &route)?;
    tool.condition("InSync", LONGEST)?;
    let keys = key_of_each_slot();
    let mut pipe = Pipe::open(source.port())?;
    for key in keys.values() {
        pipe.command(&["INCR", key])?;
    }
    pipe.finish(keys.len() as u64)?;
    acknowledged(&source)?;
    let guarded = keys_of(&target)?;
    if guarded < 2 * i64::from(SLOTS) {
        bail!("{guarded} keys on the target: there is not a guard for each of the {SLOTS} counters");
    }

    let first = "first:after";
    let mut tool = tool.kill_and_start(&Task::Follow, || {
        source.client()?.call(&["INCR", first])?;
        Ok(())
    })?;
    let mut watched = owner(&target, first)?;
    poll("the first command", POLL, LONGEST, || Ok(has(&mut watched, first)?.then_some(())))?;
    let seconds = tool.started().elapsed().as_secs_f64();
    tool.condition("InSync", LONGEST)?;
    acknowledged(&source)?;
    tool.stop()?;
    target.must_equal(&source)?;
    Ok(seconds)
}

/// Commands that the target got from both processes, and how many may be under way at once. They are of the kind that
/// may be repeated: others are guarded.
fn replayed() -> Result<(f64, f64)> {
    let (source, target) = (Server::start()?, Target::cluster()?);
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let mut tool = Tool::start(&Task::Follow, &route)?;
    tool.condition("InSync", LONGEST)?;
    // What is not applied yet is asked of the source, which has to have it.
    source.client()?.call(&["CONFIG", "SET", "repl-backlog-size", "268435456"])?;
    let mut pipe = Pipe::open(source.port())?;
    let load = thread::spawn(move || {
        for number in 0..COMMANDS {
            pipe.command(&["HSET", &format!("h:{}", number % HASHES), "field", &number.to_string()])?;
        }
        pipe.finish(COMMANDS)
    });
    poll("a part of the load", POLL, LONGEST, || Ok((taken(&target)? > COMMANDS / 4).then_some(())))?;
    let mut before = 0;
    let mut tool = tool.kill_and_start(&Task::Follow, || {
        load.join().map_err(|_| anyhow!("the load panicked"))??;
        before = taken(&target)?;
        Ok(())
    })?;
    if before >= COMMANDS {
        bail!("the tool had applied all before it was killed");
    }
    tool.condition("InSync", LONGEST)?;
    acknowledged(&source)?;
    if !tool.has_logged("going on from what the target has")? {
        bail!("the second process did not go on");
    }
    let all = taken(&target)?;
    tool.stop()?;
    target.must_equal(&source)?;
    let again = all.checked_sub(COMMANDS).context("the target got less than all commands")?;
    say(&format!("{REPLAYS}: {before} stood, {again} of them were sent again"));
    Ok((again as f64, WINDOW * target.nodes.len() as f64))
}

/// Commands of the load that the nodes have run.
fn taken(target: &Target) -> Result<u64> {
    let mut sum = 0;
    for node in &target.nodes {
        let stats = node.client()?.call(&["INFO", "commandstats"])?.into_bytes()?;
        let line = info_field(&String::from_utf8(stats)?, "cmdstat_hset").unwrap_or_default();
        let calls = line.split(',').find_map(|field| field.strip_prefix("calls="));
        sum += calls.map_or(Ok(0), str::parse::<u64>)?;
    }
    Ok(sum)
}

fn key_of_each_slot() -> BTreeMap<u16, String> {
    let mut keys = BTreeMap::new();
    for number in 0u32.. {
        if keys.len() == usize::from(SLOTS) {
            break;
        }
        let key = format!("counter:{number}");
        keys.entry(slot(key.as_bytes())).or_insert(key);
    }
    keys
}

fn keys_of(target: &Target) -> Result<i64> {
    let mut sum = 0;
    for node in &target.nodes {
        let Reply::Integer(keys) = node.client()?.call(&["DBSIZE"])? else {
            bail!("DBSIZE did not answer a number");
        };
        sum += keys;
    }
    Ok(sum)
}

/// A connection to the node that serves the key.
fn owner(target: &Target, key: &str) -> Result<Client> {
    for node in &target.nodes {
        let mut client = node.client()?;
        if has(&mut client, key).is_ok() {
            return Ok(client);
        }
    }
    None.with_context(|| format!("no node serves {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_gets_a_counter() {
        let keys = key_of_each_slot();
        assert_eq!((keys.len(), keys.keys().next(), keys.keys().last()), (16_384, Some(&0), Some(&16_383)));
        assert!(keys.iter().all(|(number, key)| slot(key.as_bytes()) == *number));
    }
}
