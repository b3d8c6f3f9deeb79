//! Row of a restart: every slot of a cluster has a guard, the tool is killed and started again, until it has
//! applied the first command that it had not.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use e2e::client::slot;

use crate::client::{Client, Pipe, poll};
use crate::figures::{Row, Unit};
use crate::incremental::{acknowledged, has};
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};

pub const ROWS: [&str; 1] = [RESTART];

const RESTART: &str = "restart-guards";

const SLOTS: u16 = 16_384;
const POLL: Duration = Duration::from_millis(2);
const LONGEST: Duration = Duration::from_secs(60);

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let what = "SIGKILL and restart, guards in all slots, until the first command";
    let mut row = Row::new(RESTART, what, "").absolute(Unit::Seconds).within(1.0, 0.5);
    for run in 1..=settings.runs {
        if settings.limits_only {
            break;
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
    Ok(vec![row])
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
        let crate::client::Reply::Integer(keys) = node.client()?.call(&["DBSIZE"])? else {
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
