//! Fields of the interface whose feature is not built yet. They are refused by name, since a field
//! that is quietly ignored would break the promise it makes.

use crate::api::spec::{Cutover, Filter, Limits, RedisMigrationSpec, Source, Target, Verification};

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
    let Source { type_: _, redis: _, rdb_file: _ } = source;
    let Target { type_: _, redis: _, rdb_file: _, json: _, existing_keys: _ } = target;
    let Filter { databases: _, keys: _, commands: _, lua: _ } = filter;
    let Limits {
        pipeline_commands: _,
        pipeline_bytes: _,
        max_restore_bytes: _,
        bytes_per_second: _,
        keys_per_second: _,
        parallel_shards: _,
        source: _,
        spool_memory: _,
        spool_disk: _,
        spool_retain: _,
    } = limits;
    let Verification { mode: _, sample_percent: _, rounds: _, max_differences: _, repair: _ } = verification;
    let Cutover {
        mode: _,
        approved: _,
        max_lag_bytes: _,
        max_lag_millis: _,
        pause_source_writes: _,
        pause_timeout_seconds: _,
        switch,
    } = cutover;
    let asked = [("spec.cutover.switch", switch.is_some()), ("spec.suspend", *suspend)];
    asked.iter().filter(|(_, asked)| *asked).map(|(path, _)| (*path).to_owned()).collect()
}
