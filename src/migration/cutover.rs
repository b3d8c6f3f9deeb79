//! The switch to the target: writes to the source pause, the target catches up, replication ends.

use std::time::{Duration, Instant};

use super::state::Shard;
use super::verification::{caught_up, released, source_offset};
use crate::api::plan::CutoverPlan;
use crate::connection::{Address, Connection, ConnectionError};
use crate::resp::Reply;
use crate::topology::{ServerInfo, ServerRole, server_info};

/// Replicas of replicas of a master; more is hardly ever met.
const LONGEST_CHAIN: usize = 5;

/// How a cutover's pause ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Paused {
    /// The target has everything, and the source takes no writes until its pause lapses.
    Drained { millis: u64 },
    /// Not within the pause; writes go on.
    TimedOut,
    /// Another server took over meanwhile, which was not paused.
    FailedOver { shard: String, from: Address, to: Address },
}

/// Pauses writes on every source, waits until the target has everything. A source that cannot pause
/// writes (before Redis 6.2, or where CLIENT is forbidden) is told of in `cannot`.
pub async fn drain(
    shards: &[Shard],
    plan: &CutoverPlan,
    cannot: &mut Vec<String>,
) -> Result<Paused, ConnectionError> {
    let mut paused = Vec::new();
    let result = pause_and_wait(shards, plan, &mut paused, cannot).await;
    if !matches!(result, Ok(Paused::Drained { .. })) {
        for connection in &mut paused {
            if let Err(error) = connection.call(&[b"CLIENT", b"UNPAUSE"]).await {
                tracing::warn!(%error, "writes stay paused until the pause lapses");
            }
        }
    }
    result
}

async fn pause_and_wait(
    shards: &[Shard],
    plan: &CutoverPlan,
    paused: &mut Vec<Connection>,
    cannot: &mut Vec<String>,
) -> Result<Paused, ConnectionError> {
    let limit = Duration::from_secs(plan.pause_timeout_seconds);
    let began = Instant::now();
    look(shards).await;
    let masters: Vec<Address> = shards.iter().map(Shard::master).collect();
    let mut writers = Vec::with_capacity(shards.len());
    for shard in shards {
        let writer = writer(shard).await;
        if !plan.pause_source_writes {
            writers.push(writer.unwrap_or_else(|_| shard.master()));
            continue;
        }
        let writer = writer?;
        let mut connection = shard.dialer.connect(&writer).await?;
        let millis = limit.as_millis().to_string();
        match connection.call(&[b"CLIENT", b"PAUSE", millis.as_bytes(), b"WRITE"]).await? {
            Reply::Error(text) => {
                let text = String::from_utf8_lossy(&text);
                cannot.push(format!("{writer} cannot pause writes: {text}"));
            }
            _ => paused.push(connection),
        }
        writers.push(writer);
    }
    let drained = async {
        for (shard, writer) in shards.iter().zip(&writers) {
            caught_up(shard, source_offset(shard, Some(writer)).await).await;
            // They are held again where a connection was lost meanwhile.
            released(shard).await;
        }
    };
    if tokio::time::timeout(limit.saturating_sub(began.elapsed()), drained).await.is_err() {
        return Ok(Paused::TimedOut);
    }
    look(shards).await;
    for (shard, from) in shards.iter().zip(masters) {
        let to = shard.master();
        if to != from {
            return Ok(Paused::FailedOver { shard: shard.id.clone(), from, to });
        }
    }
    Ok(Paused::Drained { millis: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX) })
}

/// Looks where the shards are now; one watch knows them all.
async fn look(shards: &[Shard]) {
    if let Some(watch) = shards.iter().find_map(|shard| shard.watch.as_ref()) {
        watch.look().await;
    }
}

/// The server that takes the shard's writes: without a cluster or Sentinels, the one that is read from may
/// be its replica, or a replica of that. All have the same offsets.
async fn writer(shard: &Shard) -> Result<Address, ConnectionError> {
    let mut address = shard.master();
    for _ in 0..LONGEST_CHAIN {
        match server_info(&shard.dialer, &address).await {
            Ok(ServerInfo { role: ServerRole::Replica, master: Some(master), .. }) => {
                address = shard.dialer.reachable(&master.or_host_of(&address));
            }
            Ok(_) => break,
            Err(error) if error.server_text().is_some() && !error.is_transient() => break,
            Err(error) => return Err(error),
        }
    }
    Ok(address)
}
