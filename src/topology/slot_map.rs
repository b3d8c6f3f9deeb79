use super::{Node, Role, Shard, Topology, TopologyError, discover};
use crate::connection::{Address, Dialer, RedisAccess, TopologyChoice};
use crate::slot::{SLOT_COUNT, SlotRanges};

const NOBODY: u16 = u16::MAX;

/// Which node serves each slot. Node numbers never change or get reused while the map lives, so they
/// can index lanes; a node that lost all its slots keeps its number.
#[derive(Clone, Debug)]
pub struct SlotMap {
    /// Always [`SLOT_COUNT`] long; a node number below `nodes.len()`, or [`NOBODY`].
    owners: Box<[u16]>,
    nodes: Vec<Node>,
    changes: u64,
}

impl SlotMap {
    /// Without a cluster, the one master has all slots.
    pub fn new(topology: &Topology) -> SlotMap {
        let mut map = SlotMap {
            owners: vec![NOBODY; usize::from(SLOT_COUNT)].into_boxed_slice(),
            nodes: Vec::new(),
            changes: 0,
        };
        map.adopt(&topology.shards);
        map
    }

    /// Number of the node that serves `slot`; `None`: nobody does, as far as is known.
    pub fn owner(&self, slot: u16) -> Option<usize> {
        self.owners.get(usize::from(slot)).filter(|owner| **owner != NOBODY).map(|owner| usize::from(*owner))
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn node(&self, number: usize) -> Option<&Node> {
        self.nodes.get(number)
    }

    /// The slots that a node serves.
    pub fn slots_of(&self, number: usize) -> SlotRanges {
        let mut slots = SlotRanges::default();
        for (slot, owner) in (0..SLOT_COUNT).zip(&self.owners) {
            if usize::from(*owner) == number {
                slots.insert(slot, slot);
            }
        }
        slots
    }

    /// The node at `address`, announced or reachable.
    pub fn number_of(&self, address: &Address) -> Option<usize> {
        let announced = self.nodes.iter().position(|node| node.announced == *address);
        announced.or_else(|| self.nodes.iter().position(|node| node.address == *address))
    }

    /// What MOVED said: `slot` is at `announced`, whose host is already filled in. Gives that node's
    /// number, a new one when it was not known.
    pub fn moved(&mut self, slot: u16, announced: &Address, dialer: &Dialer) -> Option<usize> {
        let number = match self.number_of(announced) {
            Some(number) => number,
            None => self.add(Node {
                address: dialer.reachable(announced),
                announced: announced.clone(),
                id: String::new(),
                failing: false,
            })?,
        };
        let owner = self.owners.get_mut(usize::from(slot))?;
        let before = std::mem::replace(owner, u16::try_from(number).ok()?);
        self.changes += u64::from(*owner != before);
        Some(number)
    }

    /// Asks the nodes known so far, and the deployment's endpoints, who serves what now.
    pub async fn refresh(&mut self, dialer: &Dialer) -> Result<(), TopologyError> {
        let mut endpoints: Vec<Address> = self.nodes.iter().map(|node| node.address.clone()).collect();
        for endpoint in &dialer.access().endpoints {
            if !endpoints.contains(endpoint) {
                endpoints.push(endpoint.clone());
            }
        }
        let access = RedisAccess { topology: TopologyChoice::Cluster, endpoints, ..dialer.access().clone() };
        let topology = discover(&access, dialer, Role::Target).await?;
        self.adopt(&topology.shards);
        Ok(())
    }

    /// Takes over who serves what; slots that no shard has belong to nobody.
    pub fn adopt(&mut self, shards: &[Shard]) {
        let before = self.owners.clone();
        self.owners.fill(NOBODY);
        for shard in shards {
            let Some(number) = self.known(&shard.master) else { continue };
            for slot in shard.slots.iter() {
                if let (Some(owner), Ok(number)) =
                    (self.owners.get_mut(usize::from(slot)), u16::try_from(number))
                {
                    *owner = number;
                }
            }
        }
        self.changes += u64::from(self.owners != before);
    }

    /// Another number than before: slots have changed hands in between.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// By announced address: a lane is a connection to an address, whatever node answers there.
    fn known(&mut self, node: &Node) -> Option<usize> {
        match self.number_of(&node.announced) {
            Some(number) => {
                if let Some(known) = self.nodes.get_mut(number) {
                    *known = node.clone();
                }
                Some(number)
            }
            None => self.add(node.clone()),
        }
    }

    fn add(&mut self, node: Node) -> Option<usize> {
        let number = self.nodes.len();
        if number >= usize::from(NOBODY) {
            return None;
        }
        self.nodes.push(node);
        Some(number)
    }
}
