//! In which order commands are sent again (PURE).
//!
//! Pipelines go on when a command is refused for a moment (a key on the move, short memory), so that later
//! ones may stand already. Whatever touches a key of a refused command must follow it, and is sent again,
//! too, which it must bear; commands on other keys need not wait.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::outbox::Trouble;
use super::repair::{Command, Unit, commands, is, is_stage, transaction_around, unit_of};
use crate::command::{Class, class_of, keys, lookup};
use crate::resp::frame::each_frame;
use crate::resp::{Args, encode_command};
use crate::target::keys::{guard_value, parse_guard};

/// What is known of the batches of one lane that are looked at together, in their order.
#[derive(Debug, Default)]
pub struct Mending {
    /// Keys of commands that are to be sent again.
    late: HashSet<Vec<u8>>,
    /// Those of them whose command does something else where a later one stands already.
    bound: HashSet<Vec<u8>>,
    /// The highest offset of each guard that stands.
    standing: HashMap<Vec<u8>, i64>,
    /// A guard stands that lies behind a command to be sent again.
    pub out_of_order: bool,
    /// Keys that sending again does not bring right.
    spoiled: HashSet<(u64, Vec<u8>)>,
}

/// What becomes of one batch.
#[derive(Debug, Default)]
pub struct Plan {
    /// Sent again, in this order.
    pub again: Vec<Unit>,
    /// Where units start that are left as they are: their keys are spoiled.
    pub left: Vec<usize>,
}

/// Key, history and offset.
pub(super) type Guard = (Vec<u8>, (u64, i64));

impl Mending {
    /// First, for every batch: which guards stand.
    pub fn note(&mut self, trouble: &Trouble, failed: &[Unit]) {
        let bytes = &trouble.batch.bytes;
        for range in units(&commands(bytes, trouble.batch.db)) {
            if failed.iter().any(|unit| unit.at == range.start) {
                continue;
            }
            if let Some((key, (_, offset))) = bytes.get(range).and_then(guard) {
                let highest = self.standing.entry(key).or_insert(offset);
                *highest = offset.max(*highest);
            }
        }
    }

    /// Then, for every batch: what of it is to be sent (again). A command that must not stand before one that
    /// was refused, and cannot be repeated, spoils its keys.
    pub fn units(&mut self, trouble: &Trouble, failed: Vec<Unit>) -> Plan {
        let mut plan = Plan::default();
        if failed.is_empty() && self.late.is_empty() {
            return plan;
        }
        let commands = commands(&trouble.batch.bytes, trouble.batch.db);
        let mut failed = failed.into_iter().peekable();
        let mut index = 0;
        while let Some(command) = commands.get(index) {
            let start = command.range.start;
            let range = around(&commands, index);
            let refused = (range.start..range.end)
                .any(|index| trouble.exceptions.iter().any(|exception| exception.index as usize == index));
            index = range.end;
            let mut unit = match failed.next_if(|unit| unit.at == start) {
                Some(unit) => unit,
                None if self.late.is_empty() || is_own(command) => continue,
                None => {
                    let unit = unit_of(trouble, &commands, &range, String::new());
                    let keys = keys_of(&unit.frames);
                    if !keys.iter().any(|key| self.late.contains(key)) {
                        continue;
                    }
                    // Repeated in their order, replayable commands come out right; an APPEND behind the SETRANGE
                    // that overtook it does not.
                    let replayable =
                        is_replayable(&unit.frames) && !keys.iter().any(|key| self.bound.contains(key));
                    // A single command that was refused did nothing.
                    if !(range.len() == 1 && (refused || replayable)) {
                        self.spoil(&unit);
                        plan.left.push(unit.at);
                        continue;
                    }
                    unit
                }
            };
            let keys = keys_of(&unit.frames);
            if !is_replayable(&unit.frames) {
                self.bound.extend(keys.iter().cloned());
            }
            self.late.extend(keys);
            self.raise_guard(&mut unit);
            plan.again.push(unit);
        }
        plan
    }

    fn spoil(&mut self, unit: &Unit) {
        let db = unit.db.unwrap_or_default();
        for key in keys_of(&unit.frames) {
            self.late.insert(key.clone());
            self.spoiled.insert((db, key));
        }
    }

    /// Last, with the plans for all batches: what would read a spoiled key, or write one, is not sent, and
    /// spoils its other keys. Gives all that are.
    pub fn close<'p>(&mut self, plans: impl Iterator<Item = &'p mut Plan>) -> HashSet<(u64, Vec<u8>)> {
        let mut plans: Vec<&mut Plan> = plans.collect();
        let mut before = usize::MAX;
        while before != self.spoiled.len() {
            before = self.spoiled.len();
            for plan in &mut plans {
                let Plan { again, left } = &mut **plan;
                again.retain(|unit| {
                    let db = unit.db.unwrap_or_default();
                    let touches =
                        keys_of(&unit.frames).into_iter().any(|key| self.spoiled.contains(&(db, key)));
                    if touches {
                        self.spoil(unit);
                        left.push(unit.at);
                    }
                    !touches
                });
            }
        }
        std::mem::take(&mut self.spoiled)
    }

    /// What stands behind it must not be taken for missing: the guard does not fall.
    fn raise_guard(&mut self, unit: &mut Unit) {
        let Some((key, (history, offset))) = guard(&unit.frames) else { return };
        let highest = self.standing.entry(key.clone()).or_insert(offset);
        if *highest <= offset {
            *highest = offset;
            return;
        }
        self.out_of_order = true;
        let mut frames = Vec::with_capacity(unit.frames.len());
        each_frame(&unit.frames, |args| {
            if is_guard(args) {
                encode_command(&[b"SET".as_slice(), &key, &guard_value(history, *highest)], &mut frames);
            } else {
                frames.extend_from_slice(args.frame);
            }
        });
        unit.frames = frames;
    }
}

/// The bytes of each command, or transaction, of a batch.
fn units(commands: &[Command<'_>]) -> Vec<Range<usize>> {
    let (mut found, mut index) = (Vec::new(), 0);
    while let Some(command) = commands.get(index) {
        let range = around(commands, index);
        let end = commands.get(range.end.saturating_sub(1)).map_or(command.range.end, |last| last.range.end);
        found.push(command.range.start..end);
        index = range.end;
    }
    found
}

fn around(commands: &[Command<'_>], index: usize) -> Range<usize> {
    let transaction = commands.get(index).filter(|command| is(command, b"MULTI"));
    transaction.and_then(|_| transaction_around(commands, index)).unwrap_or(index..index + 1)
}

/// A record, or the beginning of a large value: not of the stream.
fn is_own(command: &Command<'_>) -> bool {
    command.args.get(1).is_some_and(|key| is_stage(key) && key.ends_with(b":at"))
}

fn is_guard(args: &Args<'_>) -> bool {
    args.name() == b"SET" && args.arg(1).is_some_and(|key| is_stage(key) && key.ends_with(b":guard"))
}

/// The guard that a transaction sets: its key, history and offset.
pub(super) fn guard(frames: &[u8]) -> Option<Guard> {
    let mut found = None;
    each_frame(frames, |args| {
        if is_guard(args) {
            found = args.arg(1).map(<[u8]>::to_vec).zip(args.arg(2).and_then(parse_guard));
        }
    });
    found
}

/// Keys of the data, with their databases.
pub fn keys_of_units(units: &[Unit]) -> Vec<(u64, Vec<u8>)> {
    let keys = |unit: &Unit| {
        let db = unit.db.unwrap_or_default();
        keys_of(&unit.frames).into_iter().map(move |key| (db, key))
    };
    units.iter().flat_map(keys).collect()
}

/// Keys of the data that the commands touch.
fn keys_of(frames: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    each_frame(frames, |args| {
        if is_guard(args) {
            return;
        }
        let Some(spec) = lookup(args.name()) else {
            // Its first argument is its key, or it would not have found its slot.
            found.extend(args.arg(1).map(<[u8]>::to_vec));
            return;
        };
        // An error ends the list; the target refused that command then.
        let _ = keys(spec, args, &mut |index| found.extend(args.arg(index).map(<[u8]>::to_vec)));
    });
    found
}

fn is_replayable(frames: &[u8]) -> bool {
    let mut replayable = true;
    each_frame(frames, |args| {
        replayable &= lookup(args.name()).is_some_and(|spec| class_of(spec, args) == Class::Replayable);
    });
    replayable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::repair::tests::trouble;
    use crate::worker::repair::{Reading, examine};

    const GUARD: &str = "redis-migration:{a}:u:0:guard";

    /// What is sent again, whether guards are out of order by that, and what is spoiled.
    fn again(trouble: &Trouble) -> (Vec<String>, bool, Vec<String>) {
        let failed = examine(trouble, Reading { snapshot: false, replay: false }).retry;
        let mut mending = Mending::default();
        mending.note(trouble, &failed);
        let mut plan = mending.units(trouble, failed);
        let spoiled = mending.close(std::iter::once(&mut plan));
        let mut spoiled: Vec<String> =
            spoiled.into_iter().map(|(_, key)| String::from_utf8_lossy(&key).into_owned()).collect();
        spoiled.sort();
        let mut words = Vec::new();
        for unit in plan.again {
            each_frame(&unit.frames, |args| {
                let line: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
                words.push(line.join(" "));
            });
        }
        (words, mending.out_of_order, spoiled)
    }

    #[test]
    fn what_touches_the_key_of_a_refused_command_follows_it() {
        let trouble = trouble(
            &[&["SET", "k", "1"], &["SET", "other", "2"], &["SET", "k", "3"]],
            &[(0, "OOM command not allowed")],
        );
        assert_eq!(again(&trouble), (vec!["SET k 1".to_owned(), "SET k 3".to_owned()], false, vec![]));
    }

    #[test]
    fn what_was_overtaken_and_would_find_something_else_spoils_its_keys() {
        let trouble = trouble(
            &[&["APPEND", "k", "x"], &["SETRANGE", "k", "9", "y"], &["SET", "other", "1"]],
            &[(0, "ASK 1 127.0.0.1:7001"), (2, "ASK 1 127.0.0.1:7001")],
        );
        assert_eq!(again(&trouble), (vec!["SET other 1".to_owned()], false, vec!["k".to_owned()]));
    }

    #[test]
    fn what_cannot_be_repeated_and_overtook_spoils_its_keys() {
        let trouble = trouble(
            &[
                &["SET", "{t}k", "1"],
                &["SADD", "{t}s", "x"],
                &["SUNIONSTORE", "{t}d", "{t}s"],
                &["INCR", "{t}k"],
                &["SET", "{t}other", "1"],
            ],
            &[(0, "TRYAGAIN"), (1, "TRYAGAIN"), (4, "TRYAGAIN")],
        );
        let spoiled = ["{t}d", "{t}k", "{t}s"].map(str::to_owned).to_vec();
        assert_eq!(again(&trouble), (vec!["SET {t}other 1".to_owned()], false, spoiled));
    }

    /// It reads a key that is not right any more: what it writes would not be either.
    #[test]
    fn what_reads_a_spoiled_key_is_not_sent_again() {
        let trouble = trouble(
            &[&["SDIFFSTORE", "{t}d", "{t}k"], &["SADD", "{t}k", "x"], &["SPOP", "{t}k"]],
            &[(0, "TRYAGAIN"), (1, "TRYAGAIN")],
        );
        let (words, _, spoiled) = again(&trouble);
        assert_eq!((words.len(), spoiled), (0, vec!["{t}d".to_owned(), "{t}k".to_owned()]));
    }

    #[test]
    fn what_is_sent_again_asks_no_more_for_the_key_that_is_never_there() {
        let none = GUARD.replace("guard", "none");
        let trouble = trouble(
            &[&["MULTI"], &["EXISTS", &none], &["INCR", "k"], &["SET", GUARD, "7 10"], &["EXEC"]],
            &[(1, "ASK 1 127.0.0.1:7001"), (4, "EXECABORT Transaction discarded")],
        );
        let failed = examine(&trouble, Reading { snapshot: false, replay: false }).retry;
        assert_eq!(failed[0].replies, 4);
        assert_eq!(again(&trouble).0, ["MULTI", "INCR k", &format!("SET {GUARD} 7 10"), "EXEC"]);
    }

    #[test]
    fn a_guard_does_not_fall_behind_what_stands() {
        let trouble = trouble(
            &[
                &["MULTI"],
                &["INCR", "gone"],
                &["SET", GUARD, "7 10"],
                &["EXEC"],
                &["MULTI"],
                &["INCR", "here"],
                &["SET", GUARD, "7 20"],
                &["EXEC"],
            ],
            &[(1, "ASK 1 127.0.0.1:7001"), (3, "EXECABORT Transaction discarded")],
        );
        let (words, out_of_order, _) = again(&trouble);
        assert_eq!(words, ["MULTI", "INCR gone", &format!("SET {GUARD} 7 20"), "EXEC"]);
        assert!(out_of_order);
    }
}
