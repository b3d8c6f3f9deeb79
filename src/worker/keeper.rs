//! What a shard keeps in its target so that nothing is applied twice or lost: taking it over, reading it
//! back, keeping it up to date.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::route::Router;
use super::{Checkpoint, WorkerSetup};
use crate::api::plan::ExistingKeys;
use crate::clock::unix_millis;
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::slot::SlotRanges;
use crate::target::fence::{Closing, Fence, FenceError, Held, Place};
use crate::target::keys::{KeyNames, Load, Record, RecordPlace, Standing, Territory, standing};
use crate::target::recovery::{self, NodeState, Refusals};

/// On a cluster, how old the written record may be.
const RECORD_PERIOD: Duration = Duration::from_millis(100);
/// On a single server batches carry it; this is for a stream without writes.
const IDLE_PERIOD: Duration = Duration::from_secs(1);

/// A switch for tests only.
const UNGUARDED: &str = "REDIS_MIGRATION_TEST_UNGUARDED";

#[derive(Debug, Error)]
pub enum KeeperError {
    #[error(transparent)]
    Fence(#[from] FenceError),
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(
        "the target has data, but no longer what this migration kept there: the migration was completed by another process, or its keys were removed; to copy again, empty the target first"
    )]
    Gone,
}

impl KeeperError {
    pub fn connection(&self) -> Option<&ConnectionError> {
        match self {
            Self::Connection(error) | Self::Fence(FenceError::Connection(error)) => Some(error),
            Self::Fence(_) | Self::Gone => None,
        }
    }
}

/// A node to keep something on.
#[derive(Clone, Debug)]
pub struct KeptNode {
    pub lane: usize,
    pub place: Place,
    /// `None` on a single server.
    pub slots: Option<SlotRanges>,
}

/// The nodes that hold data, the one with the lowest slot first.
pub fn nodes(router: &Router, addresses: &[Address]) -> Vec<KeptNode> {
    let Router::Slots(map) = router else {
        let node = |address: &Address| KeptNode { lane: 0, place: (address.clone(), 0), slots: None };
        return addresses.first().map(node).into_iter().collect();
    };
    let mut nodes: Vec<KeptNode> = Vec::new();
    for (lane, node) in map.nodes().iter().enumerate() {
        let slots = map.slots_of(lane);
        let first = slots.iter().next();
        if let Some(first) = first {
            nodes.push(KeptNode { lane, place: (node.address.clone(), first), slots: Some(slots) });
        }
    }
    nodes.sort_by_key(|node| node.place.1);
    nodes
}

/// What an earlier process, or an earlier connection, left.
#[derive(Debug)]
pub enum Found {
    /// Nobody was here before.
    Nothing,
    /// The stream can go on.
    Resume(Checkpoint),
    /// A full sync had come so far; with the spool of that run it can go on.
    Loading(Load),
    /// A full sync had begun, or what was kept is damaged: another full sync, over our own keys.
    Begun(&'static str),
}

#[derive(Debug)]
pub struct Keeper {
    pub fence: Arc<Fence>,
    pub history: u64,
    layout: u64,
    /// Where records are: lane and slot.
    at: Vec<(usize, u16)>,
    barrier: i64,
    recorded: Option<RecordPlace>,
    recorded_at: Instant,
    /// As found: slot, history, offset.
    pub guards: Vec<(u16, u64, i64)>,
    /// Before which there may be commands that do not stand.
    pub doubtful: bool,
    /// As the nodes of a cluster told it last.
    refusals: HashMap<Address, Refusals>,
    /// Which slots of the source were followed, as found.
    pub territory: Option<Territory>,
    /// Up to this offset an earlier process may have applied commands.
    pub replay_until: i64,
    /// Names of what the migration's other shards keep.
    siblings: Vec<KeyNames>,
    /// What is kept is written and not heeded: for a test that must see what happens then.
    pub unguarded: bool,
}

impl Keeper {
    /// Takes the shard over from whoever had it, and reads what that one left.
    /// `held`: as [`Fence::claim`] has it.
    pub async fn take(
        setup: &WorkerSetup,
        router: &Router,
        held: &Held,
    ) -> Result<(Self, Found), KeeperError> {
        let names = KeyNames::new(&setup.uid, &setup.lineage);
        let dialer = &setup.target_dialer;
        let nodes = nodes(router, &setup.target.addresses());
        let places: Vec<Place> = nodes.iter().map(|node| node.place.clone()).collect();
        let fence = Arc::new(Fence::claim(names, dialer, &places, held).await?);
        let vanished = fence.has_vanished();
        let mut state = NodeState::default();
        let mut refusals = HashMap::new();
        let mut connections = Vec::with_capacity(nodes.len());
        for node in nodes {
            let mut connection = fence.connect(dialer, &node.place, Closing::None).await?;
            let told = read_into(&mut state, &mut connection, dialer, &fence, &node).await?;
            // What earlier processes saw of it is not known.
            let since = state.guards.iter().map(|(_, history, _)| *history).max();
            state.doubtful |= told.as_ref().zip(since).is_some_and(|(told, since)| told.any_since(since));
            refusals.extend(told.map(|told| (node.place.0.clone(), told)));
            connections.push((node, connection));
        }
        let layout = state.records.iter().map(|record| record.layout).max().unwrap_or_default();
        let before = state.records.iter().map(|record| record.history).max().unwrap_or_default();
        let mut keeper = Self {
            fence,
            history: before,
            layout,
            at: Vec::new(),
            barrier: 0,
            recorded: None,
            recorded_at: Instant::now(),
            guards: Vec::new(),
            doubtful: false,
            refusals,
            territory: None,
            replay_until: 0,
            siblings: setup.siblings.iter().map(|other| KeyNames::new(&setup.uid, other)).collect(),
            unguarded: std::env::var_os(UNGUARDED).is_some_and(|value| value == "1"),
        };
        if keeper.unguarded {
            tracing::warn!("{UNGUARDED} is set: commands may be applied twice");
        }
        let single = matches!(router, Router::Single);
        // Of an earlier run that stood a record would tell; and where nothing foreign may be on the target, one goes
        // out in front of the first key.
        let first = setup.existing_keys == ExistingKeys::Fail;
        let was_here = setup.resume.is_some() || setup.restarted || setup.own_keys && first;
        if (vanished || was_here) && state.records.is_empty() {
            keeper.none_is_left(&mut connections, dialer, single).await?;
        }
        held.judged();
        let in_stream = |record: &&Record| matches!(record.place, RecordPlace::Stream { .. });
        let ahead: Vec<u64> = state.records.iter().filter(in_stream).map(|record| record.history).collect();
        let found = match keeper.stand(state, single) {
            Standing::Nothing => Found::Nothing,
            Standing::Lost(why) => Found::Begun(why),
            Standing::At(record) => match record.place {
                // That node has fallen back, or the others only just went ahead: which of them is not known.
                RecordPlace::Snapshot { .. } if ahead.contains(&record.history) => {
                    Found::Begun("one node is in the full sync, while others are past it")
                }
                RecordPlace::Snapshot { load: Some(load), .. } => Found::Loading(load),
                RecordPlace::Snapshot { load: None, .. } => Found::Begun("the full sync was not complete"),
                RecordPlace::Stream { replication_id, offset, db } => {
                    Found::Resume(Checkpoint { replication_id, offset, db })
                }
            },
        };
        Ok((keeper, found))
    }

    /// Takes in what the nodes hold.
    fn stand(&mut self, state: NodeState, single: bool) -> Standing {
        let NodeState { records, guards, territories, doubtful } = state;
        let standing = standing(&records, single);
        if let Standing::At(record) = &standing {
            self.barrier = record.barrier;
        }
        (self.guards, self.doubtful) = (guards, doubtful);
        let of_history = territories.into_iter().filter(|territory| territory.history == self.history);
        self.territory = of_history.max_by_key(|territory| territory.version);
        standing
    }

    /// Reads again, over connections that were opened anew, what stands. `acknowledged`: the target has said of
    /// something of this history that it stands.
    pub async fn read(
        &mut self,
        connections: &mut [(KeptNode, Connection)],
        dialer: &Dialer,
        single: bool,
        acknowledged: bool,
    ) -> Result<Standing, KeeperError> {
        let mut state = NodeState::default();
        for (node, connection) in connections.iter_mut() {
            let told = read_into(&mut state, connection, dialer, &self.fence, node).await?;
            if let Some(told) = told {
                let before = self.refusals.insert(node.place.0.clone(), told.clone());
                state.doubtful |= before.is_none_or(|before| told.any_after(&before));
            }
        }
        let standing = self.stand(state, single);
        if standing != Standing::Nothing {
            // Each of our batches brings a record, also to a target that lost all under an open connection; epochs
            // are not brought back.
            let lost = single && self.fence.has_vanished();
            self.fence.judged();
            return Ok(if lost { Standing::Lost("it lost all that it had") } else { standing });
        }
        // While the epoch stands, whoever removed the rest was not another process: those take it along.
        if self.fence.has_vanished() {
            self.none_is_left(connections, dialer, single).await?;
        }
        // The first record goes out with the first key, and both may have been lost on their way.
        Ok(if acknowledged || self.recorded.is_some() {
            Standing::Lost("it lost all that it had")
        } else {
            Standing::Nothing
        })
    }

    /// Of a target that has nothing of what was kept: it may be written to when it is empty, too.
    pub async fn none_is_left(
        &self,
        connections: &mut [(KeptNode, Connection)],
        dialer: &Dialer,
        single: bool,
    ) -> Result<(), KeeperError> {
        // Another shard may have found it empty first. As long as one keeps a record there, the migration is not
        // complete: a complete one's records go before its epochs, and a higher epoch ends this process.
        if !all_empty(connections, single).await? && !self.any_stands(connections, dialer).await? {
            return Err(KeeperError::Gone);
        }
        self.fence.judged();
        Ok(())
    }

    /// A record of this shard or another.
    async fn any_stands(
        &self,
        connections: &mut [(KeptNode, Connection)],
        dialer: &Dialer,
    ) -> Result<bool, ConnectionError> {
        for (node, connection) in connections {
            for names in self.siblings.iter().chain([self.fence.names()]) {
                let state = recovery::read(connection, dialer, names, node.slots.as_ref()).await?;
                if !state.records.is_empty() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// A full sync begins: all that is kept from now on belongs to it.
    pub fn begin_history(&mut self) {
        self.history = unix_millis().max(self.history + 1);
        self.barrier = 0;
        self.recorded = None;
        self.guards.clear();
    }

    /// The nodes as they are now; true when records have to be written for them.
    pub fn lay_out(&mut self, nodes: &[KeptNode]) -> bool {
        let at: Vec<(usize, u16)> = nodes.iter().map(|node| (node.lane, node.place.1)).collect();
        let changed = at != self.at;
        if changed {
            self.layout += 1;
            self.at = at;
        }
        changed
    }

    /// Lane and slot of each record.
    pub fn places(&self) -> Vec<(usize, u16)> {
        self.at.clone()
    }

    /// Commands over several slots were run up to here.
    pub fn passed_barrier(&mut self, offset: i64) {
        self.barrier = self.barrier.max(offset);
    }

    pub fn record(&self, place: RecordPlace) -> Record {
        Record {
            history: self.history,
            layout: self.layout,
            nodes: u32::try_from(self.at.len()).unwrap_or(u32::MAX),
            barrier: self.barrier,
            place,
        }
    }

    /// True when what is written lies too far behind.
    pub fn is_due(&self, place: &RecordPlace, chained: bool) -> bool {
        let period = if chained { IDLE_PERIOD } else { RECORD_PERIOD };
        self.recorded.as_ref() != Some(place) && self.recorded_at.elapsed() >= period
    }

    pub fn wrote(&mut self, place: RecordPlace) {
        self.recorded = Some(place);
        self.recorded_at = Instant::now();
    }
}

/// A completed migration leaves data, and so is none of this.
async fn all_empty(
    connections: &mut [(KeptNode, Connection)],
    single: bool,
) -> Result<bool, ConnectionError> {
    for (_, connection) in connections {
        if !recovery::is_empty(connection, single).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn read_into(
    state: &mut NodeState,
    connection: &mut Connection,
    dialer: &Dialer,
    fence: &Fence,
    node: &KeptNode,
) -> Result<Option<Refusals>, ConnectionError> {
    let found = recovery::read(connection, dialer, fence.names(), node.slots.as_ref()).await?;
    state.records.extend(found.records);
    state.guards.extend(found.guards);
    state.territories.extend(found.territories);
    // On a single server none overtakes another.
    match node.slots {
        Some(_) => Refusals::ask(connection).await.map(Some),
        None => Ok(None),
    }
}
