//! Values as DUMP gives them, as commands for the target (PURE).

use crate::rdb::{KeyRecord, parse_dump, value_to_commands};
use crate::resp::encode_command;
use crate::resp::frame::each_frame;
use crate::slot::{slot, tag_for_slot};
use crate::version::Flavor;
use crate::worker::snapshot::{SnapshotRules, restore};

/// What the source holds under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub payload: Vec<u8>,
    /// Unix ms.
    pub expire_at: Option<i64>,
}

/// Commands that make the key hold the value.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Writing {
    /// Build a large value under another name, in their order; may be sent apart from what follows.
    pub before: Vec<Vec<u8>>,
    /// Take effect together.
    pub frames: Vec<u8>,
    pub count: u32,
}

impl Writing {
    fn add(&mut self, words: &[&[u8]]) {
        encode_command(words, &mut self.frames);
        self.count += 1;
    }
}

/// How values are written.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    pub rules: &'a SnapshotRules,
    /// Of the source.
    pub flavor: Flavor,
    pub now_ms: u64,
    /// A payload of more bytes goes as commands.
    pub max_restore_bytes: u64,
}

impl Writer<'_> {
    /// `None`: the source has no such key. An error says why the target cannot have the value.
    pub fn write(&self, key: &[u8], value: Option<&Value>) -> Result<Writing, String> {
        let mut writing = Writing::default();
        let Some(value) = value else {
            writing.add(&[b"DEL", key]);
            return Ok(writing);
        };
        let dump = parse_dump(&value.payload).map_err(|error| error.to_string())?;
        if !self.rules.format.can_load(dump.type_byte, self.flavor) {
            return Err(format!("the target cannot load RDB type {}", dump.type_byte));
        }
        if value.payload.len() as u64 > self.max_restore_bytes {
            return self.write_large(key, dump.type_byte, dump.value, value.expire_at);
        }
        let record = KeyRecord {
            key,
            expire_at_ms: value.expire_at,
            idle_seconds: None,
            lfu: None,
            type_byte: dump.type_byte,
            value: dump.value,
        };
        writing.count = restore(&record, &self.rules.format, true, self.now_ms, &mut writing.frames);
        Ok(writing)
    }

    fn write_large(
        &self,
        key: &[u8],
        type_byte: u8,
        value: &[u8],
        expire_at: Option<i64>,
    ) -> Result<Writing, String> {
        let tag = tag_for_slot(slot(key));
        let stage = format!("redis-migration:{{{tag}}}:load:{}", self.rules.stage).into_bytes();
        let mut writing = Writing::default();
        let mut frames = Vec::new();
        encode_command(&[b"DEL".as_slice(), &stage], &mut frames);
        value_to_commands(type_byte, value, self.flavor, &stage, self.rules.dialect, &mut frames)
            .map_err(|error| error.to_string())?;
        each_frame(&frames, |args| writing.before.push(args.frame.to_vec()));
        writing.add(&[b"RENAME", &stage, key]);
        if let Some(at) = expire_at {
            writing.add(&[b"PEXPIREAT", key, at.max(1).to_string().as_bytes()]);
        }
        Ok(writing)
    }
}
