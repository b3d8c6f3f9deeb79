//! The work in the spool's folder, on a thread of its own while there is any: the socket goes on being read
//! meanwhile, and what arrived by the end of one write goes into the next as a whole.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use super::journal::{self, Journal};
use super::segment::{SegmentWriter, segment_path};
use super::store::{Batch, Garbage, Job, Written};
use super::{Shared, SpoolError, folder};

/// The run's folder.
pub struct Folder {
    pub path: PathBuf,
    /// It is created once. Should it be missing later, another process has taken it over.
    made: bool,
    segment: Option<SegmentWriter>,
    /// An OS error that the next writes end with.
    #[cfg(test)]
    pub fault: Arc<std::sync::atomic::AtomicI32>,
}

impl Folder {
    pub fn new(path: PathBuf, made: bool) -> Self {
        Self {
            path,
            made,
            segment: None,
            #[cfg(test)]
            fault: Arc::default(),
        }
    }

    pub fn remove(&self) {
        if self.made {
            folder::remove(&self.path);
        }
        if let Some(shard) = self.path.parent() {
            // Stays while anything is in it.
            let _ = std::fs::remove_dir(shard);
        }
    }

    fn remove_segments(&self, garbage: &[Garbage]) {
        for Garbage { id, sealed, .. } in garbage {
            let path = segment_path(&self.path, *id, *sealed);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a spool file could not be removed");
                }
                _ => {}
            }
        }
    }

    fn journal(&mut self, journal: Option<&Journal>) -> Result<(), SpoolError> {
        let path = journal::path(&self.path);
        let Some(journal) = journal else {
            return Journal::remove(&self.path).map_err(|source| SpoolError::Write { path, source });
        };
        self.make()?;
        self.faulty().and_then(|()| journal.write(&self.path)).map_err(|error| self.error(path, error))
    }

    fn write(&mut self, batch: &Batch) -> (Written, Result<(), SpoolError>) {
        let mut segment = match self.segment.take().filter(|segment| segment.id == batch.segment) {
            Some(segment) if self.path.exists() => segment,
            Some(segment) => return (none(segment.size), Err(SpoolError::Taken { path: self.path.clone() })),
            None => match self.make().and_then(|()| self.create(batch.segment)) {
                Ok(segment) => segment,
                Err(error) => return (none(0), Err(error)),
            },
        };
        let (places, result) = match self.faulty() {
            Ok(()) => segment.append(&batch.records, batch.history),
            Err(fault) => (Vec::new(), Err(fault)),
        };
        let result = result.map_err(|error| self.error(segment.path.clone(), error));
        let written = Written { size: segment.size, places, torn: segment.torn };
        self.segment = Some(segment).filter(|segment| !segment.torn);
        (written, result)
    }

    fn create(&self, id: u64) -> Result<SegmentWriter, SpoolError> {
        SegmentWriter::create(&self.path, id).map_err(|(path, error)| self.error(path, error))
    }

    fn make(&mut self) -> Result<(), SpoolError> {
        if !self.made {
            std::fs::create_dir_all(&self.path)
                // Somebody removes the shard's folder, which was empty, between its creation and this one's.
                .or_else(|_| std::fs::create_dir_all(&self.path))
                .map_err(|source| SpoolError::Write { path: self.path.clone(), source })?;
            self.made = true;
        }
        Ok(())
    }

    fn error(&self, path: PathBuf, source: io::Error) -> SpoolError {
        match source.kind() {
            io::ErrorKind::NotFound => SpoolError::Taken { path: self.path.clone() },
            _ => SpoolError::Write { path, source },
        }
    }

    #[cfg(test)]
    fn faulty(&self) -> io::Result<()> {
        match self.fault.load(std::sync::atomic::Ordering::SeqCst) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }

    #[cfg(not(test))]
    fn faulty(&self) -> io::Result<()> {
        Ok(())
    }
}

fn none(size: u64) -> Written {
    Written { size, places: Vec::new(), torn: false }
}

impl Shared {
    /// Does the job, and all that come up until there is none.
    pub fn work(self: &Arc<Self>, job: Option<Job>) {
        let Some(job) = job else { return };
        let shared = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let mut next = Some(job);
            while let Some(job) = next {
                next = shared.work_off(job);
                shared.room.notify_one();
                shared.idle.notify_one();
            }
        });
    }

    /// Makes room for the other spools on the volume.
    pub fn spare(self: &Arc<Self>) {
        let job = {
            let mut state = self.lock();
            state.drop_kept();
            state.start_job(&self.limits)
        };
        self.work(job);
    }

    /// Gives the next job.
    fn work_off(&self, job: Job) -> Option<Job> {
        let mut folder = self.folder.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = match job {
            Job::Remove(garbage) => {
                folder.remove_segments(&garbage);
                let mut state = self.lock();
                state.removed(&garbage);
                state
            }
            Job::Journal { history, journal } => {
                let result = folder.journal(journal.as_ref());
                let mut state = self.lock();
                match result {
                    Ok(()) => state.store.journal = journal,
                    Err(error) if state.history == history => state.refused(error),
                    // That history is over.
                    Err(_) => {}
                }
                state
            }
            Job::Write(batch) => {
                let (written, result) = folder.write(&batch);
                let mut state = self.lock();
                state.wrote(&batch, &written, &self.limits);
                match result {
                    Ok(()) => state.trouble = None,
                    Err(error) => state.refused(error),
                }
                state
            }
        };
        self.limits.volume.holds(&self.limits.folder, state.store.bytes());
        if !state.is_over(&self.limits) {
            state.full = None;
        }
        let next = state.next_job(&self.limits);
        state.store.busy = next.is_some();
        next
    }
}
