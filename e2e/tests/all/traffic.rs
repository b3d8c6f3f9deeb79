//! What the source is told while and after it is copied.

use std::time::Duration;

use anyhow::Result;
use e2e::compare::{Rules, wait_equal};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, copy_under_load, stop};
use e2e::{Cluster, Manifest, Options, Server, Tool, Version, args, wait_until};

const VERSION: Version = Version::REDIS_7_0;

#[test]
fn all_families_fast_to_standalone() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let load = Load {
        rate: 20_000,
        databases: vec![0, 3, 7],
        across_databases: true,
        one_slot: false,
        ..Load::default()
    };
    let writer = Writer::start(&source.endpoint(), load)?;
    writer.wait_more(60_000, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

#[test]
fn all_families_fast_to_cluster() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 3, 0)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let writer = Writer::start(&source.endpoint(), Load { rate: 20_000, ..Load::default() })?;
    writer.wait_more(40_000, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// A standalone source may name keys of several slots in one command; the cluster has them split.
#[test]
fn commands_over_several_slots_to_cluster() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 3, 0)?);
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut conn = source.conn()?;
    let pairs: Vec<String> = (0..200).flat_map(|i| [format!("mset:{i}"), format!("value {i}")]).collect();
    let mut words: Vec<&[u8]> = vec![b"MSET"];
    words.extend(pairs.iter().map(String::as_bytes));
    conn.run(&words)?;
    let keys: Vec<String> = (50..120).map(|i| format!("mset:{i}")).collect();
    for name in ["DEL", "UNLINK"] {
        let mut words: Vec<&[u8]> = vec![name.as_bytes()];
        words.extend(keys.iter().skip(if name == "DEL" { 40 } else { 0 }).map(String::as_bytes));
        conn.run(&words)?;
    }
    // A transaction over several slots: in order within each slot.
    conn.run(args!["MULTI"])?;
    for i in 0..20 {
        conn.run(args!["INCRBY", format!("counter:{}", i % 7), "3"])?;
    }
    conn.run(args!["EXEC"])?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

#[test]
fn relative_expiries_of_old_sources() -> Result<()> {
    for version in [Version::REDIS_2_8, Version::REDIS_6_2] {
        let source = Server::start(version)?;
        let target = Server::start(VERSION)?;
        let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
        let tool = Tool::run(&manifest, &[])?;
        tool.wait_condition("InSync", PATIENCE)?;
        let mut conn = source.conn()?;
        for i in 0..200 {
            conn.run(args!["SETEX", format!("a:{i}"), "500", "v"])?;
            conn.run(args!["SET", format!("b:{i}"), "v", "PX", "700000"])?;
            conn.run(args!["RPUSH", format!("c:{i}"), "v"])?;
            conn.run(args!["EXPIRE", format!("c:{i}"), "900"])?;
        }
        wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
        stop(tool)?;
    }
    Ok(())
}

/// FLUSHALL empties the target too, and what follows arrives.
#[test]
fn flushall() -> Result<()> {
    for cluster in [false, true] {
        let source = Server::start(VERSION)?;
        let (standalone, clustered);
        let target = if cluster {
            clustered = Cluster::start(VERSION, 2, 0)?;
            clustered.endpoint()
        } else {
            standalone = Server::start(VERSION)?;
            standalone.endpoint()
        };
        Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
        let tool = Tool::run(&Manifest::between(&source.endpoint(), &target), &[])?;
        tool.wait_condition("InSync", PATIENCE)?;
        let mut conn = source.conn()?;
        conn.run(args!["FLUSHALL"])?;
        conn.run(args!["SET", "after", "1"])?;
        let report = wait_equal(&source.endpoint(), &target, PATIENCE)?;
        assert!(report.keys >= 1);
        stop(tool)?;
    }
    Ok(())
}

#[test]
fn functions_follow() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 2, 0)?);
    let mut conn = source.conn()?;
    let library =
        |body: &str| format!("#!lua name=lib\nredis.register_function('f', function() return {body} end)");
    conn.run(args!["FUNCTION", "LOAD", library("1")])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    conn.run(args!["FUNCTION", "LOAD", "REPLACE", library("2")])?;
    for node in &target.nodes {
        wait_until("the function on every node", PATIENCE, || {
            Ok(Some(()).filter(|()| {
                node.conn().and_then(|mut c| c.number(args!["FCALL", "f", "0"])).is_ok_and(|n| n == 2)
            }))
        })?;
    }
    stop(tool).map(drop)
}

/// WAIT on the source counts us only for what the target has acknowledged.
#[test]
fn acknowledgements_are_honest() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let proxy = e2e::Proxy::start(&target.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut conn = source.conn()?;
    conn.run(args!["SET", "k", "1"])?;
    assert_eq!(conn.number(args!["WAIT", "1", "5000"])?, 1);
    proxy.stall(true);
    conn.run(args!["SET", "k", "2"])?;
    assert_eq!(conn.number(args!["WAIT", "1", "2500"])?, 0, "acknowledged before the target had it");
    proxy.stall(false);
    assert_eq!(conn.number(args!["WAIT", "1", "10000"])?, 1);
    assert_eq!(target.conn()?.text(args!["GET", "k"])?, "2");
    stop(tool).map(drop)
}

/// A source that renamed PSYNC, as some clouds do. An unchanged Redis answers any other name than
/// "psync" as it would SYNC: the snapshot at once, without +FULLRESYNC (replication.c, syncCommand).
#[test]
fn renamed_psync() -> Result<()> {
    let source = Options::new(VERSION).with("rename-command", "PSYNC hidden-psync").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/psyncCommand", "hidden-psync");
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())
        .map(drop)
}

/// Lag is told in bytes and milliseconds, and goes back to nothing.
#[test]
fn lag_is_told() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let proxy = e2e::Proxy::start(&target.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone")
        .set("/spec/verification/mode", "Off");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    proxy.stall(true);
    source.conn()?.run(args!["SET", "k", vec![b'x'; 100_000]])?;
    tool.wait_for("lag", Duration::from_secs(10), |status| {
        status["replication"]["lagBytes"].as_i64().unwrap_or(0) >= 100_000
            && status["replication"]["lagMillis"].as_i64().unwrap_or(0) > 500
    })?;
    proxy.stall(false);
    tool.wait_for("no lag", Duration::from_secs(10), |status| status["replication"]["lagBytes"] == 0)?;
    stop(tool).map(drop)
}
