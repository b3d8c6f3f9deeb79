//! What a migration keeps in its target, seen from outside of the workers: is it there, and away with it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::identity::{KnownShard, identify};
use super::{MigrationError, files, setup};
use crate::api::conditions::reason;
use crate::api::plan::Delivery;
use crate::api::{Plan, Status};
use crate::backoff::Backoff;
use crate::clock::unix_millis;
use crate::connection::{Address, ConnectionError, Dialer};
use crate::preflight::PreflightError;
use crate::resp::Reply;
use crate::slot::SlotRanges;
use crate::target::fence::{Fence, Held, Place};
use crate::target::keys::{
    KeyNames, Record, RecordPlace, Standing, TERRITORY_SLOTS, Territory, shards_key, standing,
};
use crate::target::recovery::{self, Part};
use crate::topology::{Role, Topology, TopologyError, discover};

/// Of asking a target that may be failing over: it is over by then.
pub const ATTEMPTS: u32 = 15;

/// True when an earlier run of this migration has begun to write there.
pub async fn is_there(
    plan: &Plan,
    dialer: &Dialer,
    lineages: &[String],
    target: &Topology,
) -> Result<bool, ConnectionError> {
    if !known_shards(plan, dialer, target).await?.is_empty() {
        return Ok(true);
    }
    for shard in &target.shards {
        let slots = target.is_cluster().then_some(&shard.slots);
        let mut connection = dialer.connect(&shard.master.address).await?;
        for lineage in lineages {
            let names = KeyNames::new(&plan.uid, lineage);
            let state = recovery::read(&mut connection, dialer, &names, slots).await?;
            if !state.records.is_empty() || !state.guards.is_empty() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The shards of a source cluster: their slots change in the course of time, and with them how a run that
/// remembers nothing would name them.
#[derive(Serialize, Deserialize)]
struct Shards {
    /// Unix ms.
    written: u64,
    shards: Vec<KnownShard>,
}

/// Keeps in the target which shards there are.
pub async fn remember(
    plan: &Plan,
    dialer: &Dialer,
    target: &Topology,
    shards: &[KnownShard],
) -> Result<(), ConnectionError> {
    let shards = Shards { written: unix_millis(), shards: shards.to_vec() };
    let value = serde_json::to_vec(&shards).unwrap_or_default();
    let (mut written, mut failed) = (0, None);
    for (address, slot) in places(target) {
        let mut connection = dialer.connect(&address).await?;
        match connection.query(&[b"SET", &shards_key(&plan.uid, slot), &value]).await {
            Ok(_) => written += 1,
            // A slot that is just moving.
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if written == 0 => Err(error),
        _ => Ok(()),
    }
}

/// As [`known_shards`], of a target that may be failing over just now.
pub async fn earlier_shards(
    plan: &Plan,
    dialer: &Dialer,
    target: &Topology,
) -> Result<Vec<KnownShard>, ConnectionError> {
    let (mut backoff, mut attempts, mut target) = (Backoff::default(), 0, target.clone());
    loop {
        match known_shards(plan, dialer, &target).await {
            Err(error) if error.is_transient() && attempts < ATTEMPTS => {
                tracing::warn!(%error, "the target cannot be asked which shards an earlier run knew, trying again");
            }
            result => return result,
        }
        attempts += 1;
        backoff.wait().await;
        // It may have another master by now; when that cannot be asked now, the next attempt does.
        target = discover(dialer.access(), dialer, Role::Target).await.unwrap_or(target);
    }
}

/// The shards that an earlier run knew, with the slots that they were followed for last.
pub async fn known_shards(
    plan: &Plan,
    dialer: &Dialer,
    target: &Topology,
) -> Result<Vec<KnownShard>, ConnectionError> {
    let (mut newest, mut territories) = (None::<Shards>, Vec::new());
    for (address, slot) in places(target) {
        let mut connection = dialer.connect(&address).await?;
        let reply = connection.call(&[b"GET", &shards_key(&plan.uid, slot)]).await?;
        let found = reply.bytes().and_then(|value| serde_json::from_slice::<Shards>(value).ok());
        if found
            .as_ref()
            .is_some_and(|found| newest.as_ref().is_none_or(|newest| newest.written < found.written))
        {
            newest = found;
        }
        for shard in newest.iter().flat_map(|newest| &newest.shards) {
            let names = KeyNames::new(&plan.uid, &shard.lineage);
            let reply = connection.call(&[b"GET", &names.territory(slot)]).await?;
            let found = reply.bytes().and_then(|value| Territory::parse(value));
            territories.extend(found.map(|found| (shard.lineage.clone(), found)));
        }
    }
    let mut shards = newest.map(|newest| newest.shards).unwrap_or_default();
    for shard in &mut shards {
        let of_shard = territories.iter().filter(|(lineage, _)| *lineage == shard.lineage);
        let last = of_shard.max_by_key(|(_, territory)| (territory.history, territory.version));
        if let Some((_, territory)) = last {
            shard.slots = territory.slots.clone();
        }
    }
    Ok(shards)
}

/// Servers and slots at which something is kept for all shards.
fn places(target: &Topology) -> Vec<(Address, u16)> {
    if !target.is_cluster() {
        return target.shards.iter().take(1).map(|shard| (shard.master.address.clone(), 0)).collect();
    }
    let owner = |slot: u16| {
        let shard = target.shards.iter().find(|shard| shard.slots.contains(slot))?;
        Some((shard.master.address.clone(), slot))
    };
    TERRITORY_SLOTS.into_iter().filter_map(owner).collect()
}

/// A shard whose worker has come to its end.
pub struct AtEnd<'a> {
    pub lineage: &'a str,
    pub held: &'a Held,
    /// The target has acknowledged all up to here, the record of it included.
    pub applied: i64,
}

/// Why a migration is not complete, though all its shards came to their end.
#[derive(Debug)]
pub enum Undone {
    /// What is kept is a later process's.
    TakenOver(String),
    /// The target no longer has what it had acknowledged.
    FellBack(String),
}

/// Looks at what is kept once more, where a worker could not see it any more.
pub async fn undone(
    plan: &Plan,
    dialer: &Dialer,
    shards: impl Iterator<Item = AtEnd<'_>>,
) -> Result<Option<Undone>, TopologyError> {
    let target = discover(dialer.access(), dialer, Role::Target).await?;
    // That node decides between two that come at once.
    let nodes = nodes(&target);
    let Some(place) = nodes.first() else { return Ok(None) };
    let failed = |source| TopologyError::Connection { role: Role::Target, source };
    for AtEnd { lineage, held, applied } in shards {
        let names = KeyNames::new(&plan.uid, lineage);
        if let Some(theirs) = held.taken_over(&names, dialer, place).await.map_err(failed)? {
            return Ok(Some(Undone::TakenOver(format!(
                "{}: a later process has taken over this migration (its epoch there is {theirs}); it completes it",
                place.0
            ))));
        }
        let stands = stands_at(&names, dialer, &target, &nodes).await.map_err(failed)?;
        if stands.is_none() && held.is_gone(&names, dialer, place).await.map_err(failed)? {
            return Ok(Some(Undone::TakenOver(format!(
                "the target at {} has nothing any more of what this migration kept there: another process completed it, or it lost what it had; compare both sides (verify)",
                place.0
            ))));
        }
        if stands.is_none_or(|stands| stands < applied) {
            let stands = stands.map_or_else(|| "nothing".to_owned(), |stands| format!("offset {stands}"));
            return Ok(Some(Undone::FellBack(format!(
                "the target at {} stands at {stands} only, after it had acknowledged offset {applied} (a replica without the last commands was promoted, or the last record was not written?): run the migration once more, it goes on from there",
                place.0
            ))));
        }
    }
    Ok(None)
}

/// The offset of the source up to which the target has everything of this shard; `None`: it does not say.
async fn stands_at(
    names: &KeyNames,
    dialer: &Dialer,
    target: &Topology,
    nodes: &[Place],
) -> Result<Option<i64>, ConnectionError> {
    let offset = |records: &[Record]| match standing(records, !target.is_cluster()) {
        Standing::At(record) => match record.place {
            RecordPlace::Stream { offset, .. } => Some(offset),
            RecordPlace::Snapshot { .. } => None,
        },
        Standing::Nothing | Standing::Lost(_) => None,
    };
    if target.is_cluster() {
        // Where they are, unless slots have changed hands since.
        let mut records = Vec::with_capacity(nodes.len());
        for (address, slot) in nodes {
            let reply = dialer.connect(address).await?.call(&[b"GET", &names.at(*slot)]).await?;
            records.extend(reply.bytes().and_then(|value| Record::parse(value)));
        }
        if let (true, Some(offset)) = (records.len() == nodes.len(), offset(&records)) {
            return Ok(Some(offset));
        }
    }
    let mut records = Vec::new();
    for shard in &target.shards {
        let slots = target.is_cluster().then_some(&shard.slots);
        let mut connection = dialer.connect(&shard.master.address).await?;
        records.extend(recovery::read(&mut connection, dialer, names, slots).await?.records);
    }
    Ok(offset(&records))
}

/// All that hold data, the one with the lowest slot first.
fn nodes(target: &Topology) -> Vec<Place> {
    let places = target.shards.iter().filter_map(|shard| {
        let first = if target.is_cluster() { shard.slots.iter().next()? } else { 0 };
        Some((shard.master.address.clone(), first))
    });
    let mut places: Vec<Place> = places.collect();
    places.sort_by_key(|place| place.1);
    places
}

/// The migration is complete: its keys go.
pub async fn remove<'a>(
    plan: &Plan,
    dialer: &Dialer,
    lineages: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), TopologyError> {
    let target = discover(dialer.access(), dialer, Role::Target).await?;
    for (address, slot) in places(&target) {
        let failed = |source| TopologyError::Connection { role: Role::Target, source };
        let mut connection = dialer.connect(&address).await.map_err(failed)?;
        let key = shards_key(&plan.uid, slot);
        if let Reply::Error(text) = connection.call(&[b"DEL", &key]).await.map_err(failed)? {
            tracing::warn!(error = %String::from_utf8_lossy(&text), "a key of the migration stays on the target");
        }
    }
    for part in [Part::Records, Part::Epochs] {
        for shard in &target.shards {
            let slots: Option<&SlotRanges> = target.is_cluster().then_some(&shard.slots);
            for lineage in lineages.clone() {
                let names = KeyNames::new(&plan.uid, lineage);
                recovery::remove(dialer, &shard.master.address, &names, slots, part)
                    .await
                    .map_err(|source| TopologyError::Connection { role: Role::Target, source })?;
            }
        }
    }
    Ok(())
}

/// As `remove`, from nothing but the last status: after whoever may still write was shut out.
pub async fn clean_up(plan: &Plan, told: &Status) -> Result<(), MigrationError> {
    if plan.delivery == Delivery::AtLeastOnce || plan.target.redis().is_none() {
        return Ok(());
    }
    let dialer = setup::target_dialer(plan)?;
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
    let places = nodes(&target);
    let mut lineages = lineages_told(plan, told);
    let known = known_shards(plan, &dialer, &target).await.map_err(|error| unreachable(error.to_string()))?;
    lineages.extend(known.into_iter().map(|shard| shard.lineage));
    for lineage in &lineages {
        let names = KeyNames::new(&plan.uid, lineage);
        Fence::claim(names, &dialer, &places, &Held::default())
            .await
            .map_err(|error| unreachable(error.to_string()))?;
    }
    remove(plan, &dialer, lineages.iter().map(String::as_str)).await.map_err(failed)
}

/// A cluster's shard is named by its lowest slot; without a cluster there is one, named 0. A file by its name.
fn lineages_told(plan: &Plan, told: &Status) -> BTreeSet<String> {
    if plan.source.redis().is_none() {
        return told.shards.iter().map(|shard| files::lineage(&shard.id)).collect();
    }
    let lowest = |slots: &str| slots.parse::<SlotRanges>().ok()?.iter().next().map(|slot| slot.to_string());
    let of_shards = told.shards.iter().map(|shard| lowest(&shard.slots).unwrap_or_else(|| "0".to_owned()));
    std::iter::once("0".to_owned()).chain(of_shards).collect()
}

/// Names of the source's shards in keys on the target: the same after a failover, and in another process.
pub fn lineages(source: &Topology) -> Vec<String> {
    identify(source, &[], |_| false).into_iter().map(|shard| shard.lineage).collect()
}
