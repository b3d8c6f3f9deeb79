//! Fields of the interface whose feature is not built yet. They are refused by name, since a field
//! that is quietly ignored would break the promise it makes.

use crate::api::spec::{
    ConfigMapKeyRef, Cutover, Databases, Filter, FilterCommands, FilterKeys, Limits, Lua, RedisMigrationSpec,
    Source, SourceType, Target, TargetType, Verification,
};

/// Paths of what the spec asks for and this version cannot do.
pub(super) fn not_built(spec: &RedisMigrationSpec) -> Vec<String> {
    let RedisMigrationSpec {
        source,
        target,
        filter,
        database_map: _,
        delivery: _,
        limits,
        verification,
        cutover,
        failure_policy: _,
        suspend,
    } = spec;
    let Source { type_: source_type, redis: _, rdb_file: _ } = source;
    let Target { type_: target_type, redis: _, rdb_file: _, json: _, existing_keys: _ } = target;
    let Filter { databases, keys, commands, lua } = filter;
    let Databases { include: include_databases, exclude: exclude_databases } = databases;
    let FilterKeys { include: include_keys, exclude: exclude_keys } = keys;
    let FilterCommands { exclude: exclude_commands } = commands;
    let Lua { inline, config_map_ref } = lua;
    let Limits {
        pipeline_commands: _,
        pipeline_bytes: _,
        max_restore_bytes: _,
        bytes_per_second,
        keys_per_second,
        parallel_shards,
        spool_memory: _,
        spool_disk: _,
        spool_retain: _,
    } = limits;
    let Verification { mode: _, sample_percent: _, rounds: _, max_differences: _, repair } = verification;
    let Cutover {
        mode: _,
        approved: _,
        max_lag_bytes: _,
        max_lag_millis: _,
        pause_source_writes: _,
        pause_timeout_seconds: _,
        switch,
    } = cutover;
    let names_nothing = |reference: &ConfigMapKeyRef| reference == &ConfigMapKeyRef::default();

    let asked = [
        ("spec.source.type", *source_type != SourceType::Replication),
        ("spec.target.type", *target_type != TargetType::Redis),
        ("spec.filter.databases.include", !include_databases.is_empty()),
        ("spec.filter.databases.exclude", !exclude_databases.is_empty()),
        ("spec.filter.keys.include", !include_keys.is_empty()),
        ("spec.filter.keys.exclude", !exclude_keys.is_empty()),
        ("spec.filter.commands.exclude", !exclude_commands.is_empty()),
        ("spec.filter.lua.inline", !inline.is_empty()),
        ("spec.filter.lua.configMapRef", !config_map_ref.as_ref().is_none_or(names_nothing)),
        ("spec.limits.bytesPerSecond", *bytes_per_second != 0),
        ("spec.limits.keysPerSecond", *keys_per_second != 0),
        ("spec.limits.parallelShards", *parallel_shards != 0),
        ("spec.verification.repair", *repair),
        ("spec.cutover.switch", switch.is_some()),
        ("spec.suspend", *suspend),
    ];
    asked.iter().filter(|(_, asked)| *asked).map(|(path, _)| (*path).to_owned()).collect()
}
