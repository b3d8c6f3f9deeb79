//! What a migration copies by. It is the same in all of its runs, or the target would hold a mixture.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::api::spec::{RedisMigrationSpec, TargetRedis};
use crate::rdb::checksum::crc64;

/// Checksums of those parts of a spec that decide what stands on the target, by their paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CopiedBy(BTreeMap<String, String>);

impl CopiedBy {
    /// `script`: the text of `filter.lua`, wherever it was read from.
    pub fn of(spec: &RedisMigrationSpec, script: Option<&str>) -> Self {
        let part = |path: &str, text: serde_json::Result<Vec<u8>>| {
            (path.to_owned(), format!("{:016x}", crc64(&text.unwrap_or_default())))
        };
        let databases = spec
            .target
            .redis
            .as_ref()
            .is_some_and(|TargetRedis { cluster_databases, .. }| *cluster_databases);
        let mut filter = spec.filter.clone();
        // It may move from the spec to a ConfigMap.
        filter.lua = Default::default();
        Self(BTreeMap::from([
            part("spec.filter", serde_json::to_vec(&filter)),
            part("spec.filter.lua", serde_json::to_vec(&script)),
            part("spec.databaseMap", serde_json::to_vec(&spec.database_map)),
            part("spec.delivery", serde_json::to_vec(&spec.delivery)),
            part("spec.target.redis.clusterDatabases", serde_json::to_vec(&databases)),
        ]))
    }

    /// What is not as it was; `None`: nothing is, as far as is known what it was.
    pub fn changed_since(&self, earlier: &Self) -> Option<String> {
        let changed = |(path, sum): &(&String, &String)| earlier.0.get(*path).is_some_and(|was| was != *sum);
        let paths: Vec<&str> = self.0.iter().filter(changed).map(|(path, _)| path.as_str()).collect();
        (!paths.is_empty()).then(|| paths.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn copied_by(change: Value, script: Option<&str>) -> CopiedBy {
        let mut spec = json!({
            "source": {"type": "Replication", "redis": {"endpoints": ["a:1"]}},
            "target": {"type": "Redis", "redis": {"endpoints": ["b:1"]}},
        });
        let (Some(spec), Value::Object(change)) = (spec.as_object_mut(), change) else { panic!() };
        spec.extend(change);
        CopiedBy::of(&serde_json::from_value(Value::Object(spec.clone())).unwrap(), script)
    }

    #[test]
    fn what_changes_the_copy_is_named_and_nothing_else() {
        let plain = copied_by(json!({}), None);
        let cases = [
            (json!({}), None, None),
            (json!({"limits": {"keysPerSecond": 7}, "suspend": true}), None, None),
            (json!({"filter": {"lua": {"inline": "x"}}}), None, None),
            (json!({"filter": {"databases": {"exclude": [3]}}}), None, Some("spec.filter")),
            (json!({}), Some("x"), Some("spec.filter.lua")),
            (
                json!({"databaseMap": {"1": 2}, "delivery": "AtLeastOnce"}),
                None,
                Some("spec.databaseMap, spec.delivery"),
            ),
            (
                json!({"target": {"type": "Redis", "redis": {"endpoints": ["b:1"], "clusterDatabases": true}}}),
                None,
                Some("spec.target.redis.clusterDatabases"),
            ),
        ];
        for (change, script, named) in cases {
            let now = copied_by(change.clone(), script);
            assert_eq!(now.changed_since(&plain).as_deref(), named, "{change}");
            assert_eq!(now.changed_since(&CopiedBy::default()), None);
            let kept = serde_json::to_string(&now).unwrap();
            assert_eq!(serde_json::from_str::<CopiedBy>(&kept).unwrap(), now);
        }
    }
}
