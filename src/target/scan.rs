//! The keys of a single server that lie in some slots of the source.

use super::keys::PREFIX;
use super::wipe::{PAGE, page};
use crate::connection::{Address, ConnectionError, Dialer};
use crate::slot::{SlotRanges, slot};

/// Every key of `db` in `slots` that is there all the while, and none of our own.
pub async fn keys_in(
    dialer: &Dialer,
    address: &Address,
    db: u64,
    slots: &SlotRanges,
) -> Result<Vec<Vec<u8>>, ConnectionError> {
    let mut connection = dialer.connect(address).await?;
    if db > 0 {
        connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
    }
    let (mut found, mut cursor) = (Vec::new(), b"0".to_vec());
    loop {
        let reply = connection.query(&[b"SCAN", &cursor, b"COUNT", PAGE]).await?;
        let Some((next, keys)) = page(&reply) else { return Err(connection.unexpected(b"SCAN")) };
        let wanted = keys.into_iter().filter(|key| !key.starts_with(PREFIX) && slots.contains(slot(key)));
        found.extend(wanted.map(<[u8]>::to_vec));
        if next == b"0" {
            return Ok(found);
        }
        cursor = next.to_vec();
    }
}
