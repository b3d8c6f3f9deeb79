//! Files as source and as target: RDB files of every version into servers, servers into files, on disk, behind
//! HTTP and in an object store.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::{array, bytes};
use e2e::compare::{Rules, compare_with};
use e2e::dataset::Dataset;
use e2e::proxy::{Proxy, Way};
use e2e::scenario::{PATIENCE, wait_noted};
use e2e::tool::{Finished, condition};
use e2e::{Cluster, Endpoint, Manifest, Options, Server, Tool, Version, args};
use serde_json::{Value, json};
use tempfile::TempDir;

const VERSION: Version = Version::REDIS_7_0;

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("path")?.to_owned())
}

fn from_files(uris: &[String], target: &Endpoint) -> Manifest {
    Manifest::between(target, target)
        .set("/spec/source", json!({"type": "RdbFile", "rdbFile": {"uris": uris}}))
        .set("/spec/verification/mode", "Off")
}

fn to_file(kind: &str, source: &Endpoint, uri: &str) -> Manifest {
    let member = if kind == "Json" { "json" } else { "rdbFile" };
    Manifest::between(source, source).set("/spec/target", json!({"type": kind, member: {"uri": uri}}))
}

fn run(manifest: &Manifest) -> Result<Finished> {
    Tool::run(manifest, &[])?.wait_exit(PATIENCE)
}

fn done(manifest: &Manifest) -> Result<Finished> {
    let finished = run(manifest)?;
    ensure!(finished.code == 0, "exit {}: {}\n{:?}", finished.code, finished.stderr, finished.status());
    let status = finished.status()?;
    for kind in ["FullSynced", "InSync", "Succeeded", "Finished"] {
        ensure!(condition(&status, kind).as_deref() == Some("True"), "{kind}: {status}");
    }
    ensure!(status["phase"] == "Completed", "{status}");
    Ok(finished)
}

/// The judge of a file is the server's own program, and a server that loads it.
fn check_rdb(file: &Path) -> Result<()> {
    let output = Command::new("redis-check-rdb").arg(file).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("RDB looks OK"), "{}: {said}", file.display());
    Ok(())
}

fn filled(version: Version) -> Result<Server> {
    let mut options = Options::new(version);
    if version.has(3, 0) {
        options = options.with("repl-diskless-sync-delay", "0");
    }
    let server = options.start()?;
    Dataset::default().rounds(1).fill(&mut server.client()?)?;
    Ok(server)
}

/// A table that grows or shrinks while it is read is in another order the next time.
fn settled_lines(path: &Path) -> Result<Vec<Value>> {
    let mut lines = sorted_lines(path)?;
    for line in &mut lines {
        let unordered = line["type"] == "set" || line["type"] == "hash";
        if let Some(Value::Array(elements)) = line.get_mut("value").filter(|_| unordered) {
            elements.sort_by_key(Value::to_string);
        }
    }
    Ok(lines)
}

/// So that what is there holds for as long as a test takes.
fn without_what_expires_soon(server: &Server) -> Result<()> {
    let mut conn = server.conn()?;
    for db in [0, 1, 9] {
        conn.select(db)?;
        for key in [0, 1] {
            conn.run(args!["DEL", format!("expiring:string:0:{key}"), format!("expiring:list:0:{key}")])?;
        }
    }
    Ok(())
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}

fn sorted_lines(path: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path)?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines.into_iter().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Every version's own file into a server, and every version's keys into a file which a server loads.
#[test]
fn a_file_of_each_version_becomes_a_server_and_a_server_becomes_a_file() -> Result<()> {
    for version in Version::ALL {
        let source = filled(version)?;
        let file = source.save()?;
        let newest = if version.valkey { Version::VALKEY_9_1 } else { Version::REDIS_8_2 };
        let target = Server::start(newest)?;
        let finished =
            done(&from_files(&[text(&file)?], &target.endpoint())).with_context(|| version.to_string())?;
        let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
        assert!(report.differences.is_empty() && report.keys > 100, "{version}: {report}");
        let own = target.conn()?.run(args!["KEYS", "redis-migration:*"])?;
        assert_eq!(own, redis::Value::Array(vec![]), "{version}: {}", finished.stderr);

        let folder = tempfile::tempdir()?;
        let uri = format!("file://{}/{{shard}}.rdb", text(folder.path())?);
        done(&to_file("RdbFile", &source.endpoint(), &uri)).with_context(|| version.to_string())?;
        let written = files_in(folder.path())?;
        assert_eq!(written.len(), 1, "{written:?}");
        if !version.valkey && !version.has(7, 4) {
            check_rdb(&written[0])?;
        }
        let loaded = Options::new(version).snapshot(&written[0]).start()?;
        let report = compare_with(&source.endpoint(), &loaded.endpoint(), &Rules::default())?;
        assert!(report.differences.is_empty() && report.keys > 100, "{version}: {report}");
    }
    Ok(())
}

/// What a user reads who may not replicate: files that a server loads, and the lines of a decoded file.
#[test]
fn a_scan_becomes_a_file() -> Result<()> {
    for version in [Version::REDIS_2_8, VERSION, Version::REDIS_8_2, Version::VALKEY_9_1] {
        let source = filled(version)?;
        without_what_expires_soon(&source)?;
        let manifest_of = |kind: &str, uri: &str| -> Result<Manifest> {
            let manifest = to_file(kind, &source.endpoint(), uri).set("/spec/source/type", "Scan");
            if !version.has(7, 0) {
                return Ok(manifest);
            }
            source.conn()?.run(args![
                "ACL",
                "SETUSER",
                "scanner",
                "on",
                ">scan",
                "~*",
                "+@read",
                "+select",
                "+info",
                "+ping",
                "+function|list"
            ])?;
            Ok(manifest.login("source", "scanner", "scan"))
        };
        let folder = tempfile::tempdir()?;
        let (rdb, lines) = (folder.path().join("scanned.rdb"), folder.path().join("scanned.jsonl"));
        done(&manifest_of("RdbFile", &text(&rdb)?)?).with_context(|| version.to_string())?;
        if !version.valkey && !version.has(7, 4) {
            check_rdb(&rdb)?;
        }
        let loaded = Options::new(version).snapshot(&rdb).start()?;
        let report = compare_with(&source.endpoint(), &loaded.endpoint(), &Rules::complete())?;
        assert!(report.differences.is_empty() && report.keys > 100, "{version}: {report}");

        done(&manifest_of("Json", &text(&lines)?)?).with_context(|| version.to_string())?;
        let decoded = folder.path().join("decoded.jsonl");
        let said = Tool::plain(&["decode", &text(&rdb)?, "--out", &text(&decoded)?])?;
        assert_eq!(said.code, 0, "{}", said.stderr);
        let [mut lines, mut decoded] = [settled_lines(&lines)?, settled_lines(&decoded)?];
        if !version.has(7, 0) {
            // When a key expires is told as how long that is.
            let members = lines.iter_mut().chain(&mut decoded).filter_map(Value::as_object_mut);
            members.for_each(|line| _ = line.remove("expireAt"));
        }
        assert_eq!(lines, decoded, "{version}");
        assert_eq!(files_in(folder.path())?.len(), 3, "{:?}", files_in(folder.path())?);
    }
    Ok(())
}

/// A scan that breaks off goes on in the same file; one that is stopped leaves none.
#[test]
fn a_scan_that_breaks_off_leaves_a_whole_file_or_none() -> Result<()> {
    let source = Server::start(VERSION)?;
    long_file(&source)?;
    let proxy = Proxy::start(&source.address())?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("scanned.rdb");
    let manifest = to_file("RdbFile", &source.endpoint(), &text(&file)?)
        .set("/spec/source/type", "Scan")
        .set("/spec/source/redis/endpoints", json!([proxy.address()]));
    proxy.limit(Some(2 << 20));
    let stopped = |manifest: &Manifest| -> Result<Finished> {
        let tool = Tool::run(manifest, &[])?;
        tool.wait_for("keys are read", PATIENCE, |status| {
            status["shards"][0]["keysApplied"].as_i64().is_some_and(|keys| keys > 3000)
        })?;
        assert!(!file.exists() && files_in(folder.path())?.len() == 1, "{:?}", files_in(folder.path())?);
        tool.terminate()?;
        tool.expect_exit(4, PATIENCE)
    };
    stopped(&manifest)?;
    assert_eq!(files_in(folder.path())?, Vec::<PathBuf>::new());
    proxy.limit(None);
    proxy.cut_after(6 << 20, Way::Down);
    let finished = done(&manifest)?;
    assert!(!proxy.defuse() && finished.stderr.contains("the scan broke off"), "{}", finished.stderr);
    assert_eq!(files_in(folder.path())?, std::slice::from_ref(&file));
    check_rdb(&file)?;
    let loaded = Options::new(VERSION).snapshot(&file).start()?;
    let report = compare_with(&source.endpoint(), &loaded.endpoint(), &Rules::complete())?;
    assert!(report.differences.is_empty() && report.keys > 60_000, "{report}");
    Ok(())
}

/// Lines are the same by whatever road, and a file that is there stays unless it may go.
#[test]
fn json_lines_are_written_whole_or_not_at_all() -> Result<()> {
    let source = filled(VERSION)?;
    let rdb = source.save()?;
    let folder = tempfile::tempdir()?;
    let lines = folder.path().join("decoded");
    let decoded = Tool::plain(&["decode", &text(&rdb)?, "--out", &text(&lines)?])?;
    assert_eq!(decoded.code, 0, "{}", decoded.stderr);
    let expected = sorted_lines(&lines)?;
    let (of_server, of_file) = (folder.path().join("server.json"), folder.path().join("file.json"));
    done(&to_file("Json", &source.endpoint(), &text(&of_server)?))?;
    let from_rdb = to_file("Json", &source.endpoint(), &text(&of_file)?)
        .set("/spec/source", json!({"type": "RdbFile", "rdbFile": {"uris": [text(&rdb)?]}}));
    done(&from_rdb)?;
    assert_eq!(sorted_lines(&of_server)?, expected);
    assert_eq!(std::fs::read(&of_file)?, std::fs::read(&lines)?);

    std::fs::write(&of_file, "mine")?;
    let refused = run(&from_rdb)?;
    assert_eq!(refused.code, 1, "{:?}", refused.status());
    assert!(refused.status()?["message"].to_string().contains("is there already"), "{:?}", refused.status());
    assert_eq!(std::fs::read(&of_file)?, b"mine");
    done(&from_rdb.clone().set("/spec/target/existingKeys", "Replace"))?;
    assert_eq!(std::fs::read(&of_file)?, std::fs::read(&lines)?);

    // Nothing stands under the name of a file that cannot be whole.
    let cut = folder.path().join("cut.rdb");
    let whole = std::fs::read(&rdb)?;
    std::fs::write(&cut, &whole[..whole.len() - 20])?;
    std::fs::remove_file(&of_file)?;
    for kind in ["Json", "RdbFile"] {
        let manifest = to_file(kind, &source.endpoint(), &text(&of_file)?)
            .set("/spec/source", json!({"type": "RdbFile", "rdbFile": {"uris": [text(&cut)?]}}));
        let failed = run(&manifest)?;
        let message = failed.status()?["message"].to_string();
        assert!(
            failed.code == 1 && message.contains("cut.rdb") && message.contains("truncated"),
            "{message}"
        );
        let at = format!("byte {}", whole.len() - 20);
        assert!(message.contains(&at), "{message}");
    }
    let left: Vec<PathBuf> = files_in(folder.path())?;
    assert!(!left.contains(&of_file) && left.len() == 3, "{left:?}");
    Ok(())
}

#[test]
fn a_damaged_file_is_told_with_place_and_count() -> Result<()> {
    let source = filled(VERSION)?;
    // Of these some are in the first half, whatever the order.
    let fill = "for i = 1, 3000 do redis.call('SET', 'small:' .. i, i) end";
    source.conn()?.run(args!["EVAL", fill, "0"])?;
    let whole = std::fs::read(source.save()?)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("dump.rdb");
    let damaged = |mut bytes: Vec<u8>, at: usize| {
        bytes[at] ^= 1;
        bytes
    };
    let end = whole.len();
    let trailing = [&whole[..], b"*1\r\n$4\r\nPING\r\n"].concat();
    for (bytes, said) in [
        (whole[..end / 2].to_vec(), format!("byte {}", end / 2)),
        (damaged(whole.clone(), end - 1), "checksum".to_owned()),
        (trailing, format!("byte {end}")),
    ] {
        let target = Server::start(VERSION)?;
        std::fs::write(&file, bytes)?;
        let finished = run(&from_files(&[text(&file)?], &target.endpoint()))?;
        let message = finished.status()?["message"].as_str().unwrap_or_default().to_owned();
        assert!(finished.code == 1 && message.contains(&said) && message.contains("dump.rdb"), "{message}");
        let mut conn = target.conn()?;
        let there: i64 = [0, 1, 9]
            .into_iter()
            .map(|db| {
                conn.select(db)?;
                conn.number(args!["DBSIZE"])
            })
            .sum::<Result<i64>>()?;
        // Those that are kept to go on from here.
        let own = 4;
        let told: i64 = message
            .split("; ")
            .find_map(|part| part.strip_suffix(" key(s) were applied before, and stay")?.parse().ok())
            .with_context(|| message.clone())?;
        assert!(told > 10 && (told..=told + own).contains(&there), "{told}, {there}: {message}");
    }
    for (bytes, said) in [(&b"not an RDB at all"[..], "no RDB that can be read"), (b"", "too short")] {
        std::fs::write(&file, bytes)?;
        let finished = run(&from_files(&[text(&file)?], &source.endpoint()))?;
        let message = finished.status()?["message"].to_string();
        assert!(finished.code == 1 && (message.contains(said) || message.contains("not empty")), "{message}");
    }
    Ok(())
}

/// Shards of a cluster into a file each, and these into a cluster of another shape; what has expired stays away.
#[test]
fn a_clusters_backup_is_restored_into_another() -> Result<()> {
    let source = Cluster::start(VERSION, 2, 0)?;
    let mut client = source.client()?;
    Dataset::default().rounds(1).databases(&[]).fill(&mut client)?;
    let folder = tempfile::tempdir()?;
    let plain = to_file("RdbFile", &source.endpoint(), &format!("{}/one.rdb", text(folder.path())?));
    let refused = run(&plain)?;
    assert!(
        refused.code == 1 && refused.status()?["message"].to_string().contains("{shard}"),
        "{:?}",
        refused.status()
    );
    let manifest = to_file("RdbFile", &source.endpoint(), &format!("{}/{{shard}}.rdb", text(folder.path())?));
    let checked = Tool::once("check", &manifest)?;
    assert!(
        checked.code == 0 && checked.stdout.contains("writable"),
        "{} {}",
        checked.stdout,
        checked.stderr
    );
    done(&manifest)?;
    let files = files_in(folder.path())?;
    assert_eq!(files.len(), 2, "{files:?}");
    files.iter().try_for_each(|file| check_rdb(file))?;
    let target = Cluster::start(VERSION, 3, 0)?;
    let finished = done(&from_files(&[format!("{}/*.rdb", text(folder.path())?)], &target.endpoint()))?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty() && report.keys > 70, "{report}\n{}", finished.stderr);
    assert_eq!(finished.status()?["shards"].as_array().map(Vec::len), Some(2));
    Ok(())
}

#[test]
fn keys_whose_time_is_over_are_left_out_and_counted() -> Result<()> {
    let source = Options::new(VERSION).with("enable-debug-command", "yes").start()?;
    let mut conn = source.conn()?;
    // A server writes what it has not met yet.
    conn.run(args!["DEBUG", "SET-ACTIVE-EXPIRE", "0"])?;
    conn.run(args!["SET", "stays", "1"])?;
    conn.run(args!["SET", "later", "1", "PX", "100000000"])?;
    for key in 0..10 {
        conn.run(args!["SET", format!("over:{key}"), "1", "PX", "1"])?;
    }
    let file = source.save()?;
    let target = Server::start(VERSION)?;
    let finished = done(&from_files(&[text(&file)?], &target.endpoint()))?;
    assert_eq!(target.conn()?.number(args!["DBSIZE"])?, 2);
    assert!(target.conn()?.number(args!["PTTL", "later"])? > 90_000_000);
    assert_eq!(finished.status()?["shards"][0]["keysExpired"], 10, "{:?}", finished.status());
    Ok(())
}

/// What the filter leaves out and the script changes, of a file as of a server.
#[test]
fn a_file_goes_through_filter_and_script() -> Result<()> {
    const SCRIPT: &str = "function key(k)
        if k.type == 'stream' then return false end
        return {key = k.key:gsub('^user:', 'u:'), rewrite = k.type == 'hash', expireAt = k.key ~= 'user:once' and k.expireAt}
    end
    function command(c)
        if c.name ~= 'HMSET' and c.name ~= 'HSET' then return true end
        c.args[1] = c.args[1]:gsub('^user:', 'u:')
        for at = 2, #c.args, 2 do if c.args[at] == 'email' then c.args[at + 1] = '***' end end
        return c
    end";
    let (source, target, wanted) =
        (Server::start(VERSION)?, Server::start(VERSION)?, Server::start(VERSION)?);
    let (mut from, mut to) = (source.conn()?, wanted.conn()?);
    let fields: Vec<String> = (0..20_000).map(|n| format!("field:{n}")).collect();
    for chunk in fields.chunks(1000) {
        for (conn, key) in [(&mut from, "user:large"), (&mut to, "u:large")] {
            let mut words: Vec<&[u8]> = vec![b"HSET", key.as_bytes()];
            chunk.iter().for_each(|field| words.extend([field.as_bytes(), b"a value of some length"]));
            conn.run(&words)?;
        }
    }
    for (conn, prefix, email) in [(&mut from, "user", "ada@x"), (&mut to, "u", "***")] {
        conn.run(args!["HSET", format!("{prefix}:1"), "name", "Ada", "email", email])?;
        conn.run(args!["HSET", format!("{prefix}:large"), "email", email])?;
        conn.run(args!["SET", format!("{prefix}:text"), "1", "PXAT", "4000000000000"])?;
        conn.run(args!["RPUSH", format!("{prefix}:list"), "1", "2"])?;
        conn.run(args!["SET", format!("{prefix}:once"), "1"])?;
    }
    from.run(args!["PEXPIREAT", "user:once", "4000000000000"])?;
    from.run(args!["XADD", "user:stream", "1-1", "a", "b"])?;
    from.run(args!["MSET", "user:1:tmp", "1", "other", "1"])?;
    from.select(9)?;
    from.run(args!["SET", "user:9", "1"])?;
    let file = source.save()?;
    target.conn()?.run(args!["SET", "kept", "1"])?;
    let manifest = from_files(&[text(&file)?], &target.endpoint())
        .set("/spec/limits/maxRestoreBytes", "256Ki")
        .set("/spec/target/existingKeys", "Replace")
        .set(
            "/spec/filter",
            json!({
                "databases": {"exclude": [9]},
                "keys": {"include": [{"prefix": "user:"}], "exclude": [{"regex": ":tmp$"}]},
                "lua": {"inline": SCRIPT},
            }),
        );
    let finished = done(&manifest)?;
    to.run(args!["SET", "kept", "1"])?;
    let report = compare_with(&wanted.endpoint(), &target.endpoint(), &Rules::complete())?;
    assert!(report.differences.is_empty() && report.keys == 6, "{report}");
    let progress = finished.status()?["progress"].clone();
    assert_eq!(progress["keysFiltered"], 4, "{progress}");
    assert_eq!(progress["keysApplied"], 5, "{progress}");
    Ok(())
}

/// From a server by either way, and from another file: what the filter leaves is a file like any other.
#[test]
fn a_filtered_file_is_whole() -> Result<()> {
    let source = Server::start(VERSION)?;
    Dataset { rounds: 1, long: 3 << 20, ..Dataset::default() }.fill(&mut source.client()?)?;
    without_what_expires_soon(&source)?;
    let rdb = source.save()?;
    // The same taken away by hand.
    let wanted = Options::new(VERSION).snapshot(&rdb).start()?;
    let mut conn = wanted.conn()?;
    let mut gone = 0;
    for db in [0, 1, 9] {
        conn.select(db)?;
        for key in array(&conn.run(args!["KEYS", "*"])?) {
            let key = bytes(&key);
            if db == 9 || key.starts_with(b"hash:") || key == b"large:noise" {
                gone += conn.number(args!["DEL", key])?;
            }
        }
    }
    let filter = json!({
        "databases": {"exclude": [9]},
        "keys": {"exclude": [{"glob": "hash:*"}, {"regex": "^large:noise$"}]},
    });
    let folder = tempfile::tempdir()?;
    let mut lines = Vec::new();
    for way in ["Replication", "Scan", "RdbFile"] {
        let file = |ending: &str| text(&folder.path().join(format!("{way}.{ending}")));
        let road = |kind: &str, uri: &str| -> Result<Manifest> {
            let manifest = to_file(kind, &source.endpoint(), uri).set("/spec/filter", filter.clone());
            Ok(match way {
                "RdbFile" => {
                    manifest.set("/spec/source", json!({"type": way, "rdbFile": {"uris": [text(&rdb)?]}}))
                }
                _ => manifest.set("/spec/source/type", way),
            })
        };
        let finished = done(&road("RdbFile", &file("rdb")?)?).context(way)?;
        assert_eq!(finished.status()?["progress"]["keysFiltered"], gone, "{way}");
        check_rdb(Path::new(&file("rdb")?))?;
        let loaded = Options::new(VERSION).snapshot(Path::new(&file("rdb")?)).start()?;
        let report = compare_with(&wanted.endpoint(), &loaded.endpoint(), &Rules::complete())?;
        assert!(report.differences.is_empty() && report.keys > 70, "{way}: {report}");
        done(&road("Json", &file("json")?)?).context(way)?;
        lines.push(settled_lines(Path::new(&file("json")?))?);
        assert_eq!(lines.first(), lines.last(), "{way}");
    }
    let decoded = folder.path().join("decoded");
    assert_eq!(Tool::plain(&["decode", &text(&wanted.save()?)?, "--out", &text(&decoded)?])?.code, 0);
    assert_eq!(Some(&settled_lines(&decoded)?), lines.first());
    Ok(())
}

/// A file that takes long enough to be killed in.
fn long_file(source: &Server) -> Result<PathBuf> {
    let mut conn = source.conn()?;
    let script = "for i = 1, 60000 do redis.call('SET', 'k:' .. i, string.rep('v', 200)) end \
                  for i = 1, 20000 do redis.call('RPUSH', 'list:' .. i % 100, i) end";
    conn.run(args!["EVAL", script, "0"])?;
    source.save()
}

/// Lists show a key that was loaded twice, and where the second run began shows that it did go on.
#[test]
fn a_killed_run_goes_on_in_the_file_and_not_in_another() -> Result<()> {
    let source = Server::start(VERSION)?;
    let file = long_file(&source)?;
    let targets = [Server::start(VERSION)?];
    let [target] = &targets;
    let proxy = Proxy::start(&target.address())?;
    let manifest = from_files(&[text(&file)?], &target.endpoint())
        .set("/spec/target/redis/endpoints", vec![proxy.address()])
        .set("/spec/target/redis/topology", "Standalone");
    let folder = Arc::new(TempDir::new()?);
    // Slow enough to be killed in the middle.
    proxy.limit(Some(1_000_000));
    let mut tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
    wait_noted(&targets, 100_000)?;
    tool.kill()?;
    let before = target.conn()?.number(args!["DBSIZE"])?;
    assert!(before > 100 && before < 60_000, "{before}");
    proxy.limit(None);
    let resumed = Tool::run_in(Arc::clone(&folder), &manifest, &[])?.wait_exit(PATIENCE)?;
    assert!(resumed.code == 0, "{}", resumed.stderr);
    assert!(
        resumed.stderr.contains("going on with the file where an earlier run stopped"),
        "{}",
        resumed.stderr
    );
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty(), "{report}");

    // Another content under the same name begins anew, and says so.
    target.conn()?.run(args!["FLUSHALL"])?;
    proxy.limit(Some(1_000_000));
    let mut tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
    wait_noted(&targets, 100_000)?;
    tool.kill()?;
    proxy.limit(None);
    source.conn()?.run(args!["DEL", "k:1", "k:2"])?;
    std::fs::copy(source.save()?, folder.path().join("other.rdb"))?;
    std::fs::rename(folder.path().join("other.rdb"), &file)?;
    let anew = Tool::run_in(folder, &manifest, &[])?.wait_exit(PATIENCE)?;
    assert!(
        anew.code == 0 && anew.stderr.contains("the file is another than the one of an earlier run"),
        "{}",
        anew.stderr
    );
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty(), "{report}");
    Ok(())
}

/// Serves one file, with or without parts, and breaks off the first answer in the middle.
struct Http {
    address: String,
    requests: Arc<AtomicUsize>,
}

impl Http {
    /// `tagged`: it tells an ETag, the same all the time; else a time, which is a later one once the connection broke.
    fn start(content: Vec<u8>, parts: bool, tagged: bool) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let requests = Arc::new(AtomicUsize::new(0));
        let (gets, content) = (Arc::clone(&requests), Arc::new(content));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (gets, content) = (Arc::clone(&gets), Arc::clone(&content));
                std::thread::spawn(move || serve(stream, &content, (parts, tagged), &gets));
            }
        });
        Ok(Self { address, requests })
    }
}

impl Http {
    fn source(&self, target: &Server) -> Manifest {
        let uri = format!("http://{}/dump.rdb?signature=swordfish", self.address);
        from_files(&[uri], &target.endpoint())
            .set("/spec/source/rdbFile/credentialsSecretRef", json!({"name": "http"}))
            .secret("http", "authorization", "Bearer sesame")
    }
}

fn serve(
    mut stream: TcpStream,
    content: &[u8],
    (parts, tagged): (bool, bool),
    gets: &AtomicUsize,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if lines.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let lower = head.to_ascii_lowercase();
        if !head.contains("signature=swordfish") || !lower.contains("authorization: bearer sesame") {
            stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").ok()?;
            continue;
        }
        let from =
            lower.split("range: bytes=").nth(1).and_then(|range| range.split('-').next()?.parse().ok());
        let from: usize = from.filter(|_| parts).unwrap_or(0);
        let version = match (tagged, gets.load(Ordering::SeqCst)) {
            (true, _) => "ETag: \"one\"",
            (false, 0 | 1) => "Last-Modified: Mon, 02 Nov 2026 08:00:00 GMT",
            (false, _) => "Last-Modified: Tue, 03 Nov 2026 08:00:00 GMT",
        };
        let (status, total) = (if from > 0 { "206 Partial Content" } else { "200 OK" }, content.len());
        let mut answer = format!("HTTP/1.1 {status}\r\n{version}\r\nContent-Length: {}\r\n", total - from);
        if from > 0 {
            answer += &format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1);
        }
        stream.write_all((answer + "\r\n").as_bytes()).ok()?;
        if head.starts_with("HEAD") {
            continue;
        }
        let body = content.get(from..)?;
        if gets.fetch_add(1, Ordering::SeqCst) == 1 {
            // Behind the look at its beginning: the one that is to be gone on with.
            stream.write_all(body.get(..body.len() / 2)?).ok()?;
            return None;
        }
        stream.write_all(body).ok()?;
    }
}

#[test]
fn a_file_behind_http_is_read_on_after_the_connection_broke() -> Result<()> {
    let source = Server::start(VERSION)?;
    let content = std::fs::read(long_file(&source)?)?;
    for parts in [true, false] {
        let http = Http::start(content.clone(), parts, true)?;
        let target = Server::start(VERSION)?;
        let manifest = http.source(&target);
        let finished = done(&manifest)?;
        let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
        assert!(report.differences.is_empty() && report.keys > 60_000, "{report}");
        assert!(http.requests.load(Ordering::SeqCst) >= 3);
        let said = finished.stdout + &finished.stderr;
        assert!(!said.contains("swordfish") && !said.contains("sesame"), "{said}");
        let denied = run(&manifest.secret("http", "authorization", "Bearer wrong"))?;
        let said = format!("{:?}", denied.status()?["message"]) + &denied.stderr;
        assert!(denied.code == 1 && !said.contains("swordfish"), "{said}");
    }
    Ok(())
}

/// As many servers tell no tag, the time at which it was written has to tell.
#[test]
fn a_file_behind_http_that_was_replaced_meanwhile_is_not_read_on() -> Result<()> {
    let source = Server::start(VERSION)?;
    let content = std::fs::read(long_file(&source)?)?;
    for parts in [true, false] {
        let http = Http::start(content.clone(), parts, false)?;
        let target = Server::start(VERSION)?;
        let manifest = http.source(&target);
        let finished = run(&manifest)?;
        let said = finished.status()?["message"].to_string();
        assert!(finished.code == 1 && said.contains("it was changed while it was read"), "{said}");
    }
    Ok(())
}

/// An S3-compatible server of another project.
struct S3 {
    child: std::process::Child,
    address: String,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl S3 {
    fn start() -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let cache = std::env::var("REDIS_MIGRATION_CACHE")
            .map_or_else(|_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache"), PathBuf::from);
        let server = cache.join("venv/bin/moto_server");
        let child = Command::new(&server)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .with_context(|| format!("{}: run e2e/setup.sh", server.display()))?;
        let s3 = Self { child, address: format!("127.0.0.1:{port}") };
        e2e::wait_until("the S3 server answers", Duration::from_secs(60), || {
            Ok(s3.ask("PUT", "/backups").is_ok_and(|(code, _)| code == 200).then_some(()))
        })?;
        Ok(s3)
    }

    fn ask(&self, method: &str, path: &str) -> Result<(u32, Vec<u8>)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let auth = "AWS4-HMAC-SHA256 Credential=id/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x";
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: {auth}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            self.address
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no head")?;
        let code = String::from_utf8_lossy(&answer).split(' ').nth(1).context("no status")?.parse()?;
        Ok((code, answer.split_off(end + 4)))
    }
}

#[test]
fn backups_go_to_an_object_store_and_come_back() -> Result<()> {
    let s3 = S3::start()?;
    let source = Options::new(VERSION).with("repl-diskless-sync-delay", "0").start()?;
    // More than one part.
    Dataset { rounds: 1, long: 20 << 20, ..Dataset::default() }.fill(&mut source.client()?)?;
    let reference = json!({"name": "store"});
    let with_keys = |manifest: Manifest, side: &str| {
        manifest
            .set(&format!("/spec/{side}/rdbFile/credentialsSecretRef"), reference.clone())
            .secret("store", "aws_access_key_id", "id")
            .secret("store", "aws_secret_access_key", "sesame")
            .secret("store", "aws_region", "us-east-1")
            .secret("store", "endpoint", &format!("http://{}", s3.address))
    };
    let backup =
        with_keys(to_file("RdbFile", &source.endpoint(), "s3://backups/daily/{shard}.rdb"), "target");
    let finished = done(&backup)?;
    assert!(!(finished.stdout + &finished.stderr).contains("sesame"));
    let name = format!("/backups/daily/{}.rdb", source.address().replace(':', "-"));
    let (code, bytes) = s3.ask("GET", &name)?;
    assert_eq!(code, 200);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("fetched.rdb");
    std::fs::write(&file, &bytes)?;
    check_rdb(&file)?;
    assert!(bytes.len() > 16 << 20, "{}", bytes.len());

    let again = run(&backup)?;
    let message = again.status()?["message"].to_string();
    assert!(again.code == 1 && message.contains("is there already"), "{message}");

    let target = Server::start(VERSION)?;
    let restore = from_files(&["s3://backups/daily/*.rdb".to_owned()], &target.endpoint());
    done(&with_keys(restore, "source"))?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty() && report.keys > 100, "{report}");
    let missing =
        run(&with_keys(from_files(&["s3://backups/none.rdb".to_owned()], &target.endpoint()), "source"))?;
    let message = missing.status()?["message"].to_string();
    assert!(missing.code == 1 && message.contains("s3://backups/none.rdb"), "{message}");
    Ok(())
}
