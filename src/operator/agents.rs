//! Shards that other replicas coordinate and that this one works on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::api::{ApiError, Target, find};
use super::context::Context;
use super::decide::Claim;
use super::seats::{Key, Seat};
use super::secrets::Secrets;
use super::writer::Writer;
use crate::api::Plan;
use crate::migration::shard::{Orders, Over, Post, Report, View};
use crate::migration::{SpoolLeft, spool_name};
use crate::worker::{Failed, Numbers, ShardPhase, ShardProgress, Stopped};

/// A replica that cannot begin within so long gives the shard back.
const BEGIN_MAX: Duration = Duration::from_secs(10);
const BEGIN_AGAIN: Duration = Duration::from_secs(1);
/// A drain is over within so long, or it is cut short: the target knows where to go on.
const DRAIN_MAX: Duration = Duration::from_secs(8);
const HAND_OVER_MAX: Duration = Duration::from_secs(2);
const PROGRESS: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_secs(1);
const WRITE_AGAIN: Duration = Duration::from_secs(1);
const LAST_WORD_MAX: Duration = Duration::from_secs(30);

#[derive(Default)]
pub struct Agents(Mutex<HashMap<Key, JoinHandle<()>>>);

impl Agents {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, JoinHandle<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something while no worker begins. It is told of which spools there are workers.
    pub fn beside(&self, act: impl FnOnce(&dyn Fn(&SpoolLeft) -> bool)) {
        let mut agents = self.lock();
        agents.retain(|_, handle| !handle.is_finished());
        act(&|spool| agents.keys().any(|key| spool_name(&key.uid, &key.lineage) == spool.name));
    }

    /// Waits until all have ended.
    pub async fn ended(&self) {
        let all: Vec<JoinHandle<()>> = self.lock().drain().map(|(_, handle)| handle).collect();
        for handle in all {
            // How it ended it has said itself.
            let _ = handle.await;
        }
    }
}

/// Begins to work on shards that were given to this replica.
pub fn attend(context: &Arc<Context>) {
    if context.is_leaving() {
        return;
    }
    let mut agents = context.agents.lock();
    agents.retain(|_, handle| !handle.is_finished());
    for (key, target) in context.seats.ours() {
        let Some(seat) = context.seats.now(&key) else { continue };
        // An earlier one sees by itself that it has to end.
        if agents.contains_key(&key) {
            continue;
        }
        let shard = seat.orders.as_ref().map(|orders| orders.start.shard.clone()).unwrap_or_default();
        let shown = format!("{}/{}", target.namespace, target.name);
        let span = tracing::info_span!(parent: None, "shard", migration = %shown, shard);
        let agent = Agent {
            context: Arc::clone(context),
            told: context.seats.follow(&key),
            key: key.clone(),
            target,
            epoch: seat.epoch,
        };
        agents.insert(key, tokio::spawn(agent.run().instrument(span)));
    }
}

/// The worker ends with it.
struct Work(JoinHandle<Result<Stopped, Failed>>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Agent {
    context: Arc<Context>,
    key: Key,
    target: Target,
    epoch: i32,
    told: watch::Receiver<Option<Seat>>,
}

impl Agent {
    fn is_ours(&self, seat: Option<&Seat>) -> bool {
        seat.is_some_and(|seat| {
            seat.holder == self.context.members.identity && seat.epoch == self.epoch && seat.orders.is_some()
        })
    }

    async fn run(self) {
        tracing::info!("this replica works on the shard from here on");
        let mut told = self.told.clone();
        let taken = async {
            // An error means that the operator ends.
            let _ = told.wait_for(|seat| !self.is_ours(seat.as_ref())).await;
        };
        tokio::select! {
            () = taken => tracing::info!("the shard was given to another replica, or its migration is over"),
            over = self.work() => self.end(over).await,
        }
    }

    /// Then the coordinator writes the status of all shards that this replica works on.
    fn is_coordinated_here(&self) -> bool {
        self.context.claims.of(&self.key.uid, |_| false) == Claim::Mine
    }

    fn orders(&self) -> Option<Orders> {
        self.told.borrow().as_ref().filter(|seat| self.is_ours(Some(seat)))?.orders.clone()
    }

    async fn work(&self) -> Report {
        let over = |over| Report { over: Some(over), ..Report::default() };
        let Some(mut orders) = self.orders() else { return over(stopped(Stopped::default())) };
        if self.told.borrow().as_ref().is_some_and(|seat| seat.report.is_some()) {
            // An earlier process of our name was at it: the target tells where to go on.
            (orders.start.anew, orders.start.resume) = (false, None);
        }
        let begun = Instant::now();
        let (plan, secrets, post) = loop {
            let stops = self.orders().is_none_or(|orders| orders.drain) || self.context.is_leaving();
            if stops {
                let checkpoint = orders.start.resume;
                return over(stopped(Stopped { checkpoint, spooled: false }));
            }
            match self.prepare(&orders).await {
                Ok(prepared) => break prepared,
                Err(why) if begun.elapsed() > BEGIN_MAX => return over(Over::Declined { why }),
                Err(why) => tracing::info!(why, "the work on the shard cannot begin yet"),
            }
            tokio::time::sleep(BEGIN_AGAIN).await;
        };
        let (progress, view) = (post.progress(), post.view());
        let (drain, drained) = watch::channel(false);
        orders.put_into(&progress);
        let work = Work(tokio::spawn(post.work(drained).in_current_span()));
        let teller = Teller {
            agent: self,
            writer: self.context.shard_writer(&self.target),
            view,
            progress,
            plan,
            secrets,
            told: None,
            answered: 0,
            again_at: None,
        };
        teller.beside(work, drain).await
    }

    async fn prepare(&self, orders: &Orders) -> Result<(Arc<Plan>, Secrets, Post), String> {
        let (plan, secrets) = self.plan(&Secrets::default()).await?;
        let data_dir = self.context.data_dir.as_ref();
        let post = Post::prepare(&plan, data_dir, &orders.start).await.map_err(|error| error.to_string())?;
        Ok((Arc::new(plan), secrets, post))
    }

    async fn plan(&self, earlier: &Secrets) -> Result<(Plan, Secrets), String> {
        let found = find(&self.context.client, &self.target).await.map_err(|error| error.to_string())?;
        let object = found.ok_or_else(|| "the RedisMigration is gone".to_owned())?;
        let resolved = self.context.resolve(&object, earlier).await.map_err(|error| error.to_string())?;
        resolved.map_err(|faults| faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    }

    async fn tell(&self, report: &Report, leaves: bool) -> Result<bool, ApiError> {
        self.context
            .seats
            .edit(&self.target, &self.key, |seat| {
                if !self.is_ours(Some(seat)) {
                    return false;
                }
                seat.report = Some(report.clone());
                if leaves {
                    seat.holder.clear();
                }
                true
            })
            .await
    }

    /// The last word; others go on by it.
    async fn end(&self, report: Report) {
        tracing::info!(over = ?report.over, "the work on the shard has ended");
        let began = Instant::now();
        loop {
            let leaves = self.context.is_leaving();
            match self.tell(&report, leaves).await {
                Ok(_) => return,
                Err(error) if began.elapsed() > LAST_WORD_MAX || leaves => {
                    tracing::warn!(%error, "how the work on the shard ended cannot be told");
                    return;
                }
                Err(error) => tracing::debug!(%error, "how the work on the shard ended cannot be told yet"),
            }
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }
}

fn stopped(left: Stopped) -> Over {
    Over::of(Ok(left))
}

/// Beside a worker: hands it its orders and tells what becomes of it.
struct Teller<'a> {
    agent: &'a Agent,
    view: View,
    progress: Arc<ShardProgress>,
    plan: Arc<Plan>,
    secrets: Secrets,
    writer: Writer,
    told: Option<(Report, Instant)>,
    answered: u64,
    /// After a request that failed.
    again_at: Option<Instant>,
}

impl Teller<'_> {
    async fn beside(mut self, mut work: Work, drain: watch::Sender<bool>) -> Report {
        let mut told = self.agent.told.clone();
        let mut leaving = self.agent.context.leaving();
        let (mut numbers, mut link) = (self.progress.numbers.subscribe(), self.progress.link.subscribe());
        let mut following = self.progress.following.subscribe();
        let mut tick = tokio::time::interval(LOOK);
        let mut cut_short: Option<tokio::time::Instant> = None;
        let over = loop {
            if let Some(orders) = self.agent.orders() {
                self.obey(&orders).await;
                let leaves = self.agent.context.is_leaving();
                if (orders.drain || leaves) && !drain.send_replace(true) {
                    let within = if leaves { HAND_OVER_MAX } else { DRAIN_MAX };
                    cut_short = Some(tokio::time::Instant::now() + within);
                }
            }
            // What is told last is told with the end.
            if !*drain.borrow() {
                self.tell().await;
            }
            let late = async {
                match cut_short {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let drains = *drain.borrow();
            tokio::select! {
                ended = &mut work.0 => break ended.map_or_else(
                    |error| Over::Declined { why: format!("a shard worker ended by itself: {error}") },
                    Over::of,
                ),
                () = late => {
                    work.0.abort();
                    break stopped(Stopped::default());
                }
                Ok(()) = told.changed() => {}
                Ok(()) = numbers.changed() => {}
                Ok(()) = link.changed() => {}
                Ok(()) = following.changed() => {}
                Ok(_) = leaving.wait_for(|leaving| *leaving), if !drains => {}
                _ = tick.tick() => {}
            }
        };
        self.progress.numbers.send_modify(|numbers| numbers.stopped = true);
        let report = Report { over: Some(over), ..Report::of(&self.progress, self.answered) };
        let status = self.view.status(&self.agent.context.members.identity);
        let written = self.writer.write_shard(&status);
        if let Ok(Err(error)) = tokio::time::timeout(WRITE_AGAIN, written).await {
            tracing::debug!(%error, "the last status of the shard was not taken");
        }
        report
    }

    async fn obey(&mut self, orders: &Orders) {
        orders.put_into(&self.progress);
        if orders.asked.number > self.answered
            && reached(&self.progress.numbers.borrow(), orders.asked.offset)
        {
            self.answered = orders.asked.number;
        }
        if orders.generation > self.plan.generation && self.may_ask() {
            match self.agent.plan(&self.secrets).await {
                Ok((plan, secrets)) => {
                    self.view.adopt(&plan);
                    (self.plan, self.secrets) = (Arc::new(plan), secrets);
                }
                Err(why) => {
                    tracing::warn!(why, "the changed spec cannot be taken up yet");
                    self.again_at = Some(Instant::now() + WRITE_AGAIN);
                }
            }
        }
    }

    fn may_ask(&mut self) -> bool {
        let may = self.again_at.is_none_or(|at| Instant::now() >= at);
        if may {
            self.again_at = None;
        }
        may
    }

    /// What is due, to the coordinator and into the status.
    async fn tell(&mut self) {
        let report = Report::of(&self.progress, self.answered);
        let due = self.told.as_ref().is_none_or(|(before, at)| {
            *before != report
                && (report.is_urgent_after(before)
                    || at.elapsed() > if report.is_idle_after(before) { IDLE } else { PROGRESS })
        });
        if due && self.may_ask() {
            match self.agent.tell(&report, false).await {
                Ok(_) => self.told = Some((report, Instant::now())),
                Err(error) => self.failed(&error),
            }
        }
        if self.agent.is_coordinated_here() {
            return;
        }
        let status = self.view.status(&self.agent.context.members.identity);
        let now = Instant::now();
        if self.writer.shard_due(&status, now).is_some_and(|at| at <= now)
            && self.may_ask()
            && let Err(error) = self.writer.write_shard(&status).await
        {
            self.failed(&error);
        }
    }

    fn failed(&mut self, error: &ApiError) {
        tracing::debug!(%error, "the shard's worker cannot be heard; it goes on");
        self.again_at = Some(Instant::now() + WRITE_AGAIN);
    }
}

/// Whether the worker has come as far as it was asked for.
fn reached(numbers: &Numbers, offset: Option<i64>) -> bool {
    let works = !numbers.stopped && numbers.phase == ShardPhase::IncrementalSync;
    works
        && match offset {
            Some(offset) => numbers.applied_offset >= offset,
            None => numbers.lag_bytes == 0,
        }
}
