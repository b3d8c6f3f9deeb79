//! Whether a source can make its writers wait, which a cutover may be long waited for to find out.

use crate::connection::{Address, ConnectionError, Dialer};
use crate::topology::Topology;

/// One line for each server that cannot, as far as it tells; none is an answer that was not given.
pub(super) async fn cannot_pause(dialer: &Dialer, topology: &Topology) -> Vec<String> {
    if !topology.server.has_redis(6, 2) {
        return vec![
            "source: it cannot pause writes (Redis 6.2 and newer do): before the cutover stop the writers yourself, then say so by spec.cutover.pauseSourceWrites: false".to_owned(),
        ];
    }
    let masters = topology.shards.iter().map(|shard| &shard.master.address);
    let asked = masters.map(async |address| {
        let forbidden = is_forbidden(dialer, address).await.unwrap_or_default();
        forbidden.then(|| {
            format!(
                "source: {address}: the user may not run CLIENT PAUSE, which the cutover needs: allow +client|pause and +client|unpause, or stop the writers yourself and say so by spec.cutover.pauseSourceWrites: false"
            )
        })
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

/// By ACL DRYRUN (7.0 and newer), which runs nothing.
async fn is_forbidden(dialer: &Dialer, address: &Address) -> Result<bool, ConnectionError> {
    let mut connection = dialer.connect(address).await?;
    let user = connection.query_text(&[b"ACL", b"WHOAMI"]).await?;
    let words: [&[u8]; 7] = [b"ACL", b"DRYRUN", user.as_bytes(), b"CLIENT", b"PAUSE", b"0", b"WRITE"];
    let answer = connection.query_text(&words).await?;
    Ok(answer.contains("permissions to run the"))
}
