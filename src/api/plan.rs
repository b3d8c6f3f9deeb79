//! The validated form of a RedisMigration. Made once; nothing later reads the raw spec.

use std::collections::BTreeMap;

use crate::connection::RedisAccess;

pub use crate::api::spec::{
    CutoverMode, Delivery, ExistingKeys, FullResyncPolicy, ReadFrom, VerificationMode,
};

/// One migration, ready to run: every value in range, every secret located.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    pub namespace: String,
    /// `metadata.uid`, or `namespace.name` for a local manifest: the same at each start, and safe in
    /// a key or file name (letters, digits, `-` and `.`).
    pub uid: String,
    /// `metadata.generation`; 1 for a local manifest.
    pub generation: i64,
    pub source: SourcePlan,
    pub target: TargetPlan,
    /// Database on the source → database on the target; those not named keep their number.
    pub database_map: BTreeMap<u64, u64>,
    pub delivery: Delivery,
    pub limits: LimitsPlan,
    pub verification: VerificationPlan,
    pub cutover: CutoverPlan,
    pub failure_policy: FailurePolicyPlan,
}

#[derive(Clone, Debug)]
pub struct SourcePlan {
    pub access: RedisAccess,
    pub read_from: ReadFrom,
    /// `PSYNC`, or what the service renamed it to.
    pub psync_command: String,
}

#[derive(Clone, Debug)]
pub struct TargetPlan {
    pub access: RedisAccess,
    pub existing_keys: ExistingKeys,
    /// A cluster that serves databases other than 0.
    pub cluster_databases: bool,
}

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsPlan {
    pub pipeline_commands: usize,
    pub pipeline_bytes: usize,
    pub max_restore_bytes: u64,
    pub spool_memory: usize,
    pub spool_disk: u64,
    pub spool_retain: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerificationPlan {
    pub mode: VerificationMode,
    /// 1 to 100.
    pub sample_percent: u8,
    /// At least 1.
    pub rounds: u32,
    pub max_differences: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutoverPlan {
    pub mode: CutoverMode,
    pub approved: bool,
    pub max_lag_bytes: u64,
    pub max_lag_millis: u64,
    pub pause_source_writes: bool,
    pub pause_timeout_seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailurePolicyPlan {
    pub backoff_limit: u32,
    /// 0: no deadline.
    pub progress_deadline_seconds: u64,
    pub on_full_resync: FullResyncPolicy,
    pub max_quarantined: u64,
}

mod refuse;
mod validate;

pub use validate::{DEFAULT_NAMESPACE, validate};

/// One fault of a spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct SpecFault {
    /// Such as `spec.source.redis.endpoints[0]`.
    pub path: String,
    /// The fault, and what is allowed or to be done. Names secrets, never shows them.
    pub message: String,
    /// A Secret or a key in it that is not there, rather than a wrong field: it may come later.
    pub secret_missing: bool,
}
