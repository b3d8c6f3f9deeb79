//! The full sync through the script of `spec.filter.lua` (PURE but for the script).
//!
//! A key whose value is to be rewritten goes as the commands that build it, each through `command(c)`, under a
//! staging key as large values do, so that it never stands half written.

use super::{Applied, KeyPlace, SnapshotRules, Staged, apply, begin, end_large};
use crate::command::{Clock, Rewrite, lookup, may_rewrite, rewrite};
use crate::hold::Holding;
use crate::loss::Loss;
use crate::rdb::json::{kind_name, type_name};
use crate::rdb::{Dialect, Event, Items, KeyRecord, LargeHead, value_to_commands};
use crate::resp::frame::each_frame;
use crate::resp::{array_header, bulk};
use crate::transform::script::{KeyChange, KeyFacts, Runner, only_key, pass_through};
use crate::version::ServerVersion;
use crate::worker::outbox::Outbox;
use crate::worker::route::Router;

/// The script, and what it said of the value that is coming in parts.
pub struct Scripting {
    pub runner: Runner,
    large: Large,
}

#[derive(Debug, Default)]
enum Large {
    #[default]
    Dropped,
    /// Under this name on the target.
    Passed(Vec<u8>),
    Rewritten {
        name: Vec<u8>,
        commands: u64,
    },
}

/// What became of an event.
pub enum Scripted {
    Applied(Applied),
    /// The script leaves the key out; `true` where that is to be counted.
    Dropped(bool),
}

/// Where and how a key is written, beside what [`apply`] is given.
#[derive(Clone, Copy)]
pub struct Through<'a> {
    /// Of the source.
    pub db: u64,
    pub place: KeyPlace,
    pub target: ServerVersion,
    pub rules: &'a SnapshotRules,
    pub router: &'a Router,
}

impl Scripting {
    pub fn new(runner: Runner) -> Self {
        Self { runner, large: Large::Dropped }
    }

    pub fn apply<S>(
        &mut self,
        event: &Event<'_>,
        through: Through<'_>,
        staged: &mut Option<Staged>,
        outbox: &mut Outbox<S>,
    ) -> Scripted {
        let Through { place, rules, router, .. } = through;
        let pass = |event: &Event<'_>, staged: &mut Option<Staged>, outbox: &mut Outbox<S>| {
            Scripted::Applied(apply(event, place, rules, router, staged, outbox))
        };
        match event {
            Event::Key(record) => {
                let type_name = type_name(record.type_byte, place.flavor);
                let (name, expire_at_ms, rewrite) =
                    match self.change(record.key, record.expire_at_ms, type_name, through.db) {
                        Ok(Some(change)) => change,
                        Ok(None) => return Scripted::Dropped(true),
                        Err(refused) => return Scripted::Applied(refused),
                    };
                if rewrite {
                    if rules.is_over(expire_at_ms, place.now_ms) {
                        return Scripted::Applied(Applied::Expired);
                    }
                    if let Some(why) = rules.lacks(place.db) {
                        let key = record.key.to_vec();
                        return Scripted::Applied(Applied::Refused { key, why, kind: Loss::Values });
                    }
                    return self.rewrite_key(record, (&name, expire_at_ms), through, staged, outbox);
                }
                pass(&Event::Key(KeyRecord { key: &name, expire_at_ms, ..*record }), staged, outbox)
            }
            Event::LargeBegin(head) => {
                let (name, expire_at_ms, rewrite) =
                    match self.change(head.key, head.expire_at_ms, kind_name(head.kind), through.db) {
                        Ok(Some(change)) => change,
                        Ok(None) => {
                            self.large = Large::Dropped;
                            return Scripted::Dropped(true);
                        }
                        Err(refused) => {
                            self.large = Large::Dropped;
                            return Scripted::Applied(refused);
                        }
                    };
                let applied =
                    pass(&Event::LargeBegin(LargeHead { key: &name, expire_at_ms, ..*head }), staged, outbox);
                self.large = match applied {
                    Scripted::Applied(Applied::Part { .. }) if rewrite => {
                        Large::Rewritten { name, commands: 0 }
                    }
                    Scripted::Applied(Applied::Part { .. }) => Large::Passed(name),
                    // Nothing is being built.
                    _ => Large::Dropped,
                };
                applied
            }
            Event::LargeItems { key, items } => match &mut self.large {
                Large::Dropped => Scripted::Dropped(false),
                Large::Passed(_) => pass(event, staged, outbox),
                Large::Rewritten { name, commands } => {
                    let name = name.clone();
                    let before = *commands;
                    Scripted::Applied(self.rewrite_items(
                        (key, &name),
                        items,
                        before,
                        through,
                        staged,
                        outbox,
                    ))
                }
            },
            Event::LargeEnd { .. } => match std::mem::take(&mut self.large) {
                Large::Dropped => Scripted::Dropped(false),
                Large::Passed(name) => pass(&Event::LargeEnd { key: &name }, staged, outbox),
                Large::Rewritten { name, commands } => {
                    let failed = staged.as_ref().is_some_and(|staged| staged.commands_failed.is_some());
                    if commands == 0 && !failed {
                        *staged = None;
                        return Scripted::Dropped(true);
                    }
                    pass(&Event::LargeEnd { key: &name }, staged, outbox)
                }
            },
            Event::LargeUnsupported { .. } => match std::mem::take(&mut self.large) {
                Large::Dropped => Scripted::Dropped(false),
                Large::Passed(_) | Large::Rewritten { .. } => pass(event, staged, outbox),
            },
            _ => pass(event, staged, outbox),
        }
    }

    /// Name, expiry, and whether the value is to be rewritten; `None`: the key is left out.
    #[expect(clippy::type_complexity, reason = "taken apart at once")]
    fn change(
        &mut self,
        key: &[u8],
        expire_at_ms: Option<i64>,
        type_name: &str,
        db: u64,
    ) -> Result<Option<(Vec<u8>, Option<i64>, bool)>, Applied> {
        match self.runner.key(KeyFacts { db, key, type_name, expire_at_ms }) {
            Ok(KeyChange::Keep) => Ok(Some((key.to_vec(), expire_at_ms, false))),
            Ok(KeyChange::Drop) => Ok(None),
            Ok(KeyChange::Change { key: name, expire_at_ms: at, rewrite }) => {
                let name = name.unwrap_or_else(|| key.to_vec());
                Ok(Some((name, at.unwrap_or(expire_at_ms), rewrite)))
            }
            Err(why) => Err(Applied::Refused { key: key.to_vec(), why, kind: Loss::Commands }),
        }
    }

    fn rewrite_key<S>(
        &mut self,
        record: &KeyRecord<'_>,
        (name, expire_at_ms): (&[u8], Option<i64>),
        through: Through<'_>,
        staged: &mut Option<Staged>,
        outbox: &mut Outbox<S>,
    ) -> Scripted {
        let Through { place, rules, router, .. } = through;
        let refused = |why: String| {
            Scripted::Applied(Applied::Refused { key: record.key.to_vec(), why, kind: Loss::Commands })
        };
        let mut made = Vec::new();
        let dialect = Dialect { holding: Holding::default(), ..rules.dialect };
        let commands =
            value_to_commands(record.type_byte, record.value, place.flavor, record.key, dialect, &mut made);
        if let Err(error) = commands {
            return refused(error.to_string());
        }
        let stage = rules.stage_of(name);
        let mut frames = Vec::new();
        let (count, lossy) = match self.through_script(&made, (name, &stage), through, &mut frames) {
            Ok((0, _)) => return Scripted::Dropped(true),
            Ok(passed) => passed,
            Err(why) => return refused(why),
        };
        begin(name, expire_at_ms, place.db, rules, router, staged, outbox);
        if let Some(staged) = staged {
            staged.lossy = lossy || rules.dialect.loses_field_expiry(record.type_byte);
            if let Some(pending) = outbox.pending(staged.lane) {
                pending.commands(count).extend_from_slice(&frames);
            }
        }
        Scripted::Applied(end_large(name, rules, staged, outbox))
    }

    fn rewrite_items<S>(
        &mut self,
        (key, name): (&[u8], &[u8]),
        items: &Items<'_>,
        before: u64,
        through: Through<'_>,
        staged: &mut Option<Staged>,
        outbox: &mut Outbox<S>,
    ) -> Applied {
        let Some(staged) = staged else { return Applied::Nothing };
        let mut made = Vec::new();
        let dialect = Dialect { holding: Holding::default(), ..through.rules.dialect };
        let mut frames = Vec::new();
        let made_commands = items.append_commands(key, dialect, &mut made).map_err(|error| error.to_string());
        let count = made_commands
            .and_then(|_| self.through_script(&made, (name, &staged.stage), through, &mut frames));
        match count {
            Ok((count, lossy)) => {
                staged.lossy |= lossy;
                if let Some(pending) = outbox.pending(staged.lane) {
                    pending.commands(count).extend_from_slice(&frames);
                }
                self.large =
                    Large::Rewritten { name: name.to_vec(), commands: before.saturating_add(count.into()) };
            }
            Err(why) => staged.commands_failed = Some(why),
        }
        outbox.note(staged.lane);
        Applied::Part { lane: staged.lane, done: false }
    }

    /// What the script makes of commands that build a value, with `stage` in the place of `name`: how many, and
    /// whether the target cannot hold all of what they say.
    fn through_script(
        &mut self,
        made: &[u8],
        (name, stage): (&[u8], &[u8]),
        Through { db, place, target, rules, .. }: Through<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(u32, bool), String> {
        let mut changed = Vec::new();
        pass_through(&mut self.runner, made, db, &mut changed)?;
        let now = i64::try_from(place.now_ms).unwrap_or(i64::MAX);
        // All of them are of one key.
        let clock = Clock { received_at_ms: now, now_ms: now, holding: rules.holding, together: true };
        let (mut ready, mut lossy) = (Vec::new(), false);
        each_frame(&changed, |args| {
            let rewritten = match lookup(args.name()) {
                Some(spec) if may_rewrite(spec, args) => rewrite(spec, args, clock, target, &mut ready),
                _ => Rewrite::Unchanged,
            };
            lossy |= matches!(rewritten, Rewrite::Lossy(_));
            if rewritten == Rewrite::Unchanged {
                ready.extend_from_slice(args.frame);
            }
        });
        let (mut count, mut fault) = (0, None);
        each_frame(&ready, |args| {
            let indexes = match only_key(args, name) {
                Ok(indexes) => indexes,
                Err(why) => {
                    fault.get_or_insert(why);
                    return;
                }
            };
            count += 1;
            array_header(args.len(), out);
            for (index, arg) in args.iter().enumerate() {
                bulk(if indexes.contains(&index) { stage } else { arg }, out);
            }
        });
        fault.map_or(Ok((count, lossy)), Err)
    }
}
