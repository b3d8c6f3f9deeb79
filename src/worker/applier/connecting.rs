//! Lanes to the target, and what the target tells of where it stands.

use std::time::Instant;

use super::{Applier, Interrupted, Stage};
use crate::connection::{Connection, ConnectionError};
use crate::slot::SlotRanges;
use crate::target::fence::Closing;
use crate::target::keys::{Record, RecordPlace, Standing};
use crate::target::lane::Lane;
use crate::target::wipe::wipe;
use crate::topology::{Role, discover};
use crate::worker::keeper::{self, KeeperError, KeptNode};
use crate::worker::outbox::Trouble;
use crate::worker::route::Router;
use crate::worker::stream::StreamPlace;
use crate::worker::{TargetShape, WorkerError};

/// A wipe of a cluster ends with so many looks at all nodes that find nothing.
const CLEAN_PASSES: u32 = 2;
/// Of looks in all: a node that keeps keys of a slot which is not its own any more would be looked at for ever.
const MOST_PASSES: u32 = 20;

impl Applier {
    /// Opens a lane to every target node that serves slots, and goes on from where the target stands.
    pub(super) async fn connect(&mut self) -> Result<(), Interrupted> {
        let dialer = self.setup.target_dialer.clone();
        let again = self.numbers.target_reconnects > 0;
        if let Router::Slots(map) = &mut self.router
            && again
        {
            map.refresh(&dialer).await.map_err(|error| Interrupted::Lost(error.to_string()))?;
        }
        self.note_slot_changes();
        if again
            && let (Router::Single, TargetShape::Watched(address)) = (&self.router, &mut self.setup.target)
        {
            // The Sentinels may have promoted another server.
            let found = discover(dialer.access(), &dialer, Role::Target).await;
            let found = found.map_err(|error| Interrupted::Lost(error.to_string()))?;
            if let Some(shard) = found.shards.first() {
                *address = shard.master.address.clone();
            }
        }
        self.lane_addresses = match &self.router {
            Router::Slots(map) => map.nodes().iter().map(|node| node.address.clone()).collect(),
            Router::Single => self.setup.target.addresses(),
        };
        let nodes = keeper::nodes(&self.router, &self.lane_addresses);
        let mut connections = Vec::with_capacity(nodes.len());
        let mut closing = Closing::None;
        if let Some(keeper) = &self.keeper {
            closing = Closing::Before(keeper.fence.floor());
            keeper.fence.look_anew();
        }
        for node in nodes {
            let connection = self.dial(&node, closing).await?;
            connections.push((node, connection));
        }
        self.outbox.reserve_lanes(self.lane_addresses.len());
        self.recover(&mut connections, again).await?;
        for (node, connection) in connections {
            self.start_lane(node.lane, connection);
        }
        self.numbers.waiting.clear();
        if self.origin.is_some() && matches!(self.stands.stage, Stage::Stream(_)) {
            self.enter_stream().await?;
        }
        self.wipe_earlier().await
    }

    /// Before a repeated full sync, removes what the one before brought; its record goes first, so that
    /// nobody goes on from what is half gone.
    pub(super) async fn wipe_earlier(&mut self) -> Result<(), Interrupted> {
        if !self.wipe {
            return Ok(());
        }
        self.send_all().await?;
        self.wait_answers().await?;
        for Trouble { lane, batch, exceptions } in std::mem::take(&mut self.troubles) {
            // Of the history that is over, nothing matters; of the records, all.
            if let Some(exception) = exceptions.first() {
                return Err(Interrupted::Lost(exception.to_string()));
            }
            self.outbox.answered(lane, batch);
        }
        let renames = self.setup.transform.as_ref().is_some_and(|transform| transform.renames());
        if renames && !self.setup.sole_source {
            return Err(Interrupted::Failed(WorkerError::Target(format!(
                "{}: a full sync has to be repeated, and which keys the one before brought cannot be told, as filter.lua names keys and other shards feed the target, too; empty the target and start again",
                self.setup.shard
            ))));
        }
        let nodes = keeper::nodes(&self.router, &self.lane_addresses);
        let owned = self.recopy.settled();
        let slots = owned.as_ref().filter(|_| !self.setup.sole_source);
        // A key of a slot on the move goes from a node that is still to be looked at to one that was: what is met
        // again and again until nothing is was not missed.
        let most = if self.router.is_cluster() { MOST_PASSES } else { 1 };
        let (mut removed, mut clean) = (0, 0);
        for _ in 0..most {
            let found = self.wipe_nodes(&nodes, slots).await?;
            removed += found;
            clean = if found == 0 { clean + 1 } else { 0 };
            if clean == CLEAN_PASSES {
                break;
            }
        }
        if self.router.is_cluster() && clean < CLEAN_PASSES {
            tracing::warn!(shard = %self.setup.shard, "nodes of the target hold keys of slots that are not theirs; they stay");
        }
        tracing::info!(shard = %self.setup.shard, keys = removed, "removed what the full sync before had brought");
        self.wipe = false;
        Ok(())
    }

    /// One look at all nodes: how many keys were removed.
    async fn wipe_nodes(&self, nodes: &[KeptNode], slots: Option<&SlotRanges>) -> Result<u64, Interrupted> {
        let claims = |db, key: &[u8]| {
            let transform = self.setup.transform.as_ref();
            transform.is_none_or(|transform| transform.claims(&self.setup.database_map, db, key))
        };
        let mut removed = 0;
        for node in nodes {
            let mut connection = self.dial(node, Closing::None).await?;
            let wiped = wipe(&mut connection, slots, claims, self.setup.target_version).await;
            removed += wiped.map_err(|error| unconnected(&error))?;
        }
        Ok(removed)
    }

    /// A connection that may write, fenced where that is asked for.
    pub(super) async fn dial(&self, node: &KeptNode, closing: Closing) -> Result<Connection, Interrupted> {
        let dialer = &self.setup.target_dialer;
        match &self.keeper {
            Some(keeper) => {
                let connected = keeper.fence.connect(dialer, &node.place, closing).await;
                connected.map_err(|error| unkept(error.into()))
            }
            None => dialer.connect(&node.place.0).await.map_err(|error| unconnected(&error)),
        }
    }

    fn start_lane(&mut self, index: usize, connection: Connection) {
        let lane = Lane::start(index, connection, self.setup.lane.clone(), self.outbox.reporter.clone());
        self.outbox.set_lane(index, lane);
    }

    /// A lane that has applied everything up to some place had it from the slots that were its node's then. What was
    /// refused where a slot was before must not be taken for applied where it is now.
    pub(super) fn note_slot_changes(&mut self) {
        let Router::Slots(map) = &self.router else { return };
        if map.changes() != self.slot_changes {
            self.slot_changes = map.changes();
            self.outbox.apply_again();
        }
    }

    /// A redirection may have named a node that had no lane.
    pub(super) async fn open_new_lanes(&mut self) -> Result<(), Interrupted> {
        self.note_slot_changes();
        let Router::Slots(map) = &self.router else { return Ok(()) };
        self.lane_addresses = map.nodes().iter().map(|node| node.address.clone()).collect();
        self.outbox.reserve_lanes(self.lane_addresses.len());
        let nodes = keeper::nodes(&self.router, &self.lane_addresses);
        for node in &nodes {
            if self.outbox.has_lane(node.lane) {
                continue;
            }
            let connection = self.dial(node, Closing::None).await?;
            self.start_lane(node.lane, connection);
        }
        if self.keeper.as_mut().is_some_and(|keeper| keeper.lay_out(&nodes)) {
            self.write_records(true).await?;
        }
        Ok(())
    }

    /// Asks the target where it stands, and goes there. `again`: a connection was lost since the shard was taken over.
    async fn recover(
        &mut self,
        connections: &mut [(KeptNode, Connection)],
        again: bool,
    ) -> Result<(), Interrupted> {
        let single = matches!(self.router, Router::Single);
        let dialer = self.setup.target_dialer.clone();
        let Some(keeper) = &mut self.keeper else { return Ok(()) };
        let nodes: Vec<KeptNode> = connections.iter().map(|(node, _)| node.clone()).collect();
        keeper.lay_out(&nodes);
        // Before a history has begun, what was read when the shard was taken over counts.
        if self.origin.is_none() {
            if keeper.fence.has_vanished() {
                keeper.none_is_left(connections, &dialer, single).await.map_err(unkept)?;
            }
            return match &self.setup.resume {
                // What was read may be gone by now, in part: it is to be taken over once more.
                Some(checkpoint) if again => Err(Interrupted::Failed(WorkerError::FellBack {
                    shard: self.setup.shard.clone(),
                    offset: checkpoint.offset,
                })),
                _ => Ok(()),
            };
        }
        if std::mem::take(&mut self.taken_up) && !again {
            if matches!(self.stands.stage, Stage::Stream(_)) {
                self.take_guards();
            }
            return Ok(());
        }
        let acknowledged = self.stands.keys > 0 || matches!(self.stands.stage, Stage::Stream(_));
        let standing = keeper.read(connections, &dialer, single, acknowledged).await.map_err(unkept)?;
        let history = keeper.history;
        self.recopy.fall_back(keeper.territory.as_ref().map(|territory| &territory.slots));
        match standing {
            // Nothing of this history was written yet.
            Standing::Nothing => self.go_back_to_start(),
            Standing::At(record) if record.history != history => self.go_back_to_start(),
            Standing::At(record) => self.go_to(*record),
            Standing::Lost(why) => Err(self.fallen_back(why)),
        }
    }

    fn go_back_to_start(&mut self) -> Result<(), Interrupted> {
        if self.stands.position > 0 || matches!(self.stands.stage, Stage::Stream(_)) {
            return Err(self.fallen_back("its record is older than this full sync"));
        }
        self.begin_records();
        Ok(())
    }

    /// Goes on behind what `record` says, which may be ahead of or behind what was acknowledged.
    fn go_to(&mut self, record: Record) -> Result<(), Interrupted> {
        match (record.place, &self.stands.stage) {
            (RecordPlace::Stream { offset, db, .. }, Stage::Stream(_)) => {
                let position = u64::try_from(offset - self.offset_shift).unwrap_or_default();
                if position < self.reader.oldest() {
                    // The source's backlog may still have it.
                    return Err(Interrupted::Failed(WorkerError::FellBack {
                        shard: self.setup.shard.clone(),
                        offset,
                    }));
                }
                let heeded = self.keeper.as_ref().is_some_and(|keeper| !keeper.unguarded);
                if position != self.stands.position && heeded {
                    self.stands.position = position;
                    self.stands.stage = Stage::Stream(StreamPlace { db });
                    self.go_on_from_stands();
                }
                self.take_guards();
                Ok(())
            }
            (RecordPlace::Snapshot { position, .. }, Stage::Snapshot { .. }) => {
                if position < self.stands.position {
                    let place = self.places.iter().rev().find(|place| place.position <= position).cloned();
                    // Nothing is kept of a place that was left long ago.
                    let Some(place) = place.filter(|place| place.position >= self.reader.oldest()) else {
                        return Err(self.fallen_back("keys of the full sync were lost with it"));
                    };
                    self.stands = place;
                    self.go_on_from_stands();
                }
                Ok(())
            }
            // It had come further than its last answer told.
            (RecordPlace::Stream { .. }, Stage::Snapshot { .. }) => Ok(()),
            (RecordPlace::Snapshot { .. }, Stage::Stream(_)) => {
                Err(self.fallen_back("keys of the full sync were lost with it"))
            }
        }
    }

    fn fallen_back(&self, why: &'static str) -> Interrupted {
        Interrupted::Failed(WorkerError::LostState { shard: self.setup.shard.clone(), why })
    }

    /// Commands that stand already are skipped from now on.
    pub(super) fn take_guards(&mut self) {
        let (Some(keeper), Some(kept)) = (&self.keeper, &mut self.outbox.kept) else { return };
        kept.shift = self.offset_shift;
        kept.history = keeper.history;
        kept.set_guards(if keeper.unguarded { &[] } else { &keeper.guards }, keeper.doubtful);
    }

    /// The stream of an earlier process goes on.
    pub(super) async fn resume_stream(&mut self) -> Result<(), Interrupted> {
        self.take_guards();
        self.replay_from_keeper();
        self.enter_stream().await
    }

    /// How far an earlier process may have come.
    pub(super) fn replay_from_keeper(&mut self) {
        if let Some(keeper) = &self.keeper {
            let behind = keeper.replay_until.saturating_sub(self.offset_shift);
            self.replay_until = u64::try_from(behind).unwrap_or_default();
        }
    }

    /// With the stream, a single server gets its chain; a cluster the records of its nodes as they are now.
    ///
    /// Nothing of the stream goes out before every node has all of the snapshot, and says so: keys that are
    /// sent once more would undo what the stream did to them.
    pub(super) async fn enter_stream(&mut self) -> Result<(), Interrupted> {
        let Some(kept) = &mut self.outbox.kept else { return Ok(()) };
        kept.shift = self.offset_shift;
        self.flush().await?;
        self.wait_idle().await?;
        if matches!(self.router, Router::Single) {
            self.outbox.start_chain();
            let Some(batch) = self.outbox.take_batch(0, self.position(), b"") else { return Ok(()) };
            self.send_batch(0, batch).await?;
            // Without its tokens the chain holds nothing.
            self.wait_answers().await?;
            let refused = self.troubles.iter().find_map(|trouble| trouble.exceptions.first());
            if let Some(exception) = refused {
                return Err(Interrupted::Lost(exception.to_string()));
            }
        }
        if let (Some(barrier), Some(keeper)) = (self.recopy.barrier.take(), &mut self.keeper) {
            keeper.passed_barrier(barrier);
        }
        self.recopy.overtaken = self.recopy.overtaken.map(|_| Instant::now());
        self.recopy.untold = true;
        self.write_records(true).await?;
        self.wait_idle().await?;
        self.publish();
        Ok(())
    }
}

pub(super) fn unconnected(error: &ConnectionError) -> Interrupted {
    if error.is_transient() {
        Interrupted::Lost(error.to_string())
    } else if error.is_auth() {
        Interrupted::Failed(WorkerError::Denied(error.to_string()))
    } else {
        Interrupted::Failed(WorkerError::Target(error.to_string()))
    }
}

pub(super) fn unkept(error: KeeperError) -> Interrupted {
    match error.connection() {
        Some(error) => unconnected(error),
        None => Interrupted::Failed(WorkerError::Fenced(error.to_string())),
    }
}
