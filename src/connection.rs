//! TCP and TLS conversations with one server: dial, AUTH, RESP2 calls, timeouts.
//!
//! [`Dialer`] opens a [`Connection`], whose commands are answered in order. Replication and target
//! lanes take the bare [`Stream`] out of it with [`Connection::into_parts`].

mod address;
mod conversation;
mod dial;
mod error;
mod secret;
mod stream;
#[cfg(test)]
pub(crate) mod test_server;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::BTreeMap;

pub use address::{Address, AddressError};
pub use conversation::Connection;
pub use dial::Dialer;
pub use error::ConnectionError;
pub use secret::{Secret, SecretError, SecretSource};
pub use stream::Stream;

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
