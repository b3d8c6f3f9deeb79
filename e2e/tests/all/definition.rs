//! The CustomResourceDefinition in a real API server: what it admits, what it refuses and with which
//! words, what it fills in, what may change later, what `kubectl get` shows.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{ControlPlane, wait_until};
use serde_json::{Value, json};

const PATH: &str = "/apis/redis-migration.io/v1alpha1/namespaces/default/redismigrations";

fn object(name: &str) -> Value {
    json!({
        "apiVersion": "redis-migration.io/v1alpha1",
        "kind": "RedisMigration",
        "metadata": {"name": name},
        "spec": {
            "source": {"type": "Replication", "redis": {"endpoints": ["redis-old:6379"]}},
            "target": {"type": "Redis", "redis": {"endpoints": ["redis-new:6379"]}},
        }
    })
}

/// The object with a member set, or taken away by null.
fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap_or(("", pointer));
    let mut at = &mut object;
    for step in parent.split('/').skip(1) {
        at = &mut at[step];
    }
    match value {
        Value::Null => drop(at.as_object_mut().map(|members| members.remove(name))),
        value => at[name] = value,
    }
    object
}

/// What is refused with a part of this message, or admitted where there is none.
fn table() -> Vec<(&'static str, Value, &'static str)> {
    let long = "a".repeat(53);
    let endpoint = |count: usize| json!(vec!["redis:6379"; count]);
    vec![
        ("/metadata/name", json!("a".repeat(52)), ""),
        ("/metadata/name", json!(long), "metadata.name: at most 52 characters"),
        // Unions.
        ("/spec/source/type", json!("Scan"), ""),
        ("/spec/source/type", json!("RdbFile"), "redis: needed by type Replication and Scan"),
        ("/spec/source/type", json!("Snapshot"), "Unsupported value: \"Snapshot\""),
        ("/spec/source/redis", Value::Null, "redis: needed by type Replication and Scan"),
        ("/spec/source/rdbFile", json!({"uris": ["file:///a"]}), "rdbFile: needed by type RdbFile"),
        ("/spec/source", json!({"type": "RdbFile", "rdbFile": {"uris": ["file:///a"]}}), ""),
        ("/spec/source", json!({"type": "RdbFile"}), "rdbFile: needed by type RdbFile"),
        ("/spec/source", json!({"type": "RdbFile", "rdbFile": {"uris": []}}), "should have at least 1 items"),
        ("/spec/source", Value::Null, "spec.source: Required value"),
        ("/spec/target", json!({"type": "Json", "json": {"uri": "file:///a"}}), ""),
        ("/spec/target", json!({"type": "RdbFile", "rdbFile": {"uri": "file:///a"}}), ""),
        ("/spec/target", json!({"type": "Json"}), "json: needed by type Json"),
        ("/spec/target", json!({"type": "RdbFile"}), "rdbFile: needed by type RdbFile"),
        ("/spec/target/type", json!("Json"), "redis: needed by type Redis"),
        ("/spec/target/json", json!({"uri": "file:///a"}), "json: needed by type Json"),
        ("/spec/target/existingKeys", json!("Keep"), "Unsupported value: \"Keep\""),
        // Deployments.
        ("/spec/source/redis/endpoints", json!([]), "should have at least 1 items"),
        ("/spec/target/redis/endpoints", json!([]), "should have at least 1 items"),
        ("/spec/source/redis/endpoints", Value::Null, "endpoints: Required value"),
        ("/spec/source/redis/endpoints", endpoint(1000), ""),
        ("/spec/source/redis/endpoints", endpoint(1001), "must have at most 1000 items"),
        ("/spec/source/redis/endpoints", json!(["x".repeat(301)]), "may not be more than 300"),
        ("/spec/source/redis/topology", json!("Sentinel"), "sentinel: needed by topology Sentinel"),
        ("/spec/target/redis/topology", json!("Sentinel"), "sentinel: needed by topology Sentinel"),
        (
            "/spec/source/redis",
            json!({"endpoints": ["s:26379"], "topology": "Sentinel", "sentinel": {"master": "m"}}),
            "",
        ),
        ("/spec/source/redis/sentinel", json!({}), "sentinel.master: Required value"),
        ("/spec/target/redis/readFrom", json!("Master"), "unknown field"),
        ("/spec/source/redis/auth", json!({"passwordSecretRef": {"name": "n"}}), "key: Required value"),
        ("/spec/source/redis/auth", json!({"password": "in the open"}), "unknown field"),
        // Databases of a cluster.
        ("/spec/databaseMap", json!({"1": 2}), ""),
        ("/spec/target/redis", json!({"endpoints": ["c:1"], "topology": "Cluster"}), ""),
        // Filters.
        (
            "/spec/filter",
            json!({"keys": {"include": [{"prefix": "a"}], "exclude": [{"glob": "b"}, {"regex": "c"}]}}),
            "",
        ),
        (
            "/spec/filter",
            json!({"keys": {"include": [{"prefix": "a", "glob": "b"}]}}),
            "exactly one of prefix, glob and regex",
        ),
        ("/spec/filter", json!({"keys": {"exclude": [{}]}}), "exactly one of prefix, glob and regex"),
        ("/spec/filter", json!({"databases": {"include": [-1]}}), "should be greater than or equal to 0"),
        // Bounds and types.
        ("/spec/limits", json!({"pipelineCommands": 0}), "should be greater than or equal to 1"),
        ("/spec/limits", json!({"pipelineCommands": 1_000_001}), "should be less than or equal to 1000000"),
        ("/spec/limits", json!({"spoolDisk": "20Gi", "pipelineBytes": 1048576}), ""),
        ("/spec/limits", json!({"spoolDisk": "plenty"}), "spoolDisk"),
        ("/spec/limits", json!({"spoolDisc": "20Gi"}), "unknown field \"spec.limits.spoolDisc\""),
        ("/spec/verification", json!({"samplePercent": 101}), "should be less than or equal to 100"),
        ("/spec/verification", json!({"mode": "Off", "rounds": 1}), ""),
        ("/spec/verification", json!({"rounds": 0}), "should be greater than or equal to 1"),
        ("/spec/cutover", json!({"mode": "Never"}), ""),
        ("/spec/cutover", json!({"pauseTimeoutSeconds": 3601}), "should be less than or equal to 3600"),
        ("/spec/cutover", json!({"approved": "yes"}), "must be of type boolean"),
        ("/spec/failurePolicy", json!({"backoffLimit": 1001}), "should be less than or equal to 1000"),
        ("/spec/delivery", json!("AtMostOnce"), "Unsupported value: \"AtMostOnce\""),
        ("/spec/suspend", json!(true), ""),
        ("/spec/suspended", json!(true), "unknown field \"spec.suspended\""),
    ]
}

#[test]
fn every_rule_admits_and_refuses() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let path = format!("{PATH}?dryRun=All&fieldValidation=Strict");
    for (pointer, value, message) in table() {
        let said = format!("{pointer} {}", value.to_string().chars().take(80).collect::<String>());
        let answer = plane.api().post(&path, &with(object("tried"), pointer, value))?;
        if message.is_empty() {
            ensure!(answer.status == 201, "{said}: {}", answer.message());
        } else {
            ensure!((400..=422).contains(&answer.status), "{said} is admitted");
            ensure!(answer.message().contains(message), "{said}: not {message:?} but {}", answer.message());
        }
    }
    // A rule over both sides.
    let cluster = json!({"endpoints": ["c:1"], "topology": "Cluster"});
    let mapped = |target: Value, map: Value| {
        with(with(object("tried"), "/spec/target/redis", target), "/spec/databaseMap", map)
    };
    let message = "databaseMap: a cluster has database 0 only";
    let refused = plane.api().post(&path, &mapped(cluster.clone(), json!({"3": 1})))?;
    ensure!(refused.message().contains(message), "{}", refused.text);
    plane.api().post(&path, &mapped(cluster.clone(), json!({"3": 0})))?.expect(&[201])?;
    let several = with(cluster, "/clusterDatabases", json!(true));
    plane.api().post(&path, &mapped(several, json!({"3": 1})))?.expect(&[201])?;
    Ok(())
}

/// Every message of the definition is one that some row above, or a change below, brings about.
#[test]
fn every_message_is_tried() -> Result<()> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../crds/redismigrations.yaml"))?;
    let messages: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix("message: "))
        .map(|message| message.trim_matches('"'))
        .collect();
    ensure!(messages.len() > 15, "the rules were not found: {messages:?}");
    let tried: Vec<&str> = table()
        .into_iter()
        .map(|row| row.2)
        .chain(changes().into_iter().map(|row| row.2))
        .chain(changes_of_other_kinds().into_iter().map(|row| row.4))
        .collect();
    let elsewhere =
        ["databaseMap: a cluster", "spec.cutover.approved: cannot", "spec.filter, spec.databaseMap and"];
    for message in messages {
        let known = |part: &&str| !part.is_empty() && message.contains(*part);
        ensure!(tried.iter().any(known) || elsewhere.iter().any(known), "nothing tries: {message}");
    }
    Ok(())
}

#[test]
fn defaults_are_stored() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.api().post(PATH, &object("defaults"))?.expect(&[201])?;
    let stored = plane.api().get(&format!("{PATH}/defaults"))?.expect(&[200])?;
    for (pointer, expected) in [
        ("/spec/source/redis/topology", json!("Auto")),
        ("/spec/source/redis/psyncCommand", json!("PSYNC")),
        ("/spec/source/redis/readFrom", json!("Master")),
        ("/spec/source/redis/tls/enabled", json!(false)),
        ("/spec/target/existingKeys", json!("Fail")),
        ("/spec/delivery", json!("ExactlyOnce")),
        ("/spec/limits/pipelineCommands", json!(1024)),
        ("/spec/limits/spoolDisk", json!("10Gi")),
        ("/spec/verification/mode", json!("Full")),
        ("/spec/verification/rounds", json!(3)),
        ("/spec/cutover/mode", json!("Manual")),
        ("/spec/cutover/approved", json!(false)),
        ("/spec/cutover/pauseTimeoutSeconds", json!(10)),
        ("/spec/failurePolicy/progressDeadlineSeconds", json!(600)),
        ("/spec/failurePolicy/onFullResync", json!("Allow")),
        ("/spec/suspend", json!(false)),
        // Nobody has looked at it yet.
        ("/status/observedGeneration", json!(-1)),
        ("/status/phase", json!("Pending")),
    ] {
        assert_eq!(stored.pointer(pointer), Some(&expected), "{pointer}");
    }
    assert_eq!(stored["spec"]["filter"]["keys"], json!({"include": [], "exclude": []}));
    assert!(stored["spec"]["cutover"].get("switch").is_none(), "{stored}");
    Ok(())
}

/// Changes of an object that exists: a merge patch, and why it is refused.
fn changes() -> Vec<(&'static str, Value, &'static str)> {
    let source = |redis: Value| json!({"source": {"redis": redis}});
    let target = |redis: Value| json!({"target": {"redis": redis}});
    let source_fixed = "the source cannot be changed, secret references aside";
    let target_fixed = "the target cannot be changed, secret references aside";
    let tls_fixed = "tls: cannot be changed, secret references aside";
    vec![
        ("limits", json!({"limits": {"bytesPerSecond": 1000, "spoolMemory": "128Mi"}}), ""),
        ("suspension", json!({"suspend": true}), ""),
        ("resumption", json!({"suspend": false}), ""),
        ("verification", json!({"verification": {"mode": "Sample", "samplePercent": 5}}), ""),
        ("approval", json!({"cutover": {"approved": true}}), ""),
        ("approval taken back in time", json!({"cutover": {"approved": false}}), ""),
        ("a secret", source(json!({"auth": {"passwordSecretRef": {"name": "other", "key": "k"}}})), ""),
        ("no secret", source(json!({"auth": {"passwordSecretRef": null}})), ""),
        ("an authority", target(json!({"tls": {"caSecretRef": {"name": "ca", "key": "ca.crt"}}})), ""),
        ("endpoints", source(json!({"endpoints": ["other:6379"]})), source_fixed),
        ("topology", source(json!({"topology": "Cluster"})), source_fixed),
        ("readFrom", source(json!({"readFrom": "PreferReplica"})), source_fixed),
        ("endpointMap", source(json!({"endpointMap": {"a:1": "b:2"}})), source_fixed),
        ("psyncCommand", source(json!({"psyncCommand": "XSYNC"})), source_fixed),
        ("evictionData", source(json!({"evictionData": true})), source_fixed),
        ("sentinel", source(json!({"sentinel": {"master": "m"}})), source_fixed),
        ("user", source(json!({"auth": {"username": "other"}})), "auth.username: cannot be changed"),
        ("tls", source(json!({"tls": {"enabled": true}})), tls_fixed),
        ("serverName", target(json!({"tls": {"serverName": "other"}})), tls_fixed),
        ("certificates of any kind", target(json!({"tls": {"insecureSkipVerify": true}})), tls_fixed),
        ("target's endpoints", target(json!({"endpoints": ["other:6379"]})), target_fixed),
        ("target's databases", target(json!({"clusterDatabases": true})), target_fixed),
        ("target's topology", target(json!({"topology": "Cluster"})), target_fixed),
        (
            "existing keys",
            json!({"target": {"existingKeys": "Replace"}}),
            "type and existingKeys: cannot be changed",
        ),
        ("source's type", json!({"source": {"type": "Scan"}}), "type: cannot be changed"),
        (
            "target's type",
            json!({"target": {"type": "Json", "redis": null, "json": {"uri": "file:///a"}}}),
            "type and existingKeys: cannot be changed",
        ),
    ]
}

/// Name, part, what stands there, a merge patch of the spec, and why it is refused.
fn changes_of_other_kinds() -> Vec<(&'static str, &'static str, Value, Value, &'static str)> {
    vec![
        (
            "rdb-source",
            "/spec/source",
            json!({"type": "RdbFile", "rdbFile": {"uris": ["file:///a"]}}),
            json!({"source": {"rdbFile": {"uris": ["file:///b"]}}}),
            "uris: cannot be changed",
        ),
        (
            "json-target",
            "/spec/target",
            json!({"type": "Json", "json": {"uri": "file:///a"}}),
            json!({"target": {"json": {"uri": "file:///b"}}}),
            "uri: cannot be changed",
        ),
        (
            "sentinels",
            "/spec/source/redis",
            json!({"topology": "Sentinel", "endpoints": ["s:1"], "sentinel": {"master": "m"}}),
            json!({"source": {"redis": {"sentinel": {"master": "other"}}}}),
            "sentinel.master: cannot be changed",
        ),
    ]
}

#[test]
fn what_may_change_and_what_not() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.api().post(PATH, &object("changed"))?.expect(&[201])?;
    let object_path = format!("{PATH}/changed");
    for (what, spec, message) in changes() {
        let answer = plane.api().merge(&object_path, &json!({"spec": spec}))?;
        if message.is_empty() {
            ensure!(answer.status == 200, "{what}: {}", answer.message());
        } else {
            ensure!(answer.status == 422, "{what}: {}", answer.status);
            ensure!(answer.message().contains(message), "{what}: {}", answer.message());
        }
    }
    for (name, side, file, patch, message) in changes_of_other_kinds() {
        plane.api().post(PATH, &with(object(name), side, file))?.expect(&[201])?;
        let answer = plane.api().merge(&format!("{PATH}/{name}"), &json!({"spec": patch}))?;
        ensure!(answer.status == 422 && answer.message().contains(message), "{name}: {}", answer.message());
    }
    Ok(())
}

#[test]
fn what_is_copied_by_stands_once_copying_has_begun() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let path = format!("{PATH}/filtered");
    let without = |name: &str| json!({"spec": {"filter": {"commands": {"exclude": [name]}}}});
    plane.api().post(PATH, &object("filtered"))?.expect(&[201])?;
    // A filter that was wrong can be mended.
    plane.api().merge(&path, &without("PUBLISH"))?.expect(&[200])?;
    let begun = json!({"status": {"shards": [{"id": "a:1"}]}});
    plane.api().merge(&format!("{path}/status"), &begun)?.expect(&[200])?;
    let changes = [
        without("SPUBLISH"),
        json!({"spec": {"databaseMap": {"0": 1}}}),
        json!({"spec": {"delivery": "AtLeastOnce"}}),
    ];
    for change in changes {
        let refused = plane.api().merge(&path, &change)?;
        ensure!(refused.message().contains("cannot be changed once copying has begun"), "{}", refused.text);
    }
    plane.api().merge(&path, &json!({"spec": {"suspend": true}}))?.expect(&[200])?;
    Ok(())
}

#[test]
fn an_approval_stands_once_the_cutover_has_started() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let approve = |approved: bool| json!({"spec": {"cutover": {"approved": approved}}});
    let path = format!("{PATH}/approved");
    plane
        .api()
        .post(PATH, &with(object("approved"), "/spec/cutover", json!({"approved": true})))?
        .expect(&[201])?;
    let started = json!({"status": {"cutover": {"startTime": "2026-01-01T00:00:00Z"}}});
    plane.api().merge(&format!("{path}/status"), &started)?.expect(&[200])?;
    let refused = plane.api().merge(&path, &approve(false))?;
    ensure!(
        refused.message().contains("cannot be taken back once the cutover has started"),
        "{}",
        refused.text
    );
    // What does not touch it may still change, such as the status by the operator.
    plane
        .api()
        .merge(&format!("{path}/status"), &json!({"status": {"phase": "CuttingOver"}}))?
        .expect(&[200])?;
    plane.api().merge(&path, &json!({"spec": {"limits": {"keysPerSecond": 5}}}))?.expect(&[200])?;
    Ok(())
}

/// The status is a subresource: neither can be written through the other.
#[test]
fn spec_and_status_are_written_apart() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let path = format!("{PATH}/apart");
    let written = with(object("apart"), "/status", json!({"phase": "Completed"}));
    let created = plane.api().post(PATH, &written)?.expect(&[201])?;
    assert_eq!(created["status"]["phase"], "Pending", "{created}");
    plane.api().merge(&path, &json!({"status": {"phase": "Completed"}}))?.expect(&[200])?;
    let both = json!({"spec": {"suspend": true}, "status": {"phase": "FullSync"}});
    let seen = plane.api().merge(&format!("{path}/status"), &both)?.expect(&[200])?;
    assert_eq!((&seen["status"]["phase"], &seen["spec"]["suspend"]), (&json!("FullSync"), &json!(false)));
    assert_eq!(seen["metadata"]["generation"], 1, "a status makes no generation");
    let wrong = plane.api().merge(&format!("{path}/status"), &json!({"status": {"phase": "Nearly"}}))?;
    ensure!(wrong.message().contains("Unsupported value: \"Nearly\""), "{}", wrong.text);
    Ok(())
}

/// `kubectl get` by name, short name and category, with the columns that the README shows.
#[test]
fn columns_are_shown() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("columns", &[])?;
    let path = PATH.replace("default", "columns");
    plane.api().post(&path, &object("orders"))?.expect(&[201])?;
    let condition = json!({
        "type": "Ready", "status": "False", "reason": "FullSync", "message": "copying",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let status = json!({"status": {
        "phase": "FullSync", "message": "copying 2 shards", "progress": {"percent": 42},
        "replication": {"lagBytes": 1024, "shardsInSync": "1/2"}, "conditions": [condition],
    }});
    plane.api().merge(&format!("{path}/orders/status"), &status)?.expect(&[200])?;
    let columns = |arguments: &[&str]| -> Result<Vec<Vec<String>>> {
        let text = plane.kubectl(&[arguments, &["-n", "columns"]].concat())?;
        Ok(text
            .lines()
            .map(|line| {
                line.split("  ").map(str::trim).filter(|c| !c.is_empty()).map(str::to_owned).collect()
            })
            .collect())
    };
    let seen = wait_until("the columns", Duration::from_secs(20), || {
        Ok(columns(&["get", "rmig"]).ok().filter(|lines| lines.len() == 2))
    })?;
    assert_eq!(seen[0], ["NAME", "PHASE", "READY", "PROGRESS", "LAG", "SHARDS", "AGE"]);
    assert_eq!(seen[1][..6], ["orders", "FullSync", "False", "42", "1024", "1/2"]);
    let wide = columns(&["get", "redismigrations", "-o", "wide"])?;
    assert_eq!(wide[0][7..], ["SOURCE", "TARGET", "MESSAGE"]);
    assert_eq!(wide[1][7..], ["Replication", "Redis", "copying 2 shards"]);
    let all = plane.kubectl(&["get", "all", "-n", "columns"])?;
    ensure!(all.contains("redismigration.redis-migration.io/orders"), "{all}");
    Ok(())
}

/// Every field has a description, of which `kubectl explain` is made.
#[test]
fn fields_explain_themselves() -> Result<()> {
    let plane = ControlPlane::shared()?;
    let said = wait_until("kubectl explain", Duration::from_secs(20), || {
        Ok(plane.kubectl(&["explain", "redismigration.spec.limits.spoolDisk"]).ok())
    })?;
    ensure!(said.contains("beyond them the source is left unread"), "{said}");
    Ok(())
}

/// Lists of shards and conditions are maps, so that several writers own entries of their own.
#[test]
fn writers_own_their_shards() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.api().post(PATH, &object("shared"))?.expect(&[201])?;
    let entry = |id: &str, offset: i64| {
        json!({
            "apiVersion": "redis-migration.io/v1alpha1", "kind": "RedisMigration", "metadata": {"name": "shared"},
            "status": {"shards": [{"id": id, "appliedOffset": offset}]},
        })
        .to_string()
    };
    for (manager, id, offset) in [("shard-a", "a:1", 1), ("shard-b", "b:1", 2), ("shard-a", "a:1", 3)] {
        let manager = format!("--field-manager={manager}");
        let words = ["apply", "--server-side", "--subresource=status", manager.as_str(), "-f", "-"];
        plane.kubectl_with(&words, &entry(id, offset))?;
    }
    let seen = plane.api().get(&format!("{PATH}/shared"))?.expect(&[200])?;
    let shards = seen["status"]["shards"].as_array().context("shards")?;
    let offsets: Vec<_> = shards.iter().map(|shard| (&shard["id"], &shard["appliedOffset"])).collect();
    assert_eq!(offsets, [(&json!("a:1"), &json!(3)), (&json!("b:1"), &json!(2))]);
    Ok(())
}
