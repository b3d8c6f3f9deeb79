//! Stops, crashes and broken connections.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::chaos::{Shards, SlotMove};
use e2e::client::{array, bytes, slot};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop};
use e2e::{Batch, Cluster, Conn, Manifest, Options, Proxy, Server, Tool, Version, args, wait_until};
use tempfile::TempDir;

const VERSION: Version = Version::REDIS_7_0;

fn source() -> Result<Server> {
    let source = Options::new(VERSION).with("repl-backlog-size", "64mb").start()?;
    Dataset::default().rounds(3).databases(&[]).fill(&mut source.client()?)?;
    Ok(source)
}

fn sigterm_then_resume(source: &Server, target: &e2e::Endpoint) -> Result<()> {
    let manifest = Manifest::between(&source.endpoint(), target);
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    for _ in 0..2 {
        writer.wait_more(1_000, PATIENCE)?;
    }
    stop(tool)?;
    // Missed while it was away.
    writer.wait_more(1_500, PATIENCE)?;
    let tool = Tool::run_in(folder, &manifest, &[])?;
    let status = tool.wait_condition("InSync", PATIENCE)?;
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), target, PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1), "status {status}");
    stop(tool).map(drop)
}

#[test]
fn sigterm_then_resume_to_standalone() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    sigterm_then_resume(&source, &target.endpoint())
}

#[test]
fn sigterm_then_resume_to_cluster() -> Result<()> {
    let (source, target) = (source()?, Cluster::start(VERSION, 3, 0)?);
    sigterm_then_resume(&source, &target.endpoint())
}

/// Stopped in the middle of the full sync: what is half there is completed, and nothing claims otherwise.
#[test]
fn sigterm_during_full_sync() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let mut conn = source.conn()?;
    conn.run(args!["CONFIG", "SET", "rdb-key-save-delay", "20000"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_for("a part of the keys", PATIENCE, |status| {
        status["progress"]["keysApplied"].as_i64().unwrap_or(0) > 10
    })?;
    stop(tool)?;
    conn.run(args!["CONFIG", "SET", "rdb-key-save-delay", "0"])?;
    Tool::run_in(folder, &manifest, &["--until", "InSync"])?.expect_exit(0, PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO).map(drop)
}

#[test]
fn connection_to_the_source_is_cut() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let proxy = Proxy::start(&source.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/endpoints", vec![proxy.address()])
        .set("/spec/source/redis/topology", "Standalone");
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    for resumes in 1..=3 {
        writer.wait_more(500, PATIENCE)?;
        proxy.cut();
        tool.wait_for("a resumption", PATIENCE, |status| {
            status["replication"]["resumes"].as_i64().unwrap_or(0) >= resumes
        })?;
    }
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 3));
    stop(tool).map(drop)
}

/// In the middle of the full sync there is nothing to resume from: it starts over, and says so.
#[test]
fn connection_to_the_source_is_cut_during_full_sync() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let proxy = Proxy::start(&source.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/endpoints", vec![proxy.address()])
        .set("/spec/source/redis/topology", "Standalone")
        // Forbids to replace what is complete, which this is not yet.
        .set("/spec/failurePolicy/onFullResync", "Fail");
    let mut conn = source.conn()?;
    conn.run(args!["CONFIG", "SET", "repl-diskless-sync", "yes"])?;
    conn.run(args!["CONFIG", "SET", "rdb-key-save-delay", "3000"])?;
    let tool = Tool::run(&manifest, &["--until", "InSync"])?;
    // What preflight reads comes before.
    e2e::wait_until("the full sync", PATIENCE, || Ok((source.syncs()?.0 >= 1).then_some(())))?;
    let before = proxy.forwarded();
    e2e::wait_until("a part of the snapshot", PATIENCE, || {
        Ok((proxy.forwarded() > before + 10_000).then_some(()))
    })?;
    proxy.cut();
    conn.run(args!["CONFIG", "SET", "rdb-key-save-delay", "0"])?;
    let finished = tool.expect_exit(0, PATIENCE)?;
    assert!(source.syncs()?.0 >= 2, "{:?}", finished.status());
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO).map(drop)
}

/// A target that goes away while nothing is on its way to it.
#[test]
fn connection_to_the_target_is_cut() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let proxy = Proxy::start(&target.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    proxy.refuse(true);
    proxy.cut();
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    writer.wait_more(2_000, PATIENCE)?;
    proxy.refuse(false);
    writer.wait_more(500, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    assert_eq!(source.syncs()?.0, 1);
    stop(tool).map(drop)
}

/// The backlog does not reach back far enough: a full sync, announced, replaces what is there. What the
/// source deleted meanwhile stays on the target, and verification names it.
#[test]
fn full_resync_is_announced() -> Result<()> {
    let source = Options::new(VERSION).with("repl-backlog-size", "16kb").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    stop(tool)?;
    let mut conn = source.conn()?;
    conn.run(args!["SET", "late", vec![b'x'; 100_000]])?;
    conn.run(args!["DEL", "string:int:0:0"])?;
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_for("an announced full resync", PATIENCE, |status| {
        status["replication"]["fullResyncs"].as_i64().unwrap_or(0) >= 1
    })?;
    tool.wait_condition("Degraded", PATIENCE)?;
    tool.wait_condition("InSync", PATIENCE)?;
    // The key that the source has deleted meanwhile is gone as well.
    tool.wait_for("a verification", PATIENCE, |status| status["verification"]["completionTime"].is_string())?;
    let finished = stop(tool)?;
    assert_eq!(finished.status()?["verification"]["differences"], 0);
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE).map(drop)
}

/// What was copied is removed before it is copied anew, also where a slot on its way has brought it by then.
#[test]
fn what_a_moving_slot_has_brought_is_removed_too() -> Result<()> {
    let source = Options::new(VERSION).with("repl-backlog-size", "16kb").start()?;
    let target = Shards { cluster: Cluster::start(VERSION, 3, 0)? };
    let fill = "for i = 1, 300 do redis.call('SET', KEYS[1] .. i, 1) end";
    source.conn()?.run(args!["EVAL", fill, "1", "{moves}:"])?;
    let endpoint = target.cluster.endpoint();
    let manifest = Manifest::between(&source.endpoint(), &endpoint);
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    stop(tool)?;

    // More than the backlog holds, so that all is copied again.
    let mut conn = source.conn()?;
    conn.run(args!["SET", "late", vec![b'x'; 100_000]])?;
    let fewer = "for i = 1, 300, 2 do redis.call('DEL', KEYS[1] .. i) end";
    conn.run(args!["EVAL", fewer, "1", "{moves}:"])?;
    let moved = SlotMove::begin(&target, slot(b"moves"), 0)?;
    moved.advance(&target, 200)?;
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_for("an announced full resync", PATIENCE, |status| {
        status["replication"]["fullResyncs"].as_i64().unwrap_or(0) >= 1
    })?;
    tool.wait_condition("InSync", PATIENCE)?;
    ensure!(moved.finish(&target)?, "the cluster failed over by itself");
    stop(tool)?;
    wait_equal(&source.endpoint(), &endpoint, PATIENCE).map(drop)
}

/// Nothing can be harmed there, and what was kept there would say when another process had completed it.
#[test]
fn a_target_that_lost_all_is_filled_again() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    lose_all(&mut target.conn()?)?;
    tool.wait_for("an announced full resync", PATIENCE, |status| {
        status["replication"]["fullResyncs"].as_i64().unwrap_or(0) >= 1
    })?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// Also when its connections stay open, over which what was kept there comes back with the next command.
#[test]
fn a_target_that_was_flushed_in_between_is_filled_again() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    target.conn()?.run(args!["FLUSHALL"])?;
    source.conn()?.run(args!["SET", "behind", "1"])?;
    wait_until("the command behind it", PATIENCE, || {
        let there = target.conn()?.number(args!["EXISTS", "behind"])? == 1;
        Ok(there.then_some(()))
    })?;
    target.conn()?.run(args!["CLIENT", "KILL", "TYPE", "normal"])?;
    tool.wait_for("an announced full resync", PATIENCE, |status| {
        status["replication"]["fullResyncs"].as_i64().unwrap_or(0) >= 1
    })?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// It has taken the shard over, and waits for a source that does not answer.
#[test]
fn a_target_that_loses_all_before_the_source_answers_is_filled_again() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/verification/mode", "Off");
    let proxy = Arc::new(Proxy::start(&source.address())?);
    let manifest = manifest
        .set("/spec/source/redis/endpoints", vec![proxy.address()])
        .set("/spec/source/redis/topology", "Standalone");
    let mut tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    tool.kill()?;
    let folder = Arc::clone(&tool.folder);
    let (stalled, mut emptied) = (Arc::clone(&proxy), target.conn()?);
    // By then it has read where the target stands.
    proxy.before(b"\r\nPSYNC\r\n$40\r\n", move || {
        // First: once the loss shows, the test lets go.
        stalled.stall(true);
        drop(lose_all(&mut emptied));
    });
    let tool = Tool::run_in(folder, &manifest, &[])?;
    wait_until("the loss to be noticed", PATIENCE, || {
        Ok(tool.stderr().contains("target connection lost").then_some(()))
    })?;
    proxy.stall(false);
    tool.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// A run that knows of an earlier one only by its own folder must not take users' data for its own.
#[test]
fn what_was_completed_from_elsewhere_is_not_copied_again() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let folder = once_in_sync(&manifest)?;
    let elsewhere = manifest.clone().set("/spec/cutover/mode", "Automatic");
    Tool::run(&elsewhere, &[])?.expect_exit(0, PATIENCE)?;
    target.conn()?.run(args!["SET", "written:since", "1"])?;
    ends_before_it_writes(Tool::run_in(folder, &manifest, &[])?)?;
    assert_eq!(bytes(&target.conn()?.run(args!["GET", "written:since"])?), b"1");
    Ok(())
}

/// What another filter left out, or would leave out, cannot be told from the target.
#[test]
fn by_other_rules_it_does_not_go_on() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let folder = once_in_sync(&manifest)?;
    let other = manifest.clone().set("/spec/filter/databases/exclude", vec![1]);
    let refused = Tool::run_in(Arc::clone(&folder), &other, &[])?.expect_exit(2, PATIENCE)?;
    assert!(refused.stderr.contains("spec.filter changed after copying had begun"), "{}", refused.stderr);
    let limits = manifest.set("/spec/limits/pipelineCommands", 7);
    Tool::run_in(folder, &limits, &["--until", "InSync"])?.expect_exit(0, PATIENCE)?;
    assert_eq!(source.syncs()?, (1, 1));
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE).map(drop)
}

/// Another process may have completed the migration and gone; then nothing may be written any more.
#[test]
fn a_target_without_what_was_kept_there_is_not_written_to() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    forget_what_is_kept(&target)?;
    ends_before_it_writes(tool)
}

/// Another process may have completed it while this one was still in the full sync: what is there belongs to
/// its users now.
#[test]
fn a_target_without_what_was_kept_there_is_not_written_to_during_the_full_sync() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    source.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "20000"])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_for("a part of the keys", PATIENCE, |status| {
        status["progress"]["keysApplied"].as_i64().unwrap_or(0) > 10
    })?;
    target.conn()?.run(args!["SET", "written:since", "1"])?;
    forget_what_is_kept(&target)?;
    ends_before_it_writes(tool)?;
    assert_eq!(bytes(&target.conn()?.run(args!["GET", "written:since"])?), b"1");
    Ok(())
}

/// And while it still waited for the full sync to begin.
#[test]
fn a_target_that_was_completed_meanwhile_is_not_written_to() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let mut conn = source.conn()?;
    conn.run(args!["CONFIG", "SET", "repl-diskless-sync", "yes"])?;
    conn.run(args!["CONFIG", "SET", "repl-diskless-sync-delay", "10"])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    wait_until("a replica that waits", PATIENCE, || {
        let info = conn.run(args!["INFO", "replication"])?;
        let waits = String::from_utf8_lossy(&bytes(&info)).contains("state=wait_bgsave");
        Ok(waits.then_some(()))
    })?;
    target.conn()?.run(args!["SET", "written:since", "1"])?;
    forget_what_is_kept(&target)?;
    ends_before_it_writes(tool)?;
    let keys: Vec<Vec<u8>> = array(&target.conn()?.run(args!["KEYS", "[^r]*"])?).iter().map(bytes).collect();
    assert_eq!(keys, [b"written:since"]);
    Ok(())
}

/// The folder that a run leaves which ended in sync.
fn once_in_sync(manifest: &Manifest) -> Result<Arc<TempDir>> {
    let tool = Tool::run(manifest, &["--until", "InSync"])?;
    let folder = Arc::clone(&tool.folder);
    tool.expect_exit(0, PATIENCE)?;
    Ok(folder)
}

/// In one go, as a server that is replaced by an empty one loses both.
fn lose_all(target: &mut Conn) -> Result<()> {
    let mut batch = Batch::default();
    batch.add(args!["MULTI"]);
    batch.add(args!["FLUSHALL"]);
    batch.add(args!["CLIENT", "KILL", "TYPE", "normal"]);
    batch.add(args!["EXEC"]);
    target.pipeline(&batch).map(drop)
}

fn forget_what_is_kept(target: &Server) -> Result<()> {
    let mut conn = target.conn()?;
    let kept: Vec<Vec<u8>> =
        array(&conn.run(args!["KEYS", "redis-migration:*"])?).iter().map(bytes).collect();
    let mut batch = Batch::default();
    batch.add(args!["MULTI"]);
    kept.iter().for_each(|key| batch.add(args!["DEL", key]));
    // In one go: with its connections the tool would write its record again.
    batch.add(args!["CLIENT", "KILL", "TYPE", "normal"]);
    batch.add(args!["EXEC"]);
    conn.pipeline(&batch).map(drop)
}

fn ends_before_it_writes(tool: Tool) -> Result<()> {
    let finished = tool.expect_exit(1, PATIENCE)?;
    assert!(finished.stderr.contains("completed by another process"), "{}", finished.stderr);
    Ok(())
}

/// A second signal does not wait.
#[test]
fn stalled_target_and_sigterm() -> Result<()> {
    let (source, target) = (source()?, Server::start(VERSION)?);
    let proxy = Proxy::start(&target.address())?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    proxy.stall(true);
    source.conn()?.run(args!["SET", "k", "v"])?;
    tool.terminate()?;
    tool.expect_exit(4, Duration::from_secs(12)).map(drop)
}
