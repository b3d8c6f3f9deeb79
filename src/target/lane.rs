//! A lane: the ordered pipeline to one target node.
//!
//! Batches go out in order and are answered in order; an answered batch comes back to the applier with
//! what the node refused, and its buffer is used again. When the connection fails, the batches that were
//! not answered are lost with it: the applier replays them from the spool.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::Instrument;

use crate::connection::{Address, Connection, Stream};
use crate::resp::counter::{CounterError, Replies, ReplyCounter};
use crate::target::chain::MOST_BATCHES;
use crate::target::pace::Pace;

const READ_BUFFER: usize = 64 << 10;
/// Unanswered for this long: the node or the way to it is gone. Long scripts and saves take less.
const SILENCE: Duration = Duration::from_secs(60);
/// Batches waiting in the channel of a lane.
const QUEUED_BATCHES: usize = 1;
/// A lane has so many batches of full size under way, gathering, waiting and sent: together what `LaneLimits` allows.
/// All of it may be sent again after a kill.
pub const BATCHES_IN_WINDOW: usize = 8;

/// Commands of a batch of full size in a window of `commands`.
pub fn batch_of(commands: usize) -> usize {
    (commands / BATCHES_IN_WINDOW).max(1)
}

/// What is sent leaves room for one that is gathered and for those that wait.
const NOT_SENT: usize = 1 + QUEUED_BATCHES;

/// Why a lane ended.
#[derive(Debug, Error)]
pub enum LaneError {
    #[error("{address}: the target closed the connection")]
    Closed { address: Address },
    #[error("{address}: connection to the target: {source}")]
    Io { address: Address, source: std::io::Error },
    #[error("{address}: the target has not answered for {SILENCE:?}")]
    Silent { address: Address },
    #[error("{address}: the target's reply is not RESP: {source}")]
    Protocol { address: Address, source: CounterError },
    #[error("{address}: more replies than commands")]
    Surplus { address: Address },
}

/// What may be under way on one connection. Clones share the numbers, which may change while lanes run.
#[derive(Clone, Debug)]
pub struct LaneLimits {
    commands: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
    pace: Arc<Pace>,
}

impl LaneLimits {
    pub fn new(commands: usize, bytes: usize) -> Self {
        Self { commands: Arc::new(commands.into()), bytes: Arc::new(bytes.into()), pace: Arc::default() }
    }

    pub fn set(&self, commands: usize, bytes: usize) {
        self.commands.store(commands, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// How fast all lanes with these limits may send.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Commands under way on one lane.
    pub fn commands(&self) -> usize {
        self.commands.load(Ordering::Relaxed)
    }

    /// Unanswered bytes on the connection; one batch may pass it.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Commands that are sent and acknowledged together.
#[derive(Debug, Default)]
pub struct Batch {
    pub bytes: Vec<u8>,
    /// Top-level replies that are due.
    pub commands: u32,
    /// Rises by one with each batch of a lane, from 1.
    pub sequence: u64,
    /// The database that the connection is in before the first command; `None`: the batch selects one first.
    pub db: Option<u64>,
    /// Of a chained batch: how many commands come before the first of its transaction's. 0: not chained.
    pub head: u32,
    /// Of a full sync, which is repeated from further back anyway: there may be more of these under way.
    pub bulk: bool,
}

impl Batch {
    /// What it takes of the window.
    fn weight(&self) -> usize {
        let commands = self.commands as usize;
        if self.bulk { commands.div_ceil(BATCHES_IN_WINDOW) } else { commands }
    }
}

/// A command of a batch that was not simply accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which reply of the batch, from 0.
    pub index: u32,
    /// Which element of it, where it is an array (EXEC).
    pub element: Option<u32>,
    pub kind: ExceptionKind,
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ExceptionKind::Error(text) => f.write_str(&String::from_utf8_lossy(text)),
            ExceptionKind::Nil => f.write_str("nil"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExceptionKind {
    /// The error reply, without `-`.
    Error(Vec<u8>),
    Nil,
}

/// What a lane tells the applier.
#[derive(Debug)]
pub enum LaneReport {
    /// Every command of the batch was answered.
    Answered { lane: usize, batch: Batch, exceptions: Vec<Exception> },
    /// The lane is over; what was not answered may or may not have been applied.
    Lost { lane: usize, error: LaneError },
}

/// The applier's side of a lane. Dropping it ends the lane at once.
#[derive(Debug)]
pub struct Lane {
    pub address: Address,
    batches: mpsc::Sender<Batch>,
    task: JoinHandle<()>,
}

impl Lane {
    /// Starts the lane `index` over an open connection.
    pub fn start(
        index: usize,
        connection: Connection,
        limits: LaneLimits,
        reports: mpsc::Sender<LaneReport>,
    ) -> Self {
        let address = connection.address().clone();
        let (batches, incoming) = mpsc::channel(QUEUED_BATCHES);
        let task = async move {
            let address = connection.address().clone();
            let mut pipeline = Pipeline::new(index, limits, reports.clone());
            if let Err(error) = pipeline.run(connection, incoming, &address).await {
                // Nobody listens any more when the applier is gone; then nothing is left to tell.
                let _ = reports.send(LaneReport::Lost { lane: index, error }).await;
            }
        };
        // In a process with many migrations the span tells whose lines these are.
        let task = tokio::spawn(task.in_current_span());
        Self { address, batches, task }
    }

    /// Waits for a place in the queue. `None`: the lane is over, a report says why.
    pub async fn place(&self) -> Option<mpsc::Permit<'_, Batch>> {
        self.batches.reserve().await.ok()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Pipeline {
    index: usize,
    limits: LaneLimits,
    reports: mpsc::Sender<LaneReport>,
    /// Batches not wholly answered; the first `written` of them are wholly written.
    queue: VecDeque<Batch>,
    written: usize,
    /// Bytes written of `queue[written]`.
    part: usize,
    /// TLS may hold back the end of what was written.
    unflushed: bool,
    unanswered_commands: usize,
    unanswered_bytes: usize,
    counter: ReplyCounter,
    tally: Tally,
}

/// Replies of the batch at the front.
#[derive(Default)]
struct Tally {
    answered: u32,
    exceptions: Vec<Exception>,
    /// Replies due in the batches of the queue, front first, as far as they are started.
    expected: VecDeque<u32>,
    finished: VecDeque<Vec<Exception>>,
    surplus: bool,
}

impl Replies for Tally {
    fn error(&mut self, text: &[u8], element: Option<u32>) {
        let kind = ExceptionKind::Error(text.to_vec());
        self.exceptions.push(Exception { index: self.answered, element, kind });
    }

    fn nil(&mut self) {
        self.exceptions.push(Exception { index: self.answered, element: None, kind: ExceptionKind::Nil });
    }

    fn answered(&mut self) {
        self.answered += 1;
        match self.expected.front() {
            Some(&due) if self.answered >= due => {
                self.expected.pop_front();
                self.answered = 0;
                self.finished.push_back(std::mem::take(&mut self.exceptions));
            }
            Some(_) => {}
            None => self.surplus = true,
        }
    }
}

impl Pipeline {
    fn new(index: usize, limits: LaneLimits, reports: mpsc::Sender<LaneReport>) -> Self {
        Self {
            index,
            limits,
            reports,
            queue: VecDeque::new(),
            written: 0,
            part: 0,
            unflushed: false,
            unanswered_commands: 0,
            unanswered_bytes: 0,
            counter: ReplyCounter::default(),
            tally: Tally::default(),
        }
    }

    /// Ends without an error when the applier drops its side and all is answered.
    async fn run(
        &mut self,
        connection: Connection,
        mut incoming: mpsc::Receiver<Batch>,
        address: &Address,
    ) -> Result<(), LaneError> {
        let (stream, leftover, _) = connection.into_parts();
        let (mut read, mut write) = tokio::io::split(stream);
        self.count(&leftover, address).await?;
        let mut buffer = vec![0u8; READ_BUFFER];
        let mut open = true;
        loop {
            let writing = self.queue.get(self.written).and_then(|batch| batch.bytes.get(self.part..));
            let room = writing.is_none() && open && self.has_room();
            let waiting = !self.queue.is_empty();
            if !waiting && !open {
                return Ok(());
            }
            // Writing goes first, so that replies gather meanwhile and are read many at a time.
            tokio::select! {
                biased;
                count = write_or_flush(&mut write, writing), if writing.is_some() || self.unflushed => {
                    match count {
                        Ok(0) if writing.is_none() => self.unflushed = false,
                        Ok(0) => return Err(LaneError::Closed { address: address.clone() }),
                        Ok(count) => self.wrote(count),
                        Err(source) => return Err(LaneError::Io { address: address.clone(), source }),
                    }
                }
                batch = incoming.recv(), if room => match batch {
                    Some(batch) => self.take(batch),
                    None => open = false,
                },
                count = read.read(&mut buffer) => {
                    match count {
                        Ok(0) => return Err(LaneError::Closed { address: address.clone() }),
                        Ok(count) => self.count(buffer.get(..count).unwrap_or_default(), address).await?,
                        Err(source) => return Err(LaneError::Io { address: address.clone(), source }),
                    }
                }
                () = tokio::time::sleep(SILENCE), if waiting => {
                    return Err(LaneError::Silent { address: address.clone() });
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let commands = self.limits.commands();
        // One more of full size has to fit, too.
        let reserved = (NOT_SENT + 1) * batch_of(commands);
        self.queue.is_empty()
            || (self.queue.len() < MOST_BATCHES
                && self.unanswered_commands + reserved <= commands
                && self.unanswered_bytes < self.limits.bytes())
    }

    fn take(&mut self, batch: Batch) {
        self.unanswered_commands += batch.weight();
        self.unanswered_bytes += batch.bytes.len();
        self.tally.expected.push_back(batch.commands);
        self.queue.push_back(batch);
    }

    fn wrote(&mut self, count: usize) {
        self.part += count;
        self.unflushed = true;
        if self.queue.get(self.written).is_some_and(|batch| self.part >= batch.bytes.len()) {
            self.written += 1;
            self.part = 0;
        }
    }

    async fn count(&mut self, input: &[u8], address: &Address) -> Result<(), LaneError> {
        self.counter
            .feed(input, &mut self.tally)
            .map_err(|source| LaneError::Protocol { address: address.clone(), source })?;
        while let Some(exceptions) = self.tally.finished.pop_front() {
            let Some(batch) = self.queue.pop_front() else { break };
            if self.written == 0 {
                return Err(LaneError::Surplus { address: address.clone() });
            }
            self.written -= 1;
            self.unanswered_commands -= batch.weight();
            self.unanswered_bytes -= batch.bytes.len();
            let report = LaneReport::Answered { lane: self.index, batch, exceptions };
            if self.reports.send(report).await.is_err() {
                return Ok(());
            }
        }
        if self.tally.surplus {
            return Err(LaneError::Surplus { address: address.clone() });
        }
        Ok(())
    }
}

/// Writes some of `bytes`; without any, sends what the stream holds back, and gives 0.
async fn write_or_flush(write: &mut WriteHalf<Stream>, bytes: Option<&[u8]>) -> std::io::Result<usize> {
    match bytes {
        Some(bytes) => write.write(bytes).await,
        None => write.flush().await.map(|()| 0),
    }
}
