//! What an RDB file holds, as a table and as a page.

mod page;

use std::fmt::Write;

use super::units::{bytes, counted, grouped};
use crate::rdb::stat::{Share, Statistics};

pub use page::statistics_page;

/// Prefixes shown.
const MOST_PREFIXES: usize = 20;
/// A longer key is cut in the middle of its line.
const SHOWN_KEY: usize = 60;

/// The table; `file` names what was read, `size` is its length in bytes.
pub fn statistics_table(file: &str, size: u64, statistics: &Statistics) -> String {
    let total = statistics.total();
    let mut out = String::new();
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "{file}: RDB version {}, {}, {} with an expiry, {} of values in {}{}",
        statistics.version,
        counted(count(total.keys), "key"),
        grouped(count(total.with_expiry)),
        bytes(count(total.bytes)),
        bytes(count(size)),
        match statistics.functions {
            0 => String::new(),
            functions => format!(
                ", {}",
                counted(count(functions), "function library").replace("librarys", "libraries")
            ),
        },
    );
    for section in sections(statistics) {
        let _ = writeln!(
            out,
            "\n{:<width$}  {:>12}  {:>12}  {:>8}",
            section.title,
            "keys",
            "bytes",
            "expiring",
            width = WIDTH
        );
        for (name, share) in &section.rows {
            let _ = writeln!(
                out,
                "{:<width$}  {:>12}  {:>12}  {:>8}",
                name,
                grouped(count(share.keys)),
                bytes(count(share.bytes)),
                grouped(count(share.with_expiry)),
                width = WIDTH,
            );
        }
        if let Some(more) = section.more {
            let _ = writeln!(out, "{more}");
        }
    }
    let biggest = statistics.biggest();
    if !biggest.is_empty() {
        let _ =
            writeln!(out, "\n{:<WIDTH$}  {:>12}  {:>12}  {:>8}", "largest keys", "type", "bytes", "database");
        for key in biggest {
            let name = shown(&key.key);
            let size = bytes(count(key.bytes));
            let _ = writeln!(out, "{name:<WIDTH$}  {:>12}  {size:>12}  {:>8}", key.type_name, key.db);
        }
    }
    if statistics.unsupported > 0 {
        let _ = writeln!(
            out,
            "\n{} cannot be decoded: {}",
            counted(count(statistics.unsupported), "value"),
            statistics.last_unsupported
        );
    }
    out
}

const WIDTH: usize = 40;

/// One of the tables.
struct Section {
    title: &'static str,
    rows: Vec<(String, Share)>,
    more: Option<String>,
}

fn sections(statistics: &Statistics) -> Vec<Section> {
    let databases = statistics.databases.iter().map(|(db, share)| (format!("db{db}"), *share)).collect();
    let mut types: Vec<_> =
        statistics.types.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect();
    types.sort_by_key(|(_, share)| std::cmp::Reverse(share.bytes));
    let (prefixes, count) = statistics.prefixes(MOST_PREFIXES);
    let hidden = count.saturating_sub(prefixes.len());
    let mut prefixes: Vec<_> = prefixes.into_iter().map(|(prefix, share)| (shown(prefix), share)).collect();
    if statistics.other_prefixes.keys > 0 {
        prefixes.push(("(no prefix)".to_owned(), statistics.other_prefixes));
    }
    let more = (hidden > 0).then(|| format!("and {hidden} smaller ones"));
    vec![
        Section { title: "database", rows: databases, more: None },
        Section { title: "type", rows: types, more: None },
        Section { title: "prefix", rows: prefixes, more },
    ]
}

/// Escaped, and shortened in the middle.
fn shown(key: &[u8]) -> String {
    let text = match std::str::from_utf8(key) {
        Ok(text) => text
            .chars()
            .flat_map(|letter| {
                if letter.is_control() { letter.escape_default().collect::<Vec<_>>() } else { vec![letter] }
            })
            .collect(),
        Err(_) => key.escape_ascii().to_string(),
    };
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= SHOWN_KEY {
        return text;
    }
    let (first, last) = (letters.get(..SHOWN_KEY - 20), letters.get(letters.len() - 19..));
    let part = |letters: Option<&[char]>| letters.unwrap_or_default().iter().collect::<String>();
    format!("{}…{}", part(first), part(last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::stat::Grouping;

    fn sample() -> Statistics {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rdb/testdata/redis-7.0.15.rdb");
        let rdb = std::fs::read(path).unwrap();
        let mut statistics = Statistics::new(Grouping { separator: b':', depth: 1, top: 3 });
        let read = crate::file::each_event(&mut rdb.as_slice(), Default::default(), |place, event| {
            statistics.add(place.db, place.flavor, place.bytes, &event);
            Ok(())
        });
        read.unwrap();
        statistics
    }

    #[test]
    fn the_table_names_types_databases_and_the_largest_keys() {
        let statistics = sample();
        let table = statistics_table("dump.rdb", 1000, &statistics);
        for expected in ["dump.rdb: RDB version 10", "db0", "zset", "stream", "largest keys"] {
            assert!(table.contains(expected), "{expected}: {table}");
        }
        assert!(table.lines().all(|line| line.chars().count() < 140), "{table}");
    }

    #[test]
    fn the_page_stands_alone_and_escapes_keys() {
        let mut statistics = sample();
        let record = crate::rdb::KeyRecord {
            key: b"<script>alert(1)</script>",
            expire_at_ms: None,
            idle_seconds: None,
            lfu: None,
            type_byte: 0,
            value: &[0; 100_000],
        };
        statistics.add(0, crate::version::Flavor::Redis, 9, &crate::rdb::Event::Key(record));
        let page = statistics_page("a&b.rdb", 1000, &statistics);
        assert!(page.contains("a&amp;b.rdb") && page.contains("&lt;script&gt;"), "{page}");
        assert!(!page.contains("<script") && !page.contains("http"), "{page}");
    }

    #[test]
    fn long_and_binary_names_fit_a_line() {
        assert_eq!(shown(b"a\nb"), "a\\nb");
        assert_eq!(shown(b"\xff\x00"), "\\xff\\x00");
        assert_eq!(shown(&[b'x'; 500]).chars().count(), SHOWN_KEY);
    }
}
