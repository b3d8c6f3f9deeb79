//! Row of the source's replica output buffer while the target is slow.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::client::{Client, Pipe, Reply};
use crate::figures::{Row, Unit};
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::throttle::Throttle;
use crate::tool::{Route, Task, Tool};
use crate::workload;

pub const ROWS: [&str; 1] = [BUFFER];

const BUFFER: &str = "source-buffer";

/// What the slow target takes, in bytes a second.
const SLOW: f64 = 5_000_000.0;

/// Watched on after the last command, as what the source could not send yet still waits there.
const AFTERWARDS: Duration = Duration::from_secs(2);

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut row = Row::new(BUFFER, "source's replica buffer, I, target at 5 MB/s", "")
        .absolute(Unit::Mebibytes)
        .within(1.0, 0.0);
    if settings.limits_only {
        return Ok(vec![row]);
    }
    let (commands, count) = workload::incremental(settings.scale);
    for run in 1..=settings.runs {
        say(&format!("slow target, run {run} of {}", settings.runs));
        if let Err(error) = run_once(&commands, count, &mut row) {
            row.fail(&error);
        }
    }
    Ok(vec![row])
}

fn run_once(commands: &[u8], count: u64, row: &mut Row) -> Result<()> {
    let (source, target) = (Server::start()?, Target::standalone()?);
    let target = target.nodes.first().context("no target")?;
    let slow = Throttle::start(target.port(), SLOW)?;
    let mut tool = Tool::start(&Task::Follow, &Route { source: source.endpoint(), target: slow.endpoint() })?;
    tool.condition("InSync", Duration::from_secs(60))?;

    let mut client = source.client()?;
    let mut most = 0;
    thread::scope(|scope| -> Result<()> {
        let feed = scope.spawn(|| -> Result<()> {
            let mut pipe = Pipe::open(source.port())?;
            pipe.write_all(commands)?;
            pipe.command(&["SET", "marker", "arrived"])?;
            pipe.finish(count + 1)
        });
        while !feed.is_finished() {
            most = most.max(replica_buffer(&mut client)?);
            thread::sleep(Duration::from_millis(5));
        }
        feed.join().map_err(|_| anyhow!("the feeding thread panicked"))?
    })?;
    let until = Instant::now() + AFTERWARDS;
    while Instant::now() < until {
        most = most.max(replica_buffer(&mut client)?);
        thread::sleep(Duration::from_millis(5));
    }
    if target.client()?.call(&["EXISTS", "marker"])? == Reply::Integer(1) {
        bail!("the target kept up: it was not slow, or --scale is too small");
    }
    let peak = tool.peak_memory();
    row.cpu.push(tool.cpu_seconds()?);
    row.peak.push(peak);
    row.ours.push(most as f64 / 1_048_576.0);
    Ok(())
}

/// Bytes that wait in the source for its replicas (`omem` of CLIENT LIST).
fn replica_buffer(client: &mut Client) -> Result<u64> {
    let text = client.call(&["CLIENT", "LIST", "TYPE", "replica"])?.into_bytes()?;
    let text = String::from_utf8_lossy(&text);
    let waiting: Vec<u64> = text
        .split_ascii_whitespace()
        .filter_map(|field| field.strip_prefix("omem="))
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    if waiting.is_empty() {
        bail!("the source has lost its replica: a full buffer, or the tool went away");
    }
    Ok(waiting.iter().sum())
}
