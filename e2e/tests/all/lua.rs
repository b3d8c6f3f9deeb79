//! Scripts of `spec.filter.lua`: what they name, drop and change, in the snapshot and in the stream.

use anyhow::{Context, Result};
use e2e::client::{array, bytes, text};
use e2e::compare::{Rules, compare_with, wait_equal};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop, verify};
use e2e::{Cluster, Conn, Endpoint, Manifest, Options, Server, Tool, Version, args};

const VERSION: Version = Version::REDIS_7_0;

/// Another prefix, no streams, and a field of all hashes under it masked.
const SCRIPT: &str = r#"
local function renamed(key) return (key:gsub("^old:", "new:")) end

function key(k)
  if k.type == "stream" then return false end
  return {key = renamed(k.key), rewrite = k.type == "hash" and k.key:find("^old:") ~= nil}
end

function command(c)
  if c.name:find("^X") then return false end
  if (c.name == "HSET" or c.name == "HMSET") and c.args[1]:find("^old:") then
    for at = 2, #c.args, 2 do
      if c.args[at] == "second" then c.args[at + 1] = "masked" end
    end
  end
  for _, at in ipairs(c.keys) do c.args[at] = renamed(c.args[at]) end
  return c
end
"#;

/// The same done to every key of `source`, by hand, into `expected`.
fn expect(source: &Server, expected: &Server) -> Result<()> {
    let (mut from, mut to) = (source.conn()?, expected.conn()?);
    to.run(args!["FLUSHALL"])?;
    for key in array(&from.run(args!["KEYS", "*"])?) {
        let key = bytes(&key);
        let kind = from.text(args!["TYPE", key])?;
        if kind == "stream" || kind == "none" {
            continue;
        }
        let old = key.strip_prefix(b"old:");
        let name = old.map_or(key.clone(), |rest| [b"new:".as_slice(), rest].concat());
        let (dump, at) = (bytes(&from.run(args!["DUMP", key])?), from.number(args!["PEXPIRETIME", key])?);
        if dump.is_empty() {
            // Its time is over by now.
            continue;
        }
        to.run(args!["RESTORE", name, at.max(0).to_string(), dump, "ABSTTL"])?;
        if old.is_some() && kind == "hash" && to.number(args!["HEXISTS", name, "second"])? == 1 {
            to.run(args!["HSET", name, "second", "masked"])?;
        }
    }
    for library in array(&from.run(args!["FUNCTION", "LIST", "WITHCODE"])?) {
        let code = array(&library).pop().context("no code")?;
        to.run(args!["FUNCTION", "LOAD", "REPLACE", bytes(&code)])?;
    }
    Ok(())
}

#[test]
fn a_script_names_drops_and_masks_while_writes_go_on() -> Result<()> {
    named_dropped_and_masked("Replication")
}

/// What a scan reads again goes through `key` as the first time, and what vanishes by the name that `command` gives.
#[test]
fn a_scan_goes_through_the_script_with_all_that_changes() -> Result<()> {
    named_dropped_and_masked("Scan")
}

fn named_dropped_and_masked(way: &str) -> Result<()> {
    let source = Options::new(VERSION).with("notify-keyspace-events", "AE").start()?;
    let target = Cluster::start(VERSION, 3, 0)?;
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let mut conn = source.conn()?;
    for number in 0..50 {
        conn.run(args!["HSET", format!("old:hash:{number}"), "first", "1", "second", "secret"])?;
        conn.run(args!["SET", format!("old:text:{number}"), "1", "PX", "9000000"])?;
    }
    // In parts: larger than what is sent as a whole.
    let fields: Vec<String> = (0..40_000).map(|n| format!("field:{n}")).collect();
    for chunk in fields.chunks(1000) {
        let mut words: Vec<&[u8]> = vec![b"HSET", b"old:large"];
        chunk.iter().for_each(|field| words.extend([field.as_bytes(), b"a value of some length"]));
        conn.run(&words)?;
    }
    conn.run(args!["HSET", "old:large", "second", "secret"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/type", way)
        .set("/spec/filter/lua/inline", SCRIPT)
        .set("/spec/limits/maxRestoreBytes", "256Ki");
    let load = Load { prefix: "old:load".into(), ..Load::default() };
    let writer = Writer::start(&source.endpoint(), load)?;
    writer.wait_more(300, PATIENCE)?;
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    writer.wait_more(4_000, PATIENCE)?;
    writer.stop()?;
    // A command that becomes one over several slots.
    conn.run(args!["MSET", "old:a", "1", "b", "2", "old:c", "3"])?;
    conn.run(args!["RENAME", "old:a", "d"])?;
    conn.run(args!["HSET", "old:large", "last", "1"])?;
    // What the script leaves out takes the place of what it did not.
    conn.run(args!["DEL", "old:c"])?;
    conn.run(args!["XADD", "old:c", "*", "a", "b"])?;
    conn.run(args!["DEL", "old:hash:1"])?;
    conn.run(args!["SET", "old:hash:2", "a text now", "PX", "9000000"])?;

    let expected = Server::start(VERSION)?;
    expect(&source, &expected)?;
    let report = wait_equal(&expected.endpoint(), &target.endpoint(), PATIENCE)
        .with_context(|| format!("{:?}", tool.status()))?;
    assert!(report.keys > 200, "{report}");
    let status = tool.wait_condition("Verified", PATIENCE)?;
    assert_eq!(status["quarantine"]["commands"], 0, "{}", status["quarantine"]);
    let said = status["conditions"].to_string();
    assert!(said.contains("not compared, as filter.lua changes or drops them"), "{said}");
    assert!(status["progress"]["keysFiltered"].as_i64() >= Some(1), "{}", status["progress"]);
    assert!(status["progress"]["commandsFiltered"].as_i64() >= Some(1), "{}", status["progress"]);
    verify(&manifest, 0)?;
    stop(tool).map(drop)
}

/// A backup of which a server loads just what the script lets through, by every road into a file.
#[test]
fn a_script_decides_on_what_goes_into_a_file() -> Result<()> {
    let source = Options::new(VERSION).with("repl-diskless-sync-delay", "0").start()?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let mut conn = source.conn()?;
    // What is there holds for as long as this takes.
    for db in [0, 1, 9] {
        conn.select(db)?;
        for key in [0, 1] {
            conn.run(args!["DEL", format!("expiring:string:0:{key}"), format!("expiring:list:0:{key}")])?;
        }
        if db > 0 {
            conn.run(args!["FLUSHDB"])?;
        }
    }
    conn.select(0)?;
    for number in 0..50 {
        conn.run(args!["HSET", format!("old:hash:{number}"), "first", "1", "second", "secret"])?;
        conn.run(args!["PEXPIRE", format!("old:hash:{number}"), "90000000"])?;
        conn.run(args!["SET", format!("old:text \n%\u{fffd}:{number}"), "1", "PX", "9000000"])?;
    }
    conn.run(args!["RPUSH", b"old:\xff\x00".as_slice(), vec![b'x'; 3 << 20]])?;
    let expected = Server::start(VERSION)?;
    expect(&source, &expected)?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let into = |kind: &str, name: &str| {
        let member = if kind == "Json" { "json" } else { "rdbFile" };
        Manifest::between(&source.endpoint(), &source.endpoint())
            .set("/spec/target", serde_json::json!({"type": kind, member: {"uri": path(name)}}))
            .set("/spec/filter/lua/inline", SCRIPT)
    };
    let from_file = |manifest: Manifest, file: &str| {
        manifest.set("/spec/source", serde_json::json!({"type": "RdbFile", "rdbFile": {"uris": [file]}}))
    };
    let done = |manifest: &Manifest| -> Result<serde_json::Value> {
        let finished = Tool::run(manifest, &[])?.wait_exit(PATIENCE)?;
        assert_eq!(finished.code, 0, "{}", finished.stderr);
        let status = finished.status()?;
        assert!(status["progress"]["keysFiltered"].as_i64() >= Some(1), "{}", status["progress"]);
        assert_eq!(status["quarantine"]["commands"], 0, "{}", status["quarantine"]);
        Ok(status)
    };
    let saved = source.save()?.to_string_lossy().into_owned();
    for (way, name) in [("Replication", "replicated.rdb"), ("Scan", "scanned.rdb"), ("RdbFile", "again.rdb")]
    {
        let manifest = match way {
            "RdbFile" => from_file(into("RdbFile", name), &saved),
            way => into("RdbFile", name).set("/spec/source/type", way),
        };
        done(&manifest).context(way)?;
        let loaded = Options::new(VERSION).snapshot(folder.path().join(name).as_path()).start()?;
        let report = compare_with(&expected.endpoint(), &loaded.endpoint(), &Rules::complete())?;
        assert!(report.differences.is_empty() && report.keys > 150, "{way}: {report}");
    }
    // The same as lines.
    done(&from_file(into("Json", "lines.json"), &saved))?;
    let decoded = Tool::plain(&["decode", &path("again.rdb"), "--out", &path("decoded.json")])?;
    assert_eq!(decoded.code, 0, "{}", decoded.stderr);
    let lines = std::fs::read_to_string(path("lines.json"))?;
    assert_eq!(lines, std::fs::read_to_string(path("decoded.json"))?);
    assert!(lines.contains("masked") && !lines.contains("\"secret\""));

    // Names that are given twice would keep a server from loading the file.
    let script = "function key(k)\n  if k.type == 'hash' then return {key = 'the one'} end\n  return k.type == 'string'\nend";
    for kind in ["RdbFile", "Json"] {
        let manifest = from_file(into(kind, &format!("{kind}.twice")), &saved)
            .set("/spec/filter/lua/inline", script)
            .set("/spec/failurePolicy/maxQuarantined", 100_000);
        let finished = Tool::run(&manifest, &[])?.wait_exit(PATIENCE)?;
        let status = finished.status()?;
        assert_eq!(finished.code, 1, "{status}");
        let samples = status["quarantine"]["samples"].to_string();
        assert!(samples.contains("has the name \\\"the one\\\" already"), "{samples}");
        assert!(status["quarantine"]["kinds"]["Commands"].as_i64() > Some(49), "{}", status["quarantine"]);
        assert!(status["message"].to_string().contains("were left out"), "{status}");
    }
    let loaded = Options::new(VERSION).snapshot(folder.path().join("RdbFile.twice").as_path()).start()?;
    assert_eq!(loaded.conn()?.number(args!["EXISTS", "the one", "old:hash:1"])?, 1);
    Ok(())
}

/// What a script fails at is set aside with its line, and the rest goes on.
#[test]
fn errors_of_a_script_are_quarantined_with_their_line() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let script = "function key(k)\n  if k.key == 'bad' then error('not this one') end\nend\n\
                  function command(c)\n  if c.name == 'APPEND' then while true do end end\nend\n";
    source.conn()?.run(args!["MSET", "bad", "1", "good", "1"])?;
    let manifest =
        Manifest::between(&source.endpoint(), &target.endpoint()).set("/spec/filter/lua/inline", script);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["APPEND", "good", "x"])?;
    source.conn()?.run(args!["SET", "after", "1"])?;
    let status = tool.wait_for("both errors", PATIENCE, |status| status["quarantine"]["commands"] == 2)?;
    let samples = status["quarantine"]["samples"].to_string();
    assert!(samples.contains("filter.lua:2: not this one"), "{samples}");
    assert!(samples.contains("filter.lua:5: more than"), "{samples}");
    tool.wait_for("the rest", PATIENCE, |status| status["replication"]["lagBytes"] == 0)?;
    assert_eq!(target.conn()?.text(args!["GET", "after"])?, "1");
    assert_eq!(text(&target.conn()?.run(args!["EXISTS", "bad"])?), "0");
    stop(tool).map(drop)
}

/// What one example makes of some keys that are there, and of some commands that follow.
struct Example {
    name: &'static str,
    cluster: bool,
    before: &'static [&'static str],
    then: &'static [&'static str],
    expected: &'static [&'static str],
}

const EXAMPLES: [Example; 5] = [
    Example {
        name: "filters",
        cluster: false,
        before: &["SET user:1 1", "SET user:1:tmp 1", "SET other 1", "RPUSH order:1:items a"],
        then: &["MSET user:2 2 other 2 user:2:tmp 2", "RPUSH order:1:items b", "RPUSH order:1 x"],
        expected: &["MSET user:1 1 user:2 2", "RPUSH order:1:items a b"],
    },
    Example {
        name: "lua-rename-prefix",
        cluster: false,
        before: &["SET old:1 a", "SET other 1", "RPUSH old:list 1 2"],
        then: &["MSET old:2 b other 2", "RENAME old:1 old:3", "MULTI", "INCR old:n", "INCR old:n", "EXEC"],
        expected: &["MSET new:3 a new:2 b other 2 new:n 2", "RPUSH new:list 1 2"],
    },
    Example {
        name: "lua-drop-type",
        cluster: false,
        before: &["XADD events 1-1 a b", "SET text 1"],
        then: &["XADD events 2-1 a b", "XADD more 1-1 a b", "SET text 2", "DEL more"],
        expected: &["SET text 2"],
    },
    Example {
        name: "lua-mask-field",
        cluster: false,
        before: &[
            "HSET user:1 name Ada email ada@x",
            "EXPIREAT user:1 4000000000",
            "HSET shop:1 email shop@x",
        ],
        then: &["HSET user:1 phone 12 visits 3", "HSET user:2 email bob@x", "HINCRBY user:2 visits 1"],
        expected: &[
            "HSET user:1 name Ada email *** phone *** visits 3",
            "EXPIREAT user:1 4000000000",
            "HSET user:2 email *** visits 1",
            "HSET shop:1 email shop@x",
        ],
    },
    Example {
        name: "lua-split-hash-tags",
        cluster: true,
        before: &["SET {acme}:1 a", "SADD {acme}:s 1 2", "SADD {acme}:t 2 3"],
        then: &[
            "MSET {acme}:2 b {acme}:3 c",
            "SINTERSTORE {acme}:both {acme}:s {acme}:t",
            "RENAME {acme}:1 {acme}:4",
            "MULTI",
            "INCR {acme}:n",
            "INCR {acme}:m",
            "EXEC",
        ],
        expected: &[
            "MSET acme:2 b acme:3 c acme:4 a acme:n 1 acme:m 1",
            "SADD acme:s 1 2",
            "SADD acme:t 2 3",
            "SADD acme:both 2",
        ],
    },
];

fn run(conn: &mut Conn, commands: &[&str]) -> Result<()> {
    for command in commands {
        let words: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
        conn.run(&words).with_context(|| (*command).to_owned())?;
    }
    Ok(())
}

/// Each as it stands in the folder, by a run for the snapshot and another that goes on with the commands.
#[test]
fn the_examples_do_what_they_say() -> Result<()> {
    for Example { name, cluster, before, then, expected } in EXAMPLES {
        let (source, wanted) = (Server::start(VERSION)?, Server::start(VERSION)?);
        let (single, many);
        let (endpoint, first): (Endpoint, String) = if cluster {
            many = Cluster::start(VERSION, 2, 0)?;
            (many.endpoint(), many.nodes.first().context("no node")?.address())
        } else {
            single = Server::start(VERSION)?;
            (single.endpoint(), single.address())
        };
        let folder = tempfile::tempdir()?;
        let (file, data) = (folder.path().join("m.yaml"), folder.path().join("data"));
        let example = format!("{}/../examples/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let manifest = std::fs::read_to_string(&example)?
            .replace("redis-old:6379", &source.address())
            .replace("redis-new:6379", &first);
        std::fs::write(&file, manifest)?;
        let copy = || -> Result<()> {
            let (file, data) = (file.to_string_lossy(), data.to_string_lossy());
            let words =
                ["run", "-f", &file, "--until", "InSync", "--data-dir", &data, "--listen", "127.0.0.1:0"];
            let finished = Tool::plain(&[words.as_slice(), &["--output", "json"]].concat())?;
            assert_eq!(finished.code, 0, "{name}: {}\n{}", finished.stdout, finished.stderr);
            let status = finished.status()?;
            assert_eq!(status["quarantine"]["commands"], 0, "{name}: {status}");
            Ok(())
        };
        run(&mut source.conn()?, before)?;
        copy()?;
        run(&mut source.conn()?, then)?;
        copy()?;
        run(&mut wanted.conn()?, expected)?;
        wait_equal(&wanted.endpoint(), &endpoint, PATIENCE).context(name)?;
    }
    Ok(())
}
