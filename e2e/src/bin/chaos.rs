//! `make chaos`: seeded runs full of faults, each ending with a comparison of every key.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use e2e::chaos::{Arena, Choice, Fault, Plan, Shape, Summary};
use serde_json::Value;

/// Kills, cuts, stalls and fails over while a client writes, and compares source and target after each run.
#[derive(Parser)]
#[command(name = "chaos")]
struct Arguments {
    /// Runs, with seeds that rise by one.
    #[arg(long, default_value_t = 200)]
    runs: u64,
    /// Seed of the first run; the same seed and choice repeat a run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Shapes of the source: standalone, sentinel, cluster; all when absent.
    #[arg(long, value_delimiter = ',')]
    source: Vec<Shape>,
    /// Shapes of the target.
    #[arg(long, value_delimiter = ',')]
    target: Vec<Shape>,
    /// Faults by name or by the part of it before a -, such as kill,cut-target; all when absent.
    #[arg(long)]
    faults: Option<String>,
    /// These faults not.
    #[arg(long)]
    without: Option<String>,
    /// Faults of a run, at most; at least three less.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Begins no run after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Has the tool ignore its guards (a switch for tests); exit code 0 when differences were found.
    #[arg(long)]
    mutant: bool,
    /// Percent of the load's commands that show when they run twice; chosen by the seed when absent.
    #[arg(long)]
    additive: Option<u32>,
    /// The load does not renew keys that are about to expire.
    #[arg(long)]
    without_renewals: bool,
    /// The full sync is slow in every run, and not by chance: faults hit it, with its spool on disk.
    #[arg(long)]
    slow_start: bool,
    /// Sets a manifest field in every run, such as /spec/limits/pipelineCommands=1.
    #[arg(long, value_name = "POINTER=JSON", value_parser = field)]
    set: Vec<(String, Value)>,
    /// Where plans and logs of runs that were not exact are kept [default: a folder for temporary files].
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Prints the faults, and does nothing.
    #[arg(long)]
    list: bool,
    /// Prints the plans, and does nothing.
    #[arg(long)]
    dry: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        print!("{}", Fault::list());
        return Ok(ExitCode::SUCCESS);
    }
    let choice = choice(&arguments)?;
    let plans =
        (arguments.seed..arguments.seed.saturating_add(arguments.runs)).map(|seed| Plan::new(seed, &choice));
    if arguments.dry {
        for plan in plans {
            print!("{}", plan?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    e2e::tool::binary()?;
    let logs = arguments.logs.clone().unwrap_or_else(|| std::env::temp_dir().join("redis-migration-chaos"));
    let mut arena = Arena::new(arguments.mutant);
    let mut summary = Summary::default();
    let end = arguments.minutes.map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    for plan in plans {
        if end.is_some_and(|end| Instant::now() > end) {
            println!("{} minutes are over", arguments.minutes.unwrap_or_default());
            break;
        }
        let plan = plan?;
        let outcome = arena.run(&plan).with_context(|| format!("{plan}"))?;
        println!("{outcome}");
        // A mutant is meant to differ.
        if outcome.error.is_some() || !arguments.mutant {
            print!("{}", outcome.details());
        }
        if !outcome.is_exact() {
            outcome.keep(&logs)?;
            println!("  logs: {}", logs.join(format!("seed-{}", plan.seed)).display());
        }
        summary.add(&outcome);
    }
    print!("{summary}");
    let passed = if arguments.mutant { !summary.differing.is_empty() } else { summary.is_exact() };
    println!("{}", if passed { "passed" } else { "NOT passed" });
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn choice(arguments: &Arguments) -> Result<Choice> {
    let all = Choice::default();
    let or_all = |shapes: &[Shape], all: Vec<Shape>| if shapes.is_empty() { all } else { shapes.to_vec() };
    let mut faults = arguments.faults.as_deref().map_or(Ok(Fault::all()), Fault::select)?;
    if let Some(without) = &arguments.without {
        let without = Fault::select(without)?;
        faults.retain(|fault| !without.contains(fault));
    }
    Ok(Choice {
        sources: or_all(&arguments.source, all.sources),
        targets: or_all(&arguments.target, all.targets),
        faults,
        steps: (arguments.steps.saturating_sub(3).max(1), arguments.steps.max(1)),
        renewals: !arguments.without_renewals,
        slow_start: arguments.slow_start.then_some(true),
        additive: arguments.additive,
        fields: arguments.set.clone(),
    })
}

fn field(text: &str) -> Result<(String, Value)> {
    let (pointer, value) = text.split_once('=').context("no = in it")?;
    // A word that is not JSON is meant as a string.
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((pointer.to_owned(), value))
}
