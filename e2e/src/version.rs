//! The servers that e2e/setup.sh put into the cache.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// Flavour and version of a server; knows which features the dataset and the writer may use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    pub valkey: bool,
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

const fn redis(major: u32, minor: u32, patch: u32) -> Version {
    Version { valkey: false, major, minor, patch }
}

const fn valkey(major: u32, minor: u32, patch: u32) -> Version {
    Version { valkey: true, major, minor, patch }
}

impl Version {
    pub const REDIS_2_8: Self = redis(2, 8, 17);
    pub const REDIS_3_0: Self = redis(3, 0, 5);
    pub const REDIS_3_2: Self = redis(3, 2, 6);
    pub const REDIS_5_0: Self = redis(5, 0, 6);
    pub const REDIS_6_2: Self = redis(6, 2, 14);
    pub const REDIS_7_0: Self = redis(7, 0, 15);
    pub const REDIS_8_2: Self = redis(8, 2, 3);
    pub const VALKEY_8_1: Self = valkey(8, 1, 8);
    pub const VALKEY_9_1: Self = valkey(9, 1, 2);

    pub const ALL: [Self; 9] = [
        Self::REDIS_2_8,
        Self::REDIS_3_0,
        Self::REDIS_3_2,
        Self::REDIS_5_0,
        Self::REDIS_6_2,
        Self::REDIS_7_0,
        Self::REDIS_8_2,
        Self::VALKEY_8_1,
        Self::VALKEY_9_1,
    ];

    /// At least this Redis; every Valkey is a Redis 7.2 with additions of its own.
    pub fn has(self, major: u32, minor: u32) -> bool {
        if self.valkey { (major, minor) <= (7, 2) } else { (self.major, self.minor) >= (major, minor) }
    }

    /// Fields of a hash can expire.
    pub fn has_field_expiry(self) -> bool {
        if self.valkey { self.major >= 9 } else { self.has(7, 4) }
    }

    /// Takes `SET … KEEPTTL`, HSETEX and the like as the newest stream holds them: a target must be
    /// at least as new as the source, and of the same flavour once both differ (7.2 on).
    pub fn loads_from(self, source: Self) -> bool {
        match (source.valkey, self.valkey) {
            (false, true) => !source.has(7, 4),
            (true, false) => source.major < 9 && self.has(8, 2),
            _ => self >= source,
        }
    }

    /// The server's executable.
    pub fn binary(self) -> Result<PathBuf> {
        let cache = std::env::var_os("REDIS_MIGRATION_CACHE")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.cache"), PathBuf::from);
        let name = if self.valkey { "valkey-server" } else { "redis-server" };
        let file = cache.join("servers").join(self.to_string()).join(name);
        ensure!(file.exists(), "{} is missing: run `make setup`", file.display());
        Ok(file)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.valkey { "valkey" } else { "redis" };
        write!(f, "{name}-{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Version {
    type Err = anyhow::Error;

    /// Reads `redis-7.0.15` or `valkey-9.1.2`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, numbers) = text.split_once('-').context("no flavour")?;
        let mut parts = numbers.split('.').map(str::parse::<u32>);
        let mut next = || parts.next().context("three numbers expected")?.context("not a number");
        Ok(Self { valkey: name == "valkey", major: next()?, minor: next()?, patch: next()? })
    }
}
