//! What eviction goes by, read beside the keys.

use anyhow::{Context, Result, ensure};
use e2e::client::bytes;
use e2e::scenario::{PATIENCE, stop};
use e2e::{Conn, Manifest, Options, Server, Tool, Version, args, wait_until};
use serde_json::json;

const VERSION: Version = Version::REDIS_7_0;
const KEYS: [&str; 3] = ["text", "long", "list"];

/// Keys that were used as `word` says.
fn used(policy: &str, word: &str, number: i64) -> Result<Server> {
    let server = Options::new(VERSION)
        .with("maxmemory-policy", policy)
        .with("lfu-decay-time", "0")
        .with("notify-keyspace-events", "AE")
        .start()?;
    let mut conn = server.conn()?;
    // No small number: all keys of that value would be used together.
    conn.run(args!["SET", "text", "a text", "PX", "90000000"])?;
    conn.run(args!["SET", "long", vec![b'x'; 20_000]])?;
    conn.run(args!["RPUSH", "list", "a", "b"])?;
    for key in KEYS {
        let (dump, left) = (bytes(&conn.run(args!["DUMP", key])?), conn.number(args!["PTTL", key])?.max(0));
        conn.run(args!["RESTORE", key, left.to_string(), dump, "REPLACE", word, number.to_string()])?;
    }
    Ok(server)
}

fn manifest(source: &Server, target: &Server) -> Manifest {
    Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/type", "Scan")
        // Before Redis 7.2 it would count as a use.
        .set("/spec/verification/mode", "Off")
}

fn asked(conn: &mut Conn, word: &str) -> Result<Vec<i64>> {
    KEYS.iter().map(|key| conn.number(args!["OBJECT", word, *key])).collect()
}

#[test]
fn idle_times_are_read_when_asked_for() -> Result<()> {
    let source = used("noeviction", "IDLETIME", 5000)?;
    let target = Server::start(VERSION)?;
    let manifest = manifest(&source, &target).set("/spec/source/redis/evictionData", true);
    Tool::until_in_sync(&manifest)?.expect_exit(0, PATIENCE)?;
    let idle = asked(&mut target.conn()?, "IDLETIME")?;
    ensure!(idle.iter().all(|seconds| (5000..5100).contains(seconds)), "{idle:?}");

    // A file says it, too. What was read on the way above was a use.
    let source = used("noeviction", "IDLETIME", 5000)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("used.rdb");
    let uri = file.to_str().context("path")?;
    let to_file = manifest_of(&source, json!({"type": "RdbFile", "rdbFile": {"uri": uri}}));
    let finished = Tool::run(&to_file, &[])?.wait_exit(PATIENCE)?;
    ensure!(finished.code == 0, "{}", finished.stderr);
    let loaded = Options::new(VERSION).snapshot(&file).start()?;
    let idle = asked(&mut loaded.conn()?, "IDLETIME")?;
    ensure!(idle.iter().all(|seconds| (5000..5100).contains(seconds)), "{idle:?}");

    // A server that keeps it to itself gives its keys all the same.
    source.conn()?.run(args!["ACL", "SETUSER", "scanner", "on", ">scan", "~*", "&*", "+@all", "-object"])?;
    target.conn()?.run(args!["FLUSHALL"])?;
    let manifest = manifest.set("/spec/source/redis/endpoints", vec![source.address()]);
    let manifest = manifest.login("source", "scanner", "scan");
    let finished = Tool::until_in_sync(&manifest)?.expect_exit(0, PATIENCE)?;
    ensure!(finished.stderr.contains("OBJECT is refused"), "{}", finished.stderr);
    let idle = asked(&mut target.conn()?, "IDLETIME")?;
    ensure!(idle.iter().all(|seconds| *seconds < 100), "{idle:?}");
    Ok(())
}

fn manifest_of(source: &Server, target: serde_json::Value) -> Manifest {
    Manifest::between(&source.endpoint(), &source.endpoint())
        .set("/spec/source/type", "Scan")
        .set("/spec/source/redis/evictionData", true)
        .set("/spec/target", target)
}

/// A key that is read again is made anew by RESTORE, which would begin to count from the beginning.
#[test]
fn frequencies_outlast_changes_and_a_change_of_policy() -> Result<()> {
    let source = used("allkeys-lfu", "FREQ", 200)?;
    let options = Options::new(VERSION).with("maxmemory-policy", "allkeys-lfu").with("lfu-decay-time", "0");
    let target = options.start()?;
    let manifest = manifest(&source, &target).set("/spec/source/redis/evictionData", true);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut conn = target.conn()?;
    let counts = asked(&mut conn, "FREQ")?;
    ensure!(counts.iter().all(|count| (200..220).contains(count)), "{counts:?}");
    let mut has = |length: i64| -> Result<()> {
        wait_until("the change", PATIENCE, || {
            Ok((conn.number(args!["LLEN", "list"])? == length).then_some(()))
        })
    };
    source.conn()?.run(args!["RPUSH", "list", "c"])?;
    has(3)?;
    let counts = asked(&mut target.conn()?, "FREQ")?;
    ensure!(counts.iter().all(|count| (200..220).contains(count)), "{counts:?}");

    source.conn()?.run(args!["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])?;
    source.conn()?.run(args!["RPUSH", "list", "d"])?;
    has(4)?;
    ensure!(tool.stderr().contains("OBJECT was refused"), "{}", tool.stderr());
    source.conn()?.run(args!["RPUSH", "list", "e"])?;
    has(5)?;
    stop(tool).map(drop)
}
