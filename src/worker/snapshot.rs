//! The full sync (PURE): RDB events become commands for the lanes.

pub mod scripted;

use super::outbox::{Outbox, Pending};
use super::route::Router;
use crate::api::plan::ExistingKeys;
use crate::hold::Holding;
use crate::loss::Loss;
use crate::rdb::compat::{Fit, TargetFormat};
use crate::rdb::{
    Dialect, Event, KeyRecord, LargeHead, LargeKind, NotRecoded, PlainString, append_restore_payload,
    hold_fields, plain_string, recode, restore_payload_len,
};
use crate::resp::{array_header, bulk, encode_command, header};
use crate::slot::{slot, tag_for_slot};
use crate::version::Flavor;

/// What the target is like and how keys are to be written.
#[derive(Clone, Debug)]
pub struct SnapshotRules {
    pub format: TargetFormat,
    pub dialect: Dialect,
    /// `SET … PXAT` is known.
    pub set_pxat: bool,
    pub existing: ExistingKeys,
    /// In a replay a key may be our own: with `existingKeys: Fail` it is overwritten. (With `Skip` it
    /// stays, as an earlier attempt of the same snapshot left nothing else.)
    pub replay: bool,
    /// Names this shard in the keys that large values are built under.
    pub stage: String,
    pub holding: Holding,
    /// As a server that loads a file, leave out keys whose time is over.
    pub drop_expired: bool,
    /// How many the target has; `None`: enough.
    pub databases: Option<u64>,
}

impl Staged {
    fn of(key: &[u8], expire_at_ms: Option<i64>, rules: &SnapshotRules, router: &Router) -> Self {
        Self {
            lane: router.lane(key),
            stage: rules.stage_of(key),
            expire_at_ms: expire_at_ms.map(|at| rules.holding.key(at)),
            lossy: false,
            commands_failed: None,
        }
    }
}

impl SnapshotRules {
    /// What a large value is built under until it is whole: in the slot of its key.
    pub fn stage_of(&self, key: &[u8]) -> Vec<u8> {
        let tag = tag_for_slot(slot(key));
        format!("redis-migration:{{{tag}}}:load:{}", self.stage).into_bytes()
    }

    /// Why keys of this database cannot be there.
    fn lacks(&self, db: u64) -> Option<String> {
        let databases = self.databases.filter(|databases| db >= *databases)?;
        Some(format!("the target has {databases} database(s), and this key belongs to {db}; see databaseMap"))
    }

    fn is_over(&self, expire_at_ms: Option<i64>, now_ms: u64) -> bool {
        let over = |at: i64| at <= i64::try_from(now_ms).unwrap_or(i64::MAX);
        self.drop_expired && expire_at_ms.is_some_and(over)
    }

    fn overwrites(&self) -> bool {
        match self.existing {
            ExistingKeys::Replace => true,
            ExistingKeys::Fail => self.replay,
            ExistingKeys::Skip => false,
        }
    }
}

/// What became of an event.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    Nothing,
    /// One key, on this lane.
    Key(usize),
    /// Commands for a part of a key, on this lane; `done` with its last.
    Part {
        lane: usize,
        done: bool,
    },
    /// One key, or the last part of one, without what the target cannot hold of it.
    Lossy(Loss),
    /// Commands on every lane.
    Broadcast,
    /// The key's time was over before.
    Expired,
    /// The key, or a library of functions, cannot be brought to the target.
    Refused {
        key: Vec<u8>,
        why: String,
        kind: Loss,
    },
}

/// A large value that is being built under another name.
#[derive(Clone, Debug)]
pub struct Staged {
    lane: usize,
    stage: Vec<u8>,
    expire_at_ms: Option<i64>,
    /// Its fields have expiries, of which the target knows nothing.
    lossy: bool,
    commands_failed: Option<String>,
}

/// What an event does not say itself.
#[derive(Clone, Copy, Debug)]
pub struct KeyPlace {
    /// Database on the target.
    pub db: u64,
    /// Whose numbering of types applies.
    pub flavor: Flavor,
    pub now_ms: u64,
}

/// Turns one event into commands.
pub fn apply<S>(
    event: &Event<'_>,
    KeyPlace { db, flavor, now_ms }: KeyPlace,
    rules: &SnapshotRules,
    router: &Router,
    staged: &mut Option<Staged>,
    outbox: &mut Outbox<S>,
) -> Applied {
    match event {
        Event::Key(record) => {
            if rules.is_over(record.expire_at_ms, now_ms) {
                return Applied::Expired;
            }
            if let Some(why) = rules.lacks(db) {
                return Applied::Refused { key: record.key.to_vec(), why, kind: Loss::Values };
            }
            let mut value = Vec::new();
            let (record, flavor, lossy) = match fitting(record, flavor, &rules.format, &mut value) {
                Ok(fitting) => fitting,
                Err(error) => return not_recoded(record.key, &error),
            };
            let lane = router.lane(record.key);
            let Some(pending) = outbox.pending(lane) else { return Applied::Nothing };
            pending.select(db);
            write_key(&record, flavor, rules, pending, now_ms);
            outbox.note(lane);
            if lossy { Applied::Lossy(Loss::FieldExpiry) } else { Applied::Key(lane) }
        }
        Event::Function { code } => {
            if !rules.format.has_functions() {
                // The library's name stands in its first line.
                let name = code.split(|&byte| byte == b'\n').next().unwrap_or_default();
                let key = name.get(..name.len().min(100)).unwrap_or_default().to_vec();
                return not_recoded(&key, &NotRecoded::NoEquivalent(Loss::Functions));
            }
            for lane in 0..outbox.lanes() {
                if !outbox.has_lane(lane) {
                    continue;
                }
                if let Some(pending) = outbox.pending(lane) {
                    let out = pending.command();
                    array_header(4, out);
                    for word in [b"FUNCTION".as_slice(), b"LOAD", b"REPLACE", code] {
                        bulk(word, out);
                    }
                    outbox.note(lane);
                }
            }
            Applied::Broadcast
        }
        // Its parts find nothing begun.
        Event::LargeBegin(head) if rules.is_over(head.expire_at_ms, now_ms) => Applied::Expired,
        Event::LargeBegin(head) => match rules.lacks(db) {
            Some(why) => Applied::Refused { key: head.key.to_vec(), why, kind: Loss::Values },
            None => begin_large(head, db, flavor, rules, router, staged, outbox),
        },
        Event::LargeItems { items, .. } => {
            let Some(staged) = staged else { return Applied::Nothing };
            let lane = staged.lane;
            let Some(pending) = outbox.pending(lane) else { return Applied::Nothing };
            let dialect = Dialect { holding: rules.holding, ..rules.dialect };
            match items.append_commands(&staged.stage, dialect, &mut pending.bytes) {
                Ok(count) => pending.commands += u32::try_from(count).unwrap_or(u32::MAX),
                Err(error) => staged.commands_failed = Some(error.to_string()),
            }
            outbox.note(lane);
            Applied::Part { lane, done: false }
        }
        Event::LargeEnd { key } => end_large(key, rules, staged, outbox),
        Event::LargeUnsupported { key, why, .. } => {
            if let Some(staged) = staged.take()
                && let Some(pending) = outbox.pending(staged.lane)
            {
                write(pending, &[b"DEL", &staged.stage]);
            }
            Applied::Refused { key: key.to_vec(), why: (*why).to_owned(), kind: Loss::Values }
        }
        Event::Header { .. }
        | Event::Aux { .. }
        | Event::SelectDb(_)
        | Event::ResizeDb { .. }
        | Event::ModuleAux { .. }
        | Event::SlotInfo { .. }
        | Event::SlotImport { .. }
        | Event::Skipped
        | Event::End { .. } => Applied::Nothing,
    }
}

/// The record as the target can load it, its flavour then, and whether expiries of fields were lost.
pub fn fitting<'a>(
    record: &KeyRecord<'a>,
    flavor: Flavor,
    format: &TargetFormat,
    value: &'a mut Vec<u8>,
) -> Result<(KeyRecord<'a>, Flavor, bool), NotRecoded> {
    if format.can_load(record.type_byte, flavor) {
        return Ok((*record, flavor, false));
    }
    let recoded = recode(record.type_byte, record.value, flavor, format, value)?;
    let record = KeyRecord { type_byte: recoded.type_byte, value, ..*record };
    Ok((record, format.flavor(), recoded.lost_field_expiry))
}

fn not_recoded(key: &[u8], error: &NotRecoded) -> Applied {
    let kind = match error {
        NotRecoded::NoEquivalent(kind) => *kind,
        NotRecoded::Damaged(_) | NotRecoded::TooLarge => Loss::Values,
    };
    Applied::Refused { key: key.to_vec(), why: error.to_string(), kind }
}

fn write_key(
    record: &KeyRecord<'_>,
    flavor: Flavor,
    rules: &SnapshotRules,
    pending: &mut Pending,
    now_ms: u64,
) {
    // RESTORE leaves out fields whose time is over.
    let mut held = Vec::new();
    let fields = rules.holding.fields && hold_fields(record.type_byte, record.value, flavor, &mut held);
    let record = &KeyRecord {
        expire_at_ms: record.expire_at_ms.map(|at| rules.holding.key(at)),
        value: if fields { &held } else { record.value },
        ..*record
    };
    let no_access_data = record.idle_seconds.is_none() && record.lfu.is_none();
    if no_access_data
        && (record.expire_at_ms.is_none() || rules.set_pxat)
        && let Some(text) = plain_string(record.type_byte, record.value)
    {
        // SET costs the target less than RESTORE.
        let mut digits = itoa::Buffer::new();
        let text = match text {
            PlainString::Raw(bytes) => bytes,
            PlainString::Int(number) => digits.format(number).as_bytes(),
        };
        write_set(record, text, rules, pending.command());
    } else {
        write_restore(record, rules, pending, now_ms);
    }
}

fn write_set(record: &KeyRecord<'_>, text: &[u8], rules: &SnapshotRules, out: &mut Vec<u8>) {
    let only_new = !rules.overwrites();
    array_header(3 + usize::from(only_new) + 2 * usize::from(record.expire_at_ms.is_some()), out);
    out.extend_from_slice(b"$3\r\nSET\r\n");
    bulk(record.key, out);
    bulk(text, out);
    if only_new {
        out.extend_from_slice(b"$2\r\nNX\r\n");
    }
    if let Some(at) = record.expire_at_ms {
        out.extend_from_slice(b"$4\r\nPXAT\r\n");
        // 0 would mean "no expiry" to some servers and an error to others.
        bulk(itoa::Buffer::new().format(at.max(1)).as_bytes(), out);
    }
}

fn write_restore(record: &KeyRecord<'_>, rules: &SnapshotRules, pending: &mut Pending, now_ms: u64) {
    pending.commands += restore(record, &rules.format, rules.overwrites(), now_ms, &mut pending.bytes);
}

/// Appends the commands that make a key hold this value: how many.
pub fn restore(
    record: &KeyRecord<'_>,
    format: &TargetFormat,
    replace: bool,
    now_ms: u64,
    out: &mut Vec<u8>,
) -> u32 {
    let mut commands = 1;
    if replace && !format.has_restore_replace() {
        encode_command(&[b"DEL".as_slice(), record.key], out);
        commands += 1;
    }
    let absolute = record.expire_at_ms.is_some() && format.has_restore_absttl();
    let access =
        format.has_restore_idletime_and_freq() && (record.idle_seconds.is_some() || record.lfu.is_some());
    let ttl = match record.expire_at_ms {
        None => 0,
        Some(at) if format.has_restore_absttl() => at.max(1),
        Some(at) => at.saturating_sub(i64::try_from(now_ms).unwrap_or(i64::MAX)).max(1),
    };
    let words = 4
        + usize::from(replace && format.has_restore_replace())
        + usize::from(absolute)
        + 2 * usize::from(access);
    array_header(words, out);
    out.extend_from_slice(b"$7\r\nRESTORE\r\n");
    bulk(record.key, out);
    bulk(itoa::Buffer::new().format(ttl).as_bytes(), out);
    header(b'$', restore_payload_len(record.value), out);
    append_restore_payload(out, record.type_byte, record.value, format.footer_version());
    out.extend_from_slice(b"\r\n");
    if replace && format.has_restore_replace() {
        out.extend_from_slice(b"$7\r\nREPLACE\r\n");
    }
    if absolute {
        out.extend_from_slice(b"$6\r\nABSTTL\r\n");
    }
    if access {
        let (word, number) = match (record.idle_seconds, record.lfu) {
            (Some(idle), _) => (b"IDLETIME".as_slice(), idle),
            (None, lfu) => (b"FREQ".as_slice(), u64::from(lfu.unwrap_or_default())),
        };
        bulk(word, out);
        bulk(itoa::Buffer::new().format(number).as_bytes(), out);
    }
    commands
}

fn begin_large<S>(
    head: &LargeHead<'_>,
    db: u64,
    flavor: Flavor,
    rules: &SnapshotRules,
    router: &Router,
    staged: &mut Option<Staged>,
    outbox: &mut Outbox<S>,
) -> Applied {
    if let Fit::Never(kind) = rules.format.fit(head.type_byte, flavor)
        && head.kind == LargeKind::Stream
    {
        // What follows of it finds nothing that is being built.
        return not_recoded(head.key, &NotRecoded::NoEquivalent(kind));
    }
    let begun = begin(head.key, head.expire_at_ms, db, rules, router, staged, outbox);
    if let Some(staged) = staged {
        staged.lossy = rules.dialect.loses_field_expiry(head.type_byte);
    }
    begun
}

fn begin<S>(
    key: &[u8],
    expire_at_ms: Option<i64>,
    db: u64,
    rules: &SnapshotRules,
    router: &Router,
    staged: &mut Option<Staged>,
    outbox: &mut Outbox<S>,
) -> Applied {
    let begun = Staged::of(key, expire_at_ms, rules, router);
    let lane = begun.lane;
    if let Some(pending) = outbox.pending(lane) {
        pending.select(db);
        // An earlier attempt may have left its part.
        write(pending, &[b"DEL", &begun.stage]);
    }
    *staged = Some(begun);
    Applied::Part { lane, done: false }
}

fn end_large<S>(
    key: &[u8],
    rules: &SnapshotRules,
    staged: &mut Option<Staged>,
    outbox: &mut Outbox<S>,
) -> Applied {
    let Some(Staged { lane, stage, expire_at_ms, lossy, commands_failed }) = staged.take() else {
        return Applied::Nothing;
    };
    let Some(pending) = outbox.pending(lane) else { return Applied::Nothing };
    if let Some(why) = commands_failed {
        write(pending, &[b"DEL", &stage]);
        return Applied::Refused { key: key.to_vec(), why, kind: Loss::Values };
    }
    let mut digits = itoa::Buffer::new();
    let expiry = expire_at_ms.map(|at| digits.format(at.max(1)).as_bytes());
    if rules.overwrites() {
        write(pending, &[b"RENAME", &stage, key]);
        // Not before: a value whose time is over would be gone, and leave the old one in its place.
        if let Some(at) = expiry {
            write(pending, &[b"PEXPIREAT", key, at]);
        }
    } else {
        // Before the key has its name, which may be the name of one that the target had.
        if let Some(at) = expiry {
            write(pending, &[b"PEXPIREAT", &stage, at]);
        }
        write(pending, &[b"RENAMENX", &stage, key]);
        if rules.existing == ExistingKeys::Fail {
            // Nil when the value could not get its name, as small strings answer it.
            write(pending, &[b"SET", &stage, b"", b"NX"]);
        }
        write(pending, &[b"DEL", &stage]);
    }
    outbox.note(lane);
    if lossy { Applied::Lossy(Loss::FieldExpiry) } else { Applied::Part { lane, done: true } }
}

fn write(pending: &mut Pending, words: &[&[u8]]) {
    let out = pending.command();
    array_header(words.len(), out);
    for word in words {
        bulk(word, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::Args;
    use crate::resp::frame::{Parsed, parse_frame};
    use crate::version::ServerVersion;

    fn rules(existing: ExistingKeys, replay: bool, major: u16) -> SnapshotRules {
        let target = ServerVersion { flavor: Flavor::Redis, major, minor: 8, patch: 0 };
        SnapshotRules {
            format: TargetFormat::of(target),
            dialect: Dialect::of(target),
            set_pxat: target.has_redis(6, 2),
            existing,
            replay,
            stage: "s".to_owned(),
            holding: Holding::default(),
            drop_expired: false,
            databases: None,
        }
    }

    /// The commands of lane 0, words joined, staging keys as `STAGE`.
    fn written(outbox: &mut Outbox<()>) -> Vec<String> {
        let bytes = std::mem::take(&mut outbox.pending(0).unwrap().bytes);
        let (mut at, mut spans, mut found) = (0, Vec::new(), Vec::new());
        while at < bytes.len() {
            let Parsed::Command(length) = parse_frame(&bytes[at..], &mut spans).unwrap() else { panic!() };
            let args = Args { frame: &bytes[at..at + length], spans: &spans };
            let words = args.iter().map(|word| {
                let word = String::from_utf8_lossy(word).into_owned();
                if word.starts_with("redis-migration:") { "STAGE".to_owned() } else { word }
            });
            found.push(words.collect::<Vec<_>>().join(" "));
            at += length;
        }
        found
    }

    fn ended(existing: ExistingKeys, replay: bool) -> Vec<String> {
        let mut outbox = Outbox::with_lanes(1);
        let stage = b"redis-migration:{a}:load:s".to_vec();
        let mut staged =
            Some(Staged { lane: 0, stage, expire_at_ms: Some(7), lossy: false, commands_failed: None });
        end_large(b"k", &rules(existing, replay, 7), &mut staged, &mut outbox);
        written(&mut outbox)
    }

    #[test]
    fn a_large_value_takes_its_place_before_it_expires() {
        let expected = ["RENAME STAGE k", "PEXPIREAT k 7"];
        assert_eq!(ended(ExistingKeys::Replace, false), expected);
        assert_eq!(ended(ExistingKeys::Fail, true), expected);
    }

    #[test]
    fn a_large_value_never_touches_a_key_that_is_to_stay() {
        let renamed = ["PEXPIREAT STAGE 7", "RENAMENX STAGE k"];
        assert_eq!(ended(ExistingKeys::Skip, false), [&renamed[..], &["DEL STAGE"]].concat());
        assert_eq!(
            ended(ExistingKeys::Fail, false),
            [&renamed[..], &["SET STAGE  NX", "DEL STAGE"]].concat()
        );
    }

    #[test]
    fn a_target_without_replace_loses_the_old_value_first() {
        let mut outbox = Outbox::<()>::with_lanes(1);
        let record = KeyRecord {
            key: b"k",
            expire_at_ms: None,
            idle_seconds: None,
            lfu: None,
            type_byte: 1,
            value: b"\x01\x01a",
        };
        write_restore(&record, &rules(ExistingKeys::Replace, false, 2), outbox.pending(0).unwrap(), 0);
        let commands = written(&mut outbox);
        assert_eq!(commands[0], "DEL k");
        assert!(commands[1].starts_with("RESTORE k 0 ") && !commands[1].contains("REPLACE"), "{commands:?}");
    }
}
