//! Folders of the spool: one for each shard, and in it one for each run.
//!
//! A run creates its own when it first needs the disk, and never again. Whoever comes later takes over what
//! is left by renaming it, so that no path of the earlier process leads there any more.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::journal::Journal;

const PREFIX: &str = "run-";
/// Being removed: nobody takes it over.
const DOOMED: &str = "gone-";

/// A name that no other run has, and that sorts by time.
pub fn own(shard: &Path) -> PathBuf {
    named(shard, PREFIX)
}

fn named(shard: &Path, prefix: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    shard.join(format!("{prefix}{:016x}-{}-{count}", micros(), std::process::id()))
}

/// Microseconds since the Unix epoch.
pub fn micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// What other runs left, the newest first.
pub fn left_over(shard: &Path) -> Vec<PathBuf> {
    list(shard, PREFIX)
}

fn list(shard: &Path, prefix: &str) -> Vec<PathBuf> {
    // Mostly there is no such folder.
    let found = std::fs::read_dir(shard).into_iter().flatten().flatten().map(|entry| entry.path());
    let begins =
        |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut found: Vec<_> = found.filter(|path| begins(path)).collect();
    found.sort();
    found.reverse();
    found
}

/// Removes a run's folder. Renamed first: a process that still uses it cannot add to it meanwhile.
pub fn remove(folder: &Path) {
    if let Some(doomed) = doom(folder) {
        report(&doomed, remove_doomed(&doomed));
    }
}

/// Renames a run's folder, so that nobody takes it over.
fn doom(folder: &Path) -> Option<PathBuf> {
    let doomed = named(folder.parent()?, DOOMED);
    let renamed = std::fs::rename(folder, &doomed);
    let is_doomed = renamed.is_ok();
    report(folder, renamed);
    is_doomed.then_some(doomed)
}

fn remove_doomed(folder: &Path) -> io::Result<()> {
    Journal::remove(folder)?;
    std::fs::remove_dir_all(folder)
}

fn report(folder: &Path, removed: io::Result<()>) {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %folder.display(), %error, "a spool folder could not be removed");
        }
        _ => {}
    }
}

/// Removes what other runs left in the shard's folder, and the folder itself when nothing else is in it.
pub fn remove_left_over(shard: &Path) {
    doom_left_over(shard);
    remove_all_doomed(shard);
}

/// The first half of [`remove_left_over`], which takes no time worth mentioning.
pub fn doom_left_over(shard: &Path) {
    for folder in left_over(shard) {
        doom(&folder);
    }
}

/// The other half. Runs that came meanwhile stay.
pub fn remove_all_doomed(shard: &Path) {
    for folder in list(shard, DOOMED) {
        // Another process may be at it as well.
        report(&folder, remove_doomed(&folder));
    }
    // Fails when something else is in it, or when there is none.
    let _ = std::fs::remove_dir(shard);
}
