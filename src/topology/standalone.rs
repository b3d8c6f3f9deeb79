use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::{
    Answering, Mode, Node, Role, ServerInfo, ServerRole, Shard, Topology, TopologyError, TopologyKind,
    answering, databases, no_endpoint, version,
};
use crate::connection::{Dialer, RedisAccess, TopologyChoice};
use crate::slot::SlotRanges;

/// The master among the endpoints, or else the first of them that answers. A replica that is the only
/// endpoint is a source like any other; as a target preflight refuses it.
pub(super) async fn discover(
    access: &RedisAccess,
    dialer: &Dialer,
    role: Role,
) -> Result<Topology, TopologyError> {
    let mut asked: FuturesUnordered<_> = access
        .endpoints
        .iter()
        .enumerate()
        .map(|(place, endpoint)| async move { (place, answering(dialer, endpoint).await) })
        .collect();
    let (mut best, mut failures) = (None::<(usize, Answering)>, Vec::new());
    while let Some((place, answer)) = asked.next().await {
        let answer = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        if answer.info.role == ServerRole::Master && answer.info.mode == Mode::Standalone {
            best = Some((place, answer));
            break;
        }
        if best.as_ref().is_none_or(|(first, _)| place < *first) {
            best = Some((place, answer));
        }
    }
    let Some((_, mut server)) = best else { return Err(no_endpoint(role, failures)) };
    let found = match server.info.mode {
        Mode::Standalone => None,
        Mode::Sentinel => Some("a Sentinel"),
        Mode::Cluster => Some("in cluster mode"),
    };
    if let Some(found) = found {
        let asked = TopologyChoice::Standalone;
        return Err(TopologyError::WrongKind { role, address: server.dialled, found, asked });
    }
    let databases = databases(&mut server.connection, &server.info).await;
    Ok(Topology {
        kind: TopologyKind::Standalone,
        server: version(&server.info, &server.dialled, role)?,
        shards: vec![Shard {
            // Not the server that was chosen: the same after another of the endpoints was promoted.
            id: access.endpoints.first().unwrap_or(&server.dialled).to_string(),
            replicas: replicas(&server.info, dialer),
            master: Node {
                address: server.connection.address().clone(),
                announced: server.dialled,
                id: server.info.run_id,
                failing: false,
            },
            slots: SlotRanges::all(),
        }],
        databases,
    })
}

pub(crate) fn replicas(info: &ServerInfo, dialer: &Dialer) -> Vec<Node> {
    let known = info.replicas.iter().map(|replica| Node {
        address: dialer.reachable(&replica.address),
        announced: replica.address.clone(),
        id: String::new(),
        // Listed means connected; whether it is current, the replica knows better.
        failing: false,
    });
    known.collect()
}
