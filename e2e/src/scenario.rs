//! The course that most tests take: copy while a client writes, verify, compare, stop.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::client::{array, bytes};
use crate::compare::{Report, Rules, wait_equal_with};
use crate::load::{Load, Writer};
use crate::tool::Finished;
use crate::{Endpoint, Manifest, Server, Tool, wait_until};

/// Long enough for two busy cores; what takes this long is broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Copies while a client writes, until both sides are equal by the tool's own verification (that of
/// the run, and `verify` once the client has stopped) and by ours; then stops the tool.
pub fn copy_under_load(
    manifest: &Manifest,
    source: &Endpoint,
    target: &Endpoint,
    load: Load,
    rules: &Rules,
) -> Result<Report> {
    let writer = Writer::start(source, load)?;
    writer.wait_more(300, PATIENCE)?;
    let tool = Tool::run(manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE).context("the first time in sync")?;
    writer.wait_more(2_000, PATIENCE)?;
    writer.stop()?;
    let report = wait_equal_with(source, target, rules, PATIENCE)?;
    let status = tool.wait_condition("Verified", PATIENCE)?;
    ensure!(
        status["quarantine"]["commands"].as_i64().unwrap_or(0) == 0,
        "quarantined: {}",
        status["quarantine"]
    );
    verify(manifest, 0)?;
    stop(tool)?;
    Ok(report)
}

/// `redis-migration verify` ends with this code.
pub fn verify(manifest: &Manifest, code: i32) -> Result<Finished> {
    let finished = Tool::once("verify", manifest)?;
    ensure!(
        finished.code == code,
        "verify: exit code {}\n{}\n{}",
        finished.code,
        finished.stdout,
        finished.stderr
    );
    Ok(finished)
}

/// SIGTERM: ends within 10 seconds, with the checkpoint kept.
/// What the tool sends to pause the source's writers for so long, and not to ask whether it may.
pub fn pause(seconds: u64) -> Vec<u8> {
    let millis = (seconds * 1000).to_string();
    format!("\r\nPAUSE\r\n${}\r\n{millis}\r\n", millis.len()).into_bytes()
}

pub fn stop(tool: Tool) -> Result<Finished> {
    tool.terminate()?;
    tool.expect_exit(4, Duration::from_secs(11))
}

/// Runs to the end of `--until InSync`, nobody writing, and compares.
pub fn copy_at_rest(
    manifest: &Manifest,
    source: &Endpoint,
    target: &Endpoint,
    rules: &Rules,
) -> Result<Report> {
    let finished = Tool::until_in_sync(manifest)?.expect_exit(0, PATIENCE)?;
    let status = finished.status()?;
    let rules = Rules { held: false, ..rules.clone() };
    let report = wait_equal_with(source, target, &rules, Duration::ZERO);
    let report = report.with_context(|| format!("the tool found no difference; its status: {status}"))?;
    nothing_quarantined(&status)?;
    Ok(report)
}

fn nothing_quarantined(status: &Value) -> Result<()> {
    let quarantine = &status["quarantine"];
    ensure!(quarantine["commands"].as_i64().unwrap_or(0) == 0, "quarantined: {quarantine}");
    Ok(())
}

/// The place in the RDB from which another run would go on, of the records on the target's nodes the one that
/// is least far; `None`: not all nodes have one in an RDB.
pub fn noted(nodes: &[Server]) -> Result<Option<u64>> {
    let mut least = None;
    for node in nodes {
        let mut conn = node.conn()?;
        let keys = array(&conn.run(args!["KEYS", "redis-migration:*:at"])?);
        let [key] = &keys[..] else { return Ok(None) };
        let record = conn.text(args!["GET", bytes(key)])?;
        let position = record.split_once(" snapshot ").and_then(|(_, rest)| rest.split(' ').next());
        let Some(position) = position else { return Ok(None) };
        let position: u64 = position.parse()?;
        least = Some(least.map_or(position, |least: u64| least.min(position)));
    }
    Ok(least)
}

/// Waits until a run would not begin the RDB anew if it were killed.
pub fn wait_noted(nodes: &[Server], position: u64) -> Result<()> {
    wait_until("a record in the middle of the RDB", PATIENCE, || {
        Ok(noted(nodes)?.is_some_and(|noted| noted > position).then_some(()))
    })
}
