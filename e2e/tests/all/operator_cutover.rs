//! Migrations of the operator that end otherwise than by a smooth cutover: a pause that does not suffice or is broken
//! off, a deletion in the middle, a namespace that goes, data that the target lacks.

use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use e2e::compare::wait_equal;
use e2e::scenario::{PATIENCE, pause};
use e2e::tool::condition;
use e2e::{ControlPlane, Endpoint, Manifest, Migration, Operator, Options, Proxy, Server, args, wait_until};
use serde_json::{Value, json};

use crate::operator::{VERSION, nothing_left, own_keys};

/// A pause that nobody waits out.
const LONG: u64 = 300;
/// A writer that was held goes on within so long, on a busy machine, too.
const PROMPT: Duration = Duration::from_secs(15);

fn source() -> Result<Server> {
    let source = Options::new(VERSION).with("repl-backlog-size", "64mb").start()?;
    (0..5).try_for_each(|key| source.conn()?.run(args!["SET", key.to_string(), "1"]).map(drop))?;
    Ok(source)
}

fn reason(status: &Value, kind: &str) -> Option<String> {
    let conditions = status["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    found["reason"].as_str().map(str::to_owned)
}

/// Both behind proxies, so that it can be said beforehand what happens when the source's writers are paused.
struct Sides {
    source: Server,
    target: Server,
    before_source: Proxy,
    before_target: Arc<Proxy>,
}

impl Sides {
    fn start(target: Options) -> Result<Self> {
        let (source, target) = (source()?, target.start()?);
        let before_source = Proxy::start(&source.address())?;
        let before_target = Arc::new(Proxy::start(&target.address())?);
        Ok(Self { source, target, before_source, before_target })
    }

    fn manifest(&self, pause_seconds: u64) -> Manifest {
        let by = |proxy: &Proxy, server: &Server| Endpoint { address: proxy.address(), ..server.endpoint() };
        Manifest::between(&by(&self.before_source, &self.source), &by(&self.before_target, &self.target))
            .set("/spec/verification/mode", "Off")
            .set("/spec/cutover/mode", "Manual")
            .set("/spec/cutover/pauseTimeoutSeconds", pause_seconds)
    }

    /// One more command is written just before the pause begins. `Err` in it would be seen by what follows.
    fn last_before_pause(&self, seconds: u64, words: &'static [&'static [u8]], stall: bool) -> Result<()> {
        let (mut conn, target) = (self.source.conn()?, Arc::clone(&self.before_target));
        self.before_source.before(&pause(seconds), move || {
            target.stall(stall);
            drop(conn.run(words));
        });
        Ok(())
    }

    /// Nothing gets to the target from the moment that the pause begins, and it lacks one command by then.
    fn stall_at_pause(&self, seconds: u64) -> Result<()> {
        self.last_before_pause(seconds, &[b"SET", b"late", b"1"], true)
    }

    /// A write that has to wait, as writers are paused. Its result: how long it waited.
    fn held_writer(&self) -> Result<JoinHandle<Result<Duration>>> {
        wait_until("writers that are paused", PATIENCE, || {
            let mut conn = self.source.conn()?;
            let writer = std::thread::spawn(move || {
                let began = Instant::now();
                conn.run(args!["SET", "held", "1"])?;
                Ok(began.elapsed())
            });
            wait_until("a write that ends or waits", PATIENCE, || {
                let blocked = self.source.conn()?.info("clients", "blocked_clients")?;
                Ok((writer.is_finished() || blocked.is_some_and(|count| count != "0")).then_some(()))
            })?;
            Ok((!writer.is_finished()).then_some(writer))
        })
    }
}

fn held_for(writer: JoinHandle<Result<Duration>>) -> Result<Duration> {
    writer.join().map_err(|_| anyhow!("the writer panicked"))?
}

#[test]
fn a_pause_that_runs_out_is_told_and_the_next_approval_succeeds() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("pause", &[])?;
    let sides = Sides::start(Options::new(VERSION))?;
    let _operator = Operator::start(plane, "pause", "a")?;
    let migration = Migration::apply(plane, "pause", "orders", &sides.manifest(2))?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    sides.stall_at_pause(2)?;
    migration.approve()?;
    let held = held_for(sides.held_writer()?)?;
    ensure!(held < Duration::from_secs(2) + PROMPT, "a writer was held for {held:?} by a pause of 2 s");
    let status = migration.wait_for("why there was no cutover", PATIENCE, |status| {
        status["phase"] == "IncrementalSync"
            && reason(status, "CutoverReady").as_deref() == Some("PauseTimeout")
    })?;
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("did not catch up within 2 s") && message.contains("tried again in 30 s"),
        "{message}"
    );
    ensure!(condition(&status, "CutoverReady").as_deref() == Some("False"), "{status}");
    ensure!(condition(&status, "Ready").as_deref() == Some("True"), "{status}");
    ensure!(status["cutover"]["startTime"].is_null(), "{status}");
    sides.source.conn()?.run(args!["SET", "after", "1"])?;

    // The change has it tried again at once, and for the last time.
    sides.before_target.stall(false);
    sides.stall_at_pause(2)?;
    migration.patch(&json!({"spec": {"failurePolicy": {"backoffLimit": 0}}}))?;
    let status = migration.wait_phase("Failed", PATIENCE)?;
    ensure!(reason(&status, "Succeeded").as_deref() == Some("PauseTimeout"), "{status}");
    sides.source.conn()?.run(args!["SET", "afterwards", "1"])?;

    // With the approval taken back it goes on from where it stands.
    sides.before_target.stall(false);
    let withdraw = json!({"spec": {"cutover": {"approved": false}}});
    let asked = || {
        migration.wait_for("the approval being asked for", PATIENCE, |status| {
            reason(status, "CutoverReady").as_deref() == Some("AwaitingApproval")
        })
    };
    migration.patch(&withdraw)?;
    asked()?;
    // And again, before there is a pause.
    sides.before_target.stall(true);
    migration.approve()?;
    migration.wait_for("the keys' own expiries", PATIENCE, |status| {
        status["message"].as_str().is_some_and(|message| message.contains("their own expiries"))
    })?;
    migration.patch(&withdraw)?;
    asked()?;
    sides.before_target.stall(false);
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), Duration::ZERO)?;
    assert_eq!(sides.source.syncs()?, (1, 1));
    nothing_left(&migration, &sides.target)?;
    let seen = migration.seen()?;
    ensure!(seen.iter().any(|object| object["status"]["phase"] == "CuttingOver"), "the pause was not shown");
    Ok(())
}

/// It waits until its writers are said to be stopped, also when that is said while a pause is being tried.
#[test]
fn a_source_that_cannot_pause_is_waited_for() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("no-pause", &[])?;
    let sides = Sides::start(Options::new(VERSION))?;
    sides.source.conn()?.run(args!["ACL", "SETUSER", "default", "-client|pause"])?;
    let operator = Arc::new(Operator::start(plane, "no-pause", "a")?);
    let migration = Arc::new(Migration::apply(plane, "no-pause", "orders", &sides.manifest(2))?);
    migration.wait_condition("CutoverReady", PATIENCE)?;
    migration.approve()?;
    let status = migration.wait_for("why there was no cutover", PATIENCE, |status| {
        status["phase"] == "IncrementalSync"
            && reason(status, "CutoverReady").as_deref() == Some("PauseTimeout")
    })?;
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("cannot pause writes") && message.contains("pauseSourceWrites: false"),
        "{message}"
    );
    ensure!(condition(&status, "CutoverReady").as_deref() == Some("False"), "{status}");
    ensure!(status["cutover"]["startTime"].is_null(), "{status}");
    sides.source.conn()?.run(args!["SET", "after", "1"])?;

    let adopted = |operator: &Operator| operator.log().matches("the changed spec holds").count();
    let (told, said) = (Arc::clone(&operator), Arc::clone(&migration));
    sides.before_source.before(b"\r\nPAUSE\r\n", move || {
        let before = adopted(&told);
        drop(said.patch(&json!({"spec": {"cutover": {"pauseSourceWrites": false}}})));
        drop(wait_until("the change", PATIENCE, || Ok((adopted(&told) > before).then_some(()))));
    });
    migration.patch(&json!({"spec": {"cutover": {"pauseTimeoutSeconds": 3}}}))?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), Duration::ZERO)?;
    ensure!(migration.status()["cutover"]["writePauseMillis"] == 0, "{}", migration.status());
    nothing_left(&migration, &sides.target)
}

/// By another mode, by `suspend`, by the end of the replica, by a deletion.
#[test]
fn writers_go_on_when_the_cutover_is_broken_off() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("broken-off", &[])?;
    let sides = Sides::start(Options::new(VERSION))?;
    let mut first = Operator::start(plane, "broken-off", "a")?;
    let migration = Migration::apply(plane, "broken-off", "orders", &sides.manifest(LONG))?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    let released = |writer, why: &str| -> Result<()> {
        let held = held_for(writer)?;
        ensure!(held < PROMPT, "a writer was held for {held:?} after {why}");
        sides.before_target.stall(false);
        Ok(())
    };

    sides.stall_at_pause(LONG)?;
    migration.approve()?;
    let writer = sides.held_writer()?;
    migration.wait_phase("CuttingOver", PATIENCE)?;
    migration.patch(&json!({"spec": {"cutover": {"mode": "Never"}}}))?;
    released(writer, "the cutover was withdrawn")?;
    let status = migration.wait_for("no cutover", PATIENCE, |status| {
        status["message"].as_str().is_some_and(|message| message.contains("following until stopped"))
    })?;
    ensure!(condition(&status, "CutoverReady").is_none(), "{status}");
    ensure!(status["cutover"]["startTime"].is_null(), "{status}");

    sides.stall_at_pause(LONG)?;
    migration.patch(&json!({"spec": {"cutover": {"mode": "Manual"}}}))?;
    let writer = sides.held_writer()?;
    migration.wait_phase("CuttingOver", PATIENCE)?;
    let withdraw = json!({"spec": {"cutover": {"approved": false}}});
    let refused = migration.patch(&withdraw).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(refused.contains("cannot be taken back once the cutover has started"), "{refused}");
    migration.patch(&json!({"spec": {"suspend": true}}))?;
    released(writer, "the migration was suspended")?;
    migration.wait_phase("Suspended", PATIENCE)?;
    migration.patch(&withdraw)?;
    migration.patch(&json!({"spec": {"suspend": false}}))?;
    migration.wait_for("the approval being asked for", PATIENCE, |status| {
        reason(status, "CutoverReady").as_deref() == Some("AwaitingApproval")
    })?;

    sides.stall_at_pause(LONG)?;
    migration.approve()?;
    let writer = sides.held_writer()?;
    first.signal("TERM")?;
    released(writer, "the replica ended")?;
    first.terminate(PATIENCE).map(drop).or_else(|error| first.ended()?.then_some(()).ok_or(error))?;

    sides.stall_at_pause(LONG)?;
    let _second = Operator::start(plane, "broken-off", "b")?;
    let writer = sides.held_writer()?;
    migration.wait_phase("CuttingOver", PATIENCE)?;
    plane.kubectl(&["delete", "-n", "broken-off", "redismigration/orders", "--wait=false"])?;
    released(writer, "the migration was deleted")?;
    wait_until("the deletion", PATIENCE, || Ok(migration.object()?.is_none().then_some(())))?;
    nothing_left(&migration, &sides.target)?;
    assert_eq!(sides.source.syncs()?.0, 1);
    migration.seen().map(drop)
}

/// What the target refuses at the last moment has no cutover follow, nor the writers wait.
#[test]
fn writers_go_on_when_the_target_refuses_in_the_pause() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("refused", &[])?;
    let sides = Sides::start(Options::new(VERSION).with("rename-command", "SETRANGE \"\""))?;
    let _operator = Operator::start(plane, "refused", "a")?;
    sides.last_before_pause(LONG, &[b"SETRANGE", b"late", b"3", b"x"], false)?;
    let manifest = sides.manifest(LONG).set("/spec/cutover/mode", "Automatic");
    let migration = Migration::apply(plane, "refused", "orders", &manifest)?;
    let status = migration.wait_phase("Failed", PATIENCE)?;
    ensure!(reason(&status, "Succeeded").as_deref() == Some("CommandsQuarantined"), "{status}");
    ensure!(status["cutover"]["startTime"].is_null(), "{status}");
    let began = Instant::now();
    sides.source.conn()?.run(args!["SET", "after", "1"])?;
    ensure!(began.elapsed() < PROMPT, "a writer was held for {:?}", began.elapsed());
    migration.seen().map(drop)
}

/// Its Secrets and Leases go first, and no new Lease can be made there.
#[test]
fn a_namespace_that_is_deleted_leaves_nothing_on_the_target() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("goes", &[])?;
    plane.namespace("stays", &[])?;
    let (source, target) = (source()?, Options::new(VERSION).password("of-the-target").start()?);
    let operators = [
        Operator::start_from(plane, "stays", "goes", "a")?,
        Operator::start_from(plane, "stays", "goes", "b")?,
    ];
    operators.iter().try_for_each(|operator| operator.wait_replicas(2, PATIENCE))?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(plane, "goes", "orders", &manifest)?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    ensure!(!own_keys(&target)?.is_empty(), "there is nothing to remove");
    let left = |kind: &str| -> Result<usize> {
        let list = plane.api().get(kind)?.expect(&[200])?;
        Ok(list["items"].as_array().map_or(0, Vec::len))
    };
    // The order in which a namespace's objects go is not fixed.
    operators.iter().try_for_each(|operator| operator.signal("STOP"))?;
    plane.kubectl(&["delete", "namespace", "goes", "--wait=false"])?;
    wait_until("Secrets and Leases to go", PATIENCE, || {
        let leases = left("/apis/coordination.k8s.io/v1/namespaces/goes/leases")?;
        Ok((leases + left("/api/v1/namespaces/goes/secrets")? == 0).then_some(()))
    })?;
    operators.iter().try_for_each(|operator| operator.signal("CONT"))?;
    wait_until("the namespace to go", Duration::from_secs(90), || {
        Ok((plane.api().get("/api/v1/namespaces/goes")?.status == 404).then_some(()))
    })
    .with_context(|| format!("{:?}", migration.object()))?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

/// A target that does not answer does not keep the run.
#[test]
fn deleted_while_verifying() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("delete-late", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let operator = Operator::start(plane, "delete-late", "a")?;
    let ends = || operator.log().matches("the run has ended").count();
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let delete = |name: &str| {
        let object = format!("redismigration/{name}");
        plane.kubectl(&["delete", "-n", "delete-late", &object, "--wait=false"]).map(drop)
    };
    let gone = |migration: &Migration| {
        wait_until("the deletion", Duration::from_secs(20), || {
            Ok(migration.object()?.is_none().then_some(()))
        })
    };

    let verifying = Migration::apply(plane, "delete-late", "verifying", &manifest)?;
    verifying.wait_condition("CutoverReady", PATIENCE)?;
    let signal = |name: &str| -> Result<()> {
        let pid = target.pid().context("no target")?.to_string();
        let status = Command::new("kill").args([name, &pid]).status()?;
        ensure!(status.success(), "{name} did not reach the target");
        Ok(())
    };
    signal("-STOP")?;
    verifying.patch(&json!({"spec": {"verification": {"mode": "Keys"}}}))?;
    verifying.wait_phase("Verifying", PATIENCE)?;
    delete("verifying")?;
    wait_until("the end of its run", Duration::from_secs(20), || Ok((ends() == 1).then_some(())))?;
    signal("-CONT")?;
    gone(&verifying)?;
    nothing_left(&verifying, &target)?;
    verifying.seen().map(drop)
}

/// What the target lacks it still lacks when another process goes on.
#[test]
fn what_was_set_aside_blocks_the_cutover_of_the_next_process_too() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("set-aside", &[])?;
    let source = source()?;
    let target = Options::new(VERSION).with("rename-command", "SETRANGE \"\"").start()?;
    let mut first = Operator::start(plane, "set-aside", "a")?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/verification/mode", "Off");
    let migration = Migration::apply(plane, "set-aside", "orders", &manifest)?;
    migration.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["SETRANGE", "refused", "3", "x"])?;
    let before = migration.wait_for("a command set aside", PATIENCE, |status| {
        status["quarantine"]["commands"] == 1 && status["shards"][0]["setAside"]["Commands"] == 1
    })?;
    first.terminate(PATIENCE)?;
    let _second = Operator::start(plane, "set-aside", "b")?;
    let after = migration.wait_for("the other one at work", PATIENCE, |status| {
        status["shards"][0]["worker"] == "b" && condition(status, "InSync").as_deref() == Some("True")
    })?;
    assert_eq!(after["quarantine"], before["quarantine"]);
    assert_eq!(reason(&after, "Degraded").as_deref(), Some("CommandsQuarantined"));
    source.conn()?.run(args!["SETRANGE", "refused", "4", "x"])?;
    migration.wait_for("one more", PATIENCE, |status| {
        status["quarantine"]["commands"] == 2
            && status["quarantine"]["samples"].as_array().is_some_and(|samples| samples.len() == 2)
    })?;
    migration.patch(&json!({"spec": {"cutover": {"mode": "Automatic"}}}))?;
    let status = migration.wait_phase("Failed", PATIENCE)?;
    assert_eq!(reason(&status, "Succeeded").as_deref(), Some("CommandsQuarantined"));
    assert_eq!(source.syncs()?, (1, 1));
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}
