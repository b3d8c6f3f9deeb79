//! The runs in this process: each a task of its own, beside one that brings its status to the API server.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::api::Target;
use super::decide::{End, Run, Why};
use super::forwarder::{Fault, Forwarder, SharedWriter};
use super::secrets::Secrets;
use super::status::{is_finished, is_transient};
use super::writer::Writer;
use crate::api::plan::Delivery;
use crate::api::{Phase, Plan, RedisMigration, Status};
use crate::migration::{self, DataDir, Observers, Outcome, Placement, RunOptions, StopRequest, Until};
use crate::telemetry::{EngineGauges, Observed, ObservedSet, Stand};

/// A drain is over within so long, or it is cut short: with exactly once the target knows where to go on.
const DRAIN_MAX: Duration = Duration::from_secs(8);
/// After SIGTERM, so that another replica goes on soon.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// By then others may take it over.
const UNFENCED_MAX: Duration = Duration::from_secs(3);
/// Between two attempts, doubled from one second.
const PUT_OFF_MAX: Duration = Duration::from_secs(15);

#[derive(Default)]
pub struct Runs {
    entries: Mutex<HashMap<String, Entry>>,
    /// Of migrations that ran here last, by uid: what removing their keys from the target takes when the Secrets
    /// are gone before.
    latest: Mutex<HashMap<String, Latest>>,
    observed: ObservedSet,
}

/// What a run worked by last.
#[derive(Clone)]
pub struct Latest {
    pub plan: Arc<Plan>,
    pub secrets: Secrets,
}

/// How often it was tried in vain, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    pub since: Instant,
    pub count: u32,
}

struct Entry {
    attempts: Option<Attempts>,
    state: State,
}

enum State {
    Waiting { generation: i64, until: Instant },
    Running(Box<Running>),
}

struct Running {
    target: Target,
    generation: i64,
    plan: Arc<Plan>,
    secrets: Secrets,
    stop: watch::Sender<StopRequest>,
    plans: watch::Sender<Arc<Plan>>,
    fault: watch::Sender<Fault>,
    status: watch::Receiver<Status>,
    writer: SharedWriter,
    outcome: Option<Outcome>,
    forwarder: JoinHandle<()>,
}

impl Running {
    /// The changed spec is not taken up.
    fn fault(&mut self, generation: i64, message: String) {
        self.generation = generation;
        self.fault.send_replace(Some((generation, message)));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.forwarder.abort();
    }
}

/// Shares the shards of a run out, by plans that change.
type Place = Box<dyn FnOnce(watch::Receiver<Arc<Plan>>) -> Arc<dyn Placement> + Send>;

/// What a new run needs.
pub struct Start {
    pub target: Target,
    pub plan: Arc<Plan>,
    pub secrets: Secrets,
    pub data_dir: Option<DataDir>,
    pub earlier: Option<Status>,
    pub writer: Writer,
    /// Shown as the worker of its shards.
    pub identity: String,
    /// Shares its shards out, by plans that change.
    pub place: Place,
}

/// A run that has ended.
pub struct Ended {
    pub outcome: Outcome,
    /// What it told last.
    pub status: Status,
    pub writer: SharedWriter,
}

impl Runs {
    pub fn new(observed: ObservedSet) -> Self {
        Self { entries: Mutex::default(), latest: Mutex::default(), observed }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `generation`: the object's.
    pub fn view(&self, uid: &str, generation: i64) -> Run {
        match self.lock().get(uid).map(|entry| &entry.state) {
            None => Run::Idle,
            Some(State::Waiting { generation: of, until }) => {
                Run::Waiting { current: *of == generation && Instant::now() < *until }
            }
            Some(State::Running(running)) => match &running.outcome {
                Some(outcome) => Run::Ended(end_of(outcome)),
                None if *running.stop.borrow() != StopRequest::Run => Run::Stopping,
                None => Run::Running { current: running.generation == generation },
            },
        }
    }

    /// Starts a run; `ended` is called when it is over.
    pub fn start(self: &Arc<Self>, start: Start, ended: impl FnOnce() + Send + 'static) {
        let Start { target, plan, secrets, data_dir, earlier, writer, identity, place } = start;
        let initial = Status { observed_generation: plan.generation, ..Status::default() };
        let (status, status_seen) = watch::channel(initial);
        let (gauges, gauges_seen) = watch::channel(EngineGauges::default());
        let (stop, stop_seen) = watch::channel(StopRequest::Run);
        let (plans, plans_seen) = watch::channel(Arc::clone(&plan));
        let (fault, fault_seen) = watch::channel(None);
        let writer = Arc::new(tokio::sync::Mutex::new(writer));
        let shown = format!("{}/{}", target.namespace, target.name);
        let span = tracing::info_span!(parent: None, "run", migration = %shown);
        let forwarder = Forwarder {
            status: status_seen.clone(),
            fault: fault_seen,
            writer: Arc::clone(&writer),
            identity,
        };
        let forwarder = tokio::spawn(forwarder.run().instrument(span.clone()));
        let options = RunOptions {
            until: Until::Finished,
            data_dir,
            stop: stop_seen,
            placement: Some(place(plans_seen.clone())),
            plans: Some(plans_seen),
            earlier,
        };
        let observers = Observers { status, gauges };
        self.observed.insert(Observed {
            name: target.name.clone(),
            namespace: target.namespace.clone(),
            status: status_seen.clone(),
            gauges: gauges_seen,
        });
        let uid = target.uid.clone();
        self.remember(&uid, &plan, &secrets);
        {
            let mut entries = self.lock();
            let attempts = entries.get(&uid).and_then(|entry| entry.attempts);
            let running = Running {
                target,
                generation: plan.generation,
                plan: Arc::clone(&plan),
                secrets,
                stop,
                plans,
                fault,
                status: status_seen,
                writer,
                outcome: None,
                forwarder,
            };
            entries.insert(uid.clone(), Entry { attempts, state: State::Running(Box::new(running)) });
        }
        let engine = tokio::spawn(migration::run(plan, options, observers).instrument(span.clone()));
        let runs = Arc::clone(self);
        let supervise = async move {
            let outcome = engine.await.unwrap_or_else(|error| Outcome::Failed {
                reason: crate::api::conditions::reason::ABORTED,
                message: format!("the run ended by itself: {error}"),
                transient: false,
            });
            tracing::info!(?outcome, "the run has ended");
            runs.over(&uid, outcome);
            ended();
        };
        tokio::spawn(supervise.instrument(span));
    }

    fn over(&self, uid: &str, outcome: Outcome) {
        let mut entries = self.lock();
        if let Some(Entry { state: State::Running(running), .. }) = entries.get_mut(uid) {
            running.forwarder.abort();
            running.outcome = Some(outcome);
        }
    }

    /// Asks the run to stop; what drains is cut short after a while.
    pub fn stop(self: &Arc<Self>, uid: &str, why: Why) {
        let at_once = why == Why::Lost;
        if at_once {
            self.unlearn(uid);
        }
        if !self.request(uid, if at_once { StopRequest::Now } else { StopRequest::Drain }) || at_once {
            return;
        }
        self.cut_short(uid, DRAIN_MAX);
    }

    /// Stops the present run of a migration at once, should it not have ended within so long; not the next one.
    fn cut_short(&self, uid: &str, within: Duration) {
        let stop = match self.lock().get(uid) {
            Some(Entry { state: State::Running(running), .. }) => running.stop.clone(),
            _ => return,
        };
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            stop.send_replace(StopRequest::Now);
        });
    }

    /// Stops what has no epoch in its target to shut out a second writer. It begins again once the API server
    /// answers and the Lease is still ours.
    pub fn stop_unfenced(self: &Arc<Self>) {
        let unfenced: Vec<String> = {
            let entries = self.lock();
            let runs = entries.iter().filter_map(|(uid, entry)| match &entry.state {
                State::Running(running) => Some((uid, running)),
                State::Waiting { .. } => None,
            });
            let unfenced = runs.filter(|(_, running)| {
                running.plan.delivery == Delivery::AtLeastOnce
                    && running.outcome.is_none()
                    && *running.stop.borrow() == StopRequest::Run
            });
            unfenced.map(|(uid, _)| uid.clone()).collect()
        };
        for uid in unfenced {
            tracing::warn!("the API server is away: a run without exactly once stops until it is back");
            self.request(&uid, StopRequest::Drain);
            self.cut_short(&uid, UNFENCED_MAX);
        }
    }

    fn request(&self, uid: &str, stop: StopRequest) -> bool {
        match self.lock().get(uid) {
            Some(Entry { state: State::Running(running), .. }) if running.outcome.is_none() => {
                running.stop.send_replace(stop);
                true
            }
            _ => false,
        }
    }

    /// Hands a changed plan to the run. False: what changed takes another run.
    pub fn update(&self, uid: &str, plan: &Arc<Plan>, secrets: Secrets) -> bool {
        let mut entries = self.lock();
        let Some(Entry { state: State::Running(running), .. }) = entries.get_mut(uid) else { return false };
        if let Some(changed) = plan.copied_by.changed_since(&running.plan.copied_by) {
            let begun = !running.status.borrow().shards.is_empty();
            if begun {
                running.fault(plan.generation, format!(
                    "{changed} changed after copying had begun: the migration goes on as it was; put it back for other changes to take effect"
                ));
            }
            return begun;
        }
        if !secrets.serve_like(&running.secrets)
            || needs_another_run(&running.plan, plan, &running.status.borrow())
        {
            return false;
        }
        self.remember(uid, plan, &secrets);
        running.secrets = secrets;
        running.generation = plan.generation;
        running.fault.send_replace(None);
        running.plans.send_replace(Arc::clone(plan));
        true
    }

    /// The changed spec cannot be carried out; the run goes on by the one before.
    pub fn reject(&self, uid: &str, generation: i64, message: String) {
        if let Some(Entry { state: State::Running(running), .. }) = self.lock().get_mut(uid) {
            running.fault(generation, message);
        }
    }

    /// The Secrets that the run reads.
    pub fn secrets(&self, uid: &str) -> Secrets {
        match self.lock().get(uid) {
            Some(Entry { state: State::Running(running), .. }) => running.secrets.clone(),
            _ => Secrets::default(),
        }
    }

    fn remember(&self, uid: &str, plan: &Arc<Plan>, secrets: &Secrets) {
        let latest = Latest { plan: Arc::clone(plan), secrets: secrets.clone() };
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), latest);
    }

    /// By what the last run here worked, though it may be over.
    pub fn latest(&self, uid: &str) -> Option<Latest> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// There is no more to remove from the target, or others are to do so.
    pub fn unlearn(&self, uid: &str) {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// What the run has told so far, and by which plan.
    pub fn ended(&self, uid: &str) -> Option<Ended> {
        match self.lock().get(uid) {
            Some(Entry { state: State::Running(running), .. }) => Some(Ended {
                outcome: running.outcome.clone()?,
                status: running.status.borrow().clone(),
                writer: Arc::clone(&running.writer),
            }),
            _ => None,
        }
    }

    pub fn forget(&self, uid: &str) {
        if let Some(Entry { state: State::Running(running), .. }) = self.lock().remove(uid) {
            self.observed.remove(&running.target.namespace, &running.target.name);
        }
    }

    /// Shows what the API server tells of a migration, as far as nobody works on it.
    pub fn show(&self, object: &RedisMigration) {
        let stand = object.status.as_ref().map(|status| (is_finished(status), Stand::of(status)));
        let rests = |(over, stand): &(bool, Stand)| *over || stand.stalled || stand.phase == Phase::Suspended;
        let at_rest = stand.filter(rests).map(|(_, stand)| stand);
        let Target { namespace, name, .. } = Target::of(object);
        self.observed.rests(&namespace, &name, at_rest);
    }

    pub fn hide(&self, target: &Target) {
        self.observed.rests(&target.namespace, &target.name, None);
    }

    /// Of those in the namespace, or all, only these are there.
    pub fn show_only(&self, scope: Option<&str>, there: &HashSet<(String, String)>) {
        self.observed.keep_only(|namespace, name| {
            scope.is_some_and(|scope| scope != namespace)
                || there.contains(&(namespace.to_owned(), name.to_owned()))
        });
    }

    /// Counts an attempt in vain; `afresh`: the ones before do not count any more.
    pub fn put_off(&self, target: &Target, generation: i64, afresh: bool) -> (Attempts, Duration) {
        let mut entries = self.lock();
        let earlier = entries.get(&target.uid).and_then(|entry| entry.attempts).filter(|_| !afresh);
        let attempts = match earlier {
            Some(Attempts { since, count }) => Attempts { since, count: count.saturating_add(1) },
            None => Attempts { since: Instant::now(), count: 1 },
        };
        let wait = Duration::from_secs(1 << attempts.count.min(5).saturating_sub(1)).min(PUT_OFF_MAX);
        let state = State::Waiting { generation, until: Instant::now() + wait };
        entries.insert(target.uid.clone(), Entry { attempts: Some(attempts), state });
        self.observed.remove(&target.namespace, &target.name);
        (attempts, wait)
    }

    /// How long a run that is waited for is still put off.
    pub fn waits(&self, uid: &str) -> Option<Duration> {
        match self.lock().get(uid)?.state {
            State::Waiting { until, .. } => Some(until.saturating_duration_since(Instant::now())),
            State::Running(_) => None,
        }
    }

    pub fn targets(&self) -> Vec<Target> {
        let entries = self.lock();
        let targets = entries.values().filter_map(|entry| match &entry.state {
            State::Running(running) => Some(running.target.clone()),
            State::Waiting { .. } => None,
        });
        targets.collect()
    }

    /// Stops the run for another replica to go on, within a short time.
    pub async fn hand_over(&self, uid: &str) {
        if !self.request(uid, StopRequest::Drain) {
            return;
        }
        if tokio::time::timeout(HAND_OVER_MAX, self.until_over(uid)).await.is_err() {
            self.request(uid, StopRequest::Now);
            self.until_over(uid).await;
        }
    }

    async fn until_over(&self, uid: &str) {
        let status = match self.lock().get(uid) {
            Some(Entry { state: State::Running(running), .. }) => running.status.clone(),
            _ => return,
        };
        let mut status = status;
        // The engine drops the sender at its end.
        while status.changed().await.is_ok() {}
    }
}

fn end_of(outcome: &Outcome) -> End {
    match outcome {
        Outcome::Done => End::Completed,
        Outcome::Differences { .. } => End::Failed,
        Outcome::Failed { transient: true, .. } => End::Transient,
        Outcome::Failed { reason, .. } if is_transient(reason) => End::Transient,
        Outcome::Failed { .. } => End::Failed,
        Outcome::Stopped => End::Stopped,
        Outcome::Superseded { .. } => End::Superseded,
    }
}

/// What a running worker cannot take up. A full sync is not broken off for it.
fn needs_another_run(old: &Plan, new: &Plan, status: &Status) -> bool {
    let fixed = |plan: &Plan| {
        let limits = plan.limits;
        (limits.max_restore_bytes, limits.spool_memory, limits.spool_disk, limits.spool_retain)
    };
    let followed = crate::api::conditions::is_true(&status.conditions, crate::api::conditions::FULL_SYNCED);
    followed
        && (fixed(old) != fixed(new)
            || old.failure_policy.on_full_resync != new.failure_policy.on_full_resync)
}

/// Names the worker of all shards that are worked on here.
pub fn by(mut status: Status, identity: &str) -> Status {
    for shard in status.shards.iter_mut().filter(|shard| shard.worker.is_empty()) {
        identity.clone_into(&mut shard.worker);
    }
    status
}
