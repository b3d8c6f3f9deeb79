//! The operator against a real API server: what users apply, wait for, change and delete.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::PATIENCE;
use e2e::{Cluster, ControlPlane, Manifest, Migration, Operator, Options, Server, Version, args, wait_until};
use serde_json::json;

pub const VERSION: Version = Version::REDIS_7_0;

fn source() -> Result<Server> {
    let source = Options::new(VERSION).with("repl-backlog-size", "64mb").start()?;
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    Ok(source)
}

/// Slow enough to be caught in the middle.
fn slow(source: &Server) -> Result<()> {
    source.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "20000"]).map(drop)
}

pub fn fast(source: &Server) -> Result<()> {
    source.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "0"]).map(drop)
}

pub fn manual(source: &Server, target: &Server) -> Manifest {
    Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Manual")
}

/// Keys of the tool's own.
pub fn own_keys(server: &Server) -> Result<Vec<String>> {
    let answer = server.conn()?.run(args!["KEYS", "redis-migration:*"])?;
    Ok(redis_strings(answer))
}

fn redis_strings(value: redis::Value) -> Vec<String> {
    redis::from_redis_value(value).unwrap_or_default()
}

/// Nothing is left of a migration that is over: no finalizer, no Lease, no key in the target.
pub fn nothing_left(migration: &Migration, target: &Server) -> Result<()> {
    wait_until("what is left to go", PATIENCE, || {
        let object = migration.object()?;
        let finalizers = object.map(|object| object["metadata"]["finalizers"].clone()).unwrap_or_default();
        ensure!(finalizers.is_null() || finalizers == json!([]), "finalizers {finalizers}");
        ensure!(migration.leases_left()? == 0, "a Lease");
        let keys = own_keys(target)?;
        ensure!(keys.is_empty(), "keys {keys:?}");
        Ok(Some(()))
    })
}

#[test]
fn apply_wait_approve_finish() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("finish", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let operator = Operator::start(plane, "finish", "a")?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let migration = Migration::apply(plane, "finish", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    assert!(migration.object()?.context("gone")?["metadata"]["finalizers"].is_array());
    assert_eq!(migration.holder()?.as_deref(), Some("a"));
    let worker = |status: &serde_json::Value| status["shards"][0]["worker"] == "a";
    migration.wait_for("the worker's name", PATIENCE, worker)?;
    writer.wait_more(1_000, PATIENCE)?;
    writer.stop()?;
    migration.approve()?;
    migration.wait_condition("Finished", PATIENCE)?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    nothing_left(&migration, &target)?;
    let events = migration.events()?;
    for reason in ["FullSync", "InSync", "CutoverReady", "Completed"] {
        assert!(events.iter().any(|event| event == reason), "{reason} not in {events:?}");
    }
    // Changed afterwards: it stays as it is, and says that it saw the change.
    migration.patch(&json!({"spec": {"limits": {"pipelineCommands": 7}}}))?;
    let observed = migration.wait_for("the change", PATIENCE, |status| status["observedGeneration"] == 3)?;
    assert_eq!(observed["phase"], "Completed");
    assert!(migration.lease()?.is_none());
    let (healthy, _) = operator.get("/healthz")?;
    let (ready, _) = operator.get("/readyz")?;
    assert!(healthy && ready);
    migration.seen().map(drop)
}

#[test]
fn wrong_specs_are_stalled_at_once() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("wrong", &[])?;
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let _operator = Operator::start(plane, "wrong", "a")?;
    let good = manual(&source, &target);
    let wrong = [
        (
            "switch",
            good.clone()
                .set("/spec/cutover/switch/service/name", "redis")
                .set("/spec/cutover/switch/service/to/externalName", "new"),
            "spec.cutover.switch",
        ),
        ("url", good.clone().set("/spec/source/redis/endpoints", json!(["redis://h:1"])), "endpoints[0]"),
        ("size", good.clone().set("/spec/limits/pipelineBytes", "1"), "spec.limits.pipelineBytes"),
        ("script", good.clone().set("/spec/filter/lua/inline", "functio"), "filter.lua:1"),
    ];
    for (name, manifest, path) in wrong {
        let migration = Migration::apply(plane, "wrong", name, &manifest)?;
        migration.wait_condition("Stalled", PATIENCE)?;
        let status = migration.status();
        let conditions = status["conditions"].as_array().context("no conditions")?;
        assert!(conditions.iter().all(|condition| condition["reason"] == "InvalidSpec"), "{status}");
        assert!(status["message"].as_str().unwrap_or_default().contains(path), "{status}");
        wait_until("the Lease to go", PATIENCE, || Ok(migration.lease()?.is_none().then_some(())))?;
        assert_eq!(
            migration.seen()?.iter().filter(|object| object["status"]["phase"] == "Failed").count(),
            0
        );
        migration.delete(PATIENCE)?;
    }
    // Put right, it runs.
    let size = good.clone().set("/spec/limits/pipelineBytes", "1");
    let migration = Migration::apply(plane, "wrong", "mended", &size)?;
    migration.wait_condition("Stalled", PATIENCE)?;
    migration.set(&good)?;
    migration.wait_condition("InSync", PATIENCE)?;
    // Made wrong while it runs, it says so and goes on.
    migration.set(&size)?;
    migration.wait_condition("Stalled", PATIENCE)?;
    source.conn()?.run(args!["SET", "after", "1"])?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    migration.set(&good)?;
    migration.wait_condition("Ready", PATIENCE)?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

#[test]
fn suspend_and_resume() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("suspend", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let _operator = Operator::start(plane, "suspend", "a")?;
    let migration = Migration::apply(plane, "suspend", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    migration.patch(&json!({"spec": {"suspend": true}}))?;
    let status = migration.wait_phase("Suspended", PATIENCE)?;
    let message = status["message"].as_str().unwrap_or_default();
    assert!(message.contains("without a full sync"), "{message}");
    wait_until("the Lease to go", PATIENCE, || Ok(migration.lease()?.is_none().then_some(())))?;
    source.conn()?.run(args!["SET", "while-suspended", "1"])?;
    migration.patch(&json!({"spec": {"suspend": false}}))?;
    migration.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    // Deleted while it is suspended: the keys in the target go, too.
    migration.patch(&json!({"spec": {"suspend": true}}))?;
    migration.wait_phase("Suspended", PATIENCE)?;
    assert!(!own_keys(&target)?.is_empty());
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

#[test]
fn deleted_in_full_sync() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("delete-full", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    slow(&source)?;
    let _operator = Operator::start(plane, "delete-full", "a")?;
    let migration = Migration::apply(plane, "delete-full", "orders", &manual(&source, &target))?;
    wait_until("the first keys", PATIENCE, || Ok((own_keys(&target)?.len() > 1).then_some(())))?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    fast(&source)
}

#[test]
fn deleted_in_sync_and_deleted_before_it_can_start() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("delete-sync", &[])?;
    let (source, target) = (source()?, Cluster::start(VERSION, 3, 0)?);
    let _operator = Operator::start(plane, "delete-sync", "a")?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let migration = Migration::apply(plane, "delete-sync", "orders", &manifest)?;
    migration.wait_condition("InSync", PATIENCE)?;
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    migration.delete(PATIENCE)?;
    wait_until("the Lease to go", PATIENCE, || Ok(migration.lease()?.is_none().then_some(())))?;
    for server in &target.nodes {
        assert_eq!(own_keys(server)?, [""; 0]);
    }
    migration.seen()?;

    // Nobody listens there.
    let (gone, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let manifest = manual(&gone, &target);
    drop(gone);
    let migration = Migration::apply(plane, "delete-sync", "away", &manifest)?;
    migration.wait_for("why it waits", PATIENCE, |status| {
        status["conditions"][0]["reason"] == "SourceUnreachable" && status["phase"] == "Pending"
    })?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

#[test]
fn a_missing_secret_is_waited_for_and_a_rotated_one_is_read_again() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("secrets", &[])?;
    let source = Options::new(VERSION).with("repl-backlog-size", "64mb").password("first").start()?;
    let target = Server::start(VERSION)?;
    source.conn()?.run(args!["SET", "a", "1"])?;
    let _operator = Operator::start(plane, "secrets", "a")?;
    let whole = manual(&source, &target);
    let mut without = whole.clone();
    without.secrets.clear();
    let migration = Migration::apply(plane, "secrets", "orders", &without)?;
    migration.wait_for("the missing secret", PATIENCE, |status| {
        status["conditions"][0]["reason"] == "SecretNotFound"
    })?;
    migration.set(&whole)?;
    migration.wait_condition("InSync", PATIENCE)?;
    // Both passwords hold for a while, as is usual; then connections are lost, and the old one with them.
    let mut conn = source.conn()?;
    conn.run(args!["ACL", "SETUSER", "default", ">second"])?;
    let rotated = json!({"stringData": {"password": "second"}});
    plane.api().merge("/api/v1/namespaces/secrets/secrets/source-login", &rotated)?.expect(&[200])?;
    conn.run(args!["ACL", "SETUSER", "default", "<first"])?;
    conn.run(args!["CLIENT", "KILL", "TYPE", "replica"])?;
    conn.run(args!["SET", "b", "2"])?;
    wait_until("the key behind the rotation", PATIENCE, || {
        let found = target.conn()?.run(args!["EXISTS", "b"])?;
        Ok((found == redis::Value::Int(1)).then_some(()))
    })?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

#[test]
fn a_script_is_read_from_a_config_map_once_it_is_there() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("scripts", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "before", "1"])?;
    let _operator = Operator::start(plane, "scripts", "a")?;
    let manifest = manual(&source, &target)
        .set("/spec/filter/lua/configMapRef", json!({"name": "scripts", "key": "prefix.lua"}));
    let migration = Migration::apply(plane, "scripts", "orders", &manifest)?;
    migration.wait_for("what is missing", PATIENCE, |status| {
        status["message"].as_str().is_some_and(|message| message.contains("spec.filter.lua.configMapRef"))
    })?;
    let script = "function key(k) return {key = 'n:' .. k.key} end
                  function command(c) for _, i in ipairs(c.keys) do c.args[i] = 'n:' .. c.args[i] end return c end";
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "scripts"}, "data": {"prefix.lua": script}
    });
    plane.api().post("/api/v1/namespaces/scripts/configmaps", &map)?.expect(&[201])?;
    migration.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["SET", "behind", "1"])?;
    wait_until("both keys under their new names", PATIENCE, || {
        let found = target.conn()?.number(args!["EXISTS", "n:before", "n:behind"])?;
        Ok((found == 2).then_some(()))
    })?;
    // Another script from here on would leave a mixture.
    let path = "/api/v1/namespaces/scripts/configmaps/scripts";
    let text = |script: &str| json!({"data": {"prefix.lua": script}});
    plane.api().merge(path, &text(&script.replace("'n:'", "'m:'")))?.expect(&[200])?;
    migration.approve()?;
    let refused = migration.wait_for("the refusal", PATIENCE, |status| {
        status["observedGeneration"] == 2
            && e2e::tool::condition(status, "Stalled").as_deref() == Some("True")
    })?;
    ensure!(refused.to_string().contains("spec.filter.lua changed after copying had begun"), "{refused}");
    plane.api().merge(path, &text(script))?.expect(&[200])?;
    migration.patch(&json!({"spec": {"limits": {"pipelineCommands": 7}}}))?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

/// Approval aside, which another test gives.
#[test]
fn what_may_change_while_running_does() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("change", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let _operator = Operator::start(plane, "change", "a")?;
    let migration = Migration::apply(plane, "change", "orders", &manual(&source, &target))?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    let waits = |mode: &'static str, generation: i64| {
        move |status: &serde_json::Value| {
            status["verification"]["mode"] == mode
                && status["observedGeneration"] == generation
                && status["message"] == "in sync; waiting for spec.cutover.approved"
        }
    };
    let first = migration.wait_for("the approval being waited for", PATIENCE, waits("Full", 1))?;
    // The other verification finds what the first one could not.
    target.conn()?.run(args!["SET", "only-here", "1"])?;
    let verification = json!({"mode": "Keys", "maxDifferences": 1});
    migration.patch(&json!({"spec": {"verification": verification, "limits": {"pipelineCommands": 10}}}))?;
    let second = migration.wait_for("another verification", PATIENCE, |status| {
        waits("Keys", 2)(status) && status["verification"]["differences"] == 1
    })?;
    target.conn()?.run(args!["DEL", "only-here"])?;
    assert_eq!(first["startTime"], second["startTime"]);
    assert_eq!(source.syncs()?, (1, 0));
    // This takes another run, which goes on where the first one stopped.
    migration.patch(&json!({"spec": {"limits": {"spoolMemory": "32Mi"}}}))?;
    let third = migration.wait_for("the other run", PATIENCE, waits("Keys", 3))?;
    assert_eq!(first["startTime"], third["startTime"]);
    assert_eq!(source.syncs()?, (1, 1));
    source.conn()?.run(args!["SET", "after", "1"])?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

pub fn two_replicas(namespace: &str) -> Result<(&'static ControlPlane, Vec<Operator>)> {
    let plane = ControlPlane::shared()?;
    plane.namespace(namespace, &[])?;
    let operators = ["a", "b"].map(|identity| Operator::start(plane, namespace, identity));
    let operators: Result<Vec<Operator>> = operators.into_iter().collect();
    Ok((plane, operators?))
}

pub fn holder<'o>(
    migration: &Migration,
    operators: &'o mut [Operator],
) -> Result<(&'o mut Operator, String)> {
    let holder = migration.holder()?.context("nobody holds it")?;
    let other = operators.iter().find(|operator| operator.identity != holder).context("no other")?;
    let other = other.identity.clone();
    let found = operators.iter_mut().find(|operator| operator.identity == holder);
    Ok((found.context("an unknown holder")?, other))
}

#[test]
fn a_killed_replica_is_replaced_with_a_partial_resync() -> Result<()> {
    let (plane, mut operators) = two_replicas("killed")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let migration = Migration::apply(plane, "killed", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    let (killed, other) = holder(&migration, &mut operators)?;
    killed.kill();
    let began = Instant::now();
    migration.wait_holder(&other, PATIENCE)?;
    wait_until("the resumption", PATIENCE, || Ok((source.syncs()?.1 >= 1).then_some(())))?;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "taken over after {took:?}");
    println!("taken over after {took:?}");
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    migration.wait_for("the other worker in sync", PATIENCE, |status| {
        status["shards"][0]["worker"] == other.as_str()
            && e2e::tool::condition(status, "InSync").as_deref() == Some("True")
    })?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

/// As after a replica that completed it and was killed before it could say so: clients write to the target by then.
#[test]
fn what_may_be_completed_is_not_copied_again() -> Result<()> {
    let (plane, mut operators) = two_replicas("untold")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "of", "the source"])?;
    let manifest = manual(&source, &target).set("/spec/target/existingKeys", "Replace");
    let migration = Migration::apply(plane, "untold", "orders", &manifest)?;
    migration.wait_condition("InSync", PATIENCE)?;
    let (killed, other) = holder(&migration, &mut operators)?;
    killed.kill();
    own_keys(&target)?.iter().try_for_each(|key| target.conn()?.run(args!["DEL", key]).map(drop))?;
    target.conn()?.run(args!["SET", "of", "a client"])?;
    migration.wait_holder(&other, PATIENCE)?;
    migration.wait_for("a word about it", PATIENCE, |status| {
        status["message"].as_str().is_some_and(|message| message.contains("may have completed it"))
    })?;
    assert_eq!(target.conn()?.text(args!["GET", "of"])?, "a client");
    assert_eq!(source.syncs()?, (1, 0));
    migration.delete(PATIENCE)
}

#[test]
fn a_replica_killed_in_the_full_sync_is_replaced() -> Result<()> {
    let (plane, mut operators) = two_replicas("killed-full")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    slow(&source)?;
    let migration = Migration::apply(plane, "killed-full", "orders", &manual(&source, &target))?;
    wait_until("the first keys", PATIENCE, || Ok((own_keys(&target)?.len() > 1).then_some(())))?;
    let (killed, other) = holder(&migration, &mut operators)?;
    killed.kill();
    fast(&source)?;
    migration.wait_holder(&other, Duration::from_secs(20))?;
    migration.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

#[test]
fn a_replica_that_ends_hands_over_soon() -> Result<()> {
    let (plane, mut operators) = two_replicas("handed")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let migration = Migration::apply(plane, "handed", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    let (leaving, other) = holder(&migration, &mut operators)?;
    let began = Instant::now();
    leaving.terminate(PATIENCE)?;
    wait_until("the resumption", PATIENCE, || Ok((source.syncs()?.1 >= 1).then_some(())))?;
    println!("handed over within {:?}", began.elapsed());
    assert_eq!(migration.holder()?.as_deref(), Some(other.as_str()));
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    migration.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    migration.seen().map(drop)
}

/// Nothing in the target tells where to go on: another replica copies again, over the keys that are its own.
#[test]
fn at_least_once_is_copied_again_by_another_replica() -> Result<()> {
    let (plane, mut operators) = two_replicas("at-least")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = manual(&source, &target).set("/spec/delivery", "AtLeastOnce");
    let migration = Migration::apply(plane, "at-least", "orders", &manifest)?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    assert_eq!(own_keys(&target)?, [""; 0]);
    migration.wait_for("its shards", PATIENCE, |status| status["shards"][0]["phase"] == "IncrementalSync")?;
    let (killed, other) = holder(&migration, &mut operators)?;
    killed.kill();
    source.conn()?.run(args!["SET", "meanwhile", "1"])?;
    migration.wait_for("the other worker in sync", PATIENCE, |status| {
        status["shards"][0]["worker"] == other.as_str()
            && e2e::tool::condition(status, "Verified").as_deref() == Some("True")
    })?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}

/// The keys in the target cannot be removed: the object goes nevertheless, and an event tells.
#[test]
fn a_deletion_does_not_wait_for_a_target_that_is_gone() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("target-gone", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let _operator = Operator::start(plane, "target-gone", "a")?;
    let migration = Migration::apply(plane, "target-gone", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    drop(target);
    migration.delete(Duration::from_secs(50))?;
    wait_until("the Lease to go", PATIENCE, || Ok(migration.lease()?.is_none().then_some(())))?;
    let events = migration.events()?;
    assert!(events.iter().any(|event| event == "CleanUpFailed"), "{events:?}");
    migration.seen().map(drop)
}

#[test]
fn a_failed_migration_can_go_on_and_leaves_nothing_when_deleted() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("failed", &[])?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    slow(&source)?;
    let operator = Operator::start(plane, "failed", "a")?;
    let shown = |is_there: bool| {
        wait_until("what /metrics shows", PATIENCE, || {
            let metrics = operator.get("/metrics")?.1;
            let of = "{namespace=\"failed\",migration=\"orders\"";
            let phase = format!("redis_migration_phase{of},phase=\"Failed\"}} 1\n");
            let stalled = format!("redis_migration_stalled{of}}} 1\n");
            let all = [metrics.contains(&phase), metrics.contains(&stalled), metrics.contains(of)];
            Ok((all == [is_there; 3]).then_some(()))
        })
    };
    let migration = Migration::apply(plane, "failed", "orders", &manual(&source, &target))?;
    wait_until("the first keys", PATIENCE, || Ok((own_keys(&target)?.len() > 1).then_some(())))?;
    target.conn()?.run(args!["SET", "only-here", "1"])?;
    fast(&source)?;
    migration.wait_condition("Finished", PATIENCE)?;
    let status = migration.wait_phase("Failed", PATIENCE)?;
    assert!(status["message"].as_str().unwrap_or_default().contains("differ"), "{status}");
    wait_until("the Lease to go", PATIENCE, || Ok(migration.lease()?.is_none().then_some(())))?;
    assert!(!own_keys(&target)?.is_empty());
    // Alerts have something to see as long as it is there.
    shown(true)?;
    // What was wrong is accepted: it goes on from where it stands.
    migration.patch(&json!({"spec": {"verification": {"maxDifferences": 1}}}))?;
    migration.wait_condition("CutoverReady", PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    migration.patch(&json!({"spec": {"verification": {"maxDifferences": 0}}}))?;
    migration.wait_phase("Failed", PATIENCE)?;
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &target)?;
    shown(false)?;

    // Failed before anything was written: nothing is to be kept either.
    let migration = Migration::apply(plane, "failed", "full", &manual(&source, &target))?;
    migration.wait_condition("Finished", PATIENCE)?;
    nothing_left(&migration, &target)?;
    let conditions = migration.status()["conditions"].clone();
    assert!(conditions.to_string().contains("TargetNotEmpty"), "{conditions}");
    migration.seen().map(drop)
}

/// Somebody gives the Lease to the other replica: the first one stops writing, the other goes on.
#[test]
fn a_lease_that_is_taken_away_is_obeyed() -> Result<()> {
    let (plane, mut operators) = two_replicas("taken")?;
    let (source, target) = (source()?, Server::start(VERSION)?);
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let migration = Migration::apply(plane, "taken", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    let (_, other) = holder(&migration, &mut operators)?;
    let lease = migration.lease()?.context("no Lease")?;
    let name = lease["metadata"]["name"].as_str().context("no name")?;
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/taken/leases/{name}");
    plane.api().merge(&path, &json!({"spec": {"holderIdentity": other}}))?.expect(&[200])?;
    migration.wait_for("the other worker in sync", PATIENCE, |status| {
        status["shards"][0]["worker"] == other.as_str()
            && e2e::tool::condition(status, "InSync").as_deref() == Some("True")
    })?;
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    // And one that is deleted is made anew, without the migration noticing.
    plane.api().delete(&path)?.expect(&[200])?;
    migration.wait_holder(&other, PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    migration.seen().map(drop)
}

/// Installed twice, the two look after the same namespace and know nothing of each other's replicas.
#[test]
fn what_another_installation_works_on_is_left_alone() -> Result<()> {
    let plane = ControlPlane::shared()?;
    for namespace in ["twice", "twice-home-a", "twice-home-b"] {
        plane.namespace(namespace, &[])?;
    }
    let (source, target) = (source()?, Server::start(VERSION)?);
    let mut first = Operator::start_from(plane, "twice-home-a", "twice", "a")?;
    let migration = Migration::apply(plane, "twice", "orders", &manual(&source, &target))?;
    migration.wait_condition("InSync", PATIENCE)?;
    let _second = Operator::start_from(plane, "twice-home-b", "twice", "b")?;
    wait_until("what the second one says", PATIENCE, || {
        Ok(migration.events()?.contains(&"HeldElsewhere".to_owned()).then_some(()))
    })?;
    // Longer than a replica has to be silent to be taken for gone.
    let since = Instant::now();
    wait_until("twenty seconds without a change", PATIENCE, || {
        ensure!(migration.holder()?.as_deref() == Some("a"), "{:?}", migration.holder()?);
        Ok((since.elapsed() > Duration::from_secs(20)).then_some(()))
    })?;
    ensure!(
        migration.lease()?.is_some_and(|lease| lease["spec"]["leaseTransitions"] == 0),
        "it changed hands"
    );
    assert_eq!(source.syncs()?, (1, 0));
    // Given up in good order, it is anybody's.
    first.terminate(PATIENCE)?;
    migration.wait_holder("b", PATIENCE)?;
    migration.wait_for("the other worker in sync", PATIENCE, |status| {
        status["shards"][0]["worker"] == "b"
            && e2e::tool::condition(status, "InSync").as_deref() == Some("True")
    })?;
    assert_eq!(source.syncs()?, (1, 1));
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    nothing_left(&migration, &target)?;
    migration.seen().map(drop)
}
