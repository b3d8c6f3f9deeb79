//! The chart in a real cluster: what its account may do, upgrade and uninstallation, and the
//! definition that they bring and leave.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{ControlPlane, wait_until};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const ACCOUNT: &str = "op-redis-migration-operator";

fn chart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/redis-migration-operator").to_owned()
}

/// A verb on a resource, and of which API group.
type Right = (String, String, String);

/// What the account of the operator needs, all of it.
fn needed() -> BTreeSet<Right> {
    let table: [(&str, &str, &[&str]); 5] = [
        ("redis-migration.io", "redismigrations", &["get", "list", "watch", "patch"]),
        ("redis-migration.io", "redismigrations/status", &["patch"]),
        ("coordination.k8s.io", "leases", &["get", "list", "watch", "create", "update", "delete"]),
        ("events.k8s.io", "events", &["create", "patch"]),
        ("", "secrets configmaps", &["get"]),
    ];
    let mut rights = BTreeSet::new();
    for (group, resources, verbs) in table {
        for resource in resources.split(' ') {
            rights
                .extend(verbs.iter().map(|verb| (group.to_owned(), resource.to_owned(), (*verb).to_owned())));
        }
    }
    rights
}

/// Of its replicas' own Leases, where they run.
fn needed_at_home() -> BTreeSet<Right> {
    let mut leases = needed();
    leases.retain(|(_, resource, verb)| resource == "leases" && verb != "update");
    leases.insert(("coordination.k8s.io".to_owned(), "leases".to_owned(), "patch".to_owned()));
    leases
}

/// What the API server says that this token's holder may do in a namespace, beyond what everybody may.
fn allowed(plane: &ControlPlane, token: &str, namespace: &str) -> Result<BTreeSet<Right>> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}
    });
    let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
    let answer = plane.api_as(token)?.post(path, &review)?.expect(&[201])?;
    let mut rights = BTreeSet::new();
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    for rule in answer["status"]["resourceRules"].as_array().context("no rules")? {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    if !resource.starts_with("self") {
                        rights.insert((group.clone(), resource.clone(), verb));
                    }
                }
            }
        }
    }
    Ok(rights)
}

#[test]
fn the_account_may_do_what_is_needed_and_nothing_else() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("wide", &[])?;
    plane.helm(&["install", "op", &chart(), "-n", "wide", "--set", "crds.enabled=false"])?;
    let token = plane.token("wide", ACCOUNT)?;
    let home: BTreeSet<Right> = needed().union(&needed_at_home()).cloned().collect();
    for (namespace, needed) in [("wide", home), ("default", needed())] {
        let allowed = allowed(plane, &token, namespace)?;
        let surplus: Vec<_> = allowed.difference(&needed).cloned().collect();
        let missing: Vec<_> = needed.difference(&allowed).cloned().collect();
        ensure!(
            surplus.is_empty() && missing.is_empty(),
            "{namespace}: surplus {surplus:?}, missing {missing:?}"
        );
    }
    // As it is really asked for.
    let api = plane.api_as(&token)?;
    for (path, status) in [
        ("/apis/redis-migration.io/v1alpha1/redismigrations", 200),
        ("/apis/coordination.k8s.io/v1/leases", 200),
        ("/api/v1/secrets", 403),
        ("/api/v1/namespaces/default/secrets", 403),
        ("/api/v1/namespaces/default/configmaps", 403),
        ("/api/v1/namespaces/default/configmaps/kube-root-ca.crt", 200),
        ("/api/v1/pods", 403),
        ("/api/v1/namespaces", 403),
        ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", 403),
    ] {
        assert_eq!(api.get(path)?.status, status, "{path}");
    }
    plane.helm(&["uninstall", "op", "-n", "wide"])?;
    Ok(())
}

#[test]
fn with_namespaces_the_account_sees_no_others() -> Result<()> {
    let plane = ControlPlane::shared()?;
    for namespace in ["operators", "shop", "bank"] {
        plane.namespace(namespace, &[])?;
        plane.kubectl(&["create", "secret", "generic", "redis", "--from-literal=old=pw", "-n", namespace])?;
    }
    let values = ["--set", "crds.enabled=false", "--set", "namespaces={shop}"];
    plane.helm(&[&["install", "op", &chart(), "-n", "operators"], &values[..]].concat())?;
    let token = plane.token("operators", ACCOUNT)?;
    assert_eq!(allowed(plane, &token, "shop")?, needed());
    for namespace in ["bank", "default"] {
        assert_eq!(allowed(plane, &token, namespace)?, BTreeSet::new(), "{namespace}");
    }
    assert_eq!(allowed(plane, &token, "operators")?, needed_at_home());
    let api = plane.api_as(&token)?;
    let secret = |namespace: &str| api.get(&format!("/api/v1/namespaces/{namespace}/secrets/redis"));
    assert_eq!(secret("shop")?.status, 200);
    assert_eq!(secret("bank")?.status, 403);
    assert_eq!(secret("operators")?.status, 403);
    // One that is added later comes with an upgrade; one that is taken out goes.
    let values = ["--set", "crds.enabled=false", "--set", "namespaces={bank}"];
    plane.helm(&[&["upgrade", "op", &chart(), "-n", "operators"], &values[..]].concat())?;
    assert_eq!((secret("shop")?.status, secret("bank")?.status), (403, 200));
    plane.helm(&["uninstall", "op", "-n", "operators"])?;
    assert_eq!(secret("bank")?.status, 403);
    Ok(())
}

/// Users with the cluster's own roles see and change RedisMigrations, but do not write their status.
#[test]
fn view_and_edit_reach_migrations() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("people", &[])?;
    plane.helm(&["install", "op", &chart(), "-n", "people", "--set", "crds.enabled=false"])?;
    for (role, get, create, status) in
        [("view", true, false, false), ("edit", true, true, false), ("admin", true, true, false)]
    {
        plane.kubectl(&["create", "serviceaccount", role, "-n", "people"])?;
        let account = format!("--serviceaccount=people:{role}");
        plane.kubectl(&[
            "create",
            "rolebinding",
            role,
            &format!("--clusterrole={role}"),
            &account,
            "-n",
            "people",
        ])?;
        let token = plane.token("people", role)?;
        let right = |resource: &str, verb: &str| {
            ("redis-migration.io".to_owned(), resource.to_owned(), verb.to_owned())
        };
        // The controller that aggregates the roles may take a moment.
        wait_until(&format!("the rights of {role}"), PATIENCE, || {
            let allowed = allowed(plane, &token, "people")?;
            let seen = (
                allowed.contains(&right("redismigrations", "get")),
                allowed.contains(&right("redismigrations", "create")),
                allowed.contains(&right("redismigrations/status", "patch")),
            );
            ensure!(seen == (get, create, status), "{seen:?}");
            Ok(Some(()))
        })?;
    }
    plane.helm(&["uninstall", "op", "-n", "people"])?;
    Ok(())
}

/// Whether this field is part of what the API server serves.
fn serves(plane: &ControlPlane, pointer: &str) -> Result<bool> {
    let definition = plane.get(&["crd", "redismigrations.redis-migration.io"])?;
    let schema =
        &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    Ok(schema.pointer(pointer).is_some())
}

#[test]
fn the_definition_is_upgraded_and_outlives_the_chart() -> Result<()> {
    let plane = ControlPlane::start()?;
    plane.namespace("life", &[])?;
    // The chart as it was before `suspend`, and before a bound was lifted.
    let old = tempfile::tempdir()?;
    copy(Path::new(&chart()), old.path())?;
    let file = old.path().join("files/redismigrations.yaml");
    let mut definition: Value = serde_saphyr::from_str(&std::fs::read_to_string(&file)?)?;
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let fields = definition.pointer_mut(spec).and_then(Value::as_object_mut).context("fields")?;
    fields.remove("suspend").context("suspend")?;
    let body = serde_json::to_string_pretty(&definition["spec"])?.replace('\n', "\n  ");
    std::fs::write(
        &file,
        format!(
            "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata:\n  \
         name: redismigrations.redis-migration.io\nspec: {body}\n"
        ),
    )?;
    plane.helm(&["install", "op", &old.path().display().to_string(), "-n", "life"])?;
    plane.wait_for_definition()?;
    ensure!(!serves(&plane, "/suspend")?, "not the old definition");
    let object = json!({
        "apiVersion": "redis-migration.io/v1alpha1", "kind": "RedisMigration",
        "metadata": {"name": "orders", "namespace": "life"},
        "spec": {
            "source": {"type": "Replication", "redis": {"endpoints": ["redis-old:6379"]}},
            "target": {"type": "Redis", "redis": {"endpoints": ["redis-new:6379"]}},
        }
    });
    plane.apply(&object.to_string())?;

    plane.helm(&["upgrade", "op", &chart(), "-n", "life"])?;
    ensure!(serves(&plane, "/suspend")?, "the upgrade did not bring the new definition");
    wait_until("the new field", PATIENCE, || {
        let seen = plane.get(&["redismigration", "orders", "-n", "life"])?;
        Ok((seen["spec"]["suspend"] == false).then_some(()))
    })?;

    // Uninstalled, the definition and what is of it stay; installed again, they are taken over.
    plane.helm(&["uninstall", "op", "-n", "life"])?;
    plane.get(&["redismigration", "orders", "-n", "life"])?;
    plane.helm(&["install", "op", &chart(), "-n", "life"])?;
    plane.get(&["redismigration", "orders", "-n", "life"])?;

    // Unless they are not to be kept.
    plane.helm(&["upgrade", "op", &chart(), "-n", "life", "--set", "crds.keep=false"])?;
    plane.helm(&["uninstall", "op", "-n", "life"])?;
    let path = "/apis/redis-migration.io/v1alpha1/redismigrations";
    wait_until(
        "the definition's end",
        PATIENCE,
        || Ok((plane.api().get(path)?.status == 404).then_some(())),
    )?;

    // One that kubectl made is taken over on request.
    plane.install_definition()?;
    let install = ["install", "op", &chart(), "-n", "life"];
    let refused = plane.helm(&install).err().context("a foreign definition is overwritten")?;
    ensure!(format!("{refused}").contains("invalid ownership metadata"), "{refused}");
    plane.helm(&[&install[..], &["--take-ownership"]].concat())?;
    Ok(())
}

/// Pods that Pod Security `restricted` would refuse never appear; a chart that asks for more must show.
#[test]
fn pods_appear_under_restricted_and_not_with_more() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("strict", &[("pod-security.kubernetes.io/enforce", "restricted")])?;
    let pods = || -> Result<usize> {
        let list = plane.get(&["pods", "-n", "strict"])?;
        Ok(list["items"].as_array().map_or(0, Vec::len))
    };
    let install = ["install", "op", &chart(), "-n", "strict", "--set", "crds.enabled=false"];
    plane.helm(&[&install[..], &["--set", "podSecurityContext.runAsNonRoot=false"]].concat())?;
    let failure = wait_until("the refusal", PATIENCE, || {
        let list = plane.get(&["replicasets", "-n", "strict"])?;
        let conditions = list["items"][0]["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let failure = conditions.into_iter().find(|condition| condition["type"] == "ReplicaFailure");
        Ok(failure.and_then(|failure| failure["message"].as_str().map(str::to_owned)))
    })?;
    ensure!(failure.contains("violates PodSecurity \"restricted"), "{failure}");
    assert_eq!(pods()?, 0);
    plane.helm(&["upgrade", "op", &chart(), "-n", "strict", "--set", "crds.enabled=false"])?;
    // The second one comes when the first is ready.
    wait_until("a Pod", PATIENCE, || Ok((pods()? == 1).then_some(())))?;
    // The test of the release asks for no more than the Pods.
    let test = plane.helm(&["get", "hooks", "op", "-n", "strict"])?;
    plane.kubectl_with(&["apply", "--dry-run=server", "-n", "strict", "-f", "-"], &test)?;
    plane.helm(&["uninstall", "op", "-n", "strict"])?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
