//! Filters: what is left out, in the snapshot and in the stream, and what is left.

use anyhow::{Context, Result};
use e2e::compare::{Rules, wait_equal_with};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop, verify};
use e2e::{Cluster, Manifest, Server, Tool, Version, args};
use serde_json::json;

const VERSION: Version = Version::REDIS_7_0;

/// As the manifest has it, in other words. Keys of database 1 begin with `other`.
fn left_out(key: &[u8]) -> bool {
    let numbered =
        key.strip_prefix(b"x").is_some_and(|rest| !rest.is_empty() && rest.iter().all(u8::is_ascii_digit));
    key.starts_with(b"skip:") || key.starts_with(b"other") || key.ends_with(b":tmp") || numbered
}

/// Commands that name keys of both kinds, over and over.
fn mix(source: &Server, round: usize) -> Result<()> {
    let mut conn = source.conn()?;
    let (a, b, c) = (format!("mix:{round}:a"), format!("mix:{round}:b"), format!("mix:{round}:c"));
    let (tmp, skip, x) = (format!("mix:{round}:tmp"), format!("skip:{round}"), format!("x{round}"));
    conn.run(args!["MSET", a, "1", tmp, "2", b, "3", skip, "4", c, "5", x, "6"])?;
    conn.run(args!["DEL", x, b, skip])?;
    conn.run(args!["RPUSH", format!("list:{round}"), "1", "2", "3", "4"])?;
    conn.run(args!["LMOVE", format!("list:{round}"), format!("list:{round}:tmp"), "LEFT", "RIGHT"])?;
    conn.run(args!["SADD", format!("set:{round}"), "1", "2"])?;
    conn.run(args!["SMOVE", format!("set:{round}"), skip, "1"])?;
    conn.run(args!["SUNIONSTORE", skip, format!("set:{round}")])?;
    conn.run(args!["MULTI"])?;
    conn.run(args!["INCR", a])?;
    conn.run(args!["SET", tmp, "7"])?;
    conn.run(args!["RENAME", c, format!("skip:{round}:c")])?;
    conn.run(args!["INCR", a])?;
    conn.run(args!["EXEC"])?;
    conn.run(args!["SET", format!("moves:{round}"), "1"])?;
    conn.run(args!["MOVE", format!("moves:{round}"), "1"])?;
    conn.run(args!["PUBLISH", "channel", "message"])?;
    // So that the comparison finds it under a name that says where it is.
    conn.select(1)?;
    conn.run(args!["RENAME", format!("moves:{round}"), format!("other:{round}")])?;
    Ok(())
}

#[test]
fn what_is_left_out_stays_out_and_the_rest_follows() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 3, 0)?);
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    (0..20).try_for_each(|round| mix(&source, round))?;
    // Under a name that is left out the target may hold what it likes.
    target.client()?.on(b"skip:own")?.run(args!["SET", "skip:own", "1"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).set(
        "/spec/filter",
        json!({
            "databases": {"exclude": [1]},
            "keys": {"exclude": [{"prefix": "skip:"}, {"glob": "*:tmp"}, {"regex": "^x[0-9]+$"}]},
            "commands": {"exclude": ["publish"]},
        }),
    );
    let tool = Tool::run(&manifest, &[])?;
    let writers =
        [("load", 0, 3000), ("skip:load", 0, 1000), ("other", 1, 1000)].map(|(prefix, db, rate)| {
            let load =
                Load { prefix: prefix.into(), databases: vec![db], rate, one_slot: false, ..Load::default() };
            Writer::start(&source.endpoint(), load)
        });
    tool.wait_condition("InSync", PATIENCE)?;
    (20..200).try_for_each(|round| mix(&source, round))?;
    for writer in writers {
        let writer = writer?;
        writer.wait_more(300, PATIENCE)?;
        writer.stop()?;
    }

    let own = target.client()?.on(b"skip:own")?.text(args!["GET", "skip:own"])?;
    assert_eq!(own, "1");
    target.client()?.on(b"skip:own")?.run(args!["DEL", "skip:own"])?;
    let rules = Rules { ignore: left_out, ..Rules::default() };
    let report = wait_equal_with(&source.endpoint(), &target.endpoint(), &rules, PATIENCE)
        .with_context(|| format!("{:?}", tool.status()))?;
    assert!(report.keys > 300, "{report}");
    let status = tool.wait_condition("Verified", PATIENCE)?;
    assert_eq!(status["quarantine"]["commands"], 0, "{}", status["quarantine"]);
    // 20 rounds had 5 each: the key in database 1 is one of them.
    assert!(status["progress"]["keysFiltered"].as_i64() >= Some(100), "{}", status["progress"]);
    assert!(status["progress"]["commandsFiltered"].as_i64() >= Some(1000), "{}", status["progress"]);
    verify(&manifest, 0)?;
    target.client()?.on(b"unasked")?.run(args!["SET", "unasked", "1"])?;
    verify(&manifest, 3)?;
    target.client()?.on(b"unasked")?.run(args!["DEL", "unasked"])?;

    // Nothing but what is left out: the place goes on all the same.
    let mut conn = source.conn()?;
    for _ in 0..100 {
        conn.run(args!["INCR", "skip:counter"])?;
    }
    let offset: i64 = conn.info("replication", "master_repl_offset")?.unwrap_or_default().parse()?;
    tool.wait_for("the place behind what is left out", PATIENCE, |status| {
        status["shards"][0]["appliedOffset"].as_i64() >= Some(offset)
    })?;
    // What cannot be told is counted.
    conn.run(args!["RENAME", "skip:counter", "counter"])?;
    let status = tool.wait_for("the quarantine", PATIENCE, |status| status["quarantine"]["commands"] == 1)?;
    let error = status["quarantine"]["samples"][0]["error"].as_str().unwrap_or_default();
    assert!(error.contains("left out"), "{status}");
    stop(tool).map(drop)
}

/// The names that are left out do not stand in the way; the others do.
#[test]
fn existing_keys_are_those_that_would_be_copied() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "user:1", "1"])?;
    target.conn()?.run(args!["MSET", "own", "1"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/filter/keys/include", json!([{"prefix": "user:"}]));
    assert_eq!(Tool::once("check", &manifest)?.code, 0);
    target.conn()?.run(args!["SET", "user:2", "1"])?;
    let finished = Tool::once("check", &manifest)?;
    assert_eq!(finished.code, 1, "{}", finished.stdout);
    assert!(finished.stderr.contains("TargetNotEmpty"), "{}", finished.stderr);
    let wrong = manifest.set("/spec/filter/keys/include", json!([{"prefix": "a"}, {"regex": "("}]));
    let finished = Tool::once("check", &wrong)?;
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.contains("spec.filter.keys.include[1].regex"), "{}", finished.stderr);
    Ok(())
}
