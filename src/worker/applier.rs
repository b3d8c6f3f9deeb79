//! The applier: from spool blocks to acknowledged batches.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::direct::Direct;
use super::outbox::{Heard, Outbox, Trouble};
use super::progress::{Numbers, Quarantined, ShardPhase, ShardProgress};
use super::repair::{Fatal, Findings, Reading, Refusal, examine};
use super::route::Router;
use super::snapshot::{Applied, KeyPlace, SnapshotRules, Staged};
use super::stream::{Barrier, Moment, Stream, StreamPlace, StreamRules, Taken};
use super::{Checkpoint, Stopped, TargetShape, WorkerError, WorkerSetup, snapshot};
use crate::api::plan::ExistingKeys;
use crate::backoff::Backoff;
use crate::clock::unix_millis;
use crate::connection::Address;
use crate::rdb::checksum::Crc;
use crate::rdb::compat::TargetFormat;
use crate::rdb::{Decoder, Dialect, Event, Limits, Step};
use crate::resp::Args;
use crate::resp::frame::{Parsed, parse_frame};
use crate::slot::SlotRanges;
use crate::source::replication::Acknowledged;
use crate::spool::{Block, Next, Origin, Part, SpoolReader};
use crate::target::lane::Lane;
use crate::topology::{Role, discover};

/// The window is given back to the allocator when it is empty and larger than this.
const WINDOW: usize = 1 << 20;
/// A mark is set at least once in this many bytes, so that the spool can let go.
const MARK_BYTES: u64 = 256 << 10;
/// How long a lost lane waits for the answers of the others.
const OTHERS: Duration = Duration::from_secs(2);
/// How often numbers are published while nothing else prompts it.
const PUBLISH: Duration = Duration::from_millis(100);
/// Refusals that are logged one by one; of more, the 2nd, 4th, 8th and so on.
const LOGGED_REFUSALS: u64 = 100;
/// A drain gives up waiting for the target after this long; what is not acknowledged is replayed later.
const DRAIN: Duration = Duration::from_secs(8);

/// A place to go on from: everything before it stands on the target.
#[derive(Clone, Debug)]
struct Place {
    /// In the spool.
    position: u64,
    stage: Stage,
    keys: u64,
    commands: u64,
}

#[expect(clippy::large_enum_variant, reason = "few live at a time, and each takes a decoder along anyway")]
#[derive(Clone, Debug)]
enum Stage {
    Snapshot { decoder: Box<Decoder>, crc: Crc },
    Stream(StreamPlace),
}

/// What the applier is in the middle of.
#[expect(clippy::large_enum_variant, reason = "one lives at a time, and every event goes through it")]
enum Work {
    Snapshot { decoder: Box<Decoder>, crc: Crc, staged: Option<Staged> },
    Stream(Stream),
}

pub(super) struct Applier {
    setup: WorkerSetup,
    router: Router,
    reader: SpoolReader,
    acknowledge: watch::Sender<Acknowledged>,
    progress: Arc<ShardProgress>,
    outbox: Outbox<Place>,
    rules: SnapshotRules,
    stream_rules: StreamRules,
    limits: Limits,
    /// Nothing is done before a history has begun.
    origin: Option<Origin>,
    work: Work,
    /// Unread bytes: `window[at..]`. The first byte of the window has spool position `base`.
    window: Vec<u8>,
    at: usize,
    base: u64,
    /// Bytes before this index of the window are in the checksum.
    summed: usize,
    /// More bytes are needed before decoding can go on.
    need: usize,
    /// Replication offset minus spool position, in the stream.
    offset_shift: i64,
    /// Where the RDB ended, once it did.
    stream_at: Option<u64>,
    /// The database in which the source's stream starts.
    stream_db: u64,
    marked: u64,
    /// Last place that stands on the target.
    stands: Place,
    keys: u64,
    commands: u64,
    lane_addresses: Vec<Address>,
    /// Answers that call for commands to be sent again.
    troubles: Vec<Trouble>,
    /// Why a lane ended.
    lost: Option<String>,
    /// Up to this position, the snapshot may meet its own keys.
    replay_until: u64,
    numbers: Numbers,
    moment: Moment,
    /// When the numbers were published last, Unix ms.
    published: u64,
    spans: Vec<crate::resp::Span>,
}

/// Why a round of work ended.
enum Interrupted {
    /// Reconnect and replay.
    Lost(String),
    Failed(WorkerError),
}

impl From<WorkerError> for Interrupted {
    fn from(error: WorkerError) -> Self {
        Self::Failed(error)
    }
}

impl Applier {
    pub fn new(
        setup: WorkerSetup,
        router: Router,
        reader: SpoolReader,
        acknowledge: watch::Sender<Acknowledged>,
        progress: Arc<ShardProgress>,
    ) -> Self {
        let target = setup.target_version;
        let limits = Limits {
            max_value: usize::try_from(setup.max_restore_bytes).unwrap_or(usize::MAX),
            ..Limits::default()
        };
        let rules = SnapshotRules {
            format: TargetFormat::of(target),
            dialect: Dialect::of(target),
            set_pxat: target.has_redis(6, 2),
            existing: setup.existing_keys,
            replay: false,
            stage: setup.file_name.clone(),
        };
        let stream_rules = StreamRules {
            target,
            database_map: setup.database_map.clone(),
            sole_source: setup.sole_source,
            dynamic: (*setup.dynamic).clone(),
        };
        let decoder = Box::new(Decoder::new(limits));
        let stands = Place {
            position: 0,
            stage: Stage::Snapshot { decoder: decoder.clone(), crc: Crc::new() },
            keys: 0,
            commands: 0,
        };
        Self {
            outbox: Outbox::new(setup.lane.commands),
            router,
            reader,
            acknowledge,
            progress,
            rules,
            stream_rules,
            limits,
            origin: None,
            work: Work::Snapshot { decoder, crc: Crc::new(), staged: None },
            window: Vec::new(),
            at: 0,
            base: 0,
            summed: 0,
            need: 1,
            offset_shift: 0,
            stream_at: None,
            stream_db: 0,
            marked: 0,
            stands,
            keys: 0,
            commands: 0,
            lane_addresses: Vec::new(),
            troubles: Vec::new(),
            lost: None,
            replay_until: 0,
            numbers: Numbers::default(),
            moment: Moment { arrived: 0, now: 0 },
            published: 0,
            spans: Vec::new(),
            setup,
        }
    }

    pub async fn run(&mut self, mut drain: watch::Receiver<bool>) -> Result<Stopped, WorkerError> {
        let mut backoff = Backoff::default();
        loop {
            let before = self.outbox.batches;
            let mut overdue = drain.clone();
            let overdue = async move {
                // An error means that nobody can ask for a drain any more.
                if !asked(&mut overdue).await {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(DRAIN).await;
            };
            let interrupted = tokio::select! {
                worked = self.connect_and_work(&mut drain) => match worked {
                    Ok(()) => return Ok(self.stopped()),
                    Err(interrupted) => interrupted,
                },
                () = overdue => return Ok(self.stopped()),
            };
            match interrupted {
                Interrupted::Failed(error) => return Err(error),
                Interrupted::Lost(why) => {
                    tracing::warn!(shard = %self.setup.shard, why, "target connection lost, connecting again");
                    self.numbers.target_reconnects += 1;
                    self.numbers.waiting = why;
                    self.publish();
                    if self.outbox.batches > before {
                        backoff.reset();
                    }
                    if *drain.borrow() {
                        return Ok(self.stopped());
                    }
                    tokio::select! {
                        () = backoff.wait() => {}
                        true = asked(&mut drain) => return Ok(self.stopped()),
                    }
                    self.rewind();
                }
            }
        }
    }

    /// Ends without an error when a drain was asked for and what was under way is answered.
    async fn connect_and_work(&mut self, drain: &mut watch::Receiver<bool>) -> Result<(), Interrupted> {
        self.connect().await?;
        self.work(drain).await
    }

    /// Opens a lane to every target node.
    async fn connect(&mut self) -> Result<(), Interrupted> {
        let dialer = self.setup.target_dialer.clone();
        if let Router::Slots(map) = &mut self.router
            && self.numbers.target_reconnects > 0
        {
            let before: Vec<Option<usize>> = SlotRanges::all().iter().map(|slot| map.owner(slot)).collect();
            map.refresh(&dialer).await.map_err(|error| Interrupted::Lost(error.to_string()))?;
            let after = SlotRanges::all();
            if after.iter().zip(&before).any(|(slot, owner)| map.owner(slot) != *owner) {
                self.outbox.apply_again();
            }
        }
        if self.numbers.target_reconnects > 0
            && let (Router::Single, TargetShape::Watched(address)) = (&self.router, &mut self.setup.target)
        {
            // The Sentinels may have promoted another server.
            let found = discover(dialer.access(), &dialer, Role::Target).await;
            let found = found.map_err(|error| Interrupted::Lost(error.to_string()))?;
            if let Some(shard) = found.shards.first() {
                *address = shard.master.address.clone();
            }
        }
        self.lane_addresses = match (&self.router, &self.setup.target) {
            (Router::Slots(map), _) => map.nodes().iter().map(|node| node.address.clone()).collect(),
            (Router::Single, TargetShape::Standalone(address) | TargetShape::Watched(address)) => {
                vec![address.clone()]
            }
            (Router::Single, TargetShape::Cluster(_)) => Vec::new(),
        };
        for index in 0..self.lane_addresses.len() {
            self.open_lane(index).await?;
        }
        self.numbers.waiting.clear();
        Ok(())
    }

    async fn open_lane(&mut self, index: usize) -> Result<(), Interrupted> {
        let Some(address) = self.lane_addresses.get(index) else { return Ok(()) };
        let connection = self.setup.target_dialer.connect(address).await.map_err(|error| {
            if error.is_transient() {
                Interrupted::Lost(error.to_string())
            } else if error.is_auth() {
                Interrupted::Failed(WorkerError::Denied(error.to_string()))
            } else {
                Interrupted::Failed(WorkerError::Target(error.to_string()))
            }
        })?;
        let lane = Lane::start(index, connection, self.setup.lane, self.outbox.reporter.clone());
        self.outbox.set_lane(index, lane);
        Ok(())
    }

    /// Back to the last place that stands on the target; the lanes are opened anew.
    fn rewind(&mut self) {
        self.replay_until = self.replay_until.max(self.position());
        let in_stream = matches!(self.stands.stage, Stage::Stream(_));
        // The keys of a snapshot are written again: what the stream did to them since must follow again.
        self.outbox.rewind(in_stream);
        self.rules.replay = !in_stream;
        self.troubles.clear();
        self.lost = None;
        self.go_on_from_stands();
        self.reader.seek(self.base);
    }

    fn go_on_from_stands(&mut self) {
        self.keys = self.stands.keys;
        self.commands = self.stands.commands;
        self.base = self.stands.position;
        self.marked = self.base;
        self.window.clear();
        self.at = 0;
        self.summed = 0;
        self.need = 1;
        self.work = match &self.stands.stage {
            Stage::Snapshot { decoder, crc } => {
                Work::Snapshot { decoder: decoder.clone(), crc: crc.clone(), staged: None }
            }
            Stage::Stream(place) => Work::Stream(Stream::at(place.clone())),
        };
    }

    async fn work(&mut self, drain: &mut watch::Receiver<bool>) -> Result<(), Interrupted> {
        let mut publish = tokio::time::interval(PUBLISH);
        publish.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut may_drain = true;
        loop {
            self.mend().await?;
            let unmarked = self.position() > self.marked && self.may_mark();
            if (unmarked || (self.outbox.has_pending() && self.may_send()))
                && self.outbox.is_quick()
                && !self.reader.is_ready()
            {
                self.flush().await?;
                continue;
            }
            if self.outbox.is_idle() {
                self.reader.starves();
            }
            tokio::select! {
                biased;
                asked = asked(drain), if may_drain => match asked {
                    true => {
                        self.flush().await?;
                        return self.wait_idle().await;
                    }
                    false => may_drain = false,
                },
                report = self.outbox.report() => {
                    let heard = self.outbox.hear(report);
                    self.hear(heard)?;
                    self.advance();
                }
                next = self.reader.next() => match next.map_err(WorkerError::from)? {
                    Next::Begun { origin, snapshot } => self.begin(origin, snapshot)?,
                    Next::Block(block) => self.take_block(&block).await?,
                },
                _ = publish.tick() => self.publish(),
            }
        }
    }

    /// A new history: whatever was in progress is void. Batches under way are still answered; their
    /// keys are written again.
    fn begin(&mut self, origin: Origin, snapshot: bool) -> Result<(), WorkerError> {
        // A history that broke off before anything was sent leaves nothing on the target.
        let again = self.outbox.batches > 0
            || self.setup.resume.is_some()
            || self.setup.restarted
            || self.setup.own_keys;
        let resumed = self.setup.resume.as_ref().filter(|_| !snapshot);
        self.stands = Place { position: 0, stage: self.first_stage(), keys: 0, commands: 0 };
        self.rules.replay = false;
        self.replay_until = 0;
        self.stream_at = None;
        self.stream_db = 0;
        self.numbers.keys_total = 0;
        self.numbers.snapshot_read = 0;
        if let Some(checkpoint) = resumed {
            self.stream_at = Some(0);
            self.offset_shift = origin.offset;
            self.stands.stage = Stage::Stream(StreamPlace { db: checkpoint.db });
            self.acknowledge(origin.offset);
        } else {
            self.acknowledge(0);
            if again {
                if self.setup.existing_keys == ExistingKeys::Skip {
                    return Err(WorkerError::Target(format!(
                        "{}: the source asks for another full sync, in which existingKeys Skip cannot tell the target's own keys from those copied before; empty the target or choose Replace",
                        self.setup.shard
                    )));
                }
                self.rules.replay = true;
                self.replay_until = u64::MAX;
            }
        }
        self.origin = Some(origin);
        self.outbox.begin();
        for Trouble { lane, batch, .. } in std::mem::take(&mut self.troubles) {
            self.outbox.answered(lane, batch);
        }
        self.go_on_from_stands();
        Ok(())
    }

    fn first_stage(&self) -> Stage {
        Stage::Snapshot { decoder: Box::new(Decoder::new(self.limits)), crc: Crc::new() }
    }

    async fn take_block(&mut self, block: &Block) -> Result<(), Interrupted> {
        if let Part::Stream { offset } = block.part {
            self.check_stream_start(block.position, offset)?;
        }
        self.compact();
        self.window.extend_from_slice(&block.bytes);
        self.moment = Moment { arrived: block.arrived, now: unix_millis() };
        if self.window.len() - self.at < self.need {
            return Ok(());
        }
        if matches!(self.work, Work::Snapshot { .. }) {
            self.decode().await?;
        }
        if matches!(self.work, Work::Stream(_)) {
            self.follow().await?;
        }
        if self.position() - self.marked >= MARK_BYTES && self.may_send() {
            self.flush().await?;
        }
        // While there is always another block at hand, the timer is never looked at.
        if u128::from(self.moment.now.saturating_sub(self.published)) >= PUBLISH.as_millis() {
            self.publish();
        }
        Ok(())
    }

    /// The stream starts where the RDB ended, neither before nor behind.
    fn check_stream_start(&self, position: u64, offset: i64) -> Result<(), WorkerError> {
        let fits = self.stream_at.is_some_and(|stream_at| position >= stream_at)
            && offset == position as i64 + self.offset_shift;
        if fits {
            return Ok(());
        }
        Err(WorkerError::SnapshotEnd {
            shard: self.setup.shard.clone(),
            position: self.stream_at.unwrap_or(self.position()),
            what: "starts the command stream at another place",
        })
    }

    /// Drops what was read from the window. The checksum takes it along, many bytes at a time.
    fn compact(&mut self) {
        if self.at == 0 {
            return;
        }
        if let Work::Snapshot { crc, .. } = &mut self.work {
            crc.update(self.window.get(self.summed..self.at).unwrap_or_default());
        }
        self.base += self.at as u64;
        let left = self.window.len() - self.at;
        self.window.copy_within(self.at.., 0);
        self.window.truncate(left);
        if left < WINDOW && self.window.capacity() > 4 * WINDOW {
            self.window.shrink_to(WINDOW);
        }
        self.at = 0;
        self.summed = 0;
    }

    /// Decodes the RDB bytes at hand.
    async fn decode(&mut self) -> Result<(), Interrupted> {
        loop {
            let Work::Snapshot { decoder, crc, staged } = &mut self.work else { return Ok(()) };
            let (db, flavor) = (decoder.db(), decoder.flavor());
            let input = self.window.get(self.at..).unwrap_or_default();
            let shard = &self.setup.shard;
            let step =
                decoder.next(input).map_err(|source| WorkerError::Rdb { shard: shard.clone(), source })?;
            let (consumed, event) = match step {
                Step::NeedMore { at_least } => {
                    self.need = at_least.max(input.len() + 1);
                    let missing = self.need - input.len();
                    if missing > WINDOW {
                        self.window.reserve_exact(missing);
                    }
                    return Ok(());
                }
                Step::Event { consumed, event } => (consumed, event),
            };
            self.need = 1;
            match event {
                Event::End { crc: stored } => {
                    let covered = self.at + consumed.min(1);
                    crc.update(self.window.get(self.summed..covered).unwrap_or_default());
                    let computed = crc.value();
                    if let Some(stored) = stored.filter(|&stored| stored != computed) {
                        let shard = shard.clone();
                        return Err(WorkerError::Checksum { shard, computed, stored }.into());
                    }
                    self.at += consumed;
                    self.summed = self.at;
                    return Ok(self.end_snapshot()?);
                }
                Event::ResizeDb { keys, .. } => self.numbers.keys_total += keys,
                Event::Aux { key: b"repl-stream-db", value } => {
                    self.stream_db =
                        std::str::from_utf8(value).ok().and_then(|db| db.parse().ok()).unwrap_or(0);
                }
                _ => {}
            }
            if self.rules.replay && self.base + self.at as u64 >= self.replay_until {
                self.rules.replay = false;
            }
            let db = self.setup.database_map.get(&db).copied().unwrap_or(db);
            let at = KeyPlace { db, flavor, now_ms: self.moment.now };
            let applied = snapshot::apply(&event, at, &self.rules, &self.router, staged, &mut self.outbox);
            self.at += consumed;
            match applied {
                Applied::Nothing | Applied::Broadcast | Applied::Part { done: false, .. } => {}
                Applied::Key(_) | Applied::Part { done: true, .. } => self.keys += 1,
                Applied::Refused { key, why } => {
                    self.refuse(db, Refusal { command: "RESTORE".to_owned(), key, error: why })?;
                }
            }
            self.send_full().await?;
        }
    }

    fn end_snapshot(&mut self) -> Result<(), WorkerError> {
        let origin = self.origin.as_ref().map_or(0, |origin| origin.offset);
        let position = self.position();
        self.offset_shift = origin - position as i64;
        self.stream_at = Some(position);
        self.work = Work::Stream(Stream::at(StreamPlace { db: self.stream_db }));
        if self.window.len() > self.at {
            return Err(WorkerError::SnapshotEnd {
                shard: self.setup.shard.clone(),
                position,
                what: "sent more bytes as part of it",
            });
        }
        Ok(())
    }

    /// Takes the commands at hand.
    async fn follow(&mut self) -> Result<(), Interrupted> {
        loop {
            let input = self.window.get(self.at..).unwrap_or_default();
            let parsed = parse_frame(input, &mut self.spans).map_err(|source| WorkerError::Stream {
                shard: self.setup.shard.clone(),
                offset: self.offset(),
                source,
            })?;
            let length = match parsed {
                Parsed::NeedMore(more) => {
                    self.need = input.len() + more;
                    if more > WINDOW {
                        self.window.reserve_exact(more);
                    }
                    return Ok(());
                }
                Parsed::Blank(length) => {
                    self.at += length;
                    continue;
                }
                Parsed::Command(length) => length,
            };
            self.need = 1;
            let Work::Stream(stream) = &mut self.work else { return Ok(()) };
            let frame = input.get(..length).unwrap_or_default();
            let end = self.base + (self.at + length) as u64;
            let args = Args { frame, spans: &self.spans };
            let taken =
                stream.take(&args, end, self.moment, &self.stream_rules, &self.router, &mut self.outbox);
            self.at += length;
            match taken {
                Taken::Done { commands } => self.commands += u64::from(commands),
                Taken::Barrier(barrier) => self.run_alone(*barrier).await?,
                Taken::Refused { command, key, why } => {
                    let db = self.source_db();
                    self.refuse(db, Refusal { command, key, error: why })?;
                }
            }
            self.send_full().await?;
        }
    }

    fn source_db(&self) -> u64 {
        match &self.work {
            Work::Stream(stream) => stream.place.db,
            Work::Snapshot { decoder, .. } => decoder.db(),
        }
    }

    /// Runs what cannot go through the lanes, with nothing else under way.
    async fn run_alone(&mut self, barrier: Barrier) -> Result<(), Interrupted> {
        self.send_all().await?;
        self.wait_idle().await?;
        let addresses = self.lane_addresses.clone();
        let refused = {
            let (numbers, progress) = (&mut self.numbers, &self.progress);
            let mut waiting = |why: &str| tell(numbers, progress, why);
            let dialer = &self.setup.target_dialer;
            let mut direct = Direct::new(dialer, &mut self.router, addresses, &mut waiting);
            direct.parts(barrier.db, &barrier.parts).await
        };
        let refused = refused.map_err(|error| WorkerError::Target(error.to_string()))?;
        self.numbers.waiting.clear();
        self.commands += u64::from(barrier.commands);
        for refusal in refused {
            self.refuse(barrier.db, refusal)?;
        }
        self.open_new_lanes().await?;
        // So that a replay does not run it again.
        self.flush().await
    }

    async fn send_full(&mut self) -> Result<(), Interrupted> {
        while let Some(lane) = self.outbox.full() {
            if !self.may_send() {
                return Ok(());
            }
            self.send(lane).await?;
            // Commands met a moving slot: nothing may overtake them.
            self.mend().await?;
        }
        Ok(())
    }

    /// Sends what is pending, and marks the place when nothing is half done.
    async fn flush(&mut self) -> Result<(), Interrupted> {
        if !self.may_send() {
            return Ok(());
        }
        self.send_all().await?;
        if self.may_mark() && self.position() > self.marked {
            self.marked = self.position();
            let place = self.place();
            self.outbox.mark(place);
            self.advance();
        }
        Ok(())
    }

    async fn send_all(&mut self) -> Result<(), Interrupted> {
        for lane in 0..self.outbox.lanes() {
            self.send(lane).await?;
        }
        Ok(())
    }

    async fn send(&mut self, lane: usize) -> Result<(), Interrupted> {
        let Some(batch) = self.outbox.take_batch(lane, self.position()) else { return Ok(()) };
        self.numbers.sent_bytes += batch.bytes.len() as u64;
        let mut heard = Vec::new();
        let sent = self.outbox.send(lane, batch, &mut heard).await;
        for what in heard {
            self.hear(what)?;
        }
        self.advance();
        if !sent && self.lost.is_none() {
            self.lost = Some("a lane ended".to_owned());
        }
        self.check_lost().await
    }

    fn hear(&mut self, heard: Heard) -> Result<(), WorkerError> {
        match heard {
            Heard::Fine => {}
            Heard::Lost { error, .. } => self.lost = Some(error.to_string()),
            Heard::Trouble(trouble) => {
                let findings = self.examine(&trouble);
                if findings.retry.is_empty() {
                    self.settle_findings(&trouble, findings)?;
                    self.outbox.answered(trouble.lane, trouble.batch);
                } else {
                    self.troubles.push(trouble);
                }
            }
        }
        Ok(())
    }

    fn examine(&self, trouble: &Trouble) -> Findings {
        let reading = Reading {
            snapshot: matches!(self.stands.stage, Stage::Snapshot { .. }),
            replay: self.rules.replay,
        };
        examine(trouble, reading)
    }

    fn settle_findings(&mut self, trouble: &Trouble, findings: Findings) -> Result<(), WorkerError> {
        let Findings { retry: _, refused, existing, fatal } = findings;
        if let Some(fatal) = fatal {
            let address = self.lane_addresses.get(trouble.lane).map(ToString::to_string).unwrap_or_default();
            return Err(match fatal {
                Fatal::Denied(text) => WorkerError::Denied(format!(
                    "{address}: {text}; give the target user the permissions that the README lists"
                )),
                Fatal::NoDatabase { db, error } => WorkerError::Target(format!(
                    "{address}: no database {db}: {error}; give the target more databases or set databaseMap"
                )),
            });
        }
        if let Some(key) = existing.first()
            && self.setup.existing_keys == ExistingKeys::Fail
        {
            return Err(WorkerError::KeyExists { key: String::from_utf8_lossy(key).into_owned() });
        }
        self.numbers.keys_skipped += existing.len() as u64;
        for refusal in refused {
            self.refuse(trouble.batch.db.unwrap_or_default(), refusal)?;
        }
        Ok(())
    }

    /// When commands have to be sent again: waits until nothing is under way, sends them, goes on.
    async fn mend(&mut self) -> Result<(), Interrupted> {
        self.check_lost().await?;
        if self.troubles.is_empty() {
            return Ok(());
        }
        self.wait_answers().await?;
        let mut troubles = std::mem::take(&mut self.troubles);
        troubles.sort_by_key(|trouble| (trouble.lane, trouble.batch.sequence));
        for trouble in troubles {
            let mut findings = self.examine(&trouble);
            let units = std::mem::take(&mut findings.retry);
            self.settle_findings(&trouble, findings)?;
            let addresses = self.lane_addresses.clone();
            let (numbers, progress) = (&mut self.numbers, &self.progress);
            let mut waiting = |why: &str| tell(numbers, progress, why);
            let mut direct =
                Direct::new(&self.setup.target_dialer, &mut self.router, addresses, &mut waiting);
            let mut refused = Vec::new();
            for unit in &units {
                tracing::debug!(error = %unit.error, "sent again");
                let answer = direct.retry(unit).await;
                refused.extend(answer.map_err(|error| WorkerError::Target(error.to_string()))?);
            }
            self.numbers.waiting.clear();
            for refusal in refused {
                self.refuse(trouble.batch.db.unwrap_or_default(), refusal)?;
            }
            self.outbox.answered(trouble.lane, trouble.batch);
        }
        self.open_new_lanes().await?;
        self.advance();
        Ok(())
    }

    /// A redirection may have named a node that had no lane.
    async fn open_new_lanes(&mut self) -> Result<(), Interrupted> {
        let Router::Slots(map) = &self.router else { return Ok(()) };
        let nodes = map.nodes().iter().map(|node| node.address.clone());
        self.lane_addresses = nodes.collect();
        for index in self.outbox.lanes()..self.lane_addresses.len() {
            self.open_lane(index).await?;
        }
        Ok(())
    }

    /// Until every batch is answered, and what the answers ask for is done.
    async fn wait_idle(&mut self) -> Result<(), Interrupted> {
        self.wait_answers().await?;
        Box::pin(self.mend()).await?;
        self.advance();
        Ok(())
    }

    async fn wait_answers(&mut self) -> Result<(), Interrupted> {
        while !self.outbox.is_idle() {
            let report = self.outbox.report().await;
            let heard = self.outbox.hear(report);
            self.hear(heard)?;
            if self.lost.is_some() {
                return self.check_lost().await;
            }
        }
        Ok(())
    }

    /// With a lane lost, waits shortly for the answers of the others: what they have need not be replayed.
    async fn check_lost(&mut self) -> Result<(), Interrupted> {
        let Some(why) = self.lost.clone() else { return Ok(()) };
        let others = async {
            while !self.outbox.is_idle() {
                let report = self.outbox.report().await;
                let heard = self.outbox.hear(report);
                self.hear(heard)?;
            }
            Ok::<(), WorkerError>(())
        };
        match tokio::time::timeout(OTHERS, others).await {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Err(Interrupted::Lost(why)),
        }
    }

    /// Takes note of what stands on the target by now.
    fn advance(&mut self) {
        let Some(place) = self.outbox.reached() else { return };
        self.reader.applied(place.position);
        if let Stage::Stream(_) = place.stage {
            let first = matches!(self.stands.stage, Stage::Snapshot { .. });
            self.acknowledge(place.position as i64 + self.offset_shift);
            self.stands = place;
            if first {
                self.publish();
            }
        } else {
            self.stands = place;
        }
    }

    fn acknowledge(&self, offset: i64) {
        self.acknowledge.send_replace(Acknowledged { history: self.reader.history(), offset });
    }

    fn refuse(&mut self, db: u64, refusal: Refusal) -> Result<(), WorkerError> {
        self.numbers.quarantined += 1;
        let count = self.numbers.quarantined;
        let last = format!("{}: {}", refusal.command, refusal.error);
        if count <= LOGGED_REFUSALS || count.is_power_of_two() {
            tracing::warn!(
                shard = %self.setup.shard, count, command = %refusal.command, error = %refusal.error,
                key = %String::from_utf8_lossy(&refusal.key), "set aside: the target does not take it"
            );
        }
        self.progress.quarantine(Quarantined { offset: self.offset(), db, refusal });
        if count > self.setup.max_quarantined {
            return Err(WorkerError::TooManyRefused { shard: self.setup.shard.clone(), count, last });
        }
        Ok(())
    }

    fn position(&self) -> u64 {
        self.base + self.at as u64
    }

    /// Replication offset of the current position; 0 in the snapshot.
    fn offset(&self) -> i64 {
        match self.work {
            Work::Snapshot { .. } => 0,
            Work::Stream(_) => self.position() as i64 + self.offset_shift,
        }
    }

    /// On a single target a transaction goes through as it comes, so that a batch must not end inside.
    fn may_send(&self) -> bool {
        match &self.work {
            Work::Snapshot { .. } => true,
            Work::Stream(stream) => self.router.is_cluster() || stream.may_part(),
        }
    }

    fn may_mark(&self) -> bool {
        match &self.work {
            Work::Snapshot { staged, .. } => staged.is_none(),
            Work::Stream(stream) => !stream.in_transaction(),
        }
    }

    fn place(&mut self) -> Place {
        let position = self.position();
        let stage = match &mut self.work {
            Work::Snapshot { decoder, crc, .. } => {
                crc.update(self.window.get(self.summed..self.at).unwrap_or_default());
                self.summed = self.at;
                Stage::Snapshot { decoder: decoder.clone(), crc: crc.clone() }
            }
            Work::Stream(stream) => Stage::Stream(stream.place.clone()),
        };
        Place { position, stage, keys: self.keys, commands: self.commands }
    }

    /// Where things stand, for another run.
    pub fn stopped(&mut self) -> Stopped {
        self.publish();
        let checkpoint = match (&self.stands.stage, &self.origin) {
            (Stage::Stream(place), Some(origin)) if !origin.is_unnamed() => Some(Checkpoint {
                replication_id: self.replication_id(),
                offset: self.stands.position as i64 + self.offset_shift,
                db: place.db,
            }),
            // Nothing has begun: an earlier run's place is still the one to go on from.
            (_, None) => self.setup.resume.clone(),
            _ => None,
        };
        Stopped { checkpoint }
    }

    /// Of the history that the applier is in, which the link may have left already, or renamed.
    fn replication_id(&self) -> String {
        let begun = || self.origin.as_ref().map(|origin| origin.replication_id.clone());
        self.reader.replication_id().or_else(begun).unwrap_or_default()
    }

    fn publish(&mut self) {
        let spool = self.reader.gauges();
        let replication_id = self.replication_id();
        let numbers = &mut self.numbers;
        numbers.keys = self.stands.keys;
        numbers.commands = self.stands.commands;
        numbers.batches = self.outbox.batches;
        numbers.spool_memory = spool.memory_bytes;
        numbers.spool_disk = spool.disk_bytes;
        numbers.spool_full = spool.full;
        numbers.why_full = spool.why_full;
        numbers.replication_id = replication_id;
        numbers.snapshot_read = self.stream_at.unwrap_or(self.base + self.at as u64);
        numbers.phase = match (&self.stands.stage, &self.origin) {
            (_, None) => ShardPhase::Pending,
            (Stage::Snapshot { .. }, _) => ShardPhase::FullSync,
            (Stage::Stream(_), _) => ShardPhase::IncrementalSync,
        };
        numbers.lag_bytes = spool.end.saturating_sub(self.stands.position);
        numbers.lag_millis = match self.reader.arrived(self.stands.position) {
            Some(arrived) if numbers.lag_bytes > 0 => unix_millis().saturating_sub(arrived),
            _ => 0,
        };
        if let Stage::Stream(_) = self.stands.stage {
            numbers.applied_offset = self.stands.position as i64 + self.offset_shift;
            numbers.received_offset = spool.end as i64 + self.offset_shift;
        } else {
            numbers.applied_offset = 0;
            numbers.received_offset = 0;
        }
        self.progress.numbers.send_replace(numbers.clone());
        self.published = self.moment.now;
    }
}

/// Waits until a drain is asked for; false when nobody can ask any more.
async fn asked(drain: &mut watch::Receiver<bool>) -> bool {
    drain.wait_for(|drain| *drain).await.is_ok()
}

/// Publishes what a command waits for, while the applier waits with it.
fn tell(numbers: &mut Numbers, progress: &ShardProgress, why: &str) {
    if numbers.waiting != why {
        tracing::warn!(why, "the target makes us wait");
        numbers.waiting = why.to_owned();
        progress.numbers.send_replace(numbers.clone());
    }
}
