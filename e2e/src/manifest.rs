//! The manifest of a migration, as a test describes it.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::{Endpoint, Sentinels};

/// A RedisMigration and the secrets that it names.
#[derive(Clone)]
pub struct Manifest {
    pub document: Value,
    /// Secret name, key, content: written to a folder for `--secrets`.
    pub secrets: Vec<(String, String, String)>,
}

impl Manifest {
    /// From one deployment to another: Full verification, no cutover, nothing else out of the ordinary.
    pub fn between(source: &Endpoint, target: &Endpoint) -> Self {
        let document = json!({
            "apiVersion": "redis-migration.io/v1alpha1",
            "kind": "RedisMigration",
            "metadata": {"name": "e2e", "namespace": "tests"},
            "spec": {
                "source": {"type": "Replication", "redis": {"topology": "Auto", "endpoints": [source.address]}},
                "target": {"type": "Redis", "redis": {"topology": "Auto", "endpoints": [target.address]}},
                "cutover": {"mode": "Never"},
            }
        });
        let mut manifest = Self { document, secrets: Vec::new() };
        for (side, endpoint) in [("source", source), ("target", target)] {
            if let Some((user, password)) = &endpoint.auth {
                manifest = manifest.login(side, user, password);
            }
        }
        manifest
    }

    /// Sets a value by its path below the document, `/spec/verification/mode`; objects on the way are made.
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.document;
        for name in path.split('/').skip(1) {
            if !at.is_object() {
                *at = Value::Object(Map::new());
            }
            // Just made sure that it is an object, which makes the missing member null.
            at = &mut at[name];
        }
        *at = value.into();
        self
    }

    pub fn remove(mut self, parent: &str, name: &str) -> Self {
        if let Some(Value::Object(members)) = self.document.pointer_mut(parent) {
            members.remove(name);
        }
        self
    }

    /// `side` is `source` or `target`.
    pub fn login(self, side: &str, user: &str, password: &str) -> Self {
        let reference = self.secret(&format!("{side}-login"), "password", password);
        let manifest = reference.set(
            &format!("/spec/{side}/redis/auth/passwordSecretRef"),
            json!({"name": format!("{side}-login"), "key": "password"}),
        );
        if user.is_empty() {
            manifest
        } else {
            manifest.set(&format!("/spec/{side}/redis/auth/username"), user)
        }
    }

    pub fn sentinel(self, side: &str, sentinels: &Sentinels) -> Self {
        self.set(&format!("/spec/{side}/redis/topology"), "Sentinel")
            .set(&format!("/spec/{side}/redis/endpoints"), sentinels.addresses())
            .set(&format!("/spec/{side}/redis/sentinel"), json!({"master": sentinels.name}))
    }

    /// TLS with the test's authority; `mutual` adds the client's certificate.
    pub fn tls(
        self,
        side: &str,
        address: &str,
        certificates: &crate::tls::Certificates,
        mutual: bool,
    ) -> Result<Self> {
        let mut manifest = self
            .set(&format!("/spec/{side}/redis/endpoints"), json!([address]))
            .secret("ca", "ca.crt", &certificates.pem("ca.crt")?)
            .set(
                &format!("/spec/{side}/redis/tls"),
                json!({"enabled": true, "caSecretRef": {"name": "ca", "key": "ca.crt"}}),
            );
        if mutual {
            manifest = manifest
                .secret("client-tls", "tls.crt", &certificates.pem("tls.crt")?)
                .secret("client-tls", "tls.key", &certificates.pem("tls.key")?)
                .set(&format!("/spec/{side}/redis/tls/clientCertSecretRef"), json!({"name": "client-tls"}));
        }
        Ok(manifest)
    }

    pub fn secret(mut self, name: &str, key: &str, content: &str) -> Self {
        self.secrets.retain(|(n, k, _)| (n.as_str(), k.as_str()) != (name, key));
        self.secrets.push((name.to_owned(), key.to_owned(), content.to_owned()));
        self
    }

    /// Writes `migration.yaml` (JSON is YAML) and the folder `secrets`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::write(folder.join("migration.yaml"), serde_json::to_string_pretty(&self.document)?)?;
        let secrets = folder.join("secrets");
        std::fs::create_dir_all(&secrets)?;
        for (name, key, content) in &self.secrets {
            std::fs::create_dir_all(secrets.join(name))?;
            std::fs::write(secrets.join(name).join(key), content)
                .with_context(|| format!("secret {name}/{key}"))?;
        }
        Ok(())
    }
}
