//! Rows of files: workload F as an RDB, into a server, into JSON, walked through, and out of a server.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::tool::binary;
use serde_json::{Value, json};

use crate::figures::Row;
use crate::full_sync::{limit, source};
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool, Usage};

pub const ROWS: [&str; 4] = [LOAD, JSON, STAT, BACKUP];

const LOAD: &str = "file-load";
const JSON: &str = "file-json";
const STAT: &str = "file-stat";
const BACKUP: &str = "file-backup";

const LONGEST: Duration = Duration::from_secs(300);

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut rows = [
        Row::new(LOAD, "RDB file of F → standalone", "prepared RESTORE").within(1.4, 1.1),
        Row::new(JSON, "RDB file of F → JSON", "redis-check-rdb").within(3.0, 1.5),
        Row::new(STAT, "RDB file of F, stat", "redis-check-rdb").within(0.6, 0.3),
        Row::new(BACKUP, "F by replication → RDB file", "redis-cli --rdb").within(1.1, 1.0),
    ];
    let source = source(settings)?;
    let file = settings.cached("rdb");
    for run in 1..=settings.runs {
        say(&format!("files of workload F, run {run} of {}", settings.runs));
        for row in rows.iter_mut().filter(|row| settings.wants(row.id)) {
            if let Err(error) = once(settings, &source, &file, row) {
                row.fail(&error);
            }
        }
    }
    Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect())
}

fn once(settings: &Settings, source: &Server, file: &Path, row: &mut Row) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out");
    let before = against(settings, source, file, row.id)?;
    if settings.limits_only {
        row.limit.push(before);
        return Ok(());
    }
    match row.id {
        LOAD => {
            let target = Target::standalone()?;
            record(row, &run(source, &target, &[("/spec/source", read(file))])?);
            target.must_equal(source)?;
        }
        // As one command, and the manifest's road: they are one.
        JSON => {
            let to = json!({"type": "Json", "json": {"uri": out}});
            let target = Target::standalone()?;
            record(row, &run(source, &target, &[("/spec/source", read(file)), ("/spec/target", to)])?);
        }
        STAT => {
            let started = Instant::now();
            quietly(Command::new(binary()?).arg("stat").arg(file))?;
            row.ours.push(started.elapsed().as_secs_f64());
        }
        _ => {
            let to = json!({"type": "RdbFile", "rdbFile": {"uri": out}});
            let target = Target::standalone()?;
            record(row, &run(source, &target, &[("/spec/target", to)])?);
            quietly(Command::new("redis-check-rdb").arg(&out))?;
        }
    }
    row.limit.push(f64::midpoint(before, against(settings, source, file, row.id)?));
    Ok(())
}

fn read(file: &Path) -> Value {
    json!({"type": "RdbFile", "rdbFile": {"uris": [file]}})
}

fn run(source: &Server, target: &Target, fields: &[(&str, Value)]) -> Result<Usage> {
    source.settle()?;
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    Tool::start_with(&Task::UntilInSync, &route, fields)?.finish(LONGEST)
}

fn record(row: &mut Row, usage: &Usage) {
    row.ours.push(usage.elapsed.as_secs_f64());
    row.cpu.push(usage.cpu);
    row.peak.push(usage.peak);
}

/// What the row is held against, in seconds.
fn against(settings: &Settings, source: &Server, file: &Path, row: &str) -> Result<f64> {
    if row == LOAD {
        return limit(settings, source);
    }
    source.settle()?;
    let started = Instant::now();
    match row {
        BACKUP => {
            let port = source.port().to_string();
            // To its output, as it would have a file written to the disk before it ends.
            quietly(Command::new("redis-cli").args(["-p", &port, "--rdb", "-"]))?;
        }
        _ => quietly(Command::new("redis-check-rdb").arg(file))?,
    }
    Ok(started.elapsed().as_secs_f64())
}

fn quietly(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
