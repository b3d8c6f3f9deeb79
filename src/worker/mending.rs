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
    /// The highest offset of each guard that stands.
    standing: HashMap<Vec<u8>, i64>,
    /// A guard stands that lies behind a command to be sent again.
    pub out_of_order: bool,
}

/// Key, history and offset.
pub(super) type Guard = (Vec<u8>, (u64, i64));

/// A command must not stand before one that was refused, and cannot be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overtaken;

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

    /// Then, for every batch: what of it is to be sent (again).
    pub fn units(&mut self, trouble: &Trouble, failed: Vec<Unit>) -> Result<Vec<Unit>, Overtaken> {
        if failed.is_empty() && self.late.is_empty() {
            return Ok(failed);
        }
        let commands = commands(&trouble.batch.bytes, trouble.batch.db);
        let mut failed = failed.into_iter().peekable();
        let mut again = Vec::new();
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
                    if !keys_of(&unit.frames).iter().any(|key| self.late.contains(key)) {
                        continue;
                    }
                    // A single command that was refused did nothing.
                    if !(range.len() == 1 && (refused || is_replayable(&unit.frames))) {
                        return Err(Overtaken);
                    }
                    unit
                }
            };
            self.late.extend(keys_of(&unit.frames));
            self.raise_guard(&mut unit);
            again.push(unit);
        }
        Ok(again)
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

    fn again(trouble: &Trouble) -> Result<(Vec<String>, bool), Overtaken> {
        let failed = examine(trouble, Reading { snapshot: false, replay: false }).retry;
        let mut mending = Mending::default();
        mending.note(trouble, &failed);
        let units = mending.units(trouble, failed)?;
        let mut words = Vec::new();
        for unit in units {
            each_frame(&unit.frames, |args| {
                let line: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
                words.push(line.join(" "));
            });
        }
        Ok((words, mending.out_of_order))
    }

    #[test]
    fn what_touches_the_key_of_a_refused_command_follows_it() {
        let trouble = trouble(
            &[&["SET", "k", "1"], &["SET", "other", "2"], &["SET", "k", "3"]],
            &[(0, "OOM command not allowed")],
        );
        assert_eq!(again(&trouble), Ok((vec!["SET k 1".to_owned(), "SET k 3".to_owned()], false)));
    }

    #[test]
    fn what_cannot_be_repeated_must_not_have_overtaken() {
        let trouble = trouble(&[&["SET", "k", "1"], &["INCR", "k"]], &[(0, "TRYAGAIN")]);
        assert_eq!(again(&trouble), Err(Overtaken));
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
        assert_eq!(again(&trouble).unwrap().0, ["MULTI", "INCR k", &format!("SET {GUARD} 7 10"), "EXEC"]);
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
        let (words, out_of_order) = again(&trouble).unwrap();
        assert_eq!(words, ["MULTI", "INCR gone", &format!("SET {GUARD} 7 20"), "EXEC"]);
        assert!(out_of_order);
    }
}
