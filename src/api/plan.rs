//! The validated form of a RedisMigration. Made once; nothing later reads the raw spec.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::connection::RedisAccess;
pub use crate::object::{FileUri, StoreCredentials};
use crate::source::pressure::PressureLimits;
use crate::transform::Transform;

mod copied_by;

pub use copied_by::CopiedBy;

pub use crate::api::spec::{
    CutoverMode, Delivery, ExistingKeys, FullResyncPolicy, KeyspaceNotifications, ReadFrom, VerificationMode,
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
    /// What is left out on the way; `None`: nothing.
    pub transform: Option<Arc<Transform>>,
    /// Database on the source → database on the target; those not named keep their number.
    pub database_map: BTreeMap<u64, u64>,
    pub delivery: Delivery,
    pub copied_by: CopiedBy,
    pub limits: LimitsPlan,
    pub verification: VerificationPlan,
    pub cutover: CutoverPlan,
    pub failure_policy: FailurePolicyPlan,
}

/// Where the data come from.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one")]
pub enum SourcePlan {
    Redis(RedisSource),
    RdbFile(SourceFiles),
}

#[derive(Clone, Debug)]
pub struct RedisSource {
    pub access: RedisAccess,
    pub read_from: ReadFrom,
    /// `PSYNC`, or what the service renamed it to.
    pub psync_command: String,
    pub way: SourceWay,
    pub keyspace_notifications: KeyspaceNotifications,
    /// For a scan, to ask how keys were used.
    pub eviction_data: bool,
}

/// How a server is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceWay {
    Replication,
    Scan,
}

#[derive(Clone, Debug)]
pub struct SourceFiles {
    /// As written; each names one file or, as a glob, several.
    pub uris: Vec<FileUri>,
    pub credentials: StoreCredentials,
}

#[derive(Clone, Debug)]
pub struct TargetPlan {
    pub existing_keys: ExistingKeys,
    pub place: TargetPlace,
}

/// Where the data go.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one")]
pub enum TargetPlace {
    Redis(RedisTarget),
    RdbFile(TargetFiles),
    Json(TargetFiles),
}

#[derive(Clone, Debug)]
pub struct RedisTarget {
    pub access: RedisAccess,
    /// A cluster that serves databases other than 0.
    pub cluster_databases: bool,
}

/// Stands for the name of the shard in the URI of [`TargetFiles`].
pub const SHARD: &str = "{shard}";

/// One file a shard.
#[derive(Clone, Debug)]
pub struct TargetFiles {
    /// `{shard}` in it becomes the shard's name.
    pub uri: String,
    pub credentials: StoreCredentials,
}

impl SourcePlan {
    pub fn redis(&self) -> Option<&RedisSource> {
        match self {
            Self::Redis(redis) => Some(redis),
            Self::RdbFile(_) => None,
        }
    }
}

impl TargetPlan {
    pub fn redis(&self) -> Option<&RedisTarget> {
        match &self.place {
            TargetPlace::Redis(redis) => Some(redis),
            TargetPlace::RdbFile(_) | TargetPlace::Json(_) => None,
        }
    }
}

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsPlan {
    pub pipeline_commands: usize,
    pub pipeline_bytes: usize,
    pub max_restore_bytes: u64,
    /// 0: no limit.
    pub bytes_per_second: u64,
    /// 0: no limit.
    pub keys_per_second: u64,
    /// 0: all.
    pub parallel_shards: usize,
    pub source: PressureLimits,
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
    /// Keys that differ are copied again, and compared again.
    pub repair: bool,
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

impl CutoverPlan {
    /// As soon as it is safe; nobody is waited for.
    pub fn goes_ahead(&self) -> bool {
        match self.mode {
            CutoverMode::Never => false,
            CutoverMode::Manual => self.approved,
            CutoverMode::Automatic => true,
        }
    }
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
