//! The chart as text: every object that it can make is admitted by a real API server, its README
//! is its values, and its rules and dashboard ask for metrics that exist.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{ControlPlane, Manifest, Server, Tool, Version, args, wait_until};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const MARK: &str = "<!-- values -->";

/// Everything that can be switched on, at once.
const ALL: &[&str] = &[
    "metrics.podMonitor.enabled=true",
    "metrics.podMonitor.labels.release=prometheus",
    "metrics.serviceMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "metrics.dashboard.enabled=true",
    "networkPolicy.enabled=true",
    "networkPolicy.from[0].namespaceSelector.matchLabels.name=monitoring",
    "networkPolicy.egress[0].ports[0].port=6379",
    "spool.type=ephemeral",
    "spool.storageClassName=fast",
    "files.volume.persistentVolumeClaim.claimName=backups",
    "files.path=/backups",
    "imagePullSecrets[0].name=registry",
    "serviceAccount.annotations.role=arn",
    "podLabels.team=data",
    "podAnnotations.note=x",
    "nodeSelector.disk=ssd",
    "tolerations[0].operator=Exists",
    "priorityClassName=system-cluster-critical",
    "extraEnv[0].name=A",
    "extraEnv[0].value=b",
];

/// What the values are, and whether the schema takes them.
const SETS: &[(&[&str], bool)] = &[
    (&[], true),
    (ALL, true),
    (&["namespaces={default,kube-public}"], true),
    (
        &["crds.enabled=false", "rbac.create=false", "rbac.aggregate=false", "serviceAccount.create=false"],
        true,
    ),
    (&["metrics.service=false", "podDisruptionBudget.enabled=false", "topologySpread=false"], true),
    (&["image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"], true),
    (&["podSecurityContext.runAsUser=null", "podSecurityContext.fsGroup=null"], true),
    (&["replicas=-1"], false),
    (&["replicas=two"], false),
    (&["namespace={a}"], false),
    (&["namespaces={Not_A_Name}"], false),
    (&["spool.type=disk"], false),
    (&["spool.size=lots"], false),
    (&["spool.size=20K"], false),
    (&["files.path=backups"], false),
    (&["files.volume.name=backups", "files.volume.emptyDir.medium=Memory"], false),
    (&["image.digest=latest"], false),
    (&["log.format=xml"], false),
    (&["metrics.podMonitor.interval=often"], false),
    (&["metrics.service=false", "metrics.serviceMonitor.enabled=true"], false),
    (&["resource.limits.memory=1Gi"], false),
];

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/redis-migration-operator")
}

fn helm(plane: &ControlPlane, verb: &[&str], values: &[&str]) -> Result<String> {
    let chart = chart().display().to_string();
    let mut words: Vec<&str> = verb.to_vec();
    words.push(&chart);
    values.iter().for_each(|value| words.extend(["--set", value]));
    plane.helm(&words)
}

/// Kinds of the Prometheus operator, of any content.
fn foreign_kinds(plane: &ControlPlane) -> Result<()> {
    for (kind, plural) in [
        ("PodMonitor", "podmonitors"),
        ("ServiceMonitor", "servicemonitors"),
        ("PrometheusRule", "prometheusrules"),
    ] {
        let group = "monitoring.coreos.com";
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {"group": group, "scope": "Namespaced", "names": {"kind": kind, "plural": plural}, "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }]},
        });
        plane.apply(&definition.to_string())?;
        let path = format!("/apis/{group}/v1/{plural}");
        wait_until(kind, PATIENCE, || Ok(plane.api().get(&path)?.found()))?;
    }
    Ok(())
}

#[test]
fn every_object_is_admitted() -> Result<()> {
    let plane = ControlPlane::shared()?;
    foreign_kinds(plane)?;
    let mut kinds = BTreeSet::new();
    for (values, good) in SETS {
        let rendered = helm(plane, &["template", "trial"], values);
        if !good {
            ensure!(rendered.is_err(), "{values:?} is taken");
            continue;
        }
        helm(plane, &["lint", "--strict"], values)?;
        let text = rendered.with_context(|| format!("{values:?}"))?;
        kinds.extend(text.lines().filter_map(|line| line.strip_prefix("kind: ")).map(str::to_owned));
        let words = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
            "--force-conflicts",
            "-f",
            "-",
        ];
        plane.kubectl_with(&words, &text).with_context(|| format!("{values:?}"))?;
    }
    let made = [
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "CustomResourceDefinition",
        "Deployment",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    ];
    assert_eq!(kinds.iter().map(String::as_str).collect::<Vec<_>>(), made);
    Ok(())
}

/// A list of namespaces must not leave a cluster-wide right to read Secrets.
#[test]
fn with_namespaces_there_is_no_cluster_role_of_the_operator() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let text = helm(plane, &["template", "trial"], &["namespaces={a,b}", "crds.enabled=false"])?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    for document in &documents {
        ensure!(document["kind"] != "ClusterRoleBinding", "{document}");
        ensure!(document["kind"] != "ClusterRole" || !document.to_string().contains("secrets"), "{document}");
    }
    let reads_secrets = |document: &&Value| document.to_string().contains("secrets");
    let roles = documents.iter().filter(|document| document["kind"] == "Role").filter(reads_secrets);
    let places: Vec<&str> = roles.filter_map(|role| role["metadata"]["namespace"].as_str()).collect();
    assert_eq!(places, ["a", "b"]);
    Ok(())
}

#[test]
fn the_definition_in_the_chart_is_the_committed_one() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let file = chart().join("files/redismigrations.yaml");
    let committed = std::fs::read_to_string(chart().join("../../crds/redismigrations.yaml"))?;
    if std::env::var_os("UPDATE_CHART").is_some() {
        std::fs::write(&file, &committed)?;
    }
    ensure!(
        std::fs::read_to_string(&file)? == committed,
        "stale: UPDATE_CHART=1 cargo test --test all chart::"
    );
    let text = helm(plane, &["template", "trial", "-s", "templates/crd.yaml"], &[])?;
    let mut rendered: Value = serde_saphyr::from_str(&text)?;
    assert_eq!(rendered["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    let expected: Value = serde_saphyr::from_str(&committed)?;
    rendered["metadata"] = expected["metadata"].clone();
    ensure!(rendered == expected, "the template changes more than the metadata");
    Ok(())
}

/// UPDATE_CHART=1 writes the table anew.
#[test]
fn the_readme_shows_the_values() -> Result<()> {
    let file = chart().join("README.md");
    let text = std::fs::read_to_string(&file)?;
    let (before, rest) = text.split_once(MARK).context("no mark")?;
    let (_, after) = rest.split_once(MARK).context("only one mark")?;
    let table = table(&std::fs::read_to_string(chart().join("values.yaml"))?)?;
    let made = format!("{before}{MARK}\n\n{table}\n{MARK}{after}");
    if std::env::var_os("UPDATE_CHART").is_some() {
        std::fs::write(&file, &made)?;
    } else {
        ensure!(text == made, "charts/…/README.md is stale: UPDATE_CHART=1 cargo test --test all chart::");
    }
    Ok(())
}

/// A row for each value that a comment with `# --` describes.
fn table(values: &str) -> Result<String> {
    let mut rows = String::from("| Value | Default | |\n|---|---|---|\n");
    let parsed: Value = serde_saphyr::from_str(values)?;
    let mut path: Vec<(usize, String)> = Vec::new();
    let (mut described, mut seen) = (None, BTreeSet::new());
    for line in values.lines() {
        let indent = line.len() - line.trim_start().len();
        if let Some(text) = line.trim_start().strip_prefix("# -- ") {
            described = Some(text.to_owned());
            continue;
        }
        let Some((name, _)) =
            line.trim_start().split_once(':').filter(|_| !line.trim_start().starts_with('#'))
        else {
            continue;
        };
        path.retain(|(depth, _)| *depth < indent);
        path.push((indent, name.to_owned()));
        if let Some(text) = described.take() {
            let names: Vec<&str> = path.iter().map(|(_, name)| name.as_str()).collect();
            let value = parsed.pointer(&format!("/{}", names.join("/"))).context("a value")?;
            let _ = writeln!(rows, "| `{}` | `{value}` | {} |", names.join("."), text.replace('|', "\\|"));
            seen.insert(names.join("."));
        }
    }
    let mut undescribed = Vec::new();
    leaves(&parsed, String::new(), &mut undescribed);
    undescribed
        .retain(|leaf| !seen.iter().any(|value| leaf == value || leaf.starts_with(&format!("{value}."))));
    ensure!(undescribed.is_empty(), "no description: {undescribed:?}");
    Ok(rows)
}

fn leaves(value: &Value, path: String, into: &mut Vec<String>) {
    match value.as_object().filter(|members| !members.is_empty()) {
        Some(members) => members.iter().for_each(|(name, value)| {
            let dot = if path.is_empty() { "" } else { "." };
            leaves(value, format!("{path}{dot}{name}"), into);
        }),
        None => into.push(path),
    }
}

/// As a running migration shows them.
#[test]
fn rules_and_dashboard_ask_for_metrics_that_exist() -> Result<()> {
    let (source, target) = (Server::start(Version::REDIS_7_0)?, Server::start(Version::REDIS_7_0)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let told = tool.stderr();
    let address = told.lines().find_map(|line| line.split_once("listening on ")).context("no address")?.1;
    let shown =
        ureq::get(format!("http://{}/metrics", address.trim())).call()?.body_mut().read_to_string()?;
    let exist: BTreeSet<&str> = shown
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    ensure!(exist.len() > 15, "{shown}");
    for file in ["rules.yaml", "dashboard.json"] {
        let text = std::fs::read_to_string(chart().join("files").join(file))?;
        let mut asked = BTreeSet::new();
        for (at, prefix) in text.match_indices("redis_migration_") {
            let name: String =
                text[at..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            ensure!(
                name.len() > prefix.len() && exist.contains(name.as_str()),
                "{file}: {name} is no metric"
            );
            asked.insert(name);
        }
        ensure!(asked.len() > 5, "{file} asks for nothing");
    }
    let dashboard = std::fs::read_to_string(chart().join("files/dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&dashboard)?;
    ensure!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 5), "no panels");
    let rules: Vec<Value> =
        serde_saphyr::from_str(&std::fs::read_to_string(chart().join("files/rules.yaml"))?)?;
    for rule in rules {
        ensure!(rule["alert"].is_string() && rule["expr"].is_string(), "{rule}");
        ensure!(
            rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(),
            "{rule}"
        );
    }
    Ok(())
}
