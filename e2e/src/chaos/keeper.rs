//! Runs the tool as a supervisor would: started again after it was killed, and while it finds
//! source or target unreachable at its start. It ending in any other way is an error.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::tool::condition;
use crate::{Manifest, Tool};

/// Between starts that fail.
const PAUSE: Duration = Duration::from_millis(300);
/// A process that was fenced off ends within this time.
const FENCED: Duration = Duration::from_secs(20);

/// What the tool says when it uses what an earlier process spooled.
const TAKEN_UP: &str = "going on with the spool that an earlier run left";

/// What an older process finds when it goes on beside a newer one.
#[derive(Clone, Copy, Debug)]
pub enum Rival {
    /// The newer one has a copy of its data folder,
    Copied,
    /// an empty one,
    Fresh,
    /// or the very same.
    Shared,
}

pub struct Keeper {
    manifest: Manifest,
    /// The test-only switch that has the tool ignore its guards.
    unguarded: bool,
    tool: Option<Tool>,
    folder: Arc<TempDir>,
    not_before: Instant,
    pub counts: Counts,
    /// What processes that have ended wrote: standard error and the last status.
    pub ended: Vec<(String, Value)>,
}

/// Over all processes of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub starts: u64,
    /// Starts that ended before anything was changed, as something was out of reach.
    pub refused: u64,
    /// As the status counts them.
    pub resumes: i64,
    pub full_resyncs: i64,
    /// Processes that went on with what an earlier one had on disk.
    pub taken_up: u64,
    /// Commands the target refused for good, in the last status of any process.
    pub quarantined: i64,
}

impl Keeper {
    pub fn new(manifest: Manifest, unguarded: bool) -> Result<Self> {
        Ok(Self {
            manifest,
            unguarded,
            tool: None,
            folder: Arc::new(tempfile::tempdir()?),
            not_before: Instant::now(),
            counts: Counts::default(),
            ended: Vec::new(),
        })
    }

    pub fn start(&mut self) -> Result<()> {
        let environment: &[(&str, &str)] =
            if self.unguarded { &[("REDIS_MIGRATION_TEST_UNGUARDED", "1")] } else { &[] };
        self.tool = Some(Tool::spawn(Arc::clone(&self.folder), &self.manifest, &[], environment)?);
        self.counts.starts += 1;
        Ok(())
    }

    /// SIGKILL. `fresh`: nothing is left to the next one but what stands in the target.
    pub fn kill(&mut self, fresh: bool) -> Result<()> {
        if let Some(mut tool) = self.tool.take() {
            tool.kill()?;
            self.record(&tool);
        }
        if fresh {
            self.folder = Arc::new(tempfile::tempdir()?);
        }
        Ok(())
    }

    /// SIGTERM; `true` when it ended as it does when it is stopped, which a tool that has only just been
    /// started and found something out of reach does not.
    pub fn stop(&mut self) -> Result<bool> {
        self.watch()?;
        let Some(mut tool) = self.tool.take() else { return Ok(false) };
        if tool.ended()?.is_none() {
            tool.terminate()?;
        }
        let deadline = Instant::now() + Duration::from_secs(12);
        let code = loop {
            if let Some(code) = tool.ended()? {
                break code;
            }
            if Instant::now() > deadline {
                self.record(&tool);
                bail!("it has not ended 12 s after SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let early = !is_under_way(&tool);
        self.record(&tool);
        ensure!(code == 4 || early, "exit code {code} after SIGTERM");
        Ok(code == 4)
    }

    /// Sees to it that one runs.
    pub fn watch(&mut self) -> Result<()> {
        if let Some(tool) = &mut self.tool {
            let Some(code) = tool.ended()? else { return Ok(()) };
            let early = !is_under_way(tool);
            let status = tool.status().unwrap_or_default();
            if let Some(tool) = self.tool.take() {
                self.record(&tool);
            }
            let not_empty = status.to_string().contains("TargetNotEmpty");
            if !early || not_empty || code != 1 {
                bail!("it ended by itself with exit code {code}: {}", status["message"]);
            }
            self.counts.refused += 1;
            self.not_before = Instant::now() + PAUSE;
        }
        if Instant::now() >= self.not_before { self.start() } else { Ok(()) }
    }

    /// Freezes the process, starts another for the same migration, and lets the first go on once
    /// `progress` says that the second works: the first must stop by itself, with exit code 1.
    pub fn rival(&mut self, kind: Rival, progress: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let Some(first) = self.tool.take() else { bail!("nothing to freeze") };
        first.signal("STOP")?;
        let folder = Arc::clone(&self.folder);
        match kind {
            Rival::Shared => {}
            Rival::Fresh => self.folder = Arc::new(tempfile::tempdir()?),
            Rival::Copied => {
                let copy = tempfile::tempdir()?;
                copy_folder(folder.path(), copy.path())?;
                self.folder = Arc::new(copy);
            }
        }
        let progressed = self.start().and_then(|()| progress(self));
        first.signal("CONT")?;
        progressed.context("a second process, the first being frozen")?;
        let finished = first.wait_exit(FENCED);
        let finished = finished.context("the older of two processes goes on")?;
        let status = finished.status().unwrap_or_default();
        let quarantined = self.count(&finished.stderr, &status);
        self.ended.push((finished.stderr, status.clone()));
        ensure!(finished.code == 1, "the older of two processes ended with exit code {}", finished.code);
        // Commands are refused when both write; then it was that which ended it.
        ensure!(quarantined == 0, "the older of two processes wrote on: {}", status["message"]);
        Ok(())
    }

    /// Every shard's snapshot stands.
    pub fn is_past_snapshots(&self) -> bool {
        let shards = self.shards();
        !shards.is_empty() && shards.iter().all(|shard| shard["phase"] == "IncrementalSync")
    }

    /// How far the shards of the one that runs have come, in bytes of the source's streams.
    pub fn applied(&self) -> i64 {
        self.shards().iter().filter_map(|shard| shard["appliedOffset"].as_i64()).sum()
    }

    /// As the status of the one that runs has them.
    fn shards(&self) -> Vec<Value> {
        let mut status = self.tool.as_ref().and_then(Tool::status).unwrap_or_default();
        match status["shards"].take() {
            Value::Array(shards) => shards,
            _ => Vec::new(),
        }
    }

    fn record(&mut self, tool: &Tool) {
        let status = tool.status().unwrap_or_default();
        let log = tool.stderr();
        self.count(&log, &status);
        self.ended.push((log, status));
    }

    /// Adds what a process that has ended counted; how much it quarantined.
    fn count(&mut self, log: &str, status: &Value) -> i64 {
        let number = |part: &str, name: &str| status[part][name].as_i64().unwrap_or(0);
        self.counts.resumes += number("replication", "resumes");
        self.counts.full_resyncs += number("replication", "fullResyncs");
        self.counts.taken_up += u64::from(log.contains(TAKEN_UP));
        let quarantined = number("quarantine", "commands");
        self.counts.quarantined = self.counts.quarantined.max(quarantined);
        quarantined
    }
}

/// It got further than looking at both sides.
fn is_under_way(tool: &Tool) -> bool {
    let status = tool.status().unwrap_or_default();
    condition(&status, "PreflightPassed").as_deref() == Some("True")
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let there = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            std::fs::create_dir_all(&there)?;
            copy_folder(&entry.path(), &there)?;
        } else {
            std::fs::copy(entry.path(), &there)?;
        }
    }
    Ok(())
}
