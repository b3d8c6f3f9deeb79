//! What to leave out or change on the way.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What to leave out or change on the way. Cannot be changed once copying began: what was left out before would
/// stay so.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Filter {
    /// Databases on the source.
    pub databases: Databases,
    /// Keys by name, in the snapshot and in commands. A command that names keys of both kinds is sent for those
    /// that are copied where that can be told, and set aside (status.quarantine) where it cannot.
    pub keys: FilterKeys,
    /// Commands of the replication stream by name.
    pub commands: FilterCommands,
    /// A script that decides on each key and each command that the rest lets through.
    pub lua: Lua,
}

/// Databases on the source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Databases {
    /// Only these; empty: all.
    #[schemars(length(max = 1024), inner(range(min = 0)))]
    pub include: Vec<i64>,
    /// But not these.
    #[schemars(length(max = 1024), inner(range(min = 0)))]
    pub exclude: Vec<i64>,
}

/// Keys by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FilterKeys {
    /// Only these; empty: all.
    #[schemars(length(max = 1000))]
    pub include: Vec<KeyPattern>,
    /// But not these.
    #[schemars(length(max = 1000))]
    pub exclude: Vec<KeyPattern>,
}

/// One of prefix, glob and regex.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.prefix) ? 1 : 0) + (has(self.glob) ? 1 : 0) + (has(self.regex) ? 1 : 0) == 1")
        .message("exactly one of prefix, glob and regex")
)]
pub struct KeyPattern {
    /// What the key starts with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub prefix: Option<String>,
    /// As in KEYS: `*`, `?`, `[a-z]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub glob: Option<String>,
    /// A regular expression, searched for anywhere in the key unless ^ and $ say otherwise; a dot is any byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub regex: Option<String>,
}

/// Commands of the replication stream by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FilterCommands {
    /// Not replayed, such as PUBLISH.
    #[schemars(length(max = 1000), inner(length(min = 1, max = 64)))]
    pub exclude: Vec<String>,
}

/// A script in Lua 5.4 that defines key(k) and command(c). Each returns nothing or true to keep, false to leave out,
/// or what is to take its place. See the README.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Lua {
    /// The script itself; empty: none.
    #[schemars(length(max = 65536))]
    pub inline: String,
    /// Where the script is. It is read when the migration starts, or goes on in another process: what it says must
    /// stay the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ConfigMapKeyRef>,
}

/// One key of a ConfigMap in the same namespace; empty: none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigMapKeyRef {
    /// Name of the ConfigMap.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(max = 253))]
    pub key: String,
}
