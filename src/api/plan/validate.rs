//! From the raw spec to the [`Plan`], collecting every fault on the way.

mod access;
mod files;
mod filter;
mod numbers;

use std::collections::BTreeMap;

use super::{
    Plan, RedisSource, RedisTarget, SourcePlan, SourceWay, SpecFault, TargetPlace, TargetPlan, refuse,
};
use crate::api::manifest::SecretStore;
use crate::api::plan::CopiedBy;
use crate::api::spec::{
    NAME_MAX, RedisMigration, RedisMigrationSpec, Source, SourceRedis, SourceType, Target, TargetRedis,
    TargetType, Topology,
};
use crate::transform::script::Script;

use access::Access;

pub const DEFAULT_NAMESPACE: &str = "default";

/// Far above what any server has; keeps tables indexed by database small.
const DATABASE_MAX: u64 = 1 << 20;

/// Checks everything and locates the secrets. On failure every fault is there, not just the first.
pub fn validate(migration: &RedisMigration, secrets: &SecretStore) -> Result<Plan, Vec<SpecFault>> {
    let mut validation = Validation { secrets, faults: Vec::new() };
    let plan = validation.plan(migration);
    match plan {
        Some(plan) if validation.faults.is_empty() => Ok(plan),
        _ => Err(validation.faults),
    }
}

struct Validation<'a> {
    secrets: &'a SecretStore,
    faults: Vec<SpecFault>,
}

impl Validation<'_> {
    /// `None` always comes with a fault; a fault does not always come with `None`.
    fn plan(&mut self, migration: &RedisMigration) -> Option<Plan> {
        for path in refuse::not_built(&migration.spec) {
            self.fault(path, "not supported by this version yet");
        }
        let name = migration.metadata.name.clone().unwrap_or_default();
        let namespace = migration.metadata.namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
        self.name(&name, &namespace);
        let uid = match &migration.metadata.uid {
            Some(uid) if is_dns_name(uid) => uid.clone(),
            Some(_) => {
                self.fault("metadata.uid", "allowed: letters, digits, - and .");
                String::new()
            }
            // A namespace holds no dot, so this is no other migration's.
            None => format!("{namespace}.{name}"),
        };
        let RedisMigrationSpec {
            source,
            target,
            filter,
            database_map,
            delivery,
            limits,
            verification,
            cutover,
            failure_policy,
            suspend: _,
        } = &migration.spec;
        let transform = self.filter(filter, source.type_, target.type_);
        let script = transform.as_ref().and_then(|transform| transform.script.as_ref()).map(Script::text);
        let copied_by = CopiedBy::of(&migration.spec, script);
        let source = self.source(source);
        let target_is_plain_cluster =
            target.redis.as_ref().is_some_and(|r| r.topology == Topology::Cluster && !r.cluster_databases);
        let target = self.target(target);
        if let (Some(source), Some(target)) = (&source, &target) {
            self.roads(source, target, &migration.spec);
        }
        Some(Plan {
            name,
            namespace,
            uid,
            generation: migration.metadata.generation.unwrap_or(1),
            transform,
            copied_by,
            database_map: self.database_map(database_map, target_is_plain_cluster),
            delivery: *delivery,
            limits: self.limits(limits),
            verification: self.verification(verification),
            cutover: self.cutover(cutover),
            failure_policy: self.failure_policy(failure_policy),
            source: source?,
            target: target?,
        })
    }

    fn name(&mut self, name: &str, namespace: &str) {
        if name.len() > NAME_MAX {
            self.fault(
                "metadata.name",
                format!("has {} characters; allowed: at most {NAME_MAX}", name.len()),
            );
        } else if !is_dns_name(name) || name.chars().any(|c| c.is_ascii_uppercase()) {
            self.fault(
                "metadata.name",
                "allowed: lower case letters, digits, - and ., beginning and ending with a letter or digit",
            );
        }
        if !is_dns_name(namespace)
            || namespace.len() > 63
            || namespace.chars().any(|c| c == '.' || c.is_ascii_uppercase())
        {
            self.fault("metadata.namespace", "allowed: at most 63 lower case letters, digits and -");
        }
    }

    fn source(&mut self, source: &Source) -> Option<SourcePlan> {
        const PATH: &str = "spec.source";
        let Source { type_, redis, rdb_file } = source;
        let from_server = matches!(type_, SourceType::Replication | SourceType::Scan);
        self.member(PATH, "redis", from_server, redis.is_some(), &format!("{type_:?}"));
        self.member(PATH, "rdbFile", !from_server, rdb_file.is_some(), &format!("{type_:?}"));
        if *type_ == SourceType::RdbFile {
            return rdb_file.as_ref().map(|files| SourcePlan::RdbFile(self.source_files(files)));
        }
        let SourceRedis {
            topology,
            endpoints,
            sentinel,
            auth,
            tls,
            read_from,
            endpoint_map,
            psync_command,
            keyspace_notifications,
            eviction_data,
        } = redis.as_ref()?;
        if psync_command.is_empty() || !psync_command.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.fault(
                "spec.source.redis.psyncCommand",
                "must be one word of printable ASCII, such as PSYNC",
            );
        }
        let access = self.access(Access {
            path: "spec.source.redis",
            topology: *topology,
            endpoints,
            sentinel: sentinel.as_ref(),
            auth,
            tls,
            endpoint_map,
        });
        let way = if *type_ == SourceType::Scan { SourceWay::Scan } else { SourceWay::Replication };
        Some(SourcePlan::Redis(RedisSource {
            access,
            read_from: *read_from,
            psync_command: psync_command.clone(),
            way,
            keyspace_notifications: *keyspace_notifications,
            eviction_data: *eviction_data,
        }))
    }

    fn target(&mut self, target: &Target) -> Option<TargetPlan> {
        const PATH: &str = "spec.target";
        let Target { type_, redis, rdb_file, json, existing_keys } = target;
        let name = format!("{type_:?}");
        self.member(PATH, "redis", *type_ == TargetType::Redis, redis.is_some(), &name);
        self.member(PATH, "rdbFile", *type_ == TargetType::RdbFile, rdb_file.is_some(), &name);
        self.member(PATH, "json", *type_ == TargetType::Json, json.is_some(), &name);
        let existing_keys = *existing_keys;
        let place = match type_ {
            TargetType::RdbFile => {
                TargetPlace::RdbFile(self.target_files("spec.target.rdbFile", rdb_file.as_ref()?))
            }
            TargetType::Json => TargetPlace::Json(self.target_files("spec.target.json", json.as_ref()?)),
            TargetType::Redis => TargetPlace::Redis(self.target_redis(redis.as_ref()?)),
        };
        Some(TargetPlan { existing_keys, place })
    }

    fn target_redis(&mut self, redis: &TargetRedis) -> RedisTarget {
        let TargetRedis { topology, endpoints, sentinel, auth, tls, endpoint_map, cluster_databases } = redis;
        let access = self.access(Access {
            path: "spec.target.redis",
            topology: *topology,
            endpoints,
            sentinel: sentinel.as_ref(),
            auth,
            tls,
            endpoint_map,
        });
        RedisTarget { access, cluster_databases: *cluster_databases }
    }

    fn member(&mut self, parent: &str, field: &str, needed: bool, present: bool, type_: &str) {
        if needed && !present {
            self.fault(format!("{parent}.{field}"), format!("is missing; needed by type {type_}"));
        } else if present && !needed {
            self.fault(format!("{parent}.{field}"), format!("not allowed with type {type_}"));
        }
    }

    fn database_map(
        &mut self,
        map: &BTreeMap<String, i64>,
        target_is_plain_cluster: bool,
    ) -> BTreeMap<u64, u64> {
        let mut databases = BTreeMap::new();
        for (from, to) in map {
            let path = format!("spec.databaseMap.{from}");
            let from = from.parse::<u64>().ok().filter(|from| *from < DATABASE_MAX);
            let to = u64::try_from(*to).ok().filter(|to| *to < DATABASE_MAX);
            match (from, to) {
                (Some(_), Some(to)) if to != 0 && target_is_plain_cluster => self.fault(
                    path,
                    "a cluster has database 0 only; allowed: 0, or clusterDatabases: true under spec.target.redis",
                ),
                (Some(from), Some(to)) => drop(databases.insert(from, to)),
                _ => self.fault(path, "must map a database number to a database number, such as \"1\": 0"),
            }
        }
        databases
    }

    fn fault(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.faults.push(SpecFault { path: path.into(), message: message.into(), secret_missing: false });
    }
}

fn is_dns_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 253 && end(bytes.first()) && end(bytes.last()) && bytes.iter().copied().all(inner)
}
