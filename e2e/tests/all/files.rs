//! `decode` and `stat`: the files of real servers; the lines are made into keys again by a test of its own.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use e2e::compare::{Rules, compare_with};
use e2e::dataset::Dataset;
use e2e::{Batch, Conn, Server, Tool, Version, args};
use redis::Value as Reply;
use serde_json::Value;

/// A byte string as the lines write it.
fn plain(value: &Value) -> Result<Vec<u8>> {
    match (value.as_str(), value["base64"].as_str()) {
        (Some(text), _) => Ok(text.as_bytes().to_vec()),
        (None, Some(text)) => Ok(STANDARD.decode(text)?),
        (None, None) => bail!("{value} is no byte string"),
    }
}

fn elements(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("{value} is no array"))
}

fn number(value: &Value) -> Result<Vec<u8>> {
    match value {
        Value::Number(number) => Ok(number.to_string().into_bytes()),
        Value::String(text) => Ok(text.as_bytes().to_vec()),
        other => bail!("{other} is no number"),
    }
}

/// The commands that make the key of a line.
fn commands(line: &Value) -> Result<Vec<Vec<Vec<u8>>>> {
    let key = plain(&line["key"])?;
    let value = &line["value"];
    let word = |text: &str| text.as_bytes().to_vec();
    let mut found = Vec::new();
    match line["type"].as_str().unwrap_or_default() {
        "string" => found.push(vec![word("SET"), key.clone(), plain(value)?]),
        name @ ("list" | "set") => {
            let command = if name == "list" { "RPUSH" } else { "SADD" };
            for element in elements(value)? {
                found.push(vec![word(command), key.clone(), plain(element)?]);
            }
        }
        "zset" => {
            for element in elements(value)? {
                found.push(vec![
                    word("ZADD"),
                    key.clone(),
                    number(&element["score"])?,
                    plain(&element["member"])?,
                ]);
            }
        }
        "hash" => {
            for element in elements(value)? {
                let field = plain(&element["field"])?;
                found.push(vec![word("HSET"), key.clone(), field.clone(), plain(&element["value"])?]);
                if let Some(at) = element["expireAt"].as_i64() {
                    let at = at.to_string().into_bytes();
                    found.push(vec![word("HPEXPIREAT"), key.clone(), at, word("FIELDS"), word("1"), field]);
                }
            }
        }
        "stream" => stream(&key, value, &mut found)?,
        other => bail!("type {other:?}"),
    }
    if let Some(at) = line["expireAt"].as_i64() {
        found.push(vec![word("PEXPIREAT"), key, at.to_string().into_bytes()]);
    }
    Ok(found)
}

fn stream(key: &[u8], value: &Value, found: &mut Vec<Vec<Vec<u8>>>) -> Result<()> {
    let word = |text: &str| text.as_bytes().to_vec();
    let id = |value: &Value| Ok::<_, anyhow::Error>(value.as_str().context("an id")?.as_bytes().to_vec());
    for entry in elements(&value["entries"])? {
        let mut command = vec![word("XADD"), key.to_vec(), id(&entry["id"])?];
        for pair in elements(&entry["fields"])? {
            command.extend([plain(&pair[0])?, plain(&pair[1])?]);
        }
        found.push(command);
    }
    if elements(&value["entries"])?.is_empty() {
        let words = ["XADD", "", "MAXLEN", "0", "0-1", "f", "v"];
        found
            .push(words.iter().map(|text| if text.is_empty() { key.to_vec() } else { word(text) }).collect());
    }
    let mut last = vec![word("XSETID"), key.to_vec(), id(&value["lastId"])?];
    if let Some(added) = value["entriesAdded"].as_u64() {
        let added = added.to_string().into_bytes();
        last.extend([word("ENTRIESADDED"), added, word("MAXDELETEDID"), id(&value["maxDeletedId"])?]);
    }
    found.push(last);
    for group in elements(&value["groups"])? {
        let name = plain(&group["name"])?;
        let mut create =
            vec![word("XGROUP"), word("CREATE"), key.to_vec(), name.clone(), id(&group["lastId"])?];
        if let Some(read) = group["entriesRead"].as_u64() {
            create.extend([word("ENTRIESREAD"), read.to_string().into_bytes()]);
        }
        found.push(create);
        for consumer in elements(&group["consumers"])? {
            let command =
                [word("XGROUP"), word("CREATECONSUMER"), key.to_vec(), name.clone(), plain(consumer)?];
            found.push(command.to_vec());
        }
        for pending in elements(&group["pending"])? {
            let mut claim = vec![word("XCLAIM"), key.to_vec(), name.clone(), plain(&pending["consumer"])?];
            claim.extend([word("0"), id(&pending["id"])?, word("TIME"), number(&pending["deliveredAt"])?]);
            claim.extend([
                word("RETRYCOUNT"),
                number(&pending["deliveries"])?,
                word("FORCE"),
                word("JUSTID"),
            ]);
            found.push(claim);
        }
    }
    Ok(())
}

/// Makes the keys of `lines` on a server, with nothing of the tool's.
fn rebuild(lines: &[Value], conn: &mut Conn) -> Result<()> {
    let mut db = 0;
    for line in lines {
        if line["type"] == "function" {
            conn.run(args!["FUNCTION", "LOAD", plain(&line["value"])?])?;
            continue;
        }
        let of_line = u32::try_from(line["db"].as_u64().context("db")?)?;
        if of_line != db {
            conn.select(of_line)?;
            db = of_line;
        }
        let mut batch = Batch::default();
        let commands = commands(line)?;
        for command in &commands {
            batch.add(&command.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }
        for (reply, command) in conn.pipeline(&batch)?.iter().zip(&commands) {
            let text = || command.iter().map(|word| word.escape_ascii().to_string()).collect::<Vec<_>>();
            ensure!(!matches!(reply, Reply::ServerError(_)), "{reply:?}: {:?}", text());
        }
    }
    Ok(())
}

fn decoded(file: &Path) -> Result<Vec<Value>> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("lines");
    let path = |path: &Path| path.to_str().map(str::to_owned).context("path");
    let finished = Tool::plain(&["decode", &path(file)?, "--out", &path(&out)?])?;
    ensure!(finished.code == 0, "exit {}: {}", finished.code, finished.stderr);
    let text = std::fs::read_to_string(&out)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn there_and_back(version: Version) -> Result<()> {
    let source = Server::start(version)?;
    Dataset::default().rounds(3).fill(&mut source.client()?)?;
    let lines = decoded(&source.save()?)?;
    let types: BTreeSet<_> = lines.iter().filter_map(|line| line["type"].as_str()).collect();
    let least = if version.has(5, 0) { 6 } else { 5 };
    ensure!(types.len() >= least && lines.len() > 100, "{version}: {} lines, {types:?}", lines.len());
    let target = Server::start(Version::REDIS_8_2)?;
    rebuild(&lines, &mut target.conn()?).with_context(|| format!("{version}"))?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty() && report.keys > 100, "{version}: {report}");
    Ok(())
}

#[test]
fn lines_hold_all_that_a_server_wrote() -> Result<()> {
    for version in Version::ALL {
        there_and_back(version)?;
    }
    Ok(())
}

#[test]
fn a_damaged_file_is_told_with_the_place_and_the_lines_before_it_stand() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let whole = std::fs::read(source.save()?)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("cut.rdb");
    std::fs::write(&file, &whole[..whole.len() / 2])?;
    let name = file.to_str().context("path")?;
    let finished = Tool::plain(&["decode", name])?;
    assert_eq!(finished.code, 1);
    let place = format!("the file ends at byte {}", whole.len() / 2);
    assert!(finished.stderr.contains(name) && finished.stderr.contains(&place), "{}", finished.stderr);
    // A large key may lie at the cut.
    assert!(finished.stdout.lines().count() > 3);
    assert!(finished.stdout.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));

    let mut damaged = whole.clone();
    let last = damaged.len() - 12;
    damaged[last] ^= 1;
    std::fs::write(&file, &damaged)?;
    let finished = Tool::plain(&["stat", name])?;
    assert_eq!(finished.code, 1, "{}", finished.stdout);
    std::fs::write(&file, b"not an RDB at all")?;
    assert_eq!(Tool::plain(&["decode", name])?.code, 1);
    let missing = Tool::plain(&["decode", "/nowhere/dump.rdb"])?;
    assert_eq!(missing.code, 2);
    assert!(missing.stderr.contains("/nowhere/dump.rdb"), "{}", missing.stderr);
    Ok(())
}

#[test]
fn stat_counts_what_the_server_has() -> Result<()> {
    let source = Server::start(Version::REDIS_7_0)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let mut conn = source.conn()?;
    // Nothing that compresses: bytes are counted as they stand in the file.
    let noise: Vec<u8> =
        (0..3_000_000u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ i as u8).collect();
    conn.run(args!["SET", "user:1:name", noise])?;
    let keys: i64 = [0, 1, 9]
        .into_iter()
        .map(|db| conn.select(db).and_then(|()| conn.number(args!["DBSIZE"])))
        .sum::<Result<i64>>()?;
    let file = source.save()?;
    let page = source.folder().join("page.html");
    let (name, html) = (file.to_str().context("path")?, page.to_str().context("path")?);
    let finished = Tool::plain(&["stat", name, "--html", html, "--top", "3"])?;
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    let grouped = keys.to_string();
    let first = finished.stdout.lines().next().unwrap_or_default().replace(',', "");
    assert!(first.contains(&format!("{grouped} keys")), "{first}, {keys}");
    let biggest = finished.stdout.split("largest keys").nth(1).context("largest keys")?;
    assert!(biggest.lines().nth(1).is_some_and(|line| line.starts_with("user:1:name")), "{biggest}");
    assert_eq!(biggest.trim().lines().count(), 4, "{biggest}");
    let text = std::fs::read_to_string(&page)?;
    assert!(text.starts_with("<!DOCTYPE html>") && text.contains("user:1:name"));
    Ok(())
}
