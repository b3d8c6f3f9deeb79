//! Values as DUMP gives them, as commands for the target (PURE).

use crate::rdb::compat::Fit;
use crate::rdb::{Dialect, KeyRecord, NotRecoded, hold_fields, parse_dump, value_to_commands};
use crate::resp::encode_command;
use crate::resp::frame::each_frame;
use crate::version::Flavor;
use crate::worker::snapshot::{SnapshotRules, fitting, restore};

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
    /// The target cannot hold the expiries of its fields.
    pub lossy: bool,
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
        if value.payload.len() as u64 > self.max_restore_bytes {
            if let Fit::Never(kind) = self.rules.format.fit(dump.type_byte, self.flavor) {
                return Err(NotRecoded::NoEquivalent(kind).to_string());
            }
            return self.write_large(key, dump.type_byte, dump.value, value.expire_at);
        }
        let record = KeyRecord {
            key,
            expire_at_ms: value.expire_at.map(|at| self.rules.holding.key(at)),
            idle_seconds: None,
            lfu: None,
            type_byte: dump.type_byte,
            value: dump.value,
        };
        let mut recoded = Vec::new();
        let (record, flavor, lossy) = fitting(&record, self.flavor, &self.rules.format, &mut recoded)
            .map_err(|error| error.to_string())?;
        let mut held = Vec::new();
        let fields =
            self.rules.holding.fields && hold_fields(record.type_byte, record.value, flavor, &mut held);
        let record = KeyRecord { value: if fields { &held } else { record.value }, ..record };
        writing.lossy = lossy;
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
        let stage = self.rules.stage_of(key);
        let lossy = self.rules.dialect.loses_field_expiry(type_byte);
        let mut writing = Writing { lossy, ..Writing::default() };
        let mut frames = Vec::new();
        let dialect = Dialect { holding: self.rules.holding, ..self.rules.dialect };
        encode_command(&[b"DEL".as_slice(), &stage], &mut frames);
        value_to_commands(type_byte, value, self.flavor, &stage, dialect, &mut frames)
            .map_err(|error| error.to_string())?;
        each_frame(&frames, |args| writing.before.push(args.frame.to_vec()));
        writing.add(&[b"RENAME", &stage, key]);
        if let Some(at) = expire_at.map(|at| self.rules.holding.key(at)) {
            writing.add(&[b"PEXPIREAT", key, at.max(1).to_string().as_bytes()]);
        }
        Ok(writing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::plan::ExistingKeys;
    use crate::hold::Holding;
    use crate::rdb::compat::TargetFormat;
    use crate::rdb::{Dialect, append_restore_payload};
    use crate::version::ServerVersion;

    fn write(major: u16, max: u64, value: Option<Value>) -> Result<(Vec<String>, Vec<String>), String> {
        let target = ServerVersion { flavor: Flavor::Redis, major, minor: 8, patch: 0 };
        let rules = SnapshotRules {
            format: TargetFormat::of(target),
            dialect: Dialect::of(target),
            set_pxat: false,
            existing: ExistingKeys::Fail,
            replay: false,
            stage: "s".to_owned(),
            holding: Holding::default(),
            drop_expired: false,
            databases: None,
        };
        let writer = Writer { rules: &rules, flavor: Flavor::Redis, now_ms: 1000, max_restore_bytes: max };
        let writing = writer.write(b"k", value.as_ref())?;
        let names = |frames: &[u8]| {
            let mut names = Vec::new();
            each_frame(frames, |args| {
                let words = args.iter().filter(|word| word.is_ascii() && word.len() < 20);
                names.push(words.map(String::from_utf8_lossy).collect::<Vec<_>>().join(" "));
            });
            names
        };
        let after = names(&writing.frames);
        assert_eq!(after.len(), writing.count as usize);
        Ok((names(&writing.before.concat()), after))
    }

    fn value(type_byte: u8, expire_at: Option<i64>) -> Option<Value> {
        let mut payload = Vec::new();
        append_restore_payload(&mut payload, type_byte, b"\x01\x01a", 9);
        Some(Value { payload, expire_at })
    }

    #[test]
    fn a_key_that_the_source_lacks_goes() {
        assert_eq!(write(7, 100, None), Ok((vec![], vec!["DEL k".to_owned()])));
    }

    #[test]
    fn a_value_replaces_what_is_there_with_its_expiry() {
        let (before, after) = write(7, 100, value(1, Some(5000))).unwrap();
        assert!(before.is_empty() && after.len() == 1, "{before:?} {after:?}");
        assert!(after[0].starts_with("RESTORE k 5000 ") && after[0].ends_with("REPLACE ABSTTL"), "{after:?}");
        // Older targets know neither word.
        let (_, after) = write(2, 100, value(1, Some(5000))).unwrap();
        assert!(after[0] == "DEL k" && after[1].starts_with("RESTORE k 4000"), "{after:?}");
    }

    #[test]
    fn a_large_value_is_built_before_it_takes_its_place() {
        let (before, after) = write(7, 4, value(1, Some(5000))).unwrap();
        assert_eq!(before.len(), 2, "{before:?}");
        assert!(before[0].starts_with("DEL") && before[1].ends_with(" a"), "{before:?}");
        assert!(after[0].starts_with("RENAME") && after[1] == "PEXPIREAT k 5000", "{after:?}");
    }

    #[test]
    fn what_the_target_cannot_have_is_named() {
        assert!(write(3, 100, value(21, None)).unwrap_err().contains("the target cannot have streams"));
        assert!(write(3, 4, value(21, None)).unwrap_err().contains("the target cannot have streams"));
    }
}
