//! What was read, as a replication stream: an RDB, then commands.

use super::ScanError;
use super::usage::Usage;
use crate::clock::unix_millis;
use crate::rdb::checksum::Crc;
use crate::rdb::{RecordHead, append_length, append_restore_payload, append_string, parse_dump};
use crate::resp::{array_header, bulk, encode_command, header};
use crate::spool::{Origin, SpoolWriter};
use crate::version::Flavor;

/// Handed to the spool at once, about.
const ENOUGH: usize = 128 << 10;

const OPCODE_FUNCTION: u8 = 245;
const OPCODE_RESIZE: u8 = 251;
const OPCODE_SELECT: u8 = 254;
const OPCODE_END: u8 = 255;
const TYPE_STRING: u8 = 0;
/// RDBs and RESTORE take from here on how a key was used (Redis 5.0).
const WITH_USAGE: u16 = 9;

/// A value as it was read.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// A string itself.
    Text(&'a [u8]),
    /// What DUMP answers.
    Dump(&'a [u8]),
}

pub struct Emit {
    spool: SpoolWriter,
    buffer: Vec<u8>,
    /// Of the RDB.
    crc: Crc,
    db: Option<u32>,
    /// Spool position of the first byte of the stream.
    stream_at: Option<u64>,
    /// What RESTORE payloads are stamped with in the stream; `None`: as they come.
    stamp: Option<u16>,
    /// Nobody reads the RDB but we.
    own: bool,
    /// The RDB may say how keys were used.
    with_usage: bool,
}

impl Emit {
    /// `own`: the RDB is not for servers, whose version it has.
    pub fn new(spool: SpoolWriter, stamp: Option<u16>, own: bool) -> Self {
        let (buffer, crc) = (Vec::new(), Crc::new());
        Self { spool, buffer, crc, db: None, stream_at: None, stamp, own, with_usage: own }
    }

    pub fn in_snapshot(&self) -> bool {
        self.stream_at.is_none()
    }

    /// A new history, whose RDB is of this version; `flavor` decides what type numbers from 22 on mean.
    pub fn begin(&mut self, version: u16, flavor: Flavor) {
        self.spool.begin(Origin::unnamed(), true);
        self.with_usage = self.own || version >= WITH_USAGE;
        self.buffer.clear();
        (self.crc, self.db, self.stream_at) = (Crc::new(), None, None);
        let magic = match flavor {
            Flavor::Valkey if version >= 80 => format!("VALKEY{version:03}"),
            Flavor::Valkey | Flavor::Redis => format!("REDIS{version:04}"),
        };
        self.buffer.extend_from_slice(magic.as_bytes());
    }

    /// How many keys there will be, about.
    pub fn expect(&mut self, db: u32, keys: u64) {
        self.select(db);
        self.buffer.push(OPCODE_RESIZE);
        append_length(keys, &mut self.buffer);
        append_length(0, &mut self.buffer);
    }

    pub fn function(&mut self, code: &[u8]) {
        self.buffer.push(OPCODE_FUNCTION);
        append_string(code, &mut self.buffer);
    }

    /// A key with its value. False: the value is of a form that cannot be passed on.
    pub fn value(
        &mut self,
        db: u32,
        key: &[u8],
        expire_at: Option<i64>,
        value: Value<'_>,
        usage: Usage,
    ) -> bool {
        self.select(db);
        if self.in_snapshot() {
            self.record(key, expire_at, value, usage)
        } else {
            self.commands(key, expire_at, value, usage)
        }
    }

    /// As a command of the stream.
    pub fn command<A: AsRef<[u8]>>(&mut self, db: u32, args: &[A]) {
        self.select(db);
        encode_command(args, &mut self.buffer);
    }

    /// The RDB is complete; commands follow.
    pub async fn end_snapshot(&mut self) -> Result<(), ScanError> {
        self.buffer.push(OPCODE_END);
        self.crc.update(&self.buffer);
        let crc = self.crc.value();
        self.append().await?;
        self.spool.append(&crc.to_le_bytes(), unix_millis()).await?;
        self.spool.start_stream();
        self.stream_at = Some(self.spool.gauges().end);
        self.db = None;
        Ok(())
    }

    /// Hands over what has gathered, when it is enough.
    pub async fn settle(&mut self) -> Result<(), ScanError> {
        if self.buffer.len() >= ENOUGH { self.flush().await } else { Ok(()) }
    }

    pub async fn flush(&mut self) -> Result<(), ScanError> {
        if self.in_snapshot() {
            self.crc.update(&self.buffer);
        }
        self.append().await
    }

    /// Bytes of the RDB, or of the stream, that were handed over.
    pub fn written(&self) -> u64 {
        self.spool.gauges().end.saturating_sub(self.stream_at.unwrap_or(0))
    }

    async fn append(&mut self) -> Result<(), ScanError> {
        self.spool.append(&self.buffer, unix_millis()).await?;
        self.buffer.clear();
        self.buffer.shrink_to(4 * ENOUGH);
        Ok(())
    }

    fn select(&mut self, db: u32) {
        if self.db.replace(db) == Some(db) {
            return;
        }
        if self.in_snapshot() {
            self.buffer.push(OPCODE_SELECT);
            append_length(u64::from(db), &mut self.buffer);
        } else {
            let mut digits = itoa::Buffer::new();
            encode_command(&[b"SELECT".as_slice(), digits.format(db).as_bytes()], &mut self.buffer);
        }
    }

    fn record(&mut self, key: &[u8], expire_at_ms: Option<i64>, value: Value<'_>, usage: Usage) -> bool {
        let (type_byte, bytes) = match value {
            Value::Text(_) => (TYPE_STRING, &[][..]),
            Value::Dump(payload) => match parse_dump(payload) {
                Ok(dump) if dump.type_byte < 128 => (dump.type_byte, dump.value),
                _ => return false,
            },
        };
        let usage = if self.with_usage { usage } else { Usage::Unknown };
        let (idle_seconds, lfu) = (usage.idle_seconds(), usage.lfu());
        let out = &mut self.buffer;
        RecordHead { key, expire_at_ms, idle_seconds, lfu, type_byte }.append_to(out);
        match value {
            Value::Text(text) => append_string(text, out),
            Value::Dump(_) => out.extend_from_slice(bytes),
        }
        true
    }

    /// SET leaves the count of a key that is there as it is, and one that was changed has just been used.
    fn commands(&mut self, key: &[u8], expire_at: Option<i64>, value: Value<'_>, usage: Usage) -> bool {
        let out = &mut self.buffer;
        let mut digits = itoa::Buffer::new();
        match value {
            Value::Text(text) => {
                array_header(if expire_at.is_some() { 5 } else { 3 }, out);
                for word in [b"SET".as_slice(), key, text] {
                    bulk(word, out);
                }
                if let Some(at) = expire_at {
                    bulk(b"PXAT", out);
                    bulk(digits.format(at.max(1)).as_bytes(), out);
                }
            }
            Value::Dump(payload) => {
                let dump = match parse_dump(payload) {
                    Ok(dump) if dump.type_byte < 128 => dump,
                    _ => return false,
                };
                let known = self.stamp.is_some_and(|stamp| stamp >= WITH_USAGE);
                let frequency = usage.lfu().filter(|_| known);
                let words = 5 + usize::from(expire_at.is_some()) + 2 * usize::from(frequency.is_some());
                array_header(words, out);
                bulk(b"RESTORE", out);
                bulk(key, out);
                bulk(digits.format(expire_at.map_or(0, |at| at.max(1))).as_bytes(), out);
                match self.stamp {
                    // Servers refuse payloads of a newer format than their own. The footer also tells whose types these are.
                    Some(stamp) if stamp < dump.version && (stamp < 80) == (dump.version < 80) => {
                        header(b'$', payload.len(), out);
                        append_restore_payload(out, dump.type_byte, dump.value, stamp);
                        out.extend_from_slice(b"\r\n");
                    }
                    _ => bulk(payload, out),
                }
                bulk(b"REPLACE", out);
                if expire_at.is_some() {
                    bulk(b"ABSTTL", out);
                }
                if let Some(frequency) = frequency {
                    bulk(b"FREQ", out);
                    bulk(digits.format(frequency).as_bytes(), out);
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::{Decoder, Event, Limits, Step};
    use crate::resp::frame::{Parsed, parse_frame};
    use crate::spool::{Next, Part, SpoolLimits, spool};

    /// `RPUSH l a`, `DUMP l` on Redis 7.0.15 (type 18), without a true checksum.
    const DUMP: &[u8] =
        b"\x12\x01\x02\x0a\x0a\x00\x00\x00\x01\x00\x81a\x02\xff\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00";

    #[tokio::test]
    async fn what_is_emitted_is_a_snapshot_and_a_stream() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().to_path_buf();
        let limits =
            SpoolLimits { memory: 1 << 20, disk: 1 << 20, retain: 0, folder, volume: Default::default() };
        let (writer, mut reader) = spool(limits);
        let mut emit = Emit::new(writer, Some(9), false);
        emit.begin(10, Flavor::Redis);
        emit.expect(3, 20_000);
        let long = vec![b'x'; 16_384];
        assert!(emit.value(3, b"short", Some(1_900_000_000_000), Value::Text(b"v"), Usage::Idle(70)));
        assert!(emit.value(3, b"long", None, Value::Text(&long), Usage::Frequency(200)));
        assert!(emit.value(0, b"l", Some(7), Value::Dump(DUMP), Usage::Unknown));
        assert!(!emit.value(0, b"meta", None, Value::Dump(&[243; 20]), Usage::Unknown));
        emit.end_snapshot().await.unwrap();
        emit.value(0, b"short", Some(5), Value::Text(b"w"), Usage::Idle(3));
        emit.value(2, b"l", None, Value::Dump(DUMP), Usage::Frequency(9));
        emit.command(2, &[b"DEL".as_slice(), b"gone"]);
        emit.flush().await.unwrap();

        let (mut rdb, mut stream) = (Vec::new(), Vec::new());
        while reader.is_ready() || stream.is_empty() {
            match reader.next().await.unwrap() {
                Next::Begun { origin, snapshot } => assert!(origin.is_unnamed() && snapshot),
                Next::Block(block) if block.part == Part::Snapshot => rdb.extend_from_slice(&block.bytes),
                Next::Block(block) => stream.extend_from_slice(&block.bytes),
            }
        }
        let (mut decoder, mut at, mut found) = (Decoder::new(Limits::default()), 0, Vec::new());
        loop {
            let db = decoder.db();
            let Step::Event { consumed, event } = decoder.next(&rdb[at..]).unwrap() else {
                panic!("cut short")
            };
            match event {
                Event::Key(record) => {
                    let used = (record.idle_seconds, record.lfu);
                    found.push((db, record.key.to_vec(), record.expire_at_ms, record.value.len(), used));
                }
                Event::End { crc } => {
                    assert_eq!(crc, Some(crate::rdb::checksum::crc64(&rdb[..rdb.len() - 8])));
                    break;
                }
                _ => {}
            }
            at += consumed;
        }
        let expected = [
            (3, b"short".to_vec(), Some(1_900_000_000_000), 2, (Some(70), None)),
            (3, b"long".to_vec(), None, 5 + 16_384, (None, Some(200))),
            (0, b"l".to_vec(), Some(7), DUMP.len() - 11, (None, None)),
        ];
        assert_eq!(found, expected);

        let (mut spans, mut at, mut words) = (Vec::new(), 0, Vec::new());
        while at < stream.len() {
            let Parsed::Command(length) = parse_frame(&stream[at..], &mut spans).unwrap() else {
                panic!("cut")
            };
            let args = crate::resp::Args { frame: &stream[at..at + length], spans: &spans };
            words.push(args.iter().map(<[u8]>::to_vec).collect::<Vec<_>>());
            at += length;
        }
        let line = |words: &[Vec<u8>]| {
            words.iter().map(|word| word.escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
        };
        let lines: Vec<String> = words.iter().map(|words| line(words)).collect();
        assert_eq!(lines[..3], ["SELECT 0", "SET short w PXAT 5", "SELECT 2"]);
        assert!(
            lines[3].starts_with("RESTORE l 0 ") && lines[3].ends_with(" REPLACE FREQ 9"),
            "{}",
            lines[3]
        );
        // Stamped for an older target.
        assert_eq!(parse_dump(&words[3][3]).unwrap().version, 9);
        assert_eq!(lines[4], "DEL gone");
    }
}
