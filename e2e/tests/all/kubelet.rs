//! The player of a node itself, with a program that tells what it was given; and by it what the
//! chart gives to the operator.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::controlplane::Running;
use e2e::{ControlPlane, Kubelet, wait_until};
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(90);

/// Answers the probes where `--listen` says, and writes arguments and environment as its first line.
const PROGRAM: &str = r#"#!/usr/bin/env python3
import http.server, json, os, sys
host, port = sys.argv[sys.argv.index("--listen") + 1].rsplit(":", 1)
class Probes(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/healthz", "/readyz") else 404)
        self.end_headers()
    def log_message(self, *words):
        pass
server = http.server.HTTPServer((host, int(port)), Probes)
print(json.dumps({"args": sys.argv[1:], "env": dict(os.environ)}), flush=True)
server.serve_forever()
"#;

fn program() -> Result<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("program");
    std::fs::write(&file, PROGRAM)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    Ok((folder, file))
}

fn chart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/redis-migration-operator").to_owned()
}

/// The arguments and variables that a Pod's newest process got.
fn given(kubelet: &Kubelet, pod: &Running) -> Result<Value> {
    let log = kubelet.log(&pod.name);
    let line = log.lines().rev().find(|line| line.starts_with('{')).with_context(|| log.clone())?;
    Ok(serde_json::from_str(line)?)
}

#[test]
fn pods_of_the_chart_run_restart_and_end() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let (_folder, program) = program()?;
    plane.namespace("played", &[("pod-security.kubernetes.io/enforce", "restricted")])?;
    let kubelet = Kubelet::with_program(plane, "played", &program)?;
    let release = ["install", "op", &chart(), "-n", "played", "--set", "crds.enabled=false"];
    plane.helm(
        &[&release[..], &["--set", "namespaces={played,others}", "--set", "rbac.create=false"]].concat(),
    )?;

    let pods = kubelet.wait_ready(2, PATIENCE)?;
    plane.kubectl(&["rollout", "status", "-n", "played", "deployment", "--timeout=60s"])?;
    assert_ne!(pods[0].ip, pods[1].ip);
    for pod in &pods {
        let given = given(&kubelet, pod)?;
        let args: Vec<&str> =
            given["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let listen = format!("{}:9320", pod.ip);
        let [first @ .., "--data-dir", data, "--spool-size", "20Gi", "--log-format", "json"] =
            args.as_slice()
        else {
            anyhow::bail!("{args:?}")
        };
        assert_eq!(first, ["operator", "--namespaces", "played,others", "--listen", &listen]);
        ensure!(std::path::Path::new(data).is_dir(), "{data} is no folder");
        assert_eq!(given["env"]["POD_NAME"], pod.name.as_str());
        assert_eq!(given["env"]["POD_NAMESPACE"], "played");
        ensure!(given["env"]["CARGO_MANIFEST_DIR"].is_null(), "the test's own environment is passed on");
    }

    // What a Service leads to answers the test of the release.
    plane.helm(&["test", "op", "-n", "played", "--timeout=60s"]).with_context(|| kubelet.trouble())?;

    // A container that ends is started again, as the same Pod.
    let first = &pods[0];
    kubelet.kill(&first.name)?;
    let again = wait_until("a restart", PATIENCE, || {
        let pod = kubelet.pods().into_iter().find(|pod| pod.name == first.name);
        Ok(pod.filter(|pod| pod.ready && pod.restarts == 1))
    })?;
    assert_ne!(again.pid, first.pid);
    assert_eq!(given(&kubelet, &again)?["args"], given(&kubelet, first)?["args"]);
    wait_until("the restart being told", PATIENCE, || {
        let pod = plane.get(&["pod", "-n", "played", &first.name])?;
        Ok((pod["status"]["containerStatuses"][0]["restartCount"] == 1).then_some(()))
    })?;

    // A node that goes takes its Pod with it, and nobody tells.
    kubelet.lose(&pods[1].name)?;
    let lost = plane.get(&["pod", "-n", "played", &pods[1].name])?;
    assert_eq!(lost["status"]["phase"], "Running");
    assert_eq!(kubelet.pods().len(), 1);

    plane.helm(&["uninstall", "op", "-n", "played"])?;
    wait_until("the end of all Pods", PATIENCE, || Ok(kubelet.pods().is_empty().then_some(())))?;
    Ok(())
}

/// Without the API server what runs goes on, and is told of when it is back.
#[test]
fn pods_outlive_the_api_server() -> Result<()> {
    use e2e::controlplane::Part;

    let mut plane = ControlPlane::start()?;
    let (_folder, program) = program()?;
    plane.namespace("away", &[])?;
    let kubelet = Kubelet::with_program(&plane, "away", &program)?;
    let values = ["--set", "crds.enabled=false", "--set", "replicas=1"];
    plane.helm(&[&["install", "op", &chart(), "-n", "away"], &values[..]].concat())?;
    let before = kubelet.wait_ready(1, PATIENCE)?;
    plane.kill(Part::ApiServer);
    plane.kill(Part::Etcd);
    kubelet.kill(&before[0].name)?;
    let restarted = |pods: Vec<Running>| pods.into_iter().find(|pod| pod.ready && pod.restarts == 1);
    wait_until("a restart", PATIENCE, || Ok(restarted(kubelet.pods())))?;
    plane.restart(Part::Etcd)?;
    plane.restart(Part::ApiServer)?;
    wait_until("the restart being told", PATIENCE, || {
        let pod = plane.get(&["pod", "-n", "away", &before[0].name])?;
        Ok((pod["status"]["containerStatuses"][0]["restartCount"] == 1).then_some(()))
    })?;
    // The controllers come back by themselves.
    plane.kubectl(&["scale", "-n", "away", "deployment", "--all", "--replicas=2"])?;
    kubelet.wait_ready(2, PATIENCE)?;
    Ok(())
}
