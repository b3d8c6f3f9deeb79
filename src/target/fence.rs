//! One writer at a time: who comes later shuts out who was there before.
//!
//! A process raises the migration's epoch on every node, then closes the connections of older epochs,
//! which carry theirs in their names. Every connection sets its name first and reads the epoch second, so
//! that an older process either is seen in the list of connections or sees the higher epoch, and stops.
//! The same list lets a process close its own lost connections: what these still hold on their way must
//! not be applied after the state was read.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// The right to write, as long as nobody takes it over.
#[derive(Debug)]
pub struct Fence {
    names: KeyNames,
    epoch: u64,
    /// Counts this process's connections.
    serial: AtomicU64,
}

impl Fence {
    /// Takes the migration over from whoever had it. `nodes`: all that hold data, the one with the lowest
    /// slot first, as that one decides between two that come at once.
    ///
    /// `held`: the last epoch of this process; 0: none. One that begins again, after it was frozen perhaps, must
    /// not take back what a later process has taken over.
    pub async fn claim(
        names: KeyNames,
        dialer: &Dialer,
        nodes: &[Place],
        held: &AtomicU64,
    ) -> Result<Self, FenceError> {
        let ours = held.load(Ordering::SeqCst);
        let superseded =
            |address: &Address, theirs| FenceError::Superseded { address: address.clone(), ours, theirs };
        let mut epoch = ours.saturating_add(1);
        for (address, slot) in nodes {
            let mut connection = dialer.connect(address).await?;
            let found = connection.query(&[b"GET", &names.epoch(*slot)]).await?;
            let Some(theirs) = number(&found) else { continue };
            if ours > 0 && theirs > ours {
                return Err(superseded(address, theirs));
            }
            epoch = epoch.max(theirs.saturating_add(1));
        }
        if let Some((address, slot)) = nodes.first() {
            let mut connection = dialer.connect(address).await?;
            let mut attempts = 0;
            while let Some(theirs) = raise(&mut connection, &names.epoch(*slot), epoch).await? {
                if ours > 0 {
                    return Err(superseded(address, theirs));
                }
                epoch = theirs.saturating_add(1);
                attempts += 1;
                if attempts > MOST_ATTEMPTS {
                    return Err(FenceError::Contended { address: address.clone() });
                }
            }
        }
        held.store(epoch, Ordering::SeqCst);
        let fence = Self { names, epoch, serial: AtomicU64::new(0) };
        for place in nodes {
            fence.connect(dialer, place, Closing::None).await?;
        }
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

    /// A connection that may write, once those of older epochs are gone, and our own as `closing` says.
    pub async fn connect(
        &self,
        dialer: &Dialer,
        (address, slot): &Place,
        closing: Closing,
    ) -> Result<Connection, FenceError> {
        let mut connection = self.open(dialer, address).await?;
        let key = self.names.epoch(*slot);
        let found = connection.query(&[b"GET", &key]).await?;
        let theirs = match number(&found) {
            Some(theirs) if theirs == self.epoch => None,
            // A slot of this node that had another owner, or a server that lost what it had.
            _ => raise(&mut connection, &key, self.epoch).await?.filter(|&theirs| theirs != self.epoch),
        };
        if let Some(theirs) = theirs {
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
async fn raise(connection: &mut Connection, key: &[u8], epoch: u64) -> Result<Option<u64>, ConnectionError> {
    loop {
        connection.query(&[b"WATCH", key]).await?;
        let found = connection.query(&[b"GET", key]).await?;
        if let Some(theirs) = number(&found).filter(|&theirs| theirs >= epoch) {
            connection.query(&[b"UNWATCH"]).await?;
            return Ok(Some(theirs));
        }
        connection.query(&[b"MULTI"]).await?;
        connection.query(&[b"SET", key, epoch.to_string().as_bytes()]).await?;
        if !matches!(connection.query(&[b"EXEC"]).await?, Reply::Array(None) | Reply::Bulk(None)) {
            return Ok(None);
        }
    }
}

fn number(reply: &Reply) -> Option<u64> {
    std::str::from_utf8(reply.bytes()?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
