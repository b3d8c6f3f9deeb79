//! What a scan read again, through the script of `spec.filter.lua`.
//!
//! SET and RESTORE of such a stream are keys as they are now, so that `key(k)` decides on them as on those of the
//! snapshot. What the key was before leaves the target as if it were deleted, by the name that `command(c)` gives it
//! then: the script may leave it out now, or call it otherwise.

use super::{Onward, Stream, Taken, refused};
use crate::command::{CommandSpec, decimal, lookup};
use crate::rdb::json::type_name;
use crate::rdb::{Dialect, Dump, parse_dump, value_to_commands};
use crate::resp::frame::each_frame;
use crate::resp::{Args, encode_command};
use crate::transform::script::{CommandChange, KeyChange, KeyFacts, Runner, only_key, pass_through};
use crate::version::Flavor;

/// A key as a scan tells it.
struct Read<'a> {
    key: &'a [u8],
    /// Unix ms.
    expire_at_ms: Option<i64>,
    value: Value<'a>,
}

enum Value<'a> {
    Text(&'a [u8]),
    Dump { payload: &'a [u8], dump: Dump<'a>, flavor: Flavor },
}

/// Commands in the place of the one that was read.
#[derive(Default)]
struct Made {
    frames: Vec<u8>,
    count: u32,
}

impl Made {
    fn add<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        encode_command(args, &mut self.frames);
        self.count = self.count.saturating_add(1);
    }

    /// Deletes this key, and does nothing else.
    fn is_of(&self, name: &[u8]) -> bool {
        let mut frame = Vec::new();
        encode_command(&[b"DEL", name], &mut frame);
        self.frames == frame
    }
}

impl<'a> Read<'a> {
    /// `None`: the command tells no value.
    fn of(args: &Args<'a>) -> Option<Self> {
        let key = args.arg(1)?;
        let time = |at: Option<&[u8]>| i64::try_from(decimal(at?)?).ok();
        match args.name() {
            b"SET" => Some(Self { key, expire_at_ms: time(args.arg(4)), value: Value::Text(args.arg(2)?) }),
            b"RESTORE" => {
                let payload = args.arg(3)?;
                let dump = parse_dump(payload).ok()?;
                // Below 80 the flavours agree on all types that there are.
                let flavor = if dump.version < 80 { Flavor::Redis } else { Flavor::Valkey };
                let expire_at_ms = time(args.arg(2)).filter(|at| *at != 0);
                Some(Self { key, expire_at_ms, value: Value::Dump { payload, dump, flavor } })
            }
            _ => None,
        }
    }

    fn facts(&self, db: u64) -> KeyFacts<'a> {
        let type_name = match &self.value {
            Value::Text(_) => "string",
            Value::Dump { dump, flavor, .. } => type_name(dump.type_byte, *flavor),
        };
        KeyFacts { db, key: self.key, type_name, expire_at_ms: self.expire_at_ms }
    }

    /// Under this name, as a whole.
    fn whole(&self, name: &[u8], expire_at_ms: Option<i64>) -> Made {
        let (mut made, mut digits) = (Made::default(), itoa::Buffer::new());
        let at = expire_at_ms.map(|at| digits.format(at.max(1)).as_bytes());
        match (&self.value, at) {
            (Value::Text(text), None) => made.add(&[b"SET", name, text]),
            (Value::Text(text), Some(at)) => made.add(&[b"SET", name, text, b"PXAT", at]),
            (Value::Dump { payload, .. }, None) => {
                made.add(&[b"RESTORE", name, b"0", payload, b"REPLACE"]);
            }
            (Value::Dump { payload, .. }, Some(at)) => {
                made.add(&[b"RESTORE", name, at, payload, b"REPLACE", b"ABSTTL"]);
            }
        }
        made
    }

    /// Under this name, by the commands that build it, each through the script.
    fn rewritten(
        &self,
        (name, expire_at_ms): (&[u8], Option<i64>),
        db: u64,
        dialect: Dialect,
        script: &mut Runner,
    ) -> Result<Made, String> {
        let (mut building, mut through) = (Vec::new(), Vec::new());
        match &self.value {
            Value::Text(text) => encode_command(&[b"SET", self.key, text], &mut building),
            Value::Dump { dump, flavor, .. } => {
                value_to_commands(dump.type_byte, dump.value, *flavor, self.key, dialect, &mut building)
                    .map_err(|error| error.to_string())?;
            }
        }
        pass_through(script, &building, db, &mut through)?;
        let (mut made, mut fault) = (Made::default(), None);
        made.add(&[b"DEL", name]);
        let before = made.count;
        each_frame(&through, |args| match only_key(args, name) {
            Ok(_) => {
                made.frames.extend_from_slice(args.frame);
                made.count = made.count.saturating_add(1);
            }
            Err(why) => _ = fault.get_or_insert(why),
        });
        if let Some(at) = expire_at_ms.filter(|_| made.count > before) {
            made.add(&[b"PEXPIREAT", name, itoa::Buffer::new().format(at.max(1)).as_bytes()]);
        }
        fault.map_or(Ok(made), Err)
    }
}

impl Stream {
    /// `None`: the command tells no value of a key.
    pub(super) fn judge_read<S>(
        &mut self,
        spec: &CommandSpec,
        args: &Args<'_>,
        to: &mut Onward<'_, S>,
    ) -> Option<Taken> {
        let read = Read::of(args)?;
        let script = to.script.as_mut()?;
        let (db, target) = (self.place.db, to.rules.target);
        let mut made = match gone(read.key, db, script) {
            Ok(gone) => gone,
            Err(why) => return Some(refused(args, &why)),
        };
        let change = match script.key(read.facts(db)) {
            Ok(change) => change,
            Err(why) => return Some(refused(args, &why)),
        };
        let (name, value) = match change {
            KeyChange::Drop => {
                *to.filtered += 1;
                return Some(self.several(&made.frames, made.count, args, to));
            }
            // Nothing but the value itself.
            KeyChange::Keep if made.is_of(read.key) => return Some(self.judged(Some(spec), args, to)),
            KeyChange::Keep => (read.key.to_vec(), read.whole(read.key, read.expire_at_ms)),
            KeyChange::Change { key, expire_at_ms, rewrite } => {
                let name = key.unwrap_or_else(|| read.key.to_vec());
                let expire_at_ms = expire_at_ms.unwrap_or(read.expire_at_ms);
                let value = if rewrite {
                    let dialect = Dialect::of(target);
                    if let Value::Dump { dump, .. } = &read.value {
                        self.lost_expiries += u64::from(dialect.loses_field_expiry(dump.type_byte));
                    }
                    read.rewritten((&name, expire_at_ms), db, dialect, script)
                } else {
                    Ok(read.whole(&name, expire_at_ms))
                };
                match value {
                    Ok(value) => (name, value),
                    Err(why) => return Some(refused(args, &why)),
                }
            }
        };
        // The value takes the place of what had its name.
        if made.is_of(&name) {
            made = value;
        } else {
            made.frames.extend_from_slice(&value.frames);
            made.count = made.count.saturating_add(value.count);
        }
        Some(self.several(&made.frames, made.count, args, to))
    }
}

/// What the script makes of the end of a key.
fn gone(key: &[u8], db: u64, script: &mut Runner) -> Result<Made, String> {
    let mut made = Made::default();
    made.add(&[b"DEL", key]);
    let (mut frames, mut changed) = (Vec::new(), Ok(CommandChange::Keep));
    each_frame(&made.frames, |args| changed = script.command(lookup(args.name()), args, db, &mut frames));
    match changed? {
        CommandChange::Keep => Ok(made),
        CommandChange::Drop => Ok(Made::default()),
        CommandChange::Replaced(count) => Ok(Made { frames, count }),
    }
}
