//! What a spool holds and by which rules it moves between memory and disk. No IO here.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use super::store::Store;
use super::{BLOCK, BLOCK_MILLIS, Full, Origin, SpoolError, SpoolGauges, SpoolLimits};

/// A closed block. It is in memory, on disk or both.
pub struct Entry {
    pub position: u64,
    pub length: u32,
    pub arrived: u64,
    pub memory: Option<Bytes>,
    pub disk: Option<DiskPlace>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    pub segment: u64,
    pub at: u64,
}

impl Entry {
    pub fn end(&self) -> u64 {
        self.position + u64::from(self.length)
    }
}

/// The block that is being filled.
pub struct Open {
    pub position: u64,
    pub arrived: u64,
    bytes: Vec<u8>,
}

/// Why the disk takes nothing for now.
pub struct Trouble {
    pub os_error: i32,
    pub retry_at: Instant,
}

#[derive(Default)]
pub struct State {
    /// Number of the history: rises, and differs between runs as well. 0 before the first `begin`.
    pub history: u64,
    pub origin: Option<Origin>,
    /// An RDB comes first in this history.
    pub snapshot: bool,
    /// Position of the first stream byte, once the snapshot's end is known.
    pub stream_at: Option<u64>,
    /// In order of position, without gaps. Those on disk come before those in memory only.
    pub entries: VecDeque<Entry>,
    pub open: Option<Open>,
    /// All before it stands on the target.
    pub applied: u64,
    /// The reader has all before it.
    pub read: u64,
    /// Bytes of closed blocks in memory.
    pub memory: u64,
    /// Blocks are written to disk as they come: the reader lags.
    pub through: bool,
    /// Of the blocks on disk, at most those between these positions are in memory as well.
    pub cached: std::ops::Range<u64>,
    pub store: Store,
    /// Why the writer waits.
    pub full: Option<Full>,
    /// One block may pass the limit of the disk, or of the memory.
    pub pass_disk: bool,
    pub pass_memory: bool,
    pub trouble: Option<Trouble>,
    /// An error that a retry cannot mend, until the writer takes it.
    pub failed: Option<SpoolError>,
    /// Files stay when the spool is dropped.
    pub keep: bool,
}

impl State {
    pub fn begin(&mut self, history: u64, origin: Origin, snapshot: bool) {
        let mut store = std::mem::take(&mut self.store);
        store.forget_all();
        *self = Self {
            history,
            origin: Some(origin),
            snapshot,
            stream_at: (!snapshot).then_some(0),
            store,
            trouble: self.trouble.take(),
            failed: self.failed.take(),
            keep: self.keep,
            ..Self::default()
        };
    }

    pub fn end(&self) -> u64 {
        match (&self.open, self.entries.back()) {
            (Some(open), _) => open.position + open.bytes.len() as u64,
            (None, Some(entry)) => entry.end(),
            (None, None) => self.applied,
        }
    }

    /// The oldest position that is held.
    pub fn oldest(&self) -> u64 {
        let first = self.entries.front().map(|entry| entry.position);
        first.or(self.open.as_ref().map(|open| open.position)).unwrap_or(self.applied)
    }

    /// Takes bytes into the open block, at most as many as it holds, and says how many.
    pub fn take(&mut self, bytes: &[u8], now: u64, limits: &SpoolLimits) -> usize {
        let position = self.end();
        let open = self.open.get_or_insert_with(|| Open {
            position,
            arrived: now,
            bytes: Vec::with_capacity(bytes.len().clamp(4096, BLOCK)),
        });
        let take = bytes.len().min(BLOCK - open.bytes.len());
        open.bytes.extend_from_slice(bytes.get(..take).unwrap_or_default());
        if open.bytes.len() >= BLOCK || now.saturating_sub(open.arrived) > BLOCK_MILLIS {
            self.close_open();
        }
        self.pass_memory = false;
        // The other half of the memory is for what arrives while the first is written.
        if self.end() - self.applied > limits.memory / 2 {
            self.through = true;
        }
        take
    }

    pub fn close_open(&mut self) {
        let Some(open) = self.open.take() else { return };
        self.memory += open.bytes.len() as u64;
        self.entries.push_back(Entry {
            position: open.position,
            length: open.bytes.len() as u32,
            arrived: open.arrived,
            memory: Some(Bytes::from(open.bytes)),
            disk: None,
        });
    }

    /// Nothing more is taken for now.
    pub fn is_over(&self, limits: &SpoolLimits) -> bool {
        self.memory > limits.memory && !self.pass_memory
    }

    /// Lets memory go, as far as that needs no disk: copies of what is on disk, and what is applied.
    pub fn relieve(&mut self, limits: &SpoolLimits) {
        self.cool(limits);
        let may_drop = !self.through || self.blocked(limits).is_some();
        while may_drop && self.memory > limits.memory && self.drop_front() {}
    }

    /// Lets the oldest block go if it is applied and the reader is past it.
    pub fn drop_front(&mut self) -> bool {
        let past = self.applied.min(self.read);
        if self.entries.front().is_none_or(|entry| entry.end() > past) {
            return false;
        }
        let Some(entry) = self.entries.pop_front() else { return false };
        if entry.memory.is_some() {
            self.memory -= u64::from(entry.length);
        }
        if let Some(place) = entry.disk {
            self.store.let_go(place.segment);
        }
        true
    }

    pub fn apply(&mut self, position: u64, limits: &SpoolLimits) {
        self.applied = self.applied.max(position);
        let keep_from = self.applied.saturating_sub(limits.retain);
        while self.entries.front().is_some_and(|entry| entry.end() <= keep_from) && self.drop_front() {}
    }

    /// What is read again does not stand on the target any more.
    pub fn seek(&mut self, position: u64) {
        self.read = position;
        self.applied = self.applied.min(position);
    }

    /// The reader has all before `position`.
    pub fn is_read(&mut self, position: u64) {
        self.read = position;
        if position >= self.end() {
            self.through = false;
        }
    }

    /// Index of the first block that is not on disk.
    pub fn unwritten(&self) -> usize {
        self.entries.partition_point(|entry| entry.disk.is_some())
    }

    /// The blocks from `from` to `to` have got their places on disk: those stay in memory that the reader
    /// gets to next, as far as there is room.
    pub fn written(&mut self, from: u64, to: u64, limits: &SpoolLimits) {
        // Blocks in between are on disk only, and read before these.
        let behind = self.cached.end < from && self.read < from;
        if behind {
            self.drop_memory(from, to);
        } else {
            self.cached.end = to;
        }
        self.cool(limits);
    }

    /// Drops copies of what is on disk: what is read, then, when memory is short, what is read last.
    fn cool(&mut self, limits: &SpoolLimits) {
        let read = self.read.min(self.cached.end);
        if self.cached.start < read {
            self.drop_memory(self.cached.start, read);
            self.cached.start = read;
        }
        let all_written = self.unwritten() == self.entries.len();
        if self.memory <= limits.memory && !all_written {
            return;
        }
        while self.memory > limits.memory / 2 && self.cached.start < self.cached.end {
            let index = self.entries.partition_point(|entry| entry.end() < self.cached.end);
            let from = self.entries.get(index).map_or(self.cached.start, |entry| entry.position);
            self.drop_memory(from, self.cached.end);
            // Nothing of them is held any more when the first that is held lies behind.
            let none = from >= self.cached.end;
            self.cached.end = if none { self.cached.start } else { from.max(self.cached.start) };
        }
    }

    /// Drops the copies in memory of blocks on disk that lie between these positions as a whole.
    fn drop_memory(&mut self, from: u64, to: u64) {
        let first = self.entries.partition_point(|entry| entry.position < from);
        for entry in self.entries.iter_mut().skip(first) {
            if entry.end() > to || entry.disk.is_none() {
                return;
            }
            if entry.memory.take().is_some() {
                self.memory -= u64::from(entry.length);
            }
        }
    }

    /// Why nothing can be written to disk now.
    pub fn blocked(&self, limits: &SpoolLimits) -> Option<Full> {
        if let Some(Trouble { os_error, .. }) = self.trouble {
            return Some(Full::Disk { os_error });
        }
        let next = self.entries.get(self.unwritten())?;
        self.store.room(next.length, limits).err().filter(|_| !self.store.has_garbage())
    }

    /// Unix ms at which the byte at `position` arrived; `None` when it has not.
    pub fn arrived(&self, position: u64) -> Option<u64> {
        let index = self.entries.partition_point(|entry| entry.end() <= position);
        match self.entries.get(index) {
            Some(entry) => Some(entry.arrived),
            None => self.open.as_ref().filter(|_| self.end() > position).map(|open| open.arrived),
        }
    }

    pub fn gauges(&self) -> SpoolGauges {
        let open = self.open.as_ref().map_or(0, |open| open.bytes.len() as u64);
        SpoolGauges {
            memory_bytes: self.memory + open,
            disk_bytes: self.store.bytes(),
            end: self.end(),
            full: self.full.is_some(),
            why_full: self.full,
        }
    }
}
