//! `spec` of a RedisMigration as it is written. Defaults and bounds live here, so that the CRD shows
//! them; everything past parsing reads the validated [`Plan`](crate::api::Plan) instead.
//!
//! The doc comments of fields are the descriptions in the CustomResourceDefinition. Numbers are
//! `i64`, the widest that Kubernetes keeps exactly.

mod deployment;
mod policy;
mod transform;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use deployment::{
    Auth, KeyspaceNotifications, ReadFrom, SecretKeyRef, SecretRef, Sentinel, SourceRedis, TargetRedis, Tls,
    Topology,
};
pub use policy::{
    Cutover, CutoverMode, ExternalName, FailurePolicy, FullResyncPolicy, Limits, SecretSwitch, ServiceSwitch,
    SourceLimits, Switch, Verification, VerificationMode,
};
pub use transform::{ConfigMapKeyRef, Databases, Filter, FilterCommands, FilterKeys, KeyPattern, Lua};

use crate::api::status::Status;

/// Longest `metadata.name`: leaves room for what is appended to it in names of Leases and keys.
pub const NAME_MAX: usize = 52;

#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "redis-migration.io",
    version = "v1alpha1",
    kind = "RedisMigration",
    namespaced,
    status = "Status",
    derive = "PartialEq",
    shortname = "rmig",
    category = "all",
    doc = "Moves one Redis or Valkey deployment to another while it serves writes.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Progress",
        type_ = "integer",
        json_path = ".status.progress.percent",
        description = "Percent of the full sync"
    ),
    printcolumn(
        name = "Lag",
        type_ = "integer",
        json_path = ".status.replication.lagBytes",
        description = "Bytes not yet acknowledged by the target"
    ),
    printcolumn(
        name = "Shards",
        type_ = "string",
        json_path = ".status.replication.shardsInSync",
        description = "Shards in sync"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.source.type", priority = 1),
    printcolumn(name = "Target", type_ = "string", json_path = ".spec.target.type", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    validation = Rule::new("self.metadata.name.size() <= 52").message("metadata.name: at most 52 characters"),
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.cutover) || !has(oldSelf.status.cutover.startTime) || !oldSelf.spec.cutover.approved || self.spec.cutover.approved"
    )
    .message("spec.cutover.approved: cannot be taken back once the cutover has started"),
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.shards) || oldSelf.status.shards.size() == 0 || self.spec.filter == oldSelf.spec.filter && self.spec.databaseMap == oldSelf.spec.databaseMap && self.spec.delivery == oldSelf.spec.delivery"
    )
    .message("spec.filter, spec.databaseMap and spec.delivery: cannot be changed once copying has begun")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "self.target.type != 'Redis' || !has(self.target.redis) || self.target.redis.topology != 'Cluster' || self.target.redis.clusterDatabases || self.databaseMap.all(db, self.databaseMap[db] == 0)"
    )
    .message("databaseMap: a cluster has database 0 only, unless target.redis.clusterDatabases says otherwise")
)]
pub struct RedisMigrationSpec {
    /// Where the data comes from. Cannot be changed, secret references aside.
    pub source: Source,
    /// Where the data goes. Cannot be changed, secret references aside.
    pub target: Target,
    /// What to leave out or change on the way. Cannot be changed once copying has begun.
    #[serde(default)]
    pub filter: Filter,
    /// Database on the source → database on the target. Databases that are not named keep their
    /// number. Cannot be changed once copying has begun.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 1024))]
    pub database_map: BTreeMap<String, i64>,
    /// ExactlyOnce keeps checkpoints in the target, together with the data; AtLeastOnce writes no
    /// keys of its own, and may repeat commands after a failure. Cannot be changed once copying has begun.
    #[serde(default)]
    pub delivery: Delivery,
    /// How much at once. May change while running.
    #[serde(default)]
    pub limits: Limits,
    /// How both sides are compared.
    #[serde(default)]
    pub verification: Verification,
    /// When and how the target takes over.
    #[serde(default)]
    pub cutover: Cutover,
    /// When to give up.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Stops the work, checkpoints kept, until it is false again.
    #[serde(default)]
    pub suspend: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Delivery {
    #[default]
    ExactlyOnce,
    AtLeastOnce,
}

/// Where the data comes from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.redis) == (self.type in ['Replication', 'Scan'])")
        .message("redis: needed by type Replication and Scan, not allowed with another type"),
    validation = Rule::new("has(self.rdbFile) == (self.type == 'RdbFile')")
        .message("rdbFile: needed by type RdbFile, not allowed with another type"),
    validation = Rule::new("self.type == oldSelf.type").message("type: cannot be changed")
)]
pub struct Source {
    /// Replication follows a live server, Scan copies what it holds now, RdbFile reads snapshots.
    #[serde(rename = "type")]
    pub type_: SourceType,
    /// For Replication and Scan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<SourceRedis>,
    /// For RdbFile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdb_file: Option<SourceRdbFile>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum SourceType {
    Replication,
    Scan,
    RdbFile,
}

/// Snapshot files to read.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.uris == oldSelf.uris").message("uris: cannot be changed"))]
pub struct SourceRdbFile {
    /// file://, s3://, gs://, az://, http:// or https://; globs are allowed.
    #[schemars(length(min = 1, max = 1000), inner(length(min = 1, max = 1024)))]
    pub uris: Vec<String>,
    /// Secret with what the store asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
}

/// Where the data goes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.redis) == (self.type == 'Redis')")
        .message("redis: needed by type Redis, not allowed with another type"),
    validation = Rule::new("has(self.rdbFile) == (self.type == 'RdbFile')")
        .message("rdbFile: needed by type RdbFile, not allowed with another type"),
    validation = Rule::new("has(self.json) == (self.type == 'Json')")
        .message("json: needed by type Json, not allowed with another type"),
    validation = Rule::new("self.type == oldSelf.type && self.existingKeys == oldSelf.existingKeys")
        .message("type and existingKeys: cannot be changed")
)]
pub struct Target {
    /// Redis is a server or cluster, RdbFile and Json are files.
    #[serde(rename = "type")]
    pub type_: TargetType,
    /// For Redis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<TargetRedis>,
    /// For RdbFile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdb_file: Option<TargetFile>,
    /// For Json.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<TargetFile>,
    /// What to do with a key that the target already had: Fail refuses a target that is not empty,
    /// Replace overwrites, Skip keeps the target's.
    #[serde(default)]
    pub existing_keys: ExistingKeys,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum TargetType {
    Redis,
    RdbFile,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ExistingKeys {
    #[default]
    Fail,
    Replace,
    Skip,
}

/// A file to write, one for each shard.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.uri == oldSelf.uri").message("uri: cannot be changed"))]
pub struct TargetFile {
    /// `{shard}` in it becomes the shard's id.
    #[schemars(length(min = 1, max = 1024))]
    pub uri: String,
    /// Secret with what the store asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
}
