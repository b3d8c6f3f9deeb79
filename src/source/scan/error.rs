use std::path::PathBuf;

use thiserror::Error;

use crate::connection::{Address, ConnectionError};
use crate::resp::{Next, ReplyVerdict};
use crate::source::replication::ReplicationError;
use crate::spool::SpoolError;
use crate::verify::wire::WireError;

/// Why not in pieces.
const WHOLE: &str =
    "values have to be read whole for a file, for a script (spec.filter.lua) and with existingKeys: Skip";

#[derive(Debug, Error)]
pub enum ScanError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The node is of another shard by now.
    #[error(transparent)]
    Elsewhere(ReplicationError),
    #[error("{address}: {command} refused: {text}; a scan needs it, grant it to the user")]
    Refused { address: Address, command: &'static str, text: String },
    /// Of one key, for which nothing is lost by that: its slot is moving.
    #[error("{address}: a key is served elsewhere now")]
    Moved { address: Address },
    #[error("{address}: the reply to {command} is not what this command returns")]
    Unexpected { address: Address, command: &'static str },
    #[error("{address} is a replica that does not follow its master now")]
    Unlinked { address: Address },
    #[error("{address}: the connection that tells of changes was lost: {why}")]
    Deaf { address: Address, why: String },
    #[error(
        "{address}: key {key} holds an element of {length} bytes, more than a scan can read; use source.type Replication"
    )]
    TooLarge { address: Address, key: String, length: u64 },
    #[error(
        "{address}: key {key} is of type {type_}, which cannot be read without DUMP; allow DUMP or exclude the key"
    )]
    UnknownType { address: Address, key: String, type_: String },
    #[error("{address}: the user may not DUMP, and {WHOLE}; allow DUMP")]
    NoDump { address: Address },
    #[error("{address}: what DUMP answers for key {key} is of an unknown form, and {WHOLE}; exclude the key")]
    UnknownForm { address: Address, key: String },
    #[error(
        "{address} holds more than {most} keys, which is as many as a scan remembers for one shard; use source.type Replication"
    )]
    TooMany { address: Address, most: u64 },
    #[error("{}: the names of keys cannot be kept there: {source}; see to the folder or give another --data-dir", folder.display())]
    Names { folder: PathBuf, source: std::io::Error },
    #[error(
        "{address}: a scan that was stopped can only begin anew ({why}), and failurePolicy.onFullResync is Fail"
    )]
    AnewForbidden { address: Address, why: &'static str },
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl ScanError {
    /// True when connecting again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connection(error) => error.is_transient(),
            Self::Wire(error) => !matches!(error, WireError::Garbled { .. }),
            Self::Elsewhere(error) => error.is_transient(),
            Self::Refused { text, .. } => matches!(
                ReplyVerdict::of(text.as_bytes()).next(),
                Next::Reroute | Next::RetryLater | Next::RetryUntilOperator
            ),
            Self::Unlinked { .. } | Self::Deaf { .. } | Self::Moved { .. } => true,
            Self::Unexpected { .. } | Self::TooLarge { .. } | Self::UnknownType { .. } => false,
            Self::NoDump { .. } | Self::UnknownForm { .. } => false,
            Self::TooMany { .. } | Self::Names { .. } | Self::AnewForbidden { .. } | Self::Spool(_) => false,
        }
    }

    /// True when it may pass on a server that was read before: a promoted one may still lack the user.
    pub fn may_pass(&self) -> bool {
        self.is_transient()
            || match self {
                Self::Connection(_) | Self::NoDump { .. } => true,
                Self::Refused { text, .. } => ReplyVerdict::of(text.as_bytes()) == ReplyVerdict::Auth,
                _ => false,
            }
    }

    /// An error reply to `command`; never shows an argument that the server echoes.
    pub fn refused(address: &Address, command: &'static str, text: &[u8]) -> Self {
        match ConnectionError::from_reply(address, command.as_bytes(), text) {
            ConnectionError::Server { address, text, .. } => Self::Refused { address, command, text },
            error => Self::Connection(error),
        }
    }
}
