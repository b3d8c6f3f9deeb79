//! Commands that are run one by one, outside the lanes: those that met a moving slot, and those whose
//! keys lie in several slots. Nothing is under way on the lanes meanwhile.

use std::collections::HashMap;

use thiserror::Error;

use super::repair::{Refusal, Unit};
use super::route::Router;
use crate::backoff::Backoff;
use crate::command::{Emulation, IfMissing, Kind, Part, Step};
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::{Next, Reply, ReplyVerdict, encode_command};

/// Redirections of one command that are followed without a pause.
const QUICK_REDIRECTIONS: u32 = 5;

#[derive(Debug, Error)]
pub enum DirectError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("{address}: {text}")]
    Fatal { address: Address, text: String },
}

/// Connections for single commands, opened when needed.
pub struct Direct<'a> {
    dialer: &'a Dialer,
    router: &'a mut Router,
    /// Address of each lane.
    lanes: Vec<Address>,
    open: HashMap<Address, (Connection, u64)>,
    /// What keeps a command waiting, for the status.
    waiting: &'a mut (dyn FnMut(&str) + Send),
}

/// Where a command goes.
#[derive(Clone, Copy, Debug)]
enum Place {
    Slot(u16),
    Lane(usize),
}

impl<'a> Direct<'a> {
    pub fn new(
        dialer: &'a Dialer,
        router: &'a mut Router,
        lanes: Vec<Address>,
        waiting: &'a mut (dyn FnMut(&str) + Send),
    ) -> Self {
        Self { dialer, router, lanes, open: HashMap::new(), waiting }
    }

    /// Sends a unit again until the target takes it or refuses it for good.
    pub async fn retry(&mut self, unit: &Unit) -> Result<Vec<Refusal>, DirectError> {
        let place = unit.slot.map_or(Place::Lane(unit.lane), Place::Slot);
        let replies = self.run(place, unit.db.unwrap_or_default(), &unit.frames, unit.replies).await?;
        Ok(refusals(&unit.frames, &replies))
    }

    /// Runs the parts of a transaction, or one emulated command, in their order.
    pub async fn parts(&mut self, db: u64, parts: &[Part]) -> Result<Vec<Refusal>, DirectError> {
        let mut refused = Vec::new();
        for part in parts {
            match part {
                Part::Group { slot, commands, frames } => {
                    let mut whole = b"*1\r\n$5\r\nMULTI\r\n".to_vec();
                    whole.extend_from_slice(frames);
                    whole.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
                    let replies = self.run(Place::Slot(*slot), db, &whole, *commands as usize + 2).await?;
                    refused.extend(refusals(&whole, &replies));
                }
                Part::Keyless { frame, kind, .. } => {
                    let everywhere = matches!(kind, Kind::Flush | Kind::Function | Kind::ScriptCache);
                    for lane in 0..if everywhere { self.lanes.len() } else { 1 } {
                        let replies = self.run(Place::Lane(lane), db, frame, 1).await?;
                        refused.extend(refusals(frame, &replies));
                    }
                }
                Part::Emulate(emulation) => refused.extend(self.emulate(db, emulation).await?),
                Part::Impossible { why, .. } => refused.push(Refusal {
                    command: "in a transaction".to_owned(),
                    key: Vec::new(),
                    error: why.to_string(),
                }),
            }
        }
        Ok(refused)
    }

    async fn emulate(&mut self, db: u64, emulation: &Emulation) -> Result<Vec<Refusal>, DirectError> {
        let mut refused = Vec::new();
        let mut ended = false;
        for step in &emulation.steps {
            match step {
                Step::Clean { slot, frame } => {
                    self.run(Place::Slot(*slot), db, frame, 1).await?;
                }
                _ if ended => {}
                Step::Run { slot, frame } => {
                    let replies = self.run(Place::Slot(*slot), db, frame, 1).await?;
                    let found = refusals(frame, &replies);
                    ended = !found.is_empty();
                    refused.extend(found);
                }
                Step::Carry { from_slot, read, to_slot, command } => {
                    let replies = self.run(Place::Slot(*from_slot), db, read, 1).await?;
                    let found = refusals(read, &replies);
                    if let (true, Some(Reply::Bulk(Some(element)))) = (found.is_empty(), replies.first()) {
                        let mut words: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
                        words.push(element);
                        let mut frame = Vec::new();
                        encode_command(&words, &mut frame);
                        let replies = self.run(Place::Slot(*to_slot), db, &frame, 1).await?;
                        let found = refusals(&frame, &replies);
                        // The element must not be taken away when it could not be put down.
                        ended = !found.is_empty();
                        refused.extend(found);
                    } else {
                        ended = true;
                    }
                    refused.extend(found);
                }
                Step::Copy { from, to, if_missing } => {
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
                    let replies = self.run(Place::Slot(to.slot), db, &write, 1).await?;
                    let found = refusals(&write, &replies);
                    ended = !found.is_empty();
                    refused.extend(found);
                }
            }
        }
        Ok(refused)
    }

    /// Runs `frames` (`count` commands of one place) until no answer asks to go elsewhere or to wait.
    async fn run(
        &mut self,
        mut place: Place,
        db: u64,
        frames: &[u8],
        count: usize,
    ) -> Result<Vec<Reply>, DirectError> {
        let mut backoff = Backoff::default();
        let mut redirections = 0;
        let mut ask: Option<Address> = None;
        loop {
            let address = match ask.take() {
                Some(address) => (address, true),
                None => (self.address(place), false),
            };
            let (address, asking) = address;
            let replies = match self.try_once(&address, db, frames, count, asking).await {
                Ok(replies) => replies,
                Err(error) if error.is_transient() => {
                    self.open.remove(&address);
                    (self.waiting)(&error.to_string());
                    backoff.wait().await;
                    self.refresh().await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let verdict = replies.iter().find_map(|reply| match reply {
                Reply::Error(text) => Some((ReplyVerdict::of(text), text)),
                _ => None,
            });
            let Some((verdict, text)) = verdict else { return Ok(replies) };
            match (&verdict, verdict.next()) {
                (ReplyVerdict::Moved { slot, address: to }, _) => {
                    let to = or_host(to, &address);
                    if let Router::Slots(map) = &mut *self.router {
                        map.moved(*slot, &to, self.dialer);
                        // Commands whose keys only the source's server knows came without their slot.
                        place = Place::Slot(*slot);
                    }
                }
                (ReplyVerdict::Ask { address: to, .. }, _) => {
                    ask = Some(self.dialer.reachable(&or_host(to, &address)));
                }
                (_, Next::RetryLater | Next::RetryUntilOperator) => {
                    (self.waiting)(&format!("{address}: {}", String::from_utf8_lossy(text)));
                    backoff.wait().await;
                    self.refresh().await;
                    continue;
                }
                (_, Next::Fail) => {
                    let text = String::from_utf8_lossy(text).into_owned();
                    return Err(DirectError::Fatal { address, text });
                }
                _ => return Ok(replies),
            }
            redirections += 1;
            if redirections > QUICK_REDIRECTIONS {
                backoff.wait().await;
            }
        }
    }

    async fn try_once(
        &mut self,
        address: &Address,
        db: u64,
        frames: &[u8],
        count: usize,
        asking: bool,
    ) -> Result<Vec<Reply>, ConnectionError> {
        if !self.open.contains_key(address) {
            let connection = self.dialer.connect(address).await?;
            self.open.insert(address.clone(), (connection, 0));
        }
        let Some((connection, current)) = self.open.get_mut(address) else {
            return Err(ConnectionError::Closed { address: address.clone() });
        };
        if *current != db {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
            *current = db;
        }
        if asking {
            connection.queue(&[b"ASKING"]);
        }
        connection.queue_frames(frames);
        connection.send_queued().await?;
        if asking {
            connection.receive().await?;
        }
        let mut replies = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            replies.push(connection.receive().await?);
        }
        Ok(replies)
    }

    fn address(&self, place: Place) -> Address {
        match (place, &*self.router) {
            (Place::Slot(slot), Router::Slots(map)) => map
                .owner(slot)
                .and_then(|number| map.node(number))
                .map(|node| node.address.clone())
                .or_else(|| self.lanes.first().cloned())
                .unwrap_or_else(|| Address::new("", 0)),
            (Place::Slot(_), Router::Single) => self.lane(0),
            (Place::Lane(lane), _) => self.lane(lane),
        }
    }

    fn lane(&self, lane: usize) -> Address {
        self.lanes.get(lane).cloned().unwrap_or_else(|| Address::new("", 0))
    }

    /// The map may be stale; when it cannot be had now, the next attempt asks again.
    async fn refresh(&mut self) {
        if let Router::Slots(map) = &mut *self.router
            && let Err(error) = map.refresh(self.dialer).await
        {
            tracing::warn!(%error, "the target's slot map could not be read");
        }
    }
}

/// Redirections may leave the host out: it is the one that was asked.
fn or_host(address: &Address, asked: &Address) -> Address {
    address.clone().or_host_of(asked)
}

fn refusals(frames: &[u8], replies: &[Reply]) -> Vec<Refusal> {
    let mut spans = Vec::new();
    let mut refused = Vec::new();
    let mut at = 0;
    for reply in replies {
        let Some(rest) = frames.get(at..) else { break };
        let Ok(crate::resp::frame::Parsed::Command(length)) =
            crate::resp::frame::parse_frame(rest, &mut spans)
        else {
            break;
        };
        let args = crate::resp::Args { frame: rest, spans: &spans };
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
            });
        }
        at += length;
    }
    refused
}
