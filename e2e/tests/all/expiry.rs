//! Keys that live on though their time was over on a target that lags.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::{array, bytes};
use e2e::compare::{Report, Rules, Snapshot, compare_with};
use e2e::load::{Load, Writer};
use e2e::scenario::PATIENCE;
use e2e::{Batch, Client, Cluster, Conn, Endpoint, Manifest, Options, Proxy, Server, Tool, Version, args};
use e2e::{tool::Finished, wait_until};

/// With it the tool holds nothing.
const UNHELD: (&str, &str) = ("REDIS_MIGRATION_TEST_UNHELD", "1");
/// From when they are written until they are to be gone, unless they are renewed.
const LIFE: i64 = 8_000;
const EACH: usize = 40;

fn source(version: Version) -> Result<Server> {
    // By way of a file the snapshot is there at once.
    let options = Options::new(version).with("repl-backlog-size", "64mb");
    if version.has(2, 9) { options.with("repl-diskless-sync", "no").start() } else { options.start() }
}

/// Unix ms, by the server's clock.
fn time(conn: &mut Conn) -> Result<i64> {
    let time = array(&conn.run(args!["TIME"])?);
    let seconds = String::from_utf8(bytes(time.first().context("no seconds")?))?;
    let micros = String::from_utf8(bytes(time.get(1).context("no microseconds")?))?;
    Ok(seconds.parse::<i64>()? * 1000 + micros.parse::<i64>()? / 1000)
}

/// Enough for a target at 60 KB/s to be busy until everything is renewed.
fn fill(conn: &mut Conn) -> Result<()> {
    let mut batch = Batch::default();
    (0..2_000).for_each(|n| batch.add(args!["SET", format!("fill:{n}"), vec![b'x'; 500]]));
    conn.pipeline(&batch).map(drop)
}

fn run_all(conn: &mut Conn, command: impl Fn(usize, &mut Batch)) -> Result<()> {
    let mut batch = Batch::default();
    (0..EACH).for_each(|n| command(n, &mut batch));
    for reply in conn.pipeline(&batch)? {
        ensure!(!matches!(reply, redis::Value::ServerError(_)), "{reply:?}");
    }
    Ok(())
}

fn brief_keys(conn: &mut Conn) -> Result<()> {
    let life = LIFE.to_string();
    run_all(conn, |n, batch| {
        for kind in ["later", "ever", "grown", "named", "gone"] {
            let key = if kind == "named" { format!("{{{n}}}named") } else { format!("{kind}:{n}") };
            batch.add(args!["PSETEX", key, life, format!("{n}")]);
        }
        batch.add(args!["HMSET", format!("hash:{n}"), "count", "7", "name", "h"]);
        batch.add(args!["PEXPIRE", format!("hash:{n}"), life]);
    })
}

fn renew(conn: &mut Conn) -> Result<()> {
    run_all(conn, |n, batch| {
        batch.add(args!["PEXPIRE", format!("later:{n}"), "3600000"]);
        batch.add(args!["PERSIST", format!("ever:{n}")]);
        batch.add(args!["APPEND", format!("grown:{n}"), "+"]);
        batch.add(args!["EXPIRE", format!("grown:{n}"), "7200"]);
        batch.add(args!["HINCRBY", format!("hash:{n}"), "count", "1"]);
        batch.add(args!["PEXPIRE", format!("hash:{n}"), "5000000"]);
        batch.add(args!["RENAME", format!("{{{n}}}named"), format!("{{{n}}}renamed")]);
        batch.add(args!["EXPIRE", format!("{{{n}}}renamed"), "9000"]);
    })
}

/// Keys with an expiry that is renewed while the target takes the full sync, and is over by the time that
/// it has it.
fn slow_full_sync(version: Version, target: &Endpoint, env: &[(&str, &str)]) -> Result<(Server, Finished)> {
    let source = source(version)?;
    let mut conn = source.conn()?;
    fill(&mut conn)?;
    brief_keys(&mut conn)?;
    let over = time(&mut conn)? + LIFE;
    let proxy = Proxy::start(&target.address)?;
    proxy.limit(Some(60_000));
    let through = Endpoint { address: proxy.address(), ..target.clone() };
    let manifest =
        Manifest::between(&source.endpoint(), &through).set("/spec/target/redis/topology", "Standalone");
    let tool = Tool::spawn(Arc::new(tempfile::tempdir()?), &manifest, &["--until", "InSync"], env)?;
    tool.wait_for("the snapshot", PATIENCE, |status| status["progress"]["bytesRead"].as_i64() > Some(0))?;
    renew(&mut conn)?;
    ensure!(time(&mut conn)? < over, "too slow to renew keys that live for {LIFE} ms");
    outlast(&proxy, &mut conn, over)?;
    Ok((source, tool.wait_exit(PATIENCE)?))
}

/// Holds the target up until the time `over` has passed at the source, then lets all through.
fn outlast(proxy: &Proxy, conn: &mut Conn, over: i64) -> Result<()> {
    proxy.stall(true);
    let past = || Ok((time(conn)? > over + 300).then_some(()));
    wait_until("the end of their first time", PATIENCE, past)?;
    proxy.stall(false);
    proxy.limit(None);
    Ok(())
}

fn nothing_is_held(target: &Endpoint) -> Result<Snapshot> {
    let snapshot = Snapshot::read(&mut Client::open(target)?)?;
    let held = snapshot.entries.iter().find(|(_, entry)| entry.is_held());
    ensure!(held.is_none(), "held: {:?}", held.map(|((_, key), _)| key.escape_ascii().to_string()));
    Ok(snapshot)
}

/// Equal, with the very expiries, and everything is there that was renewed, and nothing else.
fn equal(source: &Server, target: &Endpoint) -> Result<Report> {
    let snapshot = nothing_is_held(target)?;
    let report = compare_with(&source.endpoint(), target, &Rules::complete())?;
    ensure!(report.differences.is_empty(), "{report}");
    let keys: BTreeSet<String> =
        snapshot.entries.keys().map(|(_, key)| String::from_utf8_lossy(key).into_owned()).collect();
    for n in 0..EACH {
        for key in [format!("later:{n}"), format!("ever:{n}"), format!("grown:{n}"), format!("hash:{n}")] {
            ensure!(keys.contains(&key), "{key} is lost");
        }
        ensure!(keys.contains(&format!("{{{n}}}renamed")), "{{{n}}}renamed is lost");
        ensure!(!keys.contains(&format!("gone:{n}")), "gone:{n} is still there");
    }
    Ok(report)
}

fn survives(version: Version, target_version: Version) -> Result<()> {
    let target = Server::start(target_version)?;
    let (source, finished) = slow_full_sync(version, &target.endpoint(), &[])?;
    ensure!(finished.code == 0, "exit code {}: {}", finished.code, finished.stderr);
    equal(&source, &target.endpoint()).map(drop)
}

#[test]
fn keys_renewed_during_a_slow_full_sync_live() -> Result<()> {
    survives(Version::REDIS_7_0, Version::REDIS_7_0)
}

#[test]
fn keys_renewed_during_a_slow_full_sync_live_on_old_servers() -> Result<()> {
    survives(Version::REDIS_3_2, Version::REDIS_3_2)?;
    survives(Version::REDIS_5_0, Version::REDIS_6_2)
}

#[test]
fn keys_renewed_during_a_slow_full_sync_live_on_valkey() -> Result<()> {
    survives(Version::VALKEY_8_1, Version::VALKEY_9_1)
}

/// The test sees what holding is for.
#[test]
fn without_holding_they_are_lost() -> Result<()> {
    let target = Server::start(Version::REDIS_7_0)?;
    let (source, finished) = slow_full_sync(Version::REDIS_7_0, &target.endpoint(), &[UNHELD])?;
    assert_ne!(finished.code, 0, "{}", finished.stderr);
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::complete())?;
    let lost =
        |kind: &str| report.differences.iter().filter(|found| found.key.starts_with(kind.as_bytes())).count();
    for kind in ["later:", "ever:", "grown:", "hash:"] {
        assert!(lost(kind) > 0, "{kind} {report}");
    }
    Ok(())
}

#[test]
fn keys_on_a_cluster_get_their_times_back() -> Result<()> {
    let (source, target) = (source(Version::REDIS_7_0)?, Cluster::start(Version::REDIS_7_0, 3, 0)?);
    let mut conn = source.conn()?;
    fill(&mut conn)?;
    brief_keys(&mut conn)?;
    let over = time(&mut conn)? + LIFE;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    // Follows until it is killed.
    let mut tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    tool.kill()?;
    renew(&mut conn)?;
    ensure!(time(&mut conn)? < over, "too slow to renew keys that live for {LIFE} ms");
    wait_until(
        "the end of their first time",
        PATIENCE,
        || Ok((time(&mut conn)? > over + 300).then_some(())),
    )?;
    Tool::run_in(folder, &manifest, &["--until", "InSync"])?.expect_exit(0, PATIENCE)?;
    equal(&source, &target.endpoint()).map(drop)
}

/// Killed with all keys there, and started again when their first time is over.
fn killed(delivery: &str) -> Result<()> {
    let (source, target) = (source(Version::REDIS_7_0)?, Server::start(Version::REDIS_7_0)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/delivery", delivery);
    let mut tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    let (mut conn, mut there) = (source.conn()?, target.conn()?);
    // By the stream, not by the snapshot.
    brief_keys(&mut conn)?;
    let over = time(&mut conn)? + LIFE;
    wait_until("the last of them", PATIENCE, || {
        Ok((there.number(args!["PTTL", format!("hash:{}", EACH - 1)])? > 0).then_some(()))
    })?;
    match delivery {
        "ExactlyOnce" => tool.kill()?,
        // Keeps its place only when it ends in order.
        _ => {
            tool.terminate()?;
            tool.expect_exit(4, PATIENCE)?;
        }
    }
    renew(&mut conn)?;
    ensure!(time(&mut conn)? < over, "too slow to renew keys that live for {LIFE} ms");
    wait_until(
        "the end of their first time",
        PATIENCE,
        || Ok((time(&mut conn)? > over + 300).then_some(())),
    )?;
    Tool::run_in(folder, &manifest, &["--until", "InSync"])?.expect_exit(0, PATIENCE)?;
    equal(&source, &target.endpoint())?;
    assert_eq!(conn.info("stats", "sync_full")?.as_deref(), Some("1"));
    Ok(())
}

#[test]
fn keys_renewed_while_the_tool_is_dead_live() -> Result<()> {
    killed("ExactlyOnce")
}

#[test]
fn keys_renewed_while_the_tool_is_stopped_live() -> Result<()> {
    killed("AtLeastOnce")
}

const HASHES: [(&str, usize); 3] = [("small", 5), ("table", 700), ("large", 20_000)];

/// Fields `a…` are renewed, `b…` persist, `c…` are to go.
fn fields(version: Version, env: &[(&str, &str)]) -> Result<(Server, Server, Finished)> {
    let (source, target) = (source(version)?, Server::start(version)?);
    let mut conn = source.conn()?;
    fill(&mut conn)?;
    let expire = |conn: &mut Conn, command: &str, time: &str, letter: &str| -> Result<()> {
        for (key, count) in HASHES {
            let names: Vec<String> = (0..count.min(400)).map(|n| format!("{letter}{n}")).collect();
            let number = names.len().to_string();
            let mut words: Vec<&[u8]> = vec![command.as_bytes(), key.as_bytes()];
            if !time.is_empty() {
                words.push(time.as_bytes());
            }
            words.extend([b"FIELDS".as_slice(), number.as_bytes()]);
            words.extend(names.iter().map(String::as_bytes));
            let done = array(&conn.run(&words)?);
            ensure!(done.iter().all(|reply| bytes(reply) == b"1"), "{command} {key}: {done:?}");
        }
        Ok(())
    };
    for (key, count) in HASHES {
        let mut batch = Batch::default();
        for n in 0..count {
            batch.add(args!["HSET", key, format!("a{n}"), "1", format!("b{n}"), "2", format!("c{n}"), "3"]);
        }
        conn.pipeline(&batch)?;
    }
    let life = LIFE.to_string();
    ["a", "b", "c"].iter().try_for_each(|letter| expire(&mut conn, "HPEXPIRE", &life, letter))?;
    let over = time(&mut conn)? + LIFE;
    let proxy = Proxy::start(&target.address())?;
    proxy.limit(Some(100_000));
    let manifest =
        Manifest::between(&source.endpoint(), &Endpoint { address: proxy.address(), ..target.endpoint() })
            .set("/spec/target/redis/topology", "Standalone")
            .set("/spec/limits/maxRestoreBytes", "64Ki");
    let tool = Tool::spawn(Arc::new(tempfile::tempdir()?), &manifest, &["--until", "InSync"], env)?;
    tool.wait_for("the snapshot", PATIENCE, |status| status["progress"]["bytesRead"].as_i64() > Some(0))?;
    expire(&mut conn, "HPEXPIRE", "3600000", "a")?;
    expire(&mut conn, "HPERSIST", "", "b")?;
    ensure!(time(&mut conn)? < over, "too slow to renew fields that live for {LIFE} ms");
    outlast(&proxy, &mut conn, over)?;
    Ok((source, target, tool.wait_exit(PATIENCE)?))
}

fn fields_live(version: Version) -> Result<()> {
    let (source, target, finished) = fields(version, &[])?;
    ensure!(finished.code == 0, "exit code {}: {}", finished.code, finished.stderr);
    nothing_is_held(&target.endpoint())?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::complete())?;
    ensure!(report.differences.is_empty(), "{report}");
    let mut there = target.conn()?;
    for (key, count) in HASHES {
        let brief = count.min(400);
        ensure!(there.number(args!["HLEN", key])? == (3 * count - brief) as i64, "{key}");
    }
    Ok(())
}

#[test]
fn fields_renewed_during_a_slow_full_sync_live_on_redis() -> Result<()> {
    fields_live(Version::REDIS_8_2)
}

#[test]
fn fields_renewed_during_a_slow_full_sync_live_on_valkey() -> Result<()> {
    fields_live(Version::VALKEY_9_1)
}

#[test]
fn without_holding_fields_are_lost() -> Result<()> {
    let (source, target, finished) = fields(Version::REDIS_8_2, &[UNHELD])?;
    assert_ne!(finished.code, 0, "{}", finished.stderr);
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::complete())?;
    assert_eq!(report.differences.len(), HASHES.len(), "{report}");
    Ok(())
}

/// While times are given back, keys are renamed, copied and moved, from where the sweep has not been to where
/// it has: at the end none is held.
fn released_under_load(version: Version, target: &Endpoint, databases: Vec<u32>) -> Result<()> {
    let source = source(version)?;
    let mut conn = source.conn()?;
    let mut batch = Batch::default();
    (0..30_000).for_each(|n| batch.add(args!["SETEX", format!("{{{}}}far:{n}", n % 40), "90000", "v"]));
    conn.pipeline(&batch)?;
    let across = databases.len() > 1;
    if across {
        conn.select(7)?;
        batch.clear();
        (0..5_000).for_each(|n| batch.add(args!["SETEX", format!("elsewhere:{n}"), "90000", "v"]));
        conn.pipeline(&batch)?;
        conn.select(0)?;
    }
    let load = Load { additive: 60, renewals: true, databases, across_databases: across, ..Load::default() };
    let writer = Writer::start(&source.endpoint(), load)?;
    let renaming = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let renamer = std::thread::spawn({
        let renaming = Arc::clone(&renaming);
        move || -> Result<u64> {
            let mut count = 0;
            while renaming.load(std::sync::atomic::Ordering::Relaxed) {
                let mut batch = Batch::default();
                for _ in 0..50 {
                    let (n, tag) = (count % 30_000, count % 30_000 % 40);
                    let other = (n + 40 * 301) % 30_000;
                    batch.add(args!["RENAME", format!("{{{tag}}}far:{n}"), format!("{{{tag}}}far:new{n}")]);
                    batch.add(args![
                        "RENAME",
                        format!("{{{tag}}}far:new{n}"),
                        format!("{{{tag}}}far:{other}")
                    ]);
                    batch.add(args![
                        "COPY",
                        format!("{{{tag}}}far:{other}"),
                        format!("{{{tag}}}far:copy{n}")
                    ]);
                    count += 1;
                }
                if across {
                    // All keys of 7 are in 8 then, and the other way round.
                    batch.add(args!["SWAPDB", "7", "8"]);
                }
                conn.pipeline(&batch)?;
                // A pace that the tool can follow.
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(count)
        }
    });
    let manifest = Manifest::between(&source.endpoint(), target);
    let finished = Tool::until_in_sync(&manifest)?.wait_exit(PATIENCE * 2);
    renaming.store(false, std::sync::atomic::Ordering::Relaxed);
    let renamed = renamer.join().map_err(|_| anyhow::anyhow!("the renamer panicked"))??;
    writer.stop()?;
    let finished = finished?;
    ensure!(finished.code == 0, "exit code {}: {}", finished.code, finished.stderr);
    ensure!(renamed > 100, "{renamed} keys renamed");
    nothing_is_held(target).map(drop)
}

#[test]
fn times_are_given_back_under_load() -> Result<()> {
    let target = Server::start(Version::REDIS_7_0)?;
    released_under_load(Version::REDIS_7_0, &target.endpoint(), vec![0, 3])
}

#[test]
fn times_are_given_back_under_load_on_a_cluster() -> Result<()> {
    let target = Cluster::start(Version::REDIS_7_0, 3, 0)?;
    released_under_load(Version::REDIS_7_0, &target.endpoint(), vec![0])
}

#[test]
fn a_cutover_leaves_nothing_held() -> Result<()> {
    let (source, target) = (source(Version::REDIS_8_2)?, Server::start(Version::REDIS_8_2)?);
    let writer = Writer::start(&source.endpoint(), Load { additive: 50, renewals: true, ..Load::default() })?;
    writer.wait_more(2_000, PATIENCE)?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/cutover/mode", "Automatic");
    let first = Tool::until_in_sync(&manifest)?;
    let folder = Arc::clone(&first.folder);
    first.expect_exit(0, PATIENCE)?;
    writer.wait_more(500, PATIENCE)?;
    // Nothing copies what is written behind the cutover.
    writer.stop()?;
    Tool::run_in(folder, &manifest, &[])?.expect_exit(0, PATIENCE)?;
    nothing_is_held(&target.endpoint())?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::complete())?;
    ensure!(report.differences.is_empty(), "{report}");
    Ok(())
}
