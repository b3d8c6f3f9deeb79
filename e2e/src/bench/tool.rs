//! One run of `redis-migration`, watched from outside.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::tool::binary;
use e2e::{Endpoint, Manifest};
use serde_json::Value;
use tempfile::TempDir;

use crate::client::poll;
use crate::process;

/// What a run is asked to do.
pub enum Task {
    /// Full sync, then end.
    UntilInSync,
    /// Follow the source until stopped.
    Follow,
    /// Compare only.
    Verify,
}

/// Where a run reads and writes.
pub struct Route {
    pub source: Endpoint,
    pub target: Endpoint,
}

/// What a finished run took.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// From its start to its end.
    pub elapsed: Duration,
    /// User and system time, in seconds.
    pub cpu: f64,
    /// Highest resident memory, in bytes.
    pub peak: u64,
}

/// A running tool; killed when dropped.
pub struct Tool {
    child: Child,
    started: Instant,
    statuses: Receiver<(Instant, Value)>,
    peak: Arc<AtomicU64>,
    home: Arc<TempDir>,
}

impl Tool {
    /// Starts the tool with a fresh data folder.
    pub fn start(task: &Task, route: &Route) -> Result<Tool> {
        Tool::start_with(task, route, &[])
    }

    /// The same with these manifest fields, by JSON pointer.
    pub fn start_with(task: &Task, route: &Route, fields: &[(&str, Value)]) -> Result<Tool> {
        let home = Arc::new(TempDir::with_prefix("redis-migration-bench-")?);
        let fields = fields.iter().map(|(path, value)| (*path, value.clone()));
        let manifest =
            fields.fold(manifest(task, route), |manifest, (path, value)| manifest.set(path, value));
        manifest.write(home.path())?;
        Tool::start_in(home, task)
    }

    /// SIGKILL, and a start in the same folder.
    pub fn kill_and_start(mut self, task: &Task, meanwhile: impl FnOnce() -> Result<()>) -> Result<Tool> {
        process::end(&mut self.child);
        meanwhile()?;
        Tool::start_in(Arc::clone(&self.home), task)
    }

    fn start_in(home: Arc<TempDir>, task: &Task) -> Result<Tool> {
        let mut command = Command::new(binary()?);
        match task {
            Task::Verify => {
                command.arg("verify");
            }
            Task::UntilInSync => {
                command.args(["run", "--output", "json", "--listen", "127.0.0.1:0", "--until", "InSync"]);
                command.arg("--data-dir").arg(home.path().join("data"));
            }
            Task::Follow => {
                command.args(["run", "--output", "json", "--listen", "127.0.0.1:0"]);
                command.arg("--data-dir").arg(home.path().join("data"));
            }
        }
        command.arg("-f").arg(home.path().join("migration.yaml")).stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(home.path().join("stderr"))?);
        let started = Instant::now();
        let mut child = command.spawn()?;
        let (sender, statuses) = mpsc::channel();
        let stdout = child.stdout.take().context("the tool has no standard output")?;
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let arrived = Instant::now();
                // Only `--output json` promises objects; `verify` prints for people.
                if let Ok(value) = serde_json::from_str(&line)
                    && sender.send((arrived, value)).is_err()
                {
                    break;
                }
            }
        });
        let peak = Arc::new(AtomicU64::new(0));
        thread::spawn({
            let (peak, pid) = (peak.clone(), child.id());
            move || {
                while let Some(bytes) = process::peak_memory(pid) {
                    peak.fetch_max(bytes, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(10));
                }
            }
        });
        Ok(Tool { child, started, statuses, peak, home })
    }

    /// Waits for a condition to be True; the time from the start of the tool to the line that says so.
    pub fn condition(&mut self, name: &str, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        let mut last = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.statuses.recv_timeout(left) {
                Ok((arrived, line)) => {
                    if is_true(&line, name) {
                        return Ok(arrived.duration_since(self.started));
                    }
                    if let Some(message) = line.pointer("/status/message").and_then(Value::as_str) {
                        message.clone_into(&mut last);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("not {name} within {timeout:?}; last status: {last}"),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the tool ended before {name}: {}", self.last_words())
                }
            }
        }
    }

    /// Waits for the tool to end with exit code 0 (or 4, when it was stopped).
    pub fn finish(mut self, timeout: Duration) -> Result<Usage> {
        let pid = self.child.id();
        // A zombie still has its CPU times in /proc; once reaped they are gone.
        let ended = poll("the tool ends", Duration::from_millis(1), timeout, || {
            Ok(process::is_zombie(pid).then(Instant::now))
        })?;
        let cpu = process::cpu_seconds(pid)?;
        let status = self.child.wait()?;
        if !matches!(status.code(), Some(0 | 4)) {
            bail!("the tool ended with {status}: {}", self.last_words());
        }
        let peak = self.peak_memory();
        Ok(Usage { elapsed: ended.duration_since(self.started), cpu, peak })
    }

    /// Asks the tool to stop and waits for it.
    pub fn stop(self) -> Result<Usage> {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().context("run kill")?;
        if !status.success() {
            bail!("cannot signal the tool: {}", self.last_words());
        }
        self.finish(Duration::from_secs(30))
    }

    /// When the process was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// CPU so far, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        process::cpu_seconds(self.child.id())
    }

    /// Highest resident memory so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    pub fn has_logged(&self, words: &str) -> Result<bool> {
        Ok(fs::read_to_string(self.home.path().join("stderr"))?.contains(words))
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(self.home.path().join("stderr")).unwrap_or_default();
        text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("(it said nothing)").to_owned()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        process::end(&mut self.child);
    }
}

/// Manifest fields that every run gets (`--set`), as JSON pointer and value.
pub static FIELDS: OnceLock<Vec<(String, Value)>> = OnceLock::new();

fn manifest(task: &Task, route: &Route) -> Manifest {
    let mode = if matches!(task, Task::Verify) { "Full" } else { "Off" };
    let manifest = Manifest::between(&route.source, &route.target)
        .set("/spec/verification/mode", mode)
        .set("/spec/target/existingKeys", "Fail")
        // With Never a run that ends in sync goes through all keys once more, to give expiries back.
        .set("/spec/cutover/mode", "Manual");
    let fields = FIELDS.get().map(Vec::as_slice).unwrap_or_default();
    fields.iter().fold(manifest, |manifest, (path, value)| manifest.set(path, value.clone()))
}

fn is_true(line: &Value, condition: &str) -> bool {
    let conditions = line.pointer("/status/conditions").and_then(Value::as_array);
    conditions.is_some_and(|all| {
        all.iter().any(|entry| {
            entry.get("type").and_then(Value::as_str) == Some(condition)
                && entry.get("status").and_then(Value::as_str) == Some("True")
        })
    })
}
