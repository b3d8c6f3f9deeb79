//! One source shard as its replica: handshake, PSYNC, the RDB and the command stream into the spool,
//! acknowledgements back. Reconnects by itself; gives up only where a retry cannot help.
//! Protocol source: Redis `replication.c` 2.8 to 8.2, Valkey 8.1 and 9.1.

use std::convert::Infallible;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;

use super::framing::{Framing, Splitter};
use super::keep_alive::while_sending;
use crate::backoff::Backoff;
use crate::clock::unix_millis;
use crate::connection::{Address, Connection, ConnectionError, Dialer, Stream};
use crate::resp::{Next, Reply, ReplyVerdict, encode_command};
use crate::spool::{Origin, SpoolError, SpoolWriter};

const READ_BUFFER: usize = 256 << 10;
/// A master sends something every second while it saves and a PING every `repl-ping-replica-period`
/// (10 s by default) later; after this long without a byte the link is half-open.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest line before the RDB.
const MAX_LINE: usize = 512;
const ACK_PERIOD: Duration = Duration::from_secs(1);
/// Acknowledgements that follow the target's are at least this far apart.
const ACK_SPACING: Duration = Duration::from_millis(10);
/// Announced so that Valkey 9 writes its own RDB format instead of an old one that has no field expiries.
const ANNOUNCED_VALKEY: &str = "9.1.0";

#[derive(Debug, Error)]
pub enum ReplicationError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(
        "{address}: {command} refused: {text}; grant it to the user (+psync +replconf) or set psyncCommand"
    )]
    Refused { address: Address, command: String, text: String },
    #[error("{address}: not ready to replicate: {text}")]
    NotReady { address: Address, text: String },
    #[error("{address}: {what} where the reply to PSYNC or the RDB's length was due: {line:?}")]
    Handshake { address: Address, what: &'static str, line: String },
    #[error("{address}: nothing received for {SILENCE:?}: the link is half-open")]
    Silent { address: Address },
    #[error("{address}: the source closed the replication link {part}")]
    Closed { address: Address, part: &'static str },
    #[error("{address}: replication link: {source}")]
    Io { address: Address, source: std::io::Error },
    #[error("{address}: the source asks for a full resync ({why}), and failurePolicy.onFullResync is Fail")]
    FullResyncForbidden { address: Address, why: String },
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl ReplicationError {
    /// True when connecting again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connection(error) => error.is_transient(),
            Self::NotReady { .. } | Self::Silent { .. } | Self::Closed { .. } | Self::Io { .. } => true,
            Self::Handshake { .. } => true,
            Self::Refused { .. } | Self::FullResyncForbidden { .. } | Self::Spool(_) => false,
        }
    }
}

/// What the link is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkPhase {
    #[default]
    Connecting,
    /// Waiting for the source to start sending the RDB.
    Waiting,
    Snapshot,
    Streaming,
}

/// What there is to tell about a link; sent at changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    pub phase: LinkPhase,
    pub origin: Option<Origin>,
    /// Bytes of the RDB, when the source says so beforehand.
    pub snapshot_bytes: Option<u64>,
    /// Full resyncs after the first.
    pub full_resyncs: u64,
    /// Partial resyncs.
    pub resumes: u64,
    /// Failed attempts since the link last worked.
    pub attempts: u32,
    pub last_error: String,
}

/// What the target has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// Which of the spool's histories `offset` is of. A master never takes an acknowledgement back, so
    /// that an offset of the history before must not reach the next one.
    pub history: u64,
    /// Replication offset up to which all stands on the target; 0 until the snapshot does.
    pub offset: i64,
}

pub struct Replication {
    pub dialer: Dialer,
    pub address: Address,
    /// `PSYNC`, or its name on a service that renames it.
    pub psync_command: String,
    /// Where an earlier run stopped.
    pub resume: Option<Origin>,
    pub allow_full_resync: bool,
    /// A link of this run was there before: a full resync is not the first.
    pub restarted: bool,
    pub acknowledged: watch::Receiver<Acknowledged>,
    pub state: watch::Sender<LinkState>,
}

/// What is known of the history that the spool holds.
struct History {
    origin: Origin,
    /// Spool position where the stream starts; `None` while the RDB is on its way.
    stream_at: Option<u64>,
}

/// Which command asks for the data.
enum Ask {
    Psync(Origin),
    PsyncFull,
    /// Redis before 2.8.
    Sync,
}

impl Replication {
    /// Runs until an error that a retry cannot mend. Dropping the future ends the link.
    pub async fn run(mut self, mut spool: SpoolWriter) -> ReplicationError {
        let mut history: Option<History> = None;
        let mut backoff = Backoff::default();
        let mut use_sync = false;
        loop {
            let error = match self.session(&mut spool, &mut history, &mut use_sync, &mut backoff).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.state.send_modify(|state| {
                state.phase = LinkPhase::Connecting;
                state.attempts += 1;
                state.last_error = error.to_string();
            });
            if !error.is_transient() {
                return error;
            }
            tracing::warn!(%error, "replication link lost, connecting again");
            backoff.wait().await;
        }
    }

    async fn session(
        &mut self,
        spool: &mut SpoolWriter,
        history: &mut Option<History>,
        use_sync: &mut bool,
        backoff: &mut Backoff,
    ) -> Result<Infallible, ReplicationError> {
        let mut connection = self.dialer.connect(&self.address).await?;
        introduce(&mut connection).await?;
        let ask = match (&history, &self.resume) {
            _ if *use_sync => Ask::Sync,
            // A history that SYNC began has no name to ask for.
            (Some(History { origin, .. }), _) if origin.is_unnamed() => Ask::PsyncFull,
            (Some(History { origin, stream_at: Some(stream_at) }), _) => {
                let received = spool.gauges().end - stream_at;
                Ask::Psync(Origin {
                    replication_id: origin.replication_id.clone(),
                    offset: origin.offset + received as i64,
                })
            }
            (Some(History { stream_at: None, .. }), _) | (None, None) => Ask::PsyncFull,
            (None, Some(resume)) => Ask::Psync(resume.clone()),
        };
        let mut link = Link::new(connection, &self.address);
        link.send(&ask, &self.psync_command).await?;
        self.set_phase(LinkPhase::Waiting);
        let line = if matches!(ask, Ask::Sync) { Vec::new() } else { link.line().await? };
        match answer(&line, &ask) {
            Answer::Continue(_) if matches!(ask, Ask::PsyncFull) => {
                return Err(link.bad("a partial resync that was not asked for", &line));
            }
            Answer::Continue(id) => {
                if history.is_none()
                    && let Some(origin) = self.resume.clone()
                {
                    spool.begin(origin.clone(), false);
                    *history = Some(History { origin, stream_at: Some(0) });
                }
                if let (Some(id), Some(history)) = (id, history.as_mut()) {
                    spool.rename(&id);
                    history.origin.replication_id = id;
                }
                self.state.send_modify(|state| state.resumes += 1);
            }
            Answer::FullResync(origin) | Answer::Snapshot(origin) => {
                let again = history.is_some() || self.resume.is_some() || self.restarted;
                if again && !self.allow_full_resync {
                    let why = "the position asked for is no longer in its backlog".to_owned();
                    return Err(ReplicationError::FullResyncForbidden { address: self.address.clone(), why });
                }
                self.state.send_modify(|state| state.full_resyncs += u64::from(again));
                let line = if line.starts_with(b"$") { line } else { link.line().await? };
                self.receive_snapshot(&mut link, spool, history, origin, &line, backoff).await?;
            }
            Answer::NoSuchCommand if self.psync_command.eq_ignore_ascii_case("PSYNC") => {
                *use_sync = true;
                return Err(ReplicationError::NotReady {
                    address: self.address.clone(),
                    text: "PSYNC is unknown to it; trying SYNC".to_owned(),
                });
            }
            Answer::NoSuchCommand | Answer::Refused => {
                return Err(ReplicationError::Refused {
                    address: self.address.clone(),
                    command: self.psync_command.clone(),
                    text: printable(&line),
                });
            }
            Answer::NotReady => {
                return Err(ReplicationError::NotReady {
                    address: self.address.clone(),
                    text: printable(&line),
                });
            }
            Answer::Unknown => return Err(link.bad("an unknown line", &line)),
        }
        let origin = history.as_ref().map(|history| history.origin.clone());
        self.state.send_modify(|state| {
            state.phase = LinkPhase::Streaming;
            state.origin = origin;
            state.attempts = 0;
            state.last_error.clear();
        });
        backoff.reset();
        link.stream(spool, self.acknowledged.clone()).await
    }

    async fn receive_snapshot(
        &self,
        link: &mut Link,
        spool: &mut SpoolWriter,
        history: &mut Option<History>,
        origin: Origin,
        line: &[u8],
        backoff: &mut Backoff,
    ) -> Result<(), ReplicationError> {
        let framing = Framing::parse(line).ok_or_else(|| link.bad("no length", line))?;
        spool.begin(origin.clone(), true);
        *history = Some(History { origin: origin.clone(), stream_at: None });
        let snapshot_bytes = match framing {
            Framing::Length(length) => Some(length),
            Framing::Mark(_) => None,
        };
        self.state.send_modify(|state| {
            state.phase = LinkPhase::Snapshot;
            state.origin = Some(origin.clone());
            state.snapshot_bytes = snapshot_bytes;
            state.attempts = 0;
            state.last_error.clear();
        });
        link.snapshot(spool, Splitter::new(framing)).await?;
        spool.start_stream();
        // What followed the RDB is still in the link's buffer, not in the spool.
        let bytes = spool.gauges().end;
        *history = Some(History { origin, stream_at: Some(bytes) });
        self.state.send_modify(|state| state.snapshot_bytes = Some(bytes));
        backoff.reset();
        Ok(())
    }

    fn set_phase(&self, phase: LinkPhase) {
        self.state.send_modify(|state| state.phase = phase);
    }
}

/// Tells the source what kind of replica this is. Each option goes alone, as a server stops at the
/// first it does not know; refusals do not matter.
async fn introduce(connection: &mut Connection) -> Result<(), ConnectionError> {
    for option in [["capa", "eof"], ["capa", "psync2"], ["version", ANNOUNCED_VALKEY]] {
        let reply = connection.call(&[b"REPLCONF", option[0].as_bytes(), option[1].as_bytes()]).await?;
        if let Reply::Error(text) = reply {
            tracing::debug!(option = option[0], text = %String::from_utf8_lossy(&text), "REPLCONF option not known");
        }
    }
    Ok(())
}

enum Answer {
    Continue(Option<String>),
    FullResync(Origin),
    /// The RDB comes without a word about its history.
    Snapshot(Origin),
    NoSuchCommand,
    Refused,
    NotReady,
    Unknown,
}

fn answer(line: &[u8], ask: &Ask) -> Answer {
    if matches!(ask, Ask::Sync) {
        // SYNC names no history; a lost link means another full sync.
        return Answer::Snapshot(Origin::unnamed());
    }
    if line.starts_with(b"$") {
        // Redis takes any name but "psync" itself for SYNC, and sends the RDB without further words.
        return Answer::Snapshot(Origin::unnamed());
    }
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_ascii_whitespace();
    match words.next() {
        Some("+CONTINUE") => Answer::Continue(words.next().filter(|id| id.len() == 40).map(str::to_owned)),
        Some("+FULLRESYNC") => match (words.next(), words.next().map(str::parse)) {
            (Some(id), Some(Ok(offset))) if id.len() == 40 => {
                Answer::FullResync(Origin { replication_id: id.to_owned(), offset })
            }
            _ => Answer::Unknown,
        },
        _ => match line.strip_prefix(b"-") {
            None => Answer::Unknown,
            Some(error) => match ReplyVerdict::of(error) {
                ReplyVerdict::UnknownCommand => Answer::NoSuchCommand,
                verdict if verdict.next() == Next::RetryLater => Answer::NotReady,
                ReplyVerdict::Auth => Answer::Refused,
                // "-ERR Can't SYNC while not connected with my master", "-ERR ... failover": they pass.
                _ => Answer::NotReady,
            },
        },
    }
}

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).take(200).collect()
}

/// An open replication link.
struct Link {
    read: ReadHalf<Stream>,
    write: WriteHalf<Stream>,
    buffer: BytesMut,
    address: Address,
}

impl Link {
    fn new(connection: Connection, address: &Address) -> Self {
        let (stream, buffer, _) = connection.into_parts();
        let (read, write) = tokio::io::split(stream);
        Self { read, write, buffer, address: address.clone() }
    }

    async fn send(&mut self, ask: &Ask, psync: &str) -> Result<(), ReplicationError> {
        let mut out = Vec::new();
        match ask {
            Ask::Sync => encode_command(&["SYNC"], &mut out),
            Ask::PsyncFull => encode_command(&[psync, "?", "-1"], &mut out),
            Ask::Psync(Origin { replication_id, offset }) => {
                // The next byte wanted; asking for the last one received would send it twice.
                encode_command(&[psync, replication_id, &(offset + 1).to_string()], &mut out);
            }
        }
        self.write.write_all(&out).await.map_err(|source| self.io(source))
    }

    /// The next line that is not a bare newline, without its line end.
    async fn line(&mut self) -> Result<Vec<u8>, ReplicationError> {
        loop {
            while self.buffer.first() == Some(&b'\n') {
                self.buffer.advance(1);
            }
            if let Some(end) = memchr::memchr(b'\n', &self.buffer) {
                let mut line = self.buffer.split_to(end + 1).to_vec();
                while matches!(line.last(), Some(b'\n' | b'\r')) {
                    line.pop();
                }
                return Ok(line);
            }
            if self.buffer.len() > MAX_LINE {
                let line = self.buffer.to_vec();
                return Err(self.bad("no line end", &line));
            }
            self.read_more("before it sent data").await?;
        }
    }

    /// Passes the RDB into the spool; what follows it stays in the buffer.
    async fn snapshot(
        &mut self,
        spool: &mut SpoolWriter,
        mut splitter: Splitter,
    ) -> Result<(), ReplicationError> {
        let mut ack_timer = tokio::time::interval(ACK_PERIOD);
        ack_timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heard = tokio::time::Instant::now();
        loop {
            while !self.buffer.is_empty() {
                let split = splitter.split(&self.buffer);
                let now = unix_millis();
                let direct = self.buffer.get(..split.direct).unwrap_or_default();
                let append = async {
                    spool.append(&split.held, now).await?;
                    spool.append(direct, now).await
                };
                let taken = while_sending(&ack_frame(0), &mut ack_timer, &mut self.write, append).await;
                taken.map_err(|source| self.io(source))??;
                self.buffer.advance(split.used);
                if split.ended {
                    return Ok(());
                }
                // Not before the spool took it, which may be what was waited for.
                heard = tokio::time::Instant::now();
            }
            self.buffer.clear();
            tokio::select! {
                biased;
                _ = ack_timer.tick() => {
                    // Nothing stands on the target yet, but a silent replica would be dropped.
                    self.write.write_all(&ack_frame(0)).await.map_err(|source| self.io(source))?;
                    // Each acknowledgement starts the wait for bytes anew, and with it its own time limit.
                    if heard.elapsed() > SILENCE {
                        return Err(ReplicationError::Silent { address: self.address.clone() });
                    }
                }
                read = self.read_more("in the middle of the RDB") => read?,
            }
        }
    }

    /// Passes the command stream into the spool and acknowledges what the target has.
    async fn stream(
        mut self,
        spool: &mut SpoolWriter,
        acknowledged: watch::Receiver<Acknowledged>,
    ) -> Result<Infallible, ReplicationError> {
        let history = spool.history();
        let pending = self.buffer.split();
        let Self { mut read, mut write, address, .. } = self;
        let read_loop = async {
            spool.append(&pending, unix_millis()).await?;
            let mut buffer = vec![0u8; READ_BUFFER];
            loop {
                let count = match tokio::time::timeout(SILENCE, read.read(&mut buffer)).await {
                    Err(_) => return Err(ReplicationError::Silent { address: address.clone() }),
                    Ok(Err(source)) => return Err(ReplicationError::Io { address: address.clone(), source }),
                    Ok(Ok(0)) => {
                        let part = "while it sent the command stream";
                        return Err(ReplicationError::Closed { address: address.clone(), part });
                    }
                    Ok(Ok(count)) => count,
                };
                spool.append(buffer.get(..count).unwrap_or_default(), unix_millis()).await?;
            }
        };
        tokio::select! {
            ended = read_loop => ended,
            source = acknowledge(&mut write, acknowledged, history) => Err(ReplicationError::Io { address: address.clone(), source }),
        }
    }

    async fn read_more(&mut self, part: &'static str) -> Result<(), ReplicationError> {
        self.buffer.reserve(READ_BUFFER);
        match tokio::time::timeout(SILENCE, self.read.read_buf(&mut self.buffer)).await {
            Err(_) => Err(ReplicationError::Silent { address: self.address.clone() }),
            Ok(Err(source)) => Err(self.io(source)),
            Ok(Ok(0)) => Err(ReplicationError::Closed { address: self.address.clone(), part }),
            Ok(Ok(_)) => Ok(()),
        }
    }

    fn io(&self, source: std::io::Error) -> ReplicationError {
        ReplicationError::Io { address: self.address.clone(), source }
    }

    fn bad(&self, what: &'static str, line: &[u8]) -> ReplicationError {
        ReplicationError::Handshake { address: self.address.clone(), what, line: printable(line) }
    }
}

/// Sends `REPLCONF ACK` every second and soon after the target acknowledged more. A master that sent
/// its RDB without a file starts the stream only on such an acknowledgement, so the first go at once.
async fn acknowledge(
    write: &mut WriteHalf<Stream>,
    mut acknowledged: watch::Receiver<Acknowledged>,
    history: u64,
) -> std::io::Error {
    let mut early = 10u32;
    loop {
        let last = *acknowledged.borrow_and_update();
        let offset = if last.history == history { last.offset } else { 0 };
        if let Err(error) = write.write_all(&ack_frame(offset)).await {
            return error;
        }
        let period = if early > 0 { ACK_PERIOD / 10 } else { ACK_PERIOD };
        early = early.saturating_sub(1);
        tokio::time::sleep(ACK_SPACING).await;
        // An error means that nobody acknowledges any more: the period alone goes on.
        if let Ok(Err(_)) = tokio::time::timeout(period, acknowledged.changed()).await {
            tokio::time::sleep(period).await;
        }
    }
}

fn ack_frame(offset: i64) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    encode_command(&[b"REPLCONF".as_slice(), b"ACK", offset.to_string().as_bytes()], &mut out);
    out
}
