//! The life of one run: preflight, workers, phases, verification, cutover, outcome.

mod live;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::checkpoints::{self, Checkpoints};
use super::degraded;
use super::identity::{KnownShard, identify};
use super::kept;
use super::state::{Shard, State, is_in_sync};
use super::verification::{self, failed, settle};
use super::{MigrationError, Observers, Outcome, RunOptions, StopRequest, Until, setup};
use crate::api::conditions::{self, reason};
use crate::api::plan::{CutoverMode, Delivery, ExistingKeys, FullResyncPolicy};
use crate::api::{Phase, Plan};
use crate::connection::{Address, ConnectionError};
use crate::preflight::PreflightReport;
use crate::source::replication::ReplicationError;
use crate::verify::{Settle, VerifyError, VerifyProgress, VerifyReport, verify};
use crate::worker::{self, Checkpoint, ShardPhase, ShardProgress, Stopped, WorkerError, WorkerSetup};

/// How often the workers' numbers are gathered.
const GATHER: Duration = Duration::from_millis(200);
/// A verification that lost a server that did not move is started again this often.
const VERIFY_REPEATS: u32 = 3;

/// Why the wait for something ended early.
enum Ended {
    Stop,
    Worker(WorkerError),
    Other { reason: &'static str, message: String },
}

struct Run {
    plan: Arc<Plan>,
    options: RunOptions,
    state: State,
    report: PreflightReport,
    shards: Vec<Shard>,
    workers: JoinSet<(usize, Result<Stopped, worker::Failed>)>,
    /// Where workers stood that could not go on, by shard id.
    left: BTreeMap<String, Checkpoint>,
    /// What another run recognises the shards by.
    known: Vec<KnownShard>,
    /// To start a worker again, in the order of `shards`.
    setups: Vec<WorkerSetup>,
    restarts: u32,
    drain: watch::Sender<bool>,
    /// Counts the plans that were adopted while running.
    adopted: watch::Sender<u64>,
    /// When anything moved last, and how far it was then: full resyncs, and the sum of all counts.
    last_progress: (Instant, (u64, u64)),
    /// Full resyncs by the time that all shards had their snapshot last.
    settled_resyncs: u64,
}

pub async fn run(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    let mut state = State::new(&plan, observers);
    if let Some(since) = options.earlier.as_ref().and_then(|earlier| earlier.start_time.clone()) {
        state.status.start_time = Some(since);
    }
    state.set(conditions::READY, false, reason::FULL_SYNC, "not in sync yet");
    state.set(conditions::RECONCILING, true, reason::FULL_SYNC, "looking at both sides");
    state.phase(Phase::Preflight, "looking at both sides");
    let mut stop = options.stop.clone();
    // Nothing is changed yet on either side.
    let prepared = tokio::select! {
        prepared = prepare(&plan, &options, &mut state) => Some(prepared),
        Ok(_) = stop.wait_for(|stop| *stop != StopRequest::Run) => None,
    };
    let Prepared { report, setups, known, temporary: _temporary } = match prepared {
        Some(Ok(prepared)) => prepared,
        Some(Err(MigrationError { reason, message, transient })) => {
            failed(&mut state, reason, message.clone());
            return Outcome::Failed { reason, message, transient };
        }
        None => {
            state.status.message = "stopped before anything was changed".to_owned();
            state.publish();
            return Outcome::Stopped;
        }
    };
    // From here on the target holds more than the old checkpoint says; an orderly stop writes a new one.
    let begun = Checkpoints { begun: true, known: known.clone(), ..Checkpoints::default() };
    if let Some(data_dir) = &options.data_dir
        && let Err(error) = checkpoints::save(data_dir, &plan.uid, &begun)
    {
        return failed(&mut state, reason::PREFLIGHT_FAILED, error.to_string());
    }
    let mut run = Run::start(plan, options, state, report, setups, known);
    let outcome = run.live().await;
    run.end(outcome).await
}

/// What there is to know before the first worker starts.
struct Prepared {
    report: PreflightReport,
    setups: Vec<WorkerSetup>,
    /// The shards, in the order of `setups`.
    known: Vec<KnownShard>,
    temporary: Option<RemoveFolder>,
}

async fn prepare(plan: &Plan, options: &RunOptions, state: &mut State) -> Result<Prepared, MigrationError> {
    let impossible =
        |message: String| MigrationError { reason: reason::PREFLIGHT_FAILED, message, transient: false };
    let mut earlier = match &options.data_dir {
        Some(data_dir) => {
            checkpoints::load(data_dir, &plan.uid).map_err(|error| impossible(error.to_string()))?
        }
        None => Checkpoints::default(),
    };
    if let Some(told) = &options.earlier {
        earlier.learn(told, plan.delivery);
    }
    let report = setup::preflight(plan, !earlier.begun).await.inspect_err(|error| {
        state.set(conditions::PREFLIGHT_PASSED, false, error.reason, &error.message);
    })?;
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    state.set(conditions::PREFLIGHT_PASSED, true, reason::COMPLETED, &report.warnings.join("; "));
    state.expect_keys(report.source.as_ref().map_or(0, |source| source.keys));
    let (folder, temporary) = spool_folder(options, plan)
        .map_err(|error| impossible(format!("no folder for the spool: {error}; give one with --data-dir")))?;
    let topology = &setup::sides(&report)?.0.topology;
    let known = identify(topology, &earlier.known, |id| earlier.shards.contains_key(id));
    let setups = setup::workers(plan, &report, &folder, &earlier, &known).await?;
    Ok(Prepared { report, setups, known, temporary })
}

/// The folder for segment files; a temporary one is removed with its guard.
fn spool_folder(options: &RunOptions, plan: &Plan) -> std::io::Result<(PathBuf, Option<RemoveFolder>)> {
    match &options.data_dir {
        Some(data_dir) => {
            let folder = data_dir.join("spool");
            std::fs::create_dir_all(&folder)?;
            Ok((folder, None))
        }
        None => {
            let name = format!("redis-migration-{}-{}", plan.uid, std::process::id());
            let folder = std::env::temp_dir().join(name);
            Ok((folder.clone(), Some(RemoveFolder(folder))))
        }
    }
}

struct RemoveFolder(PathBuf);

impl Drop for RemoveFolder {
    fn drop(&mut self) {
        // It exists only if the spool needed the disk; the workers' own folders in it are gone already.
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Run {
    fn start(
        plan: Arc<Plan>,
        options: RunOptions,
        state: State,
        report: PreflightReport,
        setups: Vec<WorkerSetup>,
        known: Vec<KnownShard>,
    ) -> Self {
        let mut shards = Vec::with_capacity(setups.len());
        let topology = report.source.as_ref().map(|source| &source.topology);
        for (index, setup) in setups.iter().enumerate() {
            let slots = topology
                .filter(|topology| topology.is_cluster())
                .and_then(|topology| topology.shards.get(index))
                .map(|shard| shard.slots.to_string());
            shards.push(Shard {
                id: setup.shard.clone(),
                slots: slots.unwrap_or_default(),
                source: setup.source.clone(),
                watch: setup.source_shard.clone(),
                dialer: setup.source_dialer.clone(),
                progress: ShardProgress::new(),
            });
        }
        let mut run = Self {
            plan,
            options,
            state,
            report,
            shards,
            workers: JoinSet::new(),
            left: BTreeMap::new(),
            known,
            setups,
            restarts: 0,
            drain: watch::Sender::new(false),
            adopted: watch::Sender::new(0),
            last_progress: (Instant::now(), (0, 0)),
            settled_resyncs: 0,
        };
        (0..run.setups.len()).for_each(|index| run.start_worker(index));
        run
    }

    fn start_worker(&mut self, index: usize) {
        let (Some(setup), Some(shard)) = (self.setups.get(index), self.shards.get(index)) else { return };
        let (setup, progress) = (setup.clone(), Arc::clone(&shard.progress));
        let asked = self.drain.subscribe();
        let work = async move { (index, worker::run(setup, progress, asked).await) };
        self.workers.spawn(work.in_current_span());
    }

    /// What arrived was damaged: the worker begins anew with a full sync, as often as the policy allows. A
    /// first snapshot that never stood on the target replaces nothing.
    fn start_again(&mut self, index: usize, failed: worker::Failed) -> Result<(), Ended> {
        let worker::Failed { error, left } = failed;
        if error.calls_for_restart()
            && let Some(setup) = self.setups.get_mut(index)
        {
            tracing::warn!(shard = %setup.shard, %error, "going on from the source's backlog");
            setup.resume = left.checkpoint;
            setup.anew = false;
            self.start_worker(index);
            return Ok(());
        }
        let policy = self.plan.failure_policy;
        let stood = |shard: &Shard| shard.numbers().phase == ShardPhase::IncrementalSync;
        let allowed = policy.on_full_resync == FullResyncPolicy::Allow
            || self.setups.get(index).is_some_and(|setup| setup.resume.is_none())
                && self.shards.get(index).is_some_and(|shard| !stood(shard));
        let again = error.calls_for_resync() && self.restarts < policy.backoff_limit && allowed;
        let Some(setup) = self.setups.get_mut(index).filter(|_| again) else {
            let shard = self.shards.get(index).map(|shard| shard.id.clone());
            self.left.extend(shard.zip(left.checkpoint));
            return Err(Ended::Worker(error));
        };
        tracing::warn!(shard = %setup.shard, %error, "starting again with a full sync");
        setup.resume = None;
        setup.restarted = true;
        setup.anew = true;
        self.restarts += 1;
        self.start_worker(index);
        Ok(())
    }

    /// Everything between preflight and the end.
    async fn live(&mut self) -> Result<Outcome, Ended> {
        self.state.phase(Phase::FullSync, "copying the snapshot");
        self.state.set(conditions::RECONCILING, true, reason::FULL_SYNC, "copying the snapshot");
        let shards = self.shards.clone();
        self.until(async move {
            for shard in &shards {
                let mut numbers = shard.progress.numbers.subscribe();
                // An error means that the worker is gone: its own result says why.
                let _ = numbers.wait_for(|numbers| numbers.phase == ShardPhase::IncrementalSync).await;
            }
        })
        .await?;
        self.state.set(
            conditions::FULL_SYNCED,
            true,
            reason::INCREMENTAL_SYNC,
            "the snapshot stands on the target",
        );
        self.state.phase(Phase::IncrementalSync, "catching up");
        let shards = self.shards.clone();
        self.until(async move { settle(&shards).await }).await?;
        self.state.gather(&self.shards);
        let message = format!("in sync, {} shard(s)", self.shards.len());
        self.state.set(conditions::IN_SYNC, true, reason::INCREMENTAL_SYNC, &message);
        self.state.remove(conditions::RECONCILING);
        self.state.set(conditions::READY, true, reason::INCREMENTAL_SYNC, &message);
        self.state.phase(Phase::IncrementalSync, &message);

        loop {
            let verification = self.plan.verification;
            if let Some(outcome) = self.verify().await? {
                return Ok(outcome);
            }
            if self.options.until == Until::InSync {
                self.nothing_moved()?;
                self.nothing_refused()?;
                return Ok(Outcome::Done);
            }
            if let Some(outcome) = self.cut_over(verification).await? {
                return Ok(outcome);
            }
        }
    }

    /// `Some`: what was found ends the run. A failover of the source in the middle starts it again.
    async fn verify(&mut self) -> Result<Option<Outcome>, Ended> {
        let mut repeats = 0;
        let verified = loop {
            let places = self.places();
            let Some(verified) = self.verify_once().await? else { return Ok(None) };
            let moved = self.places() != places;
            match verified {
                Err(error) if error.is_transient() && (moved || repeats < VERIFY_REPEATS) => {
                    tracing::warn!(%error, "verification broke off, starting it again");
                    repeats += u32::from(!moved);
                    let shards = self.shards.clone();
                    self.until(async move { settle(&shards).await }).await?;
                }
                verified => break verified,
            }
        };
        match verified {
            Ok(report) => {
                let passed = verification::show_report(&mut self.state, &self.plan, &report);
                self.state.phase(Phase::IncrementalSync, "in sync");
                let follow_on =
                    self.plan.cutover.mode == CutoverMode::Never && self.options.until == Until::Finished;
                Ok((!passed && !follow_on).then(|| Outcome::Differences { count: report.differences() }))
            }
            Err(VerifyError::Stopped) => Err(Ended::Stop),
            Err(error) => {
                Err(Ended::Other { reason: reason::VERIFICATION_FAILED, message: error.to_string() })
            }
        }
    }

    /// `None`: the plan asks for no verification.
    async fn verify_once(&mut self) -> Result<Option<Result<VerifyReport, VerifyError>>, Ended> {
        let shards = Arc::new(self.shards.clone());
        let hook: Settle = Arc::new(move || {
            let shards = Arc::clone(&shards);
            async move { settle(&shards).await }.boxed()
        });
        let input = verification::input(&self.plan, &self.report, &self.shards, hook)
            .map_err(|MigrationError { reason, message, .. }| Ended::Other { reason, message })?;
        let Some(input) = input else { return Ok(None) };
        self.state.phase(Phase::Verifying, "comparing source and target");
        let (_stop, stopped) = watch::channel(false);
        let (progress, seen) = watch::channel(VerifyProgress::default());
        let mut verified = Err(VerifyError::Stopped);
        {
            let verified = &mut verified;
            let job = async move { *verified = verify(input, progress, stopped).await };
            self.until_with(job, |state| {
                let progress = *seen.borrow();
                verification::show_progress(state, &progress);
            })
            .await?;
        }
        Ok(Some(verified))
    }

    /// Where each shard is written to and read from now.
    fn places(&self) -> Vec<(Address, Address)> {
        self.shards.iter().map(|shard| (shard.master(), shard.reader())).collect()
    }

    /// Keys of slots that changed hands may be missing on the target.
    fn nothing_moved(&mut self) -> Result<(), Ended> {
        let Some(message) = degraded::moved(&self.shards) else { return Ok(()) };
        self.state.set(conditions::DEGRADED, true, reason::SLOTS_MOVED, &message);
        self.state.set(conditions::CUTOVER_READY, false, reason::SLOTS_MOVED, &message);
        Err(Ended::Other { reason: reason::SLOTS_MOVED, message })
    }

    /// The target lacks what it did not take: a cutover would lose it.
    fn nothing_refused(&mut self) -> Result<(), Ended> {
        self.state.gather(&self.shards);
        let refused = self.state.status.quarantine.commands;
        if refused == 0 {
            return Ok(());
        }
        let message = format!(
            "{refused} command(s) or key(s) were not taken by the target (status.quarantine): it lacks them, no cutover"
        );
        self.state.set(conditions::CUTOVER_READY, false, reason::COMMANDS_QUARANTINED, &message);
        Err(Ended::Other { reason: reason::COMMANDS_QUARANTINED, message })
    }

    async fn until(&mut self, job: impl Future<Output = ()>) -> Result<(), Ended> {
        self.until_with(job, |_| {}).await
    }

    /// Waits for `job`, and meanwhile reports, heeds the stop request and watches the workers.
    async fn until_with(
        &mut self,
        job: impl Future<Output = ()>,
        mut report: impl FnMut(&mut State),
    ) -> Result<(), Ended> {
        let mut job = std::pin::pin!(job);
        let mut stop = self.options.stop.clone();
        let mut plans = self.options.plans.clone();
        let mut tick = tokio::time::interval(GATHER);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut job => return Ok(()),
                Ok(_) = stop.wait_for(|stop| *stop != StopRequest::Run) => return Err(Ended::Stop),
                plan = live::newer(&mut plans, &self.plan) => self.adopt(plan),
                Some(ended) = self.workers.join_next() => match ended {
                    Ok((_, Ok(_))) => return Err(Ended::Stop),
                    Ok((index, Err(failed))) => self.start_again(index, failed)?,
                    Err(error) => {
                        let message = format!("a shard worker ended by itself: {error}");
                        return Err(Ended::Other { reason: reason::ABORTED, message });
                    }
                },
                _ = tick.tick() => {
                    report(&mut self.state);
                    self.observe()?;
                }
            }
        }
    }

    fn observe(&mut self) -> Result<(), Ended> {
        self.state.gather(&self.shards);
        let causes = degraded::causes(&self.shards, &self.state.status);
        if let Some((reason, _)) = causes.first() {
            let messages: Vec<&str> = causes.iter().map(|(_, message)| message.as_str()).collect();
            self.state.set(conditions::DEGRADED, true, reason, &messages.join("; "));
        } else {
            // The only cause that passes.
            self.state.remove_reason(conditions::DEGRADED, reason::SPOOL_FULL);
        }
        let resyncs: u64 = self.shards.iter().map(|shard| shard.link().full_resyncs).sum();
        let moved: u64 = self
            .shards
            .iter()
            .map(|shard| shard.numbers())
            .map(|numbers| {
                numbers.keys
                    + numbers.commands
                    + numbers.snapshot_read
                    + numbers.applied_offset.unsigned_abs()
            })
            .sum();
        let idle = |shard: &Shard| {
            let numbers = shard.numbers();
            is_in_sync(&numbers, &shard.link()) && numbers.lag_bytes == 0
        };
        let policy = self.plan.failure_policy;
        if self.shards.iter().all(|shard| shard.numbers().phase == ShardPhase::IncrementalSync) {
            self.settled_resyncs = resyncs;
        }
        // What is replayed time and again is no progress; only a new full sync starts again from 0, and not
        // for ever, should none of them come to its end.
        let resyncs = resyncs.min(self.settled_resyncs + u64::from(policy.backoff_limit));
        if (resyncs, moved) > self.last_progress.1 {
            self.last_progress = (Instant::now(), (resyncs, moved));
        } else if self.shards.iter().all(idle) {
            self.last_progress.0 = Instant::now();
        }
        let deadline = Duration::from_secs(policy.progress_deadline_seconds);
        if !deadline.is_zero() && self.last_progress.0.elapsed() > deadline {
            let mut last = self.state.status.shards.iter().map(|shard| shard.last_error.as_str());
            let last = last.find(|error| !error.is_empty()).unwrap_or("no error was reported");
            let message = format!("no progress for {} s: {last}", policy.progress_deadline_seconds);
            return Err(Ended::Other { reason: reason::DEADLINE_EXCEEDED, message });
        }
        Ok(())
    }

    /// Stops the workers, keeps the checkpoint where it is of use, says how it ended.
    async fn end(mut self, result: Result<Outcome, Ended>) -> Outcome {
        let checkpoints = self.stop_workers().await;
        self.state.gather(&self.shards);
        let finished = matches!(result, Ok(Outcome::Done)) && self.options.until == Until::Finished;
        if finished && self.plan.delivery == Delivery::ExactlyOnce {
            let lineages = self.setups.iter().map(|setup| setup.lineage.as_str());
            if let Err(error) = kept::remove(&self.plan, &setup::target_dialer(&self.plan), lineages).await {
                tracing::warn!(%error, "keys that begin with redis-migration: stay on the target");
            }
        }
        let mut kept = false;
        if let Some(data_dir) = self.options.data_dir.clone() {
            let written = if finished {
                checkpoints::clear(&data_dir, &self.plan.uid)
            } else {
                kept = checkpoints.len() == self.shards.len();
                // A key that was the target's own must not pass for one of ours in the next run.
                let begun = !matches!(&result, Err(Ended::Worker(WorkerError::KeyExists { .. })));
                let left = Checkpoints { begun, shards: checkpoints, known: std::mem::take(&mut self.known) };
                checkpoints::save(&data_dir, &self.plan.uid, &left)
            };
            if let Err(error) = written {
                tracing::error!("{error}");
                kept = false;
            }
        }
        match result {
            Ok(Outcome::Done) if finished => {
                self.state.finish(
                    Phase::Completed,
                    true,
                    reason::COMPLETED,
                    "completed: the target has everything",
                );
                Outcome::Done
            }
            Ok(Outcome::Differences { count }) => {
                let message = format!("source and target differ in {count} key(s)");
                self.state.finish(Phase::Failed, false, reason::VERIFICATION_FAILED, &message);
                Outcome::Differences { count }
            }
            Ok(outcome) => {
                self.state.publish();
                outcome
            }
            Err(Ended::Stop) => {
                let message = match (kept, &self.options.data_dir) {
                    (true, _) => "stopped; started again with the same data-dir it goes on",
                    (false, None) => "stopped; without --data-dir no checkpoint is kept",
                    (false, Some(_)) => {
                        "stopped before the snapshot stood: started again with the same data-dir it copies anew"
                    }
                };
                tracing::info!("{message}");
                self.state.status.message = message.to_owned();
                self.state.publish();
                Outcome::Stopped
            }
            Err(Ended::Worker(WorkerError::Fenced(message))) => {
                failed(&mut self.state, reason::ABORTED, message.clone());
                Outcome::Superseded { message }
            }
            Err(Ended::Worker(error)) => {
                let (reason, mut message) = (reason_of(&error), error.to_string());
                if matches!(error, WorkerError::KeyExists { .. })
                    && self.plan.target.existing_keys == ExistingKeys::Fail
                {
                    message.push_str("; keys copied so far stay on the target");
                }
                failed(&mut self.state, reason, message)
            }
            Err(Ended::Other { reason, message }) => failed(&mut self.state, reason, message),
        }
    }

    async fn stop_workers(&mut self) -> BTreeMap<String, Checkpoint> {
        self.drain.send_replace(true);
        let mut checkpoints = std::mem::take(&mut self.left);
        while let Some(ended) = self.workers.join_next().await {
            let (index, stopped) = match ended {
                Ok((index, Ok(stopped))) => (index, stopped),
                Ok((index, Err(worker::Failed { error, left }))) => {
                    tracing::warn!(%error, "a shard worker ended with an error");
                    (index, left)
                }
                Err(error) => {
                    tracing::error!(%error, "a shard worker ended by itself");
                    continue;
                }
            };
            let shard = self.shards.get(index).map(|shard| shard.id.clone());
            checkpoints.extend(shard.zip(stopped.checkpoint));
        }
        checkpoints
    }
}

fn reason_of(error: &WorkerError) -> &'static str {
    let connection = |error: &ConnectionError, unreachable| {
        if error.is_auth() { reason::AUTH_FAILED } else { unreachable }
    };
    match error {
        WorkerError::Source(ReplicationError::Connection(error)) => {
            connection(error, reason::SOURCE_UNREACHABLE)
        }
        WorkerError::Source(ReplicationError::Refused { .. }) => reason::AUTH_FAILED,
        WorkerError::Source(ReplicationError::FullResyncForbidden { .. }) => reason::FULL_RESYNC_FORCED,
        WorkerError::Source(_) => reason::SOURCE_UNREACHABLE,
        WorkerError::KeyExists { .. } => reason::TARGET_NOT_EMPTY,
        WorkerError::TooManyRefused { .. } => reason::COMMANDS_QUARANTINED,
        WorkerError::Target(_) | WorkerError::FellBack { .. } => reason::TARGET_UNREACHABLE,
        WorkerError::LostState { .. } | WorkerError::Overtaken { .. } => reason::FULL_RESYNC_FORCED,
        WorkerError::Fenced(_) => reason::ABORTED,
        WorkerError::Denied(_) => reason::AUTH_FAILED,
        WorkerError::Spool(_)
        | WorkerError::Rdb { .. }
        | WorkerError::Checksum { .. }
        | WorkerError::SnapshotEnd { .. }
        | WorkerError::Stream { .. } => reason::ABORTED,
    }
}
