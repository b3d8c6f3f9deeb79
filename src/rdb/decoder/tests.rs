//! Hand-made streams, streams of real servers, every split of both, and mutations of both.

use proptest::prelude::*;

use super::*;
use crate::rdb::checksum::crc64;
use crate::rdb::event::{Event, Items, Run};

/// Snapshots with every type and encoding that the named server writes.
const SNAPSHOTS: &[(&str, &[u8])] = &[
    ("redis-2.8.17", include_bytes!("../testdata/redis-2.8.17.rdb")),
    ("redis-3.0.5", include_bytes!("../testdata/redis-3.0.5.rdb")),
    ("redis-3.2.6", include_bytes!("../testdata/redis-3.2.6.rdb")),
    ("redis-5.0.6", include_bytes!("../testdata/redis-5.0.6.rdb")),
    ("redis-6.2.14", include_bytes!("../testdata/redis-6.2.14.rdb")),
    ("redis-7.0.15", include_bytes!("../testdata/redis-7.0.15.rdb")),
    ("redis-8.2.3", include_bytes!("../testdata/redis-8.2.3.rdb")),
    ("valkey-8.1.8", include_bytes!("../testdata/valkey-8.1.8.rdb")),
    ("valkey-9.1.2", include_bytes!("../testdata/valkey-9.1.2.rdb")),
];

/// An event with its bytes, for comparison. Skipped parts are left out: how many there are is the
/// one thing that splits may change.
type Seen = String;

fn decode(rdb: &[u8], limits: Limits, mut chunk: impl FnMut() -> usize) -> Result<Vec<Seen>, RdbError> {
    let mut decoder = Decoder::new(limits);
    let (mut start, mut available, mut seen) = (0, 0, Vec::new());
    let mut idle = 0;
    loop {
        // Resuming from a snapshot must make no difference, nor going on without having seen what came before.
        decoder = match decoder.waypoint() {
            Some(waypoint) if start % 2 == 0 => Decoder::at(limits, waypoint),
            _ => decoder.clone(),
        };
        match decoder.next(&rdb[start..available])? {
            Step::NeedMore { at_least } => {
                assert!(at_least > available - start, "asked for what it had");
                if available == rdb.len() {
                    seen.push(format!("truncated at {start}"));
                    return Ok(seen);
                }
                available = (available + chunk().max(1)).min(rdb.len());
            }
            Step::Event { consumed, event } => {
                assert!(start + consumed <= available);
                idle = if consumed == 0 { idle + 1 } else { 0 };
                assert!(idle < 3, "no progress at {start}: {event:?}");
                start += consumed;
                let ended = matches!(event, Event::End { .. });
                if !matches!(event, Event::Skipped) {
                    seen.push(format!("{event:?}"));
                }
                assert_eq!(decoder.position(), start as u64);
                if ended {
                    assert_eq!(start, rdb.len());
                    return Ok(seen);
                }
            }
        }
    }
}

fn whole(rdb: &[u8], limits: Limits) -> Result<Vec<Seen>, RdbError> {
    decode(rdb, limits, || usize::MAX / 2)
}

/// `body` between a header and the end.
fn rdb(magic: &str, body: &[u8]) -> Vec<u8> {
    [magic.as_bytes(), body, &[255, 0, 0, 0, 0, 0, 0, 0, 0]].concat()
}

fn small() -> Limits {
    Limits {
        max_value: 300,
        max_expanded: u64::MAX,
        max_key: 1000,
        max_string: 1 << 24,
        max_elements: 1 << 20,
    }
}

#[test]
fn attributes_belong_to_the_next_key_only() {
    let body = b"\xfe\x02\xfb\x03\x01\xfd\x02\x00\x00\x00\xf9\x07\x00\x01a\x01x\x00\xc0\x05\xc1\x00\x01\
                 \xfc\xff\xff\xff\xff\xff\xff\xff\xff\xf8\x40\x80\x02\x03key\x01\x01m";
    let stream = rdb("REDIS0009", body);
    let mut decoder = Decoder::new(Limits::default());
    let mut at = 0;
    let mut records = Vec::new();
    while let Step::Event { consumed, event } = decoder.next(&stream[at..]).unwrap() {
        at += consumed;
        match event {
            Event::Key(record) => records.push((
                record.key.to_vec(),
                record.expire_at_ms,
                record.idle_seconds,
                record.lfu,
                record.type_byte,
                record.value.to_vec(),
            )),
            Event::End { crc } => {
                assert_eq!(crc, None);
                break;
            }
            Event::Header { flavor, version } => assert_eq!((flavor, version), (Flavor::Redis, 9)),
            Event::SelectDb(db) => assert_eq!(db, 2),
            Event::ResizeDb { keys, expires } => assert_eq!((keys, expires), (3, 1)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        records,
        vec![
            (b"a".to_vec(), Some(2000), None, Some(7), 0, b"\x01x".to_vec()),
            (b"5".to_vec(), None, None, None, 0, b"\xc1\x00\x01".to_vec()),
            (b"key".to_vec(), Some(-1), Some(128), None, 2, b"\x01\x01m".to_vec()),
        ]
    );
    assert_eq!(decoder.db(), 2);
}

#[test]
fn rare_opcodes() {
    let id = b"\x81\x00\x00\x00\x00\x00\x00\x04\x01";
    let body = [
        &b"\xf5\x04code\xf7"[..],
        id,
        b"\x02\x01\x05\x03abc\x04\x00\x00\x00\x00\x00\x00\xf0\x3f\x03\x00\x00\x80\x3f\x01\x07\x00\xf4\x0a\x02\x01",
    ]
    .concat();
    let seen = whole(&rdb("REDIS0012", &body), Limits::default()).unwrap();
    assert_eq!(seen.len(), 5);
    assert!(seen[1].starts_with("Function { code: [99, 111, 100, 101]"), "{}", seen[1]);
    assert!(seen[2].starts_with("ModuleAux { module: ModuleId(1025)"), "{}", seen[2]);
    assert_eq!(seen[3], "SlotInfo { slot: 10, keys: 2, expires: 1 }");

    let seen = whole(&rdb("VALKEY080", b"\xf3\x03job\x02\x00\x05\x07\x40\xff"), Limits::default()).unwrap();
    assert_eq!(seen[1], "SlotImport { job: [106, 111, 98], ranges: 2 }");
}

#[test]
fn valkey_behind_a_redis_magic_is_recognised() {
    let mut decoder = Decoder::new(Limits::default());
    let stream = b"REDIS0011\xfa\x0avalkey-ver\x059.1.2";
    let Step::Event { consumed, .. } = decoder.next(stream).unwrap() else { panic!() };
    assert_eq!(decoder.flavor(), Flavor::Redis);
    decoder.next(&stream[consumed..]).unwrap();
    assert_eq!(decoder.flavor(), Flavor::Valkey);
}

#[test]
fn faults_name_place_and_key() {
    let error = |magic: &str, body: &[u8]| whole(&rdb(magic, body), small()).unwrap_err().to_string();
    assert_eq!(
        error("REDIS0009", b"\xfe\x03\x63\x01k"),
        "RDB byte 11, database 3, key \"k\": object type 99 is not known for Redis; the source is newer than this redis-migration"
    );
    assert!(error("VALKEY080", b"\x18\x01k").contains("object type 24 is not known for Valkey"));
    assert!(error("REDIS0009", b"\x06\x01k").contains("release candidate"));
    assert!(error("REDIS0013", b"\xf3\x01").contains("key metadata"));
    assert!(error("REDIS0013", b"\xf6\x01").contains("opcode 246"));
    assert!(error("REDIS0009", b"\xf8\x01\xfe\x01").contains("opcode 254 between"));
    assert!(error("REDIS0009", b"\x00\x82").contains("0x82 does not begin a length"));
    assert!(
        error("REDIS0009", b"\x00\x80\x00\x00\x10\x00")
            .contains("string of 4096 bytes, more than the limit of 1000")
    );
    assert!(
        error("REDIS0009", b"\x00\x01k\x81\xff\xff\xff\xff\xff\xff\xff\xff")
            .contains("key \"k\": string of 18446744073709551615")
    );
    assert!(error("REDIS0009", b"\x01\x01k\x80\xff\xff\xff\xff").contains("4294967295 elements announced"));
    assert!(error("REDIS0009", b"\x00\xc3\x02\x05\x00a\x00").contains("announced length"));
    assert!(error("REDIS0014", b"").contains("Redis RDB version 14 is not known"));
    assert!(error("VALKEY081", b"").contains("Valkey RDB version 81 is not known"));
    assert!(error("MEDIS0009", b"").contains("begins with \"MEDIS0009\""));
}

#[test]
fn extents_of_every_layout() {
    let id16 = &[0u8; 16][..];
    let ms = &[1u8, 0, 0, 0, 0, 0, 0, 0][..];
    let group = [
        b"\x01g\x05\x00\x81\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        id16,
        ms,
        b"\x02\x01\x01c",
        ms,
        ms,
        b"\x01",
        id16,
    ]
    .concat();
    let stream3 = [&b"\x01\x10"[..], id16, b"\x03lp.\x01\x05\x01\x05\x01\x00\x00\x01\x01", &group].concat();
    let stream4 = [&stream3[..], b"\x24\x24\x01\x01p\x01\x03iid\x05\x01\x09\x02"].concat();
    let stream1 =
        [&b"\x00\x00\x05\x01\x01\x01g\x05\x00\x01"[..], id16, ms, b"\x02\x01\x01c", ms, b"\x01", id16]
            .concat();
    let values: &[(u8, Flavor, Vec<u8>)] = &[
        (0, Flavor::Redis, b"\x03abc".to_vec()),
        (1, Flavor::Redis, b"\x02\x01a\xc0\x01".to_vec()),
        (3, Flavor::Redis, b"\x04\x01a\x031.5\x01b\xfd\x01c\xfe\x01d\xff".to_vec()),
        (4, Flavor::Redis, b"\x01\x01f\x01v".to_vec()),
        (5, Flavor::Redis, [b"\x01\x01a", ms].concat()),
        (7, Flavor::Redis, b"\x81\x00\x00\x00\x00\x00\x00\x04\x01\x02\x05\x05\x01x\x00".to_vec()),
        (14, Flavor::Redis, b"\x02\x01a\x02bc".to_vec()),
        (15, Flavor::Redis, stream1),
        (18, Flavor::Redis, b"\x02\x01\x01a\x02\x02bc".to_vec()),
        (21, Flavor::Valkey, stream3),
        (22, Flavor::Valkey, [b"\x01\x01f\x01v", ms].concat()),
        (22, Flavor::Redis, b"\x01\x05\x01f\x01v".to_vec()),
        (24, Flavor::Redis, [ms, b"\x02\x00\x01f\x01v\x01\x01g\x01w"].concat()),
        (25, Flavor::Redis, [ms, b"\x02lp"].concat()),
        (26, Flavor::Redis, stream4),
    ];
    for (type_byte, flavor, value) in values {
        let magic = if *flavor == Flavor::Redis { "REDIS0013" } else { "VALKEY080" };
        let stream = rdb(magic, &[&[*type_byte, 1, b'k'], &value[..]].concat());
        let mut decoder = Decoder::new(Limits::default());
        let Step::Event { consumed, .. } = decoder.next(&stream).unwrap() else { panic!() };
        let Step::Event { event: Event::Key(record), .. } = decoder.next(&stream[consumed..]).unwrap() else {
            panic!("type {type_byte}")
        };
        assert_eq!(record.value, &value[..], "type {type_byte}");
        // Too large for the limit: whatever the type, the stream goes on behind it.
        let limits = Limits { max_value: 1, ..small() };
        let seen = whole(&rdb(magic, &[&stream[9..stream.len() - 9], b"\x00\x05after\x00"].concat()), limits)
            .unwrap();
        assert!(seen[seen.len() - 2].contains("key: [97, 102, 116, 101, 114]"), "type {type_byte}: {seen:?}");
    }
}

#[test]
fn real_snapshots_decode_whole_with_a_matching_checksum() {
    for (name, snapshot) in SNAPSHOTS {
        let seen = whole(snapshot, Limits::default()).unwrap();
        let crc = crc64(&snapshot[..snapshot.len() - 8]);
        assert_eq!(seen.last(), Some(&format!("End {{ crc: Some({crc}) }}")), "{name}");
        assert!(seen.iter().filter(|event| event.starts_with("Key(")).count() >= 28, "{name}");
    }
}

#[test]
fn byte_by_byte_is_the_same() {
    for (name, snapshot) in SNAPSHOTS {
        for limits in [Limits::default(), small(), Limits { max_value: 1, ..small() }] {
            let limits = Limits { max_key: 1 << 16, ..limits };
            let at_once = whole(snapshot, limits).unwrap();
            assert!(decode(snapshot, limits, || 1).unwrap() == at_once, "{name} with {limits:?}");
        }
    }
}

/// A stored string: head and payload.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u32).to_be_bytes();
    [&[0x80], &length[..], bytes].concat()
}

/// The pieces of a large string, put together again.
fn pieces(stream: &[u8], limits: Limits, chunk: usize) -> Vec<u8> {
    let mut decoder = Decoder::new(limits);
    let (mut start, mut available, mut joined) = (0, 0, Vec::new());
    loop {
        match decoder.next(&stream[start..available]).unwrap() {
            Step::NeedMore { at_least } => {
                assert!(at_least <= (256 << 10) + 64, "memory is not bounded: {at_least}");
                available = (available + chunk).min(stream.len());
            }
            Step::Event { consumed, event } => {
                start += consumed;
                match event {
                    Event::LargeItems { key, items: Items(Run::Piece { bytes, first }) } => {
                        assert_eq!((key, first), (&b"k"[..], joined.is_empty()));
                        joined.extend_from_slice(bytes);
                    }
                    Event::LargeEnd { key } => assert_eq!(key, b"k"),
                    Event::End { .. } => return joined,
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn large_strings_come_in_pieces() {
    let text: Vec<u8> = (0..700_000u32).flat_map(|i| (i % 9973).to_le_bytes()).collect();
    let stream = rdb("REDIS0009", &[b"\x00\x01k", &stored(&text)[..]].concat());
    assert!(pieces(&stream, small(), 100_000) == text);

    // "abcdefgh", then references 8 back, 264 bytes each.
    let steps = 3000;
    let mut compressed = b"\x07abcdefgh".to_vec();
    (0..steps).for_each(|_| compressed.extend([7 << 5, 255, 7]));
    let length = 8 + 264 * steps;
    let text: Vec<u8> = b"abcdefgh".iter().copied().cycle().take(length).collect();
    let head = [
        &[0xc3, 0x80],
        &(compressed.len() as u32).to_be_bytes()[..],
        &[0x80],
        &(length as u32).to_be_bytes(),
    ];
    let stream = rdb("REDIS0009", &[b"\x00\x01k", &head.concat()[..], &compressed].concat());
    for chunk in [1, 7, 1000, 1 << 20] {
        assert!(pieces(&stream, small(), chunk) == text);
    }
}

#[test]
fn a_large_collection_keeps_its_elements_and_bounds_memory() {
    let mut body = b"\x04\x04hash\x80\x00\x00\xea\x60".to_vec();
    for i in 0..60_000u32 {
        body.extend(stored(format!("field:{i}").as_bytes()));
        body.extend(stored(&i.to_le_bytes()));
    }
    let stream = rdb("REDIS0009", &body);
    let limits = Limits { max_value: 100_000, ..Limits::default() };
    let (mut decoder, mut start, mut available, mut joined) = (Decoder::new(limits), 0, 0, Vec::new());
    loop {
        match decoder.next(&stream[start..available]).unwrap() {
            Step::NeedMore { at_least } => {
                assert!(at_least <= (256 << 10) + 100_000);
                available = (available + 10_000).min(stream.len());
            }
            Step::Event { consumed, event } => {
                start += consumed;
                match event {
                    Event::LargeBegin(head) => assert_eq!(head.kind, LargeKind::Hash),
                    Event::LargeItems { items: Items(Run::Elements { bytes, .. }), .. } => {
                        joined.extend_from_slice(bytes)
                    }
                    Event::End { .. } => break,
                    _ => {}
                }
            }
        }
    }
    assert!(joined == body[11..]);
}

#[test]
fn an_element_beyond_the_limit_is_named_and_passed_over() {
    let body = [&b"\x02\x01s\x03\x01a"[..], &stored(&[7; 5000]), b"\x01b\x00\x05after\x00"].concat();
    let stream = rdb("REDIS0009", &body);
    for chunk in [1, 10, 10_000] {
        let seen = decode(&stream, small(), || chunk).unwrap();
        let names: Vec<_> = seen.iter().map(|event| event.split([' ', '(', '{']).next().unwrap()).collect();
        assert_eq!(names, ["Header", "LargeBegin", "LargeItems", "LargeUnsupported", "Key", "End"]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_gives_the_same_events(
        which in 0..SNAPSHOTS.len(),
        chunks in prop::collection::vec(1usize..5000, 1..50),
        max_value in prop::sample::select(vec![1usize, 100, 5000, 1 << 20]),
    ) {
        let snapshot = SNAPSHOTS[which].1;
        let limits = Limits { max_value, ..Limits::default() };
        let mut next = chunks.iter().copied().cycle();
        let split = decode(snapshot, limits, || next.next().unwrap()).unwrap();
        prop_assert!(split == whole(snapshot, limits).unwrap());
    }

    #[test]
    fn mutated_streams_end_in_events_or_errors(
        which in 0..SNAPSHOTS.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        max_value in prop::sample::select(vec![1usize, 1000, 1 << 20]),
    ) {
        let mut bytes = SNAPSHOTS[which].1.to_vec();
        for (index, value) in &edits {
            let at = index.index(bytes.len());
            bytes[at] = *value;
        }
        let end = cut.index(bytes.len()).max(20);
        bytes.extend_from_slice(&SNAPSHOTS[which].1[..end]);
        let mut decoder = Decoder::new(Limits { max_value, ..small() });
        let (mut at, mut idle) = (0, 0);
        while let Ok(Step::Event { consumed, .. }) = decoder.next(&bytes[at..]) {
            idle = if consumed == 0 { idle + 1 } else { 0 };
            prop_assert!(idle < 3, "no progress at {at}");
            at += consumed;
        }
    }
}

#[test]
fn what_cannot_be_parted_is_passed_over_when_it_is_too_long_once_expanded() {
    // 102 bytes that are 7,928 once expanded: "abcdefgh", then references 8 back, 264 bytes each.
    let mut text = vec![0xc3, 0x40, 99];
    text.extend((0x4000u16 | 7928).to_be_bytes());
    text.extend(b"\x07abcdefgh");
    (0..30).for_each(|_| text.extend([7 << 5, 255, 7]));
    let element = [b"\x02\x01s\x03\x01a".as_slice(), &text, b"\x01b"].concat();
    let packed = [b"\x0d\x01h".as_slice(), &text].concat();
    let until = [b"\x19\x01h\x00\x00\x00\x00\x00\x00\x00\x00".as_slice(), &text].concat();
    let names = |magic: &str, value: &[u8], max_expanded: u64, chunk: usize| -> Vec<String> {
        let stream = rdb(magic, &[value, b"\x00\x05after\x01v"].concat());
        let limits = Limits { max_expanded, ..small() };
        let seen = decode(&stream, limits, || chunk).unwrap();
        seen.iter().map(|event| event.split([' ', '(', '{']).next().unwrap().to_owned()).collect()
    };
    for chunk in [1, 10, 10_000] {
        let names = |magic, value, max_expanded| names(magic, value, max_expanded, chunk);
        let parts = ["Header", "LargeBegin", "LargeItems", "LargeUnsupported", "Key", "End"];
        assert_eq!(names("REDIS0009", &element, 1000), parts);
        let parts = ["Header", "LargeBegin", "LargeItems", "LargeEnd", "Key", "End"];
        assert_eq!(names("REDIS0009", &element, 7928 + 5)[..3], parts[..3]);
        for (magic, value) in [("REDIS0009", &packed), ("REDIS0012", &until)] {
            let unsupported = ["Header", "LargeUnsupported", "Key", "End"];
            assert_eq!(names(magic, value, 1000), unsupported);
            assert_eq!(names(magic, value, 8000), ["Header", "Key", "Key", "End"]);
        }
    }
}
