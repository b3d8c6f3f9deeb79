//! The command stream: each command of the source finds its lane, in order.

mod filtering;
mod rewriting;
mod scanned;
mod scripted;
mod transaction;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::outbox::Outbox;
use super::recopy::gate::{Gate, keys_of_frames};
use super::release::Carried;
use super::route::Router;
use crate::command::{
    Class, CommandSpec, DynamicTable, Emulation, Kind, Part, Route, SplitPlan, class_of, decimal, is_any,
    lookup, route, split,
};
use crate::hold::Holding;
use crate::resp::frame::each_frame;
use crate::resp::{Args, encode_command};
use crate::transform::Transform;
use crate::transform::script::Runner;
use crate::version::ServerVersion;

use transaction::Transaction;

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
    pub holding: Holding,
    /// What is left out; `None`: nothing.
    pub transform: Option<Arc<Transform>>,
    /// The stream is that of a scan: it tells what keys hold, not what was done to them.
    pub scanned: bool,
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
    /// Spool positions before and behind the command at hand.
    pub start: u64,
    pub end: u64,
    /// Counts commands that were left out, in whole or in part.
    pub filtered: &'a mut u64,
    /// The script, where it judges commands.
    pub script: Option<&'a mut Runner>,
    /// While held expiries are given back.
    pub carried: Option<&'a mut Carried>,
}

impl<S> Onward<'_, S> {
    fn target_db(&self, db: u64) -> u64 {
        if self.rules.transform.as_ref().is_some_and(|transform| !transform.databases.admits(db)) {
            // What is no data of it, such as messages or an EXEC. The target need not have that database.
            return 0;
        }
        self.rules.database_map.get(&db).copied().unwrap_or(db)
    }

    /// One unit for a slot of a cluster. `guarded`: it must not be applied twice.
    fn send_slot(&mut self, slot: u16, db: u64, frames: &[u8], count: u32, guarded: bool) {
        let lane = self.router.lane_of_slot(slot);
        if !self.outbox.is_applied(lane, Some(slot), self.end) {
            let guarded = guarded || self.outbox.follows_guarded(lane, slot);
            self.outbox.append(lane, db, (frames, count), guarded.then_some(slot), self.end);
        } else if self.outbox.is_doubtful(lane, slot, self.end) {
            let mut keys = Vec::new();
            let dynamic = &self.rules.dynamic;
            keys_of_frames(frames, |args| lookup(args.name()).or_else(|| dynamic.lookup(args)), &mut keys);
            self.gate.doubt(db, keys);
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
    /// What the filter left of a command.
    narrowed: Vec<u8>,
    /// Commands whose expiries of fields the target cannot hold, since somebody asked.
    pub lost_expiries: u64,
    /// What the script made of one.
    scripted: Vec<u8>,
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
        let rules = to.rules;
        let known = lookup(args.name()).or_else(|| rules.dynamic.lookup(args));
        match &rules.transform {
            None => self.follow(known, args, to),
            Some(transform) => self.filter(transform, known, args, to),
        }
    }

    fn follow<S>(&mut self, known: Option<&CommandSpec>, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        let Some(spec) = known else {
            return if to.script.is_some() { self.judge(None, args, to) } else { self.unknown(args, to) };
        };
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
                let from = to.start;
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
            _ => {}
        }
        if !to.gate.is_open() && !to.gate.admits(spec, args, to.target_db(self.place.db)) {
            return Taken::Done { commands: 0 };
        }
        match (spec.kind, &to.script) {
            (Kind::ScriptCache | Kind::Function, _) | (_, None) => self.pass_on(spec, args, to),
            _ => self.judge(Some(spec), args, to),
        }
    }

    /// Brings a command on its way in the form for this target.
    fn pass_on<S>(&mut self, spec: &CommandSpec, args: &Args<'_>, to: &mut Onward<'_, S>) -> Taken {
        match spec.kind {
            Kind::Flush if !to.rules.sole_source => {
                return refused(args, "other sources feed this target too, and their keys must stay");
            }
            Kind::Function if !to.rules.target.has_redis(7, 0) => {
                // What is not there need not go.
                return match args.arg(1) {
                    Some(word) if is_any(word, &["DELETE", "FLUSH"]) => Taken::Done { commands: 1 },
                    _ => refused(args, "the target has no functions: Redis 7.0 and newer do"),
                };
            }
            Kind::Data if spec.is_of_streams() && !to.rules.target.has_redis(5, 0) => {
                return refused(args, "the target has no streams: Redis 5.0 and newer do");
            }
            Kind::SwapDb | Kind::Move if to.router.is_cluster() => {
                return refused(args, "a cluster has one database");
            }
            Kind::Flush | Kind::SwapDb if to.exactly_once() && !to.router.is_cluster() => {
                to.outbox.unchains(0)
            }
            _ => {}
        }
        if let Some(carried) = &mut to.carried {
            carried.note(spec, args, self.place.db, &to.rules.database_map);
        }
        let replaced = self.rewritten(spec, args, to.moment, to.rules, to.router);
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
                let barrier = Barrier { db, parts: vec![part], commands: 1, from: to.start, end: to.end };
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
                // Not from the frame's length: it may be another than that of the source's command.
                self.barrier(db, emulation, (to.start, to.end))
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

fn refused(args: &Args<'_>, why: &str) -> Taken {
    let command = String::from_utf8_lossy(args.name()).to_ascii_uppercase();
    Taken::Refused { command, key: args.arg(1).unwrap_or_default().to_vec(), why: why.to_owned() }
}

#[cfg(test)]
mod tests;
