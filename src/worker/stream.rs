//! The command stream: each command of the source finds its lane, in order.

use std::collections::{BTreeMap, HashSet};

use super::outbox::Outbox;
use super::recopy::gate::Gate;
use super::route::Router;
use crate::command::{
    Class, Clock, CommandSpec, DynamicTable, Emulation, Kind, Part, Rewrite, Route, SplitPlan, class_of,
    database_args, group_transaction, lookup, may_rewrite, rewrite, route, split,
};
use crate::resp::frame::{Parsed, each_frame, parse_frame};
use crate::resp::{Args, Span, array_header, bulk, encode_command};
use crate::version::ServerVersion;

/// A source transaction larger than this loses its atomicity rather than our memory.
const LARGEST_TRANSACTION: usize = if cfg!(test) { 1 << 10 } else { 128 << 20 };
/// Scripts remembered as loaded into every node.
const KNOWN_SCRIPTS: usize = 100_000;

/// What does not change while a stream is followed.
#[derive(Debug)]
pub struct StreamRules {
    pub target: ServerVersion,
    pub database_map: BTreeMap<u64, u64>,
    /// No other source feeds the target, so that FLUSHALL may pass as it is.
    pub sole_source: bool,
    /// Commands that only the source knows.
    pub dynamic: DynamicTable,
}

/// Place in the stream, as a resume needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamPlace {
    /// The source's database.
    pub db: u64,
}

/// What became of a command.
#[derive(Debug)]
pub enum Taken {
    /// On its way (or not for the target at all).
    Done { commands: u32 },
    /// To be run on its own, when everything before it is answered.
    Barrier(Box<Barrier>),
    /// Not for this target; to be counted and named.
    Refused { command: String, key: Vec<u8>, why: String },
}

/// Work that cannot go through the lanes.
#[derive(Debug)]
pub struct Barrier {
    /// Target database.
    pub db: u64,
    pub parts: Vec<Part>,
    /// Commands of the source in it.
    pub commands: u32,
    /// Spool positions before and behind it.
    pub from: u64,
    pub end: u64,
}

/// Where commands go, and what they are measured by.
pub struct Onward<'a, S> {
    pub rules: &'a StreamRules,
    pub router: &'a Router,
    pub outbox: &'a mut Outbox<S>,
    /// What is left out.
    pub gate: &'a mut Gate,
    pub moment: Moment,
    /// Spool position behind the command at hand.
    pub end: u64,
}

impl<S> Onward<'_, S> {
    fn target_db(&self, db: u64) -> u64 {
        self.rules.database_map.get(&db).copied().unwrap_or(db)
    }

    /// One unit for a slot of a cluster. `guarded`: it must not be applied twice.
    fn send_slot(&mut self, slot: u16, db: u64, frames: &[u8], count: u32, guarded: bool) {
        let lane = self.router.lane_of_slot(slot);
        if !self.outbox.is_applied(lane, Some(slot), self.end) {
            self.outbox.append(lane, db, (frames, count), guarded.then_some(slot), self.end);
        }
    }

    /// To one lane, no matter which slot.
    fn send_lane(&mut self, lane: usize, db: u64, frames: &[u8], count: u32) {
        if !self.outbox.is_applied(lane, None, self.end) {
            self.outbox.append(lane, db, (frames, count), None, self.end);
        }
    }

    fn send_everywhere(&mut self, db: u64, frame: &[u8]) {
        for lane in 0..self.outbox.lanes() {
            if self.outbox.has_lane(lane) {
                self.send_lane(lane, db, frame, 1);
            }
        }
    }

    /// Units are applied exactly once, on whatever target.
    fn exactly_once(&self) -> bool {
        self.outbox.kept.is_some()
    }
}

#[derive(Debug, Default)]
pub struct Stream {
    pub place: StreamPlace,
    transaction: Option<Transaction>,
    scripts: HashSet<[u8; 20]>,
    temporaries: u64,
    scratch: Vec<u8>,
}

/// An open source transaction. On a single target its commands are passed on at once, on a cluster they
/// are held until EXEC tells that all are there.
#[derive(Debug, Default)]
struct Transaction {
    frames: Vec<u8>,
    commands: u32,
    passed_bytes: usize,
    /// On a single target: what was passed on has its EXEC, what follows will need a MULTI.
    cut: bool,
    /// The source's database before it.
    db: u64,
    /// Spool position before its MULTI.
    from: u64,
}

/// What is the same for all commands of a block.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Unix ms at which the command arrived.
    pub arrived: u64,
    pub now: u64,
}

impl Stream {
    pub fn at(place: StreamPlace) -> Self {
        Self { place, ..Self::default() }
    }

    /// Between MULTI and EXEC; no mark may be here.
    pub fn in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// False where a batch for a single target would hold a part of a transaction.
    pub fn may_part(&self) -> bool {
        self.transaction.as_ref().is_none_or(|transaction| transaction.cut)
    }

    /// Takes one command.
    pub fn take<S>(&mut self, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        let known = lookup(args.name()).or_else(|| to.rules.dynamic.lookup(args));
        let Some(spec) = known else { return self.unknown(args, to) };
        match spec.kind {
            Kind::Noise => return Taken::Done { commands: 0 },
            // Sentinels tell each other of a master there: those of the target would take the source for theirs.
            Kind::Publish if args.arg(1) == Some(b"__sentinel__:hello") => {
                return Taken::Done { commands: 0 };
            }
            Kind::Select => {
                if let Some(db) = args.arg(1).and_then(decimal) {
                    self.place.db = db;
                }
                return Taken::Done { commands: 0 };
            }
            Kind::Multi => {
                let from = to.end.saturating_sub(args.frame.len() as u64);
                self.transaction = Some(Transaction { db: self.place.db, from, ..Transaction::default() });
                // A batch is a transaction already where nothing may be applied twice.
                if !to.router.is_cluster() && !to.exactly_once() {
                    self.pass(args.frame, 1, to);
                }
                return Taken::Done { commands: 0 };
            }
            Kind::Exec => return self.exec(args, to),
            Kind::TopologyChange => {
                // What moved is copied from where it went.
                if to.gate.owned().is_some() {
                    return Taken::Done { commands: 0 };
                }
                return refused(args, "slots moved on a source that is not known as a cluster");
            }
            Kind::Flush if !to.rules.sole_source => {
                return refused(args, "other sources feed this target too, and their keys must stay");
            }
            Kind::SwapDb | Kind::Move if to.router.is_cluster() => {
                return refused(args, "a cluster has one database");
            }
            Kind::Flush | Kind::SwapDb if to.exactly_once() && !to.router.is_cluster() => {
                to.outbox.unchains(0)
            }
            _ => {}
        }
        if !to.gate.is_open() && !to.gate.admits(spec, args, to.target_db(self.place.db)) {
            return Taken::Done { commands: 0 };
        }
        let replaced = self.rewritten(spec, args, to.moment, to.rules);
        let taken = match replaced {
            Some(0) => Taken::Done { commands: 0 },
            Some(count) => {
                let frames = std::mem::take(&mut self.scratch);
                let taken = self.forward_all(spec, (&frames, count), to);
                self.scratch = frames;
                taken
            }
            None => self.forward(spec, args, to),
        };
        if to.router.is_cluster() && spec.kind == Kind::Script {
            self.load_everywhere(args, to);
        }
        taken
    }

    /// The command in the form for this target, in `scratch`: `None` when it may stay as it is.
    fn rewritten(
        &mut self,
        spec: &CommandSpec,
        args: &Args<'_>,
        moment: Moment,
        rules: &StreamRules,
    ) -> Option<u32> {
        let mapped = !rules.database_map.is_empty()
            && matches!(spec.kind, Kind::Move | Kind::SwapDb | Kind::Data)
            && self.map_databases(spec, args, rules);
        if mapped {
            return Some(1);
        }
        if !may_rewrite(spec, args) {
            return None;
        }
        self.scratch.clear();
        let clock = Clock { received_at_ms: moment.arrived as i64, now_ms: moment.now as i64 };
        match rewrite(spec, args, clock, rules.target, &mut self.scratch) {
            Rewrite::Unchanged => None,
            Rewrite::Replaced(count) => Some(count),
            Rewrite::Drop => Some(0),
        }
    }

    /// MOVE, SWAPDB and COPY … DB name databases; true when the mapped command is in `scratch`.
    fn map_databases(&mut self, spec: &CommandSpec, args: &Args<'_>, rules: &StreamRules) -> bool {
        let mut places = Vec::new();
        database_args(spec, args, &mut |index| places.push(index));
        if places.is_empty() {
            return false;
        }
        self.scratch.clear();
        array_header(args.len(), &mut self.scratch);
        for (index, arg) in args.iter().enumerate() {
            match decimal(arg).filter(|_| places.contains(&index)) {
                Some(db) => {
                    let db = rules.database_map.get(&db).copied().unwrap_or(db);
                    bulk(itoa::Buffer::new().format(db).as_bytes(), &mut self.scratch);
                }
                None => bulk(arg, &mut self.scratch),
            }
        }
        true
    }

    /// What one command of the source became.
    fn forward_all<S>(
        &mut self,
        spec: &CommandSpec,
        (frames, count): (&[u8], u32),
        to: &mut Onward<'_, S>,
    ) -> Taken {
        if !to.router.is_cluster() {
            self.pass(frames, count, to);
            return Taken::Done { commands: 1 };
        }
        if self.transaction.is_none()
            && count > 1
            && let Some((slot, guarded)) = one_slot(spec, frames)
        {
            let db = to.target_db(self.place.db);
            to.send_slot(slot, db, frames, count, guarded && to.exactly_once());
            return Taken::Done { commands: 1 };
        }
        let mut taken = Taken::Done { commands: 1 };
        each_frame(frames, |args| {
            let spec = lookup(args.name()).unwrap_or(spec);
            let one = self.forward(spec, args, to);
            if !matches!(one, Taken::Done { .. }) {
                taken = one;
            }
        });
        taken
    }

    fn forward<S>(&mut self, spec: &CommandSpec, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        if !to.router.is_cluster() {
            self.pass(args.frame, 1, to);
            return Taken::Done { commands: 1 };
        }
        if let Some(transaction) = &mut self.transaction {
            transaction.frames.extend_from_slice(args.frame);
            transaction.commands += 1;
            if transaction.frames.len() > LARGEST_TRANSACTION {
                tracing::warn!(
                    bytes = LARGEST_TRANSACTION,
                    "a source transaction is too large to stay whole"
                );
                let taken = self.transaction_parts(to);
                if let Some(transaction) = &mut self.transaction {
                    transaction.from = to.end;
                }
                return taken;
            }
            return Taken::Done { commands: 1 };
        }
        let db = to.target_db(self.place.db);
        match spec.kind {
            // The keys that tell what was applied go with all others: that takes a barrier.
            Kind::Flush if to.exactly_once() => {
                let part = Part::Keyless { index: 0, kind: spec.kind, frame: args.frame.to_vec() };
                let from = to.end.saturating_sub(args.frame.len() as u64);
                let barrier = Barrier { db, parts: vec![part], commands: 1, from, end: to.end };
                return Taken::Barrier(Box::new(barrier));
            }
            Kind::Flush | Kind::Function | Kind::ScriptCache => {
                to.send_everywhere(db, args.frame);
                return Taken::Done { commands: 1 };
            }
            _ => {}
        }
        match route(spec, args) {
            Ok(Route::Slot(slot)) => {
                let guarded = to.exactly_once() && class_of(spec, args) == Class::Guarded;
                to.send_slot(slot, db, args.frame, 1, guarded);
                Taken::Done { commands: 1 }
            }
            Ok(Route::Keyless) => {
                to.send_lane(to.router.lane_of_slot(0), db, args.frame, 1);
                Taken::Done { commands: 1 }
            }
            Ok(Route::CrossSlot) => self.cross_slot(spec, args, db, to),
            Err(error) => refused(args, &error.to_string()),
        }
    }

    fn cross_slot<S>(
        &mut self,
        spec: &CommandSpec,
        args: &Args<'_>,
        db: u64,
        to: &mut Onward<'_, S>,
    ) -> Taken {
        match split(spec, args, self.temporaries) {
            Ok(SplitPlan::PerSlot(pieces)) => {
                let guarded = to.exactly_once() && class_of(spec, args) == Class::Guarded;
                for piece in pieces {
                    to.send_slot(piece.slot, db, &piece.frame, 1, guarded);
                }
                Taken::Done { commands: 1 }
            }
            Ok(SplitPlan::Emulate(emulation)) => {
                let from = to.end.saturating_sub(args.frame.len() as u64);
                self.barrier(db, emulation, (from, to.end))
            }
            Ok(SplitPlan::Impossible(why)) => refused(args, &why.to_string()),
            // `route` said otherwise, so this is not met.
            Ok(SplitPlan::Whole(_)) => refused(args, "its keys lie in several slots"),
            Err(error) => refused(args, &error.to_string()),
        }
    }

    fn barrier(&mut self, db: u64, emulation: Emulation, (from, end): (u64, u64)) -> Taken {
        self.temporaries = self.temporaries.wrapping_add(emulation.temporaries);
        let parts = vec![Part::Emulate(emulation)];
        Taken::Barrier(Box::new(Barrier { db, parts, commands: 1, from, end }))
    }

    fn exec<S>(&mut self, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
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
    fn transaction_parts<S>(&mut self, to: &mut Onward<'_, S>) -> Taken {
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
                && (to.gate.is_open() || to.gate.admits(spec, &args, db))
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

    /// A command that neither the table nor the source's COMMAND knows.
    fn unknown<S>(&mut self, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        if to.router.is_cluster() {
            return refused(args, "which of its arguments are keys is not known, so neither is its slot");
        }
        self.pass(args.frame, 1, to);
        Taken::Done { commands: 1 }
    }

    /// To the one lane, as it is.
    fn pass<S>(&mut self, frames: &[u8], count: u32, to: &mut Onward<'_, S>) {
        let db = to.target_db(self.place.db);
        // Chained batches are transactions themselves.
        let frame_it = !to.exactly_once();
        if let Some(transaction) = &mut self.transaction
            && std::mem::take(&mut transaction.cut)
            && frame_it
        {
            to.send_lane(0, db, b"*1\r\n$5\r\nMULTI\r\n", 1);
        }
        to.send_lane(0, db, frames, count);
        if let Some(transaction) = &mut self.transaction {
            transaction.passed_bytes += frames.len();
            if transaction.passed_bytes > LARGEST_TRANSACTION {
                tracing::warn!(
                    bytes = LARGEST_TRANSACTION,
                    "a source transaction is too large to stay whole"
                );
                transaction.passed_bytes = 0;
                transaction.cut = true;
                if frame_it {
                    to.send_lane(0, db, b"*1\r\n$4\r\nEXEC\r\n", 1);
                }
            }
        }
    }

    /// EVALSHA may follow for any key, and the node of that key needs the script then.
    fn load_everywhere<S>(&mut self, args: &Args<'_>, to: &mut Onward<'_, S>) {
        if !args.name().eq_ignore_ascii_case(b"EVAL") {
            return;
        }
        let Some(body) = args.arg(1) else { return };
        let mut digest = [0u8; 20];
        digest[..8].copy_from_slice(&crate::rdb::checksum::crc64(body).to_le_bytes());
        digest[8..16].copy_from_slice(&(body.len() as u64).to_le_bytes());
        if self.scripts.len() >= KNOWN_SCRIPTS {
            self.scripts.clear();
        }
        if self.scripts.insert(digest) {
            let mut frame = Vec::new();
            encode_command(&[b"SCRIPT".as_slice(), b"LOAD", body], &mut frame);
            let db = to.target_db(self.place.db);
            to.send_everywhere(db, &frame);
        }
    }
}

/// The slot of all these commands, if it is one, and whether any of them must not be applied twice.
fn one_slot(spec: &CommandSpec, frames: &[u8]) -> Option<(u16, bool)> {
    let (mut found, mut same, mut guarded) = (None, true, false);
    each_frame(frames, |args| {
        let spec = lookup(args.name()).unwrap_or(spec);
        match route(spec, args) {
            Ok(Route::Slot(slot)) => same &= *found.get_or_insert(slot) == slot,
            _ => same = false,
        }
        guarded |= class_of(spec, args) == Class::Guarded;
    });
    found.filter(|_| same).map(|slot| (slot, guarded))
}

fn is_guarded(frames: &[u8], rules: &StreamRules) -> bool {
    let mut guarded = false;
    each_frame(frames, |args| {
        let spec = lookup(args.name()).or_else(|| rules.dynamic.lookup(args));
        guarded |= spec.is_none_or(|spec| class_of(spec, args) == Class::Guarded);
    });
    guarded
}

fn refused(args: &Args<'_>, why: &str) -> Taken {
    let command = String::from_utf8_lossy(args.name()).to_ascii_uppercase();
    Taken::Refused { command, key: args.arg(1).unwrap_or_default().to_vec(), why: why.to_owned() }
}

fn decimal(arg: &[u8]) -> Option<u64> {
    std::str::from_utf8(arg).ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
