//! `decode` and `stat`: RDB files without a server.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use redis_migration::file::{FileError, each_event};
use redis_migration::rdb::json::JsonLines;
use redis_migration::rdb::stat::{Grouping, Statistics};
use redis_migration::rdb::{Event, Limits};
use redis_migration::report;

use super::execute::{Exit, complain, complain_usage, print};
use super::{DecodeArgs, StatArgs};

/// Lines are handed on in runs of this many bytes.
const RUN: usize = 256 << 10;

pub fn decode(args: &DecodeArgs) -> Result<Exit> {
    let (name, mut input) = match open(&args.file) {
        Ok(opened) => opened,
        Err(error) => return Ok(complain_usage(&error)),
    };
    let mut out = match &args.out {
        None => Box::new(io::stdout().lock()) as Box<dyn Write>,
        Some(path) => Box::new(File::create(path).with_context(|| format!("{}", path.display()))?),
    };
    let (mut json, mut lines, mut failed) = (JsonLines::default(), Vec::with_capacity(2 * RUN), 0u64);
    let read = each_event(&mut input, JsonLines::limits(), |place, event| {
        let mut refused = |what: &[u8], why: &str| {
            failed += 1;
            eprintln!("{name}: key \"{}\", database {}: {why}", what.escape_ascii(), place.db);
        };
        match event {
            Event::Key(record) => {
                if let Err(error) = json.key(place.db, &record, place.flavor, &mut lines) {
                    refused(record.key, &error.to_string());
                }
            }
            Event::LargeBegin(head) => json.begin(place.db, &head, &mut lines),
            Event::LargeItems { key, items } => {
                if json.is_open()
                    && let Err(error) = json.items(&items, &mut lines)
                {
                    json.end(Some(&error.to_string()), &mut lines);
                    refused(key, &error.to_string());
                }
            }
            Event::LargeEnd { .. } => json.end(None, &mut lines),
            Event::LargeUnsupported { key, why, .. } => {
                json.end(Some(why), &mut lines);
                refused(key, why);
            }
            Event::Function { code } => JsonLines::function(code, &mut lines),
            _ => {}
        }
        if lines.len() >= RUN {
            out.write_all(&lines)?;
            lines.clear();
        }
        Ok(())
    });
    // What is whole is handed on, whatever came then.
    if json.is_open() {
        json.end(Some("the file breaks off here"), &mut lines);
    }
    let written = out.write_all(&lines).and_then(|()| out.flush());
    match read.and_then(|_| written.map_err(FileError::Sink)) {
        Ok(()) if failed > 0 => Ok(complain(&format!("{name}: {failed} keys could not be decoded"))),
        Ok(()) => Ok(Exit::Done),
        // Who read our output has seen enough.
        Err(FileError::Sink(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        Err(error) => Ok(complain(&format!("{name}: {error}"))),
    }
}

pub fn stat(args: &StatArgs) -> Result<Exit> {
    let (name, mut input) = match open(&args.file) {
        Ok(opened) => opened,
        Err(error) => return Ok(complain_usage(&error)),
    };
    let mut statistics =
        Statistics::new(Grouping { separator: args.separator, depth: args.depth, top: args.top.into() });
    let read = each_event(&mut input, Limits::default(), |place, event| {
        statistics.add(place.db, place.flavor, place.bytes, &event);
        Ok(())
    });
    // A damaged file: what it holds up to there is worth to be seen.
    let size = read.as_ref().copied().unwrap_or_default();
    print(&report::statistics_table(&name, size, &statistics))?;
    if let Some(path) = &args.html {
        let page = report::statistics_page(&name, size, &statistics);
        let mut file = BufWriter::new(File::create(path).with_context(|| format!("{}", path.display()))?);
        file.write_all(page.as_bytes())
            .and_then(|()| file.flush())
            .with_context(|| format!("{}", path.display()))?;
    }
    match read {
        Ok(_) => Ok(Exit::Done),
        Err(error) => Ok(complain(&format!("{name}: {error}"))),
    }
}

/// The file and its name; `-` is standard input.
fn open(path: &Path) -> Result<(String, Box<dyn Read>), String> {
    if path == Path::new("-") {
        return Ok(("standard input".to_owned(), Box::new(io::stdin().lock())));
    }
    let name = path.display().to_string();
    match File::open(path) {
        Ok(file) => Ok((name, Box::new(file))),
        Err(error) => Err(format!("{name}: {error}")),
    }
}
