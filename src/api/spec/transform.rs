//! What to leave out or change on the way.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Filter {
    /// Databases on the source.
    pub databases: Databases,
    /// Keys by name.
    pub keys: FilterKeys,
    /// Commands by name.
    pub commands: FilterCommands,
    /// A script that decides on each key.
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
    pub prefix: Option<String>,
    /// As in KEYS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub glob: Option<String>,
    /// A regular expression over the whole key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
}

/// Commands of the replication stream by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FilterCommands {
    /// Not replayed.
    #[schemars(length(max = 1000))]
    pub exclude: Vec<String>,
}

/// A script that decides on each key.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Lua {
    /// The script itself; empty: none.
    pub inline: String,
    /// Where the script is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ConfigMapKeyRef>,
}

/// One key of a ConfigMap in the same namespace; empty: none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigMapKeyRef {
    /// Name of the ConfigMap.
    pub name: String,
    /// Key in its data.
    pub key: String,
}
