//! Which lane a key belongs to.

use crate::slot::{SLOT_COUNT, slot};
use crate::topology::SlotMap;

#[derive(Clone, Debug)]
pub enum Router {
    /// One server: lane 0.
    Single,
    /// A cluster: the lane's index is the node's number in the map.
    Slots(SlotMap),
}

impl Router {
    pub fn is_cluster(&self) -> bool {
        matches!(self, Self::Slots(_))
    }

    #[inline]
    pub fn lane(&self, key: &[u8]) -> usize {
        match self {
            Self::Single => 0,
            Self::Slots(_) => self.lane_of_slot(slot(key)),
        }
    }

    /// A slot that nobody serves goes to any node, which refuses the command: that is then retried.
    pub fn lane_of_slot(&self, slot: u16) -> usize {
        match self {
            Self::Single => 0,
            Self::Slots(map) => map
                .owner(slot)
                .or_else(|| (0..SLOT_COUNT).find_map(|slot| map.owner(slot)))
                .unwrap_or_default(),
        }
    }
}
