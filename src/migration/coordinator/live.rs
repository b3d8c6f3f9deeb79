//! What a run does while its plan may still change: waiting for the approval, the cutover, a new plan.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::watching::poll_until;
use super::{Ended, Run, adoptions};
use crate::api::conditions::{self, reason};
use crate::api::plan::{CutoverMode, CutoverPlan, VerificationPlan};
use crate::api::{Phase, Plan};
use crate::connection::ConnectionError;
use crate::migration::Outcome;
use crate::migration::cutover::{self, Paused};
use crate::migration::degraded;
use crate::migration::state::now;

/// Between two attempts of a cutover, so that writers are not held again at once.
const PAUSE_AGAIN: Duration = Duration::from_secs(30);

/// The plan that replaces `current`; waits for one, for ever where none can come.
pub(super) async fn newer(plans: &mut Option<watch::Receiver<Arc<Plan>>>, current: &Arc<Plan>) -> Arc<Plan> {
    let Some(plans) = plans else { return std::future::pending().await };
    let newer = plans.wait_for(|plan| !Arc::ptr_eq(plan, current)).await.map(|plan| Arc::clone(&plan));
    match newer {
        Ok(plan) => plan,
        // Nobody is left who could change it.
        Err(_) => std::future::pending().await,
    }
}

impl Run {
    /// Takes up what may change while running: cutover, verification, policies, limits of the lanes.
    pub(super) fn adopt(&mut self, plan: Arc<Plan>) {
        for setup in &mut self.setups {
            setup.lane.set(plan.limits.pipeline_commands, plan.limits.pipeline_bytes);
            setup.max_quarantined = plan.failure_policy.max_quarantined;
        }
        tracing::info!(generation = plan.generation, "the changed spec holds from here on");
        self.state.judge_by(&plan);
        self.plan = plan;
        self.adopted.send_modify(|count| *count += 1);
        self.state.publish();
    }

    /// `None`: the verification that is asked for is no longer `verified`, the one that was made.
    pub(super) async fn cut_over(&mut self, verified: VerificationPlan) -> Result<Option<Outcome>, Ended> {
        let mut attempts = 0;
        loop {
            if self.plan.verification != verified {
                return Ok(None);
            }
            let plan = self.plan.cutover;
            if plan.mode == CutoverMode::Never {
                if let Some(outcome) = self.follow("in sync; following until stopped").await? {
                    return Ok(Some(outcome));
                }
                continue;
            }
            self.nothing_refused()?;
            self.slots_at_rest().await?;
            self.nothing_moved()?;
            if adoptions(&self.shards) > self.compared_adoptions
                && let Some(outcome) = self.verify().await?
            {
                return Ok(Some(outcome));
            }
            if !self.lag_is_low(plan).await? {
                continue;
            }
            let message = "lag is within the cutover's limits";
            self.state.set(conditions::CUTOVER_READY, true, reason::INCREMENTAL_SYNC, message);
            if plan.mode == CutoverMode::Manual && !plan.approved {
                let message = "in sync; waiting for spec.cutover.approved";
                self.state.set(conditions::CUTOVER_READY, true, reason::AWAITING_APPROVAL, message);
                if let Some(outcome) = self.follow(message).await? {
                    return Ok(Some(outcome));
                }
                continue;
            }
            // With the writes still going on, as it takes its time.
            self.release().await?;
            let Err(why) = self.pause_and_drain(plan).await? else { return Ok(Some(Outcome::Done)) };
            attempts += 1;
            // A single run ends here, so that whoever started it decides.
            if self.options.plans.is_none() || attempts > self.plan.failure_policy.backoff_limit {
                return Err(Ended::Other { reason: reason::PAUSE_TIMEOUT, message: why });
            }
            self.state.status.cutover.start_time = None;
            self.state.set(conditions::CUTOVER_READY, false, reason::PAUSE_TIMEOUT, &why);
            let message = format!("{why}; the cutover is tried again in {} s", PAUSE_AGAIN.as_secs());
            self.state.phase(Phase::IncrementalSync, &message);
            self.until_changed(tokio::time::sleep(PAUSE_AGAIN)).await?;
        }
    }

    /// Until it is stopped or the plan changes. Slots that moved between shards of the source are compared once
    /// they have come to rest; `Some`: what was found ends the run.
    async fn follow(&mut self, message: &str) -> Result<Option<Outcome>, Ended> {
        loop {
            self.state.phase(Phase::IncrementalSync, message);
            let (shards, compared) = (self.shards.clone(), self.compared_adoptions);
            let moved =
                poll_until(move || adoptions(&shards) > compared && degraded::moved(&shards).is_none());
            if !self.until_changed(moved).await? {
                return Ok(None);
            }
            if let Some(outcome) = self.verify().await? {
                return Ok(Some(outcome));
            }
        }
    }

    /// `Err`: why the target did not take over; writes go on at the source.
    async fn pause_and_drain(&mut self, plan: CutoverPlan) -> Result<Result<(), String>, Ended> {
        self.state.status.cutover.start_time = Some(now());
        self.state.phase(Phase::CuttingOver, "pausing writes to the source, draining");
        let shards = self.shards.clone();
        let mut result: Option<Result<Paused, ConnectionError>> = None;
        let mut cannot = Vec::new();
        {
            let (result, cannot) = (&mut result, &mut cannot);
            self.until(async move { *result = Some(cutover::drain(&shards, &plan, cannot).await) }).await?;
        }
        for why in &cannot {
            tracing::warn!("{why}; stop the writers yourself before the cutover");
        }
        match result {
            Some(Ok(Paused::Drained { millis })) => {
                // The last commands may have been refused, too.
                self.nothing_refused()?;
                self.nothing_moved()?;
                self.state.status.cutover.write_pause_millis = i64::try_from(millis).unwrap_or(i64::MAX);
                self.state.status.cutover.completion_time = Some(now());
                Ok(Ok(()))
            }
            Some(Ok(Paused::TimedOut)) => Ok(Err(format!(
                "the target did not catch up within {} s of paused writes; writes go on at the source",
                plan.pause_timeout_seconds
            ))),
            Some(Ok(Paused::FailedOver { shard, from, to })) => Ok(Err(format!(
                "the master of shard {shard} became {to} while writes to {from} were paused: no cutover, as writes may have gone there"
            ))),
            Some(Err(error)) => {
                Err(Ended::Other { reason: reason::SOURCE_UNREACHABLE, message: error.to_string() })
            }
            None => Err(Ended::Stop),
        }
    }

    /// False: the plan changed before it was.
    async fn lag_is_low(&mut self, plan: CutoverPlan) -> Result<bool, Ended> {
        let shards = self.shards.clone();
        let message = "waiting for the lag to fall";
        self.state.set(conditions::CUTOVER_READY, false, reason::LAG_ABOVE_THRESHOLD, message);
        self.until_changed(async move {
            for shard in &shards {
                let mut numbers = shard.progress.numbers.subscribe();
                // An error means that the worker is gone: its own result says why.
                let _ = numbers
                    .wait_for(|numbers| {
                        numbers.lag_bytes <= plan.max_lag_bytes && numbers.lag_millis <= plan.max_lag_millis
                    })
                    .await;
            }
        })
        .await
    }

    /// As `until`, but no longer than the plan holds; true when `job` came to its end.
    pub(super) async fn until_changed(&mut self, job: impl Future<Output = ()>) -> Result<bool, Ended> {
        let mut adopted = self.adopted.subscribe();
        let mut done = false;
        {
            let done = &mut done;
            let either = async move {
                tokio::select! {
                    () = job => *done = true,
                    Ok(()) = adopted.changed() => {}
                }
            };
            self.until(either).await?;
        }
        Ok(done)
    }
}
