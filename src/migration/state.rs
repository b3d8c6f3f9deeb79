//! The status of a running migration, put together from what its workers tell.

use std::collections::VecDeque;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::Observers;
use crate::api::conditions::{self, Conditions, Truth};
use crate::api::status::ShardStatus;
use crate::api::status::{QuarantineSample, Replication};
use crate::api::{Phase, Plan, Status};
use crate::clock::unix_millis;
use crate::connection::{Address, Dialer};
use crate::source::replication::{LinkPhase, LinkState};
use crate::source::watch::SourceShard;
use crate::telemetry::{EngineGauges, ShardGauges};
use crate::worker::{Following, Numbers, ShardPhase, ShardProgress};

/// Speed is measured over this many milliseconds.
const SPEED_WINDOW: u64 = 3_000;
const QUARANTINE_SAMPLES: usize = 20;

/// One shard, as the coordinator sees it.
#[derive(Clone)]
pub struct Shard {
    pub id: String,
    pub slots: String,
    /// Where reading began.
    pub source: Address,
    /// Where the shard is now; `None`: always at `source`.
    pub watch: Option<SourceShard>,
    pub dialer: Dialer,
    pub progress: Arc<ShardProgress>,
}

impl Shard {
    pub fn numbers(&self) -> Numbers {
        self.progress.numbers.borrow().clone()
    }

    pub fn link(&self) -> LinkState {
        self.progress.link.borrow().clone()
    }

    /// The server that takes the shard's writes, as far as is known.
    pub fn master(&self) -> Address {
        let watched = self.watch.as_ref().and_then(SourceShard::now).map(|at| at.master);
        watched.or_else(|| self.link().master).unwrap_or_else(|| self.source.clone())
    }

    /// The server that is read from, while one is; else the master.
    pub fn reader(&self) -> Address {
        let link = self.link();
        let server = link.server.filter(|_| link.phase == LinkPhase::Streaming);
        server.unwrap_or_else(|| self.master())
    }

    /// Of a source cluster: which slots its worker follows.
    pub fn following(&self) -> Following {
        self.progress.following.borrow().clone()
    }
}

pub fn now() -> Time {
    Time(Timestamp::now())
}

/// The status, and where it is published.
pub struct State {
    pub status: Status,
    generation: i64,
    status_out: watch::Sender<Status>,
    gauges_out: watch::Sender<EngineGauges>,
    keys_expected: u64,
    speeds: VecDeque<(u64, u64)>,
}

impl State {
    pub fn new(plan: &Plan, observers: Observers) -> Self {
        let status =
            Status { observed_generation: plan.generation, start_time: Some(now()), ..Status::default() };
        let Observers { status: status_out, gauges: gauges_out } = observers;
        let mut state = Self {
            status,
            generation: plan.generation,
            status_out,
            gauges_out,
            keys_expected: 0,
            speeds: VecDeque::new(),
        };
        state.status.verification.mode = plan.verification.mode;
        state
    }

    /// Keys that the source held at preflight: an estimate of the work.
    pub fn expect_keys(&mut self, keys: u64) {
        self.keys_expected = keys;
    }

    pub fn set(&mut self, type_: &str, truth: impl Into<Truth>, reason: &str, message: &str) {
        let mut conditions = Conditions::new(&mut self.status.conditions, self.generation);
        conditions.set(type_, truth.into(), reason, message, &now());
    }

    /// From here on what is observed answers this plan's spec.
    pub fn judge_by(&mut self, plan: &Plan) {
        self.generation = plan.generation;
        self.status.observed_generation = plan.generation;
        self.status.verification.mode = plan.verification.mode;
        for condition in &mut self.status.conditions {
            condition.observed_generation = Some(plan.generation);
        }
    }

    pub fn remove(&mut self, type_: &str) {
        Conditions::new(&mut self.status.conditions, self.generation).remove(type_);
    }

    /// Takes the condition away if it is there for this reason.
    pub fn remove_reason(&mut self, type_: &str, reason: &str) {
        self.status.conditions.retain(|found| found.type_ != type_ || found.reason != reason);
    }

    pub fn phase(&mut self, phase: Phase, message: &str) {
        self.status.phase = phase;
        self.status.message = message.to_owned();
        self.publish();
    }

    pub fn publish(&self) {
        self.status_out.send_replace(self.status.clone());
    }

    /// The end, whatever it is; conditions as kstatus reads them.
    pub fn finish(&mut self, phase: Phase, succeeded: bool, reason: &str, message: &str) {
        self.remove(conditions::RECONCILING);
        self.set(conditions::READY, succeeded, reason, message);
        if !succeeded {
            self.set(conditions::STALLED, true, reason, message);
        }
        self.set(conditions::FINISHED, true, reason, message);
        self.set(conditions::SUCCEEDED, succeeded, reason, message);
        self.status.completion_time = Some(now());
        self.phase(phase, message);
    }

    /// Takes over the workers' numbers and publishes.
    pub fn gather(&mut self, shards: &[Shard]) {
        let mut entries = Vec::with_capacity(shards.len());
        let mut gauges = Vec::with_capacity(shards.len());
        let mut replication = Replication::default();
        let mut progress = crate::api::status::Progress::default();
        let (mut refused, mut in_sync, mut totals_known) = (0u64, 0usize, true);
        for shard in shards {
            let (numbers, link) = (shard.numbers(), shard.link());
            let (entry, gauge) = entry(shard, &numbers, &link);
            progress.keys_applied += entry.keys_applied;
            progress.commands_applied += entry.commands_applied;
            progress.bytes_read += entry.bytes_read;
            progress.bytes_total += entry.bytes_total;
            totals_known &= entry.bytes_total > 0;
            replication.lag_bytes += entry.lag_bytes;
            replication.lag_millis = replication.lag_millis.max(entry.lag_millis);
            replication.full_resyncs += entry.full_resyncs;
            replication.resumes += entry.resumes;
            refused += numbers.quarantined;
            in_sync += usize::from(is_in_sync(&numbers, &link));
            entries.push(entry);
            gauges.push(gauge);
        }
        replication.shards_in_sync = format!("{in_sync}/{}", shards.len());
        if !totals_known {
            progress.bytes_total = 0;
        }
        let announced: u64 = shards.iter().map(|shard| shard.numbers().keys_total).sum();
        progress.keys_total = int(announced.max(self.keys_expected).max(progress.keys_applied as u64));
        let synced = shards.iter().all(|shard| shard.numbers().phase == ShardPhase::IncrementalSync);
        progress.percent = match () {
            () if synced && !shards.is_empty() => 100,
            () if progress.keys_total > 0 => (progress.keys_applied * 100 / progress.keys_total).min(99),
            () => 0,
        };
        progress.keys_per_second = self.speed(progress.keys_applied as u64);
        if progress.keys_per_second > 0 && !synced {
            progress.eta_seconds = (progress.keys_total - progress.keys_applied) / progress.keys_per_second;
        }
        self.status.progress = progress;
        self.status.replication = replication;
        self.status.shards = entries;
        self.quarantine(shards, refused);
        self.gauges_out.send_replace(EngineGauges { shards: gauges });
        self.publish();
    }

    fn quarantine(&mut self, shards: &[Shard], refused: u64) {
        let before = self.status.quarantine.commands;
        self.status.quarantine.commands = int(refused);
        if int(refused) == before {
            return;
        }
        let samples = shards.iter().flat_map(|shard| {
            shard.progress.quarantined().into_iter().map(|entry| QuarantineSample {
                shard: shard.id.clone(),
                offset: entry.offset,
                db: int(entry.db),
                command: entry.refusal.command,
                key: entry.refusal.key.escape_ascii().to_string(),
                error: entry.refusal.error,
            })
        });
        self.status.quarantine.samples = samples.take(QUARANTINE_SAMPLES).collect();
    }

    fn speed(&mut self, keys: u64) -> i64 {
        let now = unix_millis();
        self.speeds.push_back((now, keys));
        while self.speeds.front().is_some_and(|(then, _)| now.saturating_sub(*then) > SPEED_WINDOW) {
            self.speeds.pop_front();
        }
        match self.speeds.front() {
            Some((then, before)) if now > *then => int(keys.saturating_sub(*before) * 1000 / (now - then)),
            _ => 0,
        }
    }
}

/// Caught up with what arrived, over a link that works.
pub fn is_in_sync(numbers: &Numbers, link: &LinkState) -> bool {
    numbers.phase == ShardPhase::IncrementalSync
        && link.phase == LinkPhase::Streaming
        && numbers.waiting.is_empty()
}

fn entry(shard: &Shard, numbers: &Numbers, link: &LinkState) -> (ShardStatus, ShardGauges) {
    let last_error = if !numbers.waiting.is_empty() {
        numbers.waiting.clone()
    } else if link.attempts > 1 && !link.last_error.is_empty() {
        format!("{} ({} attempts)", link.last_error, link.attempts)
    } else {
        link.last_error.clone()
    };
    let status = ShardStatus {
        id: shard.id.clone(),
        slots: slots_of(shard),
        worker: String::new(),
        phase: match numbers.phase {
            ShardPhase::Pending => Phase::Pending,
            ShardPhase::FullSync => Phase::FullSync,
            ShardPhase::IncrementalSync => Phase::IncrementalSync,
        },
        replication_id: numbers.replication_id.clone(),
        received_offset: numbers.received_offset,
        applied_offset: numbers.applied_offset,
        lag_bytes: int(numbers.lag_bytes),
        lag_millis: int(numbers.lag_millis),
        keys_applied: int(numbers.keys),
        commands_applied: int(numbers.commands),
        bytes_read: int(numbers.snapshot_read),
        bytes_total: int(link.snapshot_bytes.unwrap_or_default()),
        resumes: int(link.resumes),
        full_resyncs: int(link.full_resyncs),
        expiries_held: numbers.holding,
        expiries_released: int(numbers.released),
        last_error,
    };
    let gauges = ShardGauges {
        id: shard.id.clone(),
        received_bytes: numbers.snapshot_read + u64::try_from(numbers.received_offset).unwrap_or_default(),
        sent_bytes: numbers.sent_bytes,
        batches: numbers.batches,
        source_reconnects: link.resumes + link.full_resyncs,
        target_reconnects: numbers.target_reconnects,
        spool_memory_bytes: numbers.spool_memory,
        spool_disk_bytes: numbers.spool_disk,
    };
    (status, gauges)
}

/// Those that are followed, or while nobody knows these, those that it served.
fn slots_of(shard: &Shard) -> String {
    let following = shard.following();
    if following.known && !shard.slots.is_empty() { following.slots.to_string() } else { shard.slots.clone() }
}

fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
