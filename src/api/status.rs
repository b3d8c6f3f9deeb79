//! `status` of a RedisMigration. The same object is the Kubernetes status, a line of
//! `--output json`, the answer of `/metric` and what the terminal view is drawn from.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::spec::VerificationMode;

/// What is observed of one migration. Counters never go back within one run, but start over when a
/// full sync does.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The `metadata.generation` that this status answers.
    pub observed_generation: i64,
    /// Where the migration stands.
    pub phase: Phase,
    /// One line for people.
    pub message: String,
    /// When work began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it finished, whatever the outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Sums over all shards.
    pub progress: Progress,
    /// How far the target is behind.
    pub replication: Replication,
    /// One entry for each source master.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"]))]
    pub shards: Vec<ShardStatus>,
    /// What the comparison of both sides found.
    pub verification: VerificationStatus,
    /// Commands that the target refused for good.
    pub quarantine: Quarantine,
    /// The switch to the target.
    pub cutover: CutoverStatus,
    /// Conditions; types and reasons are listed in the documentation.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Where a migration, or one shard of it, stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
pub enum Phase {
    #[default]
    Pending,
    Preflight,
    FullSync,
    IncrementalSync,
    Verifying,
    CuttingOver,
    Completed,
    Failed,
    Suspended,
}

impl Phase {
    pub const ALL: [Phase; 9] = [
        Phase::Pending,
        Phase::Preflight,
        Phase::FullSync,
        Phase::IncrementalSync,
        Phase::Verifying,
        Phase::CuttingOver,
        Phase::Completed,
        Phase::Failed,
        Phase::Suspended,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Preflight => "Preflight",
            Phase::FullSync => "FullSync",
            Phase::IncrementalSync => "IncrementalSync",
            Phase::Verifying => "Verifying",
            Phase::CuttingOver => "CuttingOver",
            Phase::Completed => "Completed",
            Phase::Failed => "Failed",
            Phase::Suspended => "Suspended",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Of the full sync, 0 to 100.
    pub percent: i64,
    /// Keys of the snapshots that the target has acknowledged.
    pub keys_applied: i64,
    /// Keys that the snapshots announce; 0 when a source does not tell.
    pub keys_total: i64,
    /// Bytes of the snapshots read so far.
    pub bytes_read: i64,
    /// Bytes of the snapshots; 0 while unknown (diskless sync does not tell).
    pub bytes_total: i64,
    /// Commands of the replication streams that the target has acknowledged.
    pub commands_applied: i64,
    /// Keys of the snapshots that `spec.filter` left out.
    pub keys_filtered: i64,
    /// Commands of the replication streams that `spec.filter` left out, in whole or in part.
    pub commands_filtered: i64,
    /// Over the last few seconds.
    pub keys_per_second: i64,
    /// Until the full sync is done; 0 when done or unknown.
    pub eta_seconds: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Replication {
    /// Bytes received or announced by the sources and not acknowledged by the target.
    pub lag_bytes: i64,
    /// Age of the oldest such byte.
    pub lag_millis: i64,
    /// Shards in sync of all, such as "2/3".
    pub shards_in_sync: String,
    /// Full syncs that had to be repeated.
    pub full_resyncs: i64,
    /// Connections to a source that went on where they had stopped.
    pub resumes: i64,
}

/// One source master.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ShardStatus {
    /// Address of the master as its deployment announces it.
    pub id: String,
    /// Hash slots of a cluster's shard, such as "0-5460"; empty otherwise.
    pub slots: String,
    /// Who works on it.
    pub worker: String,
    /// Where this shard stands.
    pub phase: Phase,
    /// Replication id of the source's history.
    pub replication_id: String,
    /// Replication offset read from the source.
    pub received_offset: i64,
    /// Replication offset acknowledged by the target.
    pub applied_offset: i64,
    /// Bytes received or announced and not acknowledged by the target.
    pub lag_bytes: i64,
    /// Age of the oldest such byte.
    pub lag_millis: i64,
    /// Keys of the snapshot that the target has acknowledged.
    pub keys_applied: i64,
    /// Keys of a file that were left out because their time was over.
    pub keys_expired: i64,
    /// Commands of the stream that the target has acknowledged.
    pub commands_applied: i64,
    /// Keys of the snapshot that `spec.filter` left out.
    pub keys_filtered: i64,
    /// Commands of the stream that `spec.filter` left out, in whole or in part.
    pub commands_filtered: i64,
    /// Bytes of the snapshot read so far.
    pub bytes_read: i64,
    /// Bytes of the snapshot; 0 while unknown.
    pub bytes_total: i64,
    /// Reconnections that went on where they had stopped.
    pub resumes: i64,
    /// Full syncs that had to be repeated.
    pub full_resyncs: i64,
    /// Expiries are held on the target, as they are until the cutover: it expires nothing by itself.
    pub expiries_held: bool,
    /// Keys and hash fields that got their own expiries back.
    pub expiries_released: i64,
    /// What the target lacks of this shard by kind, as `status.quarantine.kinds` has it for all.
    pub set_aside: BTreeMap<String, i64>,
    /// Last error, empty when none. Holds no secret.
    pub last_error: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VerificationStatus {
    /// As asked for in the spec.
    pub mode: VerificationMode,
    /// Current or last round, from 1; 0 before the first.
    pub round: i64,
    /// Keys compared so far.
    pub keys_compared: i64,
    /// Keys that differ, are missing or are extra, as the last round left them.
    pub differences: i64,
    /// Keys that the target cannot hold by its version, such as streams before Redis 5.0: left out of the
    /// comparison.
    pub unsupported: i64,
    /// Keys that differed and were copied again (`verification.repair`).
    pub repaired: i64,
    /// Some of the differences.
    pub samples: Vec<DifferenceSample>,
    /// When the last round ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// One key on which source and target do not agree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DifferenceSample {
    /// Database on the source.
    pub db: i64,
    /// Printable form of the key.
    pub key: String,
    /// "Missing", "Different" or "Extra".
    pub kind: String,
    /// What differs, in few words; never the value.
    pub detail: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Quarantine {
    /// How many commands and keys the target refused for good, or has no equivalent for.
    pub commands: i64,
    /// These by kind (Commands, Values, Streams, Modules, Functions), and FieldExpiry: hashes and commands of which
    /// the target has all but the expiries of fields, which it does not know.
    pub kinds: BTreeMap<String, i64>,
    /// Some of them.
    pub samples: Vec<QuarantineSample>,
}

/// One refused command. Arguments other than the key are left out: they are data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct QuarantineSample {
    /// `id` of the shard it came from.
    pub shard: String,
    /// Replication offset of the command.
    pub offset: i64,
    /// Database on the target.
    pub db: i64,
    /// Name of the command.
    pub command: String,
    /// Printable form of its first key.
    pub key: String,
    /// What the target answered.
    pub error: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CutoverStatus {
    /// When the cutover began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// How long writes to the source stood still.
    pub write_pause_millis: i64,
    /// When the target took over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of api.md, which other people's scripts read.
    #[test]
    fn status_has_the_documented_shape() {
        let status = Status {
            shards: vec![ShardStatus::default()],
            start_time: Some(Time(k8s_openapi::jiff::Timestamp::from_second(1_790_000_000).unwrap())),
            ..Status::default()
        };
        let value = serde_json::to_value(&status).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "observedGeneration": 0, "phase": "Pending", "message": "",
                "startTime": "2026-09-21T14:13:20Z",
                "progress": {"percent": 0, "keysApplied": 0, "keysTotal": 0, "bytesRead": 0, "bytesTotal": 0,
                             "commandsApplied": 0, "keysFiltered": 0, "commandsFiltered": 0, "keysPerSecond": 0,
                             "etaSeconds": 0},
                "replication": {"lagBytes": 0, "lagMillis": 0, "shardsInSync": "", "fullResyncs": 0, "resumes": 0},
                "shards": [{"id": "", "slots": "", "worker": "", "phase": "Pending", "replicationId": "",
                            "receivedOffset": 0, "appliedOffset": 0, "lagBytes": 0, "lagMillis": 0,
                            "keysApplied": 0, "keysExpired": 0, "commandsApplied": 0, "keysFiltered": 0, "commandsFiltered": 0,
                            "bytesRead": 0, "bytesTotal": 0, "resumes": 0, "fullResyncs": 0, "expiriesHeld": false, "expiriesReleased": 0,
                            "setAside": {}, "lastError": ""}],
                "verification": {"mode": "Full", "round": 0, "keysCompared": 0, "differences": 0, "unsupported": 0, "repaired": 0, "samples": []},
                "quarantine": {"commands": 0, "kinds": {}, "samples": []},
                "cutover": {"writePauseMillis": 0},
                "conditions": [],
            })
        );
        assert_eq!(serde_json::from_value::<Status>(value).unwrap(), status);
    }
}
