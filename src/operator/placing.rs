//! Which replica works on which shard of a migration that this replica coordinates: shares them out, follows the
//! workers elsewhere, and gives a shard to another replica when its own is gone.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use kube::ResourceExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::balance::{Placed, balance};
use super::context::Context;
use super::following::{Followed, follow};
use super::seats::{Key, Seat};
use crate::api::{Plan, RedisMigration};
use crate::migration::Placement;
use crate::migration::shard::{Orders, Start, unattended};
use crate::worker::{self, Failed, ShardPhase, ShardProgress, Stopped, WorkerError, WorkerSetup};

/// How often it is looked whether a shard's replica is still there.
const LOOK: Duration = Duration::from_secs(1);
/// Shards move to a replica that came, or whose number of shards fell, not before all have been there so long.
const CALM: Duration = Duration::from_secs(10);
/// A replica that could not begin with a shard is not asked again so soon.
const DECLINED: Duration = Duration::from_secs(300);

/// One run's.
pub struct Placing {
    pub context: Arc<Context>,
    pub object: RedisMigration,
    /// Names this run in the orders that it gives.
    pub token: String,
    pub plans: watch::Receiver<Arc<Plan>>,
    /// The owner of each shard, by lineage.
    pub owners: watch::Sender<BTreeMap<String, String>>,
    shards: Mutex<HashMap<String, Standing>>,
    may_leave: AtomicBool,
    usher: Mutex<Option<JoinHandle<()>>>,
}

/// What sharing out needs to know of a shard.
#[derive(Default)]
struct Standing {
    at: Option<String>,
    progress: Option<Arc<ShardProgress>>,
    declined: Option<Instant>,
}

impl fmt::Debug for Placing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placing").field("token", &self.token).finish_non_exhaustive()
    }
}

impl Drop for Placing {
    fn drop(&mut self) {
        if let Some(usher) = self.usher.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            usher.abort();
        }
    }
}

/// The coordinator's handle.
#[derive(Debug)]
pub struct Shared(pub Arc<Placing>);

impl Placement for Shared {
    fn begin(&self, shards: &[WorkerSetup]) {
        self.0.begin(shards);
    }

    fn run(
        &self,
        setup: WorkerSetup,
        progress: Arc<ShardProgress>,
        drain: watch::Receiver<bool>,
    ) -> BoxFuture<'static, Result<Stopped, Failed>> {
        let placing = Arc::clone(&self.0);
        async move { placing.place(setup, progress, drain).await }.boxed()
    }

    fn may_leave(&self) {
        self.0.may_leave.store(true, Ordering::SeqCst);
    }
}

impl Placing {
    pub fn new(context: Arc<Context>, object: RedisMigration, plans: watch::Receiver<Arc<Plan>>) -> Self {
        let began = k8s_openapi::jiff::Timestamp::now().as_microsecond();
        Self {
            token: format!("{}/{began}", context.members.identity),
            context,
            object,
            plans,
            owners: watch::Sender::default(),
            shards: Mutex::default(),
            may_leave: AtomicBool::new(false),
            usher: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Standing>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> &str {
        &self.context.members.identity
    }

    pub fn key(&self, lineage: &str) -> Key {
        Key { uid: self.object.uid().unwrap_or_default(), lineage: lineage.to_owned() }
    }

    /// True when another coordinator is to follow, which takes over the workers elsewhere as they are.
    pub fn leaves(&self) -> bool {
        self.may_leave.load(Ordering::SeqCst) && self.context.is_leaving()
    }

    fn begin(self: &Arc<Self>, setups: &[WorkerSetup]) {
        // A repair, and turns of full syncs, are things of one process.
        let alone = |plan: &Plan| plan.verification.repair || plan.limits.parallel_shards > 0;
        if alone(&self.plans.borrow()) {
            return;
        }
        // One shard stays with its coordinator; a second writer must be shut out by the target.
        if setups.len() < 2
            || !can_be_shared(&self.plans.borrow(), setups.len())
            || setups.iter().any(|setup| !setup.exactly_once || setup.slots.is_none())
        {
            return;
        }
        {
            let mut shards = self.lock();
            for setup in setups {
                let seat = self.context.seats.now(&self.key(&setup.lineage));
                let at = seat.filter(|seat| self.can_be_followed(seat)).map(|seat| seat.holder);
                shards.insert(setup.lineage.clone(), Standing { at, ..Standing::default() });
            }
        }
        let mut living = self.context.members.living();
        self.share_out(&living, false);
        let placing = Arc::downgrade(self);
        let mut since = Instant::now();
        let usher = async move {
            let mut tick = tokio::time::interval(LOOK);
            loop {
                tick.tick().await;
                let Some(placing) = placing.upgrade() else { return };
                let now = placing.context.members.living();
                if now != living {
                    tracing::info!(replicas = ?now, "the replicas that share the work are others now");
                    (living, since) = (now, Instant::now());
                }
                let calm = since.elapsed() > CALM && placing.context.members.are_heard(&living);
                placing.share_out(&living, calm);
            }
        };
        let usher = tokio::spawn(usher.in_current_span());
        *self.usher.lock().unwrap_or_else(PoisonError::into_inner) = Some(usher);
    }

    /// A worker that another coordinator left at its work.
    fn can_be_followed(&self, seat: &Seat) -> bool {
        seat.is_worked_on() && !self.context.members.is_gone(&seat.holder)
    }

    fn share_out(&self, living: &[String], calm: bool) {
        let shards = self.lock();
        let own = [self.own().to_owned()];
        // Once all have their snapshot, as none is broken off for limits.
        let synced = |standing: &Standing| standing.progress.as_deref().is_some_and(is_synced);
        let bound = !can_be_shared(&self.plans.borrow(), shards.len());
        let living = if bound && shards.values().all(synced) { own.as_slice() } else { living };
        if shards.is_empty() || self.context.is_leaving() {
            return;
        }
        let placed = shards.iter().map(|(lineage, standing)| Placed {
            shard: lineage.clone(),
            at: standing.at.clone(),
            movable: standing
                .progress
                .as_ref()
                .is_some_and(|progress| is_synced(progress) && !*progress.release.borrow()),
            stays: standing.declined.is_some_and(|declined| declined.elapsed() < DECLINED),
        });
        let mut placed: Vec<Placed> = placed.collect();
        placed.sort_by(|one, other| one.shard.cmp(&other.shard));
        let owners = balance(&placed, living, self.own(), calm);
        drop(shards);
        self.owners.send_if_modified(|before| {
            let news = *before != owners;
            *before = owners;
            news
        });
    }

    /// Says where a shard is, for the next sharing out.
    fn is_at(&self, lineage: &str, at: Option<&str>) {
        if let Some(standing) = self.lock().get_mut(lineage) {
            standing.at = at.map(str::to_owned);
        }
        self.share_out(&self.context.members.living(), false);
    }

    fn declined(&self, lineage: &str) {
        if let Some(standing) = self.lock().get_mut(lineage) {
            (standing.declined, standing.at) = (Some(Instant::now()), None);
        }
        self.share_out(&self.context.members.living(), false);
    }

    pub fn owner(&self, lineage: &str) -> String {
        self.owners.borrow().get(lineage).cloned().unwrap_or_else(|| self.own().to_owned())
    }

    /// Other replicas may be given a part of the shards.
    fn shares(&self) -> bool {
        !self.lock().is_empty()
    }

    async fn place(
        self: Arc<Self>,
        mut setup: WorkerSetup,
        progress: Arc<ShardProgress>,
        drain: watch::Receiver<bool>,
    ) -> Result<Stopped, Failed> {
        if !self.shares() {
            return worker::run(setup, progress, drain).await;
        }
        let lineage = setup.lineage.clone();
        if let Some(standing) = self.lock().get_mut(&lineage) {
            standing.progress = Some(Arc::clone(&progress));
        }
        let mut found = self.context.seats.now(&self.key(&lineage)).filter(|seat| self.can_be_followed(seat));
        loop {
            // Frozen for a while, this process may not have been told of its end yet.
            if self.context.is_elsewhere(&self.object) {
                let message = "another replica coordinates this migration now".to_owned();
                return Err(Failed { error: WorkerError::Fenced(message), left: Stopped::default() });
            }
            let owner = self.owner(&lineage);
            let stopped = match found.take() {
                Some(seat) => {
                    self.sits(&progress, &seat.holder);
                    follow(&self, &setup, &progress, drain.clone(), seat).await
                }
                None if owner == self.own() || *drain.borrow() => {
                    self.here(&setup, &progress, drain.clone()).await
                }
                None => match self.send(&setup, &progress, &owner).await {
                    Some(seat) => {
                        self.sits(&progress, &seat.holder);
                        follow(&self, &setup, &progress, drain.clone(), seat).await
                    }
                    // It cannot be given away now: it is worked on here.
                    None => {
                        self.declined(&lineage);
                        self.here(&setup, &progress, drain.clone()).await
                    }
                },
            };
            let stood = progress.numbers.borrow().phase == ShardPhase::IncrementalSync;
            match stopped {
                Followed::Over(result) => return result,
                Followed::Left => return Ok(Stopped::default()),
                Followed::Declined(why) => {
                    tracing::warn!(shard = %setup.shard, why, "a replica could not begin with a shard: it is worked on here");
                    self.declined(&lineage);
                }
                Followed::Moves(stopped) => {
                    unattended(&progress, "given to another replica");
                    self.is_at(&lineage, None);
                    setup.resume = stopped.checkpoint;
                }
                Followed::Lost(from) => {
                    tracing::warn!(shard = %setup.shard, replica = from, "the replica that worked on a shard is gone");
                    unattended(&progress, "its replica is gone, another one takes over");
                    self.is_at(&lineage, None);
                    setup.resume = None;
                }
            }
            // The target tells where to go on, and a full sync is not the first if there was one.
            setup.anew = false;
            setup.restarted |= stood;
        }
    }

    /// The worker runs in that replica from now on.
    fn sits(&self, progress: &ShardProgress, holder: &str) {
        progress.epoch.forget();
        progress.seat.send_modify(|seat| {
            holder.clone_into(&mut seat.worker);
            seat.moves += 1;
            seat.silent = false;
        });
    }

    /// Works on the shard here until it is to go elsewhere.
    async fn here(
        self: &Arc<Self>,
        setup: &WorkerSetup,
        progress: &Arc<ShardProgress>,
        mut drain: watch::Receiver<bool>,
    ) -> Followed {
        let lineage = &setup.lineage;
        progress.seat.send_modify(|seat| {
            *seat = worker::progress::Seat { moves: seat.moves + 1, ..Default::default() }
        });
        self.is_at(lineage, Some(self.own()));
        let telling = self.tell_own(lineage.clone());
        let (stop, stopping) = watch::channel(false);
        let mut owners = self.owners.subscribe();
        let elsewhere =
            |owners: &BTreeMap<String, String>| owners.get(lineage).is_some_and(|owner| owner != self.own());
        let work = worker::run(setup.clone(), Arc::clone(progress), stopping);
        let mut work = std::pin::pin!(work);
        let moves = tokio::select! {
            result = &mut work => {
                telling.abort();
                return Followed::Over(result);
            }
            // An error means that nobody can ask any more, which the worker finds out.
            _ = drain.wait_for(|drain| *drain) => false,
            Ok(_) = owners.wait_for(elsewhere) => true,
        };
        telling.abort();
        stop.send_replace(true);
        match work.await {
            Ok(stopped) if moves && !*drain.borrow() => Followed::Moves(stopped),
            result => Followed::Over(result),
        }
    }

    /// The Lease of a shard that its coordinator works on is for people to see; nothing depends on it.
    fn tell_own(self: &Arc<Self>, lineage: String) -> JoinHandle<()> {
        let placing = Arc::clone(self);
        let tell = async move {
            let key = placing.key(&lineage);
            let told = placing
                .context
                .seats
                .now(&key)
                .is_some_and(|seat| seat.holder == placing.own() && seat.orders.is_none());
            if told || placing.context.members.living().len() < 2 {
                return;
            }
            let (object, own) = (&placing.object, placing.own());
            if let Err(error) = placing.context.seats.give(object, &key, own, &placing.token, None).await {
                tracing::debug!(%error, "the Lease of a shard does not name its worker");
            }
        };
        tokio::spawn(tell.in_current_span())
    }

    /// Gives the shard to another replica. `None`: that is not possible now.
    async fn send(&self, setup: &WorkerSetup, progress: &ShardProgress, owner: &str) -> Option<Seat> {
        let key = self.key(&setup.lineage);
        let plan = Arc::clone(&self.plans.borrow());
        let (start, generation) = (Start::of(&plan, setup, progress)?, plan.generation);
        let orders = Orders::of(start, generation, false, progress);
        tracing::info!(shard = %setup.shard, replica = owner, "giving a shard to another replica");
        let given =
            self.context.seats.give(&self.object, &key, owner, &self.token, Some(orders.clone())).await;
        match given {
            Ok(epoch) => {
                self.is_at(&setup.lineage, Some(owner));
                let (holder, coordinator) = (owner.to_owned(), self.token.clone());
                Some(Seat { holder, epoch, coordinator, orders: Some(orders), report: None })
            }
            Err(error) => {
                tracing::warn!(shard = %setup.shard, %error, "a shard cannot be given to another replica");
                None
            }
        }
    }
}

/// Limits of the whole migration are kept by one process, for the shards that it has.
fn can_be_shared(plan: &Plan, shards: usize) -> bool {
    let limits = plan.limits;
    let in_turn = (1..shards).contains(&limits.parallel_shards);
    limits.bytes_per_second == 0 && limits.keys_per_second == 0 && !in_turn
}

fn is_synced(progress: &ShardProgress) -> bool {
    progress.numbers.borrow().phase == ShardPhase::IncrementalSync
}
