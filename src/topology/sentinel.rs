//! Sentinel's part of the protocol: redis-doc "High availability with Redis Sentinel".

use std::collections::HashMap;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::{
    Node, Role, Shard, Topology, TopologyError, TopologyKind, databases, no_endpoint, read_info, version,
};
use crate::connection::{Address, Connection, ConnectionError, Dialer, RedisAccess, TopologyChoice};
use crate::resp::Reply;
use crate::slot::SlotRanges;

/// Asks all Sentinels; the first whose answer proves right, as the server says itself, decides.
pub(super) async fn discover(
    access: &RedisAccess,
    dialer: &Dialer,
    role: Role,
) -> Result<Topology, TopologyError> {
    let sentinels = dialer.for_sentinels();
    let name = match &access.sentinel {
        Some(sentinel) => sentinel.master.as_str(),
        None => {
            let address = access.endpoints.first().cloned().unwrap_or_else(|| Address::new("", 0));
            return Err(TopologyError::SentinelMasterUnset { role, address });
        }
    };
    let mut asked: FuturesUnordered<_> =
        access.endpoints.iter().map(|endpoint| ask(endpoint, &sentinels, dialer, name, role)).collect();
    let (mut unreachable, mut refused) = (Vec::new(), None);
    while let Some(answer) = asked.next().await {
        match answer {
            Ok(topology) => return Ok(topology),
            Err(TopologyError::NoEndpoint { source, .. }) => unreachable.push(source),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| no_endpoint(role, unreachable)))
}

async fn ask(
    endpoint: &Address,
    sentinels: &Dialer,
    dialer: &Dialer,
    name: &str,
    role: Role,
) -> Result<Topology, TopologyError> {
    let out_of_reach = |source| TopologyError::NoEndpoint { role, source };
    let mut sentinel = sentinels.connect(endpoint).await.map_err(out_of_reach)?;
    let announced = master_address(&mut sentinel, endpoint, name, role).await?;
    let replicas = replicas(&mut sentinel, name, dialer).await;

    let failed = |source| TopologyError::Connection { role, source };
    let address = dialer.reachable(&announced);
    let mut master = dialer.connect(&address).await.map_err(failed)?;
    let found = master.query(&[b"ROLE"]).await.map_err(failed)?;
    let found = found.items().first().and_then(Reply::text).unwrap_or_default().to_owned();
    if found != "master" {
        return Err(TopologyError::NotMaster { role, master: name.into(), address, found });
    }
    let info = read_info(&mut master).await.map_err(failed)?;
    Ok(Topology {
        kind: TopologyKind::Sentinel,
        server: version(&info, &address, role)?,
        databases: databases(&mut master, &info).await,
        shards: vec![Shard {
            id: name.to_owned(),
            master: Node { address, announced, id: info.run_id, failing: false },
            replicas,
            slots: SlotRanges::all(),
        }],
    })
}

/// What one Sentinel says of the master.
pub(crate) struct Opinion {
    /// As announced.
    pub(crate) master: Address,
    /// Raised by each failover: the opinion with the higher one is newer. 0 where it is not told.
    pub(crate) epoch: u64,
    pub(crate) replicas: Vec<Node>,
}

/// `sentinel`: a connection to the one at `endpoint`; `dialer`: that of the servers.
pub(crate) async fn opinion(
    sentinel: &mut Connection,
    endpoint: &Address,
    name: &str,
    dialer: &Dialer,
    role: Role,
) -> Result<Opinion, TopologyError> {
    let master = master_address(sentinel, endpoint, name, role).await?;
    let told = sentinel.query(&[b"SENTINEL", b"master", name.as_bytes()]).await;
    let epoch = told.ok().and_then(|reply| fields(&reply).get("config-epoch")?.parse().ok()).unwrap_or(0);
    Ok(Opinion { master, epoch, replicas: replicas(sentinel, name, dialer).await })
}

async fn master_address(
    sentinel: &mut Connection,
    endpoint: &Address,
    name: &str,
    role: Role,
) -> Result<Address, TopologyError> {
    let reply = sentinel.query(&[b"SENTINEL", b"get-master-addr-by-name", name.as_bytes()]).await;
    let reply = reply.map_err(|source| match &source {
        // A data server does not know the command.
        ConnectionError::Server { text, .. } if text.starts_with("ERR unknown command") => {
            TopologyError::WrongKind {
                role,
                address: endpoint.clone(),
                found: "not a Sentinel",
                asked: TopologyChoice::Sentinel,
            }
        }
        _ => TopologyError::Connection { role, source },
    })?;
    let [host, port] = reply.items() else {
        return Err(TopologyError::UnknownMaster { role, master: name.to_owned() });
    };
    let port = port.integer().and_then(|port| u16::try_from(port).ok());
    match (host.text(), port) {
        (Some(host), Some(port)) => Ok(Address::new(host, port).or_host_of(endpoint)),
        _ => Err(TopologyError::Connection { role, source: sentinel.unexpected(b"SENTINEL") }),
    }
}

/// Replicas are a convenience, so a Sentinel that does not tell them is no fault. `replicas` exists
/// from 5.0, `slaves` everywhere.
async fn replicas(sentinel: &mut Connection, name: &str, dialer: &Dialer) -> Vec<Node> {
    for word in ["replicas", "slaves"] {
        if let Ok(reply) = sentinel.query(&[b"SENTINEL", word.as_bytes(), name.as_bytes()]).await {
            return reply.items().iter().filter_map(|entry| replica(entry, dialer)).collect();
        }
    }
    Vec::new()
}

fn replica(entry: &Reply, dialer: &Dialer) -> Option<Node> {
    let fields = fields(entry);
    let announced = Address::new(*fields.get("ip")?, fields.get("port")?.parse().ok()?);
    let flags = fields.get("flags").copied().unwrap_or_default();
    let failing = flags.split(',').any(|flag| matches!(flag, "s_down" | "o_down" | "disconnected"));
    Some(Node {
        address: dialer.reachable(&announced),
        announced,
        id: fields.get("runid").copied().unwrap_or_default().to_owned(),
        failing: failing || fields.get("master-link-status") == Some(&"err"),
    })
}

/// Name and value by turns.
fn fields(entry: &Reply) -> HashMap<&str, &str> {
    let pairs = entry.items().chunks_exact(2);
    pairs.filter_map(|pair| Some((pair.first()?.text()?, pair.get(1)?.text()?))).collect()
}
