use std::time::Duration;

use thiserror::Error;

use crate::connection::{Address, ConnectionError};
use crate::spool::SpoolError;

#[derive(Debug, Error)]
pub enum ReplicationError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(
        "{address}: {command} refused: {text}; grant it to the user (+psync +replconf) or set psyncCommand"
    )]
    Refused { address: Address, command: String, text: String },
    #[error("{address}: not ready to replicate: {text}")]
    NotReady { address: Address, text: String },
    #[error("{address}: {what} where the reply to PSYNC or the RDB's length was due: {line:?}")]
    Handshake { address: Address, what: &'static str, line: String },
    #[error("{address}: nothing received for {after:?}: the link is half-open")]
    Silent { address: Address, after: Duration },
    #[error("{address}: the source closed the replication link {part}")]
    Closed { address: Address, part: &'static str },
    #[error("{address}: replication link: {source}")]
    Io { address: Address, source: std::io::Error },
    #[error("{address} is not where the shard is any more: its master is {master}")]
    Elsewhere { address: Address, master: Address },
    #[error("{address} is a node of another shard now; waiting until the cluster tells where this one is")]
    NotOurs { address: Address },
    #[error(
        "{address} is a replica that is at offset {offset}, behind {received} which was received already; waiting for it or for a master"
    )]
    Behind { address: Address, offset: i64, received: i64 },
    #[error(
        "{address}: the source can only send everything again ({why}), and failurePolicy.onFullResync is Fail"
    )]
    FullResyncForbidden { address: Address, why: String },
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl ReplicationError {
    /// True when connecting again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connection(error) => error.is_transient(),
            Self::NotReady { .. } | Self::Silent { .. } | Self::Closed { .. } | Self::Io { .. } => true,
            Self::Elsewhere { .. } | Self::NotOurs { .. } | Self::Behind { .. } => true,
            Self::Handshake { .. } => true,
            Self::Refused { .. } | Self::FullResyncForbidden { .. } | Self::Spool(_) => false,
        }
    }

    /// True when it may pass on a link that has worked before: a promoted server may still lack the user,
    /// and a password may be in the middle of being changed.
    pub fn may_pass(&self) -> bool {
        self.is_transient() || matches!(self, Self::Connection(_) | Self::Refused { .. })
    }
}
