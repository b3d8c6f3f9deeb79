//! One source shard by SCAN, for servers that do not replicate to us. What is read becomes a replication
//! stream of its own, an RDB and then commands, so that all behind the spool is as with PSYNC.
//!
//! The RDB holds what the first pass over all keys reads. Changes are followed by keyspace notifications, where
//! the server tells of every one, else by passes that read all keys again: a digest of each key says what
//! changed (`table.rs`), and what vanished is found by name (`names.rs`). After a lost connection a pass makes up for
//! what was not heard meanwhile. What the filter leaves out is neither read nor remembered. Such a stream cannot be gone on with by another process, which begins anew.

mod abilities;
mod changed;
mod emit;
mod error;
mod events;
mod names;
mod pieces;
mod progress;
mod reading;
mod session;
mod table;
mod taking;
mod usage;

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::hash::RandomState;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::api::plan::KeyspaceNotifications;
use crate::backoff::Backoff;
use crate::connection::{Address, Dialer};
use crate::rdb::compat::TargetFormat;
use crate::source::replication::{LinkPhase, LinkState, ReplicationError};
use crate::source::watch::SourceShard;
use crate::spool::{Origin, SpoolWriter};
use crate::transform::Transform;
use crate::version::{Flavor, ServerVersion};

use changed::Changed;
use emit::Emit;
pub use error::ScanError;
pub use events::Undo;
use names::Names;
pub use progress::{ScanProgress, ScanState};
use reading::Later;
use session::Session;
use table::Table;

/// Values that take more memory than this at the source are read in pieces, as DUMP would hold it up.
const BIG: u64 = 16 << 20;
/// Between two passes at least, and as a multiple of how long the last one took: what following costs the source.
const REST: Duration = Duration::from_secs(2);
const MOST_REST: Duration = Duration::from_secs(60);
const REST_FACTOR: u32 = 3;
/// Idle connections are used this often, so that nobody takes them for dead.
const ALIVE: Duration = Duration::from_secs(10);
/// Looks in a row that must agree that the server is not of the shard any more.
const STRIKES: u32 = 2;

/// What does not change while a shard is scanned.
#[derive(Clone, Debug)]
pub struct ScanRules {
    pub notifications: KeyspaceNotifications,
    /// Nodes of a cluster are asked to let replicas be read.
    pub cluster: bool,
    /// No value may be passed on in pieces: the target takes only the RDB or must not replace keys, or a script
    /// decides on values.
    pub whole_values: bool,
    /// How keys were used is read, too.
    pub eviction_data: bool,
    /// What is left out; `None`: nothing.
    pub transform: Option<Arc<Transform>>,
    pub big_above: u64,
    /// The target, whose RESTORE takes no newer payloads than its own; `None`: no server.
    pub target: Option<ServerVersion>,
    /// For the names of keys.
    pub folder: PathBuf,
    pub file_name: String,
}

impl ScanRules {
    pub fn big_above(max_restore_bytes: u64) -> u64 {
        BIG.min(max_restore_bytes)
    }

    fn admits_database(&self, db: u32) -> bool {
        self.transform.as_ref().is_none_or(|transform| transform.databases.admits(db.into()))
    }

    fn admits(&self, db: u32, key: &[u8]) -> bool {
        self.transform.as_ref().is_none_or(|transform| transform.admits(db.into(), key))
    }
}

pub struct Scan {
    pub dialer: Dialer,
    /// Where to begin; later the server of the current attempt.
    pub address: Address,
    /// Tells where the shard is after a failover. `None`: always at the same address.
    pub shard: Option<SourceShard>,
    pub prefer_replica: bool,
    /// Without it a scan whose end was reached once is not begun anew.
    pub allow_anew: bool,
    /// Why this is not the first scan; `None`: it is.
    pub anew: Option<&'static str>,
    pub rules: ScanRules,
    pub state: watch::Sender<LinkState>,
    pub progress: Arc<ScanProgress>,
    pub undo: Undo,
}

/// Where a pass goes on.
#[derive(Clone, Debug)]
pub struct Place {
    /// Beyond all databases: only what vanished is still to be found.
    db: u32,
    cursor: Vec<u8>,
    /// A cursor means something only to the process that gave it.
    run_id: String,
}

/// All that outlives a connection.
struct Work {
    emit: Emit,
    rules: ScanRules,
    table: Table,
    seed: RandomState,
    names: Names,
    changed: Arc<Changed>,
    progress: Arc<ScanProgress>,
    /// No pass was completed yet.
    first: bool,
    /// Keys of the database that is being read about which more is to be asked …
    waiting: VecDeque<Later>,
    /// … and how many of them were asked about on this connection.
    asked: usize,
    /// Database, key and size of what is read in pieces.
    big: Vec<(u32, Vec<u8>, u64)>,
    /// Checksums of function libraries, by name.
    functions: BTreeMap<String, u64>,
    begun: bool,
    place: Option<Place>,
    /// Something may have been missed: another pass is to follow.
    must_pass: bool,
    /// Keys that this pass passed on.
    changes: u64,
    /// Calls of commands that change keys without a notification, when they were counted last.
    unheard: Option<u64>,
}

impl Scan {
    /// Runs until an error that a retry cannot mend. Dropping the future ends it; what it changed on servers is
    /// then still to be undone.
    pub async fn run(mut self, spool: SpoolWriter) -> ScanError {
        if let Some(why) = self.anew {
            if !self.allow_anew {
                return ScanError::AnewForbidden { address: self.address, why };
            }
            tracing::warn!(server = %self.address, why, "all keys are read again from the beginning");
            self.state.send_modify(|state| {
                state.full_resyncs += 1;
                state.full_resync_reason = why.to_owned();
            });
        }
        self.progress.begin();
        let mut work = Work::new(spool, self.rules.clone(), Arc::clone(&self.progress));
        let mut backoff = Backoff::default();
        loop {
            let error = match self.session(&mut work, &mut backoff).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.state.send_modify(|state| {
                state.phase = LinkPhase::Connecting;
                state.attempts += 1;
                state.last_error = error.to_string();
            });
            let again = if work.begun { error.may_pass() } else { error.is_transient() };
            if !again {
                return error;
            }
            tracing::warn!(%error, "the scan broke off, connecting again");
            // What changes meanwhile is not heard.
            work.must_pass |= work.begun;
            backoff.wait().await;
            self.address = self.find().await;
        }
    }

    async fn find(&self) -> Address {
        let Some(shard) = &self.shard else { return self.address.clone() };
        let found = shard.reader(self.prefer_replica, None, &self.dialer).await;
        found.unwrap_or_else(|| self.address.clone())
    }

    async fn session(&mut self, work: &mut Work, backoff: &mut Backoff) -> Result<Infallible, ScanError> {
        self.state.send_modify(|state| state.server = Some(self.address.clone()));
        let mut session = Session::open(self, &work.changed).await?;
        if work.rules.whole_values && !session.abilities.dump {
            return Err(ScanError::NoDump { address: self.address.clone() });
        }
        // Before anything is read, so that what comes in between shows.
        work.unheard = session.unheard_calls().await?;
        let told = session.events.is_some();
        self.progress.follows(told);
        if work.begun {
            self.state.send_modify(|state| state.resumes += 1);
        } else {
            self.begin(work, &mut session).await?;
        }
        if work.place.as_ref().is_some_and(|place| place.run_id != session.run_id) {
            work.must_pass = true;
        }
        self.state.send_modify(|state| {
            state.attempts = 0;
            state.last_error.clear();
        });
        if work.emit.in_snapshot() {
            self.state.send_modify(|state| state.phase = LinkPhase::Snapshot);
            work.pass(&mut session).await?;
            self.end_snapshot(work).await?;
            work.read_big_ones(&mut session).await?;
        }
        self.state.send_modify(|state| state.phase = LinkPhase::Streaming);
        backoff.reset();
        self.follow(work, &mut session).await
    }

    /// The head of the RDB, and what is no key.
    async fn begin(&self, work: &mut Work, session: &mut Session) -> Result<(), ScanError> {
        let version = session.version;
        work.emit.begin(TargetFormat::of(version).footer_version(), version.flavor);
        work.read_functions(session).await?;
        for (db, keys) in session.databases().await? {
            if keys > 0 && (version.flavor == Flavor::Valkey || version.has_redis(3, 2)) {
                work.emit.expect(db, keys);
            }
            if !work.rules.admits_database(db) {
                self.progress.leave_out(keys);
            }
        }
        work.begun = true;
        self.state.send_modify(|state| {
            state.origin = Some(Origin::unnamed());
            state.snapshot_bytes = None;
        });
        // Values that are read in pieces come as commands: there may be more of them than can wait.
        if !session.abilities.dump {
            self.end_snapshot(work).await?;
            work.must_pass = true;
        }
        Ok(())
    }

    async fn end_snapshot(&self, work: &mut Work) -> Result<(), ScanError> {
        work.emit.flush().await?;
        let bytes = work.emit.written();
        work.emit.end_snapshot().await?;
        self.state.send_modify(|state| state.snapshot_bytes = Some(bytes));
        Ok(())
    }

    /// What changes from here on, for ever.
    async fn follow(&self, work: &mut Work, session: &mut Session) -> Result<Infallible, ScanError> {
        let mut asks = self.progress.asks();
        let mut next_pass = Instant::now() + REST;
        let mut next_check = Instant::now() + ALIVE;
        let mut strikes = 0;
        let changed = Arc::clone(&work.changed);
        loop {
            let asked = *asks.borrow_and_update();
            let settles = asked > self.progress.reached();
            if settles {
                // A replica may still lack what its master had written.
                session.wait_for_master(self.shard.as_ref(), &self.address).await?;
            }
            let told = match &mut session.events {
                Some(events) if settles => {
                    events.fence().await?;
                    true
                }
                events => events.is_some(),
            };
            // What was not heard costs a pass, so that it is asked for no more often than passes are made.
            let due = Instant::now() >= next_check.max(next_pass);
            if told && (settles || work.must_pass || due) {
                work.must_pass |= !session.tells_all(work).await?;
                next_check = Instant::now() + ALIVE;
            }
            let passes = work.must_pass || (!told && (settles || Instant::now() >= next_pass));
            if passes {
                let began = Instant::now();
                // One that goes on where it broke off tells nothing of what changed before that place meanwhile.
                let resumed = work.place.is_some();
                // What goes wrong from here on calls for yet another.
                let again = std::mem::take(&mut work.must_pass);
                if let Err(error) = work.pass(session).await {
                    work.must_pass |= again;
                    return Err(error);
                }
                work.must_pass |= resumed;
                next_pass = Instant::now() + (began.elapsed() * REST_FACTOR).clamp(REST, MOST_REST);
                self.progress.passed(work.changes);
            } else if settles {
                work.read_functions(session).await?;
            }
            work.read_changed(session).await?;
            work.emit.flush().await?;
            if settles {
                // Else names were lost, and only another pass finds them again.
                if !work.must_pass {
                    self.progress.reach(asked, work.emit.written());
                }
                continue;
            }
            if !changed.is_empty() {
                continue;
            }
            strikes = if self.is_elsewhere() { strikes + 1 } else { 0 };
            if strikes >= STRIKES {
                let (address, master) = (self.address.clone(), self.find().await);
                return Err(ScanError::Elsewhere(ReplicationError::Elsewhere { address, master }));
            }
            let rest = match session.events {
                Some(_) => ALIVE.min(next_check.max(next_pass).saturating_duration_since(Instant::now())),
                None => ALIVE.min(next_pass.saturating_duration_since(Instant::now())),
            };
            tokio::select! {
                _ = asks.changed() => {}
                () = changed.news.notified() => {}
                error = session.deaf() => return Err(error),
                () = tokio::time::sleep(rest) => session.stay_alive().await?,
            }
        }
    }

    /// The server that is read is not of the shard any more, as far as the watch knows.
    fn is_elsewhere(&self) -> bool {
        let at = self.shard.as_ref().and_then(SourceShard::now);
        at.is_some_and(|at| {
            at.master != self.address && !(self.prefer_replica && at.replicas.contains(&self.address))
        })
    }
}

impl Work {
    fn new(spool: SpoolWriter, rules: ScanRules, progress: Arc<ScanProgress>) -> Self {
        let stamp = rules.target.map(|target| TargetFormat::of(target).footer_version());
        Self {
            emit: Emit::new(spool, stamp, rules.target.is_some()),
            table: Table::new(),
            seed: RandomState::new(),
            names: Names::new(&rules.folder, &rules.file_name),
            changed: Arc::new(Changed::of(rules.transform.clone())),
            progress,
            first: true,
            waiting: VecDeque::new(),
            asked: 0,
            big: Vec::new(),
            functions: BTreeMap::new(),
            begun: false,
            place: None,
            must_pass: false,
            changes: 0,
            unheard: None,
            rules,
        }
    }

    /// Over all keys of all databases, from where an earlier one broke off; then what vanished.
    async fn pass(&mut self, session: &mut Session) -> Result<(), ScanError> {
        let place = match self.place.take() {
            Some(place) => place,
            None => {
                self.table.begin_pass();
                self.changes = 0;
                self.waiting.clear();
                Place { db: 0, cursor: b"0".to_vec(), run_id: session.run_id.clone() }
            }
        };
        self.place = Some(place.clone());
        for (db, _) in session.databases().await? {
            if db < place.db || !self.rules.admits_database(db) {
                continue;
            }
            let goes_on = db == place.db && place.run_id == session.run_id && !place.run_id.is_empty();
            let cursor = if goes_on { place.cursor.clone() } else { b"0".to_vec() };
            if !goes_on {
                self.waiting.clear();
            }
            self.place = Some(Place { db, cursor: cursor.clone(), run_id: session.run_id.clone() });
            self.read_database(session, db, &cursor).await?;
        }
        self.place = Some(Place { db: u32::MAX, cursor: Vec::new(), run_id: session.run_id.clone() });
        if !self.emit.in_snapshot() {
            self.read_functions(session).await?;
            self.read_big_ones(session).await?;
        }
        self.find_vanished(session).await?;
        self.place = None;
        self.first = false;
        Ok(())
    }

    /// Keys that were told to have changed.
    async fn read_changed(&mut self, session: &mut Session) -> Result<(), ScanError> {
        let (names, more) = self.changed.take();
        self.must_pass |= more;
        self.waiting.clear();
        for same in names.chunk_by(|a, b| a.0 == b.0) {
            let Some((db, _)) = same.first() else { continue };
            let keys: Vec<&[u8]> = same.iter().map(|(_, key)| key.as_ref()).collect();
            if let Err(error) = self.read_again(session, *db, &keys).await {
                // Not to be forgotten, though a pass will follow.
                self.must_pass = true;
                return Err(error);
            }
        }
        Ok(())
    }

    /// What earlier passes met, and this one did not.
    async fn find_vanished(&mut self, session: &mut Session) -> Result<(), ScanError> {
        if self.table.unseen() == 0 {
            return Ok(());
        }
        self.waiting.clear();
        let mut taken = self.names.take().await?;
        let mut failed = None;
        loop {
            let some = taken.next().await?;
            if some.is_empty() {
                break;
            }
            if failed.is_none() {
                failed = self.ask_after(session, &some).await.err();
            }
            for (db, key) in &some {
                let name = self.name(*db, key);
                // Those that nobody was asked about are kept, for the next time.
                if self.table.contains(name) && (failed.is_some() || !self.table.is_unseen(name)) {
                    self.names.push(*db, key);
                }
            }
            self.names.settle().await?;
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.table.drop_unseen();
        Ok(())
    }

    /// Are they really gone?
    async fn ask_after(&mut self, session: &mut Session, some: &[(u32, Vec<u8>)]) -> Result<(), ScanError> {
        let mut unseen: Vec<(u32, &[u8])> = Vec::new();
        for (db, key) in some {
            if self.table.is_unseen(self.name(*db, key)) {
                unseen.push((*db, key));
            }
        }
        unseen.sort_unstable();
        for same in unseen.chunk_by(|a, b| a.0 == b.0) {
            let Some((db, _)) = same.first() else { continue };
            let keys: Vec<&[u8]> = same.iter().map(|(_, key)| *key).collect();
            self.read_again(session, *db, &keys).await?;
        }
        Ok(())
    }
}
