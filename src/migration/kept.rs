//! What a migration keeps in its target, seen from outside of the workers: is it there, and away with it.

use super::identity::identify;
use crate::api::Plan;
use crate::connection::{ConnectionError, Dialer};
use crate::slot::SlotRanges;
use crate::target::keys::KeyNames;
use crate::target::recovery;
use crate::topology::{Role, Topology, TopologyError, discover};

/// True when an earlier run of this migration has begun to write there.
pub async fn is_there(
    plan: &Plan,
    dialer: &Dialer,
    source: &Topology,
    target: &Topology,
) -> Result<bool, ConnectionError> {
    for shard in &target.shards {
        let slots = target.is_cluster().then_some(&shard.slots);
        let mut connection = dialer.connect(&shard.master.address).await?;
        for lineage in lineages(source) {
            let names = KeyNames::new(&plan.uid, &lineage);
            let state = recovery::read(&mut connection, dialer, &names, slots).await?;
            if !state.records.is_empty() || !state.guards.is_empty() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The migration is complete: its keys go.
pub async fn remove<'a>(
    plan: &Plan,
    dialer: &Dialer,
    lineages: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), TopologyError> {
    let target = discover(dialer.access(), dialer, Role::Target).await?;
    for shard in &target.shards {
        let slots: Option<&SlotRanges> = target.is_cluster().then_some(&shard.slots);
        for lineage in lineages.clone() {
            let names = KeyNames::new(&plan.uid, lineage);
            recovery::remove(dialer, &shard.master.address, &names, slots)
                .await
                .map_err(|source| TopologyError::Connection { role: Role::Target, source })?;
        }
    }
    Ok(())
}

/// Names of the source's shards in keys on the target: the same after a failover, and in another process.
fn lineages(source: &Topology) -> Vec<String> {
    identify(source, &[], |_| false).into_iter().map(|shard| shard.lineage).collect()
}
