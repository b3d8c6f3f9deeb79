//! Files that RedisMigrations name by their path are on the operator's own machine.

use anyhow::{Context, Result, ensure};
use e2e::scenario::PATIENCE;
use e2e::{ControlPlane, Manifest, Migration, Operator, Server, args};
use serde_json::{Value, json};

use crate::operator::VERSION;

fn to_json(source: &Server, uri: &str) -> Manifest {
    Manifest::between(&source.endpoint(), &source.endpoint())
        .set("/spec/target", json!({"type": "Json", "json": {"uri": uri}}))
}

fn refused(status: &Value) -> Option<String> {
    let stalled = status["conditions"].as_array()?.iter().find(|found| found["type"] == "Stalled")?;
    (stalled["status"] == "True").then(|| stalled["message"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn paths_are_refused_but_in_the_folder_that_is_allowed() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("files", &[])?;
    let source = Server::start(VERSION)?;
    source.conn()?.run(args!["SET", "key", "value"])?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();

    let mut operator = Operator::start(plane, "files", "a")?;
    let migration = Migration::apply(plane, "files", "without", &to_json(&source, &path("a.json")))?;
    let status = migration.wait_for("the refusal", PATIENCE, |status| refused(status).is_some())?;
    let message = refused(&status).context("not refused")?;
    ensure!(message.contains("spec.target.json.uri") && message.contains("--allow-files"), "{message}");
    migration.delete(PATIENCE)?;
    operator.kill();

    let allowed = folder.path().join("allowed");
    std::fs::create_dir(&allowed)?;
    let allow = allowed.to_str().context("not UTF-8")?;
    let _operator = Operator::start_with(plane, "files", "b", &["--allow-files", allow])?;
    let outside = [path("b.json"), path("allowed/../c.json"), format!("file://{}", path("allowedly/d.json"))];
    for (number, uri) in outside.iter().enumerate() {
        let manifest = to_json(&source, uri);
        let migration = Migration::apply(plane, "files", &format!("outside-{number}"), &manifest)?;
        let status = migration.wait_for("the refusal", PATIENCE, |status| refused(status).is_some())?;
        let message = refused(&status).context("not refused")?;
        ensure!(message.contains("is outside of the folder"), "{message}");
    }
    let uri = path("allowed/{shard}.json");
    let migration = Migration::apply(plane, "files", "within", &to_json(&source, &uri))?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    let written: Vec<_> = std::fs::read_dir(&allowed)?.collect::<std::io::Result<_>>()?;
    ensure!(written.len() == 1, "{written:?}");
    let line: Value = serde_json::from_slice(&std::fs::read(written[0].path())?)?;
    ensure!(line["key"] == "key" && line["value"] == "value", "{line}");
    let left: Vec<_> = std::fs::read_dir(folder.path())?.collect::<std::io::Result<_>>()?;
    ensure!(left.len() == 1, "{left:?}");
    Ok(())
}
