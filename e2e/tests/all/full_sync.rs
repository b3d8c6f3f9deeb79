//! The copy of what is there: framings, large values, keys that the target already had, expiries.

use std::time::Duration;

use anyhow::Result;
use e2e::compare::{Rules, compare};
use e2e::dataset::Dataset;
use e2e::scenario::{PATIENCE, copy_at_rest, verify};
use e2e::{Cluster, Manifest, Options, Server, Tool, Version, args, wait_until};

const VERSION: Version = Version::REDIS_7_0;

/// Everything is there, and nobody writes: even counters that replication does not carry must agree.
fn strict() -> Rules {
    Rules { entries_read: true, ..Rules::default() }
}

#[test]
fn both_framings() -> Result<()> {
    for version in [Version::REDIS_6_2, Version::REDIS_7_0, Version::REDIS_8_2, Version::VALKEY_9_1] {
        for diskless in ["yes", "no"] {
            let source = Options::new(version).with("repl-diskless-sync", diskless).start()?;
            let target = Server::start(version)?;
            Dataset::default().rounds(1).fill(&mut source.client()?)?;
            let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
            copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &strict())?;
            let log = source.log();
            let on_disk = log.contains("saved on disk") || log.contains("to disk");
            assert_eq!(on_disk, diskless == "no", "{version}: {log}");
        }
    }
    Ok(())
}

/// An empty server, and one whose only content is functions.
#[test]
fn nothing_to_copy() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let report = copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &strict())?;
    assert_eq!(report.keys, 0);
    Ok(())
}

/// Values past `maxRestoreBytes` arrive in chunks, with their expiry, and leave nothing else behind.
#[test]
fn big_keys_are_streamed() -> Result<()> {
    let source = Server::start(VERSION)?;
    let data = Dataset { rounds: 1, large: 40_000, long: 6 << 20, ..Dataset::default() };
    data.fill(&mut source.client()?)?;
    let mut conn = source.conn()?;
    for key in ["large:list", "large:hash", "large:prose", "large:noise", "large:stream"] {
        conn.run(args!["EXPIRE", key, "100000"])?;
    }
    for cluster in [false, true] {
        let (standalone, clustered);
        let target = if cluster {
            clustered = Cluster::start(VERSION, 2, 0)?;
            clustered.endpoint()
        } else {
            standalone = Server::start(VERSION)?;
            standalone.endpoint()
        };
        let manifest = Manifest::between(&source.endpoint(), &target)
            .set("/spec/limits/maxRestoreBytes", "256Ki")
            .set("/spec/databaseMap", serde_json::json!({}));
        if cluster {
            for database in [1, 9] {
                conn.select(database)?;
                conn.run(args!["FLUSHDB"])?;
            }
        }
        copy_at_rest(&manifest, &source.endpoint(), &target, &Rules::default())?;
    }
    Ok(())
}

/// Groups cannot be sent in chunks: a value that is too large by them is set aside, and that is a failure.
#[test]
fn what_the_target_did_not_get_is_never_called_verified() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let data =
        Dataset { rounds: 1, large: 40_000, long: 6 << 20, databases: Vec::new(), ..Dataset::default() };
    data.fill(&mut source.client()?)?;
    let key = "large:stream";
    source.conn()?.run(args!["XREADGROUP", "GROUP", "all", "one", "STREAMS", key, ">"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/limits/maxRestoreBytes", "256Ki");
    let finished = Tool::until_in_sync(&manifest)?.wait_exit(PATIENCE)?;
    let arrived = target.conn()?.number(args!["EXISTS", key])? == 1;
    assert_eq!(finished.code == 0, arrived, "arrived: {arrived}; {:?}", finished.status());
    // Without verification, what was set aside is the only thing that tells.
    target.conn()?.run(args!["FLUSHALL"])?;
    let finished =
        Tool::until_in_sync(&manifest.set("/spec/verification/mode", "Off"))?.wait_exit(PATIENCE)?;
    let status = finished.status()?;
    assert_eq!(finished.code, i32::from(!arrived), "{status}");
    let reason = status["conditions"].to_string().contains("\"CommandsQuarantined\"");
    assert_eq!(
        (reason, status["quarantine"]["commands"].as_i64() == Some(0)),
        (!arrived, arrived),
        "{status}"
    );
    assert!(arrived || finished.status()?.to_string().contains(key), "{:?}", finished.status());
    Ok(())
}

#[test]
fn existing_keys_fail() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "a", "source"])?;
    target.conn()?.run(args!["SET", "b", "target"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let run = Tool::until_in_sync(&manifest)?.expect_exit(1, PATIENCE)?;
    let told = run.stdout + &run.stderr;
    assert!(told.contains("TargetNotEmpty") || told.contains("existingKeys"), "{told}");
    assert_eq!(target.conn()?.number(args!["EXISTS", "a"])?, 0);
    assert_eq!(target.conn()?.text(args!["GET", "b"])?, "target");
    Ok(())
}

#[test]
fn existing_keys_replace() -> Result<()> {
    for cluster in [false, true] {
        let source = Server::start(VERSION)?;
        Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
        let (standalone, clustered);
        let target = if cluster {
            clustered = Cluster::start(VERSION, 2, 0)?;
            clustered.endpoint()
        } else {
            standalone = Server::start(VERSION)?;
            standalone.endpoint()
        };
        let mut client = e2e::Client::open(&target)?;
        // Another type, the same type with more elements, and an expiry that must not stay.
        client.on(b"list:one:0")?.run(args!["SET", "list:one:0", "x", "EX", "1000"])?;
        client.on(b"hash:pack:0")?.run(args!["HSET", "hash:pack:0", "surplus", "1"])?;
        client.on(b"string:int:0:0")?.run(args!["RPUSH", "string:int:0:0", "1"])?;
        client.on(b"large:set")?.run(args!["SADD", "large:set", "surplus"])?;
        let manifest =
            Manifest::between(&source.endpoint(), &target).set("/spec/target/existingKeys", "Replace");
        copy_at_rest(&manifest, &source.endpoint(), &target, &strict())?;
    }
    Ok(())
}

#[test]
fn existing_keys_skip() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let mut conn = target.conn()?;
    conn.run(args!["SET", "list:one:0", "kept"])?;
    conn.run(args!["SET", "string:int:0:0", "kept"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/target/existingKeys", "Skip")
        .set("/spec/verification/mode", "Off");
    Tool::until_in_sync(&manifest)?.expect_exit(0, PATIENCE)?;
    let report = compare(&source.endpoint(), &target.endpoint())?;
    let mut keys: Vec<String> =
        report.differences.iter().map(|d| String::from_utf8_lossy(&d.key).into_owned()).collect();
    keys.sort();
    assert_eq!(keys, ["list:one:0", "string:int:0:0"], "{report}");
    assert_eq!(conn.text(args!["GET", "list:one:0"])?, "kept");
    Ok(())
}

#[test]
fn verify_finds_what_was_planted() -> Result<()> {
    let version = Version::REDIS_8_2;
    let (source, target) = (Server::start(version)?, Server::start(version)?);
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &strict())?;
    verify(&manifest, 0)?;
    let plants: [(&str, &[&[u8]]); 9] = [
        ("string:int:0:0", args!["SET", "string:int:0:0", "5"]),
        ("surplus", args!["SET", "surplus", "5"]),
        ("large:hash", args!["HSET", "large:hash", "surplus", "1"]),
        ("set:table:0", args!["SADD", "set:table:0", "surplus"]),
        ("zset:table:0", args!["ZADD", "zset:table:0", "1", "surplus"]),
        ("large:list", args!["RPUSH", "large:list", "surplus"]),
        ("large:noise", args!["SETRANGE", "large:noise", "500000", "surplus"]),
        ("bitmap:0", args!["EXPIRE", "bitmap:0", "1000"]),
        ("hash:expiring:pack:0", args!["HPEXPIRE", "hash:expiring:pack:0", "70000000", "FIELDS", "1", "0"]),
    ];
    let (mut from, mut to) = (source.conn()?, target.conn()?);
    for (key, plant) in plants {
        to.run(plant)?;
        let found = verify(&manifest, 3)?;
        assert!((found.stdout + &found.stderr).contains(key), "{key} is not named");
        let original = e2e::client::bytes(&from.run(args!["DUMP", key])?);
        if original.is_empty() {
            to.run(args!["DEL", key])?;
        } else {
            to.run(args!["RESTORE", key, "0", original, "REPLACE"])?;
        }
    }
    verify(&manifest, 0).map(drop)
}

/// A key about to expire is neither lost early nor kept forever.
#[test]
fn expiries_near_and_far() -> Result<()> {
    for version in [Version::REDIS_3_2, Version::REDIS_7_0] {
        let (source, target) = (Server::start(version)?, Server::start(version)?);
        let mut conn = source.conn()?;
        for i in 0..400 {
            let milliseconds = (2_000 + i * 10).to_string();
            conn.run(args!["PSETEX", format!("near:{i}"), milliseconds, "v"])?;
            conn.run(args!["SETEX", format!("far:{i}"), "5000", "v"])?;
        }
        let manifest =
            Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/verification/mode", "Off");
        let tool = Tool::run(&manifest, &[])?;
        tool.wait_condition("InSync", PATIENCE)?;
        let compared = || compare(&source.endpoint(), &target.endpoint());
        let report = compared()?;
        assert!(report.differences.is_empty() && report.keys >= 400, "{report}");
        wait_until("expiry on both sides", Duration::from_secs(20), || {
            let report = compared()?;
            anyhow::ensure!(report.keys == 400 && report.differences.is_empty(), "{version}: {report}");
            Ok(Some(()))
        })?;
        e2e::scenario::stop(tool)?;
    }
    Ok(())
}
