//! Commands that build one value, as that value: of the plain types, which every version loads.
//! Format source: Redis rdb.c `rdbSaveObject` of 2.8, 7.0 and 8.2, Valkey 9 rdb.c for its type 22.

use std::collections::HashMap;

use super::recode::{append_length, append_string, text_score};
use crate::command::decimal;
use crate::resp::Args;
use crate::resp::frame::each_frame;
use crate::version::Flavor;

/// Bytes that a value may grow to: as many as a decoder hands over whole.
const LARGEST: usize = 64 << 20;
/// From this RDB version on scores are stored in binary.
const BINARY_SCORES: u16 = 8;
/// RDB versions that have hashes whose fields expire: Redis 7.4, Valkey 9.
const FIELD_EXPIRY: [u16; 2] = [12, 80];

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotRebuilt {
    #[error(
        "{0} cannot be written into a file; allowed: SET, APPEND, RPUSH, SADD, ZADD, HSET, HMSET, HPEXPIREAT"
    )]
    Command(String),
    #[error("{0}: its arguments cannot be written into a file")]
    Arguments(String),
    #[error("{0} does not go with the commands before it: they build another type")]
    OtherType(String),
    #[error("the value takes more than {LARGEST} bytes")]
    TooLarge,
}

/// Appends the value that these commands build, in order: its type. `None`: they build none. All of them are of
/// one key. `version`: of the RDB that the value is for. On an error `out` is as it was.
pub fn rebuild(
    commands: &[u8],
    flavor: Flavor,
    version: u16,
    out: &mut Vec<u8>,
) -> Result<Option<u8>, NotRebuilt> {
    let mut building = Building::default();
    let mut failed = None;
    each_frame(commands, |args| {
        if failed.is_none() {
            failed = building.add(args).err();
        }
    });
    match failed {
        Some(why) => Err(why),
        None => Ok(building.value.map(|value| value.append(flavor, version, out))),
    }
}

#[derive(Default)]
struct Building {
    value: Option<Value>,
    bytes: usize,
}

enum Value {
    Text(Vec<u8>),
    List(Vec<Vec<u8>>),
    Set(Ordered<()>),
    Zset(Ordered<f64>),
    /// Expiries in Unix ms.
    Hash(Ordered<(Vec<u8>, Option<i64>)>),
}

/// A map that keeps the order of its first entries.
struct Ordered<V> {
    entries: Vec<(Vec<u8>, V)>,
    places: HashMap<Vec<u8>, usize>,
}

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self { entries: Vec::new(), places: HashMap::new() }
    }
}

impl<V> Ordered<V> {
    fn put(&mut self, name: &[u8], value: V) {
        match self.at(name) {
            Some(there) => *there = value,
            None => {
                self.places.insert(name.to_vec(), self.entries.len());
                self.entries.push((name.to_vec(), value));
            }
        }
    }

    fn at(&mut self, name: &[u8]) -> Option<&mut V> {
        let place = *self.places.get(name)?;
        self.entries.get_mut(place).map(|(_, value)| value)
    }
}

impl Building {
    fn add(&mut self, args: &Args<'_>) -> Result<(), NotRebuilt> {
        self.bytes = self.bytes.saturating_add(args.frame.len());
        if self.bytes > LARGEST {
            return Err(NotRebuilt::TooLarge);
        }
        let name = args.name().to_ascii_uppercase();
        let named = || name.escape_ascii().to_string();
        let words: Vec<&[u8]> = args.iter().skip(2).collect();
        if words.is_empty() {
            return Err(NotRebuilt::Arguments(named()));
        }
        match name.as_slice() {
            b"SET" => {
                let [text] = words[..] else { return Err(NotRebuilt::Arguments(named())) };
                self.value = Some(Value::Text(text.to_vec()));
                return Ok(());
            }
            b"APPEND" => {
                let [more] = words[..] else { return Err(NotRebuilt::Arguments(named())) };
                if let Value::Text(text) = self.value.get_or_insert_with(|| Value::Text(Vec::new())) {
                    text.extend_from_slice(more);
                    return Ok(());
                }
            }
            b"RPUSH" => {
                if let Value::List(items) = self.value.get_or_insert_with(|| Value::List(Vec::new())) {
                    items.extend(words.iter().map(|item| item.to_vec()));
                    return Ok(());
                }
            }
            b"SADD" => {
                if let Value::Set(members) = self.value.get_or_insert_with(|| Value::Set(Ordered::default()))
                {
                    words.iter().for_each(|member| members.put(member, ()));
                    return Ok(());
                }
            }
            b"ZADD" => {
                let scored = words.chunks(2).map(|pair| match pair {
                    [score, member] => Some((*member, score_of(score)?)),
                    _ => None,
                });
                let Some(scored) = scored.collect::<Option<Vec<_>>>() else {
                    return Err(NotRebuilt::Arguments(named()));
                };
                if let Value::Zset(members) =
                    self.value.get_or_insert_with(|| Value::Zset(Ordered::default()))
                {
                    scored.into_iter().for_each(|(member, score)| members.put(member, score));
                    return Ok(());
                }
            }
            b"HSET" | b"HMSET" => {
                if !words.len().is_multiple_of(2) {
                    return Err(NotRebuilt::Arguments(named()));
                }
                if let Value::Hash(fields) = self.value.get_or_insert_with(|| Value::Hash(Ordered::default()))
                {
                    for pair in words.chunks_exact(2) {
                        if let [field, value] = pair {
                            fields.put(field, (value.to_vec(), None));
                        }
                    }
                    return Ok(());
                }
            }
            b"HPEXPIREAT" => {
                let [at, word, count, fields @ ..] = &words[..] else {
                    return Err(NotRebuilt::Arguments(named()));
                };
                let at = decimal(at).and_then(|at| i64::try_from(at).ok());
                let (Some(at), true, true) = (
                    at,
                    word.eq_ignore_ascii_case(b"FIELDS"),
                    decimal(count).is_some_and(|count| count == fields.len() as u64),
                ) else {
                    return Err(NotRebuilt::Arguments(named()));
                };
                // Of a value that is not there, it does nothing.
                match &mut self.value {
                    None => return Ok(()),
                    Some(Value::Hash(known)) => {
                        for field in fields {
                            if let Some((_, expiry)) = known.at(field) {
                                *expiry = Some(at);
                            }
                        }
                        return Ok(());
                    }
                    Some(_) => {}
                }
            }
            _ => return Err(NotRebuilt::Command(named())),
        }
        Err(NotRebuilt::OtherType(named()))
    }
}

impl Value {
    fn append(self, flavor: Flavor, version: u16, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Text(text) => {
                append_string(&text, out);
                0
            }
            Self::List(items) => {
                append_length(items.len() as u64, out);
                items.iter().for_each(|item| append_string(item, out));
                1
            }
            Self::Set(members) => {
                append_length(members.entries.len() as u64, out);
                members.entries.iter().for_each(|(member, ())| append_string(member, out));
                2
            }
            Self::Zset(members) => {
                append_length(members.entries.len() as u64, out);
                let (binary, mut text) = (version >= BINARY_SCORES, String::new());
                for (member, score) in &members.entries {
                    append_string(member, out);
                    match binary {
                        true => out.extend_from_slice(&score.to_le_bytes()),
                        false => text_score(*score, &mut text, out),
                    }
                }
                if binary { 5 } else { 3 }
            }
            Self::Hash(fields) => hash(&fields.entries, flavor, version, out),
        }
    }
}

/// A field's name, its value, and when it expires (Unix milliseconds).
type Field = (Vec<u8>, (Vec<u8>, Option<i64>));

fn hash(fields: &[Field], flavor: Flavor, version: u16, out: &mut Vec<u8>) -> u8 {
    let least = fields.iter().filter_map(|(_, (_, at))| *at).min();
    let [redis, valkey] = FIELD_EXPIRY;
    let type_byte = match (least, flavor) {
        (Some(least), Flavor::Redis) if version >= redis => {
            out.extend_from_slice(&least.to_le_bytes());
            24
        }
        (Some(_), Flavor::Valkey) if version >= valkey => 22,
        // The commands came of a value that has none, or of one that such a version cannot have.
        _ => 4,
    };
    append_length(fields.len() as u64, out);
    for (field, (value, at)) in fields {
        if type_byte == 24 {
            let after = at.map_or(0, |at| at.wrapping_sub(least.unwrap_or(at)).wrapping_add(1));
            append_length(after as u64, out);
        }
        append_string(field, out);
        append_string(value, out);
        if type_byte == 22 {
            out.extend_from_slice(&at.unwrap_or(-1).to_le_bytes());
        }
    }
    type_byte
}

/// Options of ZADD are none.
fn score_of(text: &[u8]) -> Option<f64> {
    std::str::from_utf8(text).ok()?.parse().ok().filter(|score: &f64| !score.is_nan())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::test_captured::all_captured;
    use crate::rdb::{Dialect, canonical, value_to_commands};
    use crate::resp::encode_command;
    use crate::version::ServerVersion;
    use proptest::prelude::*;

    fn frames(commands: &[&[&[u8]]]) -> Vec<u8> {
        let mut out = Vec::new();
        commands.iter().for_each(|command| encode_command(command, &mut out));
        out
    }

    fn built(commands: &[&[&[u8]]]) -> Result<Option<(u8, Vec<u8>)>, NotRebuilt> {
        let mut out = Vec::new();
        Ok(rebuild(&frames(commands), Flavor::Redis, 12, &mut out)?.map(|type_byte| (type_byte, out)))
    }

    #[test]
    fn each_member_stands_once_with_its_last_value() {
        let set = built(&[&[b"SADD", b"k", b"a", b"b", b"a"], &[b"SADD", b"k", b"b"]]);
        assert_eq!(set, Ok(Some((2, b"\x02\x01a\x01b".to_vec()))));
        let hash = built(&[&[b"HMSET", b"k", b"a", b"1", b"b", b"2"], &[b"hset", b"k", b"a", b"3"]]);
        assert_eq!(hash, Ok(Some((4, b"\x02\x01a\x013\x01b\x012".to_vec()))));
        let text = built(&[&[b"SET", b"k", b"a"], &[b"APPEND", b"k", b"b"]]);
        assert_eq!(text, Ok(Some((0, b"\x02ab".to_vec()))));
        assert_eq!(built(&[]), Ok(None));
        assert_eq!(built(&[&[b"HPEXPIREAT", b"k", b"5", b"FIELDS", b"1", b"f"]]), Ok(None));
    }

    #[test]
    fn what_builds_no_plain_value_is_refused_by_name() {
        for (commands, said) in [
            (&[&[b"XADD".as_slice(), b"k", b"1-1", b"f", b"v"][..]][..], "XADD cannot be written"),
            (&[&[b"SADD", b"k", b"a"], &[b"RPUSH", b"k", b"a"]], "RPUSH does not go with"),
            (&[&[b"SET", b"k", b"a", b"PX", b"5"]], "SET: its arguments"),
            (&[&[b"SET", b"k"]], "SET: its arguments"),
            (&[&[b"ZADD", b"k", b"NX", b"1", b"a", b"2"]], "ZADD: its arguments"),
            (&[&[b"HSET", b"k", b"f"]], "HSET: its arguments"),
            (&[&[b"HPEXPIREAT", b"k", b"5", b"FIELDS", b"2", b"f"]], "HPEXPIREAT: its arguments"),
            (
                &[&[b"SADD", b"k", b"a"], &[b"HPEXPIREAT", b"k", b"5", b"FIELDS", b"1", b"a"]],
                "HPEXPIREAT does not",
            ),
        ] {
            let error = built(commands).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }

    /// Every value of the captured files: as commands, and back.
    #[test]
    fn values_come_back_from_their_commands() {
        let newest = Dialect::of(ServerVersion { flavor: Flavor::Redis, major: 8, minor: 2, patch: 3 });
        let mut seen = 0;
        for (name, rdb) in all_captured() {
            let mut pushed = crate::file::Pushed::new(crate::rdb::Limits::default());
            let pushing = pushed.push(&rdb, |place, event| {
                let crate::rdb::Event::Key(record) = event else { return Ok(()) };
                let kind = crate::rdb::json::type_name(record.type_byte, place.flavor);
                let mut commands = Vec::new();
                if kind == "stream"
                    || value_to_commands(
                        record.type_byte,
                        record.value,
                        place.flavor,
                        b"k",
                        newest,
                        &mut commands,
                    )
                    .is_err()
                {
                    return Ok(());
                }
                let mut value = Vec::new();
                let type_byte = rebuild(&commands, place.flavor, place.version, &mut value).unwrap().unwrap();
                let canonical = |type_byte, value: &[u8]| canonical(type_byte, value, place.flavor).unwrap();
                let key = record.key.escape_ascii();
                let (before, after) =
                    (canonical(record.type_byte, record.value), canonical(type_byte, &value));
                assert!(before.matches(&after), "{name} {key}: {before:?} {after:?}");
                seen += 1;
                Ok(())
            });
            pushing.unwrap();
        }
        assert!(seen > 100, "{seen}");
    }

    proptest! {
        /// Whatever a script makes of commands.
        #[test]
        fn any_commands_are_taken_or_refused(
            commands in prop::collection::vec(
                (0usize..9, prop::collection::vec("[a-c0-9.FIELDS-]{0,6}", 0..6)), 0..6)
        ) {
            const NAMES: [&str; 9] =
                ["SET", "APPEND", "RPUSH", "SADD", "ZADD", "HSET", "HMSET", "HPEXPIREAT", "DEL"];
            let mut made = Vec::new();
            for (name, words) in &commands {
                let mut args = vec![NAMES[*name].as_bytes(), b"k"];
                args.extend(words.iter().map(String::as_bytes));
                encode_command(&args, &mut made);
            }
            for (flavor, version) in [(Flavor::Redis, 6), (Flavor::Redis, 12), (Flavor::Valkey, 80)] {
                let mut out = b"before".to_vec();
                match rebuild(&made, flavor, version, &mut out) {
                    Ok(Some(type_byte)) => prop_assert!(canonical(type_byte, &out[6..], flavor).is_ok()),
                    Ok(None) | Err(_) => prop_assert_eq!(out, b"before"),
                }
            }
        }
    }
}
