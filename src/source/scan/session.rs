//! The connections to one server, and what it is.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use super::abilities::Abilities;
use super::changed::Changed;
use super::events::{self, Events};
use super::usage::UsageQuestion;
use super::{Scan, ScanError, Work};
use crate::api::plan::KeyspaceNotifications;
use crate::connection::{Address, Connection, Dialer};
use crate::rdb::checksum::crc64;
use crate::resp::Reply;
use crate::source::replication::check_shard;
use crate::source::watch::SourceShard;
use crate::topology::{ServerInfo, ServerRole, read_info, server_info};
use crate::verify::frame::Frame;
use crate::verify::wire::Wire;
use crate::version::ServerVersion;

/// How often a replica is asked how far it is.
const ASKING: Duration = Duration::from_millis(20);
/// Commands that change keys, of which no notification tells: all keys at once, the groups of streams, the count that
/// a HyperLogLog remembers. And the one that may have switched notifications off and on again (told apart from CONFIG
/// GET from Redis 7.0 on).
const UNHEARD: [&str; 10] = [
    "cmdstat_flushall:",
    "cmdstat_flushdb:",
    "cmdstat_swapdb:",
    "cmdstat_xreadgroup:",
    "cmdstat_xack:",
    "cmdstat_xclaim:",
    "cmdstat_xautoclaim:",
    "cmdstat_xackdel:",
    "cmdstat_pfcount:",
    "cmdstat_config|set:",
];

pub(super) struct Session {
    /// Keys and values.
    pub wire: Wire,
    /// Everything else.
    pub control: Connection,
    pub address: Address,
    pub abilities: Abilities,
    pub events: Option<Events>,
    /// `None`: how keys were used is not asked for.
    pub usage: Option<UsageQuestion>,
    /// Of the process; empty: the server does not tell.
    pub run_id: String,
    pub version: ServerVersion,
    /// That `wire` is in.
    pub db: u32,
    /// The notifications cannot be asked for: they are taken to be on.
    trusted: bool,
    replica: bool,
    dialer: Dialer,
}

impl Session {
    pub async fn open(scan: &Scan, changed: &Arc<Changed>) -> Result<Self, ScanError> {
        let (dialer, address) = (&scan.dialer, &scan.address);
        let mut control = dialer.connect(address).await?;
        check_shard(&mut control, address, scan.shard.as_ref()).await.map_err(ScanError::Elsewhere)?;
        let info = read_info(&mut control).await?;
        let replica = info.role == ServerRole::Replica;
        if replica && !info.is_current_replica() {
            return Err(ScanError::Unlinked { address: address.clone() });
        }
        let Some(version) = info.version else {
            return Err(ScanError::Unexpected { address: address.clone(), command: "INFO" });
        };
        let abilities = Abilities::of(&mut control, &info).await?;
        let usage = match scan.rules.eviction_data {
            true => UsageQuestion::of(&mut control, &info).await?,
            false => None,
        };
        let (stream, received, address) = dialer.connect(address).await?.into_parts();
        let mut wire = Wire::new(stream, received, address.clone());
        if version.has_redis(7, 2) {
            // Reading must not make cold keys look hot to eviction; forbidden is fine.
            wire.call(&[b"CLIENT".as_slice(), b"NO-TOUCH", b"ON"]).await?;
        }
        if scan.rules.cluster {
            wire.call(&[b"READONLY"]).await?;
        }
        let run_id = info.run_id;
        let dialer = dialer.clone();
        let mut session = Self {
            wire,
            control,
            address,
            abilities,
            events: None,
            usage,
            run_id,
            version,
            db: 0,
            trusted: false,
            replica,
            dialer,
        };
        session.listen(scan, changed).await?;
        Ok(session)
    }

    /// Subscribes where the server tells of every change, or may be made to.
    async fn listen(&mut self, scan: &Scan, changed: &Arc<Changed>) -> Result<(), ScanError> {
        if scan.rules.notifications == KeyspaceNotifications::Ignore {
            return Ok(());
        }
        let flags = match events::setting(&mut self.control).await? {
            Some(flags) if events::is_complete(&flags) => Some(flags),
            Some(flags) if scan.rules.notifications == KeyspaceNotifications::Enable => {
                events::set(&mut self.control, &flags, &scan.undo).await?
            }
            Some(_) => None,
            None if scan.rules.notifications == KeyspaceNotifications::Enable => {
                tracing::warn!(server = %scan.address, "whether keyspace notifications are on cannot be asked; they are taken to be, all of them, by event");
                self.trusted = true;
                Some("AE".to_owned())
            }
            None => None,
        };
        let Some(flags) = flags else {
            tracing::info!(server = %scan.address, "changes are found by reading all keys again and again");
            return Ok(());
        };
        match Events::subscribe(&scan.dialer, &scan.address, &flags, Arc::clone(changed)).await {
            Ok(events) => self.events = Some(events),
            Err(ScanError::Deaf { why, .. }) => {
                tracing::warn!(server = %scan.address, why, "no keyspace notifications: changes are found by reading all keys again and again");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// True when no change can have gone by without a notification since this was asked last.
    pub async fn tells_all(&mut self, work: &mut Work) -> Result<bool, ScanError> {
        let still = match events::setting(&mut self.control).await? {
            Some(flags) => events::is_complete(&flags),
            None => self.trusted,
        };
        let calls = self.unheard_calls().await?;
        let before = std::mem::replace(&mut work.unheard, calls);
        if !still {
            let why = "notify-keyspace-events was changed".to_owned();
            return Err(ScanError::Deaf { address: self.control.address().clone(), why });
        }
        // Where they cannot be counted, only another pass can tell.
        Ok(calls.is_some() && calls == before)
    }

    /// How often commands were called of which no notification tells; `None`: the server does not say.
    pub async fn unheard_calls(&mut self) -> Result<Option<u64>, ScanError> {
        let reply = self.control.call(&[b"INFO", b"commandstats"]).await?;
        let Some(text) = reply.text() else { return Ok(None) };
        let calls = text.lines().filter_map(|line| {
            let rest = UNHEARD.iter().find_map(|name| line.strip_prefix(name))?;
            rest.strip_prefix("calls=")?.split(',').next()?.parse::<u64>().ok()
        });
        Ok(Some(calls.sum()))
    }

    /// Databases that hold keys, and how many; and the first one, as far as is known without any.
    pub async fn databases(&mut self) -> Result<Vec<(u32, u64)>, ScanError> {
        let info: ServerInfo = read_info(&mut self.control).await?;
        let number = |(db, keys): &(u64, u64)| Some((u32::try_from(*db).ok()?, *keys));
        let mut databases: Vec<(u32, u64)> = info.keyspace.iter().filter_map(number).collect();
        // Servers that only look like Redis may not count their keys (Kvrocks): SCAN tells whether there are any.
        if databases.iter().all(|(db, _)| *db != 0) {
            databases.insert(0, (0, 0));
        }
        Ok(databases)
    }

    pub async fn select(&mut self, db: u32) -> Result<(), ScanError> {
        if self.db == db {
            return Ok(());
        }
        let number = db.to_string();
        let refused = match self.wire.call(&[b"SELECT", number.as_bytes()]).await? {
            Frame::Error(text) => Some(text.to_vec()),
            _ => None,
        };
        if let Some(text) = refused {
            return Err(ScanError::refused(self.wire.address(), "SELECT", &text));
        }
        self.db = db;
        Ok(())
    }

    /// A replica gets as far as its master is now.
    pub async fn wait_for_master(
        &mut self,
        shard: Option<&SourceShard>,
        address: &Address,
    ) -> Result<(), ScanError> {
        if !self.replica {
            return Ok(());
        }
        let info = read_info(&mut self.control).await?;
        let master = shard.and_then(SourceShard::now).map(|at| at.master).filter(|master| master != address);
        let told = || info.master.clone().map(|master| self.dialer.reachable(&master));
        let Some(master) = master.or_else(told) else { return Ok(()) };
        // A master that is not reachable from here cannot be asked: then the replica has to do.
        let Ok(master) = server_info(&self.dialer, &master).await else { return Ok(()) };
        while read_info(&mut self.control).await?.offset < master.offset {
            tokio::time::sleep(ASKING).await;
        }
        Ok(())
    }

    /// Ends when notifications are lost.
    pub async fn deaf(&mut self) -> ScanError {
        match &mut self.events {
            Some(events) => events.lost().await,
            None => pending().await,
        }
    }

    pub async fn stay_alive(&mut self) -> Result<(), ScanError> {
        self.wire.call(&[b"PING"]).await?;
        self.control.call(&[b"PING"]).await?;
        Ok(())
    }

    pub fn unexpected(&self, command: &'static str) -> ScanError {
        ScanError::Unexpected { address: self.wire.address().clone(), command }
    }
}

impl Work {
    /// Function libraries (7.0), which are no keys.
    pub(super) async fn read_functions(&mut self, session: &mut Session) -> Result<(), ScanError> {
        if !session.version.has_redis(7, 0) {
            return Ok(());
        }
        // Where it is forbidden there is nothing to tell.
        let reply = session.control.call(&[b"FUNCTION", b"LIST", b"WITHCODE"]).await?;
        let Reply::Array(Some(libraries)) = reply else { return Ok(()) };
        let mut gone = std::mem::take(&mut self.functions);
        for library in &libraries {
            let field = |name: &str| {
                let mut pairs = library.items().chunks_exact(2);
                pairs.find(|pair| pair.first().and_then(Reply::text) == Some(name))?.get(1)?.bytes()
            };
            let (Some(name), Some(code)) = (field("library_name"), field("library_code")) else { continue };
            let (name, digest) = (String::from_utf8_lossy(name).into_owned(), crc64(code));
            if gone.remove(&name) != Some(digest) {
                if self.emit.in_snapshot() {
                    self.emit.function(code);
                } else {
                    self.emit.command(0, &[b"FUNCTION".as_slice(), b"LOAD", b"REPLACE", code]);
                }
                self.changes += 1;
            }
            self.functions.insert(name, digest);
        }
        for name in gone.into_keys() {
            self.emit.command(0, &[b"FUNCTION".as_slice(), b"DELETE", name.as_bytes()]);
        }
        Ok(())
    }
}
