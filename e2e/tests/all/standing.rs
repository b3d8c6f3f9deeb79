//! What the conditions say of a migration that is not in sync any more, and of one that is again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::scenario::PATIENCE;
use e2e::tool::condition;
use e2e::{ControlPlane, Migration, Operator, Options, Server, Tool, args};
use serde_json::Value;

use crate::failover::signal;
use crate::operator::{VERSION, fast, manual, nothing_left};

/// All of these, with that truth.
fn are(status: &Value, truth: &str, kinds: &[&str]) -> bool {
    kinds.iter().all(|kind| condition(status, kind).as_deref() == Some(truth))
}

const WELL: [&str; 4] = ["Ready", "InSync", "FullSynced", "CutoverReady"];

fn is_well(status: &Value) -> bool {
    are(status, "True", &WELL) && condition(status, "Reconciling").is_none()
}

/// Also when its cutover is approved in the middle of the copy.
#[test]
fn what_is_copied_again_is_compared_again() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("copied-again", &[])?;
    let (source, target) =
        (Options::new(VERSION).with("enable-debug-command", "yes").start()?, Server::start(VERSION)?);
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    let _operator = Operator::start(plane, "copied-again", "a")?;
    let migration = Migration::apply(plane, "copied-again", "orders", &manual(&source, &target))?;
    migration.wait_for("the first copy", PATIENCE, |status| {
        is_well(status) && are(status, "True", &["Verified"])
    })?;

    let mut conn = source.conn()?;
    conn.run(args!["CONFIG", "SET", "rdb-key-save-delay", "20000"])?;
    conn.run(args!["DEBUG", "CHANGE-REPL-ID"])?;
    conn.run(args!["CLIENT", "KILL", "TYPE", "replica"])?;
    let status = migration.wait_for("the second copy", PATIENCE, |status| are(status, "False", &WELL))?;
    ensure!(status["phase"] == "FullSync", "{status}");
    ensure!(condition(&status, "Verified").is_none(), "{status}");
    ensure!(condition(&status, "Reconciling").as_deref() == Some("True"), "{status}");
    migration.approve()?;
    migration.wait_for("the approval to be seen", PATIENCE, |status| status["observedGeneration"] == 2)?;
    fast(&source)?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    nothing_left(&migration, &target)?;

    let seen = migration.seen()?;
    let copied =
        seen.iter().rposition(|object| object["status"]["phase"] == "FullSync").context("no copy")?;
    let after = seen.get(copied + 1..).unwrap_or_default();
    let switched = after.iter().position(|object| object["status"]["phase"] == "CuttingOver");
    let verified = after.iter().position(|object| are(&object["status"], "True", &["Verified"]));
    ensure!(verified.context("never compared")? <= switched.context("no cutover")?, "{after:#?}");
    Ok(())
}

#[test]
fn a_source_that_is_gone_for_long_is_told_and_when_it_is_back() -> Result<()> {
    let options = Options::new(VERSION).with("repl-timeout", "3").with("repl-ping-replica-period", "1");
    let (source, target) = (options.start()?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "key", "1"])?;
    let tool = Tool::run(&manual(&source, &target), &[])?;
    tool.wait_for("the copy", PATIENCE, |status| is_well(status) && are(status, "True", &["Verified"]))?;
    signal(&source, "-STOP")?;
    let gone = tool.wait_for("the loss to be told", PATIENCE, |status| are(status, "False", &["Ready"]));
    signal(&source, "-CONT")?;
    let gone = gone?;
    ensure!(are(&gone, "False", &["InSync", "CutoverReady"]), "{gone}");
    ensure!(are(&gone, "True", &["FullSynced", "Verified", "Reconciling"]), "{gone}");
    let ready = gone["conditions"].as_array().and_then(|all| all.iter().find(|one| one["type"] == "Ready"));
    ensure!(ready.is_some_and(|ready| ready["reason"] == "SourceUnreachable"), "{gone}");
    tool.wait_for("all to be well", PATIENCE, is_well)?;
    assert_eq!(source.syncs()?.0, 1);
    tool.terminate()?;
    tool.expect_exit(4, PATIENCE).map(drop)
}
