//! Removing what an earlier attempt at the same full sync left: keys that the source has deleted since
//! would stay, and grow again out of what they were.

use super::keys::PREFIX;
use super::recovery::databases;
use crate::connection::{Connection, ConnectionError};
use crate::resp::{Reply, ReplyVerdict};
use crate::slot::{SlotRanges, slot};
use crate::version::ServerVersion;

/// Keys asked for at a time.
const PAGE: &[u8] = b"1000";

/// Removes the keys of a node that lie in `slots` (of the source; `None`: all), but not those that we keep
/// there for ourselves. Gives their number.
pub async fn wipe(
    connection: &mut Connection,
    slots: Option<&SlotRanges>,
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
            let ours =
                |key: &&[u8]| !key.starts_with(PREFIX) && slots.is_none_or(|slots| slots.contains(slot(key)));
            let keys: Vec<&[u8]> = keys.into_iter().filter(ours).collect();
            // One by one, as they are of any slot.
            for key in &keys {
                connection.queue(&[unlink, key]);
            }
            connection.send_queued().await?;
            for _ in &keys {
                match connection.receive().await? {
                    Reply::Error(text) if !matches!(ReplyVerdict::of(&text), ReplyVerdict::Moved { .. }) => {
                        return Err(ConnectionError::from_reply(connection.address(), unlink, &text));
                    }
                    // A key that moved away is met where it is now.
                    _ => removed += 1,
                }
            }
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

pub(super) fn page(reply: &Reply) -> Option<(&[u8], Vec<&[u8]>)> {
    let Reply::Array(Some(parts)) = reply else { return None };
    let [cursor, Reply::Array(Some(keys))] = parts.as_slice() else { return None };
    Some((cursor.bytes()?, keys.iter().filter_map(|key| key.bytes().map(AsRef::as_ref)).collect()))
}
