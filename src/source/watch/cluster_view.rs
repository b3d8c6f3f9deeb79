//! One picture of a cluster out of what several of its nodes say, and each shard found in it again.
//!
//! A node that is cut off from the others still calls itself what it was. Who claims a slot with the higher
//! configuration epoch has it: that is how the nodes themselves settle it (Redis cluster specification,
//! "Hash slots configuration propagation and updates").

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::connection::{Address, Dialer};
use crate::slot::{SLOT_COUNT, SlotRanges};
use crate::topology::{ClusterNode, Node, Shard, known_node};

/// What was made of the nodes' words.
#[derive(Default)]
pub struct ClusterView {
    nodes: BTreeMap<String, Known>,
    /// By slot: the claim with the highest epoch.
    claims: BTreeMap<u16, Claim>,
    /// Slots that a node is handing over, by its id.
    leaving: BTreeMap<String, SlotRanges>,
}

struct Known {
    /// The newest word on it.
    epoch: u64,
    master_id: Option<String>,
    /// As the ones that were asked reach it.
    addresses: Vec<Address>,
    /// Of so many other nodes so many call it failing.
    asked: usize,
    failing: usize,
}

struct Claim {
    epoch: u64,
    /// The owner itself says so.
    own: bool,
    owner: Arc<str>,
}

impl ClusterView {
    /// Adds what the node at `asked` says.
    pub fn add(&mut self, asked: &Address, nodes: &[ClusterNode], dialer: &Dialer) {
        for node in nodes.iter().filter(|node| node.usable) {
            let master_id = node.master_id.clone().filter(|_| !node.master);
            let known = self.nodes.entry(node.id.clone()).or_insert_with(|| Known {
                epoch: node.epoch,
                master_id: master_id.clone(),
                addresses: Vec::new(),
                asked: 0,
                failing: 0,
            });
            // Of equal age: its own word.
            if node.epoch > known.epoch || (node.epoch == known.epoch && node.myself) {
                known.epoch = node.epoch;
                known.master_id = master_id;
            }
            let Node { address, .. } = known_node(node, asked, dialer);
            // A node that never met another does not know its own address.
            let at = if node.announced.host.is_empty() { known.addresses.len() } else { 0 };
            if !known.addresses.contains(&address) {
                known.addresses.insert(at, address);
            }
            if !node.myself {
                known.asked += 1;
                known.failing += usize::from(node.failing);
            }
            if node.master {
                self.claim(node);
            }
            if node.myself && !node.migrating.is_empty() {
                let leaving = self.leaving.entry(node.id.clone()).or_default();
                node.migrating.iter().for_each(|&(slot, _)| leaving.insert(slot, slot));
            }
        }
    }

    fn claim(&mut self, node: &ClusterNode) {
        let owner: Arc<str> = Arc::from(node.id.as_str());
        for slot in node.slots.iter() {
            let newer = self.claims.get(&slot).is_none_or(|claim| {
                node.epoch > claim.epoch || (node.epoch == claim.epoch && node.myself && !claim.own)
            });
            if newer {
                let claim = Claim { epoch: node.epoch, own: node.myself, owner: Arc::clone(&owner) };
                self.claims.insert(slot, claim);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Where its nodes are reached.
    pub fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.nodes.values().filter_map(|known| known.addresses.first())
    }

    fn owner(&self, slot: u16) -> Option<&str> {
        self.claims.get(&slot).map(|claim| &*claim.owner)
    }

    /// Slots of nodes that are none of `members`.
    pub fn strange(&self, members: &BTreeSet<String>) -> SlotRanges {
        let claims = self.claims.iter().filter(|(_, claim)| !members.contains(&*claim.owner));
        claims.map(|(slot, _)| *slot).collect()
    }

    /// Number of `slots` by the node that serves them.
    fn held(&self, slots: &SlotRanges) -> BTreeMap<&str, usize> {
        let mut held = BTreeMap::new();
        for owner in slots.iter().filter_map(|slot| self.owner(slot)) {
            *held.entry(owner).or_insert(0) += 1;
        }
        held
    }

    /// A master that the others do not take for failed, with slots or without.
    fn is_live_master(&self, id: &str) -> bool {
        self.nodes.get(id).is_some_and(|known| {
            known.master_id.is_none() && (known.asked == 0 || known.failing * 2 <= known.asked)
        })
    }
}

/// One source shard through failovers: its nodes are known by their ids, so that a replica which is
/// promoted is told apart from another shard that takes slots over.
#[derive(Clone, Debug)]
pub struct Family {
    /// What the shard served when the migration began.
    slots: SlotRanges,
    /// Ids of nodes that are of this shard, or were until nobody could tell any more.
    members: BTreeSet<String>,
    master_id: String,
    master: Address,
    replicas: Vec<Address>,
    /// What it serves by the newest view, and of that what it is handing over.
    serves: SlotRanges,
    leaving: SlotRanges,
}

impl Family {
    /// `slots`: those that the shard served when the migration began, which may have been an earlier run.
    pub fn new(shard: &Shard, slots: SlotRanges) -> Self {
        let ids = shard.replicas.iter().chain([&shard.master]).map(|node| node.id.clone());
        Self {
            slots,
            members: ids.filter(|id| !id.is_empty()).collect(),
            master_id: shard.master.id.clone(),
            master: shard.master.address.clone(),
            replicas: usable(&shard.replicas),
            serves: shard.slots.clone(),
            leaving: SlotRanges::default(),
        }
    }

    pub fn master_id(&self) -> &str {
        &self.master_id
    }

    pub fn master(&self) -> &Address {
        &self.master
    }

    pub fn replicas(&self) -> &[Address] {
        &self.replicas
    }

    pub fn members(&self) -> &BTreeSet<String> {
        &self.members
    }

    pub fn serves(&self) -> &SlotRanges {
        &self.serves
    }

    pub fn leaving(&self) -> &SlotRanges {
        &self.leaving
    }

    /// Finds the shard in a newer view. `foreign`: the masters of the other shards.
    pub fn follow(&mut self, view: &ClusterView, foreign: &BTreeSet<String>) {
        self.master_id = self.heir(view, foreign);
        self.adopt(view, foreign);
        if let Some(known) = view.nodes.get(&self.master_id)
            && !known.addresses.contains(&self.master)
            && let Some(address) = known.addresses.first()
        {
            self.master = address.clone();
        }
        let replicas = view.nodes.values().filter(|known| {
            known.master_id.as_deref() == Some(&self.master_id) && known.failing * 2 <= known.asked
        });
        self.replicas = replicas.filter_map(|known| known.addresses.first().cloned()).collect();
        // A slot that nobody claims stays where it was.
        let own = |slot: u16| match view.owner(slot) {
            Some(owner) => self.members.contains(owner),
            None => self.serves.contains(slot),
        };
        self.serves = (0..SLOT_COUNT).filter(|slot| own(*slot)).collect();
        let leaving = self.members.iter().filter_map(|id| view.leaving.get(id));
        self.leaving = leaving.fold(SlotRanges::default(), |all, some| all.with(some));
    }

    /// The id of the master that serves the shard now: of its own nodes the one that has most of its slots.
    /// A node that was not seen before counts when the old master is none any more. While none has any, the
    /// old one.
    fn heir(&self, view: &ClusterView, foreign: &BTreeSet<String>) -> String {
        let held = view.held(&self.slots);
        let most = |of: &dyn Fn(&str) -> bool| {
            let candidates = held.iter().filter(|(id, _)| of(id));
            candidates.max_by_key(|(_, count)| **count).map(|(id, _)| (*id).to_owned())
        };
        most(&|id| self.members.contains(id) && !foreign.contains(id))
            .or_else(|| most(&|id| !foreign.contains(id)).filter(|_| !view.is_live_master(&self.master_id)))
            .unwrap_or_else(|| self.master_id.clone())
    }

    /// Its nodes by now. One that follows another shard's master is of this shard no more; one that cannot
    /// be seen, or was a master and lost its place, still is.
    fn adopt(&mut self, view: &ClusterView, foreign: &BTreeSet<String>) {
        let before = std::mem::take(&mut self.members);
        for id in &before {
            let stays = !foreign.contains(id)
                && view.nodes.get(id).is_none_or(|known| {
                    known
                        .master_id
                        .as_ref()
                        .is_none_or(|master| before.contains(master) || *master == self.master_id)
                });
            if stays {
                self.members.insert(id.clone());
            }
        }
        let followers = view
            .nodes
            .iter()
            .filter(|(_, known)| known.master_id.as_deref() == Some(&self.master_id))
            .map(|(id, _)| id.clone());
        self.members.extend(followers);
        if !self.master_id.is_empty() {
            self.members.insert(self.master_id.clone());
        }
    }
}

/// Where replicas are reached that are not known to be down.
pub fn usable(replicas: &[Node]) -> Vec<Address> {
    replicas.iter().filter(|replica| !replica.failing).map(|replica| replica.address.clone()).collect()
}

/// Whether the node that was asked (its line says `myself`) is of the shard with these members: it, or
/// the master it follows, must be. `None`: it does not tell.
pub fn is_of(nodes: &[ClusterNode], members: &BTreeSet<String>) -> Option<bool> {
    let own = nodes.iter().find(|node| node.myself)?;
    let master = own.master_id.as_ref().filter(|_| !own.master).unwrap_or(&own.id);
    Some(members.contains(master))
}

#[cfg(test)]
mod tests;
