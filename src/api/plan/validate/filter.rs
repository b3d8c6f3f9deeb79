//! `spec.filter`, compiled.

use std::sync::Arc;

use super::{DATABASE_MAX, SpecFault, Validation};
use crate::api::spec::{
    ConfigMapKeyRef, Databases, Filter, FilterCommands, FilterKeys, KeyPattern, Lua, SourceType, TargetType,
};
use crate::transform::script::Script;
use crate::transform::{DatabaseFilter, KeyFilter, Pattern, Patterns, Transform};

/// Without these nobody could follow the stream.
const OF_THE_STREAM: [&str; 3] = ["SELECT", "MULTI", "EXEC"];

impl Validation<'_> {
    /// `None`: nothing is left out.
    pub(super) fn filter(
        &mut self,
        filter: &Filter,
        source: SourceType,
        target: TargetType,
    ) -> Option<Arc<Transform>> {
        let Filter { databases, keys, commands, lua } = filter;
        let Databases { include, exclude } = databases;
        let include = self.databases("spec.filter.databases.include", include);
        let exclude = self.databases("spec.filter.databases.exclude", exclude);
        let databases = DatabaseFilter::new(include, exclude);
        if databases.named().is_some_and(<[u64]>::is_empty) {
            self.fault(
                "spec.filter.databases",
                "excludes every database that it includes: nothing would be copied",
            );
        }
        let FilterKeys { include, exclude } = keys;
        let keys = KeyFilter {
            include: self.patterns("spec.filter.keys.include", include),
            exclude: self.patterns("spec.filter.keys.exclude", exclude),
        };
        let FilterCommands { exclude } = commands;
        for (index, name) in exclude.iter().enumerate() {
            let path = format!("spec.filter.commands.exclude[{index}]");
            if name.is_empty() || name.len() > 64 || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
                self.fault(
                    path,
                    "must be one word of at most 64 printable ASCII characters, such as PUBLISH",
                );
            } else if OF_THE_STREAM.iter().any(|word| name.eq_ignore_ascii_case(word)) {
                self.fault(
                    path,
                    format!("{name} belongs to the stream itself, which cannot be followed without"),
                );
            }
        }
        let script = self.script(lua, source, target);
        if source != SourceType::Replication && !exclude.is_empty() {
            self.fault(
                "spec.filter.commands",
                format!("is of the commands of a replication stream, and source type {source:?} has none; allowed: no names"),
            );
        }
        let transform = Transform::new(databases, keys, exclude).with_script(script);
        (!transform.is_open()).then(|| Arc::new(transform))
    }

    /// A scan tells of keys that vanished by DEL, for which only `command(c)` has a name; a file does not take that.
    fn script(&mut self, lua: &Lua, source: SourceType, target: TargetType) -> Option<Script> {
        let Lua { inline, config_map_ref } = lua;
        let reference = config_map_ref.as_ref().filter(|reference| **reference != ConfigMapKeyRef::default());
        let (path, text) = match (inline.is_empty(), reference) {
            (true, None) => return None,
            (false, None) => ("spec.filter.lua.inline", inline.clone()),
            (false, Some(_)) => {
                self.fault("spec.filter.lua", "either inline or configMapRef, not both");
                return None;
            }
            (true, Some(ConfigMapKeyRef { name, key })) => {
                let path = "spec.filter.lua.configMapRef";
                let Some(text) = self.secrets.config(name, key) else {
                    let place = self.secrets.allowed_config();
                    self.faults.push(SpecFault {
                        path: path.to_owned(),
                        message: format!(
                            "there is no key {key:?} in a ConfigMap {name:?}; it belongs in {place}"
                        ),
                        secret_missing: true,
                    });
                    return None;
                };
                (path, text)
            }
        };
        let from_stream = source == SourceType::Replication;
        let into_server = target == TargetType::Redis;
        match Script::new(&text, source != SourceType::RdbFile && into_server) {
            Ok(script) if !(script.defines_key() || from_stream && into_server) => {
                let message = match into_server {
                    true => format!("defines no key(k), and source type {source:?} has no commands but keys"),
                    false => {
                        format!("defines no key(k), and target type {target:?} takes keys and no commands")
                    }
                };
                self.fault(path, message);
                None
            }
            Ok(script) => Some(script),
            Err(error) => {
                self.fault(path, error.to_string());
                None
            }
        }
    }

    fn databases(&mut self, path: &str, databases: &[i64]) -> Vec<u64> {
        let mut found = Vec::with_capacity(databases.len());
        for (index, db) in databases.iter().enumerate() {
            match u64::try_from(*db).ok().filter(|db| *db < DATABASE_MAX) {
                Some(db) => found.push(db),
                None => self.fault(format!("{path}[{index}]"), format!("{db} is no database number")),
            }
        }
        found
    }

    /// `None`: no patterns, or faults.
    fn patterns(&mut self, path: &str, written: &[KeyPattern]) -> Option<Patterns> {
        let (mut patterns, mut kinds) = (Vec::with_capacity(written.len()), Vec::new());
        for (index, KeyPattern { prefix, glob, regex }) in written.iter().enumerate() {
            let (pattern, kind) = match (prefix, glob, regex) {
                (Some(text), None, None) => (Pattern::Prefix(text), "prefix"),
                (None, Some(text), None) => (Pattern::Glob(text), "glob"),
                (None, None, Some(text)) => (Pattern::Regex(text), "regex"),
                _ => {
                    self.fault(format!("{path}[{index}]"), "exactly one of prefix, glob and regex");
                    continue;
                }
            };
            patterns.push(pattern);
            kinds.push((index, kind));
        }
        if patterns.is_empty() {
            return None;
        }
        match Patterns::new(patterns) {
            Ok(patterns) => Some(patterns),
            Err(faults) => {
                for (at, fault) in faults {
                    let place = kinds.get(at).map(|(index, kind)| format!("{path}[{index}].{kind}"));
                    self.fault(place.unwrap_or_else(|| path.to_owned()), fault.to_string());
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::api::RedisMigration;
    use crate::api::manifest::SecretStore;
    use crate::api::plan::{Plan, SpecFault, validate};

    fn validated(filter: serde_json::Value) -> Result<Plan, Vec<SpecFault>> {
        on_road("Replication", filter)
    }

    fn on_road(source: &str, filter: serde_json::Value) -> Result<Plan, Vec<SpecFault>> {
        let side = |type_: &str| match type_ {
            "RdbFile" => serde_json::json!({"type": type_, "rdbFile": {"uris": ["/a"]}}),
            _ => serde_json::json!({"type": type_, "redis": {"endpoints": ["h:1"]}}),
        };
        let migration: RedisMigration = serde_json::from_value(serde_json::json!({
            "apiVersion": "redis-migration.io/v1alpha1", "kind": "RedisMigration", "metadata": {"name": "m"},
            "spec": {
                "source": side(source), "target": side("Redis"), "filter": filter,
                "verification": {"mode": "Off"},
            },
        }))
        .unwrap();
        validate(&migration, &SecretStore::default())
    }

    /// What is about commands goes where there are commands.
    #[test]
    fn each_source_takes_what_it_can_apply() {
        const KEY: &str = "function key(k) end";
        const COMMAND: &str = "function command(c) end";
        let both = format!("{KEY} {COMMAND}");
        let lua = |text: &str| serde_json::json!({"lua": {"inline": text}});
        let commands = serde_json::json!({"commands": {"exclude": ["PUBLISH"]}});
        let keys = serde_json::json!({"keys": {"include": [{"prefix": "a"}]}, "databases": {"exclude": [1]}});
        for (filter, refused) in [
            (keys, &[][..]),
            (lua(&both), &[]),
            (commands, &["Scan", "RdbFile"]),
            (lua(COMMAND), &["Scan", "RdbFile"]),
            (lua(KEY), &["Replication", "Scan"]),
        ] {
            for source in ["Replication", "Scan", "RdbFile"] {
                let made = on_road(source, filter.clone());
                assert_eq!(made.is_err(), refused.contains(&source), "{source} {filter}: {made:?}");
                let faults = made.err().unwrap_or_default();
                assert!(faults.iter().all(|fault| fault.path.starts_with("spec.filter.")), "{faults:?}");
            }
        }
    }

    #[test]
    fn a_filter_that_leaves_nothing_out_is_none() {
        assert!(validated(serde_json::json!({})).unwrap().transform.is_none());
        let open = serde_json::json!({"databases": {"include": []}, "keys": {"exclude": []}});
        assert!(validated(open).unwrap().transform.is_none());
        let plan = validated(serde_json::json!({"keys": {"exclude": [{"glob": "*:tmp"}]}})).unwrap();
        let transform = plan.transform.unwrap();
        assert!(transform.admits(0, b"a") && !transform.admits(0, b"a:tmp"));
    }

    #[test]
    fn faults_name_the_entry() {
        for (filter, path, part) in [
            (
                serde_json::json!({"keys": {"include": [{"prefix": "a"}, {"regex": "("}]}}),
                "spec.filter.keys.include[1].regex",
                "unclosed group",
            ),
            (
                serde_json::json!({"keys": {"exclude": [{"prefix": "a", "glob": "b"}]}}),
                "spec.filter.keys.exclude[0]",
                "exactly one",
            ),
            (serde_json::json!({"keys": {"exclude": [{}]}}), "spec.filter.keys.exclude[0]", "exactly one"),
            (
                serde_json::json!({"databases": {"exclude": [0, -1]}}),
                "spec.filter.databases.exclude[1]",
                "no database",
            ),
            (
                serde_json::json!({"databases": {"include": [1], "exclude": [1]}}),
                "spec.filter.databases",
                "nothing would be copied",
            ),
            (
                serde_json::json!({"commands": {"exclude": ["publish", "select"]}}),
                "spec.filter.commands.exclude[1]",
                "belongs to the stream",
            ),
            (
                serde_json::json!({"commands": {"exclude": ["A B"]}}),
                "spec.filter.commands.exclude[0]",
                "one word",
            ),
        ] {
            let faults = validated(filter).unwrap_err();
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(faults[0].path == path && faults[0].message.contains(part), "{faults:?}");
        }
    }
}
