//! Which shard of the source is which, from run to run (PURE).
//!
//! A cluster's shard is recognised by its slots: addresses and node ids change with a failover, the slots
//! that a shard serves do not. A known shard is found again in the one that it shares most slots with, if
//! these are more than half of what either of both has; each is taken once, the largest share first. It then
//! keeps its id and its lineage, whatever server is its master now.
//!
//! A shard that nobody knows gets the announced address of its master for an id and its lowest slot for a
//! lineage. So the lineage is the same after a failover although nothing is remembered, and the id is not;
//! nothing that outlives a run without being remembered may depend on the id.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::slot::SlotRanges;
use crate::topology::{Shard, Topology, TopologyKind};

/// What is remembered of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KnownShard {
    /// `status.shards[].id`
    pub id: String,
    /// Names it in keys on the target.
    pub lineage: String,
    /// What it served when its data were first read.
    pub slots: SlotRanges,
}

/// One entry for each shard of `topology`, in its order. `goes_on`: tells by the id whether the shard is gone
/// on with where it stopped; one that is copied anew counts its slots from now.
pub fn identify(
    topology: &Topology,
    known: &[KnownShard],
    goes_on: impl Fn(&str) -> bool,
) -> Vec<KnownShard> {
    let recognised = recognise(topology, known);
    let mut ids: BTreeSet<String> = BTreeSet::new();
    let mut lineages: BTreeSet<String> = BTreeSet::new();
    for known in recognised.iter().flatten() {
        ids.insert(known.id.clone());
        lineages.insert(known.lineage.clone());
    }
    let shards = topology.shards.iter().zip(recognised).map(|(shard, known)| {
        let mut identity = match known {
            Some(known) => known.clone(),
            None => unknown(topology.kind, shard, &ids, &lineages),
        };
        if known.is_none() || !goes_on(&identity.id) {
            identity.slots = shard.slots.clone();
        }
        ids.insert(identity.id.clone());
        lineages.insert(identity.lineage.clone());
        identity
    });
    shards.collect()
}

fn unknown(
    kind: TopologyKind,
    shard: &Shard,
    ids: &BTreeSet<String>,
    lineages: &BTreeSet<String>,
) -> KnownShard {
    let slots = shard.slots.clone();
    if kind != TopologyKind::Cluster {
        return KnownShard { id: shard.id.clone(), lineage: "0".to_owned(), slots };
    }
    // A known shard may have either already: the address from before it was failed over, the slot from
    // before it was given away.
    let free = slots.iter().map(|slot| slot.to_string()).find(|lineage| !lineages.contains(lineage));
    let lineage = free.unwrap_or_else(|| shard.id.clone());
    let id = if ids.contains(&shard.id) { format!("{}/{lineage}", shard.id) } else { shard.id.clone() };
    KnownShard { id, lineage, slots }
}

fn recognise<'a>(topology: &Topology, known: &'a [KnownShard]) -> Vec<Option<&'a KnownShard>> {
    let mut found = vec![None; topology.shards.len()];
    if topology.kind != TopologyKind::Cluster {
        // Which one it is the manifest says: another id is another source.
        let same = |shard: &Shard| known.iter().find(|known| known.id == shard.id);
        return topology.shards.iter().map(same).collect();
    }
    let mut shared: Vec<(usize, usize, usize)> = Vec::new();
    for (at, shard) in topology.shards.iter().enumerate() {
        for (from, known) in known.iter().enumerate() {
            let count = known.slots.iter().filter(|slot| shard.slots.contains(*slot)).count();
            if count * 2 > known.slots.count() || count * 2 > shard.slots.count() {
                shared.push((count, at, from));
            }
        }
    }
    // The sort keeps the order of equals, so that the outcome is always the same.
    shared.sort_by_key(|(count, ..)| std::cmp::Reverse(*count));
    let mut taken = BTreeSet::new();
    for (_, at, from) in shared {
        if let Some(place) = found.get_mut(at).filter(|place| place.is_none())
            && taken.insert(from)
        {
            *place = known.get(from);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Address;
    use crate::topology::Node;
    use crate::version::{Flavor, ServerVersion};

    fn cluster(shards: &[(u16, &str)]) -> Topology {
        let shards = shards.iter().map(|(port, slots)| {
            let address = Address::new("h", *port);
            let master =
                Node { address: address.clone(), announced: address, id: port.to_string(), failing: false };
            Shard { id: format!("h:{port}"), master, replicas: Vec::new(), slots: slots.parse().unwrap() }
        });
        Topology {
            kind: TopologyKind::Cluster,
            server: ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 0 },
            shards: shards.collect(),
            databases: None,
        }
    }

    fn names(known: &[KnownShard]) -> Vec<(&str, &str)> {
        known.iter().map(|known| (known.id.as_str(), known.lineage.as_str())).collect()
    }

    #[test]
    fn a_shard_keeps_its_id_through_a_failover() {
        let first = identify(&cluster(&[(1, "0-99"), (2, "100-199")]), &[], |_| false);
        assert_eq!(names(&first), [("h:1", "0"), ("h:2", "100")]);
        let promoted = cluster(&[(3, "0-99"), (2, "100-199")]);
        assert_eq!(names(&identify(&promoted, &first, |_| true)), names(&first));
        // Nothing remembered: the lineage is still the same.
        assert_eq!(names(&identify(&promoted, &[], |_| false)), [("h:3", "0"), ("h:2", "100")]);
    }

    /// The two masters changed places, each the other's replica before.
    #[test]
    fn slots_decide_and_not_addresses() {
        let first = identify(&cluster(&[(1, "0-99"), (2, "100-199")]), &[], |_| false);
        let swapped = identify(&cluster(&[(2, "0-99"), (1, "100-199")]), &first, |_| true);
        assert_eq!(names(&swapped), [("h:1", "0"), ("h:2", "100")]);
    }

    #[test]
    fn slots_count_from_the_first_run_where_it_is_gone_on_with() {
        let first = identify(&cluster(&[(1, "0-99"), (2, "100-199")]), &[], |_| false);
        let moved = cluster(&[(1, "10-99"), (2, "0-9,100-199")]);
        let second = identify(&moved, &first, |id| id == "h:1");
        assert_eq!(names(&second), names(&first));
        assert_eq!(second[0].slots.to_string(), "0-99");
        assert_eq!(second[1].slots.to_string(), "0-9,100-199");
    }

    /// A new shard took the lowest slot, and its master the address that a known shard had at first.
    #[test]
    fn names_stay_different() {
        let first = identify(&cluster(&[(1, "0-99"), (2, "100-199")]), &[], |_| false);
        let later = identify(&cluster(&[(1, "0-1"), (3, "2-99"), (2, "100-199")]), &first, |_| true);
        assert_eq!(names(&later), [("h:1/1", "1"), ("h:1", "0"), ("h:2", "100")]);
    }

    #[test]
    fn without_a_cluster_the_manifest_decides() {
        let mut topology = cluster(&[(1, "0-16383")]);
        topology.kind = TopologyKind::Standalone;
        let known = identify(&topology, &[], |_| false);
        assert_eq!(names(&known), [("h:1", "0")]);
        topology.shards[0].id = "h:9".to_owned();
        assert_eq!(names(&identify(&topology, &known, |_| true)), [("h:9", "0")]);
    }
}
