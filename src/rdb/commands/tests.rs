use super::*;
use crate::hold::Holding;
use crate::rdb::{Decoder, Event, Limits, Step};

const NONE: Holding = Holding { keys: false, fields: false };
const NEW: Dialect = Dialect {
    stream_counters: true,
    create_consumer: true,
    field_expiry: true,
    variadic_hset: true,
    holding: NONE,
};
const OLD: Dialect = Dialect {
    stream_counters: false,
    create_consumer: false,
    field_expiry: false,
    variadic_hset: false,
    holding: NONE,
};

/// Commands with their arguments joined by spaces.
fn lines(mut resp: &[u8]) -> Vec<String> {
    fn number(resp: &mut &[u8], marker: u8) -> usize {
        assert_eq!(resp[0], marker);
        let end = resp.iter().position(|&byte| byte == b'\r').unwrap();
        let number = std::str::from_utf8(&resp[1..end]).unwrap().parse().unwrap();
        *resp = &resp[end + 2..];
        number
    }
    let mut lines = Vec::new();
    while !resp.is_empty() {
        let mut args = Vec::new();
        for _ in 0..number(&mut resp, b'*') {
            let length = number(&mut resp, b'$');
            args.push(String::from_utf8_lossy(&resp[..length]).into_owned());
            assert_eq!(&resp[length..length + 2], b"\r\n");
            resp = &resp[length + 2..];
        }
        lines.push(args.join(" "));
    }
    lines
}

fn commands(type_byte: u8, value: &[u8], dialect: Dialect) -> Result<Vec<String>, RdbError> {
    let mut out = b"".to_vec();
    let count = value_to_commands(type_byte, value, Flavor::Redis, b"k", dialect, &mut out)?;
    let lines = lines(&out);
    assert_eq!(count, lines.len() as u64);
    Ok(lines)
}

#[test]
fn one_command_for_a_small_value() {
    assert_eq!(commands(0, b"\xc0\xf4", NEW).unwrap(), ["SET k -12"]);
    assert_eq!(commands(1, b"\x02\x01a\xc0\x05", NEW).unwrap(), ["RPUSH k a 5"]);
    assert_eq!(commands(2, b"\x01\xc3\x06\x0b\x01ab\xe0\x00\x01", NEW).unwrap(), ["SADD k abababababa"]);
    assert_eq!(commands(4, b"\x01\x01f\x01v", NEW).unwrap(), ["HSET k f v"]);
    assert_eq!(
        commands(3, b"\x03\x01a\x031.5\x01b\xfe\x01c\xff", NEW).unwrap(),
        ["ZADD k 1.5 a inf b -inf c"]
    );
    let intset = b"\x0c\x02\x00\x00\x00\x02\x00\x00\x00\xff\xff\x07\x00";
    assert_eq!(commands(11, intset, NEW).unwrap(), ["SADD k -1 7"]);
}

#[test]
fn old_servers_take_one_field_per_hset() {
    assert_eq!(commands(4, b"\x02\x01f\x01v\x01g\x01w", OLD).unwrap(), ["HMSET k f v g w"]);
}

#[test]
fn commands_are_bounded_in_elements_and_bytes() {
    let mut value = b"\x80\x00\x00\x04\x01".to_vec();
    (0..1025u32).for_each(|_| value.extend(b"\x01x"));
    let sizes: Vec<_> = commands(1, &value, NEW).unwrap().iter().map(|line| line.len()).collect();
    assert_eq!(sizes, [7 + 2 * 512, 7 + 2 * 512, 7 + 2]);

    let mut value = b"\x04".to_vec();
    for length in [600_000u32, 600_000, 3_000_000, 1] {
        value.push(0x80);
        value.extend(length.to_be_bytes());
        value.extend(std::iter::repeat_n(b'x', length as usize));
    }
    let sizes: Vec<_> = commands(1, &value, NEW).unwrap().iter().map(|line| line.len() - 8).collect();
    assert_eq!(sizes, [600_000, 600_000, 3_000_000, 1]);

    let text = [&b"\x80\x00\x20\x00\x01"[..], &vec![b'y'; (2 << 20) + 1]].concat();
    let lines = commands(0, &text, NEW).unwrap();
    let names: Vec<_> = lines.iter().map(|line| (&line[..4], line.len())).collect();
    assert_eq!(names, [("SET ", 6 + (1 << 20)), ("APPE", 9 + (1 << 20)), ("APPE", 9 + 1)]);
}

#[test]
fn field_expiries_are_grouped_by_time_or_left_out() {
    let mut value = 1_000_000i64.to_le_bytes().to_vec();
    value.extend(b"\x04\x01\x01a\x011\x00\x01b\x012\x03\x01c\x013\x01\x01d\x014");
    assert_eq!(
        commands(24, &value, NEW).unwrap(),
        ["HSET k a 1 b 2 c 3 d 4", "HPEXPIREAT k 1000000 FIELDS 2 a d", "HPEXPIREAT k 1000002 FIELDS 1 c"]
    );
    assert_eq!(commands(24, &value, OLD).unwrap(), ["HMSET k a 1 b 2 c 3 d 4"]);
}

#[test]
fn scores_read_back_as_the_same_number() {
    for bits in (0..=u64::MAX).step_by(0x0003_1415_9265_3589) {
        let score = f64::from_bits(bits);
        if score.is_nan() {
            continue;
        }
        let mut text = String::new();
        write_score(&mut text, score);
        assert_eq!(text.parse::<f64>().unwrap().to_bits(), bits, "{text}");
        assert!(text.len() <= 30, "{text}");
    }
}

#[test]
fn streams_with_groups() {
    let snapshot = include_bytes!("../testdata/redis-7.0.15.rdb");
    let mut decoder = Decoder::new(Limits::default());
    let mut at = 0;
    loop {
        let Step::Event { consumed, event } = decoder.next(&snapshot[at..]).unwrap() else { panic!() };
        at += consumed;
        let Event::Key(record) = event else { continue };
        if record.key == b"stream:one" {
            let lines = commands(record.type_byte, record.value, NEW).unwrap();
            assert_eq!(
                lines,
                ["XADD k 5-1 f v g 1", "XADD k 7-0 other z", "XSETID k 7-0 ENTRIESADDED 3 MAXDELETEDID 5-2"]
            );
            assert_eq!(commands(record.type_byte, record.value, OLD).unwrap()[2], "XSETID k 7-0");
        }
        if record.key == b"stream:big" {
            let lines = commands(record.type_byte, record.value, NEW).unwrap();
            assert_eq!(lines.iter().filter(|line| line.starts_with("XADD k")).count(), 290);
            assert!(lines.contains(&"XGROUP CREATE k g1 102-2".to_string()));
            assert!(lines.contains(&"XGROUP CREATECONSUMER k g1 idle".to_string()));
            assert!(lines.contains(
                &"XCLAIM k g1 c2 0 100-2 TIME 1700000000000 RETRYCOUNT 7 FORCE JUSTID".to_string()
            ));
            assert_eq!(lines.iter().filter(|line| line.starts_with("XCLAIM k g1 ")).count(), 7);
            return;
        }
    }
}

#[test]
fn a_value_must_end_where_its_elements_do() {
    let trailing = RdbError::Value { type_byte: 1, offset: 3, fault: Fault::Trailing(1) };
    assert_eq!(commands(1, b"\x01\x01a\x00", NEW), Err(trailing));
    assert!(commands(1, b"\x02\x01a", NEW).unwrap_err().to_string().contains("ends early"));
    assert!(commands(7, b"\x01\x00", NEW).unwrap_err().to_string().contains("module data has no commands"));
}
