//! What runs found, as text.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::keeper::Counts;
use super::{Fault, Plan};
use crate::compare::{Difference, Report};

#[derive(Debug)]
pub struct Outcome {
    pub plan: Plan,
    pub faults: BTreeMap<Fault, u64>,
    pub counts: Counts,
    /// Keys of the source that were compared.
    pub keys: usize,
    pub differences: Vec<Difference>,
    /// What kept the run from its comparison.
    pub error: Option<String>,
    /// The servers, not the tool, broke what the run was to show: it counts for nothing.
    pub void: bool,
    pub took: Duration,
    /// When each fault began.
    pub events: Vec<String>,
    /// Standard error and the last status of each process of the tool, kept when it was not exact.
    pub processes: Vec<(String, Value)>,
    /// Names and logs of the servers, likewise.
    pub servers: Vec<(String, String)>,
}

impl Outcome {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            plan: plan.clone(),
            faults: BTreeMap::new(),
            counts: Counts::default(),
            keys: 0,
            differences: Vec::new(),
            error: None,
            void: false,
            took: Duration::ZERO,
            events: Vec::new(),
            processes: Vec::new(),
            servers: Vec::new(),
        }
    }

    pub(super) fn compared(&mut self, report: &Report) {
        self.keys = report.keys;
        self.differences.clone_from(&report.differences);
    }

    /// It ran to its end and found every key equal.
    pub fn is_exact(&self) -> bool {
        self.error.is_none() && self.differences.is_empty() && self.keys > 0
    }

    /// What one needs to know to find out why: the plan and its course, differences, and how the tool
    /// ended. Empty for an exact run.
    pub fn details(&self) -> String {
        if self.is_exact() {
            return String::new();
        }
        let mut text = format!("{}", self.plan);
        for event in &self.events {
            text += &format!("  {event}\n");
        }
        for difference in self.differences.iter().take(20) {
            text += &format!("  {difference}\n");
        }
        if let Some(error) = &self.error {
            text += &format!("  {error}\n");
        }
        if let Some((log, status)) = self.processes.last() {
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("  last status {status}\n  last lines of the tool:\n");
            for line in lines.get(lines.len().saturating_sub(15)..).unwrap_or_default() {
                text += &format!("    {line}\n");
            }
        }
        text
    }

    /// Writes all that is known about a run that was not exact into a folder of its own.
    pub fn keep(&self, folder: &Path) -> Result<()> {
        let folder = folder.join(format!("seed-{}", self.plan.seed));
        std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut text = format!("{self}\n{}", self.details());
        for difference in &self.differences {
            text += &format!("{difference}\n");
        }
        std::fs::write(folder.join("run.txt"), text)?;
        for (i, (log, status)) in self.processes.iter().enumerate() {
            std::fs::write(folder.join(format!("tool-{i}.log")), log)?;
            std::fs::write(folder.join(format!("tool-{i}.json")), format!("{status:#}\n"))?;
        }
        for (name, log) in &self.servers {
            std::fs::write(folder.join(format!("{name}.log")), log)?;
        }
        Ok(())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, counts, .. } = self;
        write!(f, "seed {:4}  {:10} to {:10}  ", plan.seed, plan.source, plan.target)?;
        match &self.error {
            _ if self.void => write!(f, "VOID")?,
            Some(error) => write!(f, "FAILED: {error}")?,
            None => write!(f, "{:5} keys, {} differences", self.keys, self.differences.len())?,
        }
        let Counts { starts, refused, resumes, full_resyncs, taken_up, quarantined } = counts;
        write!(f, "; {} starts", starts - refused)?;
        for (count, what) in [
            (*refused, "refused"),
            (*taken_up, "spools taken up"),
            (quarantined.unsigned_abs(), "commands quarantined"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        write!(f, ", {resumes} resumes, {full_resyncs} full resyncs; {}", list(&self.faults))?;
        write!(f, "; {:.1} s", self.took.as_secs_f64())
    }
}

/// Over all runs.
#[derive(Debug, Default)]
pub struct Summary {
    pub runs: usize,
    pub exact: usize,
    /// Seeds whose data differed.
    pub differing: Vec<u64>,
    /// Seeds of runs that did not come to a comparison.
    pub failed: Vec<u64>,
    pub void: Vec<u64>,
    pub faults: BTreeMap<Fault, u64>,
    pub starts: u64,
    pub resumes: i64,
    pub full_resyncs: i64,
    pub taken_up: u64,
    pub keys: usize,
    pub differences: usize,
    pub took: Duration,
}

impl Summary {
    pub fn add(&mut self, outcome: &Outcome) {
        let seed = outcome.plan.seed;
        self.runs += 1;
        match outcome {
            _ if outcome.void => self.void.push(seed),
            _ if outcome.error.is_some() => self.failed.push(seed),
            _ if outcome.is_exact() => self.exact += 1,
            _ => self.differing.push(seed),
        }
        for (fault, count) in &outcome.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
        self.starts += outcome.counts.starts - outcome.counts.refused;
        self.resumes += outcome.counts.resumes;
        self.full_resyncs += outcome.counts.full_resyncs;
        self.taken_up += outcome.counts.taken_up;
        self.keys += outcome.keys;
        self.differences += outcome.differences.len();
        self.took += outcome.took;
    }

    /// Every run that counts was exact, and there was one.
    pub fn is_exact(&self) -> bool {
        self.exact > 0 && self.exact + self.void.len() == self.runs
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count: u64 = self.faults.values().sum();
        writeln!(
            f,
            "{} runs, {count} faults: {} exact, {} with differences, {} failed, {} void",
            self.runs,
            self.exact,
            self.differing.len(),
            self.failed.len(),
            self.void.len()
        )?;
        writeln!(
            f,
            "{} starts, {} spools taken up, {} resumes, {} full resyncs, {} keys compared, {} differences, {:.0} s",
            self.starts,
            self.taken_up,
            self.resumes,
            self.full_resyncs,
            self.keys,
            self.differences,
            self.took.as_secs_f64()
        )?;
        writeln!(f, "faults: {}", list(&self.faults))?;
        for (what, seeds) in [("differing", &self.differing), ("failed", &self.failed), ("void", &self.void)]
        {
            if !seeds.is_empty() {
                writeln!(f, "seeds, {what}: {seeds:?}")?;
            }
        }
        Ok(())
    }
}

fn list(faults: &BTreeMap<Fault, u64>) -> String {
    faults.iter().map(|(fault, count)| format!("{fault} {count}")).collect::<Vec<_>>().join(", ")
}
