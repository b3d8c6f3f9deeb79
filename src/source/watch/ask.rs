//! The asking: Sentinels, cluster nodes, or the endpoints of the manifest.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::join_all;

use super::Whereabouts;
use super::cluster_view::{ClusterView, Family, usable};
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::Reply;
use crate::slot::SlotRanges;
use crate::topology::{
    ClusterNode, Opinion, Role, ServerInfo, ServerRole, Topology, TopologyKind, cluster_nodes, opinion,
    read_info, replicas_of, server_info,
};

/// Nodes of a cluster asked in one look, beside the masters that are followed: so many words suffice to
/// outvote a node that is cut off.
const WITNESSES: usize = 4;
/// Masters asked in one look; of more, all in turn.
const MASTERS: usize = 16;
/// Nodes kept in mind. More than this are hardly all needed to find one that answers.
const KNOWN: usize = 1024;
/// Asked at once when none of the others answered.
const LAST_RESORT: usize = 64;

pub struct Found {
    pub shards: Vec<Whereabouts>,
    /// Empty when something was found.
    pub failure: String,
}

pub struct Asker {
    dialer: Dialer,
    kind: Kind,
    replicas: bool,
    /// Open connections, to Sentinels or to nodes.
    connections: HashMap<Address, Connection>,
}

enum Kind {
    Standalone { now: Whereabouts, history: Arc<Mutex<String>> },
    Sentinel { now: Whereabouts },
    Cluster { families: Vec<Family>, known: Vec<Address>, turn: usize, strange: SlotRanges },
}

impl Asker {
    pub fn new(
        dialer: Dialer,
        topology: &Topology,
        slots: &[SlotRanges],
        replicas: bool,
        history: Arc<Mutex<String>>,
    ) -> Self {
        let only = || Whereabouts {
            master: topology
                .shards
                .first()
                .map_or_else(|| Address::new("", 0), |shard| shard.master.address.clone()),
            replicas: topology.shards.first().map(|shard| usable(&shard.replicas)).unwrap_or_default(),
            members: BTreeSet::new(),
            serves: SlotRanges::default(),
            leaving: SlotRanges::default(),
            strange: SlotRanges::default(),
        };
        let kind = match topology.kind {
            TopologyKind::Standalone => Kind::Standalone { now: only(), history },
            TopologyKind::Sentinel => Kind::Sentinel { now: only() },
            TopologyKind::Cluster => {
                let families = topology.shards.iter().enumerate().map(|(index, shard)| {
                    Family::new(shard, slots.get(index).unwrap_or(&shard.slots).clone())
                });
                let mut known = dialer.access().endpoints.clone();
                for node in topology.nodes() {
                    note(&mut known, &node.address);
                }
                Kind::Cluster { families: families.collect(), known, turn: 0, strange: SlotRanges::default() }
            }
        };
        Self { dialer, kind, replicas, connections: HashMap::new() }
    }

    /// A standalone server has nobody who says that another took its place.
    pub fn polls(&self) -> bool {
        !matches!(self.kind, Kind::Standalone { .. })
    }

    /// As far as is known.
    pub fn shards(&self) -> Vec<Whereabouts> {
        match &self.kind {
            Kind::Standalone { now, .. } | Kind::Sentinel { now } => vec![now.clone()],
            Kind::Cluster { families, strange, .. } => families
                .iter()
                .map(|family| Whereabouts {
                    master: family.master().clone(),
                    replicas: family.replicas().to_vec(),
                    members: family.members().clone(),
                    serves: family.serves().clone(),
                    leaving: family.leaving().clone(),
                    strange: strange.clone(),
                })
                .collect(),
        }
    }

    pub async fn look(&mut self) -> Found {
        let Self { dialer, kind, replicas, connections } = self;
        let looked = match kind {
            Kind::Standalone { now, history } => {
                let history = history.lock().unwrap_or_else(PoisonError::into_inner).clone();
                among_endpoints(dialer, now, &history, *replicas).await
            }
            Kind::Sentinel { now } => by_sentinels(dialer, connections, now).await,
            Kind::Cluster { families, known, turn, strange } => {
                by_nodes(dialer, connections, (families, strange), known, turn).await
            }
        };
        Found { shards: self.shards(), failure: looked.err().unwrap_or_default() }
    }
}

/// Of several endpoints the master, and of several masters the one that goes on with the history that is
/// being read: an old master may have come back beside the one that took its place.
async fn among_endpoints(
    dialer: &Dialer,
    now: &mut Whereabouts,
    history: &str,
    replicas: bool,
) -> Result<(), String> {
    let endpoints = &dialer.access().endpoints;
    if endpoints.len() < 2 && !replicas {
        return Ok(());
    }
    let mut asked = Vec::new();
    for endpoint in endpoints {
        asked.push(ask_server(dialer, dialer.reachable(endpoint)));
    }
    let (mut best, mut failure) = (None::<(u8, Address, ServerInfo)>, String::new());
    for answer in join_all(asked).await {
        match answer {
            Ok((address, info)) => {
                let worth = worth(&info, history) * 2 + u8::from(address == now.master);
                if best.as_ref().is_none_or(|(most, ..)| worth > *most) {
                    best = Some((worth, address, info));
                }
            }
            Err(error) => failure = error.to_string(),
        }
    }
    let Some((_, master, info)) = best else { return Err(failure) };
    now.replicas = usable(&replicas_of(&info, dialer));
    now.master = master;
    Ok(())
}

async fn ask_server(dialer: &Dialer, address: Address) -> Result<(Address, ServerInfo), ConnectionError> {
    server_info(dialer, &address).await.map(|info| (address, info))
}

fn worth(info: &ServerInfo, history: &str) -> u8 {
    let goes_on = [&info.replication_id, &info.former_replication_id].iter().any(|id| *id == history);
    match (info.role, goes_on && !history.is_empty()) {
        (ServerRole::Master, true) => 3,
        (ServerRole::Master, false) => 2,
        (ServerRole::Replica, _) if info.is_current_replica() => 1,
        (ServerRole::Replica, _) => 0,
    }
}

/// The opinion with the highest epoch, and among equals that of the most Sentinels. Another server than
/// before must call itself a master: Sentinels name it before it is.
async fn by_sentinels(
    dialer: &Dialer,
    connections: &mut HashMap<Address, Connection>,
    now: &mut Whereabouts,
) -> Result<(), String> {
    let sentinels = dialer.for_sentinels();
    let Some(name) = dialer.access().sentinel.as_ref().map(|sentinel| sentinel.master.clone()) else {
        return Ok(());
    };
    let mut asking = Vec::new();
    for endpoint in dialer.access().endpoints.clone() {
        let open = connections.remove(&endpoint);
        asking.push(ask_sentinel(&sentinels, dialer, endpoint, open, &name));
    }
    let (mut opinions, mut failure) = (Vec::new(), String::new());
    for (endpoint, said) in join_all(asking).await {
        match said {
            Ok((connection, opinion)) => {
                connections.insert(endpoint, connection);
                opinions.push(opinion);
            }
            Err(error) => failure = error,
        }
    }
    let votes = |opinion: &Opinion| opinions.iter().filter(|other| other.master == opinion.master).count();
    let Some(best) = opinions.iter().max_by_key(|opinion| (opinion.epoch, votes(opinion))) else {
        return Err(failure);
    };
    let master = dialer.reachable(&best.master);
    let replicas = usable(&best.replicas);
    if master != now.master && !calls_itself_master(dialer, &master).await {
        return Err(format!("the Sentinels name {master}, which is no master yet"));
    }
    *now = Whereabouts { master, replicas, ..now.clone() };
    Ok(())
}

/// True also where it does not let us ask.
async fn calls_itself_master(dialer: &Dialer, address: &Address) -> bool {
    let Ok(mut connection) = dialer.connect(address).await else { return false };
    match connection.query(&[b"ROLE"]).await {
        Ok(reply) => reply.items().first().and_then(Reply::text) == Some("master"),
        Err(ConnectionError::Server { .. }) => {
            read_info(&mut connection).await.map_or(true, |info| info.role == ServerRole::Master)
        }
        Err(_) => false,
    }
}

async fn by_nodes(
    dialer: &Dialer,
    connections: &mut HashMap<Address, Connection>,
    (families, strange): (&mut [Family], &mut SlotRanges),
    known: &mut Vec<Address>,
    turn: &mut usize,
) -> Result<(), String> {
    let asked = whom(families, known, *turn);
    *turn = turn.wrapping_add(1);
    let mut view = ClusterView::default();
    let mut failure = ask_nodes(dialer, connections, &asked, &mut view).await;
    if view.is_empty() {
        let others: Vec<Address> =
            known.iter().filter(|address| !asked.contains(address)).take(LAST_RESORT).cloned().collect();
        failure = ask_nodes(dialer, connections, &others, &mut view).await.or(failure);
    }
    if view.is_empty() {
        return Err(failure.unwrap_or_else(|| "no node is known".to_owned()));
    }
    for index in 0..families.len() {
        let others = families.iter().enumerate().filter(|(other, _)| *other != index);
        let foreign: BTreeSet<String> = others.map(|(_, family)| family.master_id().to_owned()).collect();
        if let Some(family) = families.get_mut(index) {
            family.follow(&view, &foreign);
        }
    }
    let members = families.iter().flat_map(|family| family.members().iter().cloned()).collect();
    *strange = view.strange(&members);
    view.addresses().for_each(|address| note(known, address));
    // The endpoints of the manifest stay, of the others those seen last.
    let fixed = dialer.access().endpoints.len();
    let excess = known.len().saturating_sub(KNOWN.max(fixed));
    known.drain(fixed..fixed + excess);
    Ok(())
}

/// The masters, who alone tell which slots they are handing over, and some others as witnesses.
fn whom(families: &[Family], known: &[Address], turn: usize) -> Vec<Address> {
    let mut asked: Vec<Address> = Vec::new();
    let start = turn * MASTERS;
    for at in 0..families.len().min(MASTERS) {
        if let Some(family) = families.get((start + at) % families.len()) {
            note(&mut asked, family.master());
        }
    }
    let masters = asked.len();
    for at in 0..known.len() {
        if asked.len() >= masters + WITNESSES {
            break;
        }
        if let Some(address) = known.get((turn * WITNESSES + at) % known.len()) {
            note(&mut asked, address);
        }
    }
    asked
}

/// Adds what each of them says; gives the last failure.
async fn ask_nodes(
    dialer: &Dialer,
    connections: &mut HashMap<Address, Connection>,
    asked: &[Address],
    view: &mut ClusterView,
) -> Option<String> {
    let mut asking = Vec::new();
    for address in asked {
        let open = connections.remove(address);
        asking.push(ask_node(dialer, address.clone(), open));
    }
    let mut failure = None;
    for (address, said) in join_all(asking).await {
        match said {
            Ok((connection, nodes)) => {
                view.add(&address, &nodes, dialer);
                connections.insert(address, connection);
            }
            Err(error) => failure = Some(error),
        }
    }
    failure
}

/// Asks over the connection that is open, or else over a new one.
async fn ask_node(
    dialer: &Dialer,
    address: Address,
    mut open: Option<Connection>,
) -> (Address, Result<(Connection, Vec<ClusterNode>), String>) {
    loop {
        let reused = open.is_some();
        let mut connection = match connected(dialer, &address, open.take()).await {
            Ok(connection) => connection,
            Err(error) => return (address, Err(error)),
        };
        match cluster_nodes(&mut connection, &address, Role::Source).await {
            Ok(nodes) => return (address, Ok((connection, nodes))),
            Err(_) if reused => {}
            Err(error) => return (address, Err(error.to_string())),
        }
    }
}

/// The same of a Sentinel; `dialer` is that of the servers.
async fn ask_sentinel(
    sentinels: &Dialer,
    dialer: &Dialer,
    address: Address,
    mut open: Option<Connection>,
    name: &str,
) -> (Address, Result<(Connection, Opinion), String>) {
    loop {
        let reused = open.is_some();
        let mut connection = match connected(sentinels, &address, open.take()).await {
            Ok(connection) => connection,
            Err(error) => return (address, Err(error)),
        };
        match opinion(&mut connection, &address, name, dialer, Role::Source).await {
            Ok(opinion) => return (address, Ok((connection, opinion))),
            Err(_) if reused => {}
            Err(error) => return (address, Err(error.to_string())),
        }
    }
}

async fn connected(
    dialer: &Dialer,
    address: &Address,
    open: Option<Connection>,
) -> Result<Connection, String> {
    match open {
        Some(connection) => Ok(connection),
        None => dialer.connect(address).await.map_err(|error| error.to_string()),
    }
}

fn note(list: &mut Vec<Address>, address: &Address) {
    if !list.contains(address) {
        list.push(address.clone());
    }
}
