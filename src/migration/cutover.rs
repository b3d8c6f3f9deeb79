//! The switch to the target: writes to the source pause, the target catches up, replication ends.

mod fitting;

use std::time::{Duration, Instant};

use futures::future::join_all;

use super::state::Shard;
use super::verification::{caught_up, released, source_offset};
use crate::api::plan::CutoverPlan;
use crate::connection::{Address, ConnectionError, Dialer};
use crate::resp::{Next, Reply, ReplyVerdict};
use crate::topology::{ServerInfo, ServerRole, server_info};

pub use fitting::Measured;

/// For each server, as somebody waits for the end of the run.
const LIFT_MAX: Duration = Duration::from_secs(2);
/// Replicas of replicas of a master; more is hardly ever met.
const LONGEST_CHAIN: usize = 5;

/// How a cutover's pause ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Paused {
    /// The target has everything, and where writes were paused (for so long by now), what could be compared was.
    Drained { millis: u64 },
    /// Not within the pause; writes go on.
    TimedOut,
    /// The plan does not want it any more.
    Withdrawn,
    /// A server takes no CLIENT PAUSE just now.
    Busy { why: String },
    /// A server does not take CLIENT PAUSE for writes.
    Impossible { why: String },
    /// Another server took over meanwhile, which was not paused.
    FailedOver { shard: String, from: Address, to: Address },
}

/// Servers whose writers wait. A server does not let them go on when the connection that paused them is closed.
#[derive(Default)]
pub struct Pauses(Vec<Pause>);

struct Pause {
    dialer: Dialer,
    server: Address,
    /// It is over then by itself.
    until: Instant,
}

impl Pauses {
    /// Lets writers go on. A pause that has lapsed is left alone: what is paused now, somebody else paused.
    pub async fn lift(self) {
        let ours = self.0.into_iter().filter(|pause| Instant::now() < pause.until);
        join_all(ours.map(Pause::lift)).await;
    }
}

impl Pause {
    async fn lift(self) {
        let Self { dialer, server, .. } = self;
        // What was under way on the connection that paused may not have come to its end.
        let lifted = async { dialer.connect(&server).await?.call(&[b"CLIENT", b"UNPAUSE"]).await };
        let why = match tokio::time::timeout(LIFT_MAX, lifted).await {
            Ok(Ok(Reply::Error(text))) => String::from_utf8_lossy(&text).into_owned(),
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", LIFT_MAX.as_secs()),
        };
        tracing::warn!(%server, why, "writes stay paused until the pause lapses");
    }
}

/// Pauses writes on every source, waits until the target has everything, and then for `compare`, which is given the
/// time that it may take; only where no writer is left who could change anything meanwhile. Unless it is drained,
/// `pauses` are to be lifted, also when this was broken off.
pub async fn drain(
    shards: &[Shard],
    plan: &CutoverPlan,
    pauses: &mut Pauses,
    compare: impl AsyncFnOnce(Duration),
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
        // Before its answer, which may not be waited for.
        let until = Instant::now() + limit;
        pauses.0.push(Pause { dialer: shard.dialer.clone(), server: writer.clone(), until });
        let answer = connection.call(&[b"CLIENT", b"PAUSE", millis.as_bytes(), b"WRITE"]).await?;
        if let Reply::Error(text) = answer {
            pauses.0.pop();
            return Ok(refused(&writer, &text));
        }
        writers.push(writer);
    }
    let drained = async {
        join_all(shards.iter().zip(&writers).map(async |(shard, writer)| {
            caught_up(shard, source_offset(shard, Some(writer)).await).await;
            // They are held again where a connection was lost meanwhile.
            released(shard).await;
        }))
        .await;
        look(shards).await;
    };
    if tokio::time::timeout(limit.saturating_sub(began.elapsed()), drained).await.is_err() {
        return Ok(Paused::TimedOut);
    }
    if let Some(paused) = failed_over(shards, &masters) {
        return Ok(paused);
    }
    if plan.pause_source_writes {
        compare(fitting::budget(limit, began.elapsed())).await;
        if tokio::time::timeout(limit.saturating_sub(began.elapsed()), look(shards)).await.is_err() {
            return Ok(Paused::TimedOut);
        }
        if let Some(paused) = failed_over(shards, &masters) {
            return Ok(paused);
        }
    }
    let held = if plan.pause_source_writes { began.elapsed() } else { Duration::ZERO };
    Ok(Paused::Drained { millis: u64::try_from(held.as_millis()).unwrap_or(u64::MAX) })
}

/// Asks every source for a pause that is over at once: what one of them says that takes none. To be known before
/// anything is done that only a cutover needs. One that cannot be asked is left to the pause itself.
pub async fn refusal(shards: &[Shard]) -> Option<Paused> {
    for shard in shards {
        let asked = async {
            let writer = writer(shard).await?;
            let mut connection = shard.dialer.connect(&writer).await?;
            let answer = connection.call(&[b"CLIENT", b"PAUSE", b"0", b"WRITE"]).await?;
            Ok::<_, ConnectionError>((writer, answer))
        };
        match asked.await {
            Ok((writer, Reply::Error(text))) => return Some(refused(&writer, &text)),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, shard = shard.id, "not asked whether it pauses writes"),
        }
    }
    None
}

/// What a server answers that does not pause. Before Redis 6.2, or without the right to it, never will, and what goes
/// on to be written would be lost.
fn refused(writer: &Address, text: &[u8]) -> Paused {
    let busy = ReplyVerdict::of(text).next() == Next::RetryLater;
    let text = String::from_utf8_lossy(text);
    if busy {
        return Paused::Busy { why: format!("{writer} does not pause writes now ({text})") };
    }
    Paused::Impossible { why: format!("{writer} cannot pause writes ({text})") }
}

fn failed_over(shards: &[Shard], masters: &[Address]) -> Option<Paused> {
    shards.iter().zip(masters).find_map(|(shard, from)| {
        let (shard, from, to) = (shard.id.clone(), from.clone(), shard.master());
        (to != from).then_some(Paused::FailedOver { shard, from, to })
    })
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
