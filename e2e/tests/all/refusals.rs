//! Targets that refuse, for a while or for good, and a spool that takes no more.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::proxy::Way;
use e2e::scenario::{PATIENCE, stop};
use e2e::tool::condition;
use e2e::{Batch, Cluster, Manifest, Options, Proxy, Sentinels, Server, Tool, Version, args, wait_until};
use serde_json::{Value, json};

const VERSION: Version = Version::REDIS_7_0;

fn source() -> Result<Server> {
    let source = Options::new(VERSION).with("repl-backlog-size", "64mb").start()?;
    Dataset::default().databases(&[]).fill(&mut source.client()?)?;
    Ok(source)
}

/// Reason and message while the condition is true.
fn why(status: &Value, kind: &str) -> Option<(String, String)> {
    let all = status["conditions"].as_array()?;
    let found = all.iter().find(|found| found["type"] == kind && found["status"] == "True")?;
    Some((found["reason"].as_str()?.to_owned(), found["message"].as_str()?.to_owned()))
}

/// Nothing is lost: the source is left to keep what the tool has no room for.
#[test]
fn a_full_spool_makes_the_source_wait_and_says_so() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let proxy = Proxy::start(&target.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone")
        .set("/spec/limits/spoolMemory", "1Mi")
        .set("/spec/limits/spoolDisk", "2Mi")
        .set("/spec/limits/spoolRetain", "0");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    proxy.stall(true);
    let mut conn = source.conn()?;
    for number in 0..200 {
        conn.run(args!["APPEND", format!("long:{}", number % 7), vec![b'x'; 65_536]])?;
    }
    let status = tool.wait_for("a full spool", PATIENCE, |status| {
        why(status, "Degraded").is_some_and(|(reason, _)| reason == "SpoolFull")
    })?;
    let (_, message) = why(&status, "Degraded").context("no longer degraded")?;
    ensure!(message.contains("spool") && message.contains("is made to wait"), "{message}");
    // 12.8 MB were written; the tool has the first few of them.
    let (received, written) = (status["shards"][0]["receivedOffset"].as_i64(), offset(&source)?);
    ensure!(received.is_some_and(|received| written - received > 4 << 20), "{received:?} of {written}");
    proxy.stall(false);
    tool.wait_for("the end of it", PATIENCE, |status| {
        condition(status, "InSync").as_deref() == Some("True")
            && why(status, "Degraded").is_none_or(|(reason, _)| reason != "SpoolFull")
    })?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

fn offset(source: &Server) -> Result<i64> {
    Ok(source.conn()?.info("replication", "master_repl_offset")?.context("no offset")?.parse()?)
}

/// It waits, says for what, and goes on in order.
#[test]
fn a_target_without_memory_is_waited_for() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut conn = target.conn()?;
    conn.run(args!["CONFIG", "SET", "maxmemory", "1"])?;
    let writer = Writer::start(&source.endpoint(), Load { additive: 80, ..Load::default() })?;
    let status = tool.wait_for("a word about the memory", PATIENCE, |status| {
        status["shards"][0]["lastError"].as_str().is_some_and(|error| error.contains("OOM"))
    })?;
    ensure!(condition(&status, "Finished").is_none(), "{status}");
    writer.wait_more(300, PATIENCE)?;
    conn.run(args!["CONFIG", "SET", "maxmemory", "0"])?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    let finished = stop(tool)?;
    assert_eq!(finished.status()?["quarantine"]["commands"], 0);
    Ok(())
}

/// A later command of the same slot is taken, and the tool killed before it can know that the one before was not.
#[test]
fn what_was_refused_is_not_taken_for_applied_after_a_kill() -> Result<()> {
    overtaken_unheard(|mut tool, proxy, manifest| {
        tool.kill()?;
        proxy.stall(false);
        Tool::run_in(Arc::clone(&tool.folder), manifest, &[])
    })
}

/// The same when only the connection is lost, and the answers with it.
#[test]
fn what_was_refused_is_not_taken_for_applied_after_a_lost_connection() -> Result<()> {
    overtaken_unheard(|tool, proxy, _| {
        proxy.cut();
        proxy.stall(false);
        Ok(tool)
    })
}

fn overtaken_unheard(disturb: impl FnOnce(Tool, &Proxy, &Manifest) -> Result<Tool>) -> Result<()> {
    let (source, target) = (source()?, Cluster::start(VERSION, 3, 0)?);
    let node = target.nodes.get(target.client()?.node_of(b"{t}")?).context("no such node")?;
    let proxy = Proxy::start(&node.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpointMap", json!({ node.address(): proxy.address() }));
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let (mut from, mut to) = (source.conn()?, node.conn()?);
    from.run(args!["INCR", "{t}other"])?;
    let written = offset(&source)?;
    // Answered: nothing that follows waits for it.
    tool.wait_for("nothing under way", PATIENCE, |status| {
        status["shards"][0]["appliedOffset"].as_i64().is_some_and(|applied| applied >= written)
    })?;
    proxy.stall_way(Way::Down);
    to.run(args!["CONFIG", "SET", "maxmemory", "1"])?;
    from.run(args!["INCR", "{t}refused"])?;
    // Of the transaction, and not of a record before it.
    wait_until("a refusal", PATIENCE, || Ok(to.info("errorstats", "errorstat_EXECABORT")?.map(drop)))?;
    to.run(args!["CONFIG", "SET", "maxmemory", "0"])?;
    // More than waits for the answer.
    let mut batch = Batch::default();
    (0..600).for_each(|_| batch.add(args!["INCR", "{t}other"]));
    from.pipeline(&batch)?;
    wait_until("what comes behind it", PATIENCE, || {
        Ok((to.text(args!["GET", "{t}other"])?.parse::<u32>()? > 1).then_some(()))
    })?;
    ensure!(to.number(args!["EXISTS", "{t}refused"])? == 0, "it was taken");
    let tool = disturb(tool, &proxy, &manifest)?;
    tool.wait_condition("InSync", PATIENCE)?;
    from.run(args!["INCR", "{t}refused"])?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    let finished = stop(tool)?;
    assert_eq!(finished.status()?["replication"]["fullResyncs"], 0);
    Ok(())
}

/// While a refused command is sent again, its server becomes a replica: who asks only there would wait for ever.
#[test]
fn a_target_without_memory_that_is_demoted_is_left() -> Result<()> {
    let (source, master) = (source()?, Server::start(VERSION)?);
    let replica = master.replica()?;
    let sentinels = Sentinels::start(VERSION, 1, "main", &master, 1)?;
    let manifest = Manifest::between(&source.endpoint(), &master.endpoint()).sentinel("target", &sentinels);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    master.conn()?.run(args!["CONFIG", "SET", "maxmemory", "1"])?;
    let writer = Writer::start(&source.endpoint(), Load { additive: 80, ..Load::default() })?;
    tool.wait_for("a word about the memory", PATIENCE, |status| {
        status["shards"][0]["lastError"].as_str().is_some_and(|error| error.contains("OOM"))
    })?;
    sentinels.fail_over()?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &replica.endpoint(), PATIENCE)?;
    let finished = stop(tool)?;
    assert_eq!(finished.status()?["quarantine"]["commands"], 0);
    Ok(())
}

/// A command that the target does not know is set aside and told; of more than are allowed, the run ends.
#[test]
fn refused_commands_are_told_and_their_number_is_limited() -> Result<()> {
    let source = source()?;
    let target = Options::new(VERSION).with("rename-command", "SETRANGE \"\"").start()?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/failurePolicy/maxQuarantined", 2)
        .set("/spec/verification/mode", "Off");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut conn = source.conn()?;
    for number in 0..2 {
        conn.run(args!["SETRANGE", format!("refused:{number}"), "3", "x"])?;
    }
    conn.run(args!["SET", "behind", "them"])?;
    let status = tool.wait_for("two commands set aside", PATIENCE, |status| {
        status["quarantine"]["commands"].as_i64() == Some(2) && why(status, "Degraded").is_some()
    })?;
    let told = status["quarantine"]["samples"].to_string();
    ensure!(told.contains("SETRANGE") && told.contains("refused:1"), "{told}");
    let (reason, _) = why(&status, "Degraded").context("not degraded")?;
    ensure!(reason == "CommandsQuarantined", "{reason}");
    tool.wait_for("what comes behind them", PATIENCE, |_| {
        target
            .conn()
            .and_then(|mut conn| conn.text(args!["GET", "behind"]))
            .is_ok_and(|found| found == "them")
    })?;
    conn.run(args!["SETRANGE", "refused:2", "3", "x"])?;
    let finished = tool.expect_exit(1, PATIENCE)?;
    let message = finished.status()?["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("maxQuarantined") && message.contains("SETRANGE"), "{message}");
    Ok(())
}
