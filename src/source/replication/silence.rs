//! How long a source may be silent before its link counts as half-open.

use std::time::Duration;

use crate::connection::{Connection, ConnectionError};
use crate::resp::Reply;

/// `repl-timeout` and `repl-ping-replica-period` as servers have them by default, in seconds.
const REPL_TIMEOUT: u64 = 60;
const PING_PERIOD: u64 = 10;
/// On top of three periods between two PINGs.
const MARGIN: u64 = 2;
/// A setting beyond this is taken for it: the link would never count as lost.
const LONGEST: u64 = 24 * 3600;

/// As the source's own replicas judge it; by the defaults where CONFIG is forbidden.
pub async fn limit(connection: &mut Connection) -> Result<Duration, ConnectionError> {
    // A refusal has no items.
    let reply = connection.call(&[b"CONFIG", b"GET", b"repl-*"]).await?;
    let setting = |names: &[&str]| {
        let mut pairs = reply.items().chunks_exact(2);
        let pair = pairs
            .find(|pair| pair.first().and_then(Reply::text).is_some_and(|name| names.contains(&name)))?;
        pair.get(1)?.text()?.parse().ok()
    };
    // The second name is that of 5.0 and newer.
    let ping = setting(&["repl-ping-slave-period", "repl-ping-replica-period"]);
    Ok(limit_of(setting(&["repl-timeout"]), ping))
}

/// Any byte counts, so that a slow link is not taken for a dead one; three PINGs must have failed to come.
fn limit_of(timeout: Option<u64>, ping: Option<u64>) -> Duration {
    let pings = ping.unwrap_or(PING_PERIOD).saturating_mul(3).saturating_add(MARGIN);
    Duration::from_secs(timeout.unwrap_or(REPL_TIMEOUT).max(pings).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_that_is_allowed() {
        let seconds = |timeout, ping| limit_of(timeout, ping).as_secs();
        assert_eq!(seconds(None, None), 60);
        assert_eq!(seconds(Some(60), Some(10)), 60);
        assert_eq!(seconds(Some(5), Some(1)), 5);
        assert_eq!(seconds(Some(5), None), 32);
        assert_eq!(seconds(Some(60), Some(60)), 182);
        assert_eq!(seconds(Some(u64::MAX), Some(u64::MAX)), LONGEST);
    }
}
