//! What a file is to lack, and keys that stand in it otherwise (PURE but for the script).

use std::sync::Arc;

use super::Left;
use super::scripted::Scripted;
use crate::file::Place;
use crate::loss::Loss;
use crate::rdb::checksum::Crc;
use crate::rdb::{Event, KeyRecord, LargeHead, RecordHead, value_start};
use crate::transform::Transform;
use crate::transform::script::ScriptError;

const OPCODE_END: u8 = 255;
/// From here on an RDB ends with a checksum.
const WITH_CHECKSUM: u16 = 5;

/// Decides on each event of an RDB, in order.
pub struct Sieve {
    transform: Arc<Transform>,
    /// Asked about what `transform` lets through.
    script: Option<Scripted>,
    /// What follows belongs to something that stays.
    stays: bool,
    /// In the middle of a value that comes in parts.
    in_parts: bool,
    /// Keys that were left out.
    pub left_out: u64,
}

/// What becomes of an event.
pub enum Passing {
    Kept,
    LeftOut,
    /// A key, or the beginning of one in parts.
    Changed(Change),
    /// A key that is set aside.
    Refused(Left),
}

/// A key as it is to be.
pub struct Change {
    pub key: Vec<u8>,
    /// Unix ms.
    pub expire_at_ms: Option<i64>,
    /// Type and value; `None`: as they are.
    pub value: Option<(u8, Vec<u8>)>,
}

impl Change {
    /// The event in its new form.
    pub fn of<'a>(&'a self, event: &Event<'a>) -> Event<'a> {
        let Self { key, expire_at_ms, value } = self;
        let expire_at_ms = *expire_at_ms;
        match (event, value) {
            (Event::Key(record), None) => Event::Key(KeyRecord { key, expire_at_ms, ..*record }),
            (Event::Key(record), Some((type_byte, value))) => {
                Event::Key(KeyRecord { key, expire_at_ms, type_byte: *type_byte, value, ..*record })
            }
            (Event::LargeBegin(head), _) => Event::LargeBegin(LargeHead { key, expire_at_ms, ..*head }),
            (other, _) => *other,
        }
    }
}

impl Sieve {
    pub fn new(transform: Arc<Transform>) -> Result<Self, ScriptError> {
        let script = transform.script.as_ref().map(|script| script.runner()).transpose()?.map(Scripted::new);
        Ok(Self { transform, script, stays: true, in_parts: false, left_out: 0 })
    }

    /// False: there are more keys than a script's names can be told apart for.
    pub fn has_room(&self) -> bool {
        self.script.as_ref().is_none_or(Scripted::has_room)
    }

    /// What becomes of the event.
    pub fn judge(&mut self, place: Place, event: &Event<'_>) -> Passing {
        match event {
            Event::Key(record) => {
                self.in_parts = false;
                return self.key(place.db, record.key, |script| script.key(place, record));
            }
            Event::LargeBegin(head) => {
                self.in_parts = true;
                return self.key(place.db, head.key, |script| script.large(place, head));
            }
            Event::LargeUnsupported { key, why, .. } if !self.in_parts => {
                return self.key(place.db, key, |_| {
                    let why = format!("filter.lua cannot be asked about it: {why}");
                    let key = key.to_vec();
                    Passing::Refused(Left {
                        db: place.db,
                        key,
                        why,
                        command: "filter.lua",
                        kind: Loss::Values,
                    })
                });
            }
            Event::LargeUnsupported { .. } | Event::LargeEnd { .. } => self.in_parts = false,
            Event::LargeItems { .. } | Event::Skipped => {}
            // Counts of keys are hints, and would be wrong.
            Event::ResizeDb { .. } => {
                return passing(self.transform.databases.admits(place.db) && self.all_keys());
            }
            Event::SlotInfo { .. } => return passing(self.all_keys()),
            Event::SelectDb(db) => return passing(self.transform.databases.admits(*db)),
            // What follows of it is no key.
            Event::ModuleAux { .. } => self.stays = true,
            Event::Header { .. }
            | Event::Aux { .. }
            | Event::Function { .. }
            | Event::SlotImport { .. }
            | Event::End { .. } => return Passing::Kept,
        }
        passing(self.stays)
    }

    fn all_keys(&self) -> bool {
        self.transform.keys.is_open() && self.script.is_none()
    }

    fn key(&mut self, db: u64, key: &[u8], ask: impl FnOnce(&mut Scripted) -> Passing) -> Passing {
        let passing = match &mut self.script {
            _ if !self.transform.admits(db, key) => Passing::LeftOut,
            None => Passing::Kept,
            Some(script) => ask(script),
        };
        self.stays = matches!(passing, Passing::Kept | Passing::Changed(_));
        self.left_out += u64::from(matches!(passing, Passing::LeftOut));
        passing
    }
}

fn passing(stays: bool) -> Passing {
    if stays { Passing::Kept } else { Passing::LeftOut }
}

/// An RDB put together anew from parts of another one.
#[derive(Debug)]
pub struct Remade {
    crc: Crc,
    /// Not handed on yet.
    pub out: Vec<u8>,
}

impl Remade {
    pub fn new() -> Self {
        Self { crc: Crc::new(), out: Vec::new() }
    }

    /// `raw`: the bytes of the event as it came; `changed`: it is another one now.
    pub fn add(&mut self, version: u16, event: &Event<'_>, raw: &[u8], changed: bool) {
        let (head, value) = match event {
            Event::End { .. } => return self.end(version),
            Event::Key(record) if changed => (RecordHead::from(record), record.value),
            Event::LargeBegin(head) if changed => {
                let value = value_start(raw).and_then(|start| raw.get(start..));
                (RecordHead::from(head), value.unwrap_or_default())
            }
            _ => return self.out.extend_from_slice(raw),
        };
        head.append_to(&mut self.out);
        self.out.extend_from_slice(value);
    }

    fn end(&mut self, version: u16) {
        self.out.push(OPCODE_END);
        self.crc.update(&self.out);
        if version >= WITH_CHECKSUM {
            let crc = self.crc.value();
            // Not to be in its own sum.
            self.out.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// What has gathered, to be handed on; not in the middle of the end.
    pub fn take(&mut self, over: bool) -> Vec<u8> {
        if !over {
            self.crc.update(&self.out);
        }
        std::mem::take(&mut self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Pushed;
    use crate::rdb::Limits;
    use crate::rdb::test_captured::{all_captured, captured};
    use crate::transform::script::Script;
    use crate::transform::{DatabaseFilter, KeyFilter, Pattern, Patterns};

    type Keys = Vec<(u64, Vec<u8>)>;

    fn keys_of(rdb: &[u8], limits: Limits) -> Keys {
        let (mut pushed, mut keys) = (Pushed::new(limits), Vec::new());
        let pushing = pushed.push(rdb, |place, event| {
            match event {
                Event::Key(record) => keys.push((place.db, record.key.to_vec())),
                Event::LargeBegin(head) => keys.push((place.db, head.key.to_vec())),
                Event::LargeUnsupported { key, .. } if keys.last().is_none_or(|(_, last)| last != key) => {
                    keys.push((place.db, key.to_vec()));
                }
                _ => {}
            }
            Ok(())
        });
        pushing.unwrap();
        assert!(pushed.is_over() && pushed.undecoded() == 0);
        keys
    }

    fn remade(rdb: &[u8], transform: Transform, limits: Limits, step: usize) -> (Vec<u8>, u64) {
        let (out, left_out, refused) = sieved(rdb, transform, limits, step);
        assert_eq!(refused, []);
        (out, left_out)
    }

    fn sieved(rdb: &[u8], transform: Transform, limits: Limits, step: usize) -> (Vec<u8>, u64, Vec<Left>) {
        let (mut pushed, mut sieve) = (Pushed::new(limits), Sieve::new(Arc::new(transform)).unwrap());
        let (mut remade, mut out, mut refused) = (Remade::new(), Vec::new(), Vec::new());
        for bytes in rdb.chunks(step) {
            let pushing = pushed.push_raw(bytes, |place, event, raw| {
                match sieve.judge(place, &event) {
                    Passing::Kept => remade.add(place.version, &event, raw, false),
                    Passing::Changed(change) => remade.add(place.version, &change.of(&event), raw, true),
                    Passing::LeftOut => {}
                    Passing::Refused(left) => refused.push(left),
                }
                Ok(())
            });
            pushing.unwrap();
            out.extend(remade.take(pushed.is_over()));
        }
        (out, sieve.left_out, refused)
    }

    fn scripted(text: &str) -> Transform {
        Transform::default().with_script(Some(Script::new(text, false).unwrap()))
    }

    /// Captured RDBs of every version lose just what they are to lose, and have a checksum that is right, which
    /// reading them shows.
    #[test]
    fn what_is_left_is_an_rdb_of_the_other_keys() {
        let mut seen = 0;
        for (name, rdb) in all_captured() {
            // With values in parts, too.
            for limits in [Limits::default(), Limits { max_value: 64, ..Limits::default() }] {
                let all = keys_of(&rdb, limits);
                let make = |excluded: Vec<u64>, pattern: &'static str| {
                    let keys = KeyFilter {
                        exclude: Patterns::new([Pattern::Regex(pattern)]).ok(),
                        ..KeyFilter::default()
                    };
                    Transform::new(DatabaseFilter::new(vec![], excluded), keys, &[])
                };
                for (excluded, pattern) in [
                    (vec![], "[aeiou]s?$"),
                    (vec![0], "^$"),
                    (vec![1, 9], "a"),
                    (vec![], "."),
                    (vec![], "^$"),
                ] {
                    let transform = make(excluded.clone(), pattern);
                    let expected: Keys =
                        all.iter().filter(|(db, key)| transform.admits(*db, key)).cloned().collect();
                    for step in [7, rdb.len()] {
                        let (made, left_out) = remade(&rdb, make(excluded.clone(), pattern), limits, step);
                        assert_eq!(keys_of(&made, limits), expected, "{name} {pattern}");
                        assert_eq!(left_out as usize, all.len() - expected.len(), "{name}");
                    }
                }
                seen += 1;
            }
        }
        assert!(seen > 8, "{seen}");
    }

    /// Name, expiry and content are those of before, or what the script makes of them.
    #[test]
    fn a_script_decides_on_each_key() {
        let text = "function key(k)
              if k.type == 'stream' then return false end
              if k.db == 1 then return {key = k.key .. '!', expireAt = 1900000000000} end
              if k.type == 'hash' then return {key = 'h:' .. k.key, rewrite = true} end
            end
            function command(c)
              for at = 3, #c.args, 2 do c.args[at] = 'masked' end
              c.args[1] = 'h:' .. c.args[1]
              return c
            end";
        type Found = Vec<(u64, Vec<u8>, Option<i64>, &'static str, crate::rdb::ValueDigest)>;
        let all_of = |rdb: &[u8]| {
            let (mut pushed, mut found) = (Pushed::new(Limits::default()), Found::new());
            let pushing = pushed.push(rdb, |place, event| {
                if let Event::Key(KeyRecord { key, expire_at_ms, type_byte, value, .. }) = event {
                    let name = crate::rdb::json::type_name(type_byte, place.flavor);
                    let digest = crate::rdb::canonical(type_byte, value, place.flavor).unwrap();
                    found.push((place.db, key.to_vec(), expire_at_ms, name, digest));
                }
                Ok(())
            });
            pushing.unwrap();
            assert!(pushed.is_over());
            found
        };
        for file in ["redis-2.8.17.rdb", "redis-7.0.15.rdb"] {
            let rdb = captured(file);
            let (made, left_out, refused) = sieved(&rdb, scripted(text), Limits::default(), 1000);
            assert_eq!(refused, []);
            let (before, after) = (all_of(&rdb), all_of(&made));
            assert_eq!(before.len() - after.len(), left_out as usize);
            let stay = before.iter().filter(|found| found.3 != "stream");
            assert!(after.len() > 10 && stay.clone().count() == after.len(), "{}", after.len());
            for ((db, key, at, kind, content), (other_db, name, other_at, other_kind, other)) in
                stay.zip(&after)
            {
                assert_eq!((db, kind), (other_db, other_kind));
                let (expected, expected_at) = match (*db, *kind) {
                    (1, _) => ([key, b"!".as_slice()].concat(), &Some(1_900_000_000_000)),
                    (_, "hash") => ([b"h:".as_slice(), key].concat(), at),
                    _ => (key.clone(), at),
                };
                assert_eq!((name, other_at), (&expected, expected_at), "{file}");
                let masked = *kind == "hash" && *db != 1;
                assert_eq!(content.matches(other), !masked, "{file} {}", key.escape_ascii());
            }
            // Values that come in parts keep them.
            let parts = Limits { max_value: 64, ..Limits::default() };
            let renamed = "function key(k) return {key = 'n:' .. k.key} end";
            for step in [7, rdb.len()] {
                let (made, _, refused) = sieved(&rdb, scripted(renamed), parts, step);
                let aside: Vec<&[u8]> = refused.iter().map(|left| left.key.as_slice()).collect();
                let expected = keys_of(&rdb, parts).into_iter().filter(|(_, key)| !aside.contains(&&key[..]));
                let expected: Keys = expected.map(|(db, key)| (db, [b"n:", &key[..]].concat())).collect();
                assert_eq!(keys_of(&made, parts), expected);
                assert!(
                    refused.iter().all(|left| left.why.starts_with("filter.lua cannot be asked")),
                    "{refused:?}"
                );
                let contents = |rdb: &[u8]| all_of(rdb).into_iter().map(|found| found.4).collect::<Vec<_>>();
                let whole = all_of(&rdb).into_iter().filter(|found| !aside.contains(&&found.1[..]));
                assert!(whole.zip(contents(&made)).all(|(before, after)| before.4.matches(&after)), "{file}");
            }
            let rewritten = "function key(k) return {rewrite = true} end function command(c) end";
            let (_, _, refused) = sieved(&rdb, scripted(rewritten), parts, 1000);
            assert!(refused.iter().any(|left| left.why.contains("too large to be rewritten")), "{refused:?}");
        }
    }

    /// A server that finds a key twice does not load the file.
    #[test]
    fn names_that_a_script_gives_twice_are_set_aside() {
        let rdb = captured("redis-7.0.15.rdb");
        let all = keys_of(&rdb, Limits::default());
        let (made, left_out, refused) =
            sieved(&rdb, scripted("function key(k) return {key = 'one'} end"), Limits::default(), 1000);
        let mut databases: Vec<u64> = all.iter().map(|(db, _)| *db).collect();
        databases.dedup();
        let expected: Keys = databases.iter().map(|db| (*db, b"one".to_vec())).collect();
        assert_eq!(keys_of(&made, Limits::default()), expected);
        assert_eq!((left_out, refused.len()), (0, all.len() - expected.len()));
        assert!(refused.iter().all(|left| left.why.contains("another key of the file has the name \"one\"")));
        let failing = "function key(k)\n  if k.type == 'set' then error('no sets') end\nend";
        let (_, _, refused) = sieved(&rdb, scripted(failing), Limits::default(), 1000);
        assert!(
            !refused.is_empty() && refused.iter().all(|left| left.why == "filter.lua:2: no sets"),
            "{refused:?}"
        );
    }
}
