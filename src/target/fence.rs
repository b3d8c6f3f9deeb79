//! One writer at a time: who comes later shuts out who was there before.
//!
//! A process raises the migration's epoch on every node, then closes the connections of older epochs,
//! which carry theirs in their names. Every connection sets its name first and reads the epoch second, so
//! that an older process either is seen in the list of connections or sees the higher epoch, and stops.
//! The same list lets a process close its own lost connections: what these still hold on their way must
//! not be applied after the state was read.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::keys::KeyNames;
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::Reply;

/// Somebody else raises it all the time: not to be expected.
const MOST_ATTEMPTS: usize = 100;

#[derive(Debug, Error)]
pub enum FenceError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(
        "{address}: a later process has taken over this migration (its epoch there is {theirs}, ours is {ours}); this one stops writing"
    )]
    Superseded { address: Address, ours: u64, theirs: u64 },
    #[error("{address}: the migration's epoch is changed by others all the time; is it run twice?")]
    Contended { address: Address },
}

/// A node, and a slot of it for the epoch's key.
pub type Place = (Address, u16);

/// Which of our own connections a new one closes, beside those of older epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// Those made before this number ([`Fence::floor`]).
    Before(u64),
    Only(u64),
    None,
}

/// What a process knows of the epoch that it raised last, so that it finds its own again: that it was raised may be
/// all that a lost connection did not tell.
#[derive(Debug)]
pub struct Held {
    /// 0: none.
    epoch: AtomicU64,
    /// Stands beside the epoch.
    token: u64,
    /// It was not found where it had been raised, and put back since; what that means has not been judged.
    vanished: AtomicBool,
}

impl Default for Held {
    fn default() -> Self {
        let token = RandomState::new().build_hasher().finish();
        Self { epoch: AtomicU64::new(0), token, vanished: AtomicBool::new(false) }
    }
}

impl Held {
    /// The target may be written to, although the epoch had vanished.
    pub fn judged(&self) {
        self.vanished.store(false, Ordering::SeqCst);
    }

    /// The epoch of a later process at this place; `None`: it is still ours, as far as we had it.
    pub async fn taken_over(
        &self,
        names: &KeyNames,
        dialer: &Dialer,
        place: &Place,
    ) -> Result<Option<u64>, ConnectionError> {
        if self.epoch.load(Ordering::SeqCst) == 0 {
            return Ok(None);
        }
        let found = epoch_at(names, dialer, place).await?;
        Ok(found.filter(|theirs| self.is_outdone_by(theirs)).map(|theirs| theirs.number))
    }

    /// Not even an epoch is left at this place, where we had one.
    pub async fn is_gone(
        &self,
        names: &KeyNames,
        dialer: &Dialer,
        place: &Place,
    ) -> Result<bool, ConnectionError> {
        if self.epoch.load(Ordering::SeqCst) == 0 {
            return Ok(false);
        }
        Ok(epoch_at(names, dialer, place).await?.is_none())
    }

    /// A later process's; one of the same number is another's, too, where the key was lost in between.
    fn is_outdone_by(&self, theirs: &Epoch) -> bool {
        let ours = self.epoch.load(Ordering::SeqCst);
        ours > 0
            && (theirs.number > ours && theirs.token != Some(self.token)
                || theirs.number == ours && theirs.token.is_some_and(|token| token != self.token))
    }

    /// Another process has had it since, as it should.
    pub fn forget(&self) {
        self.epoch.store(0, Ordering::SeqCst);
    }
}

/// Read on a new connection: those of the workers have ended.
async fn epoch_at(
    names: &KeyNames,
    dialer: &Dialer,
    (address, slot): &Place,
) -> Result<Option<Epoch>, ConnectionError> {
    let found = dialer.connect(address).await?.query(&[b"GET", &names.epoch(*slot)]).await?;
    Ok(Epoch::of(&found))
}

/// The right to write, as long as nobody takes it over.
#[derive(Debug)]
pub struct Fence {
    names: KeyNames,
    epoch: u64,
    token: u64,
    /// Counts this process's connections.
    serial: AtomicU64,
    /// An epoch was met since [`Fence::look_anew`].
    met: AtomicBool,
    /// Where it was put back since what that means was judged last: there it says nothing.
    put_back: Mutex<HashSet<Place>>,
}

impl Fence {
    /// Takes the migration over from whoever had it. `nodes`: all that hold data, the one with the lowest
    /// slot first, as that one decides between two that come at once.
    ///
    /// `held`: of this process. One that begins again, after it was frozen perhaps, must not take back what a
    /// later process has taken over.
    pub async fn claim(
        names: KeyNames,
        dialer: &Dialer,
        nodes: &[Place],
        held: &Held,
    ) -> Result<Self, FenceError> {
        let (ours, token) = (held.epoch.load(Ordering::SeqCst), held.token);
        let check = |address: &Address, theirs: Epoch| {
            let error = || FenceError::Superseded { address: address.clone(), ours, theirs: theirs.number };
            if held.is_outdone_by(&theirs) { Err(error()) } else { Ok(theirs.number.saturating_add(1)) }
        };
        let mut epoch = ours.saturating_add(1);
        let mut met = ours == 0;
        for (address, slot) in nodes {
            let mut connection = dialer.connect(address).await?;
            let found = connection.query(&[b"GET", &names.epoch(*slot)]).await?;
            let Some(theirs) = Epoch::of(&found) else { continue };
            epoch = epoch.max(check(address, theirs)?);
            met = true;
        }
        // Once it is put back anywhere, it says nothing any more.
        held.vanished.fetch_or(!met, Ordering::SeqCst);
        if let Some((address, slot)) = nodes.first() {
            let mut connection = dialer.connect(address).await?;
            let mut attempts = 0;
            while let Some(theirs) = raise(&mut connection, &names.epoch(*slot), (epoch, token)).await? {
                epoch = check(address, theirs)?;
                attempts += 1;
                if attempts > MOST_ATTEMPTS {
                    return Err(FenceError::Contended { address: address.clone() });
                }
            }
        }
        held.epoch.store(epoch, Ordering::SeqCst);
        let fence = Self {
            names,
            epoch,
            token,
            serial: AtomicU64::new(0),
            met: AtomicBool::new(false),
            put_back: Mutex::default(),
        };
        for place in nodes {
            fence.connect(dialer, place, Closing::None).await?;
        }
        fence.met.store(!held.vanished.load(Ordering::SeqCst), Ordering::SeqCst);
        fence.judged();
        Ok(fence)
    }

    pub fn names(&self) -> &KeyNames {
        &self.names
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Connections made from now on are not older than this; the next one has just this number.
    pub fn floor(&self) -> u64 {
        self.serial.load(Ordering::SeqCst) + 1
    }

    pub fn look_anew(&self) {
        self.met.store(false, Ordering::SeqCst);
    }

    /// No node had the epoch that this process had raised before it looked anew, or claimed once more: they have
    /// lost what they had, or another process has completed the migration and removed what was kept.
    pub fn has_vanished(&self) -> bool {
        !self.met.load(Ordering::SeqCst)
    }

    /// What an epoch that had vanished means is known: from here on one that was put back counts.
    pub fn judged(&self) {
        self.put_back().clear();
    }

    fn put_back(&self) -> MutexGuard<'_, HashSet<Place>> {
        self.put_back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that may write, once those of older epochs are gone, and our own as `closing` says.
    pub async fn connect(
        &self,
        dialer: &Dialer,
        (address, slot): &Place,
        closing: Closing,
    ) -> Result<Connection, FenceError> {
        let mut connection = self.open(dialer, address).await?;
        let key = self.names.epoch(*slot);
        let found = Epoch::of(&connection.query(&[b"GET", &key]).await?);
        let place = (address.clone(), *slot);
        match found {
            Some(_) => {
                let counts = !self.put_back().contains(&place);
                self.met.fetch_or(counts, Ordering::SeqCst);
            }
            None => _ = self.put_back().insert(place),
        }
        // What was put back by a replayed command has no name.
        let ours = |theirs: &Epoch| {
            theirs.number == self.epoch && theirs.token.is_none_or(|token| token == self.token)
        };
        let theirs = match found {
            Some(theirs) if ours(&theirs) => None,
            // A slot of this node that had another owner, or a server that lost what it had.
            _ => raise(&mut connection, &key, (self.epoch, self.token)).await?,
        };
        if let Some(Epoch { number: theirs, .. }) = theirs.filter(|theirs| !ours(theirs)) {
            return Err(FenceError::Superseded { address: address.clone(), ours: self.epoch, theirs });
        }
        self.close_older(&mut connection, closing).await?;
        Ok(connection)
    }

    /// A named connection for a node whose epoch cannot be looked at: it has no slots yet.
    pub async fn open(&self, dialer: &Dialer, address: &Address) -> Result<Connection, ConnectionError> {
        let serial = self.serial.fetch_add(1, Ordering::SeqCst) + 1;
        let name = format!("{}:{}:{serial}", self.names.client(), self.epoch);
        dialer.with_client_name(name).connect(address).await
    }

    async fn close_older(&self, connection: &mut Connection, closing: Closing) -> Result<(), FenceError> {
        let list = match connection.query_text(&[b"CLIENT", b"LIST"]).await {
            Ok(list) => list,
            Err(error) if error.server_text().is_some() => {
                tracing::warn!(%error, "older connections cannot be closed: grant +client|list and +client|kill");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let client = self.names.client();
        let older = list.lines().filter_map(|line| older(line, &client, self.epoch, closing));
        for address in older {
            match connection.query(&[b"CLIENT", b"KILL", address.as_bytes()]).await {
                // It may have ended by itself meanwhile.
                Ok(_) => {}
                Err(error) if error.server_text().is_some() => tracing::debug!(%error, "not closed"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The address of a client in CLIENT LIST that is ours and to be closed.
fn older<'a>(line: &'a str, client: &str, epoch: u64, closing: Closing) -> Option<&'a str> {
    let field = |name: &str| {
        line.split(' ')
            .find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
            .filter(|v| !v.is_empty())
    };
    let rest = field("name")?.strip_prefix(client)?.strip_prefix(':')?;
    let (theirs, serial) = rest.split_once(':')?;
    let (theirs, serial): (u64, u64) = (theirs.parse().ok()?, serial.parse().ok()?);
    let ours = theirs == epoch
        && match closing {
            Closing::Before(floor) => serial < floor,
            Closing::Only(one) => serial == one,
            Closing::None => false,
        };
    (ours || theirs < epoch).then(|| field("addr"))?
}

/// Sets the epoch unless one as high is there, which is given back.
async fn raise(
    connection: &mut Connection,
    key: &[u8],
    (epoch, token): (u64, u64),
) -> Result<Option<Epoch>, ConnectionError> {
    loop {
        connection.query(&[b"WATCH", key]).await?;
        let found = connection.query(&[b"GET", key]).await?;
        if let Some(theirs) = Epoch::of(&found).filter(|theirs| theirs.number >= epoch) {
            connection.query(&[b"UNWATCH"]).await?;
            return Ok(Some(theirs));
        }
        connection.query(&[b"MULTI"]).await?;
        connection.query(&[b"SET", key, format!("{epoch} {token:016x}").as_bytes()]).await?;
        if !matches!(connection.query(&[b"EXEC"]).await?, Reply::Array(None) | Reply::Bulk(None)) {
            return Ok(None);
        }
    }
}

/// What the key of an epoch holds: `number token`, or the number alone where it was put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Epoch {
    number: u64,
    /// Whose it is.
    token: Option<u64>,
}

impl Epoch {
    fn of(reply: &Reply) -> Option<Self> {
        let mut words = std::str::from_utf8(reply.bytes()?).ok()?.split(' ');
        let number = words.next()?.parse().ok()?;
        Some(Self { number, token: words.next().and_then(|token| u64::from_str_radix(token, 16).ok()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::test_server::Server;

    /// The connection was lost before the answer to its raise.
    #[tokio::test]
    async fn an_epoch_that_was_raised_unheard_is_known_again() {
        let server = Server::start(&[]);
        let dialer = Dialer::new(server.access(), "to");
        let names = KeyNames::new("u", "0");
        let places = [(server.address.clone(), 0)];
        let (first, second) = (Held::default(), Held::default());
        let fence = Fence::claim(names.clone(), &dialer, &places, &first).await.unwrap();
        let mut connection = dialer.connect(&server.address).await.unwrap();
        let unheard = (fence.epoch() + 1, first.token);
        assert_eq!(raise(&mut connection, &names.epoch(0), unheard).await.unwrap(), None);
        let again = Fence::claim(names.clone(), &dialer, &places, &first).await.unwrap();
        assert_eq!(again.epoch(), fence.epoch() + 2);
        // Another process's is not, and what was put back has no name.
        Fence::claim(names.clone(), &dialer, &places, &second).await.unwrap();
        let error = Fence::claim(names.clone(), &dialer, &places, &first).await.unwrap_err();
        assert!(
            matches!(error, FenceError::Superseded { theirs, .. } if theirs == again.epoch() + 1),
            "{error}"
        );
        first.forget();
        Fence::claim(names, &dialer, &places, &first).await.unwrap();
    }

    /// One process's number is reached by another one, where the key was lost.
    #[tokio::test]
    async fn the_same_number_of_another_process_is_not_ours() {
        let server = Server::start(&[]);
        let dialer = Dialer::new(server.access(), "to");
        let names = KeyNames::new("u", "0");
        let places = [(server.address.clone(), 0)];
        let (first, second) = (Held::default(), Held::default());
        let ours = Fence::claim(names.clone(), &dialer, &places, &first).await.unwrap();
        let mut connection = dialer.connect(&server.address).await.unwrap();
        connection.query(&[b"DEL", &names.epoch(0)]).await.unwrap();
        assert_eq!(first.taken_over(&names, &dialer, &places[0]).await.unwrap(), None);
        let theirs = Fence::claim(names.clone(), &dialer, &places, &second).await.unwrap();
        assert_eq!(ours.epoch(), theirs.epoch());
        assert_eq!(first.taken_over(&names, &dialer, &places[0]).await.unwrap(), Some(theirs.epoch()));
        assert_eq!(second.taken_over(&names, &dialer, &places[0]).await.unwrap(), None);
        let error = ours.connect(&dialer, &places[0], Closing::None).await.unwrap_err();
        assert!(matches!(error, FenceError::Superseded { .. }), "{error}");
        let error = Fence::claim(names, &dialer, &places, &first).await.unwrap_err();
        assert!(matches!(error, FenceError::Superseded { .. }), "{error}");
        theirs.connect(&dialer, &places[0], Closing::None).await.unwrap();
    }

    /// An attempt that breaks off has put the epoch back on the nodes before.
    #[tokio::test]
    async fn what_has_vanished_is_not_forgotten_by_an_attempt_in_vain() {
        let server = Server::start(&[]);
        let dialer = Dialer::new(server.access(), "to");
        let names = KeyNames::new("u", "0");
        let place = (server.address.clone(), 0);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dead = (Address::new("127.0.0.1", listener.local_addr().unwrap().port()), 1);
        drop(listener);
        let held = Held::default();
        let both = [place.clone(), dead];
        let fence = Fence::claim(names.clone(), &dialer, &both[..1], &held).await.unwrap();
        assert!(!fence.has_vanished());
        let mut connection = dialer.connect(&server.address).await.unwrap();
        connection.query(&[b"DEL", &names.epoch(0)]).await.unwrap();

        for _ in 0..2 {
            fence.look_anew();
            fence.connect(&dialer, &place, Closing::None).await.unwrap();
            assert!(fence.has_vanished());
        }
        fence.judged();
        fence.look_anew();
        fence.connect(&dialer, &place, Closing::None).await.unwrap();
        assert!(!fence.has_vanished());

        connection.query(&[b"DEL", &names.epoch(0)]).await.unwrap();
        Fence::claim(names.clone(), &dialer, &both, &held).await.unwrap_err();
        for vanished in [true, false] {
            let fence = Fence::claim(names.clone(), &dialer, &both[..1], &held).await.unwrap();
            assert_eq!(fence.has_vanished(), vanished);
            held.judged();
        }
    }

    #[test]
    fn older_connections_of_ours_are_found_and_no_others() {
        let line = |name: &str| format!("id=7 addr=10.0.0.1:555 laddr=x name={name} age=1 db=0");
        let find =
            |name: &str| older(&line(name), "redis-migration:u:0", 5, Closing::Before(10)).map(str::to_owned);
        assert_eq!(find("redis-migration:u:0:4:99").as_deref(), Some("10.0.0.1:555"));
        assert_eq!(find("redis-migration:u:0:5:9").as_deref(), Some("10.0.0.1:555"));
        for other in
            ["redis-migration:u:0:5:10", "redis-migration:u:0:6:1", "redis-migration:u:01:4:1", "", "app"]
        {
            assert_eq!(find(other), None, "{other}");
        }
    }
}
