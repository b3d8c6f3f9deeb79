//! The cutover of a single run: what is compared while the source's writers wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::client::{array, bytes};
use e2e::compare::wait_equal;
use e2e::scenario::{PATIENCE, pause};
use e2e::tool::{Finished, condition};
use e2e::{Conn, Endpoint, Manifest, Options, Proxy, Server, Tool, Version, args};
use serde_json::Value;

/// A writer that was held goes on within so long, on a busy machine, too.
const PROMPT: Duration = Duration::from_secs(15);

struct Sides {
    source: Server,
    target: Server,
    before_source: Arc<Proxy>,
}

impl Sides {
    fn start() -> Result<Self> {
        let (source, target) = (Server::start(Version::REDIS_8_2)?, Server::start(Version::REDIS_8_2)?);
        for key in 0..50 {
            source.conn()?.run(args!["SET", format!("key:{key}"), "1"])?;
        }
        let before_source = Arc::new(Proxy::start(&source.address())?);
        Ok(Self { source, target, before_source })
    }

    fn manifest(&self, pause_seconds: u64) -> Manifest {
        let proxied = Endpoint { address: self.before_source.address(), ..self.source.endpoint() };
        Manifest::between(&proxied, &self.target.endpoint())
            .set("/spec/cutover/mode", "Automatic")
            .set("/spec/cutover/pauseTimeoutSeconds", pause_seconds)
    }
}

fn verified(finished: &Finished) -> Result<(String, String, Value)> {
    let status = finished.status()?;
    let conditions = status["conditions"].as_array().context("no conditions")?;
    let found = conditions.iter().find(|found| found["type"] == "Verified").context("not verified")?;
    let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("message"), status.clone()))
}

/// What the verification before could not see: the target changes just as writers are made to wait.
#[test]
fn what_differs_by_the_pause_is_no_cutover() -> Result<()> {
    let sides = Sides::start()?;
    let mut meddler = sides.target.conn()?;
    sides.before_source.before(&pause(300), move || {
        drop(meddler.run(args!["SET", "key:7", "tampered"]));
    });
    let manifest = sides.manifest(300);
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    let finished = tool.expect_exit(3, PATIENCE)?;
    let began = Instant::now();
    sides.source.conn()?.run(args!["SET", "after", "1"])?;
    ensure!(began.elapsed() < PROMPT, "a writer was held for {:?}", began.elapsed());
    let (truth, message, status) = verified(&finished)?;
    assert_eq!(truth, "False", "{status}");
    ensure!(
        message.contains("with writes paused, all keys: 50 keys compared: 0 missing, 1 different"),
        "{message}"
    );
    ensure!(status["verification"]["samples"][0]["key"] == "key:7", "{status}");
    ensure!(status["cutover"]["startTime"].is_null(), "{status}");
    ensure!(condition(&status, "Succeeded").as_deref() == Some("False"), "{status}");

    // Mended, it goes on from there; keys that expire in the pause are none that differ.
    sides.target.conn()?.run(args!["SET", "key:7", "1"])?;
    let mut writer = sides.source.conn()?;
    sides.before_source.before(&pause(300), move || {
        for millis in (1..60).map(|step| step * 20) {
            drop(writer.run(args!["SET", format!("soon:{millis}"), "1", "PX", millis.to_string()]));
        }
    });
    let finished = Tool::run_in(folder, &manifest, &[])?.expect_exit(0, PATIENCE)?;
    let (truth, message, status) = verified(&finished)?;
    assert_eq!(truth, "True", "{status}");
    ensure!(message.contains("; with writes paused, all keys: "), "{message}");
    ensure!(status["cutover"]["completionTime"].is_string(), "{status}");
    assert_eq!(sides.source.syncs()?.0, 1);
    sides.source.conn()?.run(args!["CLIENT", "UNPAUSE"])?;
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), Duration::ZERO)?;
    Ok(())
}

/// Clients have to be switched before the pause is over.
#[test]
fn a_comparison_that_takes_too_long_is_broken_off() -> Result<()> {
    let sides = Sides::start()?;
    let proxy = Arc::clone(&sides.before_source);
    sides.before_source.before(&pause(10), move || {
        let stalled = Arc::clone(&proxy);
        // The first question of the comparison.
        proxy.before(b"\r\nkeyspace\r\n", move || stalled.stall(true));
    });
    let finished = Tool::run(&sides.manifest(10), &[])?.expect_exit(0, PATIENCE)?;
    let (truth, message, status) = verified(&finished)?;
    assert_eq!(truth, "True", "{status}");
    ensure!(message.contains("with writes paused: not compared to the end within the "), "{message}");
    let paused = status["cutover"]["writePauseMillis"].as_i64().unwrap_or_default();
    ensure!((500..10_000).contains(&paused), "writers waited {paused} ms");
    Ok(())
}

/// As when its master dies, and a replica is promoted that had not got the last command.
#[test]
fn a_target_that_falls_back_after_it_had_everything_is_not_complete() -> Result<()> {
    let sides = Sides::start()?;
    let before_target = Arc::new(Proxy::start(&sides.target.address())?);
    let manifest = sides.manifest(300).set("/spec/target/redis/endpoints", vec![before_target.address()]);
    let (mut writer, mut target) = (sides.source.conn()?, sides.target.conn()?);
    let proxy = Arc::clone(&before_target);
    sides.before_source.before(&pause(300), move || {
        let before = record(&mut target);
        drop(writer.run(args!["SET", "late", "1"]));
        // Next it is asked when all is done.
        proxy.before(b":epoch\r\n", move || {
            let Ok((key, value)) = before else { return };
            drop(target.run(args!["SET", key, value]));
            drop(target.run(args!["DEL", "late"]));
        });
    });
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    let status = tool.expect_exit(1, PATIENCE)?.status()?;
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(message.contains("stands at offset") && message.contains("once more"), "{message}");
    ensure!(status["phase"] == "Failed", "{status}");
    sides.source.conn()?.run(args!["CLIENT", "UNPAUSE"])?;
    Tool::run_in(folder, &manifest, &[])?.expect_exit(0, PATIENCE)?;
    sides.source.conn()?.run(args!["CLIENT", "UNPAUSE"])?;
    assert_eq!(sides.source.syncs()?.0, 1);
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), Duration::ZERO)?;
    Ok(())
}

/// Name and value of what a single target keeps of the place that it has reached.
fn record(target: &mut Conn) -> Result<(Vec<u8>, Vec<u8>)> {
    let keys = array(&target.run(args!["KEYS", "redis-migration:*:at"])?);
    let key = bytes(keys.first().context("nothing is kept")?);
    let value = bytes(&target.run(args!["GET", &key])?);
    Ok((key, value))
}

/// However the run before ended.
#[test]
fn what_was_set_aside_blocks_the_cutover_of_the_next_run_too() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    let target = Options::new(Version::REDIS_7_0).with("rename-command", "SETRANGE \"\"").start()?;
    source.conn()?.run(args!["SET", "key", "1"])?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/verification/mode", "Off");
    // A run that is killed may be followed by one that meets the command once more.
    let lacks = |status: &Value| status["quarantine"]["commands"].as_i64() >= Some(1);
    let in_sync = |status: &Value| condition(status, "InSync").as_deref() == Some("True");

    let mut tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["SETRANGE", "refused", "3", "x"])?;
    tool.wait_for("a command set aside", PATIENCE, lacks)?;
    tool.kill()?;
    let tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
    tool.wait_for("in sync, and a command set aside", PATIENCE, |status| in_sync(status) && lacks(status))?;
    tool.terminate()?;
    tool.expect_exit(4, PATIENCE)?;

    let manifest = manifest.set("/spec/cutover/mode", "Automatic");
    let finished = Tool::run_in(folder, &manifest, &[])?.expect_exit(1, PATIENCE)?;
    let status = finished.status()?;
    ensure!(lacks(&status), "{status}");
    ensure!(status["message"].as_str().is_some_and(|said| said.contains("no cutover")), "{status}");
    assert_eq!(source.syncs()?, (1, 2));
    Ok(())
}

/// What is written while nobody is held would be lost.
#[test]
fn a_source_that_cannot_pause_is_not_cut_over_unless_its_writers_are_said_to_be_stopped() -> Result<()> {
    let source = Server::start(Version::REDIS_5_0)?;
    let target = Server::start(Version::REDIS_7_0)?;
    source.conn()?.run(args!["SET", "a", "1"])?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Automatic");
    let finished = Tool::run(&manifest, &[])?.expect_exit(1, PATIENCE)?;
    let status = finished.status()?;
    let said = status["message"].as_str().unwrap_or_default();
    ensure!(said.contains("cannot pause writes") && said.contains("pauseSourceWrites: false"), "{status}");
    ensure!(status["cutover"]["completionTime"].is_null(), "{status}");
    let manifest =
        manifest.set("/spec/cutover/pauseSourceWrites", false).set("/spec/target/existingKeys", "Replace");
    let finished = Tool::run(&manifest, &[])?.expect_exit(0, PATIENCE)?;
    let status = finished.status()?;
    ensure!(status["cutover"]["completionTime"].is_string(), "{status}");
    ensure!(status["cutover"]["writePauseMillis"].as_i64().unwrap_or_default() == 0, "{status}");
    Ok(())
}
