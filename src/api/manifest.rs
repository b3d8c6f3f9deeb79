//! A local manifest: one RedisMigration, and the Secrets and ConfigMaps it names, in one YAML file of
//! several documents, as `kubectl apply -f` takes it.
//!
//! What the API server would do with the CustomResourceDefinition is done here by walking the same
//! schema, so that every fault of a file is found in one go, each with its line.

mod schema;
mod yaml;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use k8s_openapi::ByteString;

use crate::api::crd;
use crate::api::plan::{self, Plan};
use crate::api::spec::RedisMigration;
use crate::connection::Secret;
use yaml::Node;

/// Far above any real manifest; keeps a mistaken `-f /dev/zero` from filling the memory.
const FILE_MAX: u64 = 16 << 20;

const API_VERSION: &str = "redis-migration.io/v1alpha1";

/// What a file held. `Debug` shows no secret.
#[derive(Debug)]
pub struct Manifest {
    /// As given on the command line; `-` is shown as `<stdin>`.
    pub file: String,
    pub migration: RedisMigration,
    pub secrets: SecretStore,
    /// Where the RedisMigration's fields stand in the file.
    document: Node,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("{file}: cannot be read: {source}")]
    Read { file: String, source: std::io::Error },
    #[error("{file}: larger than {} MiB: not a manifest", FILE_MAX >> 20)]
    TooLarge { file: String },
    #[error("{file}: not UTF-8 text")]
    NotText { file: String },
    /// One line for each fault: `file:line:column: field: fault; what is allowed`.
    #[error("{}", lines(file, problems))]
    Invalid { file: String, problems: Vec<Problem> },
}

/// One fault of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1; `None` when the fault has no place, such as a missing document.
    pub place: Option<Place>,
    /// Such as `spec.source.redis.endpoints[0]`; empty for faults of the file.
    pub path: String,
    pub message: String,
}

/// Line and column, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub line: u64,
    pub column: u64,
}

impl Manifest {
    /// Reads `path`, or standard input for `-`. Blocks.
    pub fn read(path: &Path) -> Result<Self, ManifestError> {
        let (file, text) = if path == Path::new("-") {
            let file = "<stdin>".to_owned();
            let text = read_bounded(std::io::stdin().lock(), &file)?;
            (file, text)
        } else {
            let file = path.display().to_string();
            let source = std::fs::File::open(path)
                .map_err(|source| ManifestError::Read { file: file.clone(), source })?;
            let text = read_bounded(source, &file)?;
            (file, text)
        };
        Self::parse(&file, &text)
    }

    /// `file` is what errors call it.
    pub fn parse(file: &str, text: &str) -> Result<Self, ManifestError> {
        let invalid = |problems| ManifestError::Invalid { file: file.to_owned(), problems };
        let mut documents = Documents::default();
        for document in yaml::documents(text).map_err(|problem| invalid(vec![problem]))? {
            documents.sort_in(document);
        }
        documents.finish(file).map_err(invalid)
    }

    /// Validates the migration and locates its secrets: in the file first, then as DIR/NAME/KEY.
    pub fn plan(&self, secrets_dir: Option<&Path>) -> Result<Plan, ManifestError> {
        let mut secrets = self.secrets.clone();
        secrets.dir = secrets_dir.map(Path::to_owned);
        plan::validate(&self.migration, &secrets).map_err(|faults| ManifestError::Invalid {
            file: self.file.clone(),
            problems: faults
                .into_iter()
                .map(|fault| Problem {
                    place: Some(self.document.place_of(&fault.path)),
                    path: fault.path,
                    message: fault.message,
                })
                .collect(),
        })
    }
}

/// The path of a field that names a secret, and the key in it.
pub type SecretField = (String, String);

/// Secrets, and ConfigMaps, by name and key. `Debug` shows names of secrets only.
#[derive(Clone, Default)]
pub struct SecretStore {
    /// ConfigMap → key → text.
    configs: BTreeMap<String, BTreeMap<String, String>>,
    documents: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Read from elsewhere, by the field that names it; `None`: this store knows no such place.
    elsewhere: Option<BTreeMap<SecretField, Secret>>,
    /// Holds NAME/KEY files, as Kubernetes mounts them.
    pub dir: Option<PathBuf>,
}

impl SecretStore {
    /// For a migration in Kubernetes. What is not in `found` does not exist there.
    pub fn elsewhere(found: BTreeMap<SecretField, Secret>) -> Self {
        Self { elsewhere: Some(found), ..Self::default() }
    }

    /// The secrets are somebody else's, who may not be who runs this process.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// The same with these ConfigMaps.
    pub fn with_configs(self, configs: BTreeMap<String, BTreeMap<String, String>>) -> Self {
        Self { configs, ..self }
    }

    pub fn config(&self, name: &str, key: &str) -> Option<String> {
        self.configs.get(name)?.get(key).cloned()
    }

    /// Where a ConfigMap that was not found may be put.
    pub fn allowed_config(&self) -> &'static str {
        match self.elsewhere {
            Some(_) => "a ConfigMap of the same namespace",
            None => "a ConfigMap document in the file",
        }
    }

    /// Where a secret that was not found may be put.
    pub fn allowed(&self, name: &str, key: &str) -> String {
        match self.elsewhere {
            Some(_) => "a Secret of the same namespace".to_owned(),
            None => format!("a Secret document in the file, or the file {name}/{key} under --secrets"),
        }
    }

    /// The secret's place. A file is looked for now, but read only when it is needed. `field`: the path of
    /// the field that names it.
    pub fn find(&self, field: &str, name: &str, key: &str) -> Option<Secret> {
        if let Some(found) = &self.elsewhere {
            return found.get(&(field.to_owned(), key.to_owned())).cloned();
        }
        if let Some(value) = self.documents.get(name).and_then(|keys| keys.get(key)) {
            return Some(Secret::Literal(value.clone()));
        }
        if !is_plain_name(name) || !is_plain_name(key) {
            return None;
        }
        let file = self.dir.as_ref()?.join(name).join(key);
        file.is_file().then_some(Secret::File(file))
    }
}

impl fmt::Debug for SecretStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.documents.iter().map(|(name, keys)| (name, keys.keys().collect::<Vec<_>>()));
        f.debug_map().entries(names).finish()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

fn lines(file: &str, problems: &[Problem]) -> String {
    let line = |problem: &Problem| match problem.place {
        Some(Place { line, column }) => format!("{file}:{line}:{column}: {problem}"),
        None => format!("{file}: {problem}"),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn read_bounded(source: impl Read, file: &str) -> Result<String, ManifestError> {
    let mut bytes = Vec::new();
    source
        .take(FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| ManifestError::Read { file: file.to_owned(), source })?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(ManifestError::TooLarge { file: file.to_owned() });
    }
    String::from_utf8(bytes).map_err(|_| ManifestError::NotText { file: file.to_owned() })
}

/// A name of a Secret or of a key in it: never a path that leads elsewhere.
fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty() && name != "." && name != ".." && name.bytes().all(plain)
}

struct SecretDocument {
    namespace: Option<String>,
    name: String,
    values: BTreeMap<String, Vec<u8>>,
}

/// The documents of one file, by kind.
#[derive(Default)]
struct Documents {
    migrations: Vec<Node>,
    secrets: Vec<SecretDocument>,
    /// Namespace, name and data of ConfigMaps.
    configs: Vec<(Option<String>, String, BTreeMap<String, String>)>,
    problems: Vec<Problem>,
}

impl Documents {
    fn sort_in(&mut self, document: Node) {
        let api_version = document.text("apiVersion").unwrap_or_default().to_owned();
        let kind = document.text("kind").unwrap_or_default().to_owned();
        match (api_version.as_str(), kind.as_str()) {
            (API_VERSION, "RedisMigration") => self.migrations.push(document),
            ("v1", "Secret") => self.add_secret(&document),
            ("v1", "ConfigMap") => self.add_config(&document),
            (_, "RedisMigration") => self.fault(
                &document,
                "apiVersion",
                format!("\"{api_version}\" is not known; allowed: {API_VERSION}"),
            ),
            ("", _) => self.fault(&document, "apiVersion", "is missing".to_owned()),
            (_, "") => self.fault(&document, "kind", "is missing".to_owned()),
            _ => self.fault(
                &document,
                "kind",
                format!(
                    "\"{kind}\" of {api_version} is not known; allowed: RedisMigration of {API_VERSION}, Secret and ConfigMap of v1"
                ),
            ),
        }
    }

    /// Namespace and name of a document.
    fn identity(&mut self, document: &Node) -> Option<(Option<String>, String)> {
        let metadata = document.child("metadata");
        let text = |field: &str| metadata.and_then(|metadata| metadata.text(field)).map(str::to_owned);
        let Some(name) = text("name") else {
            self.fault(document, "metadata.name", "is missing".to_owned());
            return None;
        };
        Some((text("namespace"), name))
    }

    fn add_secret(&mut self, document: &Node) {
        let Some((namespace, name)) = self.identity(document) else { return };
        let mut values = BTreeMap::new();
        for (field, encoded) in [("data", true), ("stringData", false)] {
            for entry in document.child(field).map(Node::entries).unwrap_or_default() {
                let path = format!("{field}.{}", entry.key);
                match (entry.value.scalar_text(), encoded) {
                    (Some(text), false) => drop(values.insert(entry.key.clone(), text.into_bytes())),
                    (Some(text), true) => match base64(&text) {
                        Some(bytes) => drop(values.insert(entry.key.clone(), bytes)),
                        None => self.fault(
                            document,
                            &path,
                            "is not base64; plain text belongs under stringData".to_owned(),
                        ),
                    },
                    (None, _) => self.fault(document, &path, "must be a string".to_owned()),
                }
            }
        }
        self.secrets.push(SecretDocument { namespace, name, values });
    }

    fn add_config(&mut self, document: &Node) {
        let Some((namespace, name)) = self.identity(document) else { return };
        let mut values = BTreeMap::new();
        for entry in document.child("data").map(Node::entries).unwrap_or_default() {
            match entry.value.scalar_text() {
                Some(text) => drop(values.insert(entry.key.clone(), text)),
                None => self.fault(document, &format!("data.{}", entry.key), "must be a string".to_owned()),
            }
        }
        self.configs.push((namespace, name, values));
    }

    fn fault(&mut self, document: &Node, path: &str, message: String) {
        let place = Some(document.place_of(path));
        self.problems.push(Problem { place, path: path.to_owned(), message });
    }

    fn finish(mut self, file: &str) -> Result<Manifest, Vec<Problem>> {
        let mut migrations = std::mem::take(&mut self.migrations).into_iter();
        let Some(document) = migrations.next() else {
            if self.problems.is_empty() {
                let message = "holds no RedisMigration".to_owned();
                self.problems.push(Problem { place: None, path: String::new(), message });
            }
            return Err(self.problems);
        };
        for extra in migrations {
            self.fault(
                &extra,
                "",
                format!(
                    "a second RedisMigration (the first is on line {}); allowed: one in a file",
                    document.place.line
                ),
            );
        }
        self.problems.extend(schema::faults(&document, &crd::schema()));
        if !self.problems.is_empty() {
            self.problems.sort_by_key(|problem| problem.place);
            return Err(self.problems);
        }
        let migration: RedisMigration = serde_json::from_value(document.to_json()).map_err(|error| {
            vec![Problem { place: Some(document.place), path: String::new(), message: error.to_string() }]
        })?;
        let namespace = migration.metadata.namespace.as_deref().unwrap_or(plan::DEFAULT_NAMESPACE);
        let mut secrets = SecretStore::default();
        for secret in self.secrets {
            if secret.namespace.as_deref().is_none_or(|own| own == namespace) {
                secrets.documents.entry(secret.name).or_default().extend(secret.values);
            }
        }
        for (own, name, values) in self.configs {
            if own.as_deref().is_none_or(|own| own == namespace) {
                secrets.configs.entry(name).or_default().extend(values);
            }
        }
        Ok(Manifest { file: file.to_owned(), migration, secrets, document })
    }
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let compact: String = text.split_ascii_whitespace().collect();
    serde_json::from_value::<ByteString>(serde_json::Value::String(compact)).ok().map(|bytes| bytes.0)
}

#[cfg(test)]
mod tests;
