//! Judgements on what was surveyed; nothing here asks a server.

use std::collections::HashSet;

use super::{PreflightError, PreflightInput, Side};
use crate::loss::Loss;
use crate::topology::{Node, Role, ServerRole, Topology};
use crate::version::ServerVersion;

/// Less than this is overrun within seconds of a broken link under a moderate write load.
const SMALL_BACKLOG: u64 = 16 << 20;
const SMALL_OUTPUT_LIMIT: u64 = 64 << 20;

pub(super) fn covered(topology: &Topology, role: Role) -> Result<(), PreflightError> {
    let slots = topology.uncovered();
    if slots.is_empty() { Ok(()) } else { Err(PreflightError::Uncovered { role, slots }) }
}

/// `replicates`: the source is to send its stream of commands.
pub(super) fn source(
    side: &Side,
    replicates: bool,
    warnings: &mut Vec<String>,
) -> Result<(), PreflightError> {
    for server in &side.servers {
        let (address, info) = (&server.address, &server.info);
        if info.role == ServerRole::Replica && !info.master_link_up {
            return Err(PreflightError::ReplicaUnlinked { address: address.clone() });
        }
        if !replicates {
            continue;
        }
        if info.backlog_size > 0 && info.backlog_size < SMALL_BACKLOG {
            warnings.push(format!(
                "source: {address}: repl-backlog-size is {} B; after a broken link only that much can be caught up without a full resync, consider 64mb or more",
                info.backlog_size
            ));
        }
        if let Some(limit) = server.output_limits.as_deref().and_then(replica_hard_limit)
            && limit > 0
            && limit < SMALL_OUTPUT_LIMIT
        {
            warnings.push(format!(
                    "source: {address}: client-output-buffer-limit for replicas is {limit} B; writes during the full sync may exceed it and break the link"
                ));
        }
    }
    Ok(())
}

pub(super) fn target(side: &Side, warnings: &mut Vec<String>) -> Result<(), PreflightError> {
    for server in &side.servers {
        let address = &server.address;
        if server.info.role == ServerRole::Replica {
            let master = server.info.master.clone();
            return Err(PreflightError::TargetIsReplica { address: address.clone(), master });
        }
        match server.policy.as_deref() {
            Some(policy) if policy != "noeviction" && server.maxmemory.is_some_and(|bytes| bytes > 0) => {
                warnings.push(format!(
                    "target: {address}: maxmemory-policy {policy} may evict keys that the source keeps; set noeviction until the cutover"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The same process, the same cluster, or two that replicate one another.
pub(super) fn not_the_same(source: &Side, target: &Side) -> Result<(), PreflightError> {
    let same = |from: &Node, to: &Node, what| {
        let (source_address, target_address) = (from.address.clone(), to.address.clone());
        Err(PreflightError::SameServer { source_address, target_address, what })
    };
    for from in source.topology.nodes().filter(|node| !node.id.is_empty()) {
        if let Some(to) = target.topology.nodes().find(|node| node.id == from.id) {
            return same(from, to, "the same server");
        }
    }
    let in_source: HashSet<_> = source.topology.nodes().map(|node| &node.announced).collect();
    for (from, shard) in source.servers.iter().zip(&source.topology.shards) {
        for (to, other) in target.servers.iter().zip(&target.topology.shards) {
            if !from.info.run_id.is_empty() && from.info.run_id == to.info.run_id {
                return same(&shard.master, &other.master, "the same server");
            }
            let id = &from.info.replication_id;
            let follows = from.info.master.as_ref() == Some(&other.master.announced)
                || to.info.master.as_ref().is_some_and(|master| in_source.contains(master));
            if follows || (!id.is_empty() && *id == to.info.replication_id) {
                return same(&shard.master, &other.master, "replicas of one another");
            }
        }
    }
    Ok(())
}

/// Databases that hold keys now and have no place on the target.
pub(super) fn databases(input: &PreflightInput, source: &Side, target: &Side) -> Result<(), PreflightError> {
    let Some(available) = target.topology.databases else { return Ok(()) };
    let copied = |database: &u64| {
        (input.include_databases.is_empty() || input.include_databases.contains(database))
            && !input.exclude_databases.contains(database)
    };
    let place = |database: &u64| input.database_map.get(database).copied().unwrap_or(*database);
    let keyspaces = source.servers.iter().flat_map(|server| &server.info.keyspace);
    let mut databases: Vec<u64> = keyspaces
        .map(|(database, _)| *database)
        .filter(|database| copied(database) && place(database) >= available)
        .collect();
    databases.sort_unstable();
    databases.dedup();
    if databases.is_empty() { Ok(()) } else { Err(PreflightError::Databases { databases, available }) }
}

pub(super) fn memory(
    filtered: bool,
    source: &Side,
    target: &Side,
    warnings: &mut Vec<String>,
) -> Result<(), PreflightError> {
    let mut maxmemory = 0_u64;
    for server in &target.servers {
        match server.maxmemory {
            Some(bytes) if bytes > 0 => maxmemory = maxmemory.saturating_add(bytes),
            _ => return Ok(()),
        }
    }
    let needed = source.total(|server| server.info.used_memory.saturating_sub(server.info.startup_memory));
    if needed > maxmemory && !filtered {
        return Err(PreflightError::TooLittleMemory { maxmemory, needed });
    }
    if needed > maxmemory / 10 * 8 {
        warnings.push(format!(
            "target: maxmemory {maxmemory} B leaves little room for the source's {needed} B; servers of other versions may need more for the same data"
        ));
    }
    Ok(())
}

/// What the source may hold and its target cannot: a warning, or a fault where nothing may be lost.
pub(super) fn losses(
    (from, to): (ServerVersion, ServerVersion),
    losses: &[Loss],
    strict: bool,
    warnings: &mut Vec<String>,
) -> Result<(), PreflightError> {
    if losses.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = losses.iter().map(Loss::to_string).collect();
    let what = format!("{to} has no equivalent for {} of {from}", list.join(", "));
    if strict {
        return Err(PreflightError::NoEquivalent { what });
    }
    warnings
        .push(format!("{what}; if there are any, they are left out and counted in status.quarantine.kinds"));
    Ok(())
}

pub(super) fn modules(
    source: &Side,
    target: &Side,
    strict: bool,
    warnings: &mut Vec<String>,
) -> Result<(), PreflightError> {
    let mut missing = HashSet::new();
    // Before 4.0 there is no MODULE to ask.
    let none = (!target.topology.server.has_redis(4, 0)).then(Vec::new);
    for server in &target.servers {
        let Some(present) = server.modules.as_ref().or(none.as_ref()) else { continue };
        let wanted = source.servers.iter().filter_map(|server| server.modules.as_ref()).flatten();
        missing.extend(wanted.filter(|module| !present.contains(module)));
    }
    let mut missing: Vec<_> = missing.into_iter().collect();
    missing.sort();
    for module in missing {
        let what = format!("target: lacks the module {module} of the source");
        if strict {
            return Err(PreflightError::NoEquivalent { what });
        }
        warnings.push(format!("{what}; keys of its types will be quarantined"));
    }
    Ok(())
}

/// The first number behind `slave` (or `replica`): `normal 0 0 0 slave 268435456 67108864 60 …`.
fn replica_hard_limit(limits: &str) -> Option<u64> {
    let mut words = limits.split_ascii_whitespace();
    words.find(|word| matches!(*word, "slave" | "replica"))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replica_limit_is_read() {
        let text = "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60";
        assert_eq!(replica_hard_limit(text), Some(268435456));
        assert_eq!(replica_hard_limit("normal 0 0 0 replica 1 2 3"), Some(1));
        assert_eq!(replica_hard_limit(""), None);
    }
}
