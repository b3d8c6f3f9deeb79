use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::{
    Answering, ClusterNode, Mode, Node, Role, Shard, Topology, TopologyError, TopologyKind, answering,
    databases, parse_cluster_nodes, parse_cluster_slots, version,
};
use crate::connection::{Address, Connection, ConnectionError, Dialer, RedisAccess, TopologyChoice};

/// The cluster as `first` sees it; where slots are missing in that view, which may be that of a node
/// cut off from the others, as the best of the other endpoints sees it.
pub(super) async fn discover(
    first: Answering,
    access: &RedisAccess,
    dialer: &Dialer,
    role: Role,
) -> Result<Topology, TopologyError> {
    let asked = first.dialled.clone();
    let mut best = view(first, dialer, role).await?;
    if best.uncovered().is_empty() {
        return Ok(best);
    }
    let others = access.endpoints.iter().filter(|endpoint| **endpoint != asked);
    let mut views: FuturesUnordered<_> = others
        .map(|endpoint| async move { view(answering(dialer, endpoint).await.ok()?, dialer, role).await.ok() })
        .collect();
    while let Some(other) = views.next().await {
        if let Some(other) = other.filter(|other| other.uncovered().count() < best.uncovered().count()) {
            best = other;
        }
    }
    Ok(best)
}

async fn view(mut server: Answering, dialer: &Dialer, role: Role) -> Result<Topology, TopologyError> {
    let address = server.dialled;
    if server.info.mode != Mode::Cluster {
        let found = if server.info.mode == Mode::Sentinel { "a Sentinel" } else { "not in cluster mode" };
        return Err(TopologyError::WrongKind { role, address, found, asked: TopologyChoice::Cluster });
    }
    let nodes = nodes(&mut server.connection, &address, role).await?;
    Ok(Topology {
        kind: TopologyKind::Cluster,
        server: version(&server.info, &address, role)?,
        shards: shards(&nodes, &address, dialer),
        databases: databases(&mut server.connection, &server.info).await,
    })
}

/// CLUSTER NODES, as it shows failed nodes; CLUSTER SLOTS where that is forbidden.
pub(crate) async fn nodes(
    connection: &mut Connection,
    address: &Address,
    role: Role,
) -> Result<Vec<ClusterNode>, TopologyError> {
    let bad = |source| TopologyError::BadNodes { role, address: address.clone(), source };
    let failed = |source| TopologyError::Connection { role, source };
    match connection.query_text(&[b"CLUSTER", b"NODES"]).await {
        Ok(text) => parse_cluster_nodes(&text).map_err(bad),
        Err(ConnectionError::Server { .. }) => {
            let reply = connection.query(&[b"CLUSTER", b"SLOTS"]).await.map_err(failed)?;
            parse_cluster_slots(&reply).map_err(bad)
        }
        Err(source) => Err(failed(source)),
    }
}

/// Masters that hold slots, in slot order, with their replicas.
fn shards(nodes: &[ClusterNode], asked: &Address, dialer: &Dialer) -> Vec<Shard> {
    let mut shards: Vec<Shard> = nodes
        .iter()
        .filter(|node| node.master && node.usable && !node.slots.is_empty())
        .map(|master| {
            let replicas = nodes
                .iter()
                .filter(|node| node.usable && node.master_id.as_deref() == Some(&master.id))
                .map(|replica| known_node(replica, asked, dialer))
                .collect();
            let node = known_node(master, asked, dialer);
            Shard { id: node.announced.to_string(), master: node, replicas, slots: master.slots.clone() }
        })
        .collect();
    shards.sort_by_key(|shard| shard.slots.iter().next());
    shards
}

/// A hostname is dialled rather than the IP where certificates are checked, as these name hosts.
pub(crate) fn known_node(node: &ClusterNode, asked: &Address, dialer: &Dialer) -> Node {
    let announced = node.announced.clone().or_host_of(asked);
    let named = node.hostname.as_ref().map(|name| Address::new(name, announced.port));
    let map = &dialer.access().endpoint_map;
    let mapped = map.get(&announced).or_else(|| map.get(named.as_ref()?));
    let checked = dialer
        .access()
        .tls
        .as_ref()
        .is_some_and(|tls| !tls.insecure_skip_verify && tls.server_name.is_none());
    let address = match (mapped, named) {
        (Some(mapped), _) => mapped.clone(),
        (None, Some(named)) if checked => named,
        _ => announced.clone(),
    };
    Node { address, announced, id: node.id.clone(), failing: node.failing }
}
