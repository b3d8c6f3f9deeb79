//! Which server speaks: flavour and version, as INFO tells them.

use std::fmt;

/// Redis and Valkey share a protocol, but number RDB types and versions apart from 2024 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flavor {
    Redis,
    Valkey,
}

/// Ordered by version within one flavour only; compare flavours first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServerVersion {
    pub flavor: Flavor,
    pub major: u16,
    pub minor: u16,
    pub patch: u16,
}

impl ServerVersion {
    /// True when this server is at least `major.minor` in the common line of features:
    /// every Valkey counts as Redis 7.2 or newer.
    pub fn has_redis(&self, major: u16, minor: u16) -> bool {
        match self.flavor {
            Flavor::Redis => (self.major, self.minor) >= (major, minor),
            Flavor::Valkey => (major, minor) <= (7, 2),
        }
    }

    /// Fields of a hash can expire.
    pub fn has_field_expiry(&self) -> bool {
        match self.flavor {
            Flavor::Redis => self.has_redis(7, 4),
            Flavor::Valkey => self.major >= 9,
        }
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.flavor {
            Flavor::Redis => "Redis",
            Flavor::Valkey => "Valkey",
        };
        write!(f, "{name} {}.{}.{}", self.major, self.minor, self.patch)
    }
}
