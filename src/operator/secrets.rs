//! Secrets that a migration names, and its ConfigMap: looked up when it starts, read again whenever a connection is made, so that
//! a rotated one needs no restart. Nothing is watched, so that `get` is all the permission it takes.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, Secret as KubeSecret};
use kube::Client;
use kube::api::Api;

use super::api::{ApiError, call};
use crate::api::manifest::{SecretField, SecretStore};
use crate::api::spec::{Auth, RedisMigrationSpec, SecretRef, Sentinel, Tls};
use crate::connection::{Secret, SecretError, SecretSource};
use crate::object::KEYS;

/// Many connections are made at once; so long one answer serves them.
const FRESH: Duration = Duration::from_secs(5);

/// The Secrets of one migration, by the field that names them.
#[derive(Clone, Default)]
pub struct Secrets {
    secrets: BTreeMap<SecretField, Arc<LiveSecret>>,
    /// ConfigMaps by name: as they were when the run began, since what one of them says must not change within it.
    configs: BTreeMap<String, BTreeMap<String, String>>,
}

impl Secrets {
    /// Looks up all that `spec` names. What an earlier look-up gave is kept and now follows the new names.
    pub async fn look_up(
        client: &Client,
        namespace: &str,
        spec: &RedisMigrationSpec,
        earlier: &Secrets,
    ) -> Result<Self, ApiError> {
        let mut found = BTreeMap::new();
        let mut read: BTreeMap<String, Option<KubeSecret>> = BTreeMap::new();
        for Reference { field, name, key } in references(spec) {
            if !read.contains_key(&name) {
                let api: Api<KubeSecret> = Api::namespaced(client.clone(), namespace);
                let what = format!("get Secret {namespace}/{name}");
                read.insert(name.clone(), call(what, api.get_opt(&name)).await?);
            }
            let secret = read.get(&name).and_then(Option::as_ref);
            let Some(value) = secret.and_then(|secret| secret.data.as_ref()?.get(&key)) else { continue };
            let at = (field, key.clone());
            let live = match earlier.secrets.get(&at) {
                Some(live) => Arc::clone(live),
                None => Arc::new(LiveSecret {
                    client: client.clone(),
                    namespace: namespace.to_owned(),
                    state: Mutex::default(),
                    outlives: AtomicBool::new(false),
                }),
            };
            live.now_is(name, key, value.0.clone());
            found.insert(at, live);
        }
        let mut configs = BTreeMap::new();
        if let Some(reference) =
            spec.filter.lua.config_map_ref.as_ref().filter(|reference| !reference.name.is_empty())
        {
            let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
            let what = format!("get ConfigMap {namespace}/{}", reference.name);
            if let Some(found) = call(what, api.get_opt(&reference.name)).await? {
                configs.insert(reference.name.clone(), found.data.unwrap_or_default());
            }
        }
        Ok(Self { secrets: found, configs })
    }

    pub fn store(&self) -> SecretStore {
        let secrets = self.secrets.iter().map(|(field, live)| {
            let source: Arc<dyn SecretSource> = Arc::<LiveSecret>::clone(live);
            (field.clone(), Secret::Elsewhere(source))
        });
        SecretStore::elsewhere(secrets.collect()).with_configs(self.configs.clone())
    }

    /// From here on a Secret that is gone, or that may not be read any more, is as it was read last.
    pub fn outlive(&self) {
        self.secrets.values().for_each(|live| live.outlives.store(true, Relaxed));
    }

    /// The same fields name one: then a run goes on with them.
    pub fn serve_like(&self, other: &Secrets) -> bool {
        self.secrets.keys().eq(other.secrets.keys())
    }
}

/// One key of one Secret.
struct LiveSecret {
    client: Client,
    namespace: String,
    state: Mutex<Held>,
    /// See `Secrets::outlive`.
    outlives: AtomicBool,
}

#[derive(Clone, Default)]
struct Held {
    name: String,
    key: String,
    value: Vec<u8>,
    read: Option<Instant>,
}

impl LiveSecret {
    fn now_is(&self, name: String, key: String, value: Vec<u8>) {
        let held = Held { name, key, value, read: Some(Instant::now()) };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    async fn current(&self) -> Result<Vec<u8>, SecretError> {
        let Held { name, key, value, read } =
            self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if read.is_some_and(|at| at.elapsed() < FRESH) {
            return Ok(value);
        }
        let api: Api<KubeSecret> = Api::namespaced(self.client.clone(), &self.namespace);
        let shown = format!("{}/{name}", self.namespace);
        let failed = |why: String| SecretError::Elsewhere { name: shown.clone(), why };
        match call(format!("get Secret {shown}"), api.get_opt(&name)).await {
            Ok(Some(secret)) => {
                let Some(found) = secret.data.and_then(|mut data| data.remove(&key)) else {
                    if self.outlives.load(Relaxed) {
                        return Ok(value);
                    }
                    return Err(failed(format!("it has no key {key}")));
                };
                self.now_is(name, key, found.0.clone());
                Ok(found.0)
            }
            Ok(None) | Err(_) if self.outlives.load(Relaxed) => Ok(value),
            Ok(None) => Err(failed("it does not exist".to_owned())),
            // Data flow on while the API server is away.
            Err(error) if error.code().is_none_or(|code| code >= 500 || code == 429) => {
                tracing::debug!(%error, "the Secret is taken as it was read last");
                Ok(value)
            }
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

impl SecretSource for LiveSecret {
    fn read(&self) -> BoxFuture<'_, Result<Vec<u8>, SecretError>> {
        self.current().boxed()
    }
}

struct Reference {
    field: String,
    name: String,
    key: String,
}

/// Every key of a Secret that the spec names, with the path of its field.
fn references(spec: &RedisMigrationSpec) -> Vec<Reference> {
    let mut found = Vec::new();
    if let Some(redis) = &spec.source.redis {
        side("spec.source.redis", &redis.auth, redis.sentinel.as_ref(), &redis.tls, &mut found);
    }
    if let Some(redis) = &spec.target.redis {
        side("spec.target.redis", &redis.auth, redis.sentinel.as_ref(), &redis.tls, &mut found);
    }
    let files = [
        (
            "spec.source.rdbFile",
            spec.source.rdb_file.as_ref().and_then(|f| f.credentials_secret_ref.as_ref()),
        ),
        (
            "spec.target.rdbFile",
            spec.target.rdb_file.as_ref().and_then(|f| f.credentials_secret_ref.as_ref()),
        ),
        ("spec.target.json", spec.target.json.as_ref().and_then(|f| f.credentials_secret_ref.as_ref())),
    ];
    for (path, reference) in files {
        let Some(SecretRef { name }) = reference else { continue };
        // A store asks for some of them only: what is not there is not needed.
        found.extend(KEYS.iter().map(|key| Reference {
            field: format!("{path}.credentialsSecretRef"),
            name: name.clone(),
            key: (*key).to_owned(),
        }));
    }
    found
}

fn side(path: &str, auth: &Auth, sentinel: Option<&Sentinel>, tls: &Tls, found: &mut Vec<Reference>) {
    let mut add = |field: String, name: &str, key: &str| {
        found.push(Reference { field, name: name.to_owned(), key: key.to_owned() });
    };
    let auths = [("auth", Some(auth)), ("sentinel.auth", sentinel.map(|sentinel| &sentinel.auth))];
    for (name, auth) in auths {
        if let Some(secret) = auth.and_then(|auth| auth.password_secret_ref.as_ref()) {
            add(format!("{path}.{name}.passwordSecretRef"), &secret.name, &secret.key);
        }
    }
    if let Some(ca) = &tls.ca_secret_ref {
        add(format!("{path}.tls.caSecretRef"), &ca.name, &ca.key);
    }
    if let Some(certificate) = &tls.client_cert_secret_ref {
        for key in ["tls.crt", "tls.key"] {
            add(format!("{path}.tls.clientCertSecretRef"), &certificate.name, key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::RedisMigration;
    use crate::api::plan::validate;

    /// What validation asks for, by its own paths, is exactly what is looked up.
    #[test]
    fn every_secret_that_validation_asks_for_is_looked_up() {
        let redis = serde_json::json!({
            "topology": "Sentinel", "endpoints": ["h:1"],
            "sentinel": {"master": "m", "auth": {"passwordSecretRef": {"name": "a", "key": "k"}}},
            "auth": {"passwordSecretRef": {"name": "b", "key": "k"}},
            "tls": {"enabled": true, "caSecretRef": {"name": "c", "key": "k"}, "clientCertSecretRef": {"name": "d"}},
        });
        let migration: RedisMigration = serde_json::from_value(serde_json::json!({
            "apiVersion": "redis-migration.io/v1alpha1", "kind": "RedisMigration",
            "metadata": {"name": "m", "namespace": "n", "uid": "u"},
            "spec": {"source": {"type": "Replication", "redis": redis}, "target": {"type": "Redis", "redis": redis}},
        }))
        .unwrap();
        let faults = validate(&migration, &SecretStore::elsewhere(BTreeMap::new())).unwrap_err();
        assert!(faults.iter().all(|fault| fault.secret_missing), "{faults:?}");
        let found = references(&migration.spec);
        assert_eq!((faults.len(), found.len()), (10, 10));
        let secret = || Secret::Literal(b"x".to_vec());
        let found = found.into_iter().map(|reference| ((reference.field, reference.key), secret()));
        validate(&migration, &SecretStore::elsewhere(found.collect())).unwrap();
    }
}
