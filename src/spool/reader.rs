//! The applier's end of a spool.

use std::sync::Arc;

use super::segment::{RecordPlace, SegmentReader, segment_path};
use super::state::Entry;
use super::{Block, Full, Next, Origin, Part, Shared, SpoolError, SpoolGauges, SpoolView};

/// The applier's end; one per spool.
pub struct SpoolReader {
    pub(super) shared: Arc<Shared>,
    pub(super) history: u64,
    pub(super) position: u64,
    pub(super) segments: SegmentReader,
}

enum Found {
    Nothing,
    Begun { origin: Origin, snapshot: bool },
    Block(Block),
    OnDisk { place: RecordPlace, skip: usize, part: Part, arrived: u64 },
}

impl SpoolReader {
    /// True when `next` will not have to wait for the network.
    pub fn is_ready(&self) -> bool {
        let state = self.shared.lock();
        state.history != self.history || state.end() > self.position
    }

    /// The bytes behind those read last, as many as are at hand (at most one block).
    /// Cancel-safe: a block counts as read only once it is returned.
    pub async fn next(&mut self) -> Result<Next, SpoolError> {
        loop {
            match self.look()? {
                Found::Begun { origin, snapshot } => return Ok(Next::Begun { origin, snapshot }),
                Found::Block(block) => return Ok(self.hand_over(block)),
                Found::OnDisk { place, skip, part, arrived } => {
                    let position = place.position + skip as u64;
                    let read = self.segments.read(place).await;
                    if self.shared.lock().history != self.history {
                        // The file went with the history that it was of.
                        continue;
                    }
                    let bytes = read?.slice(skip..);
                    return Ok(self.hand_over(Block { position, part, bytes, arrived }));
                }
                Found::Nothing => self.shared.data.notified().await,
            }
        }
    }

    fn hand_over(&mut self, block: Block) -> Next {
        self.position = block.position + block.bytes.len() as u64;
        let mut state = self.shared.lock();
        if state.history == self.history {
            state.is_read(self.position);
        }
        drop(state);
        Next::Block(block)
    }

    /// Says that nothing more can be applied before more bytes are read: the writer, should it wait for
    /// room, may pass its limits by a block. (One value, command or transaction may be larger than they
    /// are, and waiting would never end.)
    pub fn starves(&self) {
        let mut state = self.shared.lock();
        if state.end() > self.position {
            return;
        }
        match state.full {
            None => return,
            Some(Full::Limit | Full::Volume) if self.shared.limits.disk > 0 => state.pass_disk = true,
            Some(_) => state.pass_memory = true,
        }
        drop(state);
        self.shared.room.notify_one();
    }

    /// Reading goes on at `position` (of the same history), which must not lie before [`Self::oldest`]. What
    /// is read again counts as not applied.
    pub fn seek(&mut self, position: u64) {
        self.position = position;
        let mut state = self.shared.lock();
        if state.history == self.history {
            state.seek(position);
        }
    }

    /// The oldest position that can be read: `limits.retain` bytes before what is applied, as far as there
    /// were as many and room for them.
    pub fn oldest(&self) -> u64 {
        let state = self.shared.lock();
        if state.history == self.history { state.oldest() } else { self.position }
    }

    /// Everything before `position` stands on the target.
    pub fn applied(&mut self, position: u64) {
        let job = {
            let mut state = self.shared.lock();
            if state.history != self.history || position <= state.applied {
                return;
            }
            state.apply(position, &self.shared.limits);
            state.start_job(&self.shared.limits)
        };
        self.shared.work(job);
        self.shared.room.notify_one();
    }

    /// Writes to disk what is not there, and waits for it: for a run that ends before all is applied, to be
    /// followed by [`Self::keep`]. An error when the disk does not take it.
    pub async fn store(&mut self) -> Result<(), SpoolError> {
        loop {
            let job = {
                let mut state = self.shared.lock();
                if let Some(error) = state.failed.take() {
                    return Err(error);
                }
                state.close_open();
                if state.unwritten() == state.entries.len() && !state.store.busy {
                    return Ok(());
                }
                state.through = true;
                let job = state.start_job(&self.shared.limits);
                if !state.store.busy {
                    let why = state.blocked(&self.shared.limits).unwrap_or(Full::Limit);
                    return Err(SpoolError::Full { folder: self.shared.limits.folder.clone(), why });
                }
                job
            };
            self.shared.work(job);
            self.shared.idle.notified().await;
        }
    }

    /// With `keep`, the files stay when both ends are dropped, for [`super::recover`] in another run; else
    /// they are removed, which is what is done unless something else is said.
    pub fn keep(&self, keep: bool) {
        self.shared.lock().keep = keep;
    }

    /// The history that is being read, as [`super::SpoolWriter::history`] numbers them.
    pub fn history(&self) -> u64 {
        self.history
    }

    /// The id under which the source knows the history that is being read; `None` when the writer has
    /// begun another, whose id says nothing about the places of this one.
    pub fn replication_id(&self) -> Option<String> {
        let state = self.shared.lock();
        let origin = state.origin.as_ref().filter(|_| state.history == self.history);
        origin.map(|origin| origin.replication_id.clone())
    }

    /// Where the stream starts in the history that is being read; `None` while the end of its RDB is not there.
    pub fn stream_at(&self) -> Option<u64> {
        let state = self.shared.lock();
        state.stream_at.filter(|_| state.history == self.history)
    }

    /// Waits until it is known whether the RDB ends at `position`. `None`: another history has begun.
    pub async fn ends_at(&self, position: u64) -> Option<bool> {
        loop {
            {
                let state = self.shared.lock();
                if state.history != self.history {
                    return None;
                }
                if let Some(stream_at) = state.stream_at {
                    return Some(stream_at == position);
                }
                if state.end() > position {
                    return Some(false);
                }
            }
            self.shared.data.notified().await;
        }
    }

    /// Unix ms at which the byte at `position` arrived; `None` when it has not.
    pub fn arrived(&self, position: u64) -> Option<u64> {
        self.shared.lock().arrived(position)
    }

    pub fn gauges(&self) -> SpoolGauges {
        self.shared.lock().gauges()
    }

    /// For those who ask while this end is kept waiting.
    pub fn view(&self) -> SpoolView {
        SpoolView { shared: Arc::downgrade(&self.shared) }
    }

    fn look(&mut self) -> Result<Found, SpoolError> {
        let mut state = self.shared.lock();
        if state.history != self.history
            && let Some(origin) = state.origin.clone()
        {
            self.history = state.history;
            self.position = 0;
            return Ok(Found::Begun { origin, snapshot: state.snapshot });
        }
        if state.end() <= self.position {
            return Ok(Found::Nothing);
        }
        let oldest = state.oldest();
        if self.position < oldest {
            return Err(SpoolError::Gone { position: self.position, oldest });
        }
        if self.position >= state.entries.back().map_or(oldest, Entry::end) {
            state.close_open();
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
        let (position, arrived) = (entry.position, entry.arrived);
        Ok(match (&entry.memory, entry.disk) {
            (Some(bytes), _) => {
                Found::Block(Block { position: self.position, part, bytes: bytes.slice(skip..), arrived })
            }
            (None, Some(place)) => {
                let folder = self.shared.run_folder();
                let path = segment_path(folder, place.segment, state.store.sealed(place.segment));
                let (length, history) = (entry.length, self.history);
                let place = RecordPlace { path, at: place.at, position, length, history };
                Found::OnDisk { place, skip, part, arrived }
            }
            // Not reached: a block is let go as a whole.
            (None, None) => return Err(SpoolError::Gone { position, oldest: position }),
        })
    }
}
