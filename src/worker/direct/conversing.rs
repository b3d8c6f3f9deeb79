//! Commands to one place of the target, wherever it is by then: redirections are followed, refusals that
//! pass are waited for, lost connections are opened anew.

use super::{Direct, DirectError, Open, Place, QUICK_REDIRECTIONS};
use crate::backoff::Backoff;
use crate::connection::{Address, ConnectionError};
use crate::resp::{Next, Reply, ReplyVerdict};
use crate::target::fence::Closing;
use crate::target::keys::parse_guard;
use crate::worker::mending::{Guard, guard};
use crate::worker::route::Router;

impl Direct<'_> {
    /// Runs `frames` (`count` commands of one place) until no answer asks to go elsewhere or to wait.
    pub async fn run(
        &mut self,
        mut place: Place,
        db: u64,
        frames: &[u8],
        count: usize,
    ) -> Result<Vec<Reply>, DirectError> {
        let mut backoff = Backoff::default();
        let mut redirections = 0;
        let mut ask: Option<Address> = None;
        let guard = self.guarding.as_ref().and_then(|_| guard(frames));
        // Sent, and not answered: it may stand.
        let mut uncertain = false;
        loop {
            let address = match ask.take() {
                Some(address) => (address, true),
                None => (self.address(place), false),
            };
            let (address, asking) = address;
            let unless = guard.as_ref().filter(|_| uncertain);
            let replies = match self.try_once(&address, db, (frames, count), unless, asking).await {
                Ok(Some(replies)) => replies,
                // It stands; what it answered is lost.
                Ok(None) => return Ok(Vec::new()),
                Err(DirectError::Connection(error)) if error.is_transient() => {
                    uncertain = true;
                    if let Some(open) = self.conversations.open.remove(&address) {
                        self.conversations.lost.insert(address.clone(), open.serial);
                    }
                    (self.waiting)(&error.to_string());
                    backoff.wait().await;
                    if matches!(self.router, Router::Single) {
                        return Err(DirectError::Adrift { address, why: error.to_string() });
                    }
                    self.refresh().await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let verdict = replies.iter().find_map(|reply| match reply {
                Reply::Error(text) => Some((ReplyVerdict::of(text), text)),
                _ => None,
            });
            let Some((verdict, text)) = verdict else { return Ok(replies) };
            match (&verdict, verdict.next()) {
                (ReplyVerdict::Moved { slot, address: to }, _) => {
                    let to = or_host(to, &address);
                    let before = self.serving();
                    if let Router::Slots(map) = &mut *self.router {
                        map.moved(*slot, &to, self.dialer);
                        // Commands whose keys only the source's server knows came without their slot.
                        place = Place::Slot(*slot);
                    }
                    self.no_newcomer(&before)?;
                }
                (ReplyVerdict::Ask { address: to, .. }, _) => {
                    ask = Some(self.dialer.reachable(&or_host(to, &address)));
                }
                (_, Next::RetryLater) if self.is_demoted(place).await? => {
                    // Who has its slots now gets it, if by chance a second time; FUNCTION and SCRIPT bear that.
                    for lane in self.serving() {
                        Box::pin(self.run(Place::Lane(lane), db, frames, count)).await?;
                    }
                    return Ok(Vec::new());
                }
                (ReplyVerdict::ReadOnly, _) if matches!(self.router, Router::Single) => {
                    let why = String::from_utf8_lossy(text).into_owned();
                    (self.waiting)(&format!("{address}: {why}"));
                    backoff.wait().await;
                    return Err(DirectError::Adrift { address, why });
                }
                (_, Next::RetryLater | Next::RetryUntilOperator) => {
                    (self.waiting)(&format!("{address}: {}", String::from_utf8_lossy(text)));
                    backoff.wait().await;
                    self.refresh().await?;
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

    /// `None`: the guard in `unless` says that it stands.
    async fn try_once(
        &mut self,
        address: &Address,
        db: u64,
        (frames, count): (&[u8], usize),
        unless: Option<&Guard>,
        asking: bool,
    ) -> Result<Option<Vec<Reply>>, DirectError> {
        if !self.conversations.open.contains_key(address) {
            let open = self.connect(address).await?;
            self.conversations.open.insert(address.clone(), open);
        }
        let Some(Open { connection, db: current, .. }) = self.conversations.open.get_mut(address) else {
            return Err(ConnectionError::Closed { address: address.clone() }.into());
        };
        if *current != db {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
            *current = db;
        }
        if let Some((key, (history, offset))) = unless {
            if asking {
                connection.query(&[b"ASKING"]).await?;
            }
            let found = connection.call(&[b"GET", key]).await?;
            let found = found.bytes().and_then(|value| parse_guard(value));
            if found.is_some_and(|found| found.0 == *history && found.1 >= *offset) {
                return Ok(None);
            }
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
        Ok(Some(replies))
    }

    async fn connect(&mut self, address: &Address) -> Result<Open, DirectError> {
        let Some(guarding) = &self.guarding else {
            let connection = self.dialer.connect(address).await?;
            return Ok(Open { connection, db: 0, serial: 0 });
        };
        let fence = &guarding.fence;
        let serial = fence.floor();
        let slot = match &*self.router {
            Router::Slots(map) => {
                map.number_of(address).and_then(|number| map.slots_of(number).iter().next())
            }
            Router::Single => Some(0),
        };
        let connection = match slot {
            Some(slot) => {
                // What was lost may still be on its way there.
                let closing = self.conversations.lost.remove(address).map_or(Closing::None, Closing::Only);
                fence.connect(self.dialer, &(address.clone(), slot), closing).await?
            }
            None => fence.open(self.dialer, address).await?,
        };
        Ok(Open { connection, db: 0, serial })
    }

    /// True for a node that was asked as such and has lost its slots to others.
    async fn is_demoted(&mut self, place: Place) -> Result<bool, DirectError> {
        let Place::Lane(lane) = place else { return Ok(false) };
        self.refresh().await?;
        Ok(!self.serves(lane))
    }

    pub(super) fn serving(&self) -> Vec<usize> {
        let lanes = match &*self.router {
            Router::Slots(map) => map.nodes().len(),
            Router::Single => 1,
        };
        (0..lanes).filter(|&lane| self.serves(lane)).collect()
    }

    /// A node without slots takes nothing.
    fn serves(&self, lane: usize) -> bool {
        match &*self.router {
            Router::Slots(map) => !map.slots_of(lane).is_empty(),
            Router::Single => true,
        }
    }

    pub(super) fn address(&self, place: Place) -> Address {
        match (place, &*self.router) {
            (Place::Slot(slot), Router::Slots(map)) => map
                .owner(slot)
                .and_then(|number| map.node(number))
                .map(|node| node.address.clone())
                .or_else(|| self.lanes.first().cloned())
                .unwrap_or_else(|| Address::new("", 0)),
            (Place::Slot(_), Router::Single) => self.lane(0),
            (Place::Lane(lane), Router::Slots(map)) => {
                map.node(lane).map_or_else(|| self.lane(0), |node| node.address.clone())
            }
            (Place::Lane(lane), Router::Single) => self.lane(lane),
        }
    }

    fn lane(&self, lane: usize) -> Address {
        self.lanes.get(lane).cloned().unwrap_or_else(|| Address::new("", 0))
    }

    /// The map may be stale; when it cannot be had now, the next attempt asks again.
    async fn refresh(&mut self) -> Result<(), DirectError> {
        let before = self.serving();
        if let Router::Slots(map) = &mut *self.router
            && let Err(error) = map.refresh(self.dialer).await
        {
            tracing::warn!(%error, "the target's slot map could not be read");
        }
        self.no_newcomer(&before)
    }

    /// A node that had no slots may be a replica that was promoted without the last writes, though no connection
    /// was lost: what it holds has to be read before anything goes there.
    fn no_newcomer(&self, before: &[usize]) -> Result<(), DirectError> {
        let newcomer = self.serving().into_iter().find(|lane| !before.contains(lane));
        match newcomer.filter(|_| self.guarding.is_some()) {
            Some(lane) => Err(DirectError::Newcomer { address: self.address(Place::Lane(lane)) }),
            None => Ok(()),
        }
    }
}

/// Redirections may leave the host out: it is the one that was asked.
fn or_host(address: &Address, asked: &Address) -> Address {
    address.clone().or_host_of(asked)
}
