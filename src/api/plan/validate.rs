//! From the raw spec to the [`Plan`], collecting every fault on the way.

use std::collections::BTreeMap;

use super::{
    CutoverPlan, FailurePolicyPlan, LimitsPlan, Plan, SourcePlan, SpecFault, TargetPlan, VerificationPlan,
    refuse,
};
use crate::api::manifest::SecretStore;
use crate::api::quantity::Quantity;
use crate::api::spec::{
    Auth, Cutover, FailurePolicy, Limits, NAME_MAX, RedisMigration, RedisMigrationSpec, SecretKeyRef,
    SecretRef, Sentinel, Source, SourceRedis, SourceType, Target, TargetRedis, TargetType, Tls, Topology,
    Verification,
};
use crate::connection::{
    Address, Credentials, RedisAccess, Secret, SentinelAccess, TlsAccess, TopologyChoice,
};

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

/// What source and target say in the same words.
struct Access<'a> {
    path: &'static str,
    topology: Topology,
    endpoints: &'a [String],
    sentinel: Option<&'a Sentinel>,
    auth: &'a Auth,
    tls: &'a Tls,
    endpoint_map: &'a BTreeMap<String, String>,
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
            filter: _,
            database_map,
            delivery,
            limits,
            verification,
            cutover,
            failure_policy,
            suspend: _,
        } = &migration.spec;
        let source = self.source(source);
        let target_is_plain_cluster =
            target.redis.as_ref().is_some_and(|r| r.topology == Topology::Cluster && !r.cluster_databases);
        let target = self.target(target);
        Some(Plan {
            name,
            namespace,
            uid,
            generation: migration.metadata.generation.unwrap_or(1),
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
        let SourceRedis { topology, endpoints, sentinel, auth, tls, read_from, endpoint_map, psync_command } =
            redis.as_ref()?;
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
        Some(SourcePlan { access, read_from: *read_from, psync_command: psync_command.clone() })
    }

    fn target(&mut self, target: &Target) -> Option<TargetPlan> {
        const PATH: &str = "spec.target";
        let Target { type_, redis, rdb_file, json, existing_keys } = target;
        let name = format!("{type_:?}");
        self.member(PATH, "redis", *type_ == TargetType::Redis, redis.is_some(), &name);
        self.member(PATH, "rdbFile", *type_ == TargetType::RdbFile, rdb_file.is_some(), &name);
        self.member(PATH, "json", *type_ == TargetType::Json, json.is_some(), &name);
        let TargetRedis { topology, endpoints, sentinel, auth, tls, endpoint_map, cluster_databases } =
            redis.as_ref()?;
        let access = self.access(Access {
            path: "spec.target.redis",
            topology: *topology,
            endpoints,
            sentinel: sentinel.as_ref(),
            auth,
            tls,
            endpoint_map,
        });
        Some(TargetPlan { access, existing_keys: *existing_keys, cluster_databases: *cluster_databases })
    }

    fn member(&mut self, parent: &str, field: &str, needed: bool, present: bool, type_: &str) {
        if needed && !present {
            self.fault(format!("{parent}.{field}"), format!("is missing; needed by type {type_}"));
        } else if present && !needed {
            self.fault(format!("{parent}.{field}"), format!("not allowed with type {type_}"));
        }
    }

    fn access(&mut self, access: Access<'_>) -> RedisAccess {
        let Access { path, topology, endpoints, sentinel, auth, tls, endpoint_map } = access;
        if endpoints.is_empty() {
            self.fault(format!("{path}.endpoints"), "has no entry; allowed: one host:port or more");
        }
        let endpoints = endpoints
            .iter()
            .enumerate()
            .filter_map(|(index, text)| self.address(format!("{path}.endpoints[{index}]"), text))
            .collect();
        let map_path = format!("{path}.endpointMap");
        let endpoint_map = endpoint_map
            .iter()
            .filter_map(|(announced, reachable)| {
                let announced_address = self.address(map_path.clone(), announced);
                let reachable = self.address(format!("{map_path}.{announced}"), reachable);
                Some((announced_address?, reachable?))
            })
            .collect();
        if topology == Topology::Sentinel && sentinel.is_none() {
            self.fault(format!("{path}.sentinel"), "is missing; needed by topology Sentinel");
        }
        if sentinel.is_some() && !matches!(topology, Topology::Sentinel | Topology::Auto) {
            self.fault(format!("{path}.sentinel"), format!("not allowed with topology {topology:?}"));
        }
        RedisAccess {
            topology: match topology {
                Topology::Auto => TopologyChoice::Auto,
                Topology::Standalone => TopologyChoice::Standalone,
                Topology::Sentinel => TopologyChoice::Sentinel,
                Topology::Cluster => TopologyChoice::Cluster,
            },
            endpoints,
            sentinel: sentinel.map(|sentinel| self.sentinel(&format!("{path}.sentinel"), sentinel)),
            credentials: self.credentials(&format!("{path}.auth"), auth),
            tls: self.tls(&format!("{path}.tls"), tls),
            endpoint_map,
        }
    }

    fn address(&mut self, path: String, text: &str) -> Option<Address> {
        // Not shown: a URL may hold a password.
        if text.contains(['/', '@']) {
            self.fault(path, "is a URL; allowed: host:port, user and password belong under auth");
            return None;
        }
        match text.parse() {
            Ok(address) => Some(address),
            Err(error) => {
                self.fault(path, error.to_string());
                None
            }
        }
    }

    fn sentinel(&mut self, path: &str, sentinel: &Sentinel) -> SentinelAccess {
        let Sentinel { master, auth } = sentinel;
        if master.is_empty() {
            self.fault(format!("{path}.master"), "is empty");
        }
        SentinelAccess {
            master: master.clone(),
            credentials: self.credentials(&format!("{path}.auth"), auth),
        }
    }

    fn credentials(&mut self, path: &str, auth: &Auth) -> Option<Credentials> {
        let Auth { username, password_secret_ref } = auth;
        let Some(reference) = password_secret_ref else {
            if !username.is_empty() {
                self.fault(format!("{path}.passwordSecretRef"), "is missing; needed by username");
            }
            return None;
        };
        let password = self.secret(&format!("{path}.passwordSecretRef"), reference)?;
        Some(Credentials { username: (!username.is_empty()).then(|| username.clone()), password })
    }

    fn tls(&mut self, path: &str, tls: &Tls) -> Option<TlsAccess> {
        let Tls { enabled, ca_secret_ref, client_cert_secret_ref, server_name, insecure_skip_verify } = tls;
        if !enabled {
            // A half-written block most likely lacks `enabled`; plain text would be a nasty surprise.
            if *tls != Tls::default() {
                self.fault(format!("{path}.enabled"), "is false, but other fields of tls are set");
            }
            return None;
        }
        let ca = ca_secret_ref.as_ref().and_then(|ca| self.secret(&format!("{path}.caSecretRef"), ca));
        let (mut client_certificate, mut client_key) = (None, None);
        if let Some(SecretRef { name }) = client_cert_secret_ref {
            let path = format!("{path}.clientCertSecretRef");
            let mut part =
                |key: &str| self.secret(&path, &SecretKeyRef { name: name.clone(), key: key.to_owned() });
            (client_certificate, client_key) = (part("tls.crt"), part("tls.key"));
        }
        Some(TlsAccess {
            ca,
            client_certificate,
            client_key,
            server_name: (!server_name.is_empty()).then(|| server_name.clone()),
            insecure_skip_verify: *insecure_skip_verify,
        })
    }

    fn secret(&mut self, path: &str, reference: &SecretKeyRef) -> Option<Secret> {
        let SecretKeyRef { name, key } = reference;
        let found = self.secrets.find(name, key);
        if found.is_none() {
            let message = format!(
                "secret \"{name}\" with key \"{key}\" not found; allowed: a Secret document in the file, or the file {name}/{key} under --secrets"
            );
            self.faults.push(SpecFault { path: path.to_owned(), message, secret_missing: true });
        }
        found
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

    fn limits(&mut self, limits: &Limits) -> LimitsPlan {
        LimitsPlan {
            pipeline_commands: self.ranged(
                "spec.limits.pipelineCommands",
                limits.pipeline_commands,
                1,
                1_000_000,
            ),
            pipeline_bytes: self.size("spec.limits.pipelineBytes", &limits.pipeline_bytes, 64 << 10, 1 << 30),
            max_restore_bytes: self.size(
                "spec.limits.maxRestoreBytes",
                &limits.max_restore_bytes,
                64 << 10,
                512 << 20,
            ),
            spool_memory: self.size("spec.limits.spoolMemory", &limits.spool_memory, 1 << 20, 1 << 40),
            spool_disk: self.size("spec.limits.spoolDisk", &limits.spool_disk, 0, i64::MAX as u64),
            spool_retain: self.size("spec.limits.spoolRetain", &limits.spool_retain, 0, i64::MAX as u64),
        }
    }

    fn verification(&mut self, verification: &Verification) -> VerificationPlan {
        let Verification { mode, sample_percent, rounds, max_differences, repair: _ } = verification;
        VerificationPlan {
            mode: *mode,
            sample_percent: self.ranged("spec.verification.samplePercent", *sample_percent, 1, 100),
            rounds: self.ranged("spec.verification.rounds", *rounds, 1, 100),
            max_differences: self.ranged("spec.verification.maxDifferences", *max_differences, 0, i64::MAX),
        }
    }

    fn cutover(&mut self, cutover: &Cutover) -> CutoverPlan {
        CutoverPlan {
            mode: cutover.mode,
            approved: cutover.approved,
            max_lag_bytes: self.ranged("spec.cutover.maxLagBytes", cutover.max_lag_bytes, 0, i64::MAX),
            max_lag_millis: self.ranged("spec.cutover.maxLagMillis", cutover.max_lag_millis, 0, i64::MAX),
            pause_source_writes: cutover.pause_source_writes,
            pause_timeout_seconds: self.ranged(
                "spec.cutover.pauseTimeoutSeconds",
                cutover.pause_timeout_seconds,
                1,
                3600,
            ),
        }
    }

    fn failure_policy(&mut self, policy: &FailurePolicy) -> FailurePolicyPlan {
        let FailurePolicy { backoff_limit, progress_deadline_seconds, on_full_resync, max_quarantined } =
            policy;
        FailurePolicyPlan {
            backoff_limit: self.ranged("spec.failurePolicy.backoffLimit", *backoff_limit, 0, 1000),
            progress_deadline_seconds: self.ranged(
                "spec.failurePolicy.progressDeadlineSeconds",
                *progress_deadline_seconds,
                0,
                i64::MAX,
            ),
            on_full_resync: *on_full_resync,
            max_quarantined: self.ranged("spec.failurePolicy.maxQuarantined", *max_quarantined, 0, i64::MAX),
        }
    }

    /// The API server checks ranges too, but a spec may come from elsewhere.
    fn ranged<T: TryFrom<i64> + Default>(&mut self, path: &str, value: i64, least: i64, most: i64) -> T {
        match T::try_from(value) {
            Ok(converted) if (least..=most).contains(&value) => converted,
            _ => {
                let most = if most == i64::MAX { "or more".to_owned() } else { format!("to {most}") };
                self.fault(path, format!("{value} is out of range; allowed: {least} {most}"));
                T::default()
            }
        }
    }

    fn size<T: TryFrom<u64> + Default>(&mut self, path: &str, size: &Quantity, least: u64, most: u64) -> T {
        match T::try_from(size.bytes()) {
            Ok(converted) if (least..=most).contains(&size.bytes()) => converted,
            _ => {
                self.fault(
                    path,
                    format!("{size} is out of range; allowed: {} to {}", binary(least), binary(most)),
                );
                T::default()
            }
        }
    }

    fn fault(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.faults.push(SpecFault { path: path.into(), message: message.into(), secret_missing: false });
    }
}

/// A bound as it would be written in a manifest.
fn binary(bytes: u64) -> String {
    [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

fn is_dns_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 253 && end(bytes.first()) && end(bytes.last()) && bytes.iter().copied().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_read_like_a_manifest() {
        assert_eq!(binary(64 << 10), "64Ki");
        assert_eq!(binary(512 << 20), "512Mi");
        assert_eq!(binary(0), "0");
        assert_eq!(binary(i64::MAX as u64), "9223372036854775807");
    }
}
