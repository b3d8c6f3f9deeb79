//! The life of one run: preflight, workers, phases, verification, cutover, outcome.

mod comparing;
mod ending;
mod live;
mod preparing;
mod watching;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::checkpoints::{self, Checkpoints, SetAside};
use super::cutover::Measured;
use super::degraded;
use super::identity::KnownShard;
use super::standing::{self, Standing};
use super::state::{Shard, State};
use super::territory;
use super::verification::{self, failed, released, settle};
use super::{MigrationError, Observers, Outcome, RunOptions, StopRequest, Until};
use crate::api::conditions::{self, reason};
use crate::api::plan::{CutoverMode, ExistingKeys, FullResyncPolicy};
use crate::api::{Phase, Plan};
use crate::connection::Address;
use crate::preflight::PreflightReport;
use crate::verify::{DifferenceKind, Settle, VerifyError, VerifyProgress, VerifyReport, verify};
use crate::worker::{
    self, Feed, Numbers, Order, ShardPhase, ShardProgress, Stopped, WorkerError, WorkerSetup,
};
pub(super) use ending::reason_of;
pub(super) use live::newer;
pub(super) use preparing::spool_setup;
use preparing::{Prepared, prepare};
use watching::poll_until;

/// A verification that lost a server that did not move is started again this often.
const VERIFY_REPEATS: u32 = 3;
/// Before a worker begins again: each time the source may send everything.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

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
    /// How workers that could not go on left their shards, by shard id.
    left: BTreeMap<String, Stopped>,
    /// What another run recognises the shards by.
    known: Vec<KnownShard>,
    /// To start a worker again, in the order of `shards`.
    setups: Vec<WorkerSetup>,
    restarts: u32,
    drain: watch::Sender<bool>,
    /// Counts what calls for another look: plans that were adopted while running, shards that are in sync again.
    changes: watch::Sender<u64>,
    /// When anything moved last, and how far it was then: full resyncs, and the sum of all counts.
    last_progress: (Instant, (u64, u64)),
    /// How often shards were given to other processes.
    moves: u64,
    /// From when on all shards were in sync once.
    standing: Option<Standing>,
    /// Slots that had been taken over from other shards when everything was compared last, and full resyncs
    /// by then.
    compared_adoptions: u64,
    compared_resyncs: u64,
    /// What the last verification took; `None`: there was none.
    measured: Option<Measured>,
    /// As the data directory has it.
    set_aside: SetAside,
    /// Why that could not be kept, as it was logged.
    unkept: String,
    /// Full resyncs by the time that all shards had their snapshot last.
    settled_resyncs: u64,
}

pub async fn run(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    let mut state = State::open(&plan, options.earlier.as_ref(), "not in sync yet", observers);
    let mut stop = options.stop.clone();
    // Nothing is changed yet on either side.
    let prepared = tokio::select! {
        prepared = prepare(&plan, &options, &mut state) => Some(prepared),
        Ok(_) = stop.wait_for(|stop| *stop != StopRequest::Run) => None,
    };
    let Prepared { report, setups, known, set_aside, temporary: _temporary } = match prepared {
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
    let begun = Checkpoints::begun(&plan, known.clone(), set_aside.clone());
    if let Some(data_dir) = &options.data_dir
        && let Err(error) = checkpoints::save(data_dir, &plan.uid, &begun)
    {
        return failed(&mut state, reason::PREFLIGHT_FAILED, error.to_string());
    }
    let mut run = Run::start(plan, options, state, report, setups, (known, set_aside));
    let outcome = run.live().await;
    run.end(outcome).await
}

impl Run {
    fn start(
        plan: Arc<Plan>,
        mut options: RunOptions,
        state: State,
        report: PreflightReport,
        setups: Vec<WorkerSetup>,
        (known, set_aside): (Vec<KnownShard>, SetAside),
    ) -> Self {
        let mut shards = Vec::with_capacity(setups.len());
        let topology = report.source.as_ref().map(|source| &source.topology);
        for (index, setup) in setups.iter().enumerate() {
            // Files have a run of their own.
            let Some(upstream) = setup.feed.upstream() else { continue };
            let slots = topology
                .filter(|topology| topology.is_cluster())
                .and_then(|topology| topology.shards.get(index))
                .map(|shard| shard.slots.to_string());
            shards.push(Shard {
                id: setup.shard.clone(),
                slots: slots.unwrap_or_default(),
                source: upstream.address.clone(),
                watch: upstream.shard.clone(),
                dialer: upstream.dialer.clone(),
                progress: ShardProgress::new(),
            });
        }
        // What the target lacked it lacks until it is copied anew, whoever works on it.
        let told = options.earlier.iter().flat_map(|earlier| &earlier.shards);
        for (id, lacks) in told.map(|told| (&told.id, &told.set_aside)).chain(&set_aside) {
            // A shard by another name is one of these, and it does not matter to the whole which.
            let shard = shards.iter().find(|shard| shard.id == *id).or_else(|| shards.first());
            shard.into_iter().for_each(|shard| shard.progress.has_lacked(lacks));
        }
        // A scan is asked things that no other process would hear.
        if setups.iter().any(|setup| matches!(setup.feed, Feed::Scan(..))) {
            options.placement = None;
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
            changes: watch::Sender::new(0),
            last_progress: (Instant::now(), (0, 0)),
            moves: 0,
            standing: None,
            compared_adoptions: 0,
            compared_resyncs: 0,
            measured: None,
            set_aside,
            unkept: String::new(),
            settled_resyncs: 0,
        };
        if let Some(placement) = &run.options.placement {
            placement.begin(&run.setups);
        }
        (0..run.setups.len()).for_each(|index| run.start_worker(index, Duration::ZERO));
        run
    }

    fn start_worker(&mut self, index: usize, pause: Duration) {
        let (Some(setup), Some(shard)) = (self.setups.get(index), self.shards.get(index)) else { return };
        let (setup, progress) = (setup.clone(), Arc::clone(&shard.progress));
        let asked = self.drain.subscribe();
        let placement = self.options.placement.clone();
        let mut drain = self.drain.subscribe();
        let work = async move {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                Ok(_) = drain.wait_for(|drain| *drain) => {}
            }
            let ended = match placement {
                Some(placement) => placement.run(setup, progress, asked).await,
                None => worker::run(setup, progress, asked).await,
            };
            (index, ended)
        };
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
            self.start_worker(index, RESTART_PAUSE);
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
            self.left.extend(shard.map(|shard| (shard, left)));
            return Err(Ended::Worker(error));
        };
        tracing::warn!(shard = %setup.shard, %error, "starting again with a full sync");
        setup.resume = None;
        setup.restarted = true;
        setup.anew = true;
        self.restarts += 1;
        self.start_worker(index, RESTART_PAUSE);
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
        self.say_full_synced();
        self.state.phase(Phase::IncrementalSync, "catching up");
        let shards = self.shards.clone();
        self.until(async move { settle(&shards).await }).await?;
        self.state.gather(&self.shards);
        self.say_in_sync();
        self.standing = Some(Standing::default());

        loop {
            self.slots_at_rest().await?;
            let verification = self.plan.verification;
            if let Some(outcome) = self.verify().await? {
                return Ok(outcome);
            }
            if self.options.until == Until::InSync {
                self.slots_at_rest().await?;
                self.nothing_moved()?;
                self.nothing_refused()?;
                if self.changed_since_compared() {
                    continue;
                }
                // Otherwise another run goes on from here to the cutover.
                if self.plan.cutover.mode == CutoverMode::Never {
                    while !self.release().await? {}
                }
                return Ok(Outcome::Done);
            }
            if let Some(outcome) = self.cut_over(verification).await? {
                return Ok(outcome);
            }
        }
    }

    /// `Some`: what was found ends the run. A failover of the source in the middle starts it again.
    async fn verify(&mut self) -> Result<Option<Outcome>, Ended> {
        let (mut repeats, mut repairs) = (0, 0);
        self.begin_comparing().await?;
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
                // A slot on its way is not equal on both sides.
                Ok(report)
                    if report.differences() > self.plan.verification.max_differences
                        && self.slots_moved_since_compared() =>
                {
                    tracing::warn!("slots of the source moved during the verification, starting it again");
                    self.slots_at_rest().await?;
                    self.begin_comparing().await?;
                }
                Ok(_) if self.copied_since_compared() => {
                    tracing::warn!("a shard was copied again during the verification, starting it again");
                    self.begin_comparing().await?;
                }
                Ok(report) if self.may_repair(&report, repairs) => {
                    repairs += 1;
                    self.repair(&report).await?;
                }
                verified => break verified,
            }
        };
        match verified {
            Ok(report) => {
                let passed = verification::show_report(&mut self.state, &self.plan, &report, "");
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

    /// What comes from here on, everything has to be compared for again.
    async fn begin_comparing(&mut self) -> Result<(), Ended> {
        while self.copied_since_compared() || !standing::in_step(&self.shards) {
            self.compared_resyncs = standing::resyncs(&self.shards);
            let shards = self.shards.clone();
            self.until(async move {
                settle(&shards).await;
                poll_until(|| standing::in_step(&shards)).await;
            })
            .await?;
        }
        self.compared_adoptions = adoptions(&self.shards);
        Ok(())
    }

    fn copied_since_compared(&self) -> bool {
        standing::resyncs(&self.shards) > self.compared_resyncs
    }

    /// Since then keys came to the target that nobody compared.
    fn changed_since_compared(&self) -> bool {
        self.copied_since_compared() || adoptions(&self.shards) > self.compared_adoptions
    }

    fn may_repair(&self, report: &VerifyReport, repairs: u32) -> bool {
        let verification = self.plan.verification;
        if !verification.repair || repairs >= verification.rounds || self.repairable(report).is_empty() {
            return false;
        }
        // A worker in another process is not told which keys.
        let here = self.shards.iter().all(|shard| shard.progress.seat.borrow().worker.is_empty());
        if !here {
            tracing::warn!("keys that differ are not repaired: shards run in other replicas of the operator");
        }
        here
    }

    /// Keys that differ and are not the target's own by right.
    fn repairable(&self, report: &VerifyReport) -> Vec<(u64, Vec<u8>)> {
        let existing = self.plan.target.existing_keys;
        let ours = |kind: DifferenceKind| match kind {
            DifferenceKind::Missing => true,
            DifferenceKind::Different => existing != ExistingKeys::Skip,
            DifferenceKind::Extra => existing == ExistingKeys::Fail,
        };
        let keys = report.differing.keys.iter().filter(|(_, _, kind)| ours(*kind));
        keys.map(|(db, key, _)| (*db, key.clone())).collect()
    }

    /// Has each shard copy its keys again, while its stream goes on.
    async fn repair(&mut self, report: &VerifyReport) -> Result<(), Ended> {
        // Asked for after the shards were shared out.
        if self.shards.iter().any(|shard| !shard.progress.seat.borrow().worker.is_empty()) {
            tracing::warn!(
                "not repaired: other replicas work on shards; suspend the migration and go on with it first"
            );
            return Ok(());
        }
        let keys = Arc::new(self.repairable(report));
        let message = format!("copying {} key(s) again that differ", keys.len());
        tracing::warn!("{message}");
        self.state.phase(Phase::Verifying, &message);
        let mut numbers = Vec::new();
        for shard in &self.shards {
            shard.progress.repair.send_modify(|order| {
                *order = Order { number: order.number + 1, keys: Arc::clone(&keys) };
                numbers.push(order.number);
            });
        }
        let shards = self.shards.clone();
        self.until(async move {
            for (shard, number) in shards.iter().zip(numbers) {
                let done = |numbers: &Numbers| numbers.orders_done >= number;
                // An error means that the worker is gone: its own result says why.
                let _ = shard.progress.numbers.subscribe().wait_for(done).await;
            }
        })
        .await?;
        let repaired: u64 = self.shards.iter().map(|shard| shard.numbers().repaired).sum();
        self.state.status.verification.repaired = i64::try_from(repaired).unwrap_or(i64::MAX);
        Ok(())
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
        if let Ok(report) = &verified {
            self.measured = Some(Measured { took: report.took, keys: seen.borrow().keys_total });
        }
        Ok(Some(verified))
    }

    /// Where each shard is written to and read from now.
    fn places(&self) -> Vec<(Address, Address)> {
        self.shards.iter().map(|shard| (shard.master(), shard.reader())).collect()
    }

    /// Until every slot of the source is followed where it is served, if waiting can bring that about.
    async fn slots_at_rest(&mut self) -> Result<(), Ended> {
        if self.follows_slots() {
            let shards = self.shards.clone();
            let at_rest = move || degraded::moved(&shards).is_none() || degraded::stuck(&shards).is_some();
            self.until(poll_until(at_rest)).await?;
        }
        Ok(())
    }

    fn slots_moved_since_compared(&self) -> bool {
        let moving = degraded::moved(&self.shards).is_some() && degraded::stuck(&self.shards).is_none();
        self.follows_slots() && (moving || adoptions(&self.shards) > self.compared_adoptions)
    }

    /// Slots that move can be copied: not where own and foreign keys of the target cannot be told apart, or
    /// other databases than the first may hold keys.
    fn follows_slots(&self) -> bool {
        let databases = self.report.source.as_ref().and_then(|source| source.topology.databases);
        self.plan.target.existing_keys != ExistingKeys::Skip && databases.is_none_or(|count| count <= 1)
    }

    /// Tells each worker which slots of the source are its own.
    fn share_out_slots(&self) {
        let holdings = degraded::holdings(&self.shards);
        if !self.follows_slots() || holdings.is_empty() || territory::at_rest(&holdings) {
            return;
        }
        for (shard, slots) in self.shards.iter().zip(territory::wanted(&holdings)) {
            shard.progress.wanted.send_if_modified(|wanted| {
                let news = wanted.as_ref() != Some(&slots);
                *wanted = Some(slots);
                news
            });
        }
    }

    /// Has the keys on the target given their own expiries back. False: the plan changed before they were.
    async fn release(&mut self) -> Result<bool, Ended> {
        let message = "giving keys on the target their own expiries back";
        self.state.phase(Phase::IncrementalSync, message);
        for shard in &self.shards {
            shard.progress.release.send_replace(true);
        }
        let shards = self.shards.clone();
        self.until_changed(async move {
            for shard in &shards {
                released(shard).await;
            }
        })
        .await
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
}

/// How often slots were taken over from another shard.
fn adoptions(shards: &[Shard]) -> u64 {
    shards.iter().map(|shard| shard.following().adoptions).sum()
}
