//! MULTI … EXEC of the source.

use super::{Barrier, Onward, Stream, StreamRules, Taken};
use crate::command::{Class, CommandSpec, Part, class_of, group_transaction, lookup};
use crate::resp::frame::{Parsed, each_frame, parse_frame};
use crate::resp::{Args, Span};

/// An open source transaction. On a single target its commands are passed on at once, on a cluster they
/// are held until EXEC tells that all are there.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    pub frames: Vec<u8>,
    pub commands: u32,
    pub passed_bytes: usize,
    /// On a single target: what was passed on has its EXEC, what follows will need a MULTI.
    pub cut: bool,
    /// The source's database before it.
    pub db: u64,
    /// Spool position before its MULTI.
    pub from: u64,
}

impl Stream {
    pub(super) fn exec<S>(&mut self, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        if !to.router.is_cluster() {
            if to.exactly_once() {
                self.transaction = None;
                return Taken::Done { commands: 0 };
            }
            self.pass(args.frame, 1, to);
            let before = self.transaction.take().map(|transaction| transaction.db);
            // A SELECT inside takes effect only if the target runs the transaction.
            if before != Some(self.place.db)
                && let Some(pending) = to.outbox.pending(0)
            {
                pending.forget_db();
            }
            return Taken::Done { commands: 0 };
        }
        let taken = self.transaction_parts(to);
        self.transaction = None;
        let Taken::Barrier(barrier) = taken else { return taken };
        // Most transactions are groups of one slot each, which the lanes can take as they are.
        if !barrier.parts.iter().all(|part| matches!(part, Part::Group { .. })) {
            return Taken::Barrier(barrier);
        }
        for part in barrier.parts {
            let Part::Group { slot, commands, frames } = part else { continue };
            if to.exactly_once() {
                to.send_slot(
                    slot,
                    barrier.db,
                    &frames,
                    commands,
                    commands > 1 || is_guarded(&frames, to.rules),
                );
            } else if commands == 1 {
                to.send_slot(slot, barrier.db, &frames, 1, false);
            } else {
                let whole = [b"*1\r\n$5\r\nMULTI\r\n", frames.as_slice(), b"*1\r\n$4\r\nEXEC\r\n"].concat();
                to.send_slot(slot, barrier.db, &whole, commands + 2, false);
            }
        }
        Taken::Done { commands: 0 }
    }

    /// What was held of the open transaction, as parts per slot.
    pub(super) fn transaction_parts<S>(&mut self, to: &mut Onward<'_, S>) -> Taken {
        let db = to.target_db(self.place.db);
        let Some(transaction) = self.transaction.replace(Transaction::default()) else {
            return Taken::Done { commands: 0 };
        };
        let mut spans: Vec<Span> = Vec::new();
        let mut commands: Vec<(&CommandSpec, std::ops::Range<usize>, std::ops::Range<usize>)> = Vec::new();
        let mut arg_spans = Vec::new();
        let mut at = 0;
        while let Some(Ok(Parsed::Command(length))) = transaction
            .frames
            .get(at..)
            .filter(|rest| !rest.is_empty())
            .map(|rest| parse_frame(rest, &mut spans))
        {
            let frame = at..at + length;
            let args =
                Args { frame: transaction.frames.get(frame.clone()).unwrap_or_default(), spans: &spans };
            let spec = lookup(args.name()).or_else(|| to.rules.dynamic.lookup(&args));
            // A key may have been spoiled since the command was held.
            if let Some(spec) = spec
                // The script may have named keys of other slots; with one, no key is ever spoiled.
                && (to.script.is_some() || to.gate.is_open() || to.gate.admits(spec, &args, db))
            {
                let first = arg_spans.len();
                arg_spans.extend_from_slice(&spans);
                commands.push((spec, frame, first..arg_spans.len()));
            }
            at += length;
        }
        let count = u32::try_from(commands.len()).unwrap_or(u32::MAX);
        let given = commands.into_iter().map(|(spec, frame, spans)| {
            let args = Args {
                frame: transaction.frames.get(frame).unwrap_or_default(),
                spans: arg_spans.get(spans).unwrap_or_default(),
            };
            (spec, args)
        });
        match group_transaction(given, self.temporaries) {
            Ok(parts) => {
                for part in &parts {
                    if let Part::Emulate(emulation) = part {
                        self.temporaries = self.temporaries.wrapping_add(emulation.temporaries);
                    }
                }
                let (from, end) = (transaction.from, to.end);
                Taken::Barrier(Box::new(Barrier { db, parts, commands: count, from, end }))
            }
            Err(error) => {
                Taken::Refused { command: "EXEC".to_owned(), key: Vec::new(), why: error.to_string() }
            }
        }
    }
}

fn is_guarded(frames: &[u8], rules: &StreamRules) -> bool {
    let mut guarded = false;
    each_frame(frames, |args| {
        let spec = lookup(args.name()).or_else(|| rules.dynamic.lookup(args));
        guarded |= spec.is_none_or(|spec| class_of(spec, args) == Class::Guarded);
    });
    guarded
}
