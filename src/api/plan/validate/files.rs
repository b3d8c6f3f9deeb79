//! Files as source and target: their names, and the Secret for the store.

use std::collections::BTreeMap;

use super::Validation;
use crate::api::plan::{
    ExistingKeys, KeyspaceNotifications, RedisSource, SHARD, SourceFiles, SourcePlan, SourceWay, SpecFault,
    TargetFiles, TargetPlan, VerificationMode,
};
use crate::api::spec::{RedisMigrationSpec, SecretRef, SourceRdbFile, TargetFile};
use crate::object::{FileUri, KEYS, StoreCredentials};

impl Validation<'_> {
    pub(super) fn source_files(&mut self, files: &SourceRdbFile) -> SourceFiles {
        const PATH: &str = "spec.source.rdbFile";
        let SourceRdbFile { uris, credentials_secret_ref } = files;
        if uris.is_empty() {
            self.fault(format!("{PATH}.uris"), "has no entry; allowed: one file or more");
        }
        let uris = uris
            .iter()
            .enumerate()
            .filter_map(|(index, text)| self.uri(&format!("{PATH}.uris[{index}]"), text))
            .collect();
        let credentials = self.store_credentials(PATH, credentials_secret_ref.as_ref());
        SourceFiles { uris, credentials }
    }

    pub(super) fn target_files(&mut self, path: &'static str, file: &TargetFile) -> TargetFiles {
        let TargetFile { uri, credentials_secret_ref } = file;
        let field = format!("{path}.uri");
        match self.uri(&field, &uri.replace(SHARD, "shard")) {
            Some(FileUri::Http(_)) => {
                self.fault(
                    &field,
                    "cannot be written to; allowed: a path, or file://, s3://, gs:// or az://",
                );
            }
            Some(found) if found.name().is_empty() || uri.ends_with('/') => {
                self.fault(&field, "names a folder; allowed: a file, such as backup/{shard}.rdb");
            }
            Some(found) if matches!(found.pattern(), Ok(None)) => {}
            Some(_) => self.fault(&field, "is a glob; allowed: one file for each shard"),
            None => {}
        }
        let credentials = self.store_credentials(path, credentials_secret_ref.as_ref());
        TargetFiles { uri: uri.clone(), credentials }
    }

    /// What does not go together with a file on a side.
    pub(super) fn roads(&mut self, source: &SourcePlan, target: &TargetPlan, spec: &RedisMigrationSpec) {
        let mode = spec.verification.mode;
        if target.redis().is_some() {
            if source.redis().is_none() && mode != VerificationMode::Off {
                let message = format!(
                    "{mode:?} (the default is Full) compares servers, and the source is a file, whose checksum is tested anyway; allowed: Off"
                );
                self.fault("spec.verification.mode", message);
            }
            return;
        }
        if matches!(mode, VerificationMode::Keys | VerificationMode::Sample) {
            let message = format!(
                "{mode:?} compares servers, and the target is a file; allowed: Full, which reads it back, or Off"
            );
            self.fault("spec.verification.mode", message);
        }
        if target.existing_keys == ExistingKeys::Skip {
            self.fault(
                "spec.target.existingKeys",
                "Skip is of keys, and the target is a file; allowed: Fail or Replace",
            );
        }
        // What is refused of others is so whatever the target.
        let replicates = |redis: &RedisSource| redis.way == SourceWay::Replication;
        let enables = |redis: &RedisSource| {
            redis.way == SourceWay::Scan && redis.keyspace_notifications == KeyspaceNotifications::Enable
        };
        if source.redis().is_some_and(enables) {
            self.fault(
                "spec.source.redis.keyspaceNotifications",
                "Enable is for changes, which no file takes; allowed: Auto or Ignore",
            );
        }
        let rates = [
            ("spec.limits.bytesPerSecond", spec.limits.bytes_per_second != 0),
            ("spec.limits.keysPerSecond", spec.limits.keys_per_second != 0),
        ];
        for (path, _) in rates.iter().filter(|(_, asked)| *asked) {
            self.fault(*path, "not supported by this version yet with a file as target");
        }
        if !spec.filter.commands.exclude.is_empty() && source.redis().is_some_and(replicates) {
            self.fault("spec.filter.commands", "is of commands, which no file takes; allowed: no names");
        }
        if !spec.database_map.is_empty() {
            self.fault(
                "spec.databaseMap",
                "not allowed with a file as target, which holds what the source has",
            );
        }
    }

    fn uri(&mut self, field: &str, text: &str) -> Option<FileUri> {
        let parsed = FileUri::parse(text).and_then(|uri| uri.pattern().map(|_| uri));
        parsed.map_err(|error| self.fault(field, error.to_string())).ok()
    }

    fn store_credentials(&mut self, path: &str, reference: Option<&SecretRef>) -> StoreCredentials {
        let ambient = reference.is_none() && !self.secrets.is_elsewhere();
        let Some(SecretRef { name }) = reference else {
            return StoreCredentials { secrets: BTreeMap::new(), ambient };
        };
        let field = format!("{path}.credentialsSecretRef");
        let found = KEYS.iter().filter_map(|key| Some((*key, self.secrets.find(&field, name, key)?)));
        let secrets: BTreeMap<_, _> = found.collect();
        if secrets.is_empty() {
            let keys = KEYS.join(", ");
            let allowed = self.secrets.allowed(name, "aws_access_key_id");
            let message =
                format!("secret \"{name}\" with one of the keys {keys} not found; allowed: {allowed}");
            self.faults.push(SpecFault { path: field, message, secret_missing: true });
        }
        StoreCredentials { secrets, ambient }
    }
}
