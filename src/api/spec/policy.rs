//! Limits, verification, cutover and failure policy: how the work is done.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::quantity::Quantity;

/// How much at once.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// Commands under way per connection, so many of which a restart may send again; in a full sync eight times as
    /// many.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub pipeline_commands: i64,
    /// Unanswered bytes per connection.
    pub pipeline_bytes: Quantity,
    /// Larger values are streamed in chunks. At most the target's proto-max-bulk-len.
    pub max_restore_bytes: Quantity,
    /// Bytes sent to the target per second, by all shards together; 0: unlimited. The source is read on: what
    /// cannot be sent yet waits in the spool.
    #[schemars(range(min = 0))]
    pub bytes_per_second: i64,
    /// Keys of the full sync, and commands after it, sent to the target per second; 0: unlimited.
    #[schemars(range(min = 0))]
    pub keys_per_second: i64,
    /// Full syncs at once; 0: all.
    #[schemars(range(min = 0))]
    pub parallel_shards: i64,
    /// While a source is beyond these, no full sync of it begins, and a scan of it pauses.
    pub source: SourceLimits,
    /// Bytes of the replication stream held in memory per shard before they go to disk.
    pub spool_memory: Quantity,
    /// Bytes held on disk per shard; beyond them the source is left unread.
    pub spool_disk: Quantity,
    /// Applied bytes kept per shard, so that a failover of the target can be replayed.
    pub spool_retain: Quantity,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pipeline_commands: 1024,
            pipeline_bytes: mebibytes("16Mi", 16),
            max_restore_bytes: mebibytes("64Mi", 64),
            bytes_per_second: 0,
            keys_per_second: 0,
            parallel_shards: 0,
            source: SourceLimits::default(),
            spool_memory: mebibytes("64Mi", 64),
            spool_disk: mebibytes("10Gi", 10 << 10),
            spool_retain: mebibytes("64Mi", 64),
        }
    }
}

/// What a source may be made to bear; 0: off.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SourceLimits {
    /// Milliseconds until it answers a PING.
    #[schemars(range(min = 0))]
    pub max_latency_millis: i64,
    /// Share of its host's memory that the server holds: the child that writes a snapshot may need as much again.
    #[schemars(range(min = 0, max = 100))]
    pub max_fork_memory_percent: i64,
    /// Bytes that wait in it for its clients and replicas.
    pub max_output_buffer: Quantity,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self { max_latency_millis: 0, max_fork_memory_percent: 0, max_output_buffer: Quantity::from(0) }
    }
}

/// The text, or the plain number should the text not parse; a test holds both equal.
fn mebibytes(text: &str, count: i64) -> Quantity {
    text.parse().unwrap_or_else(|_| Quantity::from(count << 20))
}

/// How both sides are compared.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Verification {
    /// Full compares every value, Sample some of them, Keys only existence, type and expiry.
    pub mode: VerificationMode,
    /// Share of the keys that Sample compares, in percent.
    #[schemars(range(min = 1, max = 100))]
    pub sample_percent: i64,
    /// Keys that differ are compared again, so that those in flight settle; the last round counts.
    #[schemars(range(min = 1, max = 100))]
    pub rounds: i64,
    /// More than these fail the verification.
    #[schemars(range(min = 0))]
    pub max_differences: i64,
    /// Copies again what differs.
    pub repair: bool,
}

impl Default for Verification {
    fn default() -> Self {
        Self { mode: VerificationMode::Full, sample_percent: 1, rounds: 3, max_differences: 0, repair: false }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
pub enum VerificationMode {
    #[default]
    Full,
    Sample,
    Keys,
    Off,
}

/// When and how the target takes over.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Cutover {
    /// Manual waits for `approved`, Automatic goes ahead as soon as it is safe, Never follows until
    /// it is stopped.
    pub mode: CutoverMode,
    /// The go-ahead for Manual.
    pub approved: bool,
    /// Does not begin while the target is further behind than this.
    #[schemars(range(min = 0))]
    pub max_lag_bytes: i64,
    /// Does not begin while the target is further behind than this.
    #[schemars(range(min = 0))]
    pub max_lag_millis: i64,
    /// Holds writes on the source (CLIENT PAUSE) while the last bytes are moved.
    pub pause_source_writes: bool,
    /// For at most so long; then writes go on and the cutover is tried again.
    #[schemars(range(min = 1, max = 3600))]
    pub pause_timeout_seconds: i64,
    /// What to point at the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
}

impl Default for Cutover {
    fn default() -> Self {
        Self {
            mode: CutoverMode::Manual,
            approved: false,
            max_lag_bytes: 65536,
            max_lag_millis: 1000,
            pause_source_writes: true,
            pause_timeout_seconds: 10,
            switch: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum CutoverMode {
    #[default]
    Manual,
    Automatic,
    Never,
}

/// Objects that clients find their Redis by.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Switch {
    /// A Service to point elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceSwitch>,
    /// A Secret to rewrite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretSwitch>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSwitch {
    /// Name of the Service.
    pub name: String,
    /// Where it points afterwards.
    pub to: ExternalName,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExternalName {
    /// DNS name.
    pub external_name: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretSwitch {
    /// Name of the Secret.
    pub name: String,
    /// Key in it.
    pub key: String,
    /// What stands there afterwards.
    pub value: String,
}

/// When to give up.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FailurePolicy {
    /// How often shards start over with a full sync after a damaged transfer, before the migration fails.
    /// Lost connections do not count: they are tried again until `progressDeadlineSeconds`.
    #[schemars(range(min = 0, max = 1000))]
    pub backoff_limit: i64,
    /// Fails when nothing moves for so long; 0: never.
    #[schemars(range(min = 0))]
    pub progress_deadline_seconds: i64,
    /// Whether a full sync may be repeated when the source cannot resume.
    pub on_full_resync: FullResyncPolicy,
    /// More quarantined commands than this fail the migration.
    #[schemars(range(min = 0))]
    pub max_quarantined: i64,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self {
            backoff_limit: 6,
            progress_deadline_seconds: 600,
            on_full_resync: FullResyncPolicy::Allow,
            max_quarantined: 1000,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum FullResyncPolicy {
    #[default]
    Allow,
    Fail,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_sizes_are_what_their_text_says() {
        let limits = Limits::default();
        assert_eq!(limits.pipeline_bytes, "16Mi".parse().unwrap());
        assert_eq!(limits.spool_disk, "10Gi".parse().unwrap());
        assert_eq!(limits.spool_disk.bytes(), 10 << 30);
    }
}
