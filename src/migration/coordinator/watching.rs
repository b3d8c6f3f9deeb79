//! Waiting with an eye on the workers.

use std::time::{Duration, Instant};

use super::{Ended, Run, live};
use crate::api::Phase;
use crate::api::conditions::{self, reason};
use crate::api::plan::CutoverMode;
use crate::migration::checkpoints::{self, Checkpoints, SetAside};
use crate::migration::standing::{Seen, Stands};
use crate::migration::state::{Shard, State, by_name, is_in_sync};
use crate::migration::{StopRequest, degraded, standing};
use crate::worker::ShardPhase;
use crate::worker::turn::is_waiting;

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

    /// A run that is killed must not leave a next one that knows of nothing that the target lacks.
    fn keep_set_aside(&mut self) {
        let Some(data_dir) = &self.options.data_dir else { return };
        let set_aside = set_aside(&self.shards);
        if set_aside == self.set_aside {
            return;
        }
        let begun = Checkpoints::begun(&self.plan, self.known.clone(), set_aside.clone());
        match checkpoints::save(data_dir, &self.plan.uid, &begun) {
            Ok(()) => (self.set_aside, self.unkept) = (set_aside, String::new()),
            // It is tried again and again.
            Err(error) if error.to_string() == self.unkept => {}
            Err(error) => {
                self.unkept = error.to_string();
                tracing::warn!("{error}; a next run would not know what was set aside");
            }
        }
    }

    pub(super) fn say_full_synced(&mut self) {
        let message = "the snapshot stands on the target";
        self.state.set(conditions::FULL_SYNCED, true, reason::INCREMENTAL_SYNC, message);
    }

    pub(super) fn say_in_sync(&mut self) {
        let mut message = format!("in sync, {} shard(s)", self.shards.len());
        let by_passes = |shard: &Shard| shard.progress.scan.now().is_by_passes();
        if self.shards.iter().any(by_passes) {
            message.push_str(
                ", as of the last pass over all keys; while writes go on it is not certain that passes converge",
            );
        }
        self.state.set(conditions::IN_SYNC, true, reason::INCREMENTAL_SYNC, &message);
        self.state.remove(conditions::RECONCILING);
        self.state.set(conditions::READY, true, reason::INCREMENTAL_SYNC, &message);
        self.state.phase(Phase::IncrementalSync, &message);
    }

    /// Takes back what does not hold any more of what the conditions said, and says it again once it does.
    fn say_where_it_stands(&mut self) {
        let Some(standing) = &mut self.standing else { return };
        let first = standing.is_new();
        let Some(stands) = standing.judge(self.shards.iter().map(Seen::of), Instant::now()) else { return };
        let (why, message) = match stands {
            // As was just said.
            Stands::InStep if first => return,
            Stands::InStep => {
                self.say_full_synced();
                self.say_in_sync();
                // Whoever waits for a word of the user looks again whether everything is compared.
                self.changes.send_modify(|count| *count += 1);
                return;
            }
            Stands::Copying { message } => {
                self.state.set(conditions::FULL_SYNCED, false, reason::FULL_RESYNC_FORCED, &message);
                // It was of what is replaced now.
                self.state.remove(conditions::VERIFIED);
                self.state.phase(Phase::FullSync, &message);
                (reason::FULL_RESYNC_FORCED, message)
            }
            Stands::Lost { reason, message } => {
                self.state.status.message.clone_from(&message);
                (reason, message)
            }
        };
        tracing::warn!("{message}");
        self.state.set(conditions::READY, false, why, &message);
        self.state.set(conditions::IN_SYNC, false, why, &message);
        self.state.set(conditions::RECONCILING, true, why, &message);
        if self.plan.cutover.mode != CutoverMode::Never {
            self.state.set(conditions::CUTOVER_READY, false, why, &message);
        }
        self.state.publish();
    }

    fn observe(&mut self) -> Result<(), Ended> {
        self.share_out_slots();
        // Before anyone is told of it.
        self.keep_set_aside();
        self.state.gather(&self.shards);
        self.say_where_it_stands();
        let causes = degraded::causes(&self.shards, &self.state.status);
        if let Some((reason, _)) = causes.first() {
            let messages: Vec<&str> = causes.iter().map(|(_, message)| message.as_str()).collect();
            self.state.set(conditions::DEGRADED, true, reason, &messages.join("; "));
        } else {
            // The causes that pass.
            for reason in [reason::SPOOL_FULL, reason::SLOTS_MOVED, reason::NOT_CONVERGING] {
                self.state.remove_reason(conditions::DEGRADED, reason);
            }
        }
        let resyncs = standing::resyncs(&self.shards);
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
            // Nobody wants it to move while its source is under pressure.
            is_in_sync(&numbers, &shard.link()) && numbers.lag_bytes == 0 || is_waiting(&numbers.waiting)
        };
        let silent = |shard: &Shard| shard.progress.seat.borrow().silent;
        let policy = self.plan.failure_policy;
        if self.shards.iter().all(|shard| shard.numbers().phase == ShardPhase::IncrementalSync) {
            self.settled_resyncs = resyncs;
        }
        // A worker that begins in another process counts from 0.
        let moves: u64 = self.shards.iter().map(|shard| shard.progress.seat.borrow().moves).sum();
        if std::mem::replace(&mut self.moves, moves) != moves {
            self.last_progress = (Instant::now(), (0, 0));
        }
        // What is replayed time and again is no progress; only a new full sync starts again from 0, and not
        // for ever, should none of them come to its end.
        let resyncs = resyncs.min(self.settled_resyncs + u64::from(policy.backoff_limit));
        if (resyncs, moved) > self.last_progress.1 {
            self.last_progress = (Instant::now(), (resyncs, moved));
        } else if self.shards.iter().all(idle) || self.shards.iter().any(silent) {
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

/// What the shards set aside so far.
pub(super) fn set_aside(shards: &[Shard]) -> SetAside {
    let told = shards.iter().map(|shard| (shard.id.clone(), by_name(&shard.numbers().kinds)));
    told.filter(|(_, kinds)| !kinds.is_empty()).collect()
}

pub(super) async fn poll_until(mut done: impl FnMut() -> bool) {
    let mut tick = tokio::time::interval(GATHER);
    while !done() {
        tick.tick().await;
    }
}
