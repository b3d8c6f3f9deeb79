//! How to reach one Redis deployment.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A deployment to read from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.topology != 'Sentinel' || has(self.sentinel)")
        .message("sentinel: needed by topology Sentinel"),
    validation = Rule::new(
        "self.topology == oldSelf.topology && self.endpoints == oldSelf.endpoints && has(self.sentinel) == has(oldSelf.sentinel) && self.readFrom == oldSelf.readFrom && self.endpointMap == oldSelf.endpointMap && self.psyncCommand == oldSelf.psyncCommand && self.keyspaceNotifications == oldSelf.keyspaceNotifications && self.evictionData == oldSelf.evictionData"
    )
    .message("the source cannot be changed, secret references aside")
)]
pub struct SourceRedis {
    /// Auto finds out by asking.
    #[serde(default)]
    pub topology: Topology,
    /// `host:port`; any one node of a cluster is enough; for Sentinel the sentinels.
    #[schemars(length(min = 1, max = 1000), inner(length(min = 1, max = 300)))]
    pub endpoints: Vec<String>,
    /// Which master to ask the sentinels for, and how.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel: Option<Sentinel>,
    /// User and password; left out when the server asks for none.
    #[serde(default)]
    pub auth: Auth,
    /// Transport encryption.
    #[serde(default)]
    pub tls: Tls,
    /// PreferReplica spares the master: of its replicas the one with the highest offset is read.
    #[serde(default)]
    pub read_from: ReadFrom,
    /// Announced address → reachable address, for servers behind a proxy or NAT.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 1000))]
    pub endpoint_map: BTreeMap<String, String>,
    /// For services that rename PSYNC.
    #[serde(default = "psync")]
    #[schemars(length(min = 1, max = 64))]
    pub psync_command: String,
    /// For Scan. Auto follows changes by notifications where the server sends all of them (its setting
    /// notify-keyspace-events, such as AE); Enable sets that for the time of the migration; Ignore does without.
    /// Without them all keys are read again and again.
    #[serde(default)]
    pub keyspace_notifications: KeyspaceNotifications,
    /// For Scan. Also asks how long ago, or how often, each key was used (OBJECT IDLETIME or FREQ, whichever
    /// maxmemory-policy keeps), so that the target evicts as the source would. Replication brings that anyway.
    #[serde(default)]
    pub eviction_data: bool,
}

/// A deployment to write to.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.topology != 'Sentinel' || has(self.sentinel)")
        .message("sentinel: needed by topology Sentinel"),
    validation = Rule::new(
        "self.topology == oldSelf.topology && self.endpoints == oldSelf.endpoints && has(self.sentinel) == has(oldSelf.sentinel) && self.endpointMap == oldSelf.endpointMap && self.clusterDatabases == oldSelf.clusterDatabases"
    )
    .message("the target cannot be changed, secret references aside")
)]
pub struct TargetRedis {
    /// Auto finds out by asking.
    #[serde(default)]
    pub topology: Topology,
    /// `host:port`; any one node of a cluster is enough; for Sentinel the sentinels.
    #[schemars(length(min = 1, max = 1000), inner(length(min = 1, max = 300)))]
    pub endpoints: Vec<String>,
    /// Which master to ask the sentinels for, and how.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel: Option<Sentinel>,
    /// User and password; left out when the server asks for none.
    #[serde(default)]
    pub auth: Auth,
    /// Transport encryption.
    #[serde(default)]
    pub tls: Tls,
    /// Announced address → reachable address, for servers behind a proxy or NAT.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 1000))]
    pub endpoint_map: BTreeMap<String, String>,
    /// The cluster serves databases other than 0 (Valkey 9 with `cluster-databases` above 1).
    #[serde(default)]
    pub cluster_databases: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Topology {
    #[default]
    Auto,
    Standalone,
    Sentinel,
    Cluster,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ReadFrom {
    #[default]
    Master,
    PreferReplica,
}

/// How a scan uses notifications.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum KeyspaceNotifications {
    #[default]
    Auto,
    Enable,
    Ignore,
}

/// Which master the sentinels are asked for.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.master == oldSelf.master").message("sentinel.master: cannot be changed"))]
pub struct Sentinel {
    /// Name under which the sentinels watch the master.
    #[schemars(length(min = 1, max = 253))]
    pub master: String,
    /// User and password of the sentinels themselves; their TLS is that of the servers.
    #[serde(default)]
    pub auth: Auth,
}

/// User and password.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.username == oldSelf.username").message("auth.username: cannot be changed"))]
pub struct Auth {
    /// ACL user; empty for the default user.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub username: String,
    /// Where the password is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_secret_ref: Option<SecretKeyRef>,
}

/// Transport encryption.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "self.enabled == oldSelf.enabled && self.serverName == oldSelf.serverName && self.insecureSkipVerify == oldSelf.insecureSkipVerify"
    )
    .message("tls: cannot be changed, secret references aside")
)]
pub struct Tls {
    /// Whether to speak TLS.
    #[serde(default)]
    pub enabled: bool,
    /// Certificate authority, PEM; left out: the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyRef>,
    /// Secret of type kubernetes.io/tls (keys tls.crt and tls.key) for servers that ask for a client
    /// certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<SecretRef>,
    /// Name that the server's certificate must carry; empty: the host that is dialled.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub server_name: String,
    /// Accepts any certificate. For trials only: whoever is in between can read and change all.
    #[serde(default)]
    pub insecure_skip_verify: bool,
}

/// One key of a Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// A Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

fn psync() -> String {
    "PSYNC".to_owned()
}
