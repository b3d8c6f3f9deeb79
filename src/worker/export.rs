//! A shard on its way into a file: the snapshot of its source and nothing behind it.
//!
//! The link always reads, as for a server: a store that is slow makes the spool grow, not the buffer that the
//! source keeps for its replicas.

mod steady;

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;

use super::link::{Feed, Link};
use super::progress::{Numbers, Quarantined, ShardPhase, ShardProgress};
use super::repair::Refusal;
use super::turn::Turns;
use super::{SpoolSetup, WorkerError};
use crate::object::{Destination, FileUri, ObjectError};
use crate::slot::SlotRanges;
use crate::source::replication::{Acknowledged, LinkPhase};
use crate::spool::{self, Next, Part, SpoolError, SpoolReader};
use crate::target::file::{FileFormat, FileWriter, Left, WriteError};
use crate::transform::Transform;
use steady::Steady;

#[derive(Clone)]
pub struct ExportSetup {
    /// The shard's id in the status.
    pub shard: String,
    pub feed: Feed,
    /// Of all shards of a source cluster, in their order.
    pub slots: Vec<SlotRanges>,
    pub destination: Destination,
    pub format: FileFormat,
    /// What is left out by database and key, and a script that decides on keys; `None`: nothing.
    pub transform: Option<Arc<Transform>>,
    pub spool: SpoolSetup,
    /// Of the spool's folder.
    pub file_name: String,
    pub max_quarantined: u64,
    /// Shared by all shards: when a full sync may begin.
    pub turns: Turns,
}

#[derive(Debug, Error)]
pub enum ExportError {
    #[error(transparent)]
    Source(#[from] WorkerError),
    #[error("{shard}: {source}{}", nothing_written(source, uri))]
    Write { shard: String, uri: Box<FileUri>, source: Box<WriteError> },
    #[error("{shard}: the RDB ends at byte {position} in the middle of a key: it is truncated")]
    Truncated { shard: String, position: u64 },
    #[error(
        "{shard}: more follows the end of the RDB at byte {position}; it is damaged, or holds more than an RDB"
    )]
    Behind { shard: String, position: u64 },
    #[error(
        "{shard}: {count} keys cannot be written, more than failurePolicy.maxQuarantined allows; the last: {last}"
    )]
    TooManyLeft { shard: String, count: u64, last: String },
    #[error(
        "{shard}: slots {slots} of the source move between its shards, so that their keys might be in two files or in none; nothing was written under {uri}; run it again when they have moved"
    )]
    SlotsMoved { shard: String, slots: SlotRanges, uri: Box<FileUri> },
}

fn nothing_written(source: &WriteError, uri: &FileUri) -> String {
    match source {
        WriteError::Object(ObjectError::Unread { .. }) => String::new(),
        _ => format!("; nothing was written under {uri}"),
    }
}

/// True: the file is whole; false: asked to stop before it was, and nothing is left of it.
pub async fn export(
    setup: ExportSetup,
    progress: Arc<ShardProgress>,
    mut stop: watch::Receiver<bool>,
) -> Result<bool, ExportError> {
    let steady = Steady::of(setup.feed.upstream().and_then(|upstream| upstream.shard.as_ref()), &setup.slots);
    let tell = |why: &str| {
        progress.link.send_if_modified(|link| {
            let news = link.last_error != why;
            if news {
                why.clone_into(&mut link.last_error);
            }
            news
        });
    };
    let (shard, uri) = (setup.shard.clone(), Box::new(setup.destination.uri.clone()));
    let moved = |slots| ExportError::SlotsMoved { shard: shard.clone(), slots, uri: uri.clone() };
    let begun = async {
        let slots = look(steady.as_ref(), &tell).await;
        if !slots.is_empty() {
            return Err(moved(slots));
        }
        let Some(upstream) = setup.feed.upstream() else { return Ok(None) };
        let tell = |why: &str| progress.numbers.send_modify(|numbers| numbers.waiting = why.to_owned());
        Ok(Some(setup.turns.begin(&upstream.dialer, &upstream.address, tell).await))
    };
    let _turn = tokio::select! {
        turn = begun => turn?,
        slots = moves(steady.as_ref()) => return Err(moved(slots)),
        Ok(_) = stop.wait_for(|stop| *stop) => return Ok(false),
    };
    let (writer, reader) = spool::spool(setup.spool.limits(&setup.file_name));
    let (_acknowledge, acknowledged) = watch::channel(Acknowledged::default());
    let link = Link::first(setup.feed.clone(), acknowledged, &progress);
    let mut export = Export {
        setup,
        reader,
        progress: Arc::clone(&progress),
        file: None,
        numbers: Numbers::default(),
        last: String::new(),
    };
    let written = tokio::select! {
        error = link.run(writer) => Err(error.into()),
        // The link goes with the last byte: what the source would send now is of no use.
        read = export.read() => read,
        slots = moves(steady.as_ref()) => Err(moved(slots)),
        Ok(_) = stop.wait_for(|stop| *stop) => Ok(false),
    };
    // What was read is of one state of the cluster only if that still holds.
    let written = match written {
        Ok(true) => tokio::select! {
            slots = look(steady.as_ref(), &tell) => if slots.is_empty() { Ok(true) } else { Err(moved(slots)) },
            Ok(_) = stop.wait_for(|stop| *stop) => Ok(false),
        },
        written => written,
    };
    let result = match written {
        Ok(true) => export.finish(&stop).await,
        written => written,
    };
    if let Some(file) = export.file.take() {
        file.abort().await;
    }
    export.numbers.stopped = true;
    export.publish();
    result
}

async fn look(steady: Option<&Steady>, failed: impl Fn(&str)) -> SlotRanges {
    match steady {
        Some(steady) => steady.look(failed).await,
        None => SlotRanges::default(),
    }
}

async fn moves(steady: Option<&Steady>) -> SlotRanges {
    match steady {
        Some(steady) => steady.moves().await,
        None => std::future::pending().await,
    }
}

struct Export {
    setup: ExportSetup,
    reader: SpoolReader,
    progress: Arc<ShardProgress>,
    file: Option<FileWriter>,
    numbers: Numbers,
    /// The last key that was left out.
    last: String,
}

impl Export {
    /// True with the end of the RDB.
    async fn read(&mut self) -> Result<bool, ExportError> {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
        loop {
            let next = tokio::select! {
                biased;
                next = self.reader.next() => next.map_err(WorkerError::from)?,
                _ = tick.tick() => {
                    self.check_truncated()?;
                    continue;
                }
            };
            match next {
                Next::Begun { .. } => {
                    // The source sends everything again.
                    if let Some(file) = self.file.take() {
                        file.abort().await;
                    }
                    let ExportSetup { destination, format, transform, .. } = &self.setup;
                    let file = FileWriter::begin(destination, *format, transform.clone()).await;
                    self.file = Some(file.map_err(|source| self.failed(source))?);
                    self.numbers = Numbers { phase: ShardPhase::FullSync, ..Numbers::default() };
                }
                Next::Block(block) if block.part == Part::Snapshot => {
                    // It stays where it is: whoever ends this in the middle has it removed.
                    let Some(file) = &mut self.file else { continue };
                    let (position, mut left) = (block.position + block.bytes.len() as u64, Vec::new());
                    let written = file.write(block.bytes, |key| left.push(key)).await;
                    self.numbers.keys = file.keys;
                    self.numbers.keys_total = file.keys_total;
                    self.numbers.keys_filtered = file.keys_filtered() + self.progress.scan.now().left_out;
                    self.numbers.snapshot_read = file.position();
                    written.map_err(|source| self.failed(source))?;
                    self.reader.applied(position);
                    self.leave_out(left)?;
                    self.publish();
                    if self.is_whole().await? {
                        return Ok(true);
                    }
                }
                // Behind an RDB that was not whole.
                Next::Block(_) => self.check_truncated()?,
            }
        }
    }

    async fn is_whole(&mut self) -> Result<bool, ExportError> {
        let Some(file) = self.file.as_ref().filter(|file| file.is_over()) else { return Ok(false) };
        let (shard, position) = (self.setup.shard.clone(), file.position());
        if file.undecoded() > 0 {
            return Err(ExportError::Behind { shard, position });
        }
        match self.reader.ends_at(position).await {
            Some(true) => Ok(true),
            Some(false) => Err(ExportError::Behind { shard, position }),
            // The link was lost before it could say that these were all.
            None => Ok(false),
        }
    }

    fn check_truncated(&self) -> Result<(), ExportError> {
        let Some(file) = self.file.as_ref().filter(|file| !file.is_over()) else { return Ok(()) };
        let position = file.position() + file.undecoded() as u64;
        if self.reader.stream_at() == Some(position) {
            return Err(ExportError::Truncated { shard: self.setup.shard.clone(), position });
        }
        Ok(())
    }

    fn leave_out(&mut self, left: Vec<Left>) -> Result<(), ExportError> {
        for Left { db, key, why, command, kind } in left {
            self.numbers.quarantined += 1;
            self.last = format!("\"{}\": {why}", key.escape_ascii());
            let refusal = Refusal { command: command.to_owned(), key, error: why, kind };
            *self.numbers.kinds.entry(kind).or_default() += 1;
            self.progress.quarantine(Quarantined { offset: 0, db, refusal });
        }
        let count = self.numbers.quarantined;
        if count <= self.setup.max_quarantined {
            return Ok(());
        }
        let (shard, last) = (self.setup.shard.clone(), self.last.clone());
        Err(ExportError::TooManyLeft { shard, count, last })
    }

    async fn finish(&mut self, stop: &watch::Receiver<bool>) -> Result<bool, ExportError> {
        let Some(file) = self.file.take() else {
            return Err(WorkerError::from(SpoolError::Gone { position: 0, oldest: 0 }).into());
        };
        let goes_on = |read_back| {
            self.numbers.read_back = read_back;
            self.progress.numbers.send_modify(|numbers| numbers.read_back = read_back);
            !*stop.borrow()
        };
        let whole = file.finish(goes_on).await;
        if !whole.map_err(|source| self.failed(source))? {
            return Ok(false);
        }
        self.numbers.phase = ShardPhase::IncrementalSync;
        self.progress.link.send_modify(|link| link.phase = LinkPhase::Streaming);
        Ok(true)
    }

    fn failed(&self, source: WriteError) -> ExportError {
        let (shard, uri) = (self.setup.shard.clone(), Box::new(self.setup.destination.uri.clone()));
        ExportError::Write { shard, uri, source: Box::new(source) }
    }

    fn publish(&mut self) {
        let gauges = self.reader.gauges();
        self.numbers.spool_memory = gauges.memory_bytes;
        self.numbers.spool_disk = gauges.disk_bytes;
        self.numbers.spool_full = gauges.full;
        self.numbers.why_full = gauges.why_full;
        self.progress.numbers.send_replace(self.numbers.clone());
    }
}
