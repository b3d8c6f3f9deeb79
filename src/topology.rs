//! Which servers make up a deployment: standalone, watched by Sentinels, or a cluster.
//!
//! [`discover`] needs one endpoint that answers; [`SlotMap`] keeps a target's slots at hand.

mod cluster;
mod cluster_nodes;
mod sentinel;
mod server_info;
mod slot_map;
mod standalone;
#[cfg(test)]
mod tests;

use std::fmt;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use thiserror::Error;

use crate::connection::{Address, Connection, ConnectionError, Dialer, RedisAccess, TopologyChoice};
use crate::slot::SlotRanges;
use crate::version::ServerVersion;

pub(crate) use cluster::{known_node, nodes as cluster_nodes};
pub use cluster_nodes::{ClusterNode, ClusterNodesError, parse_cluster_nodes, parse_cluster_slots};
pub(crate) use sentinel::{Opinion, opinion};
pub use server_info::{Mode, ReplicaInfo, ServerInfo, ServerRole};
pub use slot_map::SlotMap;
pub(crate) use standalone::replicas as replicas_of;

/// Which end of the migration is looked at: names it in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Source,
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Target => "target",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopologyKind {
    Standalone,
    Sentinel,
    Cluster,
}

/// One deployment as it stood when it was asked.
#[derive(Clone, Debug)]
pub struct Topology {
    pub kind: TopologyKind,
    /// Of the server that was asked; the others may be in the middle of an upgrade.
    pub server: ServerVersion,
    /// One for each master that holds slots; exactly one without a cluster.
    pub shards: Vec<Shard>,
    /// How many databases there are. `None`: the server does not let us ask.
    pub databases: Option<u64>,
}

/// A master and its replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The master's announced address when first seen (without a cluster the manifest's first endpoint);
    /// the master's name where Sentinels watch it, which outlives a failover.
    pub id: String,
    /// Standalone: the endpoint, even when that server is itself a replica.
    pub master: Node,
    pub replicas: Vec<Node>,
    /// All slots when there is no cluster.
    pub slots: SlotRanges,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where it is reached from here: the endpoint map is applied.
    pub address: Address,
    /// As the servers themselves call it, in MOVED for example.
    pub announced: Address,
    /// The cluster's node id, or the server's run id; empty when unknown.
    pub id: String,
    /// The others call it failed, or its link is down.
    pub failing: bool,
}

#[derive(Debug, Error)]
pub enum TopologyError {
    /// `source` is the most telling failure among those endpoints.
    #[error("{role}: no usable endpoint: {source}")]
    NoEndpoint { role: Role, source: ConnectionError },
    #[error("{role}: {source}")]
    Connection { role: Role, source: ConnectionError },
    #[error("{role}: {address} is {found}, but topology {asked:?} is asked for")]
    WrongKind { role: Role, address: Address, found: &'static str, asked: TopologyChoice },
    #[error("{role}: {address} is a Sentinel; set sentinel.master to the name of the master it watches")]
    SentinelMasterUnset { role: Role, address: Address },
    #[error("{role}: the Sentinels watch no master {master:?}")]
    UnknownMaster { role: Role, master: String },
    #[error(
        "{role}: the Sentinels call {address} the master of {master:?}, but its role is {found}; a failover may be under way"
    )]
    NotMaster { role: Role, master: String, address: Address, found: String },
    #[error("{role}: {address}: CLUSTER NODES: {source}")]
    BadNodes { role: Role, address: Address, source: ClusterNodesError },
    #[error("{role}: {address}: INFO names no version; is it a Redis or Valkey server?")]
    NoVersion { role: Role, address: Address },
}

impl TopologyError {
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoEndpoint { source, .. } | Self::Connection { source, .. } => source.is_transient(),
            Self::NotMaster { .. } => true,
            _ => false,
        }
    }

    pub fn role(&self) -> Role {
        match self {
            Self::NoEndpoint { role, .. }
            | Self::Connection { role, .. }
            | Self::WrongKind { role, .. }
            | Self::SentinelMasterUnset { role, .. }
            | Self::UnknownMaster { role, .. }
            | Self::NotMaster { role, .. }
            | Self::BadNodes { role, .. }
            | Self::NoVersion { role, .. } => *role,
        }
    }

    /// What happened on the wire, where that is the cause.
    pub fn connection(&self) -> Option<&ConnectionError> {
        match self {
            Self::NoEndpoint { source, .. } | Self::Connection { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Topology {
    pub fn is_cluster(&self) -> bool {
        self.kind == TopologyKind::Cluster
    }

    /// Slots that no shard serves.
    pub fn uncovered(&self) -> SlotRanges {
        SlotRanges::all()
            .iter()
            .filter(|slot| !self.shards.iter().any(|shard| shard.slots.contains(*slot)))
            .collect()
    }

    /// Masters first, then replicas.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        let masters = self.shards.iter().map(|shard| &shard.master);
        masters.chain(self.shards.iter().flat_map(|shard| &shard.replicas))
    }
}

/// Asks the endpoints of `access` what they are part of.
pub async fn discover(access: &RedisAccess, dialer: &Dialer, role: Role) -> Result<Topology, TopologyError> {
    match access.topology {
        TopologyChoice::Sentinel => sentinel::discover(access, dialer, role).await,
        TopologyChoice::Auto if access.sentinel.is_some() => sentinel::discover(access, dialer, role).await,
        TopologyChoice::Cluster => {
            let first = any_endpoint(access, dialer, role).await?;
            cluster::discover(first, access, dialer, role).await
        }
        TopologyChoice::Standalone => standalone::discover(access, dialer, role).await,
        TopologyChoice::Auto => {
            let first = any_endpoint(access, dialer, role).await?;
            match first.info.mode {
                Mode::Cluster => cluster::discover(first, access, dialer, role).await,
                Mode::Sentinel => Err(TopologyError::SentinelMasterUnset { role, address: first.dialled }),
                Mode::Standalone => standalone::discover(access, dialer, role).await,
            }
        }
    }
}

/// The server to replicate `shard` from, as a reachable address. With `prefer_replica` the replica
/// whose offset is highest, its link to the master up and its data loaded; else the master.
pub async fn pick_source(shard: &Shard, prefer_replica: bool, dialer: &Dialer) -> Address {
    if prefer_replica {
        let replicas = shard.replicas.iter().filter(|replica| !replica.failing).map(|node| &node.address);
        if let Some(replica) = pick_replica(replicas, None, dialer).await {
            return replica;
        }
    }
    shard.master.address.clone()
}

/// The replica whose offset is highest among those that are fit to be read from and have everything up
/// to `at_least`.
pub(crate) async fn pick_replica(
    replicas: impl Iterator<Item = &Address>,
    at_least: Option<i64>,
    dialer: &Dialer,
) -> Option<Address> {
    let mut asked: FuturesUnordered<_> = replicas
        .map(|address| async move {
            let info = server_info(dialer, address).await.ok()?;
            let fit = info.is_current_replica() && at_least.is_none_or(|least| info.offset >= least);
            fit.then(|| (info.offset, address.clone()))
        })
        .collect();
    let mut best: Option<(i64, Address)> = None;
    while let Some(answer) = asked.next().await {
        if let Some((offset, address)) = answer {
            // Equal offsets: the lower address, so that two askers choose alike.
            let better = best.as_ref().is_none_or(|(most, known)| (offset, known) > (*most, &address));
            if better {
                best = Some((offset, address));
            }
        }
    }
    best.map(|(_, address)| address)
}

/// INFO of the server at `address`.
pub async fn server_info(dialer: &Dialer, address: &Address) -> Result<ServerInfo, ConnectionError> {
    let mut connection = dialer.connect(address).await?;
    read_info(&mut connection).await
}

/// INFO over an open connection.
pub async fn read_info(connection: &mut Connection) -> Result<ServerInfo, ConnectionError> {
    Ok(ServerInfo::parse(&connection.query_text(&[b"INFO"]).await?))
}

/// How many databases the server has, where it lets us ask.
pub(crate) async fn databases(connection: &mut Connection, info: &ServerInfo) -> Option<u64> {
    if info.mode != Mode::Cluster {
        return config(connection, "databases").await?.parse().ok();
    }
    // Valkey 9; a cluster before that has one.
    match config(connection, "cluster-databases").await {
        Some(number) => number.parse().ok(),
        None => info.version.is_none_or(|version| version.major < 9).then_some(1),
    }
}

/// One setting; `None` where it does not exist or CONFIG is forbidden.
pub(crate) async fn config(connection: &mut Connection, name: &str) -> Option<String> {
    let reply = connection.query(&[b"CONFIG", b"GET", name.as_bytes()]).await.ok()?;
    reply.items().get(1)?.text().map(str::to_owned)
}

/// A server that answered INFO.
struct Answering {
    connection: Connection,
    info: ServerInfo,
    dialled: Address,
}

/// The endpoint that answers INFO first.
async fn any_endpoint(access: &RedisAccess, dialer: &Dialer, role: Role) -> Result<Answering, TopologyError> {
    let mut asked: FuturesUnordered<_> =
        access.endpoints.iter().map(|endpoint| answering(dialer, endpoint)).collect();
    let mut failures = Vec::new();
    while let Some(answer) = asked.next().await {
        match answer {
            Ok(answer) => return Ok(answer),
            Err(failure) => failures.push(failure),
        }
    }
    Err(no_endpoint(role, failures))
}

async fn answering(dialer: &Dialer, endpoint: &Address) -> Result<Answering, ConnectionError> {
    let mut connection = dialer.connect(endpoint).await?;
    let info = read_info(&mut connection).await?;
    Ok(Answering { connection, info, dialled: endpoint.clone() })
}

/// One cause to show: something to be set right tells more than a server that is down.
fn no_endpoint(role: Role, failures: Vec<ConnectionError>) -> TopologyError {
    let mut chosen: Option<ConnectionError> = None;
    for failure in failures {
        if chosen.as_ref().is_none_or(|known| known.is_transient() && !failure.is_transient()) {
            chosen = Some(failure);
        }
    }
    let none = || ConnectionError::TlsSettings { what: "endpoints", reason: "none is given".into() };
    TopologyError::NoEndpoint { role, source: chosen.unwrap_or_else(none) }
}

fn version(info: &ServerInfo, address: &Address, role: Role) -> Result<ServerVersion, TopologyError> {
    info.version.ok_or_else(|| TopologyError::NoVersion { role, address: address.clone() })
}
