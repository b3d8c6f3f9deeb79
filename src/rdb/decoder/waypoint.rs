//! Going on in the middle of an RDB without having seen what comes before.

use super::{Decoder, State};
use crate::rdb::event::Limits;
use crate::version::Flavor;

/// A place between two parts of an RDB, with all that a decoder needs to know of what comes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waypoint {
    /// Bytes before it. 0, and only 0, is before the header.
    pub position: u64,
    pub flavor: Flavor,
    /// Of the header; 0 before it.
    pub version: u16,
    /// The database that keys belong to.
    pub db: u64,
}

impl Decoder {
    /// Where this decoder stands; `None` inside of a value that comes in parts, and behind the end.
    pub fn waypoint(&self) -> Option<Waypoint> {
        match self.state {
            // What was seen of a value that is not consumed yet is seen again.
            State::Header | State::Body | State::Value(_) => {
                let Self { position, flavor, version, db, .. } = *self;
                Some(Waypoint { position, flavor, version, db })
            }
            State::Large(_) | State::Skip(_) | State::Ended => None,
        }
    }

    /// Goes on at a place where another decoder stood.
    pub fn at(limits: Limits, waypoint: Waypoint) -> Self {
        let Waypoint { position, flavor, version, db } = waypoint;
        let state = if version == 0 { State::Header } else { State::Body };
        Self { position, flavor, version, db, state, ..Self::new(limits) }
    }
}
