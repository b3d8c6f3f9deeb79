//! One function for each type. Sizes straddle the limits at which servers change the encoding
//! (redis.conf, `*-max-ziplist-*`, `*-max-listpack-*`: 64 bytes, 128 or 512 elements, 8 KiB nodes).

use anyhow::Result;
use rand::Rng;

use super::Sink;
use crate::Client;

const SCORES: [&str; 12] = [
    "0",
    "-0",
    "1",
    "-1",
    "3.5",
    "-2.25e-7",
    "1e300",
    "inf",
    "-inf",
    "9007199254740993",
    "0.1",
    "1700000000.123",
];

pub(super) fn small(sink: &mut Sink, round: usize) -> Result<()> {
    strings(sink, round)?;
    lists(sink, round)?;
    sets(sink, round)?;
    hashes(sink, round)?;
    sorted_sets(sink, round)?;
    if sink.version.has(5, 0) {
        streams(sink, round)?;
    }
    expiries(sink, round)
}

fn strings(sink: &mut Sink, round: usize) -> Result<()> {
    for (i, number) in
        ["0", "-1", "127", "-129", "32768", "2147483648", "-9223372036854775808", "12345678901", "007"]
            .iter()
            .enumerate()
    {
        let key = format!("string:int:{round}:{i}");
        sink.add(&key, args!["SET", key, number])?;
    }
    for length in [0, 1, 20, 21, 44, 45, 63, 64, 200, 5_000, 17_000] {
        let key = format!("string:prose:{round}:{length}");
        let value = sink.prose(length);
        sink.add(&key, args!["SET", key, value])?;
        let key = format!("string:noise:{round}:{length}");
        let value = sink.noise(length);
        sink.add(&key, args!["SET", key, value])?;
    }
    let key = format!("string:float:{round}");
    sink.add(&key, args!["INCRBYFLOAT", key, "3.14159"])?;
    let key = format!("bitmap:{round}");
    for _ in 0..20 {
        let bit = sink.random.random_range(0..4096).to_string();
        sink.add(&key, args!["SETBIT", key, bit, "1"])?;
    }
    // Sparse, and dense in every fourth.
    let key = format!("hll:{round}");
    let items: Vec<Vec<u8>> = (0..if round.is_multiple_of(4) { 5_000 } else { 30 })
        .map(|_| sink.random.random_range(0..1_000_000).to_string().into_bytes())
        .collect();
    add_all(sink, "PFADD", &key, &items)?;
    // Keys that are not text, in every slot-relevant shape.
    let binary: [&[u8]; 3] = [b"\x00\xff\r\n*3\r\n", b"{", b"{}tail"];
    for (i, start) in binary.into_iter().enumerate() {
        let mut key = start.to_vec();
        key.extend_from_slice(format!("{round}:{i}").as_bytes());
        sink.add(&key, args!["SET", key, "binary key"])?;
    }
    Ok(())
}

/// Elements that become integers, short strings and, when `long`, ones over 64 bytes.
fn elements(sink: &mut Sink, count: usize, long: bool) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| match i % 5 {
            0 => format!("{}", i as i64 - 7).into_bytes(),
            1 => format!("{}", (i as i64) << 33).into_bytes(),
            2 => format!("element {i}").into_bytes(),
            3 if long => [format!("{i} ").into_bytes(), sink.prose(90)].concat(),
            _ => [format!("{i} ").into_bytes(), sink.noise(9)].concat(),
        })
        .collect()
}

fn add_all(sink: &mut Sink, command: &str, key: &str, elements: &[Vec<u8>]) -> Result<()> {
    for some in elements.chunks(200) {
        let mut words = vec![command.as_bytes(), key.as_bytes()];
        words.extend(some.iter().map(Vec::as_slice));
        sink.add(key, &words)?;
    }
    Ok(())
}

fn lists(sink: &mut Sink, round: usize) -> Result<()> {
    for (name, count, long) in
        [("one", 1, false), ("short", 9, true), ("many", 300, false), ("nodes", 700, true)]
    {
        let key = format!("list:{name}:{round}");
        let items = elements(sink, count, long);
        add_all(sink, "RPUSH", &key, &items)?;
    }
    // An element too large for a packed node gets one of its own (7.0), as an empty one does not.
    let key = format!("list:plain:{round}");
    let big = sink.prose(20_000);
    sink.add(&key, args!["RPUSH", key, "first", big, "", "last"])
}

fn sets(sink: &mut Sink, round: usize) -> Result<()> {
    for (name, count, shift) in [("16", 20, 0), ("32", 30, 20), ("64", 40, 40), ("table", 600, 3)] {
        let key = format!("set:int:{name}:{round}");
        let items: Vec<Vec<u8>> =
            (0..count).map(|i: i64| ((i - 5) << shift).to_string().into_bytes()).collect();
        add_all(sink, "SADD", &key, &items)?;
    }
    for (name, count, long) in [("pack", 12, false), ("wide", 12, true), ("table", 400, true)] {
        let key = format!("set:{name}:{round}");
        let items = elements(sink, count, long);
        add_all(sink, "SADD", &key, &items)?;
    }
    Ok(())
}

fn hashes(sink: &mut Sink, round: usize) -> Result<()> {
    for (name, count, long) in
        [("one", 1, false), ("pack", 20, false), ("wide", 5, true), ("table", 600, true)]
    {
        let key = format!("hash:{name}:{round}");
        let items: Vec<Vec<u8>> = elements(sink, count, long)
            .into_iter()
            .enumerate()
            .flat_map(|(i, value)| [format!("field {i}").into_bytes(), value])
            .collect();
        add_all(sink, "HMSET", &key, &items)?;
    }
    if sink.version.has_field_expiry() {
        for (name, count) in [("pack", 6), ("table", 700)] {
            let key = format!("hash:expiring:{name}:{round}");
            let items: Vec<Vec<u8>> =
                (0..count * 2).map(|i| format!("{}", i / 2 + 1000 * (i % 2)).into_bytes()).collect();
            add_all(sink, "HSET", &key, &items)?;
            for field in (0..count).step_by(3) {
                let ttl = (3_600_000 + field * 17).to_string();
                sink.add(&key, args!["HPEXPIRE", key, ttl, "FIELDS", "1", field.to_string()])?;
            }
        }
        // Had an expiry once: the server may keep the other form.
        let key = format!("hash:expired:{round}");
        sink.add(&key, args!["HSET", key, "a", "1", "b", "2"])?;
        sink.add(&key, args!["HPEXPIRE", key, "900000", "FIELDS", "1", "a"])?;
        sink.add(&key, args!["HPERSIST", key, "FIELDS", "1", "a"])?;
    }
    Ok(())
}

fn sorted_sets(sink: &mut Sink, round: usize) -> Result<()> {
    for (name, count, long) in [("pack", 12, false), ("wide", 12, true), ("table", 500, true)] {
        let key = format!("zset:{name}:{round}");
        let items: Vec<Vec<u8>> = elements(sink, count, long)
            .into_iter()
            .enumerate()
            .flat_map(|(i, member)| {
                let score = SCORES.get(i % SCORES.len()).copied().unwrap_or("0");
                [score.as_bytes().to_vec(), member]
            })
            .collect();
        add_all(sink, "ZADD", &key, &items)?;
    }
    if sink.version.has(3, 2) {
        let key = format!("geo:{round}");
        for (city, longitude, latitude) in [("Palermo", "13.361389", "38.115556"), ("Oslo", "10.75", "59.91")]
        {
            sink.add(&key, args!["GEOADD", key, longitude, latitude, city])?;
        }
    }
    Ok(())
}

fn streams(sink: &mut Sink, round: usize) -> Result<()> {
    let key = format!("stream:{round}");
    for i in 1..=250 {
        let value = sink.prose(30);
        // Mostly the fields of the entry before, which is stored without repeating them.
        if i % 7 == 0 {
            sink.add(&key, args!["XADD", key, format!("{i}-1"), "other", value, "number", i.to_string()])?;
        } else {
            sink.add(&key, args!["XADD", key, format!("{i}-0"), "field", value])?;
        }
    }
    for i in [1, 20, 249, 250] {
        sink.add(&key, args!["XDEL", key, format!("{i}-0")])?;
    }
    sink.add(&key, args!["XGROUP", "CREATE", key, "readers", "0"])?;
    sink.add(&key, args!["XGROUP", "CREATE", key, "later", "100-0"])?;
    sink.add(&key, args!["XGROUP", "CREATE", key, "idle", "$"])?;
    for (consumer, count) in [("alice", "20"), ("bob", "35"), ("alice", "3")] {
        sink.add(
            &key,
            args!["XREADGROUP", "GROUP", "readers", consumer, "COUNT", count, "STREAMS", key, ">"],
        )?;
    }
    sink.add(&key, args!["XREADGROUP", "GROUP", "later", "carol", "COUNT", "5", "STREAMS", key, ">"])?;
    sink.add(&key, args!["XACK", key, "readers", "2-0", "3-0", "30-0"])?;
    sink.add(&key, args!["XCLAIM", key, "readers", "bob", "0", "5-0", "6-0", "RETRYCOUNT", "7"])?;
    // No entries left, but a last id and a group.
    let key = format!("stream:empty:{round}");
    sink.add(&key, args!["XADD", key, "7-7", "f", "v"])?;
    sink.add(&key, args!["XDEL", key, "7-7"])?;
    sink.add(&key, args!["XGROUP", "CREATE", key, "waiting", "0"])
}

fn expiries(sink: &mut Sink, round: usize) -> Result<()> {
    for (i, milliseconds) in ["2500", "45000", "3600000", "86400000000", "3155760000000"].iter().enumerate() {
        let key = format!("expiring:string:{round}:{i}");
        sink.add(&key, args!["SET", key, "gone some day"])?;
        sink.add(&key, args!["PEXPIRE", key, milliseconds])?;
        let key = format!("expiring:list:{round}:{i}");
        sink.add(&key, args!["RPUSH", key, "a", "b"])?;
        sink.add(&key, args!["PEXPIRE", key, milliseconds])?;
    }
    Ok(())
}

/// Each collection once with `count` elements, and one string of `length` bytes that compresses and one that does not.
pub(super) fn large(sink: &mut Sink, count: usize, length: usize) -> Result<()> {
    let items = elements(sink, count, true);
    add_all(sink, "RPUSH", "large:list", &items)?;
    add_all(sink, "SADD", "large:set", &items)?;
    let pairs: Vec<Vec<u8>> =
        items.iter().enumerate().flat_map(|(i, v)| [format!("{i}").into_bytes(), v.clone()]).collect();
    add_all(sink, "HMSET", "large:hash", &pairs)?;
    add_all(sink, "ZADD", "large:zset", &pairs)?;
    let prose = sink.prose(length);
    sink.add("large:prose", args!["SET", "large:prose", prose])?;
    let noise = sink.noise(length);
    sink.add("large:noise", args!["SET", "large:noise", noise])?;
    if sink.version.has(5, 0) {
        for item in &items {
            sink.add("large:stream", args!["XADD", "large:stream", "*", "f", item])?;
        }
        sink.add("large:stream", args!["XGROUP", "CREATE", "large:stream", "all", "0"])?;
        sink.add(
            "large:stream",
            args!["XREADGROUP", "GROUP", "all", "one", "COUNT", "2000", "STREAMS", "large:stream", ">"],
        )?;
    }
    sink.flush()
}

/// Mostly strings, as in most databases.
pub(super) fn many(sink: &mut Sink, count: usize) -> Result<()> {
    for i in 0..count {
        let key = format!("many:{i}");
        let length = sink.random.random_range(10..200);
        let value = sink.prose(length);
        let number = i.to_string();
        match i % 10 {
            0 => sink.add(&key, args!["HMSET", key, "name", value, "id", number, "state", "paid"])?,
            1 => sink.add(&key, args!["RPUSH", key, number, value, "b", "c"])?,
            2 => sink.add(&key, args!["SADD", key, number, "red", "green"])?,
            3 => sink.add(&key, args!["ZADD", key, number, "a", "2.5", value])?,
            4 => sink.add(&key, args!["SETEX", key, "86400", value])?,
            _ => sink.add(&key, args!["SET", key, value])?,
        }
    }
    Ok(())
}

/// Libraries live on every node; a cluster gets the same ones everywhere.
pub(super) fn functions(client: &mut Client) -> Result<()> {
    if client.version.has(7, 0) {
        for node in &mut client.nodes {
            for name in ["counters", "lists"] {
                let code = format!(
                    "#!lua name={name}\nredis.register_function('{name}_get', function(keys) return redis.call('GET', keys[1]) end)"
                );
                node.run(args!["FUNCTION", "LOAD", "REPLACE", code])?;
            }
        }
    }
    Ok(())
}
