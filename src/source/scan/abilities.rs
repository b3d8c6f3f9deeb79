//! What the server lets us ask. Everything that is not needed has a way around it.

use super::ScanError;
use crate::connection::{Connection, ConnectionError};
use crate::resp::{Reply, ReplyVerdict};
use crate::topology::ServerInfo;

/// Not there; its slot may be another node's, which is an answer, too.
pub(super) const PROBE: &[u8] = b"redis-migration:probe";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    pub getrange: bool,
    /// Without it values are read element by element.
    pub dump: bool,
    pub memory_usage: bool,
    /// Tells expiries to the millisecond, whatever the clocks (7.0).
    pub pexpiretime: bool,
    /// The server's clock, to tell by PTTL when a key expires.
    pub time: bool,
    /// Hashes may have fields that expire.
    pub field_expiry: bool,
    /// XINFO STREAM tells counters of the stream (7.0).
    pub stream_counters: bool,
    /// XGROUP CREATECONSUMER (6.2).
    pub create_consumer: bool,
}

impl Abilities {
    pub async fn of(connection: &mut Connection, info: &ServerInfo) -> Result<Self, ScanError> {
        let has = |major, minor| info.version.is_some_and(|version| version.has_redis(major, minor));
        let newest = info.version.is_some_and(|version| version.has_field_expiry());
        Ok(Self {
            getrange: may(connection, &[b"GETRANGE", PROBE, b"0", b"0"]).await?,
            dump: may(connection, &[b"DUMP", PROBE]).await?,
            memory_usage: has(4, 0) && may(connection, &[b"MEMORY", b"USAGE", PROBE]).await?,
            pexpiretime: has(7, 0) && may(connection, &[b"PEXPIRETIME", PROBE]).await?,
            time: may(connection, &[b"TIME"]).await?,
            field_expiry: newest && may(connection, &[b"HPEXPIRETIME", PROBE, b"FIELDS", b"1", b"f"]).await?,
            stream_counters: has(7, 0),
            create_consumer: has(6, 2),
        })
    }
}

/// False where the command is unknown or forbidden as such; which keys may be read shows later.
pub(super) async fn may(connection: &mut Connection, args: &[&[u8]]) -> Result<bool, ScanError> {
    match connection.call(args).await? {
        Reply::Error(text) => match ReplyVerdict::of(&text) {
            ReplyVerdict::UnknownCommand => Ok(false),
            ReplyVerdict::Auth if memchr::memmem::find(&text, b"to run the").is_some() => Ok(false),
            ReplyVerdict::Auth if text.starts_with(b"NOPERM") => Ok(true),
            ReplyVerdict::Auth => {
                let command = args.first().copied().unwrap_or_default();
                Err(ConnectionError::from_reply(connection.address(), command, &text).into())
            }
            verdict if verdict.next() == crate::resp::Next::Quarantine => Ok(false),
            _ => Ok(true),
        },
        _ => Ok(true),
    }
}
