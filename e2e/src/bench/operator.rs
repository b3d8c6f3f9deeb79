//! Rows of the operator: what many idle migrations cost the API server, how soon another replica goes on, and its
//! speed beside `run`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::operator::obeys_kstatus;
use e2e::tool::condition;
use e2e::{ControlPlane, Manifest, Migration, Operator, Options, Server as Redis, Version};
use serde_json::{Value, json};

use crate::client::poll;
use crate::figures::{Row, Unit};
use crate::full_sync;
use crate::process::Busy;
use crate::server::{Server, Target};
use crate::settings::{Settings, say};
use crate::tool::{Route, Task, Tool};

pub const ROWS: [&str; 4] = [IDLE, TAKEOVER, HAND_OVER, SPEED];

const IDLE: &str = "operator-idle";
const TAKEOVER: &str = "operator-takeover";
const HAND_OVER: &str = "operator-hand-over";
const SPEED: &str = "operator-speed";

const MIGRATIONS: usize = 200;
/// How long requests are counted: progress of migrations that nobody writes to is told every 5 minutes.
const COUNTED: Duration = Duration::from_secs(120);
const LONGEST: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(10);
/// Of the processors' time.
const AT_REST: f64 = 0.1;
/// So many changes of the replica at least make a median.
const CHANGES: usize = 5;

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut rows = [
        Row::new(IDLE, "requests to the API server, 200 idle migrations", "")
            .absolute(Unit::PerSecond)
            .within(5.0, 2.0),
        Row::new(TAKEOVER, "SIGKILL of a replica, until another goes on", "")
            .absolute(Unit::Seconds)
            .within(20.0, 15.0),
        Row::new(HAND_OVER, "SIGTERM of a replica, until another goes on", "")
            .absolute(Unit::Seconds)
            .within(3.0, 1.0),
        Row::new(SPEED, "F → standalone by the operator, until FullSynced", "`run`").within(1.0 / 0.95, 1.0),
    ];
    if settings.limits_only {
        return Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect());
    }
    let [idle, takeover, hand_over, speed] = &mut rows;
    if settings.wants(IDLE) {
        record(idle, self::idle());
    }
    for (row, kills) in [(takeover, true), (hand_over, false)] {
        for change in 1..=CHANGES.max(settings.runs) {
            if settings.wants(row.id) {
                say(&format!("{}, change {change}", row.id));
                record(row, changes(kills));
            }
        }
    }
    if settings.wants(SPEED) {
        let source = full_sync::source(settings)?;
        for run in 1..=settings.runs {
            say(&format!("workload F by the operator, run {run} of {}", settings.runs));
            match speeds(&source) {
                Ok((operator, alone)) => {
                    speed.ours.push(operator);
                    speed.limit.push(alone);
                }
                Err(error) => speed.fail(&error),
            }
        }
    }
    Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect())
}

fn record(row: &mut Row, measured: Result<f64>) {
    match measured {
        Ok(value) => {
            say(&format!("{}: {value:.2}", row.id));
            row.ours.push(value);
        }
        Err(error) => row.fail(&error),
    }
}

fn plane(namespace: &str) -> Result<ControlPlane> {
    let plane = ControlPlane::start()?;
    plane.install_definition()?;
    plane.namespace(namespace, &[])?;
    Ok(plane)
}

/// Requests a second, with two replicas.
fn idle() -> Result<f64> {
    let plane = plane("idle")?;
    let source = Redis::start(Version::REDIS_7_0)?;
    let target = Options::new(Version::REDIS_7_0).with("databases", "256").start()?;
    let _operators = [Operator::start(&plane, "idle", "a")?, Operator::start(&plane, "idle", "b")?];
    let documents: Vec<String> = (0..MIGRATIONS)
        .map(|number| {
            let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
            let manifest =
                manifest.set("/metadata/name", format!("m{number}")).set("/metadata/namespace", "idle");
            let manifest = manifest.set("/spec/databaseMap", json!({"0": number + 1}));
            manifest.set("/spec/verification/mode", "Off").document.to_string()
        })
        .collect();
    plane.apply(&documents.join("\n---\n"))?;
    let list = || -> Result<Vec<Value>> {
        let path = "/apis/redis-migration.io/v1alpha1/namespaces/idle/redismigrations";
        let list = plane.api().get(path)?.expect(&[200])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    };
    poll("all in sync", Duration::from_millis(500), LONGEST, || {
        let in_sync = |object: &&Value| condition(&object["status"], "InSync").as_deref() == Some("True");
        Ok((list()?.iter().filter(in_sync).count() == MIGRATIONS).then_some(()))
    })?;
    list()?.iter().try_for_each(obeys_kstatus)?;
    // Until the garbage collector has looked the owners of the new Leases up, and statuses are written.
    let total = || Ok::<f64, anyhow::Error>(plane.requests()?.values().sum());
    let rate = |within: Duration| {
        let (before, began) = (total()?, Instant::now());
        std::thread::sleep(within);
        Ok::<f64, anyhow::Error>((total()? - before) / began.elapsed().as_secs_f64())
    };
    poll("rest", Duration::from_millis(1), LONGEST, || {
        Ok((rate(Duration::from_secs(5))? < 5.0).then_some(()))
    })?;
    rate(COUNTED)
}

/// From the end of the replica that works until the source granted another one a partial resynchronization.
fn changes(kills: bool) -> Result<f64> {
    let plane = plane("changes")?;
    let source = Options::new(Version::REDIS_7_0).with("repl-backlog-size", "64mb").start()?;
    let target = Redis::start(Version::REDIS_7_0)?;
    let mut operators = [Operator::start(&plane, "changes", "a")?, Operator::start(&plane, "changes", "b")?];
    operators.iter().try_for_each(|operator| operator.wait_replicas(2, LONGEST))?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(&plane, "changes", "orders", &manifest)?;
    migration.wait_condition("CutoverReady", LONGEST)?;
    let holder = migration.holder()?.context("nobody holds it")?;
    let working =
        operators.iter_mut().find(|operator| operator.identity == holder).context("an unknown holder")?;
    let began = Instant::now();
    if kills {
        working.kill();
    } else {
        working.signal("TERM")?;
    }
    let mut conn = source.conn()?;
    poll("the resumption", POLL, LONGEST, || {
        Ok((conn.info("stats", "sync_partial_ok")?.as_deref() == Some("1")).then_some(()))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(conn.info("stats", "sync_full")?.as_deref() == Some("1"), "a full sync again");
    Ok(seconds)
}

/// Seconds of a full sync by the operator, and by `run`.
fn speeds(source: &Server) -> Result<(f64, f64)> {
    let plane = plane("speed")?;
    let operator = Operator::start(&plane, "speed", "a")?;
    operator.address()?;
    let target = Target::standalone()?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()?);
    rest(source)?;
    let migration =
        Migration::apply(&plane, "speed", "orders", &manifest.set("/spec/verification/mode", "Off"))?;
    let began = Instant::now();
    // It watches: asking again and again would cost the API server time that the migration needs.
    migration.wait_condition("FullSynced", LONGEST)?;
    let operated = began.elapsed().as_secs_f64();
    target.must_equal(source)?;
    // What the control plane takes of the machine at rest, both have.
    migration.delete(LONGEST)?;
    drop(target);
    let target = Target::standalone()?;
    rest(source)?;
    let route = Route { source: source.endpoint(), target: target.endpoint()? };
    let mut tool = Tool::start(&Task::UntilInSync, &route)?;
    let alone = tool.condition("FullSynced", LONGEST)?.as_secs_f64();
    tool.finish(LONGEST)?;
    say(&format!("the operator {operated:.2} s, run {alone:.2} s"));
    Ok((operated, alone))
}

/// Until a control plane that was just started, and the source, have nothing to do.
fn rest(source: &Server) -> Result<()> {
    source.settle()?;
    let mut busy = Busy::default();
    poll("a machine at rest", Duration::from_secs(1), LONGEST, || {
        Ok((busy.since_last()? < AT_REST).then_some(()))
    })
}
