//! The page: one file without scripts or anything from elsewhere.

use std::fmt::Write;

use super::{Section, sections, shown};
use crate::rdb::stat::Statistics;
use crate::report::units::{bytes, counted, grouped};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2430;--paper:#fff;--soft:#667;--line:#dde;--bar:#3b6fd4;--bar2:#9db9ee}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--paper:#14171d;--soft:#99a;--line:#2c313c;--bar:#6f9cf5;--bar2:#3a4f7d}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.3rem;margin-bottom:.2rem}h2{font-size:1rem;margin:2rem 0 .5rem}p{color:var(--soft);margin:0}\
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
td:first-child,th:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere}th{font-weight:600;color:var(--soft)}\
td.plot{width:35%;padding-right:0}svg{display:block;width:100%;height:14px}";

/// The tables of [`statistics_table`](super::statistics_table) with bars: bytes dark, keys light.
pub fn statistics_page(file: &str, size: u64, statistics: &Statistics) -> String {
    let total = statistics.total();
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "<!DOCTYPE html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
<title>{name}</title><style>{STYLE}</style><h1>{name}</h1><p>RDB version {}, {}, {} with an expiry, {} of values in {}. Dark bars: bytes; light bars: keys.</p>",
        statistics.version,
        counted(number(total.keys), "key"),
        grouped(number(total.with_expiry)),
        bytes(number(total.bytes)),
        bytes(number(size)),
        name = escaped(file),
    );
    for Section { title, rows, more } in sections(statistics) {
        let _ = write!(out, "<h2>By {title}</h2><table><tr><th>{title}<th>keys<th>bytes<th>expiring<th>");
        for (name, share) in rows {
            let _ = write!(
                out,
                "<tr><td>{}<td>{}<td>{}<td>{}<td class=\"plot\">{}",
                escaped(&name),
                grouped(number(share.keys)),
                bytes(number(share.bytes)),
                grouped(number(share.with_expiry)),
                bars(percent(share.bytes, total.bytes), percent(share.keys, total.keys)),
            );
        }
        out.push_str("</table>");
        if let Some(more) = more {
            let _ = write!(out, "<p>{}</p>", escaped(&more));
        }
    }
    let biggest = statistics.biggest();
    if let Some(first) = biggest.first() {
        out.push_str("<h2>Largest keys</h2><table><tr><th>key<th>type<th>bytes<th>database<th>");
        for key in &biggest {
            let _ = write!(
                out,
                "<tr><td>{}<td>{}<td>{}<td>{}<td class=\"plot\">{}",
                escaped(&shown(&key.key)),
                key.type_name,
                bytes(number(key.bytes)),
                key.db,
                bars(percent(key.bytes, first.bytes), 0.0),
            );
        }
        out.push_str("</table>");
    }
    if statistics.unsupported > 0 {
        let _ = write!(
            out,
            "<p>{} cannot be decoded: {}</p>",
            counted(number(statistics.unsupported), "value"),
            escaped(&statistics.last_unsupported)
        );
    }
    out.push_str("</html>\n");
    out
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

fn bars(bytes: f64, keys: f64) -> String {
    let second = if keys > 0.0 {
        format!("<rect y=\"8\" width=\"{keys:.2}%\" height=\"5\" fill=\"var(--bar2)\"/>")
    } else {
        String::new()
    };
    format!(
        "<svg role=\"img\" aria-label=\"{bytes:.1} % of bytes\"><rect y=\"1\" width=\"{bytes:.2}%\" height=\"6\" fill=\"var(--bar)\"/>{second}</svg>"
    )
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            letter => out.push(letter),
        }
    }
    out
}
