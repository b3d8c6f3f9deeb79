//! The life of such a run: preflight, one task for each shard, the outcome.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::prepare::{Part, Prepared, prepare, spool_folder};
use crate::api::conditions::{self, reason};
use crate::api::plan::{Delivery, VerificationMode};
use crate::api::{Phase, Plan};
use crate::migration::checkpoints::{self, Checkpoints, SetAside};
use crate::migration::coordinator::{newer, reason_of};
use crate::migration::state::{Observed, State};
use crate::migration::verification::failed;
use crate::migration::{MigrationError, Observers, Outcome, RunOptions, StopRequest, kept, setup};
use crate::worker::export::{ExportError, export};
use crate::worker::turn::is_at_rest;
use crate::worker::{self, ShardPhase, ShardProgress, WorkerError, WorkerSetup};

/// How often the numbers are gathered.
const GATHER: Duration = Duration::from_millis(200);
/// Files that are read at once, unless `limits.parallelShards` says otherwise.
const PARALLEL: usize = 4;

/// One shard, as those see it who report on it.
struct Told {
    id: String,
    progress: Arc<ShardProgress>,
}

impl Observed for Told {
    fn id(&self) -> &str {
        &self.id
    }

    fn slots(&self) -> &str {
        ""
    }

    fn progress(&self) -> &ShardProgress {
        &self.progress
    }
}

/// How a shard's part ended.
#[derive(Debug)]
enum Ended {
    Whole,
    /// On request.
    Stopped,
    Failed(PartError),
}

#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error(transparent)]
    Load(WorkerError),
    #[error(transparent)]
    Export(#[from] ExportError),
}

impl PartError {
    /// True when loading the file again may do.
    fn calls_for_restart(&self) -> bool {
        matches!(self, Self::Load(WorkerError::LostState { .. } | WorkerError::FellBack { .. }))
    }
}

pub async fn run(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    let mut state = State::open(&plan, options.earlier.as_ref(), "not done yet", observers);
    let mut stop = options.stop.clone();
    // Nothing is changed yet on either side.
    let prepared = tokio::select! {
        prepared = begin(&plan, &options) => Some(prepared),
        Ok(_) = stop.wait_for(|stop| *stop != StopRequest::Run) => None,
    };
    let prepared = match prepared {
        Some(Ok(prepared)) => prepared,
        Some(Err(MigrationError { reason, message, transient })) => {
            state.set(conditions::PREFLIGHT_PASSED, false, reason, &message);
            failed(&mut state, reason, message.clone());
            return Outcome::Failed { reason, message, transient };
        }
        None => {
            state.status.message = "stopped before anything was changed".to_owned();
            state.publish();
            return Outcome::Stopped;
        }
    };
    for warning in &prepared.report.warnings {
        tracing::warn!("{warning}");
    }
    state.set(conditions::PREFLIGHT_PASSED, true, reason::COMPLETED, &prepared.report.warnings.join("; "));
    state.expect_keys(prepared.report.source.as_ref().map_or(0, |source| source.keys));
    Run::new(plan, options, state, prepared).live().await
}

async fn begin(plan: &Plan, options: &RunOptions) -> Result<Prepared, MigrationError> {
    let impossible =
        |message: String| MigrationError { reason: reason::PREFLIGHT_FAILED, message, transient: false };
    let mut earlier = Checkpoints::default();
    if let Some(data_dir) = &options.data_dir {
        earlier = checkpoints::load(data_dir, &plan.uid).map_err(|error| impossible(error.to_string()))?;
    }
    earlier.goes_on_with(plan)?;
    let begun = earlier.begun || options.earlier.as_ref().is_some_and(|told| !told.shards.is_empty());
    let mut prepared = prepare(plan, !begun, options.data_dir.as_ref()).await?;
    for part in &mut prepared.parts {
        if let Part::Load(setup) = part {
            setup.own_keys = begun;
        }
    }
    if plan.target.redis().is_some()
        && let Some(data_dir) = &options.data_dir
    {
        let begun = Checkpoints::begun(plan, Vec::new(), SetAside::new());
        checkpoints::save(data_dir, &plan.uid, &begun).map_err(|error| impossible(error.to_string()))?;
    }
    Ok(prepared)
}

struct Run {
    plan: Arc<Plan>,
    options: RunOptions,
    state: State,
    prepared: Prepared,
    shards: Vec<Told>,
    /// The next that is to begin.
    next: usize,
    whole: usize,
    tasks: JoinSet<(usize, Ended)>,
    stop: watch::Sender<bool>,
    restarts: u32,
    last_progress: (Instant, u64),
}

impl Run {
    fn new(plan: Arc<Plan>, options: RunOptions, state: State, prepared: Prepared) -> Self {
        let told = |part: &Part| Told { id: part.shard().to_owned(), progress: ShardProgress::new() };
        let shards: Vec<Told> = prepared.parts.iter().map(told).collect();
        Self {
            plan,
            options,
            state,
            prepared,
            shards,
            next: 0,
            whole: 0,
            tasks: JoinSet::new(),
            stop: watch::Sender::new(false),
            restarts: 0,
            last_progress: (Instant::now(), 0),
        }
    }

    async fn live(mut self) -> Outcome {
        let what = if self.plan.target.redis().is_some() { "loading" } else { "writing" };
        let message = format!("{what} {} file(s)", self.shards.len());
        self.state.phase(Phase::FullSync, &message);
        self.state.set(conditions::RECONCILING, true, reason::FULL_SYNC, &message);
        let outcome = self.work().await;
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        if self.options.data_dir.is_none() {
            // It is there only if a spool needed the disk; the shards' own folders in it are gone already.
            let _ = std::fs::remove_dir(spool_folder(None, &self.plan.uid));
        }
        self.state.gather(&self.shards);
        self.end(outcome).await
    }

    async fn work(&mut self) -> Outcome {
        let mut stop = self.options.stop.clone();
        let mut plans = self.options.plans.clone();
        let mut tick = tokio::time::interval(GATHER);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            while self.next < self.prepared.parts.len() && self.tasks.len() < parallel(&self.plan) {
                self.start(self.next);
                self.next += 1;
            }
            if self.whole == self.shards.len() {
                return Outcome::Done;
            }
            tokio::select! {
                Ok(_) = stop.wait_for(|stop| *stop != StopRequest::Run) => return Outcome::Stopped,
                Some(ended) = self.tasks.join_next() => {
                    let outcome = match ended {
                        Ok((_, Ended::Whole)) => { self.whole += 1; None }
                        Ok((_, Ended::Stopped)) => Some(Outcome::Stopped),
                        Ok((index, Ended::Failed(error))) => self.failed(index, error),
                        Err(error) => Some(Outcome::Failed {
                            reason: reason::ABORTED,
                            message: format!("a shard's task ended by itself: {error}"),
                            transient: false,
                        }),
                    };
                    if let Some(outcome) = outcome {
                        return outcome;
                    }
                }
                plan = newer(&mut plans, &self.plan) => self.adopt(plan),
                _ = tick.tick() => {
                    self.state.gather(&self.shards);
                    if let Some(outcome) = self.overdue() {
                        return outcome;
                    }
                }
            }
        }
    }

    /// Takes up what may change while running.
    fn adopt(&mut self, plan: Arc<Plan>) {
        for part in &mut self.prepared.parts {
            match part {
                Part::Load(setup) => {
                    setup.lane.set(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
                    setup.lane.pace().set(plan.limits.bytes_per_second, plan.limits.keys_per_second);
                    setup.max_quarantined = plan.failure_policy.max_quarantined;
                }
                Part::Export(setup) => {
                    setup.turns.set(plan.limits.parallel_shards, plan.limits.source);
                    setup.max_quarantined = plan.failure_policy.max_quarantined;
                }
            }
        }
        tracing::info!(generation = plan.generation, "the changed spec holds from here on");
        self.state.judge_by(&plan);
        self.plan = plan;
        self.state.publish();
    }

    fn start(&mut self, index: usize) {
        let (Some(part), Some(told)) = (self.prepared.parts.get(index), self.shards.get(index)) else {
            return;
        };
        let (progress, stop) = (Arc::clone(&told.progress), self.stop.subscribe());
        match part {
            Part::Load(setup) => {
                let work = load((**setup).clone(), progress, stop);
                self.tasks.spawn(async move { (index, work.await) }.in_current_span());
            }
            Part::Export(setup) => {
                let work = export((**setup).clone(), progress, stop);
                let work = async move {
                    let ended = match work.await {
                        Ok(true) => Ended::Whole,
                        Ok(false) => Ended::Stopped,
                        Err(error) => Ended::Failed(error.into()),
                    };
                    (index, ended)
                };
                self.tasks.spawn(work.in_current_span());
            }
        }
    }

    /// `None`: the part was started again.
    fn failed(&mut self, index: usize, error: PartError) -> Option<Outcome> {
        if error.calls_for_restart()
            && self.restarts < self.plan.failure_policy.backoff_limit
            && let Some(Part::Load(setup)) = self.prepared.parts.get_mut(index)
        {
            tracing::warn!(shard = %setup.shard, %error, "loading the file again");
            (setup.restarted, setup.anew) = (true, true);
            self.restarts += 1;
            self.start(index);
            return None;
        }
        let keys: u64 = self.shards.iter().map(|told| told.progress.numbers.borrow().keys).sum();
        let (reason, message) = match &error {
            PartError::Load(WorkerError::Fenced(message)) => {
                return Some(Outcome::Superseded { message: message.clone() });
            }
            PartError::Load(error) => {
                (reason_of(error), format!("{error}; {keys} key(s) were applied before, and stay"))
            }
            PartError::Export(ExportError::Source(source)) => (reason_of(source), error.to_string()),
            PartError::Export(ExportError::TooManyLeft { .. }) => {
                (reason::COMMANDS_QUARANTINED, error.to_string())
            }
            PartError::Export(ExportError::SlotsMoved { .. }) => (reason::SLOTS_MOVED, error.to_string()),
            PartError::Export(_) => (reason::ABORTED, error.to_string()),
        };
        Some(Outcome::Failed { reason, message, transient: false })
    }

    fn overdue(&mut self) -> Option<Outcome> {
        let (mut moved, mut waits) = (0, false);
        for told in &self.shards {
            let numbers = told.progress.numbers.borrow();
            moved += numbers.keys + numbers.snapshot_read + numbers.read_back;
            waits |= is_at_rest(&numbers.waiting);
        }
        // What waits for `limits.source` is as it was asked for.
        if moved != self.last_progress.1 || waits {
            self.last_progress = (Instant::now(), moved);
        }
        let seconds = self.plan.failure_policy.progress_deadline_seconds;
        if seconds == 0 || self.last_progress.0.elapsed() <= Duration::from_secs(seconds) {
            return None;
        }
        let mut last = self.state.status.shards.iter().map(|shard| shard.last_error.as_str());
        let last = last.find(|error| !error.is_empty()).unwrap_or("no error was reported");
        let message = format!("no progress for {seconds} s: {last}");
        Some(Outcome::Failed { reason: reason::DEADLINE_EXCEEDED, message, transient: false })
    }

    async fn end(mut self, outcome: Outcome) -> Outcome {
        let to_server = self.plan.target.redis().is_some();
        let outcome = match outcome {
            Outcome::Done => self.judge(),
            outcome => outcome,
        };
        let finished = outcome == Outcome::Done;
        let foreign = matches!(&outcome, Outcome::Failed { reason: reason::TARGET_NOT_EMPTY, .. });
        if to_server && (finished || foreign) {
            if self.plan.delivery == Delivery::ExactlyOnce
                && let Ok(dialer) = setup::target_dialer(&self.plan)
                && let Err(error) = kept::remove(&self.plan, &dialer, self.lineages()).await
            {
                tracing::warn!(%error, "keys that begin with redis-migration: stay on the target");
            }
            // A key that was the target's own must not pass for one of ours in the next run.
            if let Some(data_dir) = &self.options.data_dir
                && let Err(error) = checkpoints::clear(data_dir, &self.plan.uid)
            {
                tracing::error!("{error}");
            }
        }
        match outcome {
            Outcome::Done => {
                let keys = self.state.status.progress.keys_applied;
                let message = match to_server {
                    true => format!("completed: the target has {keys} key(s) of the file(s)"),
                    false => format!("completed: {} file(s) written, {keys} key(s)", self.shards.len()),
                };
                self.state.finish(Phase::Completed, true, reason::COMPLETED, &message);
                Outcome::Done
            }
            Outcome::Failed { reason, message, transient } => {
                failed(&mut self.state, reason, message.clone());
                Outcome::Failed { reason, message, transient }
            }
            Outcome::Superseded { message } => {
                failed(&mut self.state, reason::ABORTED, message.clone());
                Outcome::Superseded { message }
            }
            Outcome::Stopped => {
                let message = match (to_server, self.plan.delivery) {
                    (true, Delivery::ExactlyOnce) => "stopped; started again it goes on where it stopped",
                    (true, Delivery::AtLeastOnce) => {
                        "stopped; started again it loads the files from their beginning"
                    }
                    (false, _) => "stopped; files that were not whole are removed",
                };
                tracing::info!("{message}");
                self.state.status.message = message.to_owned();
                self.state.publish();
                Outcome::Stopped
            }
            outcome @ Outcome::Differences { .. } => outcome,
        }
    }

    /// Of the shards, on a target that is a server.
    fn lineages(&self) -> impl Iterator<Item = &str> + Clone {
        self.prepared.parts.iter().filter_map(|part| match part {
            Part::Load(setup) => Some(setup.lineage.as_str()),
            Part::Export(_) => None,
        })
    }

    /// Every shard is whole: does that do?
    fn judge(&mut self) -> Outcome {
        let message = format!("{} of {} file(s) are whole", self.whole, self.shards.len());
        self.state.set(conditions::FULL_SYNCED, true, reason::COMPLETED, &message);
        self.state.set(conditions::IN_SYNC, true, reason::COMPLETED, "nothing follows what a file holds");
        let refused = self.state.status.quarantine.commands;
        if refused > 0 {
            let message =
                format!("{refused} key(s) were left out (status.quarantine): the target lacks them");
            self.state.set(conditions::DEGRADED, true, reason::COMMANDS_QUARANTINED, &message);
            return Outcome::Failed { reason: reason::COMMANDS_QUARANTINED, message, transient: false };
        }
        let read_back = self.plan.verification.mode == VerificationMode::Full;
        if self.plan.target.redis().is_none() && read_back {
            let message = "what was written was read back and is the same";
            self.state.set(conditions::VERIFIED, true, reason::COMPLETED, message);
        }
        Outcome::Done
    }
}

/// Files that are read at once. Masters wait for their turns by themselves.
fn parallel(plan: &Plan) -> usize {
    match (plan.source.redis(), plan.limits.parallel_shards) {
        (Some(_), _) => usize::MAX,
        (None, 0) => PARALLEL,
        (None, most) => most,
    }
}

/// Until all of the file stands on the target.
async fn load(setup: WorkerSetup, progress: Arc<ShardProgress>, mut stop: watch::Receiver<bool>) -> Ended {
    let (drain, asked) = watch::channel(false);
    let mut numbers = progress.numbers.subscribe();
    let mut work = std::pin::pin!(worker::run(setup, Arc::clone(&progress), asked));
    let early = tokio::select! {
        ended = &mut work => Some(ended),
        Ok(_) = numbers.wait_for(|numbers| !numbers.stopped && numbers.phase == ShardPhase::IncrementalSync) => None,
        Ok(_) = stop.wait_for(|stop| *stop) => None,
    };
    let ended = match early {
        Some(ended) => ended,
        None => {
            drain.send_replace(true);
            work.await
        }
    };
    match ended {
        Ok(_) if progress.numbers.borrow().phase == ShardPhase::IncrementalSync => Ended::Whole,
        Ok(_) => Ended::Stopped,
        Err(worker::Failed { error, .. }) => Ended::Failed(PartError::Load(error)),
    }
}
