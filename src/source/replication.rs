//! One source shard as its replica: handshake, PSYNC, the RDB and the command stream into the spool,
//! acknowledgements back. Reconnects by itself, to where the shard is by then; gives up only where a retry
//! cannot help. Protocol source: Redis `replication.c` 2.8 to 8.2, Valkey 8.1 and 9.1.

mod answer;
mod error;
mod handshake;
mod link;
mod silence;

use std::convert::Infallible;
use std::future::pending;

use tokio::sync::watch;

use super::framing::{Framing, Splitter};
use super::watch::SourceShard;
use crate::backoff::Backoff;
use crate::connection::{Address, Dialer};
use crate::spool::{Origin, SpoolWriter};

use answer::{Answer, Ask, answer, is_behind, printable, why_full};
pub use error::ReplicationError;
pub(super) use handshake::check_shard;
use link::Link;

/// Looks at the deployment that must agree that a replica is gone before a link that works leaves it.
const STRIKES: u32 = 2;

/// What the link is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum LinkPhase {
    #[default]
    Connecting,
    /// Waiting for the source to start sending the RDB.
    Waiting,
    Snapshot,
    Streaming,
}

/// What there is to tell about a link; sent at changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinkState {
    pub phase: LinkPhase,
    pub origin: Option<Origin>,
    /// The server that is read from, or that was tried last.
    pub server: Option<Address>,
    /// Takes the shard's writes now; `None` while it was not looked for.
    pub master: Option<Address>,
    /// Bytes of the RDB, when the source says so beforehand.
    pub snapshot_bytes: Option<u64>,
    /// Full resyncs after the first.
    pub full_resyncs: u64,
    /// Why the last of them was needed.
    pub full_resync_reason: String,
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
    /// Where to begin; later the server of the current attempt.
    pub address: Address,
    /// Tells where the shard is after a failover. `None`: always at the same address.
    pub shard: Option<SourceShard>,
    /// Read from a replica where one is fit.
    pub prefer_replica: bool,
    /// `PSYNC`, or its name on a service that renames it.
    pub psync_command: String,
    /// Where an earlier run stopped.
    pub resume: Option<Origin>,
    /// What an earlier run left in the spool: its history, and the position at which the stream starts. What
    /// follows its end is asked for.
    pub spooled: Option<(Origin, u64)>,
    /// Without it, no snapshot that was complete is replaced by another.
    pub allow_full_resync: bool,
    /// A link of this run was there before: a full resync is not the first.
    pub restarted: bool,
    pub acknowledged: watch::Receiver<Acknowledged>,
    pub state: watch::Sender<LinkState>,
}

/// What was received so far.
#[derive(Default)]
struct Received {
    history: Option<History>,
    /// A snapshot was received to its end, in whatever history.
    complete: bool,
    use_sync: bool,
}

/// What is known of the history that the spool holds.
struct History {
    origin: Origin,
    /// Spool position where the stream starts; `None` while the RDB is on its way.
    stream_at: Option<u64>,
}

impl Replication {
    /// Runs until an error that a retry cannot mend. Dropping the future ends the link.
    pub async fn run(mut self, mut spool: SpoolWriter) -> ReplicationError {
        let whereabouts = report(self.shard.clone(), self.state.clone());
        tokio::select! {
            error = self.follow(&mut spool) => error,
            never = whereabouts => match never {},
        }
    }

    async fn follow(&mut self, spool: &mut SpoolWriter) -> ReplicationError {
        let mut received = Received::of(self.spooled.take());
        let mut backoff = Backoff::default();
        loop {
            let error = match self.session(spool, &mut received, &mut backoff).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.state.send_modify(|state| {
                state.phase = LinkPhase::Connecting;
                state.attempts += 1;
                state.last_error = error.to_string();
            });
            let again = if received.history.is_some() { error.may_pass() } else { error.is_transient() };
            if !again {
                return error;
            }
            tracing::warn!(%error, "replication link lost, connecting again");
            if !matches!(error, ReplicationError::Elsewhere { .. }) {
                self.pause(&mut backoff).await;
            }
            self.address = self.find(received.offset(spool)).await;
        }
    }

    /// Waits for the next attempt; not any longer when the shard shows up at another place.
    async fn pause(&self, backoff: &mut Backoff) {
        let another_master = async {
            let Some(shard) = self.shard.as_ref().filter(|_| !self.prefer_replica) else {
                return pending().await;
            };
            let mut seen = shard.subscribe();
            while shard.now().is_none_or(|at| at.master == self.address) {
                if seen.changed().await.is_err() {
                    return pending().await;
                }
            }
        };
        tokio::select! {
            () = backoff.wait() => {}
            () = another_master => {}
        }
    }

    /// Where the shard is now. A replica is taken only when it has what was received: one that lags would
    /// have to send everything.
    async fn find(&self, received: Option<i64>) -> Address {
        let Some(shard) = &self.shard else { return self.address.clone() };
        let found = shard.reader(self.prefer_replica, received, &self.dialer).await;
        found.unwrap_or_else(|| self.address.clone())
    }

    async fn session(
        &mut self,
        spool: &mut SpoolWriter,
        received: &mut Received,
        backoff: &mut Backoff,
    ) -> Result<Infallible, ReplicationError> {
        let address = self.address.clone();
        self.state.send_modify(|state| state.server = Some(address.clone()));
        let mut connection = self.dialer.connect(&address).await?;
        handshake::check_shard(&mut connection, &address, self.shard.as_ref()).await?;
        handshake::introduce(&mut connection).await?;
        let silence = silence::limit(&mut connection).await?;
        let ask = self.ask(spool, received);
        let mut info = None;
        if let Ask::Psync(wanted) = &ask {
            info = handshake::replication_info(&mut connection).await?;
            if let Some(info) = info.as_ref().filter(|info| is_behind(info, wanted)) {
                let (offset, received) = (info.offset, wanted.offset);
                return Err(ReplicationError::Behind { address, offset, received });
            }
        }
        let mut link = Link::new(connection, &address, silence);
        link.send(&ask.encode(&self.psync_command)).await?;
        self.state.send_modify(|state| state.phase = LinkPhase::Waiting);
        let line = if matches!(ask, Ask::Sync) { Vec::new() } else { link.line().await? };
        match answer(&line, &ask) {
            Answer::Continue(_) if matches!(ask, Ask::PsyncFull { .. }) => {
                return Err(link.bad("a partial resync that was not asked for", &line));
            }
            Answer::Continue(id) => self.go_on(id, spool, received),
            Answer::FullResync(origin) | Answer::Snapshot(origin) => {
                self.announce(why_full(&ask, info.as_ref()), received)?;
                let line = if line.starts_with(b"$") { line } else { link.line().await? };
                self.receive_snapshot(&mut link, spool, received, origin, &line, backoff).await?;
            }
            Answer::NoSuchCommand if self.psync_command.eq_ignore_ascii_case("PSYNC") => {
                received.use_sync = true;
                let text = "PSYNC is unknown to it; trying SYNC".to_owned();
                return Err(ReplicationError::NotReady { address, text });
            }
            Answer::NoSuchCommand | Answer::Refused => {
                let (command, text) = (self.psync_command.clone(), printable(&line));
                return Err(ReplicationError::Refused { address, command, text });
            }
            Answer::NotReady => return Err(ReplicationError::NotReady { address, text: printable(&line) }),
            Answer::Unknown => return Err(link.bad("an unknown line", &line)),
        }
        let origin = received.history.as_ref().map(|history| history.origin.clone());
        if let (Some(shard), Some(origin)) = (&self.shard, &origin) {
            shard.reads(&origin.replication_id);
        }
        self.state.send_modify(|state| {
            state.phase = LinkPhase::Streaming;
            state.origin = origin;
            state.attempts = 0;
            state.last_error.clear();
        });
        backoff.reset();
        tokio::select! {
            ended = link.stream(spool, self.acknowledged.clone()) => ended,
            error = self.elsewhere() => Err(error),
        }
    }

    fn ask(&self, spool: &SpoolWriter, received: &Received) -> Ask {
        if received.use_sync {
            return Ask::Sync;
        }
        match (&received.history, &self.resume) {
            // A history that SYNC began has no name to ask for.
            (Some(History { origin, .. }), _) if origin.is_unnamed() => {
                Ask::PsyncFull { why: "the source did not tell which history it sent before" }
            }
            (Some(History { origin, stream_at: Some(_) }), _) => Ask::Psync(Origin {
                replication_id: origin.replication_id.clone(),
                offset: received.offset(spool).unwrap_or(origin.offset),
            }),
            (Some(History { stream_at: None, .. }), _) => {
                Ask::PsyncFull { why: "the link was lost before the snapshot was complete" }
            }
            (None, Some(resume)) => Ask::Psync(resume.clone()),
            (None, None) => Ask::PsyncFull { why: "what had arrived was of no use" },
        }
    }

    /// The source goes on where it was asked to. It may have a name of its own for the history, which is
    /// from here on the one to ask for; offsets stay as they are.
    fn go_on(&self, id: Option<String>, spool: &mut SpoolWriter, received: &mut Received) {
        if received.history.is_none()
            && let Some(origin) = self.resume.clone()
        {
            spool.begin(origin.clone(), false);
            received.history = Some(History { origin, stream_at: Some(0) });
        }
        received.complete = true;
        if let (Some(id), Some(history)) = (id, received.history.as_mut()) {
            spool.rename(&id);
            history.origin.replication_id = id;
        }
        self.state.send_modify(|state| state.resumes += 1);
    }

    /// Tells of a full resync that is not the first, or refuses it: a complete snapshot is replaced only
    /// where that is allowed.
    fn announce(&self, why: String, received: &Received) -> Result<(), ReplicationError> {
        let replaces = received.complete || self.resume.is_some();
        if replaces && !self.allow_full_resync {
            return Err(ReplicationError::FullResyncForbidden { address: self.address.clone(), why });
        }
        if received.history.is_some() || self.resume.is_some() || self.restarted {
            tracing::warn!(server = %self.address, why, "the source sends everything again");
            self.state.send_modify(|state| {
                state.full_resyncs += 1;
                state.full_resync_reason = why;
            });
        }
        Ok(())
    }

    async fn receive_snapshot(
        &self,
        link: &mut Link,
        spool: &mut SpoolWriter,
        received: &mut Received,
        origin: Origin,
        line: &[u8],
        backoff: &mut Backoff,
    ) -> Result<(), ReplicationError> {
        let framing = Framing::parse(line).ok_or_else(|| link.bad("no length", line))?;
        spool.begin(origin.clone(), true);
        received.history = Some(History { origin: origin.clone(), stream_at: None });
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
        received.history = Some(History { origin, stream_at: Some(bytes) });
        received.complete = true;
        self.state.send_modify(|state| state.snapshot_bytes = Some(bytes));
        backoff.reset();
        Ok(())
    }

    /// Ends when the server that is read from is not of the shard any more, although the link works: a
    /// master that was cut off from the others, or a replica that stayed behind with it.
    async fn elsewhere(&self) -> ReplicationError {
        let Some(shard) = &self.shard else { return pending().await };
        let mut seen = shard.subscribe();
        let mut strikes = 0;
        loop {
            if let Some(at) = shard.now() {
                let here =
                    at.master == self.address || (self.prefer_replica && at.replicas.contains(&self.address));
                strikes = if here { 0 } else { strikes + 1 };
                if strikes >= if self.prefer_replica { STRIKES } else { 1 } {
                    let (address, master) = (self.address.clone(), at.master);
                    return ReplicationError::Elsewhere { address, master };
                }
            }
            if seen.changed().await.is_err() {
                return pending().await;
            }
        }
    }
}

impl Received {
    fn of(spooled: Option<(Origin, u64)>) -> Self {
        let complete = spooled.is_some();
        let history = spooled.map(|(origin, stream_at)| History { origin, stream_at: Some(stream_at) });
        Self { history, complete, use_sync: false }
    }

    /// Replication offset up to which everything was received; `None` before the command stream.
    fn offset(&self, spool: &SpoolWriter) -> Option<i64> {
        let history = self.history.as_ref()?;
        let bytes = spool.gauges().end.saturating_sub(history.stream_at?);
        Some(history.origin.offset + i64::try_from(bytes).unwrap_or(i64::MAX))
    }
}

/// Shows in the link's state where the shard is, whatever the link is doing.
async fn report(shard: Option<SourceShard>, state: watch::Sender<LinkState>) -> Infallible {
    let Some(shard) = shard else { return pending().await };
    let mut seen = shard.subscribe();
    loop {
        if let Some(at) = shard.now() {
            state.send_if_modified(|state| {
                let news = state.master.as_ref() != Some(&at.master);
                if news {
                    state.master = Some(at.master);
                }
                news
            });
        }
        if seen.changed().await.is_err() {
            return pending().await;
        }
    }
}
