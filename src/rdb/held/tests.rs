use proptest::prelude::*;

use super::*;
use crate::rdb::{Decoder, Dialect, Event, Limits, Step, canonical, value_to_commands};
use crate::resp::frame::each_frame;
use crate::version::ServerVersion;

/// The hashes with field expiry of a captured snapshot.
fn hashes(snapshot: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut decoder = Decoder::new(Limits::default());
    let (mut at, mut found) = (0, Vec::new());
    loop {
        let Step::Event { consumed, event } = decoder.next(&snapshot[at..]).unwrap() else { panic!() };
        at += consumed;
        match event {
            Event::Key(record) if matches!(record.type_byte, 22 | 24 | 25) => {
                found.push((record.type_byte, record.value.to_vec()));
            }
            Event::End { .. } => return found,
            _ => {}
        }
    }
}

/// Field → expiry, of those that have one.
fn expiries(type_byte: u8, value: &[u8], flavor: Flavor) -> Vec<(Vec<u8>, i64)> {
    let target = ServerVersion { flavor, major: 9, minor: 0, patch: 0 };
    let (mut out, mut found) = (Vec::new(), Vec::new());
    value_to_commands(type_byte, value, flavor, b"k", Dialect::of(target), &mut out).unwrap();
    each_frame(&out, |args| {
        if args.name() == b"HPEXPIREAT" {
            let at = std::str::from_utf8(args.arg(2).unwrap()).unwrap().parse().unwrap();
            found.extend((5..args.len()).map(|field| (args.arg(field).unwrap().to_vec(), at)));
        }
    });
    found.sort();
    found
}

fn check(snapshot: &[u8], flavor: Flavor, types: &[u8]) {
    let hashes = hashes(snapshot);
    let mut seen: Vec<u8> = hashes.iter().map(|(type_byte, _)| *type_byte).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, types);
    for (type_byte, value) in hashes {
        let mut out = b"before".to_vec();
        assert!(hold_fields(type_byte, &value, flavor, &mut out));
        assert_eq!(&out[..6], b"before");
        let held = expiries(type_byte, &out[6..], flavor);
        let expected: Vec<_> = expiries(type_byte, &value, flavor)
            .into_iter()
            .map(|(field, at)| (field, Holding::ALL.field(at)))
            .collect();
        assert!(!expected.is_empty());
        assert_eq!(held, expected, "type {type_byte}");
        // Nothing else has changed: a digest sees through what is held.
        let digest = canonical(type_byte, &out[6..], flavor).unwrap();
        assert!(digest.matches(&canonical(type_byte, &value, flavor).unwrap()));
    }
}

#[test]
fn fields_of_real_snapshots_are_held() {
    check(include_bytes!("../testdata/redis-8.2.3.rdb"), Flavor::Redis, &[24, 25]);
    check(include_bytes!("../testdata/valkey-9.1.2.rdb"), Flavor::Valkey, &[22]);
}

#[test]
fn other_types_are_left_alone() {
    let mut out = Vec::new();
    for type_byte in [0, 4, 16, 22, 23, 99] {
        assert!(!hold_fields(type_byte, b"\x01\x01a\x01b", Flavor::Redis, &mut out));
    }
    assert!(out.is_empty());
}

proptest! {
    #[test]
    fn mutated_values_neither_panic_nor_leave_half_a_value(
        cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        for (snapshot, flavor) in [
            (&include_bytes!("../testdata/redis-8.2.3.rdb")[..], Flavor::Redis),
            (&include_bytes!("../testdata/valkey-9.1.2.rdb")[..], Flavor::Valkey),
        ] {
            for (type_byte, mut value) in hashes(snapshot) {
                let index = at.index(value.len());
                value[index] = byte;
                value.truncate(cut.index(value.len()) + 1);
                let mut out = Vec::new();
                prop_assert!(hold_fields(type_byte, &value, flavor, &mut out) || out.is_empty());
            }
        }
    }
}
