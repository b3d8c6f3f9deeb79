//! Where each source shard is to be found now. One task asks the Sentinels, or the nodes of the cluster,
//! every [`PERIOD`] and whenever a link is lost; links and the coordinator look at what it found.
//!
//! Connections are kept open between looks, so that watching costs the source a few short commands.

mod ask;
pub mod cluster_view;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument;

use crate::connection::{Address, Dialer};
use crate::slot::SlotRanges;
use crate::topology::{Topology, pick_replica};
use ask::{Asker, Found};

/// How often the deployment is looked at while nothing else prompts it.
pub const PERIOD: Duration = Duration::from_secs(2);
/// Looks that links ask for are at least this far apart.
const SPACING: Duration = Duration::from_millis(100);
/// A node that does not take part in a look within this time is left out of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Requests for a look that may wait: more than there are shards that could ask at once. One that finds no
/// room waits for it.
const REQUESTS: usize = 256;

/// Where one shard is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// Takes the shard's writes; a reachable address. While nobody knows, the last one that did.
    pub master: Address,
    /// Those that are not known to be down.
    pub replicas: Vec<Address>,
    /// Ids of the cluster nodes that are of this shard; empty without a cluster.
    pub members: BTreeSet<String>,
    /// The cluster slots that it serves now, and those of them that it is handing over.
    pub serves: SlotRanges,
    pub leaving: SlotRanges,
    /// Slots of the whole cluster that none of the shards serves which the watch began with.
    pub strange: SlotRanges,
}

/// What the newest look found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub looks: u64,
    /// In the order of the topology that the watch began with.
    pub shards: Vec<Whereabouts>,
    /// Why the newest look found nothing; empty when it did.
    pub failure: String,
}

/// The watch, as one shard uses it. The task ends with the last of these.
#[derive(Clone)]
pub struct SourceShard {
    index: usize,
    shared: Arc<Shared>,
}

struct Shared {
    seen: watch::Receiver<Seen>,
    requests: mpsc::Sender<oneshot::Sender<()>>,
    /// The replication id that is being read, which tells a promoted server from one that began anew.
    history: Arc<Mutex<String>>,
}

/// Starts to watch; one handle for each shard of `topology`, in its order. `slots`: what each of them served
/// when the migration began; `replicas`: they are wanted too.
pub fn watch_source(
    dialer: &Dialer,
    topology: &Topology,
    slots: &[SlotRanges],
    replicas: bool,
) -> Vec<SourceShard> {
    let history = Arc::default();
    let dialer = dialer.with_connect_timeout(PATIENCE).with_response_timeout(PATIENCE);
    let asker = Asker::new(dialer, topology, slots, replicas, Arc::clone(&history));
    let (sender, seen) = watch::channel(Seen { shards: asker.shards(), ..Seen::default() });
    let (requests, asked) = mpsc::channel(REQUESTS);
    tokio::spawn(run(asker, sender, asked).in_current_span());
    let shared = Arc::new(Shared { seen, requests, history });
    (0..topology.shards.len()).map(|index| SourceShard { index, shared: Arc::clone(&shared) }).collect()
}

impl SourceShard {
    /// `None`: the watch does not know this shard.
    pub fn now(&self) -> Option<Whereabouts> {
        self.shared.seen.borrow().shards.get(self.index).cloned()
    }

    /// Told at every look.
    pub fn subscribe(&self) -> watch::Receiver<Seen> {
        let mut seen = self.shared.seen.clone();
        seen.mark_unchanged();
        seen
    }

    /// Looks anew and waits for what is found.
    pub async fn look(&self) {
        let (done, told) = oneshot::channel();
        if self.shared.requests.send(done).await.is_ok() {
            // An error means that the watch has ended, which it does with its last user.
            let _ = told.await;
        }
    }

    /// Where to read, after another look: a replica where one is preferred, fit and has everything up to
    /// `at_least`, else the master. `None`: nobody knows.
    pub async fn reader(
        &self,
        prefer_replica: bool,
        at_least: Option<i64>,
        dialer: &Dialer,
    ) -> Option<Address> {
        self.look().await;
        let at = self.now()?;
        if prefer_replica && let Some(replica) = pick_replica(at.replicas.iter(), at_least, dialer).await {
            return Some(replica);
        }
        Some(at.master)
    }

    /// Why the newest look found nothing; empty when it did.
    pub fn failure(&self) -> String {
        self.shared.seen.borrow().failure.clone()
    }

    /// Tells which history is being read.
    pub fn reads(&self, replication_id: &str) {
        let mut history = self.shared.history.lock().unwrap_or_else(PoisonError::into_inner);
        replication_id.clone_into(&mut history);
    }
}

async fn run(mut asker: Asker, seen: watch::Sender<Seen>, mut asked: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let mut waiting = Vec::new();
        tokio::select! {
            _ = tick.tick(), if asker.polls() => {}
            request = asked.recv() => match request {
                Some(request) => waiting.push(request),
                None => return,
            },
        }
        // Nobody who asks after this point is answered by this look.
        while let Ok(request) = asked.try_recv() {
            waiting.push(request);
        }
        let Found { shards, failure } = asker.look().await;
        if !failure.is_empty() {
            tracing::debug!(failure, "the source could not be looked at");
        }
        seen.send_modify(|seen| {
            for (index, (before, now)) in seen.shards.iter().zip(&shards).enumerate() {
                if before.master != now.master {
                    tracing::warn!(shard = index, from = %before.master, to = %now.master, "a source shard has another master");
                }
            }
            *seen = Seen { looks: seen.looks + 1, shards, failure };
        });
        let prompted = !waiting.is_empty();
        for request in waiting {
            // One who went away meanwhile does not care.
            let _ = request.send(());
        }
        if prompted {
            tokio::time::sleep(SPACING).await;
        }
    }
}
