//! The spool: the raw replication bytes of one shard, between the socket that is always read and the
//! applier that may be slower.
//!
//! Position 0 is the first byte of the RDB; the command stream follows it. While the applier keeps up,
//! blocks pass through memory. Once it is behind by half of `limits.memory`, the spool *writes through*: every
//! block that is held goes to segment files, the oldest first, and memory only caches what is read next, until
//! the reader has caught up with the newest byte. So what stands on disk is one run of bytes, from the oldest
//! not applied one almost to the newest, and [`recover`] finds it after the process was killed.
//!
//! Past `limits.disk`, or when the disk takes no more, memory fills up to its limit, then the writer waits,
//! and with it the socket. What the target has acknowledged is let go, apart from `limits.retain` bytes.
//!
//! Nothing is forced to the disk: a killed process leaves everything in the kernel's hands. After a power loss
//! the newest bytes, or all, may be missing; what is there is checked before it is used, so that the loss shows.

mod flush;
mod folder;
mod journal;
mod reader;
mod recover;
mod segment;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod view;
mod volume;
mod writer;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::Notify;

use flush::Folder;
pub use reader::SpoolReader;
pub use recover::{Recovered, recover};
use segment::SegmentReader;
use state::State;
pub use view::SpoolView;
pub use volume::Volume;
pub use writer::SpoolWriter;

/// Bytes of one block: one record on disk, one hand-over to the applier.
const BLOCK: usize = 256 << 10;
/// A block that has been open this long is closed, so that its arrival time stays true for all its bytes.
const BLOCK_MILLIS: u64 = 100;

#[derive(Debug, Error)]
pub enum SpoolError {
    #[error("cannot write the spool file {}: {source}; see to the folder or give another --data-dir", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read the spool file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("spool file {} is damaged at byte {at}: a full resync is needed", path.display())]
    Corrupt { path: PathBuf, at: u64 },
    #[error("spool position {position} is no longer held (the oldest is {oldest})")]
    Gone { position: u64, oldest: u64 },
    #[error("{} is gone: another run of this migration has taken the spool over, or somebody removed it; let only one run go on", path.display())]
    Taken { path: PathBuf },
    #[error("what is in memory cannot be written to the spool in {}: {why}", folder.display())]
    Full { folder: PathBuf, why: Full },
}

impl SpoolError {
    /// The error number, when the disk may take it later.
    fn os_error_to_wait_for(&self) -> Option<i32> {
        // EIO, ENOMEM, ENFILE and EMFILE of Linux.
        const PASSING: [i32; 4] = [5, 12, 23, 24];
        const NO_SPACE: i32 = 28;
        let Self::Write { source, .. } = self else { return None };
        match (source.kind(), source.raw_os_error()) {
            (_, Some(code)) if PASSING.contains(&code) => Some(code),
            (
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge
                | io::ErrorKind::WriteZero,
                code,
            ) => Some(code.unwrap_or(NO_SPACE)),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct SpoolLimits {
    /// Bytes in memory, acknowledged ones included.
    pub memory: u64,
    /// Bytes of segment files.
    pub disk: u64,
    /// Acknowledged bytes that are kept for a replay when there is room.
    pub retain: u64,
    /// The shard's folder. Each run has its own in it, made when it is first needed.
    pub folder: PathBuf,
    /// Shared with other spools.
    pub volume: Volume,
}

impl SpoolLimits {
    /// Bytes that a spool may add on disk which has `bytes` there; else why there are no `wanted`.
    fn room(&self, bytes: u64, wanted: u64) -> Result<u64, Full> {
        let (own, shared) = (self.disk.saturating_sub(bytes), self.volume.room());
        match (own >= wanted, shared >= wanted) {
            (true, true) => Ok(own.min(shared)),
            (true, false) => Err(Full::Volume),
            (false, _) => Err(Full::Limit),
        }
    }
}

/// What the bytes of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Snapshot,
    /// The command stream. `offset`: the replication offset *before* the block's first byte.
    Stream {
        offset: i64,
    },
}

/// A run of bytes of one part.
#[derive(Clone, Debug)]
pub struct Block {
    pub position: u64,
    pub part: Part,
    pub bytes: Bytes,
    /// Unix time in ms at which its first byte arrived.
    pub arrived: u64,
}

/// Where a replication history starts: `PSYNC` names it by these two.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    pub replication_id: String,
    /// Offset of the byte before the first stream byte.
    pub offset: i64,
}

impl Origin {
    /// Of a full sync by SYNC: the source does not say; offsets count from 0.
    pub fn unnamed() -> Self {
        Self { replication_id: "?".to_owned(), offset: 0 }
    }

    pub fn is_unnamed(&self) -> bool {
        self.replication_id == "?"
    }
}

/// What the reader meets next.
#[derive(Debug)]
pub enum Next {
    Block(Block),
    /// A new history has begun; reading goes on at its position 0. `snapshot`: an RDB comes first. (The
    /// id may be another than was asked for: a promoted master goes on with a history under its own.)
    Begun {
        origin: Origin,
        snapshot: bool,
    },
}

/// Why a spool takes no more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Full {
    /// `limits.disk` is reached.
    Limit,
    /// Nothing is left of the volume that all spools of the process share.
    Volume,
    /// The disk does not take what it should; it is tried again and again.
    Disk { os_error: i32 },
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit => f.write_str("limits.spoolDisk is reached"),
            Self::Volume => {
                f.write_str("all shards of this replica together have filled its volume (--spool-size)")
            }
            Self::Disk { os_error } => {
                write!(f, "the disk takes no more: {}", io::Error::from_raw_os_error(*os_error))
            }
        }
    }
}

/// Sizes at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolGauges {
    pub memory_bytes: u64,
    /// Of all segment files, the one that is written included.
    pub disk_bytes: u64,
    /// Position behind the last received byte.
    pub end: u64,
    /// True while the writer waits for room: the socket is not read.
    pub full: bool,
    /// What it waits for.
    pub why_full: Option<Full>,
}

/// Creates an empty spool. What other runs left in the folder is removed.
pub fn spool(limits: SpoolLimits) -> (SpoolWriter, SpoolReader) {
    remove(&limits.folder);
    let folder = Folder::new(folder::own(&limits.folder), false);
    open(limits, folder, State::default())
}

/// A spool in the middle of a history whose writer can begin there, and whose RDB has not ended: `position`
/// is the first that will be appended. What other runs left in the folder is removed.
pub fn spool_from(
    limits: SpoolLimits,
    (history, origin): (u64, Origin),
    position: u64,
) -> (SpoolWriter, SpoolReader) {
    remove(&limits.folder);
    let folder = Folder::new(folder::own(&limits.folder), false);
    let mut state = State::default();
    state.begin(history, origin, true);
    (state.applied, state.read) = (position, position);
    open(limits, folder, state)
}

/// Removes what earlier runs left in a shard's folder, when it cannot be of use any more.
pub fn remove(folder: &Path) {
    folder::remove_left_over(folder);
}

/// As [`remove`], in two steps: this one only renames, so that no later run takes it up.
pub fn doom(folder: &Path) {
    folder::doom_left_over(folder);
}

/// The second: may take long. A run that has begun in the folder meanwhile goes on.
pub fn remove_doomed(folder: &Path) {
    folder::remove_all_doomed(folder);
}

fn open(limits: SpoolLimits, folder: Folder, state: State) -> (SpoolWriter, SpoolReader) {
    let (history, position) = (state.history, state.read);
    limits.volume.holds(&limits.folder, state.store.bytes());
    let shared = Arc::new(Shared {
        limits,
        run_folder: folder.path.clone(),
        state: Mutex::new(state),
        folder: Mutex::new(folder),
        data: Notify::new(),
        room: Notify::new(),
        idle: Notify::new(),
    });
    shared.limits.volume.join(&shared);
    let writer = SpoolWriter { shared: Arc::clone(&shared) };
    (writer, SpoolReader { shared, history, position, segments: SegmentReader::default() })
}

struct Shared {
    limits: SpoolLimits,
    run_folder: PathBuf,
    state: Mutex<State>,
    /// Locked through a whole job, never by an async task.
    folder: Mutex<Folder>,
    /// Told when bytes or a history arrived. One waiter; a permit given before the wait is kept.
    data: Notify,
    /// Told when there may be room.
    room: Notify,
    /// Told when a job is done.
    idle: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_folder(&self) -> &Path {
        &self.run_folder
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.keep {
            self.folder.get_mut().unwrap_or_else(PoisonError::into_inner).remove();
        }
    }
}
