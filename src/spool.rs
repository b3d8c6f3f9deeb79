//! The spool: the raw replication bytes of one shard, between the socket that is always read and the
//! applier that may be slower.
//!
//! Position 0 is the first byte of the RDB; the command stream follows it. While the applier keeps up,
//! bytes pass through memory; past `limits.memory` they go to segment files, past `limits.disk` the
//! writer waits, and with it the socket. What the target has acknowledged is let go, apart from the newest
//! `limits.retain` bytes, as far as there is room for them.

mod segment;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::Notify;

use segment::{SegmentReader, SegmentWriter, remove_segments, segment_path};

/// Bytes of one block: one write to disk, one hand-over to the applier.
const BLOCK: usize = 256 << 10;
/// A block that has been open this long is closed, so that its arrival time stays true for all its bytes.
const BLOCK_MILLIS: u64 = 100;

#[derive(Debug, Error)]
pub enum SpoolError {
    #[error("cannot write the spool file {}: {source}; free disk space or give another --data-dir", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read the spool file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("spool file {} is damaged at byte {at}: a full resync is needed", path.display())]
    Corrupt { path: PathBuf, at: u64 },
    #[error("spool position {position} is no longer held (the oldest is {oldest})")]
    Gone { position: u64, oldest: u64 },
}

#[derive(Clone, Debug)]
pub struct SpoolLimits {
    /// Bytes in memory, acknowledged ones included.
    pub memory: u64,
    /// Bytes in segment files.
    pub disk: u64,
    /// Acknowledged bytes that are kept for a replay when there is room.
    pub retain: u64,
    /// Where segment files go; made when the first is needed.
    pub folder: PathBuf,
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
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Sizes at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolGauges {
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Position behind the last received byte.
    pub end: u64,
    /// True while the writer waits for disk room: the socket is not read.
    pub full: bool,
}

/// Segments are numbered through the life of the process, so that the late removal of one cannot meet
/// another of its name.
static NEXT_SEGMENT: AtomicU64 = AtomicU64::new(1);

/// Creates an empty spool. Segment files that a killed run left in the folder are removed.
pub fn spool(limits: SpoolLimits) -> (SpoolWriter, SpoolReader) {
    remove_segments(&limits.folder);
    let shared = Arc::new(Shared {
        limits,
        state: Mutex::new(State::default()),
        data: Notify::new(),
        room: Notify::new(),
    });
    let writer = SpoolWriter { shared: Arc::clone(&shared), segment: None };
    (writer, SpoolReader { shared, generation: 0, position: 0, segments: SegmentReader::default() })
}

struct Shared {
    limits: SpoolLimits,
    state: Mutex<State>,
    /// Told when bytes or a generation arrived. One waiter; a permit given before the wait is kept.
    data: Notify,
    /// Told when entries were let go.
    room: Notify,
}

#[derive(Default)]
struct State {
    /// Raised by each `begin`; 0 before the first.
    generation: u64,
    origin: Option<Origin>,
    /// An RDB comes first in this history.
    snapshot: bool,
    /// Position of the first stream byte, once the snapshot's end is known.
    stream_at: Option<u64>,
    /// Closed blocks in order of position, without gaps.
    entries: VecDeque<Entry>,
    open: Option<Open>,
    applied: u64,
    memory: u64,
    disk: u64,
    full: bool,
    /// One block may pass the limits.
    may_pass: bool,
    /// The segment that is still written; its file outlives its entries.
    writing: Option<u64>,
}

struct Entry {
    position: u64,
    length: u32,
    arrived: u64,
    place: Place,
}

enum Place {
    Memory(Bytes),
    Disk { segment: u64, at: u64 },
}

struct Open {
    position: u64,
    arrived: u64,
    bytes: Vec<u8>,
}

impl Entry {
    fn end(&self) -> u64 {
        self.position + u64::from(self.length)
    }
}

impl State {
    fn end(&self) -> u64 {
        match (&self.open, self.entries.back()) {
            (Some(open), _) => open.position + open.bytes.len() as u64,
            (None, Some(entry)) => entry.end(),
            (None, None) => self.applied,
        }
    }

    /// Lets the oldest entry go if it is acknowledged; gives what its bytes took.
    fn drop_applied_front(&mut self) -> Option<Freed> {
        let front = self.entries.front()?;
        if front.end() > self.applied {
            return None;
        }
        let entry = self.entries.pop_front()?;
        Some(match entry.place {
            Place::Memory(_) => {
                self.memory -= u64::from(entry.length);
                Freed::Memory
            }
            Place::Disk { segment, .. } => {
                self.disk -= u64::from(entry.length);
                let last = self.writing != Some(segment) && !self.holds(segment);
                Freed::Disk { finished: last.then_some(segment) }
            }
        })
    }

    fn holds(&self, segment: u64) -> bool {
        self.entries
            .iter()
            .any(|entry| matches!(entry.place, Place::Disk { segment: id, .. } if id == segment))
    }

    fn next_spill(&mut self, limits: &SpoolLimits, finished: &mut Vec<u64>) -> Spill {
        loop {
            if self.memory <= limits.memory {
                self.full = false;
                return Spill::Fits;
            }
            match self.drop_applied_front() {
                Some(Freed::Memory) => continue,
                Some(Freed::Disk { finished: segment }) => {
                    finished.extend(segment);
                    continue;
                }
                None => {}
            }
            let newest = self.entries.iter().rev().find_map(|entry| match &entry.place {
                Place::Memory(bytes) => Some((entry.position, bytes.clone())),
                Place::Disk { .. } => None,
            });
            let Some((position, bytes)) = newest else { return Spill::Fits };
            self.full = self.disk + bytes.len() as u64 > limits.disk && !std::mem::take(&mut self.may_pass);
            return if self.full { Spill::Full } else { Spill::Block { position, bytes } };
        }
    }

    fn push_memory(&mut self, open: Open) {
        self.memory += open.bytes.len() as u64;
        self.entries.push_back(Entry {
            position: open.position,
            length: open.bytes.len() as u32,
            arrived: open.arrived,
            place: Place::Memory(Bytes::from(open.bytes)),
        });
    }
}

enum Spill {
    Fits,
    /// Neither memory nor disk has room.
    Full,
    Block {
        position: u64,
        bytes: Bytes,
    },
}

enum Freed {
    Memory,
    /// `finished`: a segment of which nothing is left.
    Disk {
        finished: Option<u64>,
    },
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a segment file away from the async threads; a file that stays is overwritten or removed later.
    fn remove_segment(&self, id: u64) {
        let path = segment_path(&self.limits.folder, id);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a spool file could not be removed");
            }
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for entry in &state.entries {
            if let Place::Disk { segment, .. } = entry.place {
                // Several entries share a segment, so that it is often gone already.
                let _ = std::fs::remove_file(segment_path(&self.limits.folder, segment));
            }
        }
        if let Some(segment) = state.writing {
            let _ = std::fs::remove_file(segment_path(&self.limits.folder, segment));
        }
        let _ = std::fs::remove_dir(&self.limits.folder);
    }
}

/// The receiving end; one per spool.
pub struct SpoolWriter {
    shared: Arc<Shared>,
    segment: Option<SegmentWriter>,
}

impl SpoolWriter {
    /// Forgets everything and starts a new history; with `snapshot` an RDB comes first. The reader is told.
    pub fn begin(&mut self, origin: Origin, snapshot: bool) {
        let mut state = self.shared.lock();
        let generation = state.generation + 1;
        let mut segments: Vec<u64> = Vec::new();
        for entry in &state.entries {
            if let Place::Disk { segment, .. } = entry.place {
                segments.push(segment);
            }
        }
        segments.extend(state.writing);
        segments.sort_unstable();
        segments.dedup();
        *state = State {
            generation,
            origin: Some(origin),
            snapshot,
            stream_at: (!snapshot).then_some(0),
            ..State::default()
        };
        drop(state);
        self.segment = None;
        for segment in segments {
            self.shared.remove_segment(segment);
        }
        self.shared.data.notify_one();
    }

    /// The history goes on under another id (`+CONTINUE <new id>`).
    pub fn rename(&mut self, replication_id: &str) {
        if let Some(origin) = &mut self.shared.lock().origin {
            origin.replication_id = replication_id.to_owned();
        }
    }

    /// The next byte appended is the first of the command stream.
    pub fn start_stream(&mut self) {
        let mut state = self.shared.lock();
        state.stream_at = Some(state.end());
        // A block holds bytes of one part.
        if let Some(open) = state.open.take() {
            state.push_memory(open);
        }
        drop(state);
        self.shared.data.notify_one();
    }

    /// Appends bytes that arrived at `now` (Unix ms). Waits while memory and disk are full. When it is
    /// cancelled, what was taken by then is in the spool, and the rest is not.
    pub async fn append(&mut self, mut bytes: &[u8], now: u64) -> Result<(), SpoolError> {
        while !bytes.is_empty() {
            let over = {
                let mut state = self.shared.lock();
                let position = state.end();
                let open = state.open.get_or_insert_with(|| Open {
                    position,
                    arrived: now,
                    bytes: Vec::with_capacity(bytes.len().clamp(4096, BLOCK)),
                });
                let take = bytes.len().min(BLOCK - open.bytes.len());
                let (now_part, later) = bytes.split_at(take);
                open.bytes.extend_from_slice(now_part);
                bytes = later;
                let close = open.bytes.len() >= BLOCK || now.saturating_sub(open.arrived) > BLOCK_MILLIS;
                if close && let Some(open) = state.open.take() {
                    state.push_memory(open);
                }
                // The reader closes blocks as well.
                state.memory > self.shared.limits.memory
            };
            self.shared.data.notify_one();
            if over {
                self.spill().await?;
            }
        }
        Ok(())
    }

    pub fn gauges(&self) -> SpoolGauges {
        gauges(&self.shared)
    }

    /// Tells the histories of this spool apart; what the reader has of another is not of this one.
    pub fn history(&self) -> u64 {
        self.shared.lock().generation
    }

    /// Brings memory back under its limit: lets go what is applied, then moves blocks to disk, the newest
    /// first, as the reader gets to those last. Waits while the disk is full as well. May be cancelled: a
    /// block stays in memory until it stands on disk.
    async fn spill(&mut self) -> Result<(), SpoolError> {
        loop {
            let mut finished = Vec::new();
            let step = self.shared.lock().next_spill(&self.shared.limits, &mut finished);
            finished.into_iter().for_each(|id| self.shared.remove_segment(id));
            match step {
                Spill::Fits => return Ok(()),
                Spill::Full => self.shared.room.notified().await,
                Spill::Block { position, bytes } => self.move_to_disk(position, bytes).await?,
            }
        }
    }

    async fn move_to_disk(&mut self, position: u64, bytes: Bytes) -> Result<(), SpoolError> {
        let length = bytes.len() as u64;
        // After a cancelled write the segment is not used again: that write may still be under way.
        let mut segment = match self.segment.take() {
            Some(segment) if !segment.is_full() => segment,
            _ => {
                let id = NEXT_SEGMENT.fetch_add(1, Ordering::Relaxed);
                let emptied = {
                    let mut state = self.shared.lock();
                    state.writing.replace(id).filter(|&earlier| !state.holds(earlier))
                };
                emptied.into_iter().for_each(|id| self.shared.remove_segment(id));
                SegmentWriter::create(&self.shared.limits.folder, id).await?
            }
        };
        let at = segment.append(position, bytes).await?;
        let mut state = self.shared.lock();
        let index = state.entries.partition_point(|entry| entry.position < position);
        // It may have been applied and let go meanwhile.
        if let Some(entry) = state.entries.get_mut(index).filter(|entry| entry.position == position) {
            entry.place = Place::Disk { segment: segment.id, at };
            state.memory -= length;
            state.disk += length;
        }
        self.segment = Some(segment);
        Ok(())
    }
}

fn gauges(shared: &Shared) -> SpoolGauges {
    let state = shared.lock();
    let open = state.open.as_ref().map_or(0, |open| open.bytes.len() as u64);
    SpoolGauges {
        memory_bytes: state.memory + open,
        disk_bytes: state.disk,
        end: state.end(),
        full: state.full,
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

/// The applier's end; one per spool.
pub struct SpoolReader {
    shared: Arc<Shared>,
    generation: u64,
    position: u64,
    segments: SegmentReader,
}

impl SpoolReader {
    /// True when `next` will not have to wait for the network.
    pub fn is_ready(&self) -> bool {
        let state = self.shared.lock();
        state.generation != self.generation || state.end() > self.position
    }

    /// The bytes behind those read last, as many as are at hand (at most one block).
    /// Cancel-safe: a block counts as read only once it is returned.
    pub async fn next(&mut self) -> Result<Next, SpoolError> {
        loop {
            match self.look()? {
                Found::Begun { origin, snapshot } => return Ok(Next::Begun { origin, snapshot }),
                Found::Block(block) => {
                    self.position = block.position + block.bytes.len() as u64;
                    return Ok(Next::Block(block));
                }
                Found::OnDisk { segment, at, position, length, skip, part, arrived } => {
                    let folder = self.shared.limits.folder.clone();
                    let bytes = self.segments.read(&folder, segment, at, position, length).await?;
                    let bytes = Bytes::from(bytes).slice(skip..);
                    let position = position + skip as u64;
                    self.position = position + bytes.len() as u64;
                    return Ok(Next::Block(Block { position, part, bytes, arrived }));
                }
                Found::Nothing => self.shared.data.notified().await,
            }
        }
    }

    /// Says that nothing more can be applied before more bytes are read: the writer, should it wait for
    /// room, may pass its limits by a block. (One value, command or transaction may be larger than they
    /// are, and waiting would never end.)
    pub fn starves(&self) {
        let mut state = self.shared.lock();
        if state.full && state.end() <= self.position {
            state.may_pass = true;
            self.shared.room.notify_one();
        }
    }

    /// Reading goes on at `position` (of the same history).
    pub fn seek(&mut self, position: u64) {
        self.position = position;
    }

    /// Everything before `position` stands on the target.
    pub fn applied(&mut self, position: u64) {
        let mut finished = Vec::new();
        {
            let mut state = self.shared.lock();
            if state.generation != self.generation || position <= state.applied {
                return;
            }
            state.applied = position;
            let keep_from = state.end().saturating_sub(self.shared.limits.retain);
            while state.entries.front().is_some_and(|entry| entry.end() <= keep_from) {
                match state.drop_applied_front() {
                    Some(Freed::Memory) => {}
                    Some(Freed::Disk { finished: segment }) => finished.extend(segment),
                    None => break,
                }
            }
        }
        for segment in finished {
            self.shared.remove_segment(segment);
        }
        self.shared.room.notify_one();
    }

    /// The history that is being read, as [`SpoolWriter::history`] counts them.
    pub fn history(&self) -> u64 {
        self.generation
    }

    /// The id under which the source knows the history that is being read; `None` when the writer has
    /// begun another, whose id says nothing about the places of this one.
    pub fn replication_id(&self) -> Option<String> {
        let state = self.shared.lock();
        let origin = state.origin.as_ref().filter(|_| state.generation == self.generation);
        origin.map(|origin| origin.replication_id.clone())
    }

    /// The oldest position that can be read again.
    pub fn oldest(&self) -> u64 {
        let state = self.shared.lock();
        let first = state.entries.front().map(|entry| entry.position);
        first.or(state.open.as_ref().map(|open| open.position)).unwrap_or(state.applied)
    }

    /// Unix ms at which the byte at `position` arrived; `None` when it has not.
    pub fn arrived(&self, position: u64) -> Option<u64> {
        let state = self.shared.lock();
        let index = state.entries.partition_point(|entry| entry.end() <= position);
        match state.entries.get(index) {
            Some(entry) => Some(entry.arrived),
            None => state.open.as_ref().filter(|_| state.end() > position).map(|open| open.arrived),
        }
    }

    pub fn gauges(&self) -> SpoolGauges {
        gauges(&self.shared)
    }

    fn look(&mut self) -> Result<Found, SpoolError> {
        let mut state = self.shared.lock();
        if state.generation != self.generation
            && let Some(origin) = state.origin.clone()
        {
            self.generation = state.generation;
            self.position = 0;
            return Ok(Found::Begun { origin, snapshot: state.snapshot });
        }
        if state.end() <= self.position {
            return Ok(Found::Nothing);
        }
        let oldest = state.entries.front().map(|entry| entry.position);
        let oldest = oldest.or(state.open.as_ref().map(|open| open.position)).unwrap_or_default();
        if self.position < oldest {
            return Err(SpoolError::Gone { position: self.position, oldest });
        }
        let last = state.entries.back().map_or(oldest, Entry::end);
        if self.position >= last
            && let Some(open) = state.open.take()
        {
            state.push_memory(open);
        }
        let index = state.entries.partition_point(|entry| entry.end() <= self.position);
        let Some(entry) = state.entries.get(index) else { return Ok(Found::Nothing) };
        let skip = (self.position - entry.position) as usize;
        let part = match state.stream_at {
            Some(stream_at) if entry.position >= stream_at => {
                let base = state.origin.as_ref().map_or(0, |origin| origin.offset);
                Part::Stream { offset: base + (self.position - stream_at) as i64 }
            }
            _ => Part::Snapshot,
        };
        Ok(match &entry.place {
            Place::Memory(bytes) => Found::Block(Block {
                position: self.position,
                part,
                bytes: bytes.slice(skip..),
                arrived: entry.arrived,
            }),
            Place::Disk { segment, at } => Found::OnDisk {
                segment: *segment,
                at: *at,
                position: entry.position,
                length: entry.length,
                skip,
                part,
                arrived: entry.arrived,
            },
        })
    }
}

enum Found {
    Nothing,
    Begun { origin: Origin, snapshot: bool },
    Block(Block),
    OnDisk { segment: u64, at: u64, position: u64, length: u32, skip: usize, part: Part, arrived: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(folder: &std::path::Path, memory: u64, disk: u64) -> SpoolLimits {
        SpoolLimits { memory, disk, retain: 0, folder: folder.join("spool") }
    }

    fn origin() -> Origin {
        Origin { replication_id: "a".repeat(40), offset: 100 }
    }

    fn pattern(length: usize, seed: u8) -> Vec<u8> {
        (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    async fn read(reader: &mut SpoolReader, length: usize) -> Vec<u8> {
        let mut found = Vec::new();
        while found.len() < length {
            match reader.next().await.unwrap() {
                Next::Block(block) => found.extend_from_slice(&block.bytes),
                Next::Begun { .. } => assert!(found.is_empty()),
            }
        }
        found
    }

    #[tokio::test]
    async fn bytes_past_the_memory_limit_go_to_disk_and_come_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 600_000, 1 << 30));
        writer.begin(origin(), true);
        let sent = pattern(3_000_000, 1);
        for part in sent.chunks(100_001) {
            writer.append(part, 5).await.unwrap();
        }
        let gauges = writer.gauges();
        assert!(gauges.memory_bytes <= 600_000 + BLOCK as u64 && gauges.disk_bytes > 2_000_000, "{gauges:?}");
        assert!(read(&mut reader, sent.len()).await == sent);
        reader.seek(1_234_567);
        assert!(read(&mut reader, sent.len() - 1_234_567).await == sent[1_234_567..]);
        reader.applied(sent.len() as u64);
        writer.append(b"more", 6).await.unwrap();
        assert_eq!(read(&mut reader, 4).await, b"more");
        assert_eq!(reader.gauges().disk_bytes, 0);
        drop((writer, reader));
        assert!(!folder.path().join("spool").exists());
    }

    #[tokio::test]
    async fn a_full_disk_holds_the_writer_until_bytes_are_applied() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 0, 2 * BLOCK as u64));
        writer.begin(origin(), true);
        let sent = pattern(4 * BLOCK, 3);
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            writer.append(&sent, 0).await.unwrap();
            writer
        });
        let mut found = Vec::new();
        while found.len() < expected.len() {
            if let Next::Block(block) = reader.next().await.unwrap() {
                assert!(reader.gauges().disk_bytes <= 2 * BLOCK as u64);
                found.extend_from_slice(&block.bytes);
                reader.applied(found.len() as u64);
            }
        }
        assert!(found == expected);
        assert!(!writing.await.unwrap().gauges().full);
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_but_lets_nothing_go_does_not_fill_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 100_000, 1 << 30));
        writer.begin(origin(), true);
        let sent = pattern(2_000_000, 5);
        let mut found = Vec::new();
        for part in sent.chunks(10_000) {
            writer.append(part, 5).await.unwrap();
            found.extend(read(&mut reader, part.len()).await);
            assert!(reader.gauges().memory_bytes <= 110_000, "{:?}", reader.gauges());
        }
        assert!(found == sent);
        reader.seek(0);
        assert!(read(&mut reader, sent.len()).await == sent);
    }

    #[tokio::test]
    async fn what_is_larger_than_the_spool_passes_when_the_reader_starves() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 0, BLOCK as u64));
        writer.begin(origin(), true);
        let sent = pattern(5 * BLOCK, 7);
        let expected = sent.clone();
        let writing = tokio::spawn(async move { writer.append(&sent, 0).await.map(|()| writer) });
        let mut found = Vec::new();
        while found.len() < expected.len() {
            while !reader.is_ready() {
                reader.starves();
                tokio::task::yield_now().await;
            }
            if let Next::Block(block) = reader.next().await.unwrap() {
                found.extend_from_slice(&block.bytes);
            }
        }
        assert!(found == expected);
        reader.applied(found.len() as u64);
        assert!(writing.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn bytes_outlive_a_cancelled_append() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 0, BLOCK as u64));
        writer.begin(origin(), true);
        let sent = pattern(3 * BLOCK, 11);
        // The second block finds no room, so that the append never ends.
        let append = writer.append(&sent, 0);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(300), append).await.is_err());
        let taken = writer.gauges().end as usize;
        assert_eq!(taken, 2 * BLOCK);
        assert!(read(&mut reader, taken).await == sent[..taken]);
        reader.applied(taken as u64);
        writer.append(&sent[taken..], 0).await.unwrap();
        assert!(read(&mut reader, sent.len() - taken).await == sent[taken..]);
    }

    #[tokio::test]
    async fn files_of_a_killed_run_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let limits = limits(folder.path(), 0, 0);
        std::fs::create_dir(&limits.folder).unwrap();
        std::fs::write(segment_path(&limits.folder, 7), "left").unwrap();
        std::fs::write(limits.folder.join("other"), "not ours").unwrap();
        let left = limits.folder.clone();
        let _spool = spool(limits);
        let names: Vec<_> = std::fs::read_dir(left).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(names, ["other"]);
    }

    #[tokio::test]
    async fn blocks_say_their_part_and_offset() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 0));
        writer.begin(origin(), true);
        writer.append(b"rdb", 1).await.unwrap();
        writer.start_stream();
        writer.append(b"stream", 2).await.unwrap();
        let Next::Begun { origin: begun, snapshot } = reader.next().await.unwrap() else {
            panic!("not begun")
        };
        assert_eq!((begun, snapshot), (origin(), true));
        let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
        assert_eq!((block.part, &block.bytes[..]), (Part::Snapshot, &b"rdb"[..]));
        assert_eq!(reader.arrived(4), Some(2));
        let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
        assert_eq!((block.part, &block.bytes[..]), (Part::Stream { offset: 100 }, &b"stream"[..]));
        assert!(!reader.is_ready());
        reader.seek(5);
        let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
        assert_eq!((block.part, &block.bytes[..]), (Part::Stream { offset: 102 }, &b"ream"[..]));
        writer.begin(origin(), false);
        assert!(matches!(reader.next().await.unwrap(), Next::Begun { .. }));
    }

    #[tokio::test]
    async fn a_history_is_known_by_its_own_id_only() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 0));
        writer.begin(origin(), false);
        let promoted = "b".repeat(40);
        writer.rename(&promoted);
        let Next::Begun { origin: begun, snapshot } = reader.next().await.unwrap() else {
            panic!("not begun")
        };
        assert_eq!((begun.replication_id.as_str(), begun.offset, snapshot), (promoted.as_str(), 100, false));
        assert_eq!((reader.replication_id(), reader.history()), (Some(promoted), writer.history()));
        // The reader is still at a place of the old history: the new id does not go with it.
        writer.begin(origin(), true);
        assert_eq!(reader.replication_id(), None);
        assert_ne!(reader.history(), writer.history());
    }

    #[tokio::test]
    async fn a_damaged_record_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 0, 1 << 30));
        writer.begin(origin(), true);
        writer.append(&pattern(BLOCK, 9), 0).await.unwrap();
        let file = std::fs::read_dir(folder.path().join("spool")).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert!(matches!(reader.next().await.unwrap(), Next::Begun { .. }));
        assert!(matches!(reader.next().await, Err(SpoolError::Corrupt { .. })));
    }
}
