//! How much longer a stopped migration can go on where it stopped.

use super::setup;
use crate::api::status::ShardStatus;
use crate::api::{Plan, Status};
use crate::topology::{Role, ServerInfo, Topology, discover, server_info};

/// For a message to people.
pub async fn room(plan: &Plan, told: &Status) -> String {
    // What a file holds does not go away with time.
    let Ok(dialer) = setup::source_dialer(plan) else {
        return "started again it goes on where it stopped".to_owned();
    };
    let topology = match discover(dialer.access(), &dialer, Role::Source).await {
        Ok(topology) => topology,
        Err(error) => return format!("the source cannot be asked what its backlog holds: {error}"),
    };
    let mut least: Option<u64> = None;
    for shard in &told.shards {
        let Some(master) = master_of(&topology, shard) else { continue };
        match server_info(&dialer, &master).await {
            Ok(info) => match left(&info, shard) {
                Some(left) => least = Some(least.map_or(left, |least| least.min(left))),
                None => {
                    return format!(
                        "the backlog of {master} no longer holds what follows for shard {}: a full sync would be needed",
                        shard.id
                    );
                }
            },
            Err(error) => return format!("the source cannot be asked what its backlog holds: {error}"),
        }
    }
    match least {
        Some(bytes) => format!(
            "the source's backlog lets it go on without a full sync until {bytes} more bytes of commands were written"
        ),
        None => "nothing was copied yet".to_owned(),
    }
}

/// The server that has the shard now: by its slots, or the only one.
fn master_of(topology: &Topology, shard: &ShardStatus) -> Option<crate::connection::Address> {
    let slots: crate::slot::SlotRanges = shard.slots.parse().unwrap_or_default();
    let same = |found: &&crate::topology::Shard| slots.is_empty() || found.slots.intersects(&slots);
    topology.shards.iter().find(same).map(|found| found.master.address.clone())
}

/// Bytes that may still be written before the backlog has lost what follows the shard's place.
fn left(info: &ServerInfo, shard: &ShardStatus) -> Option<u64> {
    // An id is there once the snapshot stands; the offset may well be 0 where nothing was written yet.
    let next = shard.applied_offset.checked_add(1).filter(|_| !shard.replication_id.is_empty())?;
    let same = shard.replication_id == info.replication_id
        || shard.replication_id == info.former_replication_id && next <= info.former_until;
    if !same || info.backlog_from.is_none_or(|from| next < from) {
        return None;
    }
    let behind = u64::try_from(info.offset.saturating_sub(shard.applied_offset)).unwrap_or_default();
    Some(info.backlog_size.saturating_sub(behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_shrinks_with_what_was_written_since() {
        let shard =
            ShardStatus { replication_id: "a".to_owned(), applied_offset: 100, ..ShardStatus::default() };
        let info = |id: &str, offset, from| ServerInfo {
            replication_id: id.to_owned(),
            offset,
            backlog_from: Some(from),
            backlog_size: 1000,
            ..ServerInfo::default()
        };
        assert_eq!(left(&info("a", 100, 1), &shard), Some(1000));
        assert_eq!(left(&info("a", 400, 1), &shard), Some(700));
        assert_eq!(left(&info("a", 1500, 501), &shard), None);
        assert_eq!(left(&info("b", 100, 1), &shard), None);
        let promoted =
            ServerInfo { former_replication_id: "a".to_owned(), former_until: 101, ..info("b", 150, 1) };
        assert_eq!(left(&promoted, &shard), Some(950));
    }
}
