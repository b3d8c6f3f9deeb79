//! Requests to the Kubernetes API, each bounded in time and with an error that says what was asked for.

use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use crate::api::RedisMigration;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};

/// Longer than any answer takes that is still of use.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the API server says of a field that its definition does not have (apimachinery, structured-merge-diff).
const UNDECLARED: &str = "field not declared in schema";
/// As api/core/v1 of Kubernetes has it, since 1.16.
const NAMESPACE_TERMINATING: &str = "NamespaceTerminating";
/// Keeps the object until the run is stopped and nothing of it is left on the target.
pub const FINALIZER: &str = "redis-migration.io/cleanup";

#[derive(Debug, Error)]
pub enum ApiError {
    #[error("{what}: {}", told(source))]
    Request { what: String, source: Box<kube::Error> },
    #[error("{what}: the API server did not answer within {} s", after.as_secs())]
    Late { what: String, after: Duration },
}

impl ApiError {
    /// HTTP status; `None`: there was no answer.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Request { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Late { .. } => None,
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Its namespace is being deleted: nothing is created there any more.
    pub fn is_namespace_terminating(&self) -> bool {
        let Self::Request { source, .. } = self else { return false };
        let kube::Error::Api(status) = &**source else { return false };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        status.code == 403 && causes.into_iter().any(|cause| cause.reason == NAMESPACE_TERMINATING)
    }

    /// Somebody else was faster.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.message.contains(UNDECLARED) => format!(
            "{} ({}); the CustomResourceDefinition is older than this operator: upgrade it with the chart, or apply crds/redismigrations.yaml of this version",
            status.message, status.code
        ),
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => {
            let mut text = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(error) = cause {
                let further = error.to_string();
                if !text.contains(&further) {
                    text.push_str(": ");
                    text.push_str(&further);
                }
                cause = error.source();
            }
            text
        }
    }
}

/// One request. `what`: such as "get Secret a/b".
pub async fn call<T>(
    what: impl Into<String>,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    call_within(PATIENCE, what, request).await
}

pub async fn call_within<T>(
    after: Duration,
    what: impl Into<String>,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    let what = what.into();
    match tokio::time::timeout(after, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(ApiError::Request { what, source: Box::new(source) }),
        Err(_) => Err(ApiError::Late { what, after }),
    }
}

/// `namespace/name`, as logs and errors call it.
pub fn shown(object: &RedisMigration) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

pub fn migrations(client: &Client, object: &RedisMigration) -> Api<RedisMigration> {
    Api::namespaced(client.clone(), &object.namespace().unwrap_or_default())
}

/// The object as it is now. `None`: it is gone, or another one has its name.
pub async fn fresh(client: &Client, object: &RedisMigration) -> Result<Option<RedisMigration>, ApiError> {
    let found = call(
        format!("get RedisMigration {}", shown(object)),
        migrations(client, object).get_opt(&object.name_any()),
    )
    .await?;
    Ok(found.filter(|found| found.uid() == object.uid()))
}

/// The object of that uid, as it is now.
pub async fn find(client: &Client, target: &Target) -> Result<Option<RedisMigration>, ApiError> {
    let api: Api<RedisMigration> = Api::namespaced(client.clone(), &target.namespace);
    let what = format!("get RedisMigration {}/{}", target.namespace, target.name);
    let found = call(what, api.get_opt(&target.name)).await?;
    Ok(found.filter(|found| found.uid().as_deref() == Some(&target.uid)))
}

pub fn has_finalizer(object: &RedisMigration) -> bool {
    object.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

/// Puts our finalizer on the object, or takes it off; a conflict means that the object was changed meanwhile.
pub async fn set_finalizer(
    client: &Client,
    object: &RedisMigration,
    wanted: bool,
) -> Result<RedisMigration, ApiError> {
    let mut finalizers: Vec<&str> =
        object.finalizers().iter().map(String::as_str).filter(|found| *found != FINALIZER).collect();
    if wanted {
        finalizers.push(FINALIZER);
    }
    let version = object.resource_version();
    let patch: Value = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
    let what = format!("{} the finalizer of {}", if wanted { "add" } else { "remove" }, shown(object));
    let (api, name) = (migrations(client, object), object.name_any());
    call(what, api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch))).await
}

/// Server-side apply to the status. The uid keeps it from another object of the same name.
pub async fn apply_status(
    client: &Client,
    target: &Target,
    manager: &str,
    status: &Value,
) -> Result<(), ApiError> {
    let Target { namespace, name, uid } = target;
    let document = json!({
        "apiVersion": "redis-migration.io/v1alpha1",
        "kind": "RedisMigration",
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "status": status,
    });
    let api: Api<RedisMigration> = Api::namespaced(client.clone(), namespace);
    let what = format!("apply the status of {namespace}/{name}");
    call(what, api.patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(&document)))
        .await
        .map(drop)
}

/// Which object a status belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl Target {
    pub fn of(object: &RedisMigration) -> Self {
        Self {
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_that_is_older_is_told_from_other_faults() {
        let told = |message: &str| {
            let status = kube::core::Status::failure(message, "InternalError").with_code(500);
            let source = Box::new(kube::Error::Api(status.boxed()));
            ApiError::Request { what: "apply the status of a/b".to_owned(), source }.to_string()
        };
        let older = "failed to create typed patch object (a/b): .status.news: field not declared in schema";
        assert!(told(older).contains(".status.news") && told(older).contains("older than this operator"));
        assert_eq!(told("etcdserver: no leader"), "apply the status of a/b: etcdserver: no leader (500)");
    }
}
