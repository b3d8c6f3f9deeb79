//! Removing what an earlier attempt at the same full sync left: keys that the source has deleted since
//! would stay, and grow again out of what they were.

use super::keys::PREFIX;
use super::recovery::databases;
use crate::connection::{Connection, ConnectionError};
use crate::resp::{Next, Reply, ReplyVerdict};
use crate::slot::{SlotRanges, slot};
use crate::version::ServerVersion;

/// Keys asked for at a time.
pub(super) const PAGE: &[u8] = b"1000";

/// Removes the keys of a node that lie in `slots` (of the source; `None`: all) and that `claims` says are the
/// migration's, by database and name, but not those that we keep there for ourselves. Gives their number.
pub async fn wipe(
    connection: &mut Connection,
    slots: Option<&SlotRanges>,
    claims: impl Fn(u64, &[u8]) -> bool,
    version: ServerVersion,
) -> Result<u64, ConnectionError> {
    let unlink: &[u8] = if version.has_redis(4, 0) { b"UNLINK" } else { b"DEL" };
    let mut removed = 0;
    for db in databases(connection).await? {
        // A cluster refuses SELECT, even of 0, in old versions.
        if db > 0 {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
        }
        let mut cursor = b"0".to_vec();
        loop {
            let reply = connection.query(&[b"SCAN", &cursor, b"COUNT", PAGE]).await?;
            let Some((next, keys)) = page(&reply) else { return Err(connection.unexpected(b"SCAN")) };
            let ours = |key: &&[u8]| {
                !key.starts_with(PREFIX)
                    && slots.is_none_or(|slots| slots.contains(slot(key)))
                    && claims(db, key)
            };
            let keys: Vec<&[u8]> = keys.into_iter().filter(ours).collect();
            // Of a slot that is just arriving, only those who ask like that may remove what it has brought.
            let arrived = remove(connection, unlink, false, &keys).await?;
            remove(connection, unlink, true, &arrived).await?;
            // Those that are elsewhere by now, too: they are met there, so that this was not the last look.
            removed += keys.len() as u64;
            if next == b"0" {
                break;
            }
            cursor = next.to_vec();
        }
    }
    if slots.is_none() && version.has_redis(7, 0) {
        connection.query(&[b"FUNCTION", b"FLUSH"]).await?;
    }
    Ok(removed)
}

/// Removes keys: those that the node says are another's.
async fn remove<'a>(
    connection: &mut Connection,
    unlink: &[u8],
    asking: bool,
    keys: &[&'a [u8]],
) -> Result<Vec<&'a [u8]>, ConnectionError> {
    // One by one, as they are of any slot.
    for key in keys {
        if asking {
            connection.queue(&[b"ASKING"]);
        }
        connection.queue(&[unlink, key]);
    }
    connection.send_queued().await?;
    let mut elsewhere = Vec::new();
    for key in keys {
        if asking && let Reply::Error(text) = connection.receive().await? {
            return Err(ConnectionError::from_reply(connection.address(), b"ASKING", &text));
        }
        if let Reply::Error(text) = connection.receive().await? {
            if ReplyVerdict::of(&text).next() != Next::Reroute {
                return Err(ConnectionError::from_reply(connection.address(), unlink, &text));
            }
            elsewhere.push(*key);
        }
    }
    Ok(elsewhere)
}

pub(super) fn page(reply: &Reply) -> Option<(&[u8], Vec<&[u8]>)> {
    let Reply::Array(Some(parts)) = reply else { return None };
    let [cursor, Reply::Array(Some(keys))] = parts.as_slice() else { return None };
    Some((cursor.bytes()?, keys.iter().filter_map(|key| key.bytes().map(AsRef::as_ref)).collect()))
}
