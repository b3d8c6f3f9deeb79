//! The end of a run: what is kept for another one, and what is said.

use std::collections::BTreeMap;

use super::watching::set_aside;
use super::{Ended, Run};
use crate::api::Phase;
use crate::api::conditions::reason;
use crate::api::plan::{Delivery, ExistingKeys};
use crate::backoff::Backoff;
use crate::connection::ConnectionError;
use crate::migration::checkpoints::{self, Checkpoints};
use crate::migration::kept::Undone;
use crate::migration::state::Shard;
use crate::migration::verification::failed;
use crate::migration::{Outcome, Until, kept, setup};
use crate::source::file::FileFeedError;
use crate::source::replication::ReplicationError;
use crate::source::scan::ScanError;
use crate::spool;
use crate::worker::{Checkpoint, Stopped, WorkerError};

impl Run {
    /// Stops the workers, keeps the checkpoint where it is of use, says how it ended.
    pub(super) async fn end(mut self, result: Result<Outcome, Ended>) -> Outcome {
        if matches!(result, Err(Ended::Stop))
            && let Some(placement) = &self.options.placement
        {
            placement.may_leave();
        }
        let left = self.stop_workers().await;
        let spooled = left.values().any(|left| left.checkpoint.is_none() && left.spooled);
        let goes_on = left.values().filter(|left| left.checkpoint.is_some() || left.spooled).count();
        let checkpoints: BTreeMap<String, Checkpoint> =
            left.into_iter().filter_map(|(shard, left)| Some((shard, left.checkpoint?))).collect();
        self.state.gather(&self.shards);
        let wished = |shard: &Shard| *shard.progress.release.borrow();
        let held = self.shards.iter().any(|shard| wished(shard) && shard.numbers().holding);
        let result = match result {
            // What was run again then is held, and nobody is left to give it back.
            Ok(Outcome::Done) if held => Err(Ended::Other {
                reason: reason::TARGET_UNREACHABLE,
                message: "the connection to the target was lost at the very end, and expiries are held there again: run it once more".to_owned(),
            }),
            result => result,
        };
        let result = match result {
            Ok(Outcome::Done) if self.options.until == Until::Finished => self.still_stands().await,
            result => result,
        };
        let finished = matches!(result, Ok(Outcome::Done)) && self.options.until == Until::Finished;
        // A key that was the target's own must not pass for one of ours in the next run.
        let foreign = matches!(&result, Err(Ended::Worker(WorkerError::KeyExists { .. })));
        if (finished || foreign) && self.plan.delivery == Delivery::ExactlyOnce {
            let lineages = self.setups.iter().map(|setup| setup.lineage.as_str());
            if let Ok(dialer) = setup::target_dialer(&self.plan)
                && let Err(error) = kept::remove(&self.plan, &dialer, lineages).await
            {
                tracing::warn!(%error, "keys that begin with redis-migration: stay on the target");
            }
        }
        if finished {
            // Whatever a worker left.
            self.setups.iter().for_each(|setup| spool::remove(&setup.spool.folder.join(&setup.file_name)));
        }
        for (known, shard) in self.known.iter_mut().zip(&self.shards) {
            let following = shard.following();
            if following.known && !shard.slots.is_empty() {
                known.slots = following.slots;
            }
        }
        let mut kept = false;
        if let Some(data_dir) = self.options.data_dir.clone() {
            let written = if finished {
                checkpoints::clear(&data_dir, &self.plan.uid)
            } else {
                kept = goes_on == self.shards.len();
                let left = Checkpoints {
                    begun: !foreign,
                    shards: checkpoints,
                    known: std::mem::take(&mut self.known),
                    set_aside: set_aside(&self.shards),
                    copied_by: self.plan.copied_by.clone(),
                };
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
                let elsewhere =
                    self.shards.iter().any(|shard| !shard.progress.seat.borrow().worker.is_empty());
                let message = match (kept, &self.options.data_dir) {
                    (false, _) if elsewhere => "stopped; the target knows where each shard goes on",
                    (true, _) if spooled => {
                        "stopped in the full sync; started again with the same data-dir it goes on from the spool"
                    }
                    (true, _) => "stopped; started again with the same data-dir it goes on",
                    (false, None) => "stopped; without --data-dir no checkpoint is kept",
                    (false, Some(_)) if self.shards.iter().any(|shard| shard.progress.scan.now().active) => {
                        "stopped; started again it reads all keys of the source anew"
                    }
                    (false, Some(_)) => {
                        "stopped before the snapshot stood: started again with the same data-dir it copies anew"
                    }
                };
                let mut message = message.to_owned();
                if self.shards.iter().any(|shard| shard.numbers().holding) {
                    message.push_str("; the target holds expiries until the cutover");
                }
                tracing::info!("{message}");
                self.state.status.message = message;
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

    /// Frozen since the target had everything, this process may have been replaced: what was written to the source
    /// since its pause lapsed only the other one has. And a target may have lost what it had acknowledged.
    async fn still_stands(&self) -> Result<Outcome, Ended> {
        if self.plan.delivery != Delivery::ExactlyOnce {
            return Ok(Outcome::Done);
        }
        let Ok(dialer) = setup::target_dialer(&self.plan) else { return Ok(Outcome::Done) };
        let (mut backoff, mut attempts) = (Backoff::default(), 0);
        let found = loop {
            let shards = self.setups.iter().zip(&self.shards).map(|(setup, shard)| kept::AtEnd {
                lineage: &setup.lineage,
                held: &shard.progress.epoch,
                applied: shard.numbers().applied_offset,
            });
            match kept::undone(&self.plan, &dialer, shards).await {
                // It may be failing over just now, to a replica without the last commands.
                Err(error) if attempts < kept::ATTEMPTS => {
                    tracing::warn!(%error, "the target cannot be asked once more whether it has everything, trying again");
                }
                found => break found,
            }
            attempts += 1;
            backoff.wait().await;
        };
        match found {
            Ok(None) => Ok(Outcome::Done),
            Ok(Some(Undone::TakenOver(message))) => Err(Ended::Worker(WorkerError::Fenced(message))),
            Ok(Some(Undone::FellBack(message))) => {
                Err(Ended::Other { reason: reason::TARGET_UNREACHABLE, message })
            }
            Err(error) => Err(Ended::Other {
                reason: reason::TARGET_UNREACHABLE,
                message: format!(
                    "the target had acknowledged everything, and cannot be asked any more whether it has it: run the migration once more, it goes on from there ({error})"
                ),
            }),
        }
    }

    async fn stop_workers(&mut self) -> BTreeMap<String, Stopped> {
        self.drain.send_replace(true);
        let mut left = std::mem::take(&mut self.left);
        while let Some(ended) = self.workers.join_next().await {
            let (index, stopped) = match ended {
                Ok((index, Ok(stopped))) => (index, stopped),
                Ok((index, Err(failed))) => {
                    tracing::warn!(error = %failed.error, "a shard worker ended with an error");
                    (index, failed.left)
                }
                Err(error) => {
                    tracing::error!(%error, "a shard worker ended by itself");
                    continue;
                }
            };
            let shard = self.shards.get(index).map(|shard| shard.id.clone());
            left.extend(shard.map(|shard| (shard, stopped)));
        }
        left
    }
}

pub(in crate::migration) fn reason_of(error: &WorkerError) -> &'static str {
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
        WorkerError::Scan(ScanError::Connection(error)) => connection(error, reason::SOURCE_UNREACHABLE),
        WorkerError::Scan(ScanError::Refused { .. }) => reason::AUTH_FAILED,
        WorkerError::Scan(ScanError::AnewForbidden { .. }) => reason::FULL_RESYNC_FORCED,
        WorkerError::Scan(ScanError::Names { .. } | ScanError::Spool(_)) => reason::ABORTED,
        WorkerError::Scan(_) => reason::SOURCE_UNREACHABLE,
        WorkerError::KeyExists { .. } => reason::TARGET_NOT_EMPTY,
        WorkerError::TooManyRefused { .. } => reason::COMMANDS_QUARANTINED,
        WorkerError::Target(_) | WorkerError::FellBack { .. } => reason::TARGET_UNREACHABLE,
        WorkerError::LostState { .. } | WorkerError::Overtaken { .. } => reason::FULL_RESYNC_FORCED,
        WorkerError::Fenced(_) => reason::ABORTED,
        WorkerError::Denied(_) => reason::AUTH_FAILED,
        WorkerError::Told { reason, .. } => reason,
        WorkerError::File(FileFeedError::Object { source, .. }) if source.is_auth() => reason::AUTH_FAILED,
        WorkerError::File(FileFeedError::Object { .. }) => reason::SOURCE_UNREACHABLE,
        WorkerError::File(FileFeedError::Spool(_))
        | WorkerError::Truncated { .. }
        | WorkerError::Spool(_)
        | WorkerError::Rdb { .. }
        | WorkerError::Checksum { .. }
        | WorkerError::SnapshotEnd { .. }
        | WorkerError::Stream { .. } => reason::ABORTED,
    }
}
