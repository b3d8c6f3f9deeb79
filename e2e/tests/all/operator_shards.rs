//! Replicas of the operator that share the shards of one migration.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::chaos::{Shards, SlotMove};
use e2e::client::slot;
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::PATIENCE;
use e2e::tool::condition;
use e2e::{Cluster, ControlPlane, Manifest, Migration, Operator, Options, Proxy, Server, args, wait_until};
use serde_json::{Value, json};

use crate::operator::{VERSION, fast, holder, nothing_left, two_replicas};

/// Three shards with some data.
fn source() -> Result<Cluster> {
    let options = Options::new(VERSION).with("repl-backlog-size", "64mb");
    let source = Cluster::start_with(options, 3, 0)?;
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    Ok(source)
}

/// What each shard's master counted, by the shard's id: full and partial resynchronizations.
fn counted(source: &Cluster, shards: &BTreeMap<String, String>) -> Result<BTreeMap<String, (i64, i64)>> {
    let of = |id: &str| {
        let named = |server: &&Server| id.ends_with(&format!(":{}", server.port));
        source.nodes.iter().find(named).with_context(|| format!("no server {id}"))?.syncs()
    };
    shards.keys().map(|id| Ok((id.clone(), of(id)?))).collect()
}

fn all_in_sync(status: &Value) -> bool {
    status["replication"]["shardsInSync"] == "3/3" && condition(status, "InSync").as_deref() == Some("True")
}

/// Each source master is a shard, and the replicas share them. One replica is killed in the full sync, the
/// coordinator later: the other's shards go on all the while.
#[test]
fn cluster_to_cluster_survives_its_replicas() -> Result<()> {
    let (plane, mut operators) = two_replicas("clusters")?;
    for operator in &operators {
        operator.wait_replicas(2, PATIENCE)?;
    }
    let (source, target) = (source()?, Cluster::start(VERSION, 3, 0)?);
    // 46 keys each: longer than it takes to find that a replica is gone.
    for server in &source.nodes {
        server.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "350000"])?;
    }
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(plane, "clusters", "orders", &manifest)?;
    let status = migration.wait_for("both replicas in the full sync", PATIENCE, |status| {
        let phases = status["shards"].as_array().cloned().unwrap_or_default();
        let workers: BTreeSet<String> = Migration::workers(status).into_values().collect();
        workers == BTreeSet::from(["a".to_owned(), "b".to_owned()])
            && phases.iter().all(|shard| shard["phase"] == "FullSync")
    })?;
    let first = Migration::workers(&status);
    let (coordinator, worker) = {
        let (coordinator, other) = holder(&migration, &mut operators)?;
        (coordinator.identity.clone(), other)
    };
    let kill = |operators: &mut Vec<Operator>, identity: &str| -> Result<()> {
        let at =
            operators.iter().position(|operator| operator.identity == identity).context("no such replica")?;
        operators.swap_remove(at).kill();
        Ok(())
    };
    // It is known before it is needed; nothing moves to it in the full sync.
    operators.push(Operator::start(plane, "clusters", "c")?);
    operators.iter().try_for_each(|operator| operator.wait_replicas(3, PATIENCE))?;
    kill(&mut operators, &worker)?;
    source.nodes.iter().try_for_each(fast)?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    // What the killed one had goes to the new one, the rest stays.
    let second: BTreeMap<String, String> =
        first.iter().map(|(id, at)| (id.clone(), if *at == worker { "c" } else { at }.to_owned())).collect();
    migration.wait_for("the new worker in sync", PATIENCE, |status| {
        Migration::workers(status) == second && all_in_sync(status)
    })?;
    writer.wait_more(500, PATIENCE)?;
    let before = counted(&source, &second)?;
    for (id, (full, partial)) in &before {
        let expected = if first[id] == worker { 2 } else { 1 };
        assert_eq!((*full, *partial), (expected, 0), "{id} of {first:?}");
    }

    let began = Instant::now();
    kill(&mut operators, &coordinator)?;
    migration.wait_holder("c", PATIENCE)?;
    wait_until("the resumption", PATIENCE, || {
        let resumed = |(id, (_, partial)): (&String, &(i64, i64))| second[id] == "c" || *partial == 1;
        Ok(counted(&source, &second)?.iter().all(resumed).then_some(()))
    })?;
    let took = began.elapsed();
    println!("taken over after {took:?}");
    assert!(took < Duration::from_secs(20), "taken over after {took:?}");
    migration.wait_for("all in sync with the one that is left", PATIENCE, |status| {
        Migration::workers(status).values().all(|at| at == "c")
            && all_in_sync(status)
            && condition(status, "CutoverReady").as_deref() == Some("True")
    })?;
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    // No full sync again, and what the new coordinator worked on already did not even stop.
    for (id, after) in counted(&source, &second)? {
        let (full, partial) = before[&id];
        let expected = (full, if second[&id] == "c" { partial } else { partial + 1 });
        assert_eq!(after, expected, "{id} of {second:?}");
    }
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    for server in &target.nodes {
        nothing_left(&migration, server)?;
    }
    migration.seen().map(drop)
}

/// A slot goes from one shard to another while different replicas work on them.
fn move_a_slot(source: &Shards, from: &str) -> Result<()> {
    let masters = source.masters()?;
    let tags = (0..1000).map(|tag: u32| tag.to_string());
    let served = |tag: &String| {
        masters
            .iter()
            .any(|master| from.ends_with(&format!(":{}", master.port)) && master.serves(slot(tag.as_bytes())))
    };
    let tag = tags.into_iter().find(served).context("no slot of that shard")?;
    let key = |number: u32| format!("{number}{{{tag}}}");
    for number in 0..100 {
        source.cluster.client()?.on(key(number).as_bytes())?.run(args!["RPUSH", key(number), "before"])?;
    }
    let moved = SlotMove::begin(source, slot(tag.as_bytes()), 0)?;
    ensure!(moved.finish(source)?, "the cluster failed over by itself");
    source.cluster.wait_ready()?;
    for number in 50..150 {
        source.cluster.client()?.on(key(number).as_bytes())?.run(args!["RPUSH", key(number), "after"])?;
    }
    Ok(())
}

#[test]
fn a_replica_that_comes_gets_a_share_and_gives_it_back_when_it_ends() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("shares", &[])?;
    let _first = Operator::start(plane, "shares", "a")?;
    let (source, target) = (Shards { cluster: source()? }, Server::start(VERSION)?);
    let endpoint = source.cluster.endpoint();
    let manifest = Manifest::between(&endpoint, &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(plane, "shares", "orders", &manifest)?;
    migration.wait_for("all in sync", PATIENCE, all_in_sync)?;
    let alone = migration.wait_for("the workers", PATIENCE, |status| {
        Migration::workers(status).values().all(|at| at == "a")
    })?;
    ensure!(migration.leases_left()? == 1, "one replica needs no Leases for shards");

    let mut second = Operator::start(plane, "shares", "b")?;
    let shared = migration.wait_for("the second one's share", PATIENCE, |status| {
        let workers: Vec<String> = Migration::workers(status).into_values().collect();
        workers.iter().filter(|at| *at == "b").count() == 1 && all_in_sync(status)
    })?;
    let workers = Migration::workers(&shared);
    let (theirs, _) = workers.iter().find(|(_, at)| *at == "b").context("nothing is with b")?;
    wait_until("Leases of the shards", PATIENCE, || Ok((migration.leases_left()? >= 2).then_some(())))?;
    for (id, counts) in counted(&source.cluster, &workers)? {
        ensure!(counts == (1, i64::from(id == *theirs)), "{id}: {counts:?} of {workers:?}");
    }
    ensure!(Migration::workers(&alone).len() == 3, "{alone}");

    move_a_slot(&source, theirs)?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    migration.wait_for("slots that are followed where they are", PATIENCE, |status| {
        condition(status, "Degraded").is_none()
            && condition(status, "CutoverReady").as_deref() == Some("True")
    })?;
    // What is changed reaches the worker of the other replica, too.
    migration.patch(&json!({"spec": {"verification": {"mode": "Keys"}}}))?;
    migration.wait_for("another verification", PATIENCE, |status| {
        status["verification"]["mode"] == "Keys"
            && condition(status, "CutoverReady").as_deref() == Some("True")
    })?;

    let began = Instant::now();
    let ending = std::thread::spawn(move || second.terminate(PATIENCE).map(drop));
    wait_until("the resumption", PATIENCE, || {
        Ok((counted(&source.cluster, &workers)?[theirs].1 == 2).then_some(()))
    })?;
    let took = began.elapsed();
    println!("a shard was handed over within {took:?}");
    // 3 s on a machine of its own.
    ensure!(took < Duration::from_secs(10), "handed over after {took:?}");
    ending.join().map_err(|_| anyhow::anyhow!("the end of b"))??;
    let writer = Writer::start(&endpoint, Load::default())?;
    migration.wait_for("all back with the first", PATIENCE, |status| {
        Migration::workers(status).values().all(|at| at == "a") && all_in_sync(status)
    })?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    for (id, counts) in counted(&source.cluster, &workers)? {
        ensure!(counts == (1, if id == *theirs { 2 } else { 0 }), "{id}: {counts:?} of {workers:?}");
    }
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

/// It does not know that it was taken for dead, and goes on with what it holds in memory: its shards and its orders.
/// Nor can the API server tell it: the target does.
#[test]
fn a_frozen_coordinator_is_shut_out_when_it_wakes() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("frozen", &[])?;
    let ways = [Proxy::start(plane.address())?, Proxy::start(plane.address())?];
    let mut operators = [
        Operator::start_through(plane, &ways[0], "frozen", "a")?,
        Operator::start_through(plane, &ways[1], "frozen", "b")?,
    ];
    operators.iter().try_for_each(|operator| operator.wait_replicas(2, PATIENCE))?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual");
    let migration = Migration::apply(plane, "frozen", "orders", &manifest)?;
    let status = migration.wait_for("both replicas at work", PATIENCE, |status| {
        let workers: BTreeSet<String> = Migration::workers(status).into_values().collect();
        workers.len() == 2 && all_in_sync(status)
    })?;
    let workers = Migration::workers(&status);
    let (frozen, other) = holder(&migration, &mut operators)?;
    let way = &ways[usize::from(frozen.identity == "b")];
    way.stall(true);
    frozen.signal("STOP")?;
    migration.wait_holder(&other, PATIENCE)?;
    let resumed = |(id, at): (&String, &String), counts: &BTreeMap<String, (i64, i64)>| {
        counts[id] == (1, i64::from(*at != other))
    };
    wait_until("the resumption", PATIENCE, || {
        let counts = counted(&source, &workers)?;
        Ok(workers.iter().all(|shard| resumed(shard, &counts)).then_some(()))
    })?;
    writer.wait_more(1_000, PATIENCE)?;
    frozen.signal("CONT")?;
    wait_until("what the target says to it", PATIENCE, || {
        let log = frozen.log();
        ensure!(log.contains("a later process has taken over this migration"), "{log}");
        Ok(Some(()))
    })?;
    way.stall(false);
    wait_until("the end of its run", PATIENCE, || {
        Ok(frozen.log().contains("the run has ended").then_some(()))
    })?;
    // None of its orders counted, and none of its writes.
    let counts = counted(&source, &workers)?;
    ensure!(workers.iter().all(|shard| resumed(shard, &counts)), "{counts:?} of {workers:?}");
    writer.wait_more(1_000, PATIENCE)?;
    writer.stop()?;
    migration.wait_for("all in sync", PATIENCE, all_in_sync)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(migration.holder()?.as_deref(), Some(other.as_str()));
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}
