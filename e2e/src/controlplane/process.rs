//! One process of the control plane, with its log.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Result, bail};

use super::Program;
use crate::reaper;

pub struct Process {
    program: Program,
    /// Stands in its arguments, by which the reaper knows it again.
    port: u16,
    arguments: Vec<String>,
    folder: PathBuf,
    child: Option<Child>,
}

impl Process {
    pub fn new(program: Program, folder: &Path, port: u16, arguments: Vec<String>) -> Result<Self> {
        Ok(Self { program, port, arguments, folder: folder.to_owned(), child: None })
    }

    pub fn start(&mut self) -> Result<()> {
        self.kill();
        let log = std::fs::File::options().create(true).append(true).open(self.log_file())?;
        let mut command = Command::new(self.program.file()?);
        command.args(self.program.words()).args(&self.arguments).current_dir(&self.folder);
        // An etcd takes variables for arguments, too.
        command.env_clear().env("HOME", &self.folder).env("PATH", "/usr/bin:/bin");
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        reaper::watch(child.id(), self.port, &self.folder);
        self.child = Some(child);
        Ok(())
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// An error if it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        match self.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
            Some(status) => bail!("{} ended: {status}\n{}", self.program.name(), self.tail()),
            None => Ok(()),
        }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The last lines of its log.
    pub fn tail(&self) -> String {
        let log = std::fs::read(self.log_file()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
        format!("--- {}:\n{last}", self.program.name())
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.program.name()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
