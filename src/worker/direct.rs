//! Commands that are run one by one, outside the lanes: those that met a moving slot, and those whose
//! keys lie in several slots. Nothing is under way on the lanes meanwhile.
//!
//! Exactly once: every step that writes to a key of the data is one transaction with the guard of its slot.
//! The steps of one command are told apart by numbers between its two offsets. A step whose outcome is not
//! known, because the connection was lost, is looked up by its guard before it is sent again.

mod conversing;

use std::collections::HashMap;
use std::sync::Arc;

use thiserror::Error;

use super::repair::{Refusal, Unit};
use super::route::Router;
use super::stream::Barrier;
use crate::command::{Emulation, IfMissing, Kind, Part, Step};
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::loss::Loss;
use crate::resp::frame::{Parsed, each_frame, parse_frame};
use crate::resp::{Args, Reply, encode_command};
use crate::slot::tag_for_slot;
use crate::target::fence::{Fence, FenceError};
use crate::target::keys::{PREFIX, Record, guard_value, parse_guard};

/// Redirections of one command that are followed without a pause.
const QUICK_REDIRECTIONS: u32 = 5;
/// Keys of a slot that are asked for.
const MOST_KEYS: &[u8] = b"2000000";

#[derive(Debug, Error)]
pub enum DirectError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Fence(FenceError),
    #[error("{address}: {text}")]
    Fatal { address: Address, text: String },
    /// The only server of the target; another one may be promoted in its place, without the last writes.
    #[error("{address}: {why}; connecting anew to read how far the target has come")]
    Adrift { address: Address, why: String },
    /// Nothing was sent there yet.
    #[error("{address} serves slots now that another node had: reading what it holds")]
    Newcomer { address: Address },
}

impl From<FenceError> for DirectError {
    fn from(error: FenceError) -> Self {
        match error {
            FenceError::Connection(error) => Self::Connection(error),
            error => Self::Fence(error),
        }
    }
}

/// What makes it exactly once.
#[derive(Clone)]
pub struct Guarding {
    pub fence: Arc<Fence>,
    pub history: u64,
    /// Replication offset minus spool position.
    pub shift: i64,
    /// Lane and slot of each node's record.
    pub at: Vec<(usize, u16)>,
    /// What these are set to by a command that wipes everything.
    pub record: Vec<u8>,
    /// An earlier attempt may have come this way: guards are looked at first.
    pub replaying: bool,
}

/// Connections that outlive one errand.
#[derive(Default)]
pub struct Conversations {
    open: HashMap<Address, Open>,
    /// Of the connection that was lost last, by address.
    lost: HashMap<Address, u64>,
}

/// Connections for single commands, opened when needed.
pub struct Direct<'a> {
    dialer: &'a Dialer,
    router: &'a mut Router,
    /// Address of each lane.
    lanes: Vec<Address>,
    conversations: &'a mut Conversations,
    guarding: Option<Guarding>,
    /// What keeps a command waiting, for the status.
    waiting: Box<dyn FnMut(&str) + Send + 'a>,
}

struct Open {
    connection: Connection,
    db: u64,
    serial: u64,
}

/// Where a command goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Slot(u16),
    Lane(usize),
}

impl<'a> Direct<'a> {
    pub fn new(
        dialer: &'a Dialer,
        router: &'a mut Router,
        lanes: Vec<Address>,
        conversations: &'a mut Conversations,
        guarding: Option<Guarding>,
        waiting: Box<dyn FnMut(&str) + Send + 'a>,
    ) -> Self {
        Self { dialer, router, lanes, conversations, guarding, waiting }
    }

    /// Sends a unit again until the target takes it or refuses it for good.
    pub async fn retry(&mut self, unit: &Unit) -> Result<Vec<Refusal>, DirectError> {
        let place = unit.slot.map_or(Place::Lane(unit.lane), Place::Slot);
        let replies = self.run(place, unit.db.unwrap_or_default(), &unit.frames, unit.replies).await?;
        Ok(refusals(&unit.frames, &replies))
    }

    /// Runs the parts of a transaction, or one emulated command, in their order.
    pub async fn parts(&mut self, barrier: &Barrier) -> Result<Vec<Refusal>, DirectError> {
        let (db, mut refused) = (barrier.db, Vec::new());
        let mut steps = Steps { next: barrier.from + 1, end: barrier.end };
        for part in &barrier.parts {
            match part {
                Part::Group { slot, frames, .. } => {
                    refused.extend(self.step(*slot, db, frames, &mut steps).await?);
                }
                Part::Keyless { frame, kind: Kind::Flush, .. } if self.guarding.is_some() => {
                    refused.extend(self.flush(db, frame, barrier.end).await?);
                }
                Part::Keyless { frame, kind, .. } => {
                    let everywhere = matches!(kind, Kind::Flush | Kind::Function | Kind::ScriptCache);
                    for lane in self.serving().into_iter().take(if everywhere { usize::MAX } else { 1 }) {
                        let replies = self.run(Place::Lane(lane), db, frame, 1).await?;
                        refused.extend(refusals(frame, &replies));
                    }
                }
                Part::Emulate(emulation) => refused.extend(self.emulate(db, emulation, &mut steps).await?),
                Part::Impossible { why, .. } => refused.push(Refusal {
                    command: "in a transaction".to_owned(),
                    key: Vec::new(),
                    error: why.to_string(),
                    kind: Loss::Commands,
                }),
            }
        }
        Ok(refused)
    }

    /// Commands of one slot, as a transaction; at most once where that is asked for.
    async fn step(
        &mut self,
        slot: u16,
        db: u64,
        frames: &[u8],
        steps: &mut Steps,
    ) -> Result<Vec<Refusal>, DirectError> {
        let number = steps.take();
        if self.stands(slot, db, number).await? {
            return Ok(Vec::new());
        }
        let mut whole = Vec::with_capacity(frames.len() + 128);
        encode_command(&[b"MULTI".as_slice()], &mut whole);
        whole.extend_from_slice(frames);
        if let Some(guarding) = &self.guarding {
            let key = guarding.fence.names().guard(slot);
            let value = guard_value(guarding.history, number as i64 + guarding.shift);
            encode_command(&[b"SET".as_slice(), &key, &value], &mut whole);
        }
        encode_command(&[b"EXEC".as_slice()], &mut whole);
        let replies = self.run(Place::Slot(slot), db, &whole, count_frames(&whole)).await?;
        Ok(refusals(&whole, &replies))
    }

    /// The keys of one slot of a cluster, but for our own. While the slot moves, those on either side.
    pub async fn keys_in_slot(&mut self, slot: u16) -> Result<Vec<Vec<u8>>, DirectError> {
        let number = slot.to_string();
        let mut list = Vec::new();
        encode_command(&[b"CLUSTER".as_slice(), b"GETKEYSINSLOT", number.as_bytes(), MOST_KEYS], &mut list);
        let mut probed = list.clone();
        let probe = format!("redis-migration:{{{}}}:probe", tag_for_slot(slot));
        encode_command(&[b"EXISTS".as_slice(), probe.as_bytes()], &mut probed);
        loop {
            let owner = self.address(Place::Slot(slot));
            // Never redirected, and so asked of the owner whatever else the slot does.
            let here = self.run(Place::Slot(slot), 0, &list, 1).await?;
            // Redirected where the slot goes, or to who has it by now.
            let there = self.run(Place::Slot(slot), 0, &probed, 2).await?;
            if self.address(Place::Slot(slot)) != owner {
                continue;
            }
            let mut keys: Vec<Vec<u8>> = Vec::new();
            for reply in [here.first(), there.first()].into_iter().flatten() {
                if let Reply::Error(text) = reply {
                    let text = String::from_utf8_lossy(text).into_owned();
                    return Err(DirectError::Fatal { address: owner, text });
                }
                keys.extend(reply.items().iter().filter_map(|key| key.bytes().map(|key| key.to_vec())));
            }
            keys.retain(|key| !key.starts_with(PREFIX));
            keys.sort_unstable();
            keys.dedup();
            return Ok(keys);
        }
    }

    /// True when an earlier attempt has done this step.
    async fn stands(&mut self, slot: u16, db: u64, number: u64) -> Result<bool, DirectError> {
        let Some(guarding) = self.guarding.clone().filter(|guarding| guarding.replaying) else {
            return Ok(false);
        };
        let mut read = Vec::new();
        encode_command(&[b"GET".as_slice(), &guarding.fence.names().guard(slot)], &mut read);
        let replies = self.run(Place::Slot(slot), db, &read, 1).await?;
        let found = replies.first().and_then(Reply::bytes).and_then(|value| parse_guard(value));
        let wanted = number as i64 + guarding.shift;
        Ok(found.is_some_and(|(history, offset)| history == guarding.history && offset >= wanted))
    }

    /// FLUSHALL or FLUSHDB on every node, each with the record that it has been done.
    async fn flush(&mut self, db: u64, frame: &[u8], end: u64) -> Result<Vec<Refusal>, DirectError> {
        let Some(guarding) = self.guarding.clone() else { return Ok(Vec::new()) };
        let mut refused = Vec::new();
        let names = guarding.fence.names();
        let epoch = guarding.fence.epoch().to_string();
        for (lane, slot) in &guarding.at {
            let mut read = Vec::new();
            encode_command(&[b"GET".as_slice(), &names.at(*slot)], &mut read);
            let replies = self.run(Place::Lane(*lane), db, &read, 1).await?;
            let found = replies.first().and_then(Reply::bytes).and_then(|value| Record::parse(value));
            let wanted = end as i64 + guarding.shift;
            if found.is_some_and(|found| found.history == guarding.history && found.order() >= (true, wanted))
            {
                continue;
            }
            let mut whole = Vec::new();
            encode_command(&[b"MULTI".as_slice()], &mut whole);
            whole.extend_from_slice(frame);
            encode_command(&[b"SET".as_slice(), &names.at(*slot), &guarding.record], &mut whole);
            encode_command(&[b"SET".as_slice(), &names.epoch(*slot), epoch.as_bytes()], &mut whole);
            encode_command(&[b"EXEC".as_slice()], &mut whole);
            let replies = self.run(Place::Lane(*lane), db, &whole, count_frames(&whole)).await?;
            refused.extend(refusals(&whole, &replies));
        }
        Ok(refused)
    }

    async fn emulate(
        &mut self,
        db: u64,
        emulation: &Emulation,
        steps: &mut Steps,
    ) -> Result<Vec<Refusal>, DirectError> {
        let mut refused = Vec::new();
        let mut ended = false;
        for step in &emulation.steps {
            match step {
                Step::Clean { slot, frame } => {
                    self.run(Place::Slot(*slot), db, frame, 1).await?;
                }
                _ if ended => {}
                Step::Run { slot, frame } => {
                    let found = self.step(*slot, db, frame, steps).await?;
                    ended = !found.is_empty();
                    refused.extend(found);
                }
                Step::Carry { from_slot, read, to_slot, command } => {
                    if self.stands(*to_slot, db, steps.next).await? {
                        steps.take();
                        continue;
                    }
                    let replies = self.run(Place::Slot(*from_slot), db, read, 1).await?;
                    let found = refusals(read, &replies);
                    if let (true, Some(Reply::Bulk(Some(element)))) = (found.is_empty(), replies.first()) {
                        let mut words: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
                        words.push(element);
                        let mut frame = Vec::new();
                        encode_command(&words, &mut frame);
                        let found = self.step(*to_slot, db, &frame, steps).await?;
                        // The element must not be taken away when it could not be put down.
                        ended = !found.is_empty();
                        refused.extend(found);
                    } else {
                        ended = true;
                    }
                    refused.extend(found);
                }
                Step::Copy { from, to, if_missing } => {
                    // A temporary key has another name in each attempt, and is made anew.
                    let temporary = to.name.starts_with(PREFIX);
                    if !temporary && self.stands(to.slot, db, steps.next).await? {
                        steps.take();
                        continue;
                    }
                    let mut read = Vec::new();
                    encode_command(&[b"DUMP".as_slice(), &from.name], &mut read);
                    encode_command(&[b"PTTL".as_slice(), &from.name], &mut read);
                    let replies = self.run(Place::Slot(from.slot), db, &read, 2).await?;
                    let found = refusals(&read, &replies);
                    if !found.is_empty() {
                        ended = true;
                        refused.extend(found);
                        continue;
                    }
                    let mut write = Vec::new();
                    match (replies.first(), replies.get(1)) {
                        (Some(Reply::Bulk(Some(payload))), Some(Reply::Integer(pttl))) => {
                            let ttl = (*pttl).max(0).to_string();
                            encode_command(
                                &[b"RESTORE".as_slice(), &to.name, ttl.as_bytes(), payload, b"REPLACE"],
                                &mut write,
                            );
                        }
                        (Some(Reply::Bulk(None)), _) if *if_missing == IfMissing::DeleteDestination => {
                            encode_command(&[b"DEL".as_slice(), &to.name], &mut write);
                        }
                        _ => {
                            ended = true;
                            continue;
                        }
                    }
                    let found = if temporary {
                        let replies = self.run(Place::Slot(to.slot), db, &write, 1).await?;
                        refusals(&write, &replies)
                    } else {
                        self.step(to.slot, db, &write, steps).await?
                    };
                    ended = !found.is_empty();
                    refused.extend(found);
                }
            }
        }
        Ok(refused)
    }
}

/// Numbers for the steps of one command, all between its two offsets.
struct Steps {
    next: u64,
    end: u64,
}

impl Steps {
    fn take(&mut self) -> u64 {
        let number = self.next;
        // A frame has more bytes than steps; should it not, the last of them share a number.
        self.next = (self.next + 1).min(self.end);
        number
    }
}

fn count_frames(frames: &[u8]) -> usize {
    let mut count = 0;
    each_frame(frames, |_| count += 1);
    count
}

fn refusals(frames: &[u8], replies: &[Reply]) -> Vec<Refusal> {
    let mut spans = Vec::new();
    let mut refused = Vec::new();
    let mut at = 0;
    for reply in replies {
        let Some(rest) = frames.get(at..) else { break };
        let Ok(Parsed::Command(length)) = parse_frame(rest, &mut spans) else { break };
        let args = Args { frame: rest, spans: &spans };
        let texts: Vec<&[u8]> = match reply {
            Reply::Error(text) => vec![text],
            Reply::Array(Some(inner)) => inner
                .iter()
                .filter_map(|reply| match reply {
                    Reply::Error(text) => Some(text.as_ref()),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        };
        for text in texts {
            refused.push(Refusal {
                command: String::from_utf8_lossy(args.name()).to_ascii_uppercase(),
                key: args.arg(1).unwrap_or_default().to_vec(),
                error: String::from_utf8_lossy(text).into_owned(),
                kind: Loss::of_command(args.name(), args.arg(3)),
            });
        }
        at += length;
    }
    refused
}
