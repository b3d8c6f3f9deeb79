//! examples/gitops: each piece is run as its tool runs it, on statuses of real runs and of every outcome.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::controlplane::Program;
use e2e::scenario::PATIENCE;
use e2e::{ControlPlane, Manifest, Server, Tool, Version, args, wait_until};
use mlua::LuaSerdeExt;
use serde_json::{Value, json};

/// Argo CD's health, and Flux's verdict.
type Verdicts = (&'static str, &'static str);

fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": "why", "observedGeneration": 3,
           "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// An object at generation 3 with this status.
fn object(phase: &str, observed: i64, conditions: &[Value]) -> Value {
    json!({"metadata": {"generation": 3}, "status": {
        "observedGeneration": observed, "phase": phase, "message": phase, "conditions": conditions,
    }})
}

fn outcomes() -> Vec<(&'static str, Value, Verdicts)> {
    let ready = condition("Ready", "True", "IncrementalSync");
    let unready = |reason: &str| condition("Ready", "False", reason);
    let reconciling = condition("Reconciling", "True", "FullSync");
    let finished = condition("Finished", "True", "Completed");
    vec![
        ("nobody has looked", object("Pending", -1, &[]), ("Progressing", "InProgress")),
        (
            "ready before a change",
            object("IncrementalSync", 2, std::slice::from_ref(&ready)),
            ("Progressing", "InProgress"),
        ),
        (
            "failed before a change",
            object("Failed", 2, &[condition("Stalled", "True", "InvalidSpec")]),
            ("Progressing", "InProgress"),
        ),
        (
            "full sync",
            object("FullSync", 3, &[unready("FullSync"), reconciling]),
            ("Progressing", "InProgress"),
        ),
        (
            "in sync",
            object("IncrementalSync", 3, &[ready.clone(), condition("InSync", "True", "IncrementalSync")]),
            ("Healthy", "Current"),
        ),
        (
            "quarantined",
            object("IncrementalSync", 3, &[ready, condition("Degraded", "True", "CommandsQuarantined")]),
            ("Degraded", "Current"),
        ),
        (
            "not degraded any more",
            object("FullSync", 3, &[unready("FullSync"), condition("Degraded", "False", "SpoolFull")]),
            ("Progressing", "InProgress"),
        ),
        (
            "invalid",
            object("Failed", 3, &[unready("InvalidSpec"), condition("Stalled", "True", "InvalidSpec")]),
            ("Degraded", "Failed"),
        ),
        ("suspended", object("Suspended", 3, &[unready("Suspended")]), ("Suspended", "InProgress")),
        (
            "completed",
            object(
                "Completed",
                3,
                &[
                    condition("Ready", "True", "Completed"),
                    finished.clone(),
                    condition("Succeeded", "True", "Completed"),
                ],
            ),
            ("Healthy", "Current"),
        ),
        (
            "failed",
            object(
                "Failed",
                3,
                &[
                    unready("VerificationFailed"),
                    finished,
                    condition("Succeeded", "False", "VerificationFailed"),
                ],
            ),
            ("Degraded", "Failed"),
        ),
    ]
}

#[test]
fn argo_cd_tells_the_health_of_every_outcome() -> Result<()> {
    for (what, object, (health, _)) in outcomes() {
        assert_eq!(argo(&object)?.0, health, "{what}");
    }
    // What is wrong is said.
    let stalled = object("Failed", 3, &[condition("Stalled", "True", "InvalidSpec")]);
    assert_eq!(argo(&stalled)?.1, "InvalidSpec: why");
    assert_eq!(argo(&json!({"metadata": {"generation": 1}}))?.0, "Progressing");
    Ok(())
}

#[test]
fn flux_tells_every_outcome() -> Result<()> {
    for (what, object, (_, verdict)) in outcomes() {
        assert_eq!(flux(&object)?, verdict, "{what}");
    }
    Ok(())
}

/// Every status that a real migration shows on its way.
#[test]
fn a_real_run_is_in_progress_until_it_is_ready() -> Result<()> {
    let (source, target) = (Server::start(Version::REDIS_7_0)?, Server::start(Version::REDIS_7_0)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Automatic");
    let finished = Tool::run(&manifest, &[])?.expect_exit(0, PATIENCE)?;
    let mut last = (String::new(), String::new());
    for line in finished.stdout.lines() {
        let line: Value = serde_json::from_str(line)?;
        let status = &line["status"];
        let object = json!({"metadata": {"generation": status["observedGeneration"]}, "status": status});
        let ready = e2e::tool::condition(status, "Ready").as_deref() == Some("True");
        last = (argo(&object)?.0, flux(&object)?);
        let expected = if ready { ("Healthy", "Current") } else { ("Progressing", "InProgress") };
        assert_eq!((last.0.as_str(), last.1.as_str()), expected, "{status}");
    }
    assert_eq!((last.0.as_str(), last.1.as_str()), ("Healthy", "Current"));
    Ok(())
}

/// The script against a real API server; the test writes the statuses that the operator would.
#[test]
fn the_pipeline_waits_approves_and_ends_as_the_migration_does() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("pipeline", &[])?;
    for (name, succeeded) in [("good", true), ("bad", false)] {
        let mut script = Pipeline::start(plane, name, "pipeline")?;
        let path = migration("pipeline", name);
        wait_until("the object", PATIENCE, || Ok(plane.api().get(&path)?.found()))?;
        let say = |phase: &str, conditions: &[Value]| {
            let status =
                json!({"status": {"observedGeneration": 1, "phase": phase, "conditions": conditions}});
            plane.api().merge(&format!("{path}/status"), &status)?.expect(&[200])
        };
        say("IncrementalSync", &[condition("CutoverReady", "True", "AwaitingApproval")])?;
        wait_until("the approval", PATIENCE, || {
            ensure!(script.child.try_wait()?.is_none(), "the script ended: {}", script.said()?);
            let object = plane.api().get(&path)?.expect(&[200])?;
            Ok((object["spec"]["cutover"]["approved"] == true).then_some(()))
        })?;
        let outcome = if succeeded { "True" } else { "False" };
        say(
            "Completed",
            &[condition("Finished", "True", "Completed"), condition("Succeeded", outcome, "Completed")],
        )?;
        assert_eq!(script.end()?, succeeded, "{name}: {}", script.said()?);
    }
    Ok(())
}

/// A migration that fails before it is in sync must not be waited for until the timeout.
#[test]
fn the_pipeline_ends_at_a_failure() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("failing", &[])?;
    let mut script = Pipeline::start(plane, "early", "failing")?;
    let path = migration("failing", "early");
    wait_until("the object", PATIENCE, || Ok(plane.api().get(&path)?.found()))?;
    let conditions = [
        condition("Finished", "True", "PreflightFailed"),
        condition("Succeeded", "False", "PreflightFailed"),
    ];
    let status = json!({"status": {"observedGeneration": 1, "phase": "Failed", "conditions": conditions}});
    plane.api().merge(&format!("{path}/status"), &status)?.expect(&[200])?;
    assert!(!script.end()?);
    ensure!(script.said()?.contains("PreflightFailed: why"), "{}", script.said()?);
    Ok(())
}

/// The commands of the workflow and of the task, in their order.
#[test]
fn the_steps_of_workflow_and_task_run() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("shop", &[])?;
    let task = document("tekton-task.yaml")?;
    let words = |step: &Value| -> Vec<String> {
        let words = step["args"].as_array().into_iter().flatten().filter_map(Value::as_str);
        words
            .map(|word| word.replace("$(params.name)", "orders").replace("$(params.namespace)", "shop"))
            .collect()
    };
    let tekton: Vec<Vec<String>> = list(&task["spec"]["steps"])?.iter().map(words).collect();
    let workflow = document("github-workflow.yaml")?;
    let mut github = Vec::new();
    for job in ["copy", "cut-over"] {
        for step in list(&workflow["jobs"][job]["steps"])? {
            let Some(line) = step["run"].as_str() else { continue };
            let mut words: Vec<String> = line.split_whitespace().map(|word| word.replace('\'', "")).collect();
            ensure!(words.remove(0) == "kubectl", "{line}");
            if words[0] != "apply" {
                github.push(words);
            }
        }
    }
    for (name, steps) in [("tekton", tekton), ("github", github)] {
        ensure!(steps.len() == 4, "{name}: {steps:?}");
        let object = manifest("orders", "shop");
        plane.apply(&object.to_string())?;
        let conditions: Vec<Value> =
            ["CutoverReady", "Finished", "Succeeded"].map(|kind| condition(kind, "True", "Completed")).into();
        let status = json!({"status": {"conditions": conditions}});
        let path = migration("shop", "orders");
        plane.api().merge(&format!("{path}/status"), &status)?.expect(&[200])?;
        for step in steps {
            plane.kubectl(&step.iter().map(String::as_str).collect::<Vec<_>>()).context(name)?;
        }
        let seen = plane.api().get(&path)?.expect(&[200])?;
        ensure!(seen["spec"]["cutover"]["approved"] == true, "{name} did not approve");
        plane.api().delete(&path)?.expect(&[200])?;
    }
    Ok(())
}

/// Health and message.
fn argo(object: &Value) -> Result<(String, String)> {
    let script = std::fs::read_to_string(folder().join("argocd-health.lua"))?;
    // Argo CD has Lua 5.1, the engine beside this test 5.4: what is not in both must not be used.
    let code: String = script.lines().filter_map(|line| line.split("--").next()).collect();
    for newer in
        ["//", "<<", ">>", "&", "|", "goto", "utf8", "table.unpack", "table.pack", "math.type", "_ENV"]
    {
        ensure!(!code.contains(newer), "{newer} is not in Lua 5.1");
    }
    let lua = mlua::Lua::new();
    let evaluate = || -> mlua::Result<(String, String)> {
        // Argo CD has nil where JSON has nothing.
        let options = mlua::serde::ser::Options::new().serialize_none_to_null(false);
        lua.globals().set("obj", lua.to_value_with(object, options)?)?;
        let health: mlua::Table = lua.load(&script).eval()?;
        Ok((health.get("status")?, health.get("message")?))
    };
    evaluate().map_err(|error| anyhow::anyhow!("{error}"))
}

/// In the order in which Flux asks its expressions.
fn flux(object: &Value) -> Result<String> {
    let kustomization = document("flux-kustomization.yaml")?;
    let expressions = &kustomization["spec"]["healthCheckExprs"][0];
    for (name, verdict) in [("inProgress", "InProgress"), ("failed", "Failed"), ("current", "Current")] {
        let text = expressions[name].as_str().context(name)?;
        let program = cel::Program::compile(text).map_err(|error| anyhow::anyhow!("{name}: {error:?}"))?;
        let mut context = cel::Context::default();
        for part in ["metadata", "status"] {
            context.add_variable(part, &object[part]).map_err(|error| anyhow::anyhow!("{part}: {error}"))?;
        }
        match program.execute(&context) {
            Ok(cel::Value::Bool(true)) => return Ok(verdict.to_owned()),
            Ok(cel::Value::Bool(false)) => {}
            other => anyhow::bail!("{name}: {other:?}"),
        }
    }
    Ok("none".to_owned())
}

struct Pipeline {
    child: std::process::Child,
    folder: tempfile::TempDir,
}

impl Pipeline {
    fn start(plane: &ControlPlane, name: &str, namespace: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("migration.yaml");
        std::fs::write(&file, manifest(name, namespace).to_string())?;
        // By that name on the PATH, as the script calls it.
        let kubectl = folder.path().join("kubectl");
        std::os::unix::fs::symlink(Program::Kubectl.file()?, &kubectl)?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        let child = Command::new("bash")
            .arg(self::folder().join("pipeline.sh"))
            .args([file.as_os_str(), name.as_ref(), namespace.as_ref()])
            .env("PATH", path)
            .env("HOME", folder.path())
            .env("KUBECONFIG", plane.kubeconfig())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Self { child, folder })
    }

    /// Whether it ended with 0.
    fn end(&mut self) -> Result<bool> {
        let ended = wait_until("the script's end", Duration::from_secs(60), || Ok(self.child.try_wait()?));
        Ok(ended.with_context(|| self.said().unwrap_or_default())?.success())
    }

    fn said(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.path().join("log"))?)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn manifest(name: &str, namespace: &str) -> Value {
    json!({
        "apiVersion": "redis-migration.io/v1alpha1", "kind": "RedisMigration",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "source": {"type": "Replication", "redis": {"endpoints": ["redis-old:6379"]}},
            "target": {"type": "Redis", "redis": {"endpoints": ["redis-new:6379"]}},
        }
    })
}

fn migration(namespace: &str, name: &str) -> String {
    format!("/apis/redis-migration.io/v1alpha1/namespaces/{namespace}/redismigrations/{name}")
}

fn document(file: &str) -> Result<Value> {
    let text = std::fs::read_to_string(folder().join(file))?;
    serde_saphyr::from_str(&text).with_context(|| file.to_owned())
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().context("not a list")
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/gitops")
}
