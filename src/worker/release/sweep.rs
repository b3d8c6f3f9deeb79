//! Going through the keys of the target's nodes.

use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::hold::true_key;
use crate::resp::{Next, Reply, ReplyVerdict};
use crate::slot::{SLOT_COUNT, SlotRanges, slot};
use crate::target::keys::PREFIX;
use crate::topology::TopologyError;
use crate::version::ServerVersion;
use crate::worker::route::Router;

/// Keys looked at while the stream waits: some 20 ms.
const PAGE: &[u8] = b"2000";
/// Keys of the list looked at in one go.
const KEYS: usize = 1000;

/// One pass over all nodes.
#[derive(Debug)]
pub struct Sweep {
    pub nodes: Vec<NodeSweep>,
    /// Who had each slot when it began.
    pub owners: Vec<Option<Address>>,
}

#[derive(Debug)]
pub struct NodeSweep {
    pub lane: usize,
    pub(super) connection: Connection,
    pub(super) version: ServerVersion,
    /// Those of the source's shard; `None`: all.
    pub(super) slots: Option<SlotRanges>,
    /// Databases that are still to be gone through; not known before the first page.
    left: Option<Vec<Keyspace>>,
    cursor: Vec<u8>,
    pub(super) db: u64,
}

/// A line of INFO keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keyspace {
    pub db: u64,
    pub expires: bool,
    /// Hashes have fields that expire; true where the server does not say.
    pub fields: bool,
}

/// What came of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub released: u64,
    /// Some keys could not be asked about, as their slot is on the move.
    pub missed: bool,
}

impl NodeSweep {
    /// `connection` is one that may write, in database 0.
    pub fn new(
        lane: usize,
        connection: Connection,
        version: ServerVersion,
        slots: Option<SlotRanges>,
    ) -> Self {
        Self { lane, connection, version, slots, left: None, cursor: b"0".to_vec(), db: 0 }
    }

    pub fn is_done(&self) -> bool {
        self.left.as_ref().is_some_and(Vec::is_empty)
    }

    /// The next page of keys; nothing of the stream may be under way.
    pub async fn page(&mut self) -> Result<Page, ConnectionError> {
        if self.left.is_none() {
            let found = keyspaces(&mut self.connection).await?;
            self.left = Some(found.into_iter().filter(|keyspace| keyspace.expires).collect());
        }
        let Some(Keyspace { db, .. }) = self.left.as_ref().and_then(|left| left.last()).copied() else {
            return Ok(Page::default());
        };
        self.select(db).await?;
        let cursor = self.cursor.clone();
        let (next, keys) = self.scan(&[b"SCAN", &cursor, b"COUNT", PAGE]).await?;
        let page = self.release(&keys).await?;
        if let Some(left) = self.left.as_mut().filter(|_| next == b"0") {
            left.pop();
        }
        self.cursor = next;
        Ok(page)
    }

    /// These keys of a database.
    pub async fn keys(&mut self, db: u64, keys: &[Vec<u8>]) -> Result<Page, ConnectionError> {
        self.select(db).await?;
        let mut page = Page::default();
        for keys in keys.chunks(KEYS) {
            let Page { released, missed } = self.release(keys).await?;
            page.released += released;
            page.missed |= missed;
        }
        Ok(page)
    }

    async fn release(&mut self, keys: &[Vec<u8>]) -> Result<Page, ConnectionError> {
        // Only the absolute time is exact; what is left is counted by the same clock, and never too short.
        let (question, answer): (&[u8], &[u8]) =
            if self.version.has_redis(7, 0) { (b"PEXPIRETIME", b"PEXPIREAT") } else { (b"PTTL", b"PEXPIRE") };
        for key in keys {
            self.connection.queue(&[question, key.as_slice()]);
        }
        let mut page = Page::default();
        let mut asked = 0;
        for (key, reply) in keys.iter().zip(self.replies(keys.len()).await?) {
            match reply {
                Reply::Integer(at) => {
                    let Some(at) = true_key(at) else { continue };
                    let mut digits = itoa::Buffer::new();
                    self.connection.queue(&[answer, key.as_slice(), digits.format(at).as_bytes()]);
                    asked += 1;
                }
                reply => page.missed |= self.is_elsewhere(question, &reply)?,
            }
        }
        for reply in self.replies(asked).await? {
            match reply {
                Reply::Integer(_) => page.released += 1,
                reply => page.missed |= self.is_elsewhere(answer, &reply)?,
            }
        }
        Ok(page)
    }

    /// The replies to what is queued.
    pub(super) async fn replies(&mut self, count: usize) -> Result<Vec<Reply>, ConnectionError> {
        self.connection.send_queued().await?;
        let mut replies = Vec::with_capacity(count.min(4096));
        for _ in 0..count {
            replies.push(self.connection.receive().await?);
        }
        Ok(replies)
    }

    /// True for the answer of a node that does not have the key now.
    pub(super) fn is_elsewhere(&self, command: &[u8], reply: &Reply) -> Result<bool, ConnectionError> {
        let Reply::Error(text) = reply else { return Err(self.connection.unexpected(command)) };
        match ReplyVerdict::of(text).next() {
            Next::Reroute | Next::RetryLater | Next::RetryUntilOperator => Ok(true),
            _ => Err(ConnectionError::from_reply(self.connection.address(), command, text)),
        }
    }

    pub(super) async fn select(&mut self, db: u64) -> Result<(), ConnectionError> {
        if db != self.db {
            self.connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
            self.db = db;
        }
        Ok(())
    }

    /// A page of SCAN: the next cursor, and the keys of this shard.
    pub(super) async fn scan(&mut self, args: &[&[u8]]) -> Result<(Vec<u8>, Vec<Vec<u8>>), ConnectionError> {
        let reply = self.connection.query(args).await?;
        let Some((next, mut keys)) = elements(&reply) else {
            return Err(self.connection.unexpected(b"SCAN"));
        };
        let slots = self.slots.as_ref();
        keys.retain(|key| !key.starts_with(PREFIX) && slots.is_none_or(|slots| slots.contains(slot(key))));
        Ok((next, keys))
    }
}

/// Cursor and elements of a reply to SCAN or HSCAN.
pub(super) fn elements(reply: &Reply) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    let [cursor, Reply::Array(Some(elements))] = reply.items() else { return None };
    let elements = elements.iter().filter_map(|element| element.bytes().map(|bytes| bytes.to_vec()));
    Some((cursor.bytes()?.to_vec(), elements.collect()))
}

pub(super) async fn keyspaces(connection: &mut Connection) -> Result<Vec<Keyspace>, ConnectionError> {
    let text = connection.query_text(&[b"INFO", b"keyspace"]).await?;
    Ok(text.lines().filter_map(keyspace).collect())
}

/// `db0:keys=12,expires=3,avg_ttl=0,subexpiry=1`, or `keys_with_volatile_items=1` on Valkey.
fn keyspace(line: &str) -> Option<Keyspace> {
    let (db, rest) = line.strip_prefix("db")?.split_once(':')?;
    let count = |name: &str| {
        let field = rest.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        field.map(|number| number.trim_end() != "0")
    };
    let fields = count("subexpiry").or_else(|| count("keys_with_volatile_items"));
    Some(Keyspace {
        db: db.parse().ok()?,
        expires: count("expires").unwrap_or(true),
        fields: fields.unwrap_or(true),
    })
}

/// Who has each slot of the target now; empty without a cluster.
pub async fn owners(router: &Router, dialer: &Dialer) -> Result<Vec<Option<Address>>, TopologyError> {
    let Router::Slots(map) = router else { return Ok(Vec::new()) };
    let mut map = map.clone();
    map.refresh(dialer).await?;
    let owner = |slot| map.owner(slot).and_then(|number| map.node(number)).map(|node| node.address.clone());
    Ok((0..SLOT_COUNT).map(owner).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_without_expiries_are_left_out() {
        let of = |line| keyspace(line).map(|found| (found.db, found.expires, found.fields));
        assert_eq!(of("db3:keys=12,expires=0,avg_ttl=0\r"), Some((3, false, true)));
        assert_eq!(of("db0:keys=5,expires=4,avg_ttl=0,subexpiry=1\r"), Some((0, true, true)));
        assert_eq!(of("db0:keys=5,expires=4,avg_ttl=0,subexpiry=0\r"), Some((0, true, false)));
        assert_eq!(of("db0:keys=5,expires=4,keys_with_volatile_items=0"), Some((0, true, false)));
        assert_eq!(of("# Keyspace"), None);
    }
}
