//! The operator when the control plane fails, and when there is much to do: each test has a control plane of
//! its own.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use e2e::client::slot;
use e2e::compare::wait_equal;
use e2e::controlplane::Part;
use e2e::load::{Load, Writer};
use e2e::scenario::PATIENCE;
use e2e::{Cluster, ControlPlane, Manifest, Migration, Operator, Options, Server, Version, args, wait_until};
use serde_json::{Value, json};

const VERSION: Version = Version::REDIS_7_0;
const AWAY: Duration = Duration::from_secs(60);

#[test]
fn data_flow_on_while_the_api_server_is_away() -> Result<()> {
    let mut plane = ControlPlane::start()?;
    plane.install_definition()?;
    plane.namespace("away", &[])?;
    let options = Options::new(VERSION).with("repl-backlog-size", "64mb");
    let (source, target) = (Cluster::start_with(options, 3, 0)?, Server::start(VERSION)?);
    let operators = [Operator::start(&plane, "away", "a")?, Operator::start(&plane, "away", "b")?];
    operators.iter().try_for_each(|operator| operator.wait_replicas(2, PATIENCE))?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(&plane, "away", "orders", &manifest)?;
    migration.wait_condition("InSync", PATIENCE)?;
    let status = migration.wait_for("both replicas at work", PATIENCE, |status| {
        let workers: BTreeSet<String> = Migration::workers(status).into_values().collect();
        workers.len() == 2 && status["replication"]["shardsInSync"] == "3/3"
    })?;
    let (holder, workers) = (migration.holder()?, Migration::workers(&status));
    migration.seen()?;
    drop(migration);
    // One in each shard.
    let probes = ["probe{b}", "probe{c}", "probe{a}"];
    let served: BTreeSet<u16> = probes.iter().map(|key| slot(key.as_bytes()) / 5461).collect();
    assert_eq!(served.len(), 3);

    plane.kill(Part::ApiServer);
    let began = Instant::now();
    let mut rounds = 0;
    while began.elapsed() < AWAY {
        rounds += 1;
        let round = rounds.to_string();
        for probe in probes {
            source.client()?.on(probe.as_bytes())?.run(args!["SET", probe, &round])?;
            wait_until("the probe on the target", Duration::from_secs(20), || {
                let found = target.conn()?.text(args!["GET", probe]).ok();
                Ok((found.as_deref() == Some(round.as_str())).then_some(()))
            })?;
        }
        writer.wait_more(100, PATIENCE)?;
    }
    plane.restart(Part::ApiServer)?;

    let applied = writer.stop()?;
    let _ = applied;
    let migration = Migration::attach(&plane, "away", "orders")?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    for server in &source.nodes {
        let offset = server.conn()?.info("replication", "master_repl_offset")?.context("no offset")?;
        let offset: i64 = offset.parse()?;
        migration.wait_for("a status that has caught up", PATIENCE, |status| {
            let shards = status["shards"].as_array().cloned().unwrap_or_default();
            let id = format!(":{}", server.port);
            let of = shards.iter().find(|shard| shard["id"].as_str().unwrap_or_default().ends_with(&id));
            // PINGs come behind it.
            of.is_some_and(|shard| shard["appliedOffset"].as_i64().unwrap_or(0) + 10_000 > offset)
        })?;
    }
    assert_eq!(Migration::workers(&migration.status()), workers);
    migration.approve()?;
    // Nobody took over what nobody had lost.
    assert_eq!(migration.holder()?, holder);
    for server in &source.nodes {
        assert_eq!(server.syncs()?, (1, 0));
    }
    migration.wait_condition("Succeeded", PATIENCE)?;
    for operator in &operators {
        assert!(operator.get("/healthz")?.0, "{}", operator.get("/healthz")?.1);
    }
    migration.seen().map(drop)
}

#[test]
fn etcd_starts_again() -> Result<()> {
    let mut plane = ControlPlane::start()?;
    plane.install_definition()?;
    plane.namespace("etcd", &[])?;
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "a", "1"])?;
    let _operator = Operator::start(&plane, "etcd", "a")?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(&plane, "etcd", "orders", &manifest)?;
    migration.wait_condition("InSync", PATIENCE)?;
    drop(migration);
    plane.kill(Part::Etcd);
    plane.restart(Part::Etcd)?;
    let migration = Migration::attach(&plane, "etcd", "orders")?;
    wait_until("the approval", PATIENCE, || migration.approve().map(Some))?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE).map(drop)
}

#[test]
fn two_hundred_at_once_and_then_idle() -> Result<()> {
    const COUNT: usize = 200;
    const PATIENCE: Duration = Duration::from_secs(300);
    let plane = ControlPlane::start()?;
    plane.install_definition()?;
    plane.namespace("many", &[])?;
    let source = Server::start(VERSION)?;
    let target = Options::new(VERSION).with("databases", "256").start()?;
    for key in 0..10 {
        source.conn()?.run(args!["SET", key.to_string(), "value"])?;
    }
    let operators = [Operator::start(&plane, "many", "a")?, Operator::start(&plane, "many", "b")?];
    let documents: Vec<String> = (0..COUNT)
        .map(|number| {
            Manifest::between(&source.endpoint(), &target.endpoint())
                .set("/metadata/name", format!("m{number}"))
                .set("/metadata/namespace", "many")
                .set("/spec/databaseMap", json!({"0": number + 1}))
                .set("/spec/target/existingKeys", "Replace")
                .set("/spec/verification/mode", "Off")
                .document
                .to_string()
        })
        .collect();
    plane.apply(&documents.join("\n---\n"))?;
    let list = || -> Result<Vec<Value>> {
        let path = "/apis/redis-migration.io/v1alpha1/namespaces/many/redismigrations";
        let list = plane.api().get(path)?.expect(&[200])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    };
    wait_until("all in sync", PATIENCE, || {
        let in_sync =
            |object: &&Value| e2e::tool::condition(&object["status"], "InSync").as_deref() == Some("True");
        let count = list()?.iter().filter(in_sync).count();
        anyhow::ensure!(count == COUNT, "{count} of {COUNT}");
        Ok(Some(()))
    })?;
    for object in list()? {
        e2e::operator::obeys_kstatus(&object)?;
    }
    let held = |operator: &Operator| -> Result<usize> {
        let metrics = operator.get("/metrics")?.1;
        let line = metrics.lines().find(|line| line.starts_with("redis_migration_operator_held_migrations"));
        Ok(line.and_then(|line| line.rsplit(' ').next()).context("no such metric")?.parse()?)
    };
    let shares = [held(&operators[0])?, held(&operators[1])?];
    println!("shares {shares:?}");
    assert!(shares.iter().all(|share| *share >= COUNT / 4), "{shares:?}");
    // What was under way is written 5 s later at the latest; then a measured while.
    let settled = Instant::now();
    wait_until("what was under way is written", PATIENCE, || {
        Ok((settled.elapsed() > Duration::from_secs(12)).then_some(()))
    })?;
    // The cluster's garbage collector looks each owner of a new Lease up once, some in a second.
    let total = || Ok::<f64, anyhow::Error>(plane.requests()?.values().sum());
    let mut last = (total()?, Instant::now());
    wait_until("rest", PATIENCE, || {
        let passed = last.1.elapsed();
        if passed < Duration::from_secs(5) {
            return Ok(None);
        }
        let now = total()?;
        let rate = (now - last.0) / passed.as_secs_f64();
        last = (now, Instant::now());
        Ok((rate < 5.0).then_some(()))
    })?;
    let (before, began) = (plane.requests()?, Instant::now());
    wait_until("a while", PATIENCE, || Ok((began.elapsed() > Duration::from_secs(30)).then_some(())))?;
    let after = plane.requests()?;
    let rate = (after.values().sum::<f64>() - before.values().sum::<f64>()) / began.elapsed().as_secs_f64();
    for (kind, count) in after {
        let more = count - before.get(&kind).copied().unwrap_or_default();
        if more > 0.0 {
            println!("{more} more of {kind}");
        }
    }
    println!("{rate:.2} requests a second with {COUNT} idle migrations");
    assert!(rate < 5.0, "{rate} requests a second");
    Ok(())
}
