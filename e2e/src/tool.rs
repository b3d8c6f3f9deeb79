//! `redis-migration` as a user runs it: its arguments, its JSON lines, its exit code.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Manifest, wait_until};

/// The program under test: `REDIS_MIGRATION_BIN`, or the one that cargo built beside the tests.
pub fn binary() -> Result<PathBuf> {
    if let Some(file) = std::env::var_os("REDIS_MIGRATION_BIN") {
        return Ok(PathBuf::from(file));
    }
    let own = std::env::current_exe()?;
    let file =
        own.ancestors().skip(1).take(2).map(|folder| folder.join("redis-migration")).find(|f| f.is_file());
    file.context(
        "redis-migration is not built: run `cargo build -p redis-migration`, or set REDIS_MIGRATION_BIN",
    )
}

/// What a run that has ended left behind.
#[derive(Debug)]
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// The last status that was printed.
    pub fn status(&self) -> Result<Value> {
        let line = self.stdout.lines().rev().find(|line| line.starts_with('{')).context("no status line")?;
        serde_json::from_str::<Value>(line)?.get("status").cloned().context("a line without a status")
    }
}

/// A run with `--output json`, in a folder that holds the manifest, the secrets and the data.
pub struct Tool {
    child: Child,
    pub folder: Arc<TempDir>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    readers: Vec<std::thread::JoinHandle<()>>,
    started: Instant,
}

#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    last: Option<Value>,
    stderr: String,
    ended: bool,
}

impl Tool {
    /// `redis-migration run --output json` with these further arguments.
    pub fn run(manifest: &Manifest, further: &[&str]) -> Result<Self> {
        Self::run_in(Arc::new(tempfile::tempdir()?), manifest, further)
    }

    /// Runs until it is in sync and verified.
    pub fn until_in_sync(manifest: &Manifest) -> Result<Self> {
        Self::run(manifest, &["--until", "InSync"])
    }

    /// The same in the folder of an earlier run, whose data it finds.
    pub fn run_in(folder: Arc<TempDir>, manifest: &Manifest, further: &[&str]) -> Result<Self> {
        Self::spawn(folder, manifest, further, &[])
    }

    pub fn run_with_env(manifest: &Manifest, further: &[&str], env: &[(&str, &str)]) -> Result<Self> {
        Self::spawn(Arc::new(tempfile::tempdir()?), manifest, further, env)
    }

    /// In this folder, with these variables in its environment.
    pub fn spawn(
        folder: Arc<TempDir>,
        manifest: &Manifest,
        further: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Self> {
        let mut arguments = vec!["--output", "json", "--listen", "127.0.0.1:0"];
        arguments.extend(further);
        let mut child =
            command("run", folder.path(), manifest, &arguments)?.envs(env.iter().copied()).spawn()?;
        let seen = Arc::new((Mutex::<Seen>::default(), Condvar::new()));
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let (of_stdout, of_stderr) = (Arc::clone(&seen), Arc::clone(&seen));
        let readers = vec![
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let status =
                        serde_json::from_str::<Value>(&line).ok().map(|mut line| line["status"].take());
                    change(&of_stdout, |seen| {
                        seen.last = status.or(seen.last.take());
                        seen.lines.push(line);
                    });
                }
                change(&of_stdout, |seen| seen.ended = true);
            }),
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    change(&of_stderr, |seen| seen.stderr += &(line + "\n"));
                }
            }),
        ];
        Ok(Self { child, folder, seen, readers, started: Instant::now() })
    }

    /// Another command (`check`, `verify`) to its end, for at most a minute.
    pub fn once(name: &str, manifest: &Manifest) -> Result<Finished> {
        let folder = tempfile::tempdir()?;
        finish(command(name, folder.path(), manifest, &[])?, Duration::from_secs(60))
    }

    /// Any arguments, to its end.
    pub fn plain(arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(binary()?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command, Duration::from_secs(20))
    }

    /// Waits for a status like that.
    pub fn wait_for(&self, what: &str, timeout: Duration, is: impl Fn(&Value) -> bool) -> Result<Value> {
        let (lock, changed) = &*self.seen;
        let start = Instant::now();
        let mut seen = lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(status) = seen.last.as_ref().filter(|status| is(status)) {
                return Ok(status.clone());
            }
            let left = timeout.checked_sub(start.elapsed()).filter(|_| !seen.ended);
            let Some(left) = left else {
                let why = if seen.ended { "the tool ended" } else { "timed out" };
                bail!("{what}: {why}; last status {:?}\n{}", seen.last, tail(&seen.stderr));
            };
            seen = changed.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn wait_condition(&self, kind: &str, timeout: Duration) -> Result<Value> {
        self.wait_for(kind, timeout, |status| condition(status, kind).as_deref() == Some("True"))
    }

    pub fn wait_phase(&self, phase: &str, timeout: Duration) -> Result<Value> {
        self.wait_for(phase, timeout, |status| status["phase"] == phase)
    }

    /// The newest status.
    pub fn status(&self) -> Option<Value> {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).last.clone()
    }

    pub fn stderr(&self) -> String {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).stderr.clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM
    pub fn terminate(&self) -> Result<()> {
        self.signal("TERM")
    }

    /// A signal by its name without SIG.
    pub fn signal(&self, name: &str) -> Result<()> {
        let status =
            Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status()?;
        ensure!(status.success(), "no process to send SIG{name} to");
        Ok(())
    }

    /// The exit code, once it has ended; -1 after a signal. All that it wrote has been read by then.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(Some(status.code().unwrap_or(-1)))
    }

    /// SIGKILL, as a crash would end it.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.ended().map(drop)
    }

    /// Waits until it ends by itself.
    pub fn wait_exit(mut self, timeout: Duration) -> Result<Finished> {
        let code =
            wait_until("end of redis-migration", timeout, || self.child.try_wait().map_err(Into::into));
        let code = code.with_context(|| format!("status {:?}\n{}", self.status(), tail(&self.stderr())))?;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let took = self.started.elapsed();
        let seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (stdout, stderr) = (seen.lines.join("\n"), seen.stderr.clone());
        Ok(Finished { code: code.code().unwrap_or(-1), stdout, stderr, took })
    }

    /// As `wait_exit`, and the exit code is this one.
    pub fn expect_exit(self, code: i32, timeout: Duration) -> Result<Finished> {
        let finished = self.wait_exit(timeout)?;
        ensure!(
            finished.code == code,
            "exit code {} instead of {code}; last status {:?}\n{}",
            finished.code,
            finished.status().ok(),
            tail(&finished.stderr)
        );
        Ok(finished)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- redis-migration:\n{}", tail(&self.stderr()));
        }
    }
}

/// `True`, `False` or `Unknown`, if the condition is there.
pub fn condition(status: &Value, kind: &str) -> Option<String> {
    let conditions = status["conditions"].as_array()?;
    let condition = conditions.iter().find(|condition| condition["type"] == kind)?;
    condition["status"].as_str().map(str::to_owned)
}

fn command(name: &str, folder: &Path, manifest: &Manifest, further: &[&str]) -> Result<Command> {
    manifest.write(folder)?;
    let mut command = Command::new(binary()?);
    command.arg(name).arg("-f").arg(folder.join("migration.yaml"));
    command.arg("--secrets").arg(folder.join("secrets"));
    if name == "run" {
        command.arg("--data-dir").arg(folder.join("data"));
    }
    command.args(further).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

fn finish(mut command: Command, timeout: Duration) -> Result<Finished> {
    let started = Instant::now();
    let mut child = command.spawn()?;
    let (stdout, stderr) = (child.stdout.take().context("stdout")?, child.stderr.take().context("stderr")?);
    let read = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = from.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
    let code = wait_until("end of redis-migration", timeout, || child.try_wait().map_err(Into::into));
    if code.is_err() {
        let _ = child.kill();
    }
    let took = started.elapsed();
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    let code = code.with_context(|| stderr.clone())?.code().unwrap_or(-1);
    Ok(Finished { code, stdout, stderr, took })
}

fn change(seen: &(Mutex<Seen>, Condvar), with: impl FnOnce(&mut Seen)) {
    with(&mut seen.0.lock().unwrap_or_else(PoisonError::into_inner));
    seen.1.notify_all();
}

fn tail(text: &str) -> &str {
    let start = text.len().saturating_sub(4000);
    (start..text.len()).find_map(|at| text.get(at..)).unwrap_or_default()
}
