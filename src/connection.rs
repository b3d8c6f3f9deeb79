//! TCP and TLS conversations with one server: dial, AUTH, RESP2 calls, timeouts.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Host and port of one server. Displays as `host:port`, IPv6 hosts in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

/// A secret that is read when it is needed, so that a rotated file needs no restart. Never printed.
#[derive(Clone)]
pub enum Secret {
    Literal(Vec<u8>),
    File(PathBuf),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Password, and the ACL user it belongs to (`None`: the default user).
#[derive(Clone, Debug)]
pub struct Credentials {
    pub username: Option<String>,
    pub password: Secret,
}

/// TLS as the manifest asks for it; PEM contents.
#[derive(Clone, Debug)]
pub struct TlsAccess {
    /// `None`: the system's roots.
    pub ca: Option<Secret>,
    pub client_certificate: Option<Secret>,
    pub client_key: Option<Secret>,
    /// `None`: the host that is dialled.
    pub server_name: Option<String>,
    pub insecure_skip_verify: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopologyChoice {
    Auto,
    Standalone,
    Sentinel,
    Cluster,
}

#[derive(Clone, Debug)]
pub struct SentinelAccess {
    pub master: String,
    pub credentials: Option<Credentials>,
}

/// How to reach one Redis deployment: the manifest's `redis` block, validated, secrets located.
#[derive(Clone, Debug)]
pub struct RedisAccess {
    pub topology: TopologyChoice,
    /// Never empty.
    pub endpoints: Vec<Address>,
    pub sentinel: Option<SentinelAccess>,
    pub credentials: Option<Credentials>,
    pub tls: Option<TlsAccess>,
    /// Announced address → reachable address.
    pub endpoint_map: BTreeMap<Address, Address>,
}
