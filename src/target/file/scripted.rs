//! Keys of a file through `key(k)` of `spec.filter.lua` (PURE but for the script).

use super::sieve::{Change, Passing};
use super::{Left, names::Names};
use crate::file::Place;
use crate::hold::Holding;
use crate::loss::Loss;
use crate::rdb::json::{kind_name, type_name};
use crate::rdb::{Dialect, KeyRecord, LargeHead, rebuild, value_to_commands};
use crate::resp::frame::each_frame;
use crate::transform::script::{KeyChange, KeyFacts, Runner, only_key, pass_through};

/// Any command may be asked for: what comes of them is no command, but a value.
const DIALECT: Dialect = Dialect {
    stream_counters: true,
    create_consumer: true,
    field_expiry: true,
    variadic_hset: true,
    holding: Holding { keys: false, fields: false },
};

pub struct Scripted {
    runner: Runner,
    /// Of the keys so far: a server does not load a file that has one twice.
    names: Names,
}

impl Scripted {
    pub fn new(runner: Runner) -> Self {
        Self { runner, names: Names::default() }
    }

    /// False: there are more keys than can be told apart.
    pub fn has_room(&self) -> bool {
        self.names.has_room()
    }

    pub fn key(&mut self, place: Place, record: &KeyRecord<'_>) -> Passing {
        let type_name = type_name(record.type_byte, place.flavor);
        let facts = KeyFacts { db: place.db, key: record.key, type_name, expire_at_ms: record.expire_at_ms };
        self.judge(facts, |runner, name| {
            let mut value = Vec::new();
            let type_byte = rewritten(runner, place, record, name, &mut value)?;
            Ok(type_byte.map(|type_byte| (type_byte, value)))
        })
    }

    pub fn large(&mut self, place: Place, head: &LargeHead<'_>) -> Passing {
        let type_name = kind_name(head.kind);
        let facts = KeyFacts { db: place.db, key: head.key, type_name, expire_at_ms: head.expire_at_ms };
        self.judge(facts, |_, _| {
            Err("filter.lua: the value is too large to be rewritten on its way into a file".to_owned())
        })
    }

    /// `rewrite`: the value as `command(c)` has it, `None` where nothing is left of it.
    fn judge(
        &mut self,
        facts: KeyFacts<'_>,
        rewrite: impl FnOnce(&mut Runner, &[u8]) -> Result<Option<(u8, Vec<u8>)>, String>,
    ) -> Passing {
        let KeyFacts { db, key, expire_at_ms, .. } = facts;
        let refused = |why: String| {
            Passing::Refused(Left { db, key: key.to_vec(), why, command: "filter.lua", kind: Loss::Commands })
        };
        let change = match self.runner.key(facts) {
            Ok(KeyChange::Keep) => None,
            Ok(KeyChange::Drop) => return Passing::LeftOut,
            Ok(KeyChange::Change { key: name, expire_at_ms: at, rewrite: asked }) => {
                let name = name.unwrap_or_else(|| key.to_vec());
                let value = match asked.then(|| rewrite(&mut self.runner, &name)) {
                    None => None,
                    Some(Ok(Some(value))) => Some(value),
                    Some(Ok(None)) => return Passing::LeftOut,
                    Some(Err(why)) => return refused(why),
                };
                Some(Change { key: name, expire_at_ms: at.unwrap_or(expire_at_ms), value })
            }
            Err(why) => return refused(why),
        };
        let name = change.as_ref().map_or(key, |change| &change.key);
        if !self.names.add(db, name) {
            let name = name.escape_ascii();
            return refused(format!("filter.lua: another key of the file has the name \"{name}\" already"));
        }
        change.map_or(Passing::Kept, Passing::Changed)
    }
}

/// Appends the value of a key as the script has it: its type.
fn rewritten(
    runner: &mut Runner,
    place: Place,
    record: &KeyRecord<'_>,
    name: &[u8],
    value: &mut Vec<u8>,
) -> Result<Option<u8>, String> {
    let mut made = Vec::new();
    let KeyRecord { key, type_byte, .. } = *record;
    let commands = value_to_commands(type_byte, record.value, place.flavor, key, DIALECT, &mut made);
    commands.map_err(|error| error.to_string())?;
    let mut passed = Vec::new();
    pass_through(runner, &made, place.db, &mut passed)?;
    let mut fault = None;
    each_frame(&passed, |args| {
        if fault.is_none() {
            fault = only_key(args, name).err();
        }
    });
    match fault {
        Some(why) => Err(why),
        None => rebuild(&passed, place.flavor, place.version, value)
            .map_err(|error| format!("filter.lua: {error}")),
    }
}
