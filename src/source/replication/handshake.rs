//! What is said and asked on a connection before PSYNC.

use super::ReplicationError;
use crate::connection::{Address, Connection, ConnectionError};
use crate::resp::Reply;
use crate::source::watch::{SourceShard, cluster_view};
use crate::topology::{ServerInfo, parse_cluster_nodes};

/// Announced so that Valkey 9 writes its own RDB format instead of an old one that has no field expiries.
const ANNOUNCED_VALKEY: &str = "9.1.0";

/// A node of a cluster may serve another shard by now, or another node may have got its address: its
/// data would be taken for this shard's.
pub async fn check_shard(
    connection: &mut Connection,
    address: &Address,
    shard: Option<&SourceShard>,
) -> Result<(), ReplicationError> {
    let members = shard.and_then(SourceShard::now).map(|at| at.members);
    let Some(members) = members.filter(|members| !members.is_empty()) else { return Ok(()) };
    let reply = connection.call(&[b"CLUSTER", b"NODES"]).await?;
    // Where that is forbidden, CLUSTER SLOTS would not tell which node it is.
    let nodes = reply.text().and_then(|text| parse_cluster_nodes(text).ok());
    match nodes.and_then(|nodes| cluster_view::is_of(&nodes, &members)) {
        Some(false) => Err(ReplicationError::NotOurs { address: address.clone() }),
        Some(true) | None => Ok(()),
    }
}

/// Tells the source what kind of replica this is. Each option goes alone, as a server stops at the
/// first it does not know; refusals do not matter.
pub async fn introduce(connection: &mut Connection) -> Result<(), ConnectionError> {
    for option in [["capa", "eof"], ["capa", "psync2"], ["version", ANNOUNCED_VALKEY]] {
        let reply = connection.call(&[b"REPLCONF", option[0].as_bytes(), option[1].as_bytes()]).await?;
        if let Reply::Error(text) = reply {
            tracing::debug!(option = option[0], text = %String::from_utf8_lossy(&text), "REPLCONF option not known");
        }
    }
    Ok(())
}

/// `None` where INFO is forbidden.
pub async fn replication_info(connection: &mut Connection) -> Result<Option<ServerInfo>, ConnectionError> {
    let reply = connection.call(&[b"INFO", b"replication"]).await?;
    Ok(reply.text().map(ServerInfo::parse))
}
