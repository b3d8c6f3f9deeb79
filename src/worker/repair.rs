//! Answers that need attention (PURE): which commands are to be sent again, which are set aside.

use std::ops::Range;

use super::outbox::Trouble;
use crate::command::{Route, lookup, route};
use crate::loss::Loss;
use crate::resp::frame::{Parsed, parse_frame};
use crate::resp::{Args, Next, ReplyVerdict};
use crate::target::keys::{PREFIX, is_none};
use crate::target::lane::ExceptionKind;

/// A command, or a whole transaction, that was not applied and shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    pub lane: usize,
    pub db: Option<u64>,
    /// The slot of its keys, when they have one.
    pub slot: Option<u16>,
    pub frames: Vec<u8>,
    /// Where it starts in its batch.
    pub at: usize,
    pub replies: usize,
    /// What the target said.
    pub error: String,
}

/// A command that the target will not take.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    pub command: String,
    pub key: Vec<u8>,
    pub error: String,
    pub kind: Loss,
}

/// What the answers to a batch come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub retry: Vec<Unit>,
    pub refused: Vec<Refusal>,
    /// Where each of them starts in the batch.
    pub refused_at: Vec<usize>,
    /// Keys that the target already had: with `existingKeys: Fail` the first ends the migration.
    pub existing: Vec<Vec<u8>>,
    pub fatal: Option<Fatal>,
}

/// What the target said to a command without which nothing can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fatal {
    /// It refuses us.
    Denied(String),
    /// It has no such database: what follows SELECT would land in another.
    NoDatabase { db: String, error: String },
}

/// How answers are to be read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The batch belongs to the full sync.
    pub snapshot: bool,
    /// A replay may meet what an earlier attempt applied.
    pub replay: bool,
}

pub(super) struct Command<'a> {
    pub args: Vec<&'a [u8]>,
    pub range: Range<usize>,
    db: Option<u64>,
}

/// Sorts the exceptions of one batch; units keep the batch's order.
pub fn examine(trouble: &Trouble, reading: Reading) -> Findings {
    let commands = commands(&trouble.batch.bytes, trouble.batch.db);
    let mut findings = Findings::default();
    // Everything before this index is dealt with; a transaction is dealt with once.
    let mut done = 0;
    for exception in &trouble.exceptions {
        let index = exception.index as usize;
        if index < done {
            continue;
        }
        let Some(command) = commands.get(index) else { continue };
        let key = command.args.get(1).copied().unwrap_or_default().to_vec();
        let text = match &exception.kind {
            ExceptionKind::Nil => {
                if reading.snapshot && is(command, b"SET") {
                    findings.existing.push(staged_key(&commands, index).unwrap_or(key));
                }
                continue;
            }
            ExceptionKind::Error(text) => text,
        };
        let verdict = ReplyVerdict::of(text);
        let error = String::from_utf8_lossy(text).into_owned();
        let group = transaction_around(&commands, index);
        let unit = group.clone().unwrap_or(index..index + 1);
        match verdict.next() {
            Next::Fail => {
                findings.fatal.get_or_insert(Fatal::Denied(error));
            }
            Next::Reroute | Next::RetryLater | Next::RetryUntilOperator => {
                findings.retry.push(unit_of(trouble, &commands, &unit, error));
                done = unit.end;
            }
            Next::Quarantine if verdict == ReplyVerdict::BusyKey && reading.snapshot => {
                if !reading.replay {
                    findings.existing.push(key);
                }
            }
            Next::Quarantine if is(command, b"SELECT") => {
                let db = String::from_utf8_lossy(&key).into_owned();
                findings.fatal.get_or_insert(Fatal::NoDatabase { db, error });
            }
            // An earlier attempt may have come further: what follows puts it right.
            Next::Quarantine if reading.replay && !reading.snapshot && depends_on_data(&verdict) => {
                tracing::debug!(error, "while replaying");
            }
            Next::Quarantine => {
                // Inside a transaction a queue-time refusal aborts all of it, which EXEC then says again.
                if group.is_some() {
                    let aborted = trouble.exceptions.iter().any(|other| {
                        other.index as usize == unit.end - 1
                            && matches!(&other.kind, ExceptionKind::Error(text) if text.starts_with(b"EXECABORT"))
                    });
                    if aborted {
                        done = unit.end;
                        let inside = commands.get(unit.start + 1..unit.end - 1).unwrap_or_default();
                        for command in inside.iter().filter(|command| !is_own(command)) {
                            findings.refused.push(refusal(command, &error));
                            findings.refused_at.push(command.range.start);
                        }
                        continue;
                    }
                }
                if !expired_in_staging(command, &error) {
                    findings.refused.push(refusal(command, &error));
                    findings.refused_at.push(command.range.start);
                }
            }
        }
    }
    findings
}

/// What became of a chained batch.
#[derive(Debug, PartialEq, Eq)]
pub enum ChainedBatch {
    /// All of it stands, but for commands that the target did not take.
    Applied {
        refused: Vec<Refusal>,
        fatal: Option<Fatal>,
    },
    /// Nothing of it stands; it may be sent again.
    Later(String),
    /// Nothing of it stands, because the batch before it does not.
    Behind,
    /// Nothing of it stands, and it will not as it is: the target does not take these commands.
    Refused(Vec<Refusal>),
    Fatal(Fatal),
}

/// Reads the answers to a chained batch, whose transaction starts at `trouble.batch.head`.
pub fn examine_chained(trouble: &Trouble) -> ChainedBatch {
    let commands = commands(&trouble.batch.bytes, trouble.batch.db);
    let head = trouble.batch.head as usize;
    let exec = commands.len().saturating_sub(1);
    let (mut refused, mut failed, mut aborted, mut fatal) = (Vec::new(), Vec::new(), None, None);
    for exception in &trouble.exceptions {
        let index = exception.index as usize;
        let text = match &exception.kind {
            ExceptionKind::Nil if index == exec => {
                aborted.get_or_insert(Vec::new());
                continue;
            }
            ExceptionKind::Nil => continue,
            ExceptionKind::Error(text) => text,
        };
        let error = String::from_utf8_lossy(text).into_owned();
        let Some(element) = exception.element else {
            if index == exec {
                aborted = Some(text.clone());
            } else if let Some(command) = commands.get(index) {
                match ReplyVerdict::of(text).next() {
                    Next::Fail => return ChainedBatch::Fatal(Fatal::Denied(error)),
                    Next::Quarantine if index >= head => failed.push(refusal(command, &error)),
                    _ => return ChainedBatch::Later(error),
                }
            }
            continue;
        };
        // Inside EXEC's reply: this one failed, the others stand.
        if let Some(command) = commands.get(head + element as usize) {
            if is(command, b"SELECT") {
                let db =
                    String::from_utf8_lossy(command.args.get(1).copied().unwrap_or_default()).into_owned();
                fatal.get_or_insert(Fatal::NoDatabase { db, error });
            } else if ReplyVerdict::of(text) == ReplyVerdict::Auth {
                fatal.get_or_insert(Fatal::Denied(error));
            } else {
                refused.push(refusal(command, &error));
            }
        }
    }
    match aborted {
        None => ChainedBatch::Applied { refused, fatal },
        Some(_) if !failed.is_empty() => ChainedBatch::Refused(failed),
        Some(text) if text.is_empty() => ChainedBatch::Behind,
        Some(text) => {
            let error = String::from_utf8_lossy(&text).into_owned();
            match ReplyVerdict::of(&text).next() {
                Next::Fail => ChainedBatch::Fatal(Fatal::Denied(error)),
                _ => ChainedBatch::Later(error),
            }
        }
    }
}

/// A large value whose time was over before it got its name: it is to be gone.
fn expired_in_staging(command: &Command<'_>, error: &str) -> bool {
    is(command, b"RENAMENX")
        && command.args.get(1).is_some_and(|key| is_stage(key))
        && error.contains("no such key")
}

/// Errors that tell of the data, not of the command.
pub(super) fn depends_on_data(verdict: &ReplyVerdict) -> bool {
    matches!(verdict, ReplyVerdict::WrongType | ReplyVerdict::BusyKey | ReplyVerdict::Other)
}

pub(super) fn is_stage(key: &[u8]) -> bool {
    key.starts_with(PREFIX)
}

/// Not of the source: what makes a transaction count once.
fn is_own(command: &Command<'_>) -> bool {
    command.args.get(1).is_some_and(|key| is_stage(key) && (is_none(key) || key.ends_with(b":guard")))
}

/// Asks for the key that is never there.
fn is_probe(command: &Command<'_>) -> bool {
    is(command, b"EXISTS") && command.args.get(1).is_some_and(|key| is_none(key))
}

/// The name that the large value behind this SET of its staging key was to get.
fn staged_key(commands: &[Command<'_>], index: usize) -> Option<Vec<u8>> {
    let stage = commands.get(index)?.args.get(1)?;
    let rename = commands.get(index.checked_sub(1)?)?;
    (is_stage(stage) && is(rename, b"RENAMENX")).then(|| rename.args.get(2).map(|key| key.to_vec()))?
}

fn refusal(command: &Command<'_>, error: &str) -> Refusal {
    let name = command.args.first().copied().unwrap_or_default();
    Refusal {
        command: String::from_utf8_lossy(name).to_ascii_uppercase(),
        key: command.args.get(1).copied().unwrap_or_default().to_vec(),
        error: error.to_owned(),
        kind: Loss::of_command(name, command.args.get(3).copied()),
    }
}

pub(super) fn unit_of(
    trouble: &Trouble,
    commands: &[Command<'_>],
    unit: &Range<usize>,
    error: String,
) -> Unit {
    let parts = commands.get(unit.clone()).unwrap_or_default();
    let start = parts.first().map_or(0, |command| command.range.start);
    // Sent alone and in order it needs no probe, which would keep it waiting until the slot has moved.
    let parts = || parts.iter().filter(|command| !is_probe(command));
    let frames = parts().filter_map(|command| trouble.batch.bytes.get(command.range.clone())).flatten();
    Unit {
        lane: trouble.lane,
        db: parts().next().and_then(|command| command.db),
        slot: parts().find_map(|command| slot_of(command, &trouble.batch.bytes)),
        frames: frames.copied().collect(),
        at: start,
        replies: parts().count(),
        error,
    }
}

fn slot_of(command: &Command<'_>, bytes: &[u8]) -> Option<u16> {
    let frame = bytes.get(command.range.clone())?;
    let mut spans = Vec::new();
    parse_frame(frame, &mut spans).ok()?;
    let args = Args { frame, spans: &spans };
    match route(lookup(args.name())?, &args) {
        Ok(Route::Slot(slot)) => Some(slot),
        _ => None,
    }
}

pub(super) fn commands(bytes: &[u8], mut db: Option<u64>) -> Vec<Command<'_>> {
    let mut found: Vec<Command<'_>> = Vec::new();
    let mut spans = Vec::new();
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let Ok(Parsed::Command(length)) = parse_frame(rest, &mut spans) else { break };
        let args: Vec<&[u8]> =
            spans.iter().filter_map(|span| rest.get(span.start as usize..span.end as usize)).collect();
        let mut command = Command { args, range: at..at + length, db };
        if is(&command, b"SELECT") {
            db = command.args.get(1).and_then(|db| std::str::from_utf8(db).ok()?.parse().ok());
            command.db = db;
        }
        found.push(command);
        at += length;
    }
    found
}

pub(super) fn is(command: &Command<'_>, name: &[u8]) -> bool {
    command.args.first().is_some_and(|found| found.eq_ignore_ascii_case(name))
}

/// The MULTI … EXEC that `index` lies in.
pub(super) fn transaction_around(commands: &[Command<'_>], index: usize) -> Option<Range<usize>> {
    let before = commands.get(..=index)?;
    let start = before.iter().rposition(|command| is(command, b"MULTI"))?;
    let length = commands.get(start..)?.iter().position(|command| is(command, b"EXEC"))?;
    (start + length >= index).then_some(start..start + length + 1)
}

#[cfg(test)]
pub(super) mod tests;
