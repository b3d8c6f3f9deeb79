//! `make bench`: the figures that redis-migration promises, each measured beside its limit in the same run.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::Value;

#[path = "../bench/backpressure.rs"]
mod backpressure;
#[path = "../bench/client.rs"]
mod client;
#[path = "../bench/delivery.rs"]
mod delivery;
#[path = "../bench/figures.rs"]
mod figures;
#[path = "../bench/files.rs"]
mod files;
#[path = "../bench/full_sync.rs"]
mod full_sync;
#[path = "../bench/incremental.rs"]
mod incremental;
#[path = "../bench/latency.rs"]
mod latency;
#[path = "../bench/lua.rs"]
mod lua;
#[path = "../bench/memory.rs"]
mod memory;
#[path = "../bench/operator.rs"]
mod operator;
#[path = "../bench/prepared.rs"]
mod prepared;
#[path = "../bench/process.rs"]
mod process;
#[path = "../bench/restart.rs"]
mod restart;
#[path = "../bench/server.rs"]
mod server;
#[path = "../bench/settings.rs"]
mod settings;
#[path = "../bench/throttle.rs"]
mod throttle;
#[path = "../bench/tool.rs"]
mod tool;
#[path = "../bench/workload.rs"]
mod workload;

use figures::{Row, Verdict};
use settings::{Settings, say};

/// Measures redis-migration beside what limits it. Needs redis-server 7.0; close everything else first.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Measurements of each row; the table shows their medians.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Rows to measure, such as F-standalone,I-cluster; all when absent.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Shrinks (or grows) the workloads; the figures are promised for 1.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Also writes the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit code 1 when a must is missed or a row failed.
    #[arg(long)]
    strict: bool,
    /// Measures the limits and references only, without the tool.
    #[arg(long)]
    limits_only: bool,
    /// Sets a manifest field in every run of the tool, such as /spec/limits/pipelineCommands=8192.
    #[arg(long, value_name = "POINTER=JSON", value_parser = field)]
    set: Vec<(String, Value)>,
}

fn field(text: &str) -> Result<(String, Value)> {
    let (pointer, value) = text.split_once('=').context("no = in it")?;
    // A word that is not JSON is meant as a string.
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((pointer.to_owned(), value))
}

/// A group of rows that share servers and data, and how it is measured.
type Group = (&'static [&'static str], fn(&Settings) -> Result<Vec<Row>>);

const GROUPS: [Group; 10] = [
    (&full_sync::ROWS, full_sync::measure),
    (&files::ROWS, files::measure),
    (&incremental::ROWS, incremental::measure),
    (&delivery::ROWS, delivery::measure),
    (&lua::ROWS, lua::measure),
    (&restart::ROWS, restart::measure),
    (&latency::ROWS, latency::measure),
    (&memory::ROWS, memory::measure),
    (&backpressure::ROWS, backpressure::measure),
    (&operator::ROWS, operator::measure),
];

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let settings = settings(&arguments)?;
    // Set once, here.
    let _ = tool::FIELDS.set(arguments.set.clone());
    let machine = machine();
    println!("{machine}");
    let mut rows = Vec::new();
    let mut failed = false;
    for (names, measure) in GROUPS.iter().filter(|(names, _)| settings.wants_any(names)) {
        match measure(&settings) {
            Ok(measured) => rows.extend(measured),
            // The other groups are worth their time all the same.
            Err(error) => {
                failed = true;
                say(&format!("{}: {error:#}", names.join(", ")));
            }
        }
    }
    print!("{}", figures::table(&rows));
    if let Some(file) = &arguments.json {
        let document = figures::document(&rows, &machine, settings.runs, settings.scale);
        fs::write(file, format!("{document:#}\n")).with_context(|| format!("write {}", file.display()))?;
    }
    failed |= rows.iter().any(|row| matches!(row.verdict(), Verdict::Missed | Verdict::Failed));
    Ok(if arguments.strict && failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What the seconds below depend on; the ratios should not.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let busy = load.parse::<f64>().is_ok_and(|load| load > 0.5);
    let warning = if busy { ": OTHERS ARE AT WORK, the figures are worth little" } else { "" };
    format!("{} on {cores} cores, load before the start {load}{warning}", server::VERSION)
}

fn settings(arguments: &Arguments) -> Result<Settings> {
    let known: Vec<&str> = GROUPS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
    if let Some(unknown) = arguments.only.iter().find(|only| !known.contains(&only.as_str())) {
        bail!("--only {unknown}: no such row; there are {}", known.join(", "));
    }
    if !(arguments.scale > 0.0 && arguments.scale <= 10.0) || arguments.runs == 0 {
        bail!("--scale is above 0 and at most 10, --runs at least 1");
    }
    if !arguments.limits_only {
        e2e::tool::binary()?;
    }
    let cache =
        std::env::var_os("REDIS_MIGRATION_CACHE").map_or_else(|| PathBuf::from(".cache"), PathBuf::from);
    let cache = cache.join("bench");
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    // A server started elsewhere is given this path too.
    let cache = fs::canonicalize(cache)?;
    Ok(Settings {
        runs: arguments.runs,
        scale: arguments.scale,
        cache,
        only: arguments.only.clone(),
        limits_only: arguments.limits_only,
    })
}
