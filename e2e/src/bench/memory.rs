//! Rows of peak memory with a single huge value.

use std::time::Duration;

use anyhow::Result;

use crate::figures::{Row, Unit};
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};
use crate::workload;

pub const ROWS: [&str; 3] = [HASH, NOISE, TEXT];

const HASH: &str = "memory-hash";
const NOISE: &str = "memory-noise";
const TEXT: &str = "memory-text";

/// One run each: a peak has no noise worth a median.
pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let row = |id, what| Row::new(id, what, "").absolute(Unit::Mebibytes).within(150.0, 100.0);
    let rows = [
        row(HASH, "peak memory, hash of 5,000,000 fields"),
        row(NOISE, "peak memory, 500 MB incompressible string"),
        row(TEXT, "peak memory, 500 MB compressible string"),
    ];
    let mut measured = Vec::new();
    for mut row in rows.into_iter().filter(|row| settings.wants(row.id)) {
        say(row.what);
        let source = Server::start()?;
        match row.id {
            HASH => workload::huge_hash(source.port(), settings.scale)?,
            NOISE => workload::huge_string(source.port(), settings.scale, false)?,
            _ => workload::huge_string(source.port(), settings.scale, true)?,
        }
        if !settings.limits_only
            && let Err(error) = migrate(&source, &mut row)
        {
            row.fail(&error);
        }
        measured.push(row);
    }
    Ok(measured)
}

fn migrate(source: &Server, row: &mut Row) -> Result<()> {
    let target = Target::standalone()?;
    let mut tool =
        Tool::start(&Task::UntilInSync, &Route { source: source.endpoint(), target: target.endpoint()? })?;
    tool.condition("InSync", Duration::from_secs(120))?;
    let usage = tool.finish(Duration::from_secs(30))?;
    row.ours.push(usage.peak as f64 / 1_048_576.0);
    row.cpu.push(usage.cpu);
    row.peak.push(usage.peak);
    target.must_equal(source)
}
