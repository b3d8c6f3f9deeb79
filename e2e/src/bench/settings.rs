//! What a bench run was asked for.

use std::path::PathBuf;

use crate::{server, workload};

/// The command line, resolved.
pub struct Settings {
    pub runs: usize,
    pub scale: f64,
    /// Existing folder for data sets.
    pub cache: PathBuf,
    /// Rows to measure; empty: all.
    pub only: Vec<String>,
    /// Leave the tool out: only limits and references.
    pub limits_only: bool,
}

impl Settings {
    pub fn wants(&self, row: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == row)
    }

    pub fn wants_any(&self, rows: &[&str]) -> bool {
        rows.iter().any(|row| self.wants(row))
    }

    /// A cached file of this generator at this scale.
    pub fn cached(&self, name: &str) -> PathBuf {
        self.cache.join(format!("f-{}-r{}-x{}.{name}", server::VERSION, workload::REVISION, self.scale))
    }
}

/// Says on standard error what goes on: a full run takes minutes.
pub fn say(text: &str) {
    eprintln!("bench: {text}");
}
