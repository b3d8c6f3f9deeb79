//! The receiving end of a spool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Full, Origin, Shared, SpoolError, SpoolGauges, folder};

/// How often a shared volume is looked at that has no room.
const LOOK: Duration = Duration::from_millis(500);

/// The receiving end; one per spool.
pub struct SpoolWriter {
    pub(super) shared: Arc<Shared>,
}

impl SpoolWriter {
    /// Forgets everything and starts a new history; with `snapshot` an RDB comes first. The reader is told.
    pub fn begin(&mut self, origin: Origin, snapshot: bool) {
        let job = {
            let mut state = self.shared.lock();
            // Another run's history must not have the same number: a checkpoint may name it.
            let history = (state.history + 1).max(folder::micros());
            state.begin(history, origin, snapshot);
            state.start_job(&self.shared.limits)
        };
        self.shared.work(job);
        self.shared.data.notify_one();
    }

    /// As [`Self::begin`], of a history that has the same number in every run.
    pub fn begin_as(&mut self, history: u64, origin: Origin, snapshot: bool) {
        self.shared.lock().begin(history, origin, snapshot);
        self.shared.data.notify_one();
    }

    /// The history goes on under another id (`+CONTINUE <new id>`).
    pub fn rename(&mut self, replication_id: &str) {
        let job = {
            let mut state = self.shared.lock();
            if let Some(origin) = &mut state.origin {
                origin.replication_id = replication_id.to_owned();
            }
            state.start_job(&self.shared.limits)
        };
        self.shared.work(job);
    }

    /// The next byte appended is the first of the command stream.
    pub fn start_stream(&mut self) {
        let job = {
            let mut state = self.shared.lock();
            state.stream_at = Some(state.end());
            // A block holds bytes of one part.
            state.close_open();
            state.start_job(&self.shared.limits)
        };
        self.shared.work(job);
        self.shared.data.notify_one();
    }

    /// Appends bytes that arrived at `now` (Unix ms). Waits while there is no room in memory, be it that the
    /// disk is slow, full or broken. When it is cancelled, what was taken by then is in the spool
    /// (`gauges().end` says how far), and the rest is not.
    pub async fn append(&mut self, mut bytes: &[u8], now: u64) -> Result<(), SpoolError> {
        while !bytes.is_empty() {
            let taken = {
                let mut state = self.shared.lock();
                if state.is_over(&self.shared.limits) {
                    state.relieve(&self.shared.limits);
                }
                let waits = state.is_over(&self.shared.limits) || state.failed.is_some();
                (!waits).then(|| {
                    let taken = state.take(bytes, now, &self.shared.limits);
                    (taken, state.start_job(&self.shared.limits))
                })
            };
            let Some((taken, job)) = taken else {
                self.room().await?;
                continue;
            };
            bytes = bytes.get(taken..).unwrap_or_default();
            self.shared.data.notify_one();
            self.shared.work(job);
        }
        Ok(())
    }

    /// Waits until there is room in memory again.
    async fn room(&mut self) -> Result<(), SpoolError> {
        let limits = &self.shared.limits;
        loop {
            let (job, retry_at, full) = {
                let mut state = self.shared.lock();
                if let Some(error) = state.failed.take() {
                    return Err(error);
                }
                state.relieve(limits);
                if !state.is_over(limits) {
                    state.full = None;
                    return Ok(());
                }
                state.through = true;
                let job = state.start_job(limits);
                if !state.store.busy {
                    state.full = state.blocked(limits);
                }
                let mut retry_at = state.trouble.as_ref().map(|trouble| trouble.retry_at);
                if state.full == Some(Full::Volume) {
                    // Nobody tells us when another spool gets smaller.
                    limits.volume.look();
                    retry_at.get_or_insert(Instant::now() + LOOK);
                }
                (job, retry_at, state.full)
            };
            self.shared.work(job);
            if full == Some(Full::Volume) {
                limits.volume.ask_others(&limits.folder);
            }
            let retry = async {
                match retry_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.shared.room.notified() => {}
                () = retry => {}
            }
        }
    }

    pub fn gauges(&self) -> SpoolGauges {
        self.shared.lock().gauges()
    }

    /// Tells histories apart, of this run and of others; what the reader has of another is not of this one.
    pub fn history(&self) -> u64 {
        self.shared.lock().history
    }
}
