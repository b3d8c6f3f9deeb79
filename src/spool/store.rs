//! What stands in the run's folder, and what is to be done there next. No IO here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::journal::Journal;
use super::segment::{HEADER, Record};
use super::state::{DiskPlace, State, Trouble};
use super::{BLOCK, Full, SpoolError, SpoolLimits};

/// A segment is closed once it holds this many bytes.
const SEGMENT_BYTES: u64 = 64 << 20;
/// Bytes of one write.
const BATCH_BYTES: u64 = 4 << 20;
/// How long after a disk error the next try is.
const RETRY: Duration = Duration::from_millis(500);

#[derive(Default)]
pub struct Store {
    segments: BTreeMap<u64, Segment>,
    /// Of all segment files, those in `garbage` included.
    bytes: u64,
    /// To be removed.
    garbage: Vec<Garbage>,
    last_id: u64,
    /// The segment to append to.
    current: Option<u64>,
    /// The one that a batch is on its way to.
    writing: Option<u64>,
    /// As it stands in the folder.
    pub journal: Option<Journal>,
    /// Somebody is at work in the folder, and asks for the next job after each.
    pub busy: bool,
}

#[derive(Clone, Debug)]
pub struct Segment {
    pub sealed: Option<u64>,
    pub bytes: u64,
    /// Blocks in it that are still held.
    pub live: usize,
}

#[derive(Clone, Debug)]
pub struct Garbage {
    pub id: u64,
    pub sealed: Option<u64>,
    pub bytes: u64,
}

/// One thing to do in the folder.
pub enum Job {
    Remove(Vec<Garbage>),
    /// `None`: there is nothing that it could be of.
    Journal {
        history: u64,
        journal: Option<Journal>,
    },
    Write(Batch),
}

pub struct Batch {
    pub history: u64,
    pub segment: u64,
    pub records: Vec<Record>,
}

/// What became of a batch.
pub struct Written {
    /// Size of the segment file now.
    pub size: u64,
    /// Places of the records that stand on disk: the first few, or all.
    pub places: Vec<u64>,
    /// Nothing can be appended to the segment any more.
    pub torn: bool,
}

impl Store {
    /// Of what an earlier run left.
    pub fn adopted(segments: BTreeMap<u64, Segment>, journal: Journal) -> Self {
        let bytes = segments.values().map(|segment| segment.bytes).sum();
        let last_id = segments.keys().next_back().copied().unwrap_or_default();
        Self { segments, bytes, last_id, journal: Some(journal), ..Self::default() }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn sealed(&self, id: u64) -> Option<u64> {
        self.segments.get(&id).and_then(|segment| segment.sealed)
    }

    pub fn has_garbage(&self) -> bool {
        !self.garbage.is_empty()
    }

    /// What may be added where a block of `length` bytes is to be.
    pub fn room(&self, length: u32, limits: &SpoolLimits) -> Result<u64, Full> {
        limits.room(self.bytes, HEADER as u64 + u64::from(length))
    }

    /// A block of the segment is not held any more.
    pub fn let_go(&mut self, id: u64) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        segment.live = segment.live.saturating_sub(1);
        if segment.live == 0 && self.writing != Some(id) {
            self.discard(id);
        }
    }

    fn discard(&mut self, id: u64) {
        let Some(Segment { sealed, bytes, .. }) = self.segments.remove(&id) else { return };
        self.garbage.push(Garbage { id, sealed, bytes });
        self.current = self.current.filter(|current| *current != id);
    }

    pub fn forget_all(&mut self) {
        let ids: Vec<u64> = self.segments.keys().copied().collect();
        ids.into_iter().for_each(|id| self.discard(id));
        // The next history's segments are others, also while this one's is being written.
        self.current = None;
    }
}

impl State {
    /// The next thing to do in the folder, unless somebody is at it. Whoever gets one does it, and all that
    /// [`State::next_job`] gives after it.
    pub fn start_job(&mut self, limits: &SpoolLimits) -> Option<Job> {
        if self.store.busy {
            return None;
        }
        let job = self.next_job(limits);
        self.store.busy = job.is_some();
        job
    }

    pub fn next_job(&mut self, limits: &SpoolLimits) -> Option<Job> {
        if self.store.has_garbage() {
            return Some(Job::Remove(std::mem::take(&mut self.store.garbage)));
        }
        let waits = self.trouble.as_ref().is_some_and(|trouble| trouble.retry_at > Instant::now());
        if waits || self.failed.is_some() {
            return None;
        }
        let first = if self.through { self.unwritten() } else { self.entries.len() };
        let Some(entry) = self.entries.get(first) else {
            return self.journal_job(!self.store.segments.is_empty());
        };
        let fits = self.store.room(entry.length, limits);
        if fits.is_err() {
            self.drop_kept();
            if self.store.has_garbage() {
                return Some(Job::Remove(std::mem::take(&mut self.store.garbage)));
            }
        }
        if fits.is_err() && !self.pass_disk {
            return self.journal_job(!self.store.segments.is_empty());
        }
        // It comes first: records count only beside the journal that they fit.
        self.journal_job(true).or_else(|| {
            let must = std::mem::take(&mut self.pass_disk);
            self.batch(limits, fits.unwrap_or_default(), must)
        })
    }

    /// Makes room on disk with what is kept there for a replay only: a segment of it.
    pub fn drop_kept(&mut self) {
        let on_disk = |state: &Self| state.entries.front().is_some_and(|entry| entry.disk.is_some());
        while !self.store.has_garbage() && on_disk(self) && self.drop_front() {}
    }

    /// Brings the journal up to date, when it is not.
    fn journal_job(&self, wanted: bool) -> Option<Job> {
        let origin = self.origin.as_ref()?;
        let stands = self.store.journal.as_ref();
        if !wanted {
            return stands.map(|_| Job::Journal { history: self.history, journal: None });
        }
        if stands.is_some_and(|journal| journal.says(self.history, origin, self.stream_at)) {
            return None;
        }
        let journal = Journal::new(self.history, origin, self.snapshot, self.stream_at);
        Some(Job::Journal { history: self.history, journal: Some(journal) })
    }

    /// The oldest blocks that are not on disk, of at most `room` bytes, but one at least. None of them when another
    /// spool has taken the volume's room meanwhile, unless they `must` go.
    fn batch(&mut self, limits: &SpoolLimits, room: u64, must: bool) -> Option<Job> {
        let segment_bytes = (limits.disk / 16).clamp(BLOCK as u64, SEGMENT_BYTES);
        let store = &self.store;
        let current = store
            .current
            .filter(|id| store.segments.get(id).is_some_and(|segment| segment.bytes < segment_bytes));
        let filled = current.and_then(|id| store.segments.get(&id)).map_or(0, |segment| segment.bytes);
        let wanted = BATCH_BYTES.min(room).min(segment_bytes - filled);
        let (mut records, mut size) = (Vec::new(), 0);
        for entry in self.entries.iter().skip(self.unwritten()) {
            let Some(bytes) = entry.memory.clone() else { break };
            let stream = self.stream_at.is_some_and(|stream_at| entry.position >= stream_at);
            let record = Record { position: entry.position, arrived: entry.arrived, stream, bytes };
            // The first goes in any case: whether it may was decided before.
            if !records.is_empty() && size + record.size() > wanted {
                break;
            }
            size += record.size();
            records.push(record);
        }
        if records.is_empty() || !limits.volume.take(&limits.folder, size, must) {
            return None;
        }
        let segment = current.unwrap_or(self.store.last_id + 1);
        self.store.last_id = segment.max(self.store.last_id);
        self.store.writing = Some(segment);
        Some(Job::Write(Batch { history: self.history, segment, records }))
    }

    pub fn wrote(&mut self, batch: &Batch, written: &Written, limits: &SpoolLimits) {
        let id = batch.segment;
        self.store.writing = None;
        if batch.history != self.history {
            // Of a history that is over; its other bytes are accounted for already.
            self.store.garbage.push(Garbage { id, sealed: None, bytes: 0 });
            return;
        }
        let known = self.store.segments.entry(id).or_insert(Segment { sealed: None, bytes: 0, live: 0 });
        self.store.bytes += written.size - known.bytes;
        known.bytes = written.size;
        self.store.current = (!written.torn).then_some(id);
        let mut live = 0;
        for (record, &at) in batch.records.iter().zip(&written.places) {
            let index = self.entries.partition_point(|entry| entry.position < record.position);
            // It may have been applied and let go meanwhile.
            if let Some(entry) = self.entries.get_mut(index).filter(|entry| entry.position == record.position)
            {
                entry.disk = Some(DiskPlace { segment: id, at });
                live += 1;
            }
        }
        let known = self.store.segments.get_mut(&id);
        let held = known.map_or(0, |segment| {
            segment.live += live;
            segment.live
        });
        if held == 0 {
            self.store.discard(id);
        }
        let ends = batch.records.iter().take(written.places.len());
        let to = ends.map(|record| record.position + record.bytes.len() as u64).max();
        if let (Some(first), Some(to)) = (batch.records.first(), to) {
            self.written(first.position, to, limits);
        }
    }

    pub fn removed(&mut self, garbage: &[Garbage]) {
        let freed: u64 = garbage.iter().map(|garbage| garbage.bytes).sum();
        self.store.bytes -= freed;
        if let Some(trouble) = self.trouble.as_mut().filter(|_| freed > 0) {
            trouble.retry_at = Instant::now();
        }
    }

    /// The disk did not take something.
    pub fn refused(&mut self, error: SpoolError) {
        match error.os_error_to_wait_for() {
            Some(os_error) => {
                if self.trouble.is_none() {
                    tracing::warn!(%error, "the disk takes no more of the spool for now; trying again");
                }
                self.trouble = Some(Trouble { os_error, retry_at: Instant::now() + RETRY });
            }
            None => self.failed = Some(error),
        }
    }
}
