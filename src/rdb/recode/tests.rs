use super::*;
use crate::rdb::{Decoder, Event, Limits, Step, canonical};
use crate::version::ServerVersion;

fn redis(major: u16, minor: u16, patch: u16) -> ServerVersion {
    ServerVersion { flavor: Flavor::Redis, major, minor, patch }
}

fn valkey(major: u16, minor: u16) -> ServerVersion {
    ServerVersion { flavor: Flavor::Valkey, major, minor, patch: 0 }
}

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

fn each_key(snapshot: &[u8], mut take: impl FnMut(&[u8], u8, &[u8], Flavor)) {
    let mut decoder = Decoder::new(Limits::default());
    let mut at = 0;
    loop {
        let Step::Event { consumed, event } = decoder.next(&snapshot[at..]).unwrap() else { panic!() };
        at += consumed;
        match event {
            Event::Key(record) => {
                let (key, value) = (record.key.to_vec(), record.value.to_vec());
                let type_byte = record.type_byte;
                take(&key, type_byte, &value, decoder.flavor());
            }
            Event::End { .. } => return,
            _ => {}
        }
    }
}

#[test]
fn every_value_of_every_server_fits_every_other_with_the_same_content() {
    let targets = [
        redis(2, 8, 17),
        redis(3, 0, 5),
        redis(3, 2, 6),
        redis(4, 0, 0),
        redis(5, 0, 6),
        redis(6, 2, 14),
        redis(7, 0, 15),
        redis(7, 2, 0),
        redis(8, 2, 3),
        valkey(8, 1),
        valkey(9, 1),
    ];
    let (mut rewritten, mut lost, mut streams) = (0, 0, 0);
    for snapshot in SNAPSHOTS {
        for target in targets {
            let format = TargetFormat::of(target);
            each_key(snapshot, |key, type_byte, value, flavor| {
                let name = format!("{}: type {type_byte} to {target}", key.escape_ascii());
                let mut out = b"before".to_vec();
                let recoded = match recode(type_byte, value, flavor, &format, &mut out) {
                    Ok(recoded) => recoded,
                    Err(NotRecoded::NoEquivalent(Loss::Streams)) => {
                        assert!(!target.has_redis(5, 0) && out == b"before", "{name}");
                        streams += 1;
                        return;
                    }
                    Err(error) => panic!("{name}: {error}"),
                };
                assert!(format.can_load(recoded.type_byte, target.flavor), "{name}");
                let before = canonical(type_byte, value, flavor).unwrap();
                let after = canonical(recoded.type_byte, &out[6..], target.flavor).unwrap();
                assert_eq!(before.matches(&after), !recoded.lost_field_expiry, "{name}");
                assert!(before.without_field_expiries().matches(&after.without_field_expiries()), "{name}");
                assert!(!recoded.lost_field_expiry || !target.has_field_expiry(), "{name}");
                rewritten += usize::from(!format.can_load(type_byte, flavor));
                lost += usize::from(recoded.lost_field_expiry);
            });
        }
    }
    assert!(rewritten > 250 && lost > 10 && streams > 10, "{rewritten} {lost} {streams}");
}

#[test]
fn field_expiries_are_told_in_the_target_s_way() {
    let mut ours = 1_000_000i64.to_le_bytes().to_vec();
    ours.extend(b"\x02\x01\x01a\x011\x00\x01b\x012");
    let mut theirs = Vec::new();
    let target = TargetFormat::of(valkey(9, 0));
    assert_eq!(recode(24, &ours, Flavor::Redis, &target, &mut theirs).unwrap().type_byte, 22);
    let expected = [&b"\x02\x01a\x011"[..], &1_000_000i64.to_le_bytes(), b"\x01b\x012", &[255; 8]].concat();
    assert_eq!(theirs, expected);
    let mut back = Vec::new();
    let target = TargetFormat::of(redis(8, 2, 0));
    assert_eq!(recode(22, &theirs, Flavor::Valkey, &target, &mut back).unwrap().type_byte, 24);
    assert_eq!(back, ours);
}

#[test]
fn scores_become_text_for_old_servers() {
    let value =
        [&b"\x03\x01a"[..], &0.1f64.to_le_bytes(), b"\x01b", &f64::NEG_INFINITY.to_le_bytes(), b"\x01c"];
    let value = [&value.concat()[..], &1e300f64.to_le_bytes()].concat();
    let mut out = Vec::new();
    recode(5, &value, Flavor::Redis, &TargetFormat::of(redis(3, 2, 6)), &mut out).unwrap();
    assert_eq!(out, b"\x03\x01a\x030.1\x01b\xff\x01c\x051e300");
}

#[test]
fn damaged_values_and_those_that_grow_too_large_are_told() {
    let target = TargetFormat::of(redis(3, 0, 0));
    let mut out = b"x".to_vec();
    for (type_byte, value) in [(18u8, &b"\x02\x01\x01a"[..]), (18, b"\x01\x01\x01ab"), (16, b"\x02\x07\x00")]
    {
        assert!(matches!(
            recode(type_byte, value, Flavor::Redis, &target, &mut out),
            Err(NotRecoded::Damaged(_))
        ));
    }
    assert!(matches!(
        recode(19, b"\x00\x00\x01", Flavor::Redis, &TargetFormat::of(redis(5, 0, 0)), &mut out),
        Err(NotRecoded::Damaged(_))
    ));
    let mut value = b"\x02".to_vec();
    for _ in 0..2 {
        value.push(1);
        append_length(40_000, &mut value);
        value.extend(vec![b'x'; 40_000]);
    }
    assert_eq!(recode(18, &value, Flavor::Redis, &target, &mut out), Err(NotRecoded::TooLarge));
    let module = recode(7, b"\x00", Flavor::Redis, &target, &mut out);
    assert_eq!(module, Err(NotRecoded::NoEquivalent(Loss::Modules)));
    assert_eq!(out, b"x");
}
