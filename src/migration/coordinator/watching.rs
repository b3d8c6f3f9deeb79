//! Waiting with an eye on the workers.

use std::time::{Duration, Instant};

use super::{Ended, Run, live};
use crate::api::conditions::{self, reason};
use crate::migration::StopRequest;
use crate::migration::degraded;
use crate::migration::state::{Shard, State, is_in_sync};
use crate::worker::ShardPhase;

/// How often the workers' numbers are gathered.
const GATHER: Duration = Duration::from_millis(200);

impl Run {
    pub(super) async fn until(&mut self, job: impl Future<Output = ()>) -> Result<(), Ended> {
        self.until_with(job, |_| {}).await
    }

    /// Waits for `job`, and meanwhile reports, heeds the stop request and watches the workers.
    pub(super) async fn until_with(
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
        self.share_out_slots();
        self.state.gather(&self.shards);
        let causes = degraded::causes(&self.shards, &self.state.status);
        if let Some((reason, _)) = causes.first() {
            let messages: Vec<&str> = causes.iter().map(|(_, message)| message.as_str()).collect();
            self.state.set(conditions::DEGRADED, true, reason, &messages.join("; "));
        } else {
            // The causes that pass.
            for reason in [reason::SPOOL_FULL, reason::SLOTS_MOVED] {
                self.state.remove_reason(conditions::DEGRADED, reason);
            }
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
}

pub(super) async fn poll_until(mut done: impl FnMut() -> bool) {
    let mut tick = tokio::time::interval(GATHER);
    while !done() {
        tick.tick().await;
    }
}
