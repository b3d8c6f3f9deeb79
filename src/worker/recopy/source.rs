//! Asking the source for keys as they are at one place of its stream.
//!
//! `MULTI; DUMP …; PTTL …; INFO replication; EXEC`: nothing comes between these, so that the offset which
//! INFO tells is the one at which the values are as told. (Seen on Redis 2.8 to 8.2 and Valkey 8.1 and 9.1.)
//! Redis 3.2 to 6.2 may count their MULTI, and DELs of keys that expire just then, but not the EXEC: the
//! offset then lies inside of a transaction, which the next command of the stream ends.

use thiserror::Error;

use super::put::Value;
use crate::clock::unix_millis;
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::{Reply, ReplyVerdict};
use crate::slot::{SlotRanges, tag_for_slot};
use crate::topology::{Mode, ServerInfo, ServerRole, read_info};
use crate::version::{Flavor, ServerVersion};

/// A slot with more keys than this is not copied on its own.
const MOST_IN_SLOT: u64 = 2_000_000;

#[derive(Debug, Error)]
pub enum AskError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("{address} is in another history than the one that is followed")]
    OtherHistory { address: Address },
    #[error("{address} refused {command}: {text}")]
    Refused { address: Address, command: &'static str, text: String },
    #[error("slot {slot} holds {keys} keys, too many to be copied on their own")]
    TooLarge { slot: u16, keys: u64 },
    #[error("the source's offsets cannot be compared with ours, as it sends its stream without a name")]
    Unnamed,
}

impl AskError {
    /// The source's user may not ask this, or the source does not know the question: another attempt ends alike.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused { text, .. } => {
                let text = text.as_bytes();
                ReplyVerdict::of(text) == ReplyVerdict::Auth
                    || text.starts_with(b"NOPERM")
                    || text.starts_with(b"ERR")
            }
            Self::Connection(error) => error.is_auth(),
            Self::TooLarge { .. } | Self::Unnamed => true,
            Self::OtherHistory { .. } => false,
        }
    }
}

/// Something that holds at one replication offset.
#[derive(Debug)]
pub struct At<T> {
    pub offset: i64,
    pub what: T,
}

/// A conversation with one server of the source.
pub struct Source {
    connection: Connection,
    run_id: String,
    version: Option<ServerVersion>,
    db: u64,
}

impl Source {
    pub async fn connect(dialer: &Dialer, address: &Address) -> Result<Self, AskError> {
        let mut connection = dialer.connect(address).await?;
        let info = read_info(&mut connection).await?;
        if info.mode == Mode::Cluster && info.role == ServerRole::Replica {
            connection.query(&[b"READONLY"]).await?;
        }
        Ok(Self { connection, run_id: info.run_id, version: info.version, db: 0 })
    }

    pub fn address(&self) -> &Address {
        self.connection.address()
    }

    /// Whose numbering of RDB types applies.
    pub fn flavor(&self) -> Flavor {
        self.version.map_or(Flavor::Redis, |version| version.flavor)
    }

    /// How far the source is.
    pub async fn offset(&mut self, history: &str) -> Result<i64, AskError> {
        let text = self.connection.query_text(&[b"INFO", b"replication"]).await?;
        self.offset_in(&text, history)
    }

    /// Bytes that each value takes in memory, roughly; `None` where the source does not tell.
    pub async fn sizes(&mut self, db: u64, keys: &[Vec<u8>]) -> Result<Option<Vec<u64>>, AskError> {
        if !self.version.is_some_and(|version| version.has_redis(4, 0)) {
            return Ok(None);
        }
        self.select(db).await?;
        for key in keys {
            self.connection.queue(&[b"MEMORY".as_slice(), b"USAGE", key]);
        }
        self.connection.send_queued().await?;
        let (mut sizes, mut refused) = (Vec::with_capacity(keys.len()), false);
        for _ in keys {
            match self.connection.receive().await? {
                Reply::Integer(size) => sizes.push(u64::try_from(size).unwrap_or_default()),
                Reply::Error(_) => refused = true,
                _ => sizes.push(0),
            }
        }
        Ok((!refused).then_some(sizes))
    }

    /// The values of these keys, at one offset.
    pub async fn values(
        &mut self,
        history: &str,
        db: u64,
        keys: &[Vec<u8>],
    ) -> Result<At<Vec<Option<Value>>>, AskError> {
        self.select(db).await?;
        let absolute = self.version.is_some_and(|version| version.has_redis(7, 0));
        let ttl: &[u8] = if absolute { b"PEXPIRETIME" } else { b"PTTL" };
        let mut commands: Vec<Vec<&[u8]>> = Vec::with_capacity(2 * keys.len());
        for key in keys {
            commands.push(vec![b"DUMP", key]);
            commands.push(vec![ttl, key]);
        }
        let At { offset, what } = self.transaction("DUMP", history, &commands).await?;
        let now = i64::try_from(unix_millis()).unwrap_or(i64::MAX);
        let mut values = Vec::with_capacity(keys.len());
        for pair in what.chunks(2) {
            values.push(match pair {
                [Reply::Bulk(Some(payload)), Reply::Integer(ttl)] => {
                    let at = if absolute { *ttl } else { now.saturating_add(*ttl) };
                    Some(Value { payload: payload.to_vec(), expire_at: (*ttl >= 0).then_some(at) })
                }
                [Reply::Bulk(None), _] => None,
                _ => return Err(self.connection.unexpected(b"DUMP").into()),
            });
        }
        Ok(At { offset, what: values })
    }

    /// How many keys each of these slots holds now.
    pub async fn counts(&mut self, slots: &SlotRanges) -> Result<Vec<(u16, u64)>, AskError> {
        for slot in slots.iter() {
            self.connection.queue(&[b"CLUSTER".as_slice(), b"COUNTKEYSINSLOT", slot.to_string().as_bytes()]);
        }
        self.connection.send_queued().await?;
        let (mut counts, mut refused) = (Vec::new(), None);
        for slot in slots.iter() {
            match self.connection.receive().await? {
                Reply::Integer(keys) => counts.push((slot, u64::try_from(keys).unwrap_or_default())),
                Reply::Error(text) => refused = Some(text),
                _ => return Err(self.connection.unexpected(b"CLUSTER COUNTKEYSINSLOT").into()),
            }
        }
        match refused {
            Some(text) => Err(self.refused("CLUSTER COUNTKEYSINSLOT", &text)),
            None => Ok(counts),
        }
    }

    /// All keys of these slots, which the server must serve, at one offset. `counts`: as [`Self::counts`] told.
    pub async fn list(&mut self, history: &str, counts: &[(u16, u64)]) -> Result<At<Vec<Vec<u8>>>, AskError> {
        // Some may have come since.
        let words: Vec<(String, String)> = counts
            .iter()
            .map(|&(slot, keys)| (slot.to_string(), (keys + keys / 4 + 1000).to_string()))
            .collect();
        if let Some(&(slot, keys)) = counts.iter().find(|(_, keys)| *keys > MOST_IN_SLOT) {
            return Err(AskError::TooLarge { slot, keys });
        }
        let commands: Vec<Vec<&[u8]>> = words
            .iter()
            .map(|(slot, most)| {
                let (slot, most) = (slot.as_bytes(), most.as_bytes());
                vec![b"CLUSTER".as_slice(), b"GETKEYSINSLOT", slot, most]
            })
            .collect();
        // Any node would answer, and another than the owner that there are none.
        self.check_owner(counts).await?;
        let At { offset, what } = self.transaction("CLUSTER GETKEYSINSLOT", history, &commands).await?;
        self.check_owner(counts).await?;
        let mut keys = Vec::new();
        for (reply, &(slot, count)) in what.iter().zip(counts) {
            let Reply::Array(Some(found)) = reply else {
                return Err(self.connection.unexpected(b"CLUSTER GETKEYSINSLOT").into());
            };
            if found.len() as u64 >= count + count / 4 + 1000 {
                return Err(AskError::TooLarge { slot, keys: found.len() as u64 });
            }
            keys.extend(found.iter().filter_map(|key| key.bytes().map(|key| key.to_vec())));
        }
        Ok(At { offset, what: keys })
    }

    /// An error unless the server serves all these slots, and is not handing them over.
    async fn check_owner(&mut self, slots: &[(u16, u64)]) -> Result<(), AskError> {
        for &(slot, _) in slots {
            let probe = format!("redis-migration:{{{}}}:probe", tag_for_slot(slot));
            self.connection.queue(&[b"EXISTS".as_slice(), probe.as_bytes()]);
        }
        self.connection.send_queued().await?;
        let mut refused = None;
        for _ in slots {
            if let Reply::Error(text) = self.connection.receive().await? {
                refused.get_or_insert(text);
            }
        }
        refused.map_or(Ok(()), |text| Err(self.refused("EXISTS", &text)))
    }

    async fn select(&mut self, db: u64) -> Result<(), AskError> {
        if self.db != db {
            self.connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
            self.db = db;
        }
        Ok(())
    }

    async fn transaction(
        &mut self,
        command: &'static str,
        history: &str,
        commands: &[Vec<&[u8]>],
    ) -> Result<At<Vec<Reply>>, AskError> {
        self.connection.queue(&[b"MULTI"]);
        commands.iter().for_each(|words| self.connection.queue(words));
        self.connection.queue(&[b"INFO".as_slice(), b"replication"]);
        self.connection.queue(&[b"EXEC"]);
        self.connection.send_queued().await?;
        let mut refused = None;
        for _ in 0..commands.len() + 2 {
            if let Reply::Error(text) = self.connection.receive().await? {
                refused.get_or_insert(text);
            }
        }
        let reply = self.connection.receive().await?;
        if let Some(text) = refused {
            return Err(self.refused(command, &text));
        }
        let mut replies = match reply {
            Reply::Array(Some(replies)) => replies,
            Reply::Error(text) => return Err(self.refused(command, &text)),
            _ => return Err(self.connection.unexpected(b"EXEC").into()),
        };
        if let Some(Reply::Error(text)) = replies.iter().find(|reply| matches!(reply, Reply::Error(_))) {
            return Err(self.refused(command, text));
        }
        let info = replies
            .pop()
            .and_then(|info| info.bytes().map(|text| String::from_utf8_lossy(text).into_owned()));
        let offset = self.offset_in(&info.unwrap_or_default(), history)?;
        Ok(At { offset, what: replies })
    }

    fn offset_in(&self, text: &str, history: &str) -> Result<i64, AskError> {
        let info = ServerInfo::parse(text);
        // Before 4.0 a server's run is its history.
        let id = if info.replication_id.is_empty() { &self.run_id } else { &info.replication_id };
        if id != history {
            return Err(AskError::OtherHistory { address: self.address().clone() });
        }
        Ok(info.offset)
    }

    fn refused(&self, command: &'static str, text: &[u8]) -> AskError {
        let text = String::from_utf8_lossy(text.get(..text.len().min(200)).unwrap_or_default()).into_owned();
        AskError::Refused { address: self.address().clone(), command, text }
    }
}
