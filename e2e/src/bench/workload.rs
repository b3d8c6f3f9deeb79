//! The workloads F (full sync) and I (incremental): the same bytes on every machine and in every run.

use std::io::Write;

use anyhow::Result;

use crate::client::{Pipe, encode};

/// Changes whenever the generators do, so that cached data sets of older ones are not used.
pub const REVISION: u32 = 1;

/// Workload F at full size: keys of each kind.
const STRINGS: u64 = 2_000_000;
const MIXED: u64 = 300_000;
const BIG_HASHES: u64 = 20;
const BIG_HASH_FIELDS: u64 = 100_000;

/// Workload I at full size.
const COMMANDS: u64 = 2_000_000;
/// Its 200,000 keys, by kind, so that no command meets a key of another type.
const SETS: u64 = 80_000;
const HASHES: u64 = 30_000;
const COUNTERS: u64 = 20_000;
const LISTS: u64 = 30_000;
const ZSETS: u64 = 20_000;
const MEMBERS: u64 = 20_000;

/// 2033-05-18, in Unix milliseconds: an expiry that no run meets, and the same in a cached data set.
const EXPIRES_AT: u64 = 2_000_000_000_000;

/// Writes workload F into an empty server. At scale 1: 680 MB in memory, 203 MB as RDB.
pub fn fill(port: u16, scale: f64) -> Result<()> {
    let mut pipe = Pipe::open(port)?;
    let mut random = Random::seeded(0xF);
    let mut commands = 0;
    let mut value = Vec::new();

    for index in 0..scaled(STRINGS, scale) {
        let noise = random.between(2, 16);
        random.text(&mut value, 100, noise as usize);
        pipe.command(&[b"SET".as_slice(), format!("str:{index}").as_bytes(), &value])?;
        commands += 1;
    }
    for index in 0..scaled(MIXED, scale) {
        commands += mixed_key(&mut pipe, &mut random, index)?;
    }
    for big in 0..BIG_HASHES {
        let key = format!("big:{big}");
        let fields = scaled(BIG_HASH_FIELDS, scale);
        for first in (0..fields).step_by(100) {
            let mut args = vec![b"HSET".to_vec(), key.clone().into_bytes()];
            for field in first..fields.min(first + 100) {
                args.push(format!("field:{field}").into_bytes());
                args.push(format!("{:06x}", random.next() >> 40).into_bytes());
            }
            pipe.command(&args)?;
            commands += 1;
        }
    }
    pipe.finish(commands)
}

/// Workload I: its commands as bytes to pipe, and how many they are.
pub fn incremental(scale: f64) -> (Vec<u8>, u64) {
    let mut random = Random::seeded(0x1);
    let count = scaled(COMMANDS, scale);
    let mut out = Vec::with_capacity(count as usize * 100);
    let mut value = Vec::new();
    for _ in 0..count {
        match random.between(0, 99) {
            0..40 => {
                random.text(&mut value, 100, 30);
                encode(&mut out, &[b"SET".as_slice(), &random.key("s", SETS), &value]);
            }
            40..55 => {
                random.text(&mut value, 40, 20);
                let field = random.key("f", 10);
                encode(&mut out, &[b"HSET".as_slice(), &random.key("h", HASHES), &field, &value]);
            }
            55..65 => encode(&mut out, &[b"INCR".as_slice(), &random.key("c", COUNTERS)]),
            65..75 => {
                random.text(&mut value, 30, 20);
                encode(&mut out, &[b"LPUSH".as_slice(), &random.key("l", LISTS), &value]);
            }
            75..80 => encode(&mut out, &[b"LTRIM".as_slice(), &random.key("l", LISTS), b"0", b"19"]),
            80..90 => {
                let (key, member) = (random.key("z", ZSETS), random.key("m", 50));
                let score = format!("{}", random.between(0, 1_000_000) as f64 / 100.0);
                encode(&mut out, &[b"ZADD".as_slice(), &key, score.as_bytes(), &member]);
            }
            90..95 => {
                let member = random.key("m", 50);
                encode(&mut out, &[b"SADD".as_slice(), &random.key("t", MEMBERS), &member]);
            }
            _ => {
                let key = random.any_key();
                encode(&mut out, &[b"DEL".as_slice(), &key]);
            }
        }
    }
    (out, count)
}

/// One hash of 5,000,000 fields.
pub fn huge_hash(port: u16, scale: f64) -> Result<()> {
    let mut pipe = Pipe::open(port)?;
    let mut random = Random::seeded(0x5);
    let fields = scaled(5_000_000, scale);
    let mut commands = 0;
    for first in (0..fields).step_by(500) {
        let mut args = vec![b"HSET".to_vec(), b"huge".to_vec()];
        for field in first..fields.min(first + 500) {
            args.push(format!("field:{field}").into_bytes());
            args.push(format!("{:016x}", random.next()).into_bytes());
        }
        pipe.command(&args)?;
        commands += 1;
    }
    pipe.finish(commands)
}

/// One string of 500,000,000 bytes, of noise or of text that LZF shrinks.
pub fn huge_string(port: u16, scale: f64, compressible: bool) -> Result<()> {
    let mut pipe = Pipe::open(port)?;
    let mut random = Random::seeded(0x500);
    let (mut left, mut commands) = (scaled(500_000_000, scale), 0);
    // Sized at once, so that the server does not copy it again and again as it grows.
    pipe.command(&["SETRANGE", "huge", &(left - 1).to_string(), "x"])?;
    let mut offset = 0;
    while left > 0 {
        let size = left.min(1_000_000);
        let mut value = Vec::with_capacity(size as usize + 8);
        while (value.len() as u64) < size {
            if compressible {
                let _ = writeln!(
                    value,
                    "{{\"line\":{},\"state\":\"ready\",\"note\":\"nothing to report\"}}",
                    random.next() % 1000
                );
            } else {
                value.extend_from_slice(&random.next().to_le_bytes());
            }
        }
        value.truncate(size as usize);
        pipe.command(&[b"SETRANGE".as_slice(), b"huge", offset.to_string().as_bytes(), &value])?;
        (left, offset, commands) = (left - size, offset + size, commands + 1);
    }
    pipe.finish(commands + 1)
}

/// `full` reduced by `scale`, never to nothing.
fn scaled(full: u64, scale: f64) -> u64 {
    ((full as f64 * scale) as u64).max(1)
}

/// One of the 300,000 mixed keys; returns how many commands it took.
fn mixed_key(pipe: &mut Pipe, random: &mut Random, index: u64) -> Result<u64> {
    let mut args: Vec<Vec<u8>> = Vec::new();
    let mut value = Vec::new();
    match index % 5 {
        0 => {
            args.extend([b"HSET".to_vec(), format!("hash:{index}").into_bytes()]);
            for field in 0..random.between(3, 12) {
                random.text(&mut value, 16, 10);
                args.extend([format!("f{field}").into_bytes(), value.clone()]);
            }
        }
        1 => {
            args.extend([b"RPUSH".to_vec(), format!("list:{index}").into_bytes()]);
            for _ in 0..random.between(1, 50) {
                random.text(&mut value, 10, 7);
                args.push(value.clone());
            }
        }
        2 => {
            args.extend([b"ZADD".to_vec(), format!("zset:{index}").into_bytes()]);
            for member in 0..random.between(1, 50) {
                args.push(format!("{}", random.between(0, 100_000) as f64 / 10.0).into_bytes());
                args.push(format!("m:{member}").into_bytes());
            }
        }
        3 => {
            args.extend([b"SADD".to_vec(), format!("set:{index}").into_bytes()]);
            for _ in 0..random.between(1, 50) {
                args.push(random.between(0, 1_000_000).to_string().into_bytes());
            }
        }
        _ => {
            let size = random.between(200, 2000) as usize;
            random.text(&mut value, size, size / 3);
            let expiry = (EXPIRES_AT + random.between(0, 1_000_000)).to_string().into_bytes();
            args.extend([
                b"SET".to_vec(),
                format!("exp:{index}").into_bytes(),
                value,
                b"PXAT".to_vec(),
                expiry,
            ]);
        }
    }
    pipe.command(&args)?;
    Ok(1)
}

/// SplitMix64 (Steele, Lea, Flood 2014): its sequence is fixed by its few lines, whatever a crate's next version does.
struct Random(u64);

impl Random {
    fn seeded(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Both ends included.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// `size` bytes: `noise` random letters, then a repeated word that LZF shrinks to a few bytes.
    fn text(&mut self, out: &mut Vec<u8>, size: usize, noise: usize) {
        const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        out.clear();
        while out.len() < noise {
            let mut bits = self.next();
            for _ in 0..10 {
                out.push(LETTERS[(bits & 63) as usize]);
                bits >>= 6;
            }
        }
        out.truncate(noise);
        while out.len() < size {
            out.extend_from_slice(b",state=ok");
        }
        out.truncate(size);
    }

    fn key(&mut self, prefix: &str, keys: u64) -> Vec<u8> {
        format!("{prefix}:{}", self.next() % keys).into_bytes()
    }

    fn any_key(&mut self) -> Vec<u8> {
        let kinds = [("s", SETS), ("h", HASHES), ("c", COUNTERS), ("l", LISTS), ("z", ZSETS), ("t", MEMBERS)];
        let (prefix, keys) = kinds[(self.next() % kinds.len() as u64) as usize];
        self.key(prefix, keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_random_sequence_is_splitmix64() {
        // The reference C code's first numbers for this seed (prng.di.unimi.it/splitmix64.c).
        let mut random = Random::seeded(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn workload_i_is_the_same_every_time_and_has_the_promised_mix() {
        let (bytes, count) = incremental(0.01);
        assert_eq!((bytes.clone(), 20_000), incremental(0.01));
        let share = |name: &str| {
            let word = format!("\r\n${}\r\n{name}\r\n", name.len());
            let found = bytes.windows(word.len()).filter(|window| *window == word.as_bytes()).count();
            found as f64 / count as f64
        };
        let mix = [
            ("SET", 0.40),
            ("HSET", 0.15),
            ("INCR", 0.10),
            ("LPUSH", 0.10),
            ("LTRIM", 0.05),
            ("ZADD", 0.10),
            ("SADD", 0.05),
            ("DEL", 0.05),
        ];
        for (name, promised) in mix {
            let found = share(name);
            assert!((found - promised).abs() < 0.01, "{name}: {found} instead of {promised}");
        }
    }
}
