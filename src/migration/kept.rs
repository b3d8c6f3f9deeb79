//! What a migration keeps in its target, seen from outside of the workers: is it there, and away with it.

use std::collections::BTreeSet;

use super::identity::identify;
use super::{MigrationError, setup};
use crate::api::conditions::reason;
use crate::api::plan::Delivery;
use crate::api::{Plan, Status};
use crate::connection::{ConnectionError, Dialer};
use crate::preflight::PreflightError;
use crate::slot::SlotRanges;
use crate::target::fence::{Fence, Place};
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

/// As `remove`, from nothing but the last status: after whoever may still write was shut out.
pub async fn clean_up(plan: &Plan, told: &Status) -> Result<(), MigrationError> {
    if plan.delivery == Delivery::AtLeastOnce {
        return Ok(());
    }
    let dialer = setup::target_dialer(plan);
    let failed = |error: TopologyError| {
        let preflight = PreflightError::Topology(error);
        MigrationError {
            reason: preflight.reason(),
            message: preflight.to_string(),
            transient: preflight.is_transient(),
        }
    };
    let unreachable = |error: String| MigrationError {
        reason: reason::TARGET_UNREACHABLE,
        message: error,
        transient: true,
    };
    let target = discover(dialer.access(), &dialer, Role::Target).await.map_err(failed)?;
    let mut places: Vec<Place> = target
        .shards
        .iter()
        .filter_map(|shard| {
            let first = if target.is_cluster() { shard.slots.iter().next()? } else { 0 };
            Some((shard.master.address.clone(), first))
        })
        .collect();
    places.sort_by_key(|place| place.1);
    for lineage in lineages_told(told) {
        let names = KeyNames::new(&plan.uid, &lineage);
        Fence::claim(names, &dialer, &places).await.map_err(|error| unreachable(error.to_string()))?;
    }
    let lineages = lineages_told(told);
    remove(plan, &dialer, lineages.iter().map(String::as_str)).await.map_err(failed)
}

/// A cluster's shard is named by its lowest slot; without a cluster there is one, named 0.
fn lineages_told(told: &Status) -> BTreeSet<String> {
    let lowest = |slots: &str| slots.parse::<SlotRanges>().ok()?.iter().next().map(|slot| slot.to_string());
    let of_shards = told.shards.iter().map(|shard| lowest(&shard.slots).unwrap_or_else(|| "0".to_owned()));
    std::iter::once("0".to_owned()).chain(of_shards).collect()
}

/// Names of the source's shards in keys on the target: the same after a failover, and in another process.
fn lineages(source: &Topology) -> Vec<String> {
    identify(source, &[], |_| false).into_iter().map(|shard| shard.lineage).collect()
}
