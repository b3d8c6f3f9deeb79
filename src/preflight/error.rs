use thiserror::Error;

use crate::api::conditions::reason;
use crate::connection::{Address, ConnectionError};
use crate::resp::ReplyVerdict;
use crate::slot::SlotRanges;
use crate::topology::{Role, TopologyError};

/// Why a migration is not started. One line each, with what to do.
#[derive(Debug, Error)]
pub enum PreflightError {
    #[error(transparent)]
    Topology(TopologyError),
    #[error("{role}: {source}")]
    Connection { role: Role, source: ConnectionError },
    #[error("{role}: {address} is loading its data{}; wait until it is done", eta(.eta_seconds))]
    Loading { role: Role, address: Address, eta_seconds: Option<u64> },
    #[error(
        "source: {address} is a replica whose link to its master is down; repair the link or read from another server"
    )]
    ReplicaUnlinked { address: Address },
    #[error("target: {address} is a replica{}; name its master as the target, or promote it", of(.master))]
    TargetIsReplica { address: Address, master: Option<Address> },
    #[error("{role}: nobody serves the cluster slots {slots}; repair the cluster first")]
    Uncovered { role: Role, slots: SlotRanges },
    #[error(
        "source {source_address} and target {target_address} are {what}; a migration onto itself would destroy data"
    )]
    SameServer { source_address: Address, target_address: Address, what: &'static str },
    /// `what` names both sides and what is lost.
    #[error("{what}, and failurePolicy.maxQuarantined is 0; use a newer target, or allow some")]
    NoEquivalent { what: String },
    #[error(
        "the source holds keys in database {}, but the target has only {available}; map them with databaseMap or exclude them",
        list(.databases)
    )]
    Databases { databases: Vec<u64>, available: u64 },
    #[error(
        "target: maxmemory {maxmemory} B is less than the {needed} B that the source's data takes; raise maxmemory"
    )]
    TooLittleMemory { maxmemory: u64, needed: u64 },
    #[error(
        "target: {address} already holds keys ({keys} counting ours, first found in database {database}); empty it, or set existingKeys to Replace or Skip"
    )]
    TargetNotEmpty { address: Address, database: u64, keys: u64 },
    #[error("source: {address} knows no command {command}; set psyncCommand to the name the service gave it")]
    NoPsync { address: Address, command: String },
    #[error("{role}: {address}: the user may not run {command}; extend its ACL: {text}")]
    Forbidden { role: Role, address: Address, command: String, text: String },
}

impl PreflightError {
    /// The condition's reason, one of [`reason`].
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Topology(error) => match (error.connection(), error.role()) {
                (Some(source), role) => unreachable(role, source),
                (None, _) => reason::PREFLIGHT_FAILED,
            },
            Self::Connection { role, source } => unreachable(*role, source),
            Self::TargetNotEmpty { .. } => reason::TARGET_NOT_EMPTY,
            Self::Forbidden { .. } => reason::AUTH_FAILED,
            Self::Loading { .. }
            | Self::ReplicaUnlinked { .. }
            | Self::TargetIsReplica { .. }
            | Self::Uncovered { .. }
            | Self::SameServer { .. }
            | Self::NoEquivalent { .. }
            | Self::Databases { .. }
            | Self::TooLittleMemory { .. }
            | Self::NoPsync { .. } => reason::PREFLIGHT_FAILED,
        }
    }

    /// True when trying again later may do, with no setting changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Topology(error) => error.is_transient(),
            Self::Connection { source, .. } => source.is_transient(),
            Self::Loading { .. } | Self::ReplicaUnlinked { .. } | Self::Uncovered { .. } => true,
            _ => false,
        }
    }
}

impl From<TopologyError> for PreflightError {
    /// A server that is loading may refuse the very commands that discovery needs.
    fn from(error: TopologyError) -> PreflightError {
        match (&error, error.connection()) {
            (_, Some(ConnectionError::Server { address, text, .. })) if is_loading(text) => {
                PreflightError::Loading { role: error.role(), address: address.clone(), eta_seconds: None }
            }
            _ => PreflightError::Topology(error),
        }
    }
}

fn is_loading(text: &str) -> bool {
    ReplyVerdict::of(text.as_bytes()) == ReplyVerdict::Loading
}

fn unreachable(role: Role, source: &ConnectionError) -> &'static str {
    match (source, role) {
        (source, _) if source.is_auth() => reason::AUTH_FAILED,
        (ConnectionError::Secret(_), _) => reason::SECRET_NOT_FOUND,
        (_, Role::Source) => reason::SOURCE_UNREACHABLE,
        (_, Role::Target) => reason::TARGET_UNREACHABLE,
    }
}

fn eta(seconds: &Option<u64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(" (about {seconds} s left)"))
}

fn of(master: &Option<Address>) -> String {
    master.as_ref().map_or_else(String::new, |master| format!(" of {master}"))
}

fn list(databases: &[u64]) -> String {
    databases.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}
