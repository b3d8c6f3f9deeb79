//! The switch to the target: writes to the source pause, the target catches up, replication ends.

use std::time::{Duration, Instant};

use super::state::Shard;
use super::verification::settle;
use crate::api::plan::CutoverPlan;
use crate::connection::ConnectionError;
use crate::resp::Reply;

/// How a cutover's pause ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Paused {
    /// The target has everything, and the source takes no writes until its pause lapses.
    Drained { millis: u64 },
    /// Not within the pause; writes go on.
    TimedOut,
}

/// Pauses writes on every source, waits until the target has everything. A source that cannot pause
/// writes (before Redis 6.2, or where CLIENT is forbidden) is told of in `cannot`.
pub async fn drain(
    shards: &[Shard],
    plan: &CutoverPlan,
    cannot: &mut Vec<String>,
) -> Result<Paused, ConnectionError> {
    let limit = Duration::from_secs(plan.pause_timeout_seconds);
    let began = Instant::now();
    let mut paused = Vec::new();
    if plan.pause_source_writes {
        for shard in shards {
            let mut connection = shard.dialer.connect(&shard.source).await?;
            let millis = limit.as_millis().to_string();
            match connection.call(&[b"CLIENT", b"PAUSE", millis.as_bytes(), b"WRITE"]).await? {
                Reply::Error(text) => {
                    let text = String::from_utf8_lossy(&text);
                    cannot.push(format!("{} cannot pause writes: {text}", shard.source));
                }
                _ => paused.push(connection),
            }
        }
    }
    let margin = limit.saturating_sub(began.elapsed());
    if tokio::time::timeout(margin, settle(shards)).await.is_ok() {
        let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        return Ok(Paused::Drained { millis });
    }
    for connection in &mut paused {
        connection.call(&[b"CLIENT", b"UNPAUSE"]).await?;
    }
    Ok(Paused::TimedOut)
}
