//! Whether the shards still stand where the conditions say that they do (PURE).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::state::{Shard, is_in_sync};
use crate::api::conditions::reason;
use crate::source::replication::{LinkPhase, LinkState};
use crate::worker::progress::Seat;
use crate::worker::{Numbers, ShardPhase};

/// A link that is back sooner, or a shard that another process takes over, is not worth an alarm.
const GRACE: Duration = Duration::from_secs(15);

/// One shard, now.
#[derive(Clone, Debug)]
pub struct Seen {
    pub id: String,
    pub numbers: Numbers,
    pub link: LinkState,
    pub seat: Seat,
}

impl Seen {
    pub fn of(shard: &Shard) -> Self {
        let seat = shard.progress.seat.borrow().clone();
        Self { id: shard.id.clone(), numbers: shard.numbers(), link: shard.link(), seat }
    }

    /// Caught up with a source that is heard, in the history that it is in.
    pub fn is_in_step(&self) -> bool {
        let Self { numbers, link, seat, .. } = self;
        let here = |id: &str| id == numbers.replication_id;
        is_in_sync(numbers, link)
            && !numbers.stopped
            && !seat.silent
            && link.origin.as_ref().is_some_and(|origin| here(&origin.replication_id))
    }

    /// Why it is not, but for a copy that is under way.
    fn lost(&self) -> (&'static str, String) {
        let Self { id, numbers, link, seat } = self;
        let why = if seat.silent || numbers.stopped {
            (reason::INCREMENTAL_SYNC, "nothing is heard of its worker")
        } else if !numbers.waiting.is_empty() {
            (reason::TARGET_UNREACHABLE, numbers.waiting.as_str())
        } else if link.phase != LinkPhase::Streaming && !link.last_error.is_empty() {
            (reason::SOURCE_UNREACHABLE, link.last_error.as_str())
        } else {
            (reason::SOURCE_UNREACHABLE, "its source is not followed")
        };
        (why.0, format!("shard {id} is not in sync: {}", why.1))
    }
}

/// As `Seen::is_in_step`, of all of them.
pub fn in_step(shards: &[Shard]) -> bool {
    shards.iter().all(|shard| Seen::of(shard).is_in_step())
}

/// How often shards had to be copied again. Never falls.
pub fn resyncs(shards: &[Shard]) -> u64 {
    shards.iter().map(|shard| shard.link().full_resyncs).sum()
}

/// What the conditions are to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stands {
    InStep,
    /// A shard is copied again: the target is not what it was compared as.
    Copying {
        message: String,
    },
    /// For longer than it should be.
    Lost {
        reason: &'static str,
        message: String,
    },
}

/// How the shards stood before.
#[derive(Debug, Default)]
pub struct Standing {
    /// By shard, the full resyncs after which it was in step.
    stood: BTreeMap<String, u64>,
    out_since: Option<Instant>,
    told: Option<Stands>,
}

impl Standing {
    /// Nothing was told so far.
    pub fn is_new(&self) -> bool {
        self.told.is_none()
    }

    /// `Some`: it is another than the last time. `now` never goes back.
    pub fn judge(&mut self, shards: impl Iterator<Item = Seen>, now: Instant) -> Option<Stands> {
        let (mut copied, mut lost) = (None, None);
        for shard in shards {
            let resyncs = shard.link.full_resyncs;
            if shard.is_in_step() {
                self.stood.insert(shard.id, resyncs);
                continue;
            }
            // Of one that was not seen in step yet, those were before.
            let stood = *self.stood.entry(shard.id.clone()).or_insert(resyncs);
            if resyncs > stood || shard.numbers.phase == ShardPhase::FullSync {
                let why = &shard.link.full_resync_reason;
                copied.get_or_insert(format!("copying shard {} again: {why}", shard.id));
            } else {
                lost.get_or_insert_with(|| shard.lost());
            }
        }
        let out = copied.is_some() || lost.is_some();
        let since = *self.out_since.get_or_insert(now);
        if !out {
            self.out_since = None;
        }
        let stands = match (copied, lost) {
            (Some(message), _) => Stands::Copying { message },
            (None, Some((reason, message))) if now.duration_since(since) >= GRACE => {
                Stands::Lost { reason, message }
            }
            // Not yet, or what was told before still holds.
            (None, Some(_)) => return None,
            (None, None) => Stands::InStep,
        };
        if self.told.as_ref() == Some(&stands) {
            return None;
        }
        self.told = Some(stands.clone());
        Some(stands)
    }
}

#[cfg(test)]
mod tests;
