//! The operator as the chart runs it: its arguments, its rights, its probes, and a migration by `kubectl`.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::controlplane::Program;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::operator::Migration;
use e2e::{ControlPlane, Kubelet, Manifest, Server, Version, wait_until};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(120);
const VERSION: Version = Version::REDIS_7_0;

fn chart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/redis-migration-operator").to_owned()
}

/// A namespace under Pod Security `restricted` with the operator in it, for itself only.
fn installed(plane: &ControlPlane, namespace: &str) -> Result<Kubelet> {
    plane.namespace(namespace, &[("pod-security.kubernetes.io/enforce", "restricted")])?;
    let kubelet = Kubelet::start(plane, namespace)?;
    let only = format!("namespaces={{{namespace}}}");
    plane.helm(&[
        "install",
        "op",
        &chart(),
        "-n",
        namespace,
        "--set",
        "crds.enabled=false",
        "--set",
        &only,
    ])?;
    kubelet.wait_ready(2, PATIENCE)?;
    Ok(kubelet)
}

/// Waits, and tells what the Pods wrote when it is in vain.
fn wait(migration: &Migration, kubelet: &Kubelet, condition: &str) -> Result<()> {
    let waited = migration.wait_condition(condition, PATIENCE);
    waited.with_context(|| format!("{}\n{}", kubelet.tails(), kubelet.trouble()))
}

/// Nothing that the operator asked for was refused to its account.
fn nothing_forbidden(kubelet: &Kubelet) -> Result<()> {
    for pod in kubelet.pods() {
        let log = kubelet.log(&pod.name);
        let refused = log.lines().find(|line| line.to_lowercase().contains("forbidden"));
        ensure!(refused.is_none(), "{}: {refused:?}", pod.name);
    }
    Ok(())
}

#[test]
fn a_migration_from_apply_to_finish() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let kubelet = installed(plane, "finish")?;
    plane.kubectl(&["rollout", "status", "-n", "finish", "deployment", "--timeout=60s"])?;
    let source = e2e::Options::new(VERSION).password("before").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    writer.wait_more(300, PATIENCE)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/cutover", json!({"mode": "Manual"}));
    let migration = Migration::apply(plane, "finish", "orders", &manifest)?;
    wait(&migration, &kubelet, "InSync")?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait(&migration, &kubelet, "CutoverReady")?;
    migration.approve()?;
    wait(&migration, &kubelet, "Finished")?;
    wait(&migration, &kubelet, "Succeeded")?;
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    nothing_forbidden(&kubelet)?;

    // The metrics and probes are where the Service points.
    let pod = kubelet.pods().into_iter().next().context("no Pod")?;
    let metrics = ureq::get(format!("http://{}:9320/metrics", pod.ip)).call()?.body_mut().read_to_string()?;
    ensure!(metrics.contains("redis_migration_") || metrics.contains("# EOF"), "{metrics}");

    migration.seen()?;
    migration.delete(PATIENCE)?;
    plane.helm(&["uninstall", "op", "-n", "finish"])?;
    wait_until("the end of all Pods", PATIENCE, || Ok(kubelet.pods().is_empty().then_some(())))?;
    Ok(())
}

/// New Pods take over from old ones, which hand over; nothing is copied again.
#[test]
fn an_upgrade_of_the_chart_copies_nothing_again() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let kubelet = installed(plane, "rolling")?;
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let migration = Migration::apply(plane, "rolling", "orders", &manifest)?;
    wait(&migration, &kubelet, "InSync")?;
    let before = kubelet.pods();
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let upgrade =
        ["upgrade", "op", &chart(), "-n", "rolling", "--reuse-values", "--set", "podAnnotations.again=yes"];
    plane.helm(&upgrade)?;
    plane
        .kubectl(&["rollout", "status", "-n", "rolling", "deployment", "--timeout=180s"])
        .with_context(|| format!("{}\n{}", kubelet.tails(), kubelet.trouble()))?;
    wait_until("new Pods only", PATIENCE, || {
        let pods = kubelet.pods();
        let new = pods.iter().all(|pod| before.iter().all(|old| old.name != pod.name));
        Ok((new && pods.len() == 2).then_some(()))
    })?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait(&migration, &kubelet, "InSync")?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    let status = migration.status();
    assert_eq!(status["replication"]["fullResyncs"], 0, "{status}");
    let full = source.conn()?.info("stats", "sync_full")?;
    assert_eq!(full.as_deref(), Some("1"), "{status}");
    nothing_forbidden(&kubelet)?;
    migration.delete(PATIENCE)?;
    plane.helm(&["uninstall", "op", "-n", "rolling"])?;
    Ok(())
}

/// A cluster that has nothing yet: the README's installation for all namespaces, and a pipeline in one of them.
#[test]
fn a_pipeline_in_a_fresh_cluster() -> Result<()> {
    let plane = ControlPlane::start()?;
    plane.namespace("redis-migration", &[("pod-security.kubernetes.io/enforce", "restricted")])?;
    let kubelet = Kubelet::start(&plane, "redis-migration")?;
    plane.helm(&["install", "redis-migration", &chart(), "-n", "redis-migration"])?;
    kubelet.wait_ready(2, PATIENCE)?;
    plane.kubectl(&["get", "deployment", "redis-migration-operator", "-n", "redis-migration"])?;
    plane.namespace("shop", &[])?;

    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/metadata", json!({"name": "orders", "namespace": "shop"}))
        .set("/spec/cutover", json!({"mode": "Manual"}));
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("orders.yaml");
    std::fs::write(&file, manifest.document.to_string())?;
    std::os::unix::fs::symlink(Program::Kubectl.file()?, folder.path().join("kubectl"))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/gitops/pipeline.sh");
    let output = Command::new("bash")
        .arg(script)
        .args([file.as_os_str(), "orders".as_ref(), "shop".as_ref()])
        .env("PATH", format!("{}:/usr/bin:/bin", folder.path().display()))
        .env("HOME", folder.path())
        .env("KUBECONFIG", plane.kubeconfig())
        .env("IN_SYNC_WITHIN", "120s")
        .env("FINISHED_WITHIN", "120s")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}\n{}\n{}", kubelet.tails(), kubelet.trouble());
    ensure!(said.contains("Succeeded=True"), "{said}");
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    nothing_forbidden(&kubelet)?;

    // Uninstalled, what was migrated is still told.
    plane.helm(&["uninstall", "redis-migration", "-n", "redis-migration"])?;
    let seen = plane.get(&["redismigration", "orders", "-n", "shop"])?;
    assert_eq!(seen["status"]["phase"], "Completed");
    Ok(())
}
