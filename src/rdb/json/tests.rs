use crate::rdb::test_captured::captured;
use serde_json::{Value, json};

use super::*;
use crate::rdb::{Decoder, Event, Limits, Step};

/// The lines of an RDB, read in chunks of `chunk` bytes, with values beyond `max_value` in parts.
fn lines(rdb: &[u8], chunk: usize, max_value: usize) -> Vec<Value> {
    lines_within(rdb, chunk, Limits { max_value, ..Limits::default() }).0
}

/// The same, and the most bytes that were written at a time.
fn lines_within(rdb: &[u8], chunk: usize, limits: Limits) -> (Vec<Value>, usize) {
    let (mut decoder, mut most) = (Decoder::new(limits), 0);
    let (mut json, mut out, mut at, mut end) = (JsonLines::default(), Vec::new(), 0, 0);
    loop {
        let (db, flavor) = (decoder.db(), decoder.flavor());
        match decoder.next(&rdb[at..end]).unwrap() {
            Step::NeedMore { .. } => {
                assert!(end < rdb.len(), "the RDB has no end");
                end = (end + chunk).min(rdb.len());
            }
            Step::Event { consumed, event } => {
                at += consumed;
                let before = out.len();
                match event {
                    Event::Key(record) => json.key(db, &record, flavor, &mut out).unwrap(),
                    Event::LargeBegin(head) => json.begin(db, &head, &mut out),
                    Event::LargeItems { items, .. } => json.items(&items, &mut out).unwrap(),
                    Event::LargeEnd { .. } => json.end(None, &mut out),
                    Event::LargeUnsupported { why, .. } => json.end(Some(why), &mut out),
                    Event::Function { code } => JsonLines::function(code, &mut out),
                    Event::End { .. } => break,
                    _ => {}
                }
                most = most.max(out.len() - before);
            }
        }
    }
    assert!(!json.is_open());
    let text = String::from_utf8(out).unwrap();
    (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), most)
}

#[test]
fn every_version_s_file_becomes_one_line_a_key() {
    for name in ["redis-2.8.17.rdb", "redis-5.0.6.rdb", "redis-8.2.3.rdb", "valkey-9.1.2.rdb"] {
        let rdb = captured(name);
        let whole = lines(&rdb, rdb.len(), 64 << 20);
        assert!(whole.len() > 10, "{name}: {} lines", whole.len());
        assert!(whole.iter().all(|line| line["type"] != "unknown" && !line["value"].is_null()), "{name}");
        assert_eq!(lines(&rdb, 7, 64 << 20), whole, "{name}");
    }
}

/// Members of a sorted set by score, strings as their bytes: what the two ways may differ in.
fn comparable(mut line: Value) -> Value {
    if line["type"] == "zset" {
        line["value"].as_array_mut().unwrap().sort_by_key(Value::to_string);
    }
    if let (Some("string"), Some(text)) = (line["type"].as_str(), line["value"].as_str()) {
        let mut out = Vec::new();
        text::base64_member(text.as_bytes(), &mut out);
        line["value"] = serde_json::from_str(&format!("{{{}}}", String::from_utf8(out).unwrap())).unwrap();
    }
    line
}

#[test]
fn a_value_in_parts_gives_the_line_of_a_whole_one() {
    for name in ["redis-3.2.6.rdb", "redis-7.0.15.rdb", "redis-8.2.3.rdb", "valkey-9.1.2.rdb"] {
        let rdb = captured(name);
        let whole: Vec<_> = lines(&rdb, rdb.len(), 64 << 20).into_iter().map(comparable).collect();
        let parts: Vec<_> = lines(&rdb, 100, 600).into_iter().map(comparable).collect();
        let mut found = 0;
        for line in parts.iter().filter(|line| line["error"].is_null()) {
            assert!(whole.contains(line), "{name}: {line}");
            found += 1;
        }
        assert!(found * 2 > whole.len(), "{name}: only {found} of {}", whole.len());
    }
}

/// What compresses well takes little in the file, and much when it is written.
#[test]
fn a_value_that_is_long_once_expanded_comes_in_parts() {
    // A string of 7,928 bytes: "abcdefgh", then references 8 back, 264 bytes each.
    let steps = 30u16;
    let mut text = vec![0xc3, 0x40, 9 + 3 * steps as u8];
    text.extend((0x4000 | (8 + 264 * steps)).to_be_bytes());
    text.extend(b"\x07abcdefgh");
    (0..steps).for_each(|_| text.extend([7 << 5, 255, 7]));
    let list = [b"\x01\x04list\x42\x58", text.repeat(600).as_slice()].concat();
    let string = [b"\x00\x06string", text.as_slice()].concat();
    let rdb = [b"REDIS0009".as_slice(), &list, &string, &[255], &[0; 8]].concat();
    let (whole, most) = lines_within(&rdb, rdb.len(), Limits::default());
    assert!(most > 4_000_000);
    assert_eq!(whole[0]["value"].as_array().unwrap().len(), 600);
    for chunk in [7, 1000, rdb.len()] {
        let limits = Limits { max_expanded: 100_000, ..Limits::default() };
        let (parts, most) = lines_within(&rdb, chunk, limits);
        assert!(most < 300_000, "{most} bytes at a time");
        assert!(parts == whole);
    }
    let limits = Limits { max_expanded: 5_000, ..Limits::default() };
    let (parts, _) = lines_within(&rdb, 7, limits);
    assert_eq!(comparable(parts[1].clone()), comparable(whole[1].clone()));
    assert_ne!(parts[1], whole[1]);
}

#[test]
fn text_is_escaped_and_other_bytes_are_base64() {
    let written = |bytes: &[u8]| {
        let mut out = Vec::new();
        byte_string(bytes, &mut out);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(written(b"user:1"), "\"user:1\"");
    assert_eq!(written("schön \"\\\n\u{1}".as_bytes()), "\"schön \\\"\\\\\\n\\u0001\"");
    assert_eq!(written(b"\xff\x00"), "{\"base64\":\"/wA=\"}");
    assert_eq!(written(b""), "\"\"");
    for cut in 0..=10 {
        let (mut base64, mut out) = (Base64::default(), Vec::new());
        base64.push(&b"0123456789"[..cut], &mut out);
        base64.push(&b"0123456789"[cut..], &mut out);
        base64.finish(&mut out);
        assert_eq!(out, b"MDEyMzQ1Njc4OQ==", "{cut}");
    }
}

#[test]
fn scores_read_back_as_they_were() {
    for (score, expected) in [
        (1.5, json!(1.5)),
        (-0.0, json!(-0.0)),
        (3.0, json!(3)),
        (1e300, json!(1e300)),
        (f64::INFINITY, json!("inf")),
        (f64::NEG_INFINITY, json!("-inf")),
        (f64::NAN, json!("nan")),
    ] {
        let mut out = Vec::new();
        text::score(score, &mut out);
        let read: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(read.as_f64(), expected.as_f64(), "{score}");
        assert_eq!(read.as_str(), expected.as_str(), "{score}");
    }
}

#[test]
fn a_value_that_breaks_off_ends_its_line_with_the_reason() {
    let mut json = JsonLines::default();
    for kind in [LargeKind::String, LargeKind::Hash, LargeKind::Stream] {
        let mut out = Vec::new();
        let head =
            LargeHead { key: b"k", expire_at_ms: Some(5), idle_seconds: None, lfu: None, type_byte: 0, kind };
        json.begin(3, &head, &mut out);
        assert!(json.is_open());
        json.end(Some("too large"), &mut out);
        let line: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            (&line["db"], &line["expireAt"], &line["error"]),
            (&json!(3), &json!(5), &json!("too large"))
        );
    }
}
