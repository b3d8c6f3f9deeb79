//! How fast, how many at once, and not while the source is under pressure.

use std::cell::Cell;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop};
use e2e::{Cluster, Manifest, Server, Tool, Version, wait_until};
use serde_json::Value;

fn dataset(keys: usize) -> Dataset {
    Dataset { rounds: 0, large: 1, long: 10, many: keys, ..Dataset::default() }
}

#[test]
fn keys_and_bytes_a_second_are_kept() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    dataset(2_000).fill(&mut source.client()?)?;
    for (limit, value) in [("keysPerSecond", 1_000), ("bytesPerSecond", 150_000)] {
        let target = Server::start(Version::REDIS_7_0)?;
        let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
            .set(&format!("/spec/limits/{limit}"), value);
        let tool = Tool::run(&manifest, &[])?;
        let mut conn = target.conn()?;
        wait_until("the first keys", PATIENCE, || Ok((conn.number(&[b"DBSIZE"])? > 100).then_some(())))?;
        let begun = Instant::now();
        tool.wait_condition("InSync", PATIENCE)?;
        let took = begun.elapsed();
        // Some 2000 keys, of some 180 bytes each as commands; without a limit they take a tenth of a second.
        ensure!(took > Duration::from_millis(1_000), "{limit}: only {took:?}");
        wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
        stop(tool)?;
    }
    Ok(())
}

/// What somebody did to the target behind the tool's back is put right, with the source being written to.
#[test]
fn what_differs_is_repaired_while_the_stream_goes_on() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    dataset(1_500).fill(&mut source.client()?)?;
    let target = Server::start(Version::REDIS_7_0)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/limits/keysPerSecond", 1_000)
        .set("/spec/verification/repair", true);
    let tool = Tool::run(&manifest, &[])?;
    let mut conn = target.conn()?;
    let is_there = |conn: &mut e2e::Conn, key: &str| conn.number(&[b"EXISTS", key.as_bytes()]);
    let mut found = Vec::new();
    wait_until("some keys", PATIENCE, || {
        for number in 0..1_500 {
            let key = format!("many:{number}");
            if number % 10 > 4 && !found.contains(&key) && is_there(&mut conn, &key)? == 1 {
                found.push(key);
            }
        }
        Ok((found.len() >= 2).then_some(()))
    })?;
    conn.run(&[b"SET", found[0].as_bytes(), b"changed"])?;
    conn.run(&[b"DEL", found[1].as_bytes()])?;
    conn.run(&[b"SADD", b"extra", b"member"])?;
    let writer = Writer::start(&source.endpoint(), Load { rate: 500, ..Load::default() })?;
    let status = tool.wait_condition("Verified", PATIENCE)?;
    writer.stop()?;
    ensure!(status["verification"]["repaired"] == 3, "{}", status["verification"]);
    ensure!(status["verification"]["differences"] == 0, "{}", status["verification"]);
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

#[test]
fn one_full_sync_after_the_other() -> Result<()> {
    let source = Cluster::start(Version::REDIS_7_0, 3, 0)?;
    dataset(1_500).fill(&mut source.client()?)?;
    let target = Server::start(Version::REDIS_7_0)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/limits/parallelShards", 1)
        .set("/spec/limits/keysPerSecond", 600);
    let tool = Tool::run(&manifest, &[])?;
    let (most, told) = (Cell::new(0), Cell::new(false));
    tool.wait_for("all shards in sync", PATIENCE, |status| {
        let shards = status["shards"].as_array().map(Vec::as_slice).unwrap_or_default();
        let count = |phase: &str| shards.iter().filter(|shard| shard["phase"] == phase).count();
        most.set(most.get().max(count("FullSync")));
        let message = status["message"].as_str().unwrap_or_default();
        told.set(told.get() || message.contains("parallelShards"));
        count("IncrementalSync") == 3
    })?;
    ensure!(most.get() == 1 && told.get(), "{} at once, told: {}", most.get(), told.get());
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// A client that does not read makes its server keep what it asked for.
#[test]
fn no_full_sync_begins_while_the_source_is_under_pressure() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    let target = Server::start(Version::REDIS_7_0)?;
    let mut conn = source.conn()?;
    conn.run(&[b"SET", b"big", &vec![b'x'; 1 << 20]])?;
    let mut idle = TcpStream::connect(source.address())?;
    idle.write_all("GET big\r\n".repeat(40).as_bytes())?;
    wait_until("output that nobody takes", PATIENCE, || {
        let bytes = conn.info("memory", "mem_clients_normal")?.context("INFO without buffers")?;
        Ok((bytes.parse::<u64>()? > 8 << 20).then_some(()))
    })?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/limits/source", serde_json::json!({"maxOutputBuffer": "8Mi"}));
    let tool = Tool::run(&manifest, &[])?;
    let told = |status: &Value| status["message"].as_str().unwrap_or_default().contains("maxOutputBuffer");
    let status = tool.wait_for("why it waits", PATIENCE, told)?;
    ensure!(status["shards"][0]["phase"] == "Pending", "{status}");
    ensure!(conn.info("stats", "sync_full")?.as_deref() == Some("0"));
    drop(idle);
    tool.wait_condition("InSync", PATIENCE)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}
