//! What a run does while its plan may still change: waiting for the approval, the cutover, a new plan.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::comparing::Compared;
use super::watching::poll_until;
use super::{Ended, Run, StopRequest, adoptions};
use crate::api::conditions::{self, reason};
use crate::api::plan::{CutoverMode, CutoverPlan, VerificationPlan};
use crate::api::status::CutoverStatus;
use crate::api::{Phase, Plan};
use crate::connection::ConnectionError;
use crate::migration::Outcome;
use crate::migration::cutover::{self, Paused, Pauses};
use crate::migration::state::{Shard, now};
use crate::migration::verification::heard;
use crate::migration::{degraded, standing};
use crate::worker::WorkerError;

/// Between two attempts of a cutover, so that writers are not held again at once.
const PAUSE_AGAIN: Duration = Duration::from_secs(30);

/// What became of a cutover.
pub(super) enum Switch {
    Done,
    /// More than the plan allows, found with writes paused.
    Differs {
        count: u64,
    },
    NotDone {
        why: String,
    },
    /// Not by trying again: the plan has to change.
    Impossible {
        why: String,
    },
}

/// The plan that replaces `current`; waits for one, for ever where none can come.
pub(in crate::migration) async fn newer(
    plans: &mut Option<watch::Receiver<Arc<Plan>>>,
    current: &Arc<Plan>,
) -> Arc<Plan> {
    let Some(plans) = plans else { return std::future::pending().await };
    let newer = plans.wait_for(|plan| !Arc::ptr_eq(plan, current)).await.map(|plan| Arc::clone(&plan));
    match newer {
        Ok(plan) => plan,
        // Nobody is left who could change it.
        Err(_) => std::future::pending().await,
    }
}

/// Waits for a plan that wants no cutover.
async fn withdrawn(plans: Option<watch::Receiver<Arc<Plan>>>) {
    let Some(mut plans) = plans else { return std::future::pending().await };
    if plans.wait_for(|plan| !plan.cutover.goes_ahead()).await.is_err() {
        std::future::pending().await
    }
}

impl Run {
    /// Takes up the newest plan, which nobody may have waited for yet.
    fn adopt_newest(&mut self) {
        let newest = self.options.plans.as_ref().map(|plans| Arc::clone(&plans.borrow()));
        if let Some(plan) = newest.filter(|plan| !Arc::ptr_eq(plan, &self.plan)) {
            self.adopt(plan);
        }
    }

    /// Takes up what may change while running: cutover, verification, policies, limits of lanes and turns.
    pub(super) fn adopt(&mut self, plan: Arc<Plan>) {
        for setup in &mut self.setups {
            setup.lane.set(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
            setup.lane.pace().set(plan.limits.bytes_per_second, plan.limits.keys_per_second);
            setup.turns.set(plan.limits.parallel_shards, plan.limits.source);
            setup.max_quarantined = plan.failure_policy.max_quarantined;
        }
        tracing::info!(generation = plan.generation, "the changed spec holds from here on");
        self.state.judge_by(&plan);
        self.plan = plan;
        self.changes.send_modify(|count| *count += 1);
        self.state.publish();
    }

    /// Another plan may have come meanwhile: it holds from here on.
    fn still_asks_for(&mut self, cutover: CutoverPlan, verification: VerificationPlan) -> bool {
        self.adopt_newest();
        self.plan.cutover == cutover && self.plan.verification == verification
    }

    /// `None`: the verification that is asked for is no longer `verified`, the one that was made.
    pub(super) async fn cut_over(&mut self, verified: VerificationPlan) -> Result<Option<Outcome>, Ended> {
        let mut attempts = 0;
        loop {
            if self.plan.verification != verified {
                return Ok(None);
            }
            let plan = self.plan.cutover;
            let never = plan.mode == CutoverMode::Never;
            if !never {
                self.nothing_refused()?;
                self.slots_at_rest().await?;
                self.nothing_moved()?;
            }
            if self.changed_since_compared()
                && let Some(outcome) = self.verify().await?
            {
                return Ok(Some(outcome));
            }
            if never {
                self.state.remove(conditions::CUTOVER_READY);
                self.follow("in sync; following until stopped").await?;
                continue;
            }
            if !self.lag_is_low(plan).await? {
                continue;
            }
            let message = "lag is within the cutover's limits";
            self.state.set(conditions::CUTOVER_READY, true, reason::INCREMENTAL_SYNC, message);
            if !plan.goes_ahead() {
                let message = "in sync; waiting for spec.cutover.approved";
                self.state.set(conditions::CUTOVER_READY, true, reason::AWAITING_APPROVAL, message);
                self.follow(message).await?;
                continue;
            }
            // Nothing is given back for a cutover that cannot be.
            let switch = match self.cannot_pause(plan).await? {
                Some(switch) => switch,
                None => {
                    // With the writes still going on, as it takes its time.
                    if !self.still_asks_for(plan, verified) || !self.release().await? {
                        continue;
                    }
                    if !self.still_asks_for(plan, verified)
                        || self.changed_since_compared()
                        || !standing::in_step(&self.shards)
                    {
                        continue;
                    }
                    self.pause_and_drain(plan).await?
                }
            };
            let why = match switch {
                Switch::Done => return Ok(Some(Outcome::Done)),
                Switch::Differs { count } => return Ok(Some(Outcome::Differences { count })),
                Switch::NotDone { why } => why,
                // What would have been waited for came while it was tried.
                Switch::Impossible { .. } if self.plan.cutover != plan => continue,
                Switch::Impossible { why } if self.options.plans.is_none() => {
                    return Err(Ended::Other { reason: reason::PAUSE_TIMEOUT, message: why });
                }
                Switch::Impossible { why } => {
                    self.state.set(conditions::CUTOVER_READY, false, reason::PAUSE_TIMEOUT, &why);
                    self.follow(&why).await?;
                    continue;
                }
            };
            self.adopt_newest();
            if !self.plan.cutover.goes_ahead() {
                continue;
            }
            attempts += 1;
            // A single run ends here, so that whoever started it decides.
            if self.options.plans.is_none() || attempts > self.plan.failure_policy.backoff_limit {
                return Err(Ended::Other { reason: reason::PAUSE_TIMEOUT, message: why });
            }
            self.state.set(conditions::CUTOVER_READY, false, reason::PAUSE_TIMEOUT, &why);
            let message = format!("{why}; the cutover is tried again in {} s", PAUSE_AGAIN.as_secs());
            self.state.phase(Phase::IncrementalSync, &message);
            self.until_changed(tokio::time::sleep(PAUSE_AGAIN)).await?;
        }
    }

    /// Until it is stopped, the plan changes, shards are in sync again that were not, or slots that moved
    /// between shards of the source have come to rest.
    async fn follow(&mut self, message: &str) -> Result<(), Ended> {
        self.state.phase(Phase::IncrementalSync, message);
        let (shards, compared) = (self.shards.clone(), self.compared_adoptions);
        let moved = poll_until(move || adoptions(&shards) > compared && degraded::moved(&shards).is_none());
        self.until_changed(moved).await?;
        Ok(())
    }

    /// `Some`: a source refuses to pause its writes.
    async fn cannot_pause(&mut self, plan: CutoverPlan) -> Result<Option<Switch>, Ended> {
        if !plan.pause_source_writes {
            return Ok(None);
        }
        let (shards, asked) = (self.shards.clone(), Arc::clone(&self.plan));
        let mut refusal = None;
        {
            let refusal = &mut refusal;
            self.until(async move { *refusal = cutover::refusal(&shards).await }).await?;
        }
        refusal.map(|refusal| self.judge(Some(Ok(refusal)), None, &asked)).transpose()
    }

    /// Unless it is done, writes go on at the source.
    async fn pause_and_drain(&mut self, plan: CutoverPlan) -> Result<Switch, Ended> {
        let shards = self.shards.clone();
        // No writer is made to wait while a worker in another process cannot be heard.
        self.until(async move { heard(&shards).await }).await?;
        self.state.status.cutover.start_time = Some(now());
        self.state.phase(Phase::CuttingOver, "pausing writes to the source, draining, comparing");
        // Of the plan that was verified, should another come meanwhile.
        let (asked, comparison) = (Arc::clone(&self.plan), self.comparison()?);
        let mut compared = None;
        let shards = self.shards.clone();
        let mut result: Option<Result<Paused, ConnectionError>> = None;
        let mut pauses = Pauses::default();
        let ended = {
            let (result, pauses) = (&mut result, &mut pauses);
            let compared = &mut compared;
            let compare = async move |budget| {
                if let Some(comparison) = comparison {
                    *compared = Some(comparison.within(budget).await);
                }
            };
            let withdrawn = withdrawn(self.options.plans.clone());
            let drain = async move {
                *result = Some(tokio::select! {
                    biased;
                    drained = cutover::drain(&shards, &plan, pauses, compare) => drained,
                    () = withdrawn => Ok(Paused::Withdrawn),
                });
            };
            self.until(drain).await
        };
        let drained = ended.and_then(|()| self.judge(result, compared, &asked));
        let done = matches!(drained, Ok(Switch::Done));
        if !done {
            // None is under way any more: the approval can be taken back.
            self.state.status.cutover = CutoverStatus::default();
        }
        // Whoever took this migration over may have paused writes by now.
        let replaced = matches!(drained, Err(Ended::Worker(WorkerError::Fenced(_))))
            || *self.options.stop.borrow() == StopRequest::Now;
        if !done && !replaced {
            pauses.lift().await;
        }
        drained
    }

    /// What a drain came to: as `pause_and_drain`.
    fn judge(
        &mut self,
        result: Option<Result<Paused, ConnectionError>>,
        compared: Option<Compared>,
        asked: &Plan,
    ) -> Result<Switch, Ended> {
        let why = match result {
            Some(Ok(Paused::Drained { millis })) => {
                // The last commands may have been refused, too.
                self.nothing_refused()?;
                self.nothing_moved()?;
                if self.copied_since_compared() {
                    let why = "a shard was copied again while writes were paused; writes go on at the source";
                    return Ok(Switch::NotDone { why: why.to_owned() });
                }
                let switch = self.judge_compared(compared, asked)?;
                if !matches!(switch, Switch::Done) {
                    return Ok(switch);
                }
                self.state.status.cutover.write_pause_millis = i64::try_from(millis).unwrap_or(i64::MAX);
                self.state.status.cutover.completion_time = Some(now());
                return Ok(Switch::Done);
            }
            Some(Ok(Paused::TimedOut)) => format!(
                "the target did not catch up within {} s of paused writes; writes go on at the source",
                asked.cutover.pause_timeout_seconds
            ),
            Some(Ok(Paused::Withdrawn)) => "the cutover was withdrawn; writes go on at the source".to_owned(),
            Some(Ok(Paused::Busy { why })) => why,
            Some(Ok(Paused::Impossible { why })) => {
                let why = format!(
                    "{why}; stop the writers yourself, then say so by spec.cutover.pauseSourceWrites: false"
                );
                return Ok(Switch::Impossible { why });
            }
            Some(Ok(Paused::FailedOver { shard, from, to })) => format!(
                "the master of shard {shard} became {to} while writes to {from} were paused: no cutover, as writes may have gone there"
            ),
            Some(Err(error)) => {
                return Err(Ended::Other { reason: reason::SOURCE_UNREACHABLE, message: error.to_string() });
            }
            None => return Err(Ended::Stop),
        };
        Ok(Switch::NotDone { why })
    }

    /// False: the plan changed before it was.
    async fn lag_is_low(&mut self, plan: CutoverPlan) -> Result<bool, Ended> {
        let shards = self.shards.clone();
        let message = "waiting for the lag to fall";
        self.state.set(conditions::CUTOVER_READY, false, reason::LAG_ABOVE_THRESHOLD, message);
        self.until_changed(async move {
            poll_until(|| {
                let low = |shard: &Shard| {
                    let numbers = shard.numbers();
                    numbers.lag_bytes <= plan.max_lag_bytes && numbers.lag_millis <= plan.max_lag_millis
                };
                standing::in_step(&shards) && shards.iter().all(low)
            })
            .await;
        })
        .await
    }

    /// As `until`, but no longer than the plan holds and the shards stand as they do; true when `job` came to its end.
    pub(super) async fn until_changed(&mut self, job: impl Future<Output = ()>) -> Result<bool, Ended> {
        let mut changes = self.changes.subscribe();
        let mut done = false;
        {
            let done = &mut done;
            let either = async move {
                tokio::select! {
                    () = job => *done = true,
                    Ok(()) = changes.changed() => {}
                }
            };
            self.until(either).await?;
        }
        Ok(done)
    }
}
