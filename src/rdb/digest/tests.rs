use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::rdb::{Decoder, Dialect, Event, Limits, Step, value_to_commands};

type Values = BTreeMap<Vec<u8>, (u8, Vec<u8>)>;

fn values(snapshot: &[u8]) -> (Flavor, Values) {
    let mut decoder = Decoder::new(Limits::default());
    let (mut at, mut values) = (0, Values::new());
    loop {
        let Step::Event { consumed, event } = decoder.next(&snapshot[at..]).unwrap() else { panic!() };
        at += consumed;
        match event {
            Event::Key(record) => {
                values.insert(record.key.to_vec(), (record.type_byte, record.value.to_vec()));
            }
            Event::End { .. } => return (decoder.flavor(), values),
            _ => {}
        }
    }
}

const NEW: Dialect = Dialect {
    stream_counters: true,
    create_consumer: true,
    field_expiry: true,
    variadic_hset: true,
    holding: crate::hold::Holding { keys: false, fields: false },
};

const SNAPSHOTS: &[&[u8]] = &[
    include_bytes!("../testdata/redis-2.8.17.rdb"),
    include_bytes!("../testdata/redis-3.0.5.rdb"),
    include_bytes!("../testdata/redis-3.2.6.rdb"),
    include_bytes!("../testdata/redis-5.0.6.rdb"),
    include_bytes!("../testdata/redis-6.2.14.rdb"),
    include_bytes!("../testdata/redis-7.0.15.rdb"),
    include_bytes!("../testdata/redis-8.2.3.rdb"),
    include_bytes!("../testdata/valkey-8.1.8.rdb"),
    include_bytes!("../testdata/valkey-9.1.2.rdb"),
];

#[test]
fn the_same_data_has_the_same_digest_on_every_server() {
    let mut compared = 0;
    let mut types = std::collections::BTreeSet::new();
    for (index, snapshot) in SNAPSHOTS.iter().enumerate() {
        let (flavor, ours) = values(snapshot);
        types.extend(ours.values().map(|(type_byte, _)| *type_byte));
        for other in &SNAPSHOTS[index..] {
            let (other_flavor, theirs) = values(other);
            for (key, (type_byte, value)) in &ours {
                let Some((other_type, other_value)) = theirs.get(key) else { continue };
                let expires = |type_byte: &u8| matches!(type_byte, 22 | 24 | 25);
                if key.starts_with(b"hash:ttl") && expires(type_byte) != expires(other_type) {
                    continue;
                }
                let digest = canonical(*type_byte, value, flavor).unwrap();
                let other_digest = canonical(*other_type, other_value, other_flavor).unwrap();
                let name = String::from_utf8_lossy(key);
                assert!(digest.matches(&other_digest), "{name}: types {type_byte} and {other_type}");
                compared += 1;
            }
        }
    }
    assert!(compared > 1000, "{compared}");
    // Every type that the nine servers write, modules and zipmaps aside.
    let written = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 24, 25];
    assert_eq!(types.into_iter().collect::<Vec<_>>(), written);
}

#[test]
fn every_value_of_every_server_has_commands() {
    for snapshot in SNAPSHOTS {
        let (flavor, values) = values(snapshot);
        for (key, (type_byte, value)) in values {
            let mut out = Vec::new();
            assert!(value_to_commands(type_byte, &value, flavor, &key, NEW, &mut out).unwrap() > 0);
        }
    }
}

fn digest(type_byte: u8, value: &[u8]) -> ValueDigest {
    canonical(type_byte, value, Flavor::Redis).unwrap()
}

#[test]
fn order_matters_for_lists_only() {
    let (ab, ba) = (b"\x02\x01a\x01b", b"\x02\x01b\x01a");
    assert!(!digest(1, ab).matches(&digest(1, ba)));
    assert!(digest(2, ab).matches(&digest(2, ba)));
    assert!(!digest(1, ab).matches(&digest(2, ab)));
    assert!(!digest(2, b"\x02\x01a\x01b").matches(&digest(2, b"\x02\x02ab\x00")));
    let swapped = (digest(4, b"\x02\x01f\x01v\x01g\x01w"), digest(4, b"\x02\x01g\x01w\x01f\x01v"));
    assert!(swapped.0.matches(&swapped.1));
    assert!(!swapped.0.matches(&digest(4, b"\x02\x01f\x01w\x01g\x01v")));
}

#[test]
fn scores_are_compared_as_numbers() {
    let text = digest(3, b"\x01\x01a\x042.50");
    assert!(text.matches(&digest(5, b"\x01\x01a\x00\x00\x00\x00\x00\x00\x04\x40")));
    assert!(!text.matches(&digest(3, b"\x01\x01a\x042.51")));
    assert!(digest(3, b"\x01\x01a\x02-0").matches(&digest(3, b"\x01\x01a\x010")));
}

#[test]
fn field_expiries_have_a_tolerance() {
    let hash = |min: i64| digest(24, &[&min.to_le_bytes()[..], b"\x02\x00\x01a\x01x\x01\x01b\x01y"].concat());
    assert!(hash(1_000_000).matches(&hash(1_001_000)));
    assert!(!hash(1_000_000).matches(&hash(1_001_001)));
    assert!(!hash(1_000_000).matches(&digest(4, b"\x02\x01a\x01x\x01b\x01y")));
}

#[test]
fn the_cached_cardinality_of_a_hyperloglog_is_left_out() {
    let with = |cache: u8, register: u8| {
        let mut value = vec![18];
        value.extend(b"HYLL\x01\x00\x00\x00");
        value.extend([cache; 8]);
        value.extend([register; 2]);
        digest(0, &value)
    };
    assert!(with(1, 7).matches(&with(2, 7)));
    assert!(!with(1, 7).matches(&with(1, 8)));
}

#[test]
fn a_hyperloglog_is_the_same_sparse_and_dense() {
    let string = |encoding: u8, body: &[u8]| {
        let text = [&b"HYLL"[..], &[encoding], &[0; 11], body].concat();
        let mut value = vec![0x80];
        value.extend((text.len() as u32).to_be_bytes());
        digest(0, &[value, text].concat())
    };
    // Register 0 is 0; 1 and 2 are 5; 3 is 0; 4 is 32; the others 0.
    let sparse = [0x00, 0x80 | 4 << 2 | 1, 0x00, 0x80 | 31 << 2, 0x7f, 0xfa];
    let mut dense = vec![0; 12288];
    for (register, value) in [(1, 5u32), (2, 5), (4, 32)] {
        let bits = value << (register * 6 % 8);
        dense[register * 6 / 8] |= bits as u8;
        dense[register * 6 / 8 + 1] |= (bits >> 8) as u8;
    }
    assert!(string(1, &sparse).matches(&string(0, &dense)));
    dense[9000] = 1;
    assert!(!string(1, &sparse).matches(&string(0, &dense)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_values_never_panic(
        which in 0..SNAPSHOTS.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
            let (flavor, values) = values(SNAPSHOTS[which]);
        for (type_byte, mut value) in values.into_values().filter(|(_, value)| value.len() < 3000) {
            for (index, byte) in &edits {
                let at = index.index(value.len());
                value[at] = *byte;
            }
            let cut = value.len() - cut.index(value.len()) % 3;
            for value in [&value[..], &value[..cut]] {
                let _ = canonical(type_byte, value, flavor);
                let mut out = Vec::new();
                if value_to_commands(type_byte, value, flavor, b"k", NEW, &mut out).is_err() {
                    prop_assert!(out.is_empty());
                }
            }
        }
    }
}
