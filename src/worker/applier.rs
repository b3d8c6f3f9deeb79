//! The applier: from spool blocks to acknowledged batches.

mod adopting;
mod connecting;
mod mending;
mod reading;
mod recopying;
mod recording;
mod releasing;
mod sending;
mod taking_up;
mod telling;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::direct::Conversations;
use super::keeper::Keeper;
use super::outbox::{Kept, Outbox, Trouble};
use super::progress::{Numbers, ShardProgress};
use super::recopy::Recopy;
use super::release::Release;
use super::route::Router;
use super::snapshot::scripted::Scripting;
use super::snapshot::{SnapshotRules, Staged};
use super::stream::{Moment, Stream, StreamPlace, StreamRules};
use super::{Feed, Stopped, WorkerError, WorkerSetup};
use crate::api::plan::ExistingKeys;
use crate::backoff::Backoff;
use crate::connection::Address;
use crate::rdb::checksum::Crc;
use crate::rdb::compat::TargetFormat;
use crate::rdb::{Decoder, Dialect, Limits};
use crate::source::replication::Acknowledged;
use crate::spool::{Next, Origin, SpoolReader};
use crate::transform::script::Runner;

/// The window is given back to the allocator when it is empty and larger than this.
const WINDOW: usize = 1 << 20;
/// A mark is set at least once in this many bytes, so that the spool can let go.
const MARK_BYTES: u64 = 256 << 10;
/// How often numbers are published while nothing else prompts it.
const PUBLISH: Duration = Duration::from_millis(100);
/// A drain gives up waiting for the target after this long; what is not acknowledged is replayed later.
const DRAIN: Duration = Duration::from_secs(8);
/// Places in the RDB that are remembered, for a target that falls back behind what it acknowledged.
const PLACES: usize = 64;

/// A place to go on from: everything before it stands on the target.
#[derive(Clone, Debug)]
struct Place {
    /// In the spool.
    position: u64,
    stage: Stage,
    keys: u64,
    /// Keys left out since this run began, as their time was over.
    expired: u64,
    /// Keys that the snapshot had announced.
    keys_total: u64,
    commands: u64,
    filtered: Filtered,
}

/// What the filter left out, counted.
#[derive(Clone, Copy, Debug, Default)]
struct Filtered {
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
    /// With `delivery: ExactlyOnce`.
    keeper: Option<Keeper>,
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
    /// Commands by then, and those behind which a record was written.
    marked_commands: u64,
    recorded_commands: u64,
    /// Of the slot map, when it was looked at last.
    slot_changes: u64,
    /// Last place that stands on the target.
    stands: Place,
    /// Places before that one, in the RDB.
    places: VecDeque<Place>,
    keys: u64,
    expired: u64,
    commands: u64,
    filtered: Filtered,
    /// Keys and commands that the pace has counted.
    paced: u64,
    /// The script, where there is one.
    script: Option<Scripting>,
    lane_addresses: Vec<Address>,
    /// Connections for what does not go through the lanes.
    conversations: Conversations,
    /// Answers that call for commands to be sent again.
    troubles: Vec<Trouble>,
    /// Why a lane ended.
    lost: Option<String>,
    /// Keys that are copied again, and slots that change hands.
    recopy: Recopy,
    /// The last order that was taken up, and how many of its keys are not reported as copied.
    ordered: (u64, u64),
    /// Up to this position an earlier attempt may have come.
    replay_until: u64,
    /// Up to this position, units of a chain go one by one: one of them is not taken.
    careful_until: u64,
    /// Where the next of them begins.
    alone_from: u64,
    /// What lies between is left out, as the target does not take it.
    left_out: Option<(u64, u64)>,
    /// What the target has was read when the shard was taken over, and nothing was sent since.
    taken_up: bool,
    /// Before anything of the full sync: what an earlier attempt left has to go.
    wipe: bool,
    /// Commands that the target does not know.
    unknown: HashSet<Vec<u8>>,
    release: Release,
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
        keeper: Option<Keeper>,
    ) -> Self {
        let target = setup.target_version;
        let limits = Limits {
            max_value: usize::try_from(setup.max_restore_bytes).unwrap_or(usize::MAX),
            ..Limits::default()
        };
        let release = Release::new(setup.feed.renews());
        let rules = SnapshotRules {
            format: TargetFormat::of(target),
            dialect: Dialect::of(target),
            set_pxat: target.has_redis(6, 2),
            existing: setup.existing_keys,
            replay: false,
            stage: setup.file_name.clone(),
            drop_expired: setup.feed.is_file(),
            databases: setup.target_databases,
            holding: release.holding(),
        };
        let stream_rules = StreamRules {
            target,
            database_map: setup.database_map.clone(),
            sole_source: setup.sole_source,
            dynamic: (*setup.dynamic).clone(),
            holding: release.holding(),
            transform: setup.transform.clone(),
            scanned: matches!(setup.feed, Feed::Scan(..)),
        };
        let decoder = Box::new(Decoder::new(limits));
        let stands = Place {
            position: 0,
            stage: Stage::Snapshot { decoder: decoder.clone(), crc: Crc::new() },
            keys: 0,
            expired: 0,
            keys_total: 0,
            commands: 0,
            filtered: Filtered::default(),
        };
        let mut outbox = Outbox::new(setup.lane.commands());
        outbox.kept = keeper
            .as_ref()
            .map(|keeper| Kept::new(keeper.fence.names().clone(), keeper.fence.epoch(), keeper.history));
        let recopy = followed(&setup, &progress, keeper.as_ref());
        let (quarantined, kinds) = progress.lacking(setup.anew);
        Self {
            recopy,
            outbox,
            router,
            reader,
            acknowledge,
            progress,
            keeper,
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
            marked_commands: 0,
            slot_changes: 0,
            recorded_commands: 0,
            stands,
            places: VecDeque::new(),
            keys: 0,
            expired: 0,
            commands: 0,
            filtered: Filtered::default(),
            paced: 0,
            script: None,
            lane_addresses: Vec::new(),
            conversations: Conversations::default(),
            troubles: Vec::new(),
            ordered: (0, 0),
            lost: None,
            replay_until: 0,
            careful_until: 0,
            alone_from: 0,
            left_out: None,
            taken_up: false,
            wipe: false,
            unknown: HashSet::new(),
            numbers: Numbers { holding: !release.is_done(), quarantined, kinds, ..Numbers::default() },
            release,
            moment: Moment { arrived: 0, now: 0 },
            published: 0,
            spans: Vec::new(),
            setup,
        }
    }

    /// Keys and commands go through this script.
    pub fn follow_script(&mut self, runner: Option<Runner>) {
        self.script = runner.map(Scripting::new);
    }

    pub async fn run(&mut self, mut drain: watch::Receiver<bool>) -> Result<Stopped, WorkerError> {
        let mut backoff = Backoff::default();
        loop {
            let before = self.outbox.done;
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
                Interrupted::Failed(error) => {
                    if self.setup.feed.is_file() {
                        self.settle_what_was_read(&error).await;
                    }
                    return Err(error);
                }
                Interrupted::Lost(why) => {
                    if self.recopy.overtaken.is_some()
                        && self.recopy.barrier.is_none()
                        && self.keeper.is_some()
                    {
                        // What is kept in the target says too much.
                        return Err(WorkerError::Overtaken { shard: self.setup.shard.clone(), why });
                    }
                    tracing::warn!(shard = %self.setup.shard, why, "target connection lost, connecting again");
                    self.numbers.target_reconnects += 1;
                    self.numbers.waiting = why;
                    self.publish();
                    if self.outbox.done > before {
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

    /// Back to the last place that stands on the target; the lanes are opened anew.
    fn rewind(&mut self) {
        self.replay_until = self.replay_until.max(self.position());
        let in_stream = matches!(self.stands.stage, Stage::Stream(_));
        // The keys of a snapshot are written again: what the stream did to them since must follow again.
        // Where the target tells what it has, that is asked for, not what was answered.
        self.outbox.rewind(in_stream && self.keeper.is_none());
        self.rules.replay = !in_stream;
        self.recopy_what_was_refused();
        self.troubles.clear();
        self.conversations = Conversations::default();
        self.lost = None;
        self.hold_again();
        self.go_on_from_stands();
    }

    fn go_on_from_stands(&mut self) {
        self.keys = self.stands.keys;
        self.expired = self.stands.expired;
        self.numbers.keys_total = self.stands.keys_total;
        self.commands = self.stands.commands;
        self.filtered = self.stands.filtered;
        self.paced = self.keys + self.commands;
        self.base = self.stands.position;
        self.marked = self.base;
        (self.marked_commands, self.recorded_commands) = (self.commands, self.commands);
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
        self.alone_from = self.base;
        self.reader.seek(self.base);
    }

    async fn work(&mut self, drain: &mut watch::Receiver<bool>) -> Result<(), Interrupted> {
        let mut publish = tokio::time::interval(PUBLISH);
        publish.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut may_drain = true;
        loop {
            self.mend().await?;
            self.tend().await?;
            self.check_truncated()?;
            if self.releases() && !*drain.borrow() {
                self.release_some().await?;
                continue;
            }
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
                asked = asked(drain), if may_drain && self.recopy.overtaken.is_none() => match asked {
                    true => {
                        self.flush().await?;
                        self.wait_idle().await?;
                        self.write_records(true).await?;
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
                    Next::Begun { origin, snapshot } => self.begin(origin, snapshot).await?,
                    Next::Block(block) => self.take_block(&block).await?,
                },
                _ = publish.tick() => {
                    self.publish();
                    self.write_records(false).await?;
                }
            }
        }
    }

    /// A new history: whatever was in progress is void. Batches under way are still answered; their
    /// keys are written again.
    async fn begin(&mut self, origin: Origin, snapshot: bool) -> Result<(), Interrupted> {
        // A history that broke off before anything was sent leaves nothing on the target.
        let again = self.outbox.batches > 0
            || self.setup.resume.is_some()
            || self.setup.restarted
            || self.setup.own_keys;
        let resumed = self.setup.resume.clone().filter(|_| !snapshot);
        let stage = self.first_stage();
        let filtered = Filtered::default();
        self.stands = Place { position: 0, stage, keys: 0, expired: 0, keys_total: 0, commands: 0, filtered };
        self.places.clear();
        self.rules.replay = false;
        self.replay_until = 0;
        self.careful_until = 0;
        self.left_out = None;
        self.stream_at = None;
        self.stream_db = 0;
        self.numbers.snapshot_read = 0;
        self.hold_again();
        self.outbox.begin();
        self.recopy.abandon(true);
        self.recopy.first = self.recopy.settled();
        for Trouble { lane, batch, .. } in std::mem::take(&mut self.troubles) {
            self.outbox.answered(lane, batch);
        }
        if let Some(checkpoint) = resumed {
            self.stream_at = Some(0);
            self.offset_shift = origin.offset;
            self.stands.stage = Stage::Stream(StreamPlace { db: checkpoint.db });
            self.acknowledge(origin.offset);
            self.origin = Some(origin);
            self.go_on_from_stands();
            return self.resume_stream().await;
        }
        self.acknowledge(0);
        (self.numbers.quarantined, self.numbers.kinds) = (0, BTreeMap::new());
        self.progress.lacks_nothing();
        if again {
            if self.setup.existing_keys == ExistingKeys::Skip {
                return Err(Interrupted::Failed(WorkerError::Target(format!(
                    "{}: the source asks for another full sync, in which existingKeys Skip cannot tell the target's own keys from those copied before; empty the target or choose Replace",
                    self.setup.shard
                ))));
            }
            self.rules.replay = true;
            self.replay_until = u64::MAX;
        }
        self.origin = Some(origin);
        self.go_on_from_stands();
        self.begin_records();
        // With Replace, the target has keys that are not ours, and which these are is not known.
        // Other files have brought theirs, and no slots tell which.
        let tells_apart = self.setup.sole_source || self.setup.slots.is_some();
        self.wipe = again && self.setup.existing_keys == ExistingKeys::Fail && tells_apart;
        self.wipe_earlier().await
    }

    fn first_stage(&self) -> Stage {
        Stage::Snapshot { decoder: Box::new(Decoder::new(self.limits)), crc: Crc::new() }
    }
}

/// Which slots are followed: what this run knows already, or else the run that is gone on with knew, as far as
/// they have not gone elsewhere since.
fn followed(setup: &WorkerSetup, progress: &ShardProgress, keeper: Option<&Keeper>) -> Recopy {
    let territory = keeper.and_then(|keeper| keeper.territory.as_ref()).filter(|_| setup.resume.is_some());
    let version = territory.map_or(0, |territory| territory.version);
    let known = progress.following.borrow().clone();
    let owned = setup.slots.as_ref().map(|slots| match (known.known, territory, &setup.serves) {
        (true, ..) => known.slots,
        (false, territory, serves) => {
            let followed = territory.map_or(slots, |territory| &territory.slots);
            serves.as_ref().map_or_else(
                || followed.clone(),
                |serves| followed.iter().filter(|slot| serves.contains(*slot)).collect(),
            )
        }
    });
    Recopy::new(owned, version)
}

/// Waits until a drain is asked for; false when nobody can ask any more.
async fn asked(drain: &mut watch::Receiver<bool>) -> bool {
    drain.wait_for(|drain| *drain).await.is_ok()
}
