//! The status of a running migration, put together from what its workers tell.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::Observers;
use crate::api::conditions::{self, Conditions, Truth, reason};
use crate::api::status::ShardStatus;
use crate::api::status::{QuarantineSample, Replication};
use crate::api::{Phase, Plan, Status};
use crate::clock::unix_millis;
use crate::connection::{Address, Dialer};
use crate::loss::Loss;
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

/// What there is to report on.
pub trait Observed {
    fn id(&self) -> &str;
    /// Slots that it served first; empty without a cluster.
    fn slots(&self) -> &str;
    fn progress(&self) -> &ShardProgress;
}

impl Observed for Shard {
    fn id(&self) -> &str {
        &self.id
    }

    fn slots(&self) -> &str {
        &self.slots
    }

    fn progress(&self) -> &ShardProgress {
        &self.progress
    }
}

impl Shard {
    pub fn numbers(&self) -> Numbers {
        self.progress.now()
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
    /// Samples of what earlier runs set aside.
    told_before: Vec<QuarantineSample>,
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
            told_before: Vec::new(),
        };
        state.status.verification.mode = plan.verification.mode;
        state
    }

    /// A run begins; `not_ready` says what is missing. It goes on with the times of the one before.
    pub fn open(plan: &Plan, earlier: Option<&Status>, not_ready: &str, observers: Observers) -> Self {
        let mut state = Self::new(plan, observers);
        if let Some(since) = earlier.and_then(|earlier| earlier.start_time.clone()) {
            state.status.start_time = Some(since);
        }
        state.told_before = earlier.map(|earlier| earlier.quarantine.samples.clone()).unwrap_or_default();
        state.set(conditions::READY, false, reason::FULL_SYNC, not_ready);
        state.set(conditions::RECONCILING, true, reason::FULL_SYNC, "looking at both sides");
        state.phase(Phase::Preflight, "looking at both sides");
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
    pub fn gather<S: Observed>(&mut self, shards: &[S]) {
        let mut entries = Vec::with_capacity(shards.len());
        let mut gauges = Vec::with_capacity(shards.len());
        let mut replication = Replication::default();
        let mut progress = crate::api::status::Progress::default();
        let (mut refused, mut in_sync, mut totals_known) = (0u64, 0usize, true);
        let all: Vec<Numbers> = shards.iter().map(|shard| shard.progress().now()).collect();
        for (shard, numbers) in shards.iter().zip(&all) {
            let link = shard.progress().link.borrow().clone();
            let (entry, gauge) = entry(shard, numbers, &link);
            progress.keys_applied += entry.keys_applied;
            progress.commands_applied += entry.commands_applied;
            progress.keys_filtered += entry.keys_filtered;
            progress.commands_filtered += entry.commands_filtered;
            progress.bytes_read += entry.bytes_read;
            progress.bytes_total += entry.bytes_total;
            totals_known &= entry.bytes_total > 0;
            replication.lag_bytes += entry.lag_bytes;
            replication.lag_millis = replication.lag_millis.max(entry.lag_millis);
            replication.full_resyncs += entry.full_resyncs;
            replication.resumes += entry.resumes;
            refused += numbers.quarantined;
            in_sync += usize::from(is_in_sync(numbers, &link));
            entries.push(entry);
            gauges.push(gauge);
        }
        replication.shards_in_sync = format!("{in_sync}/{}", shards.len());
        if !totals_known {
            progress.bytes_total = 0;
        }
        let announced: u64 = all.iter().map(|numbers| numbers.keys_total).sum();
        let passed = progress.keys_applied + progress.keys_filtered;
        progress.keys_total = int(announced.max(self.keys_expected).max(passed as u64));
        let synced = all.iter().all(|numbers| numbers.phase == ShardPhase::IncrementalSync);
        progress.percent = match () {
            () if synced && !shards.is_empty() => 100,
            () if progress.keys_total > 0 => (passed * 100 / progress.keys_total).min(99),
            () => 0,
        };
        progress.keys_per_second = self.speed(passed as u64);
        if progress.keys_per_second > 0 && !synced {
            progress.eta_seconds = (progress.keys_total - passed) / progress.keys_per_second;
        }
        self.status.progress = progress;
        self.status.replication = replication;
        self.status.shards = entries;
        self.tell_who_waits(shards, &all);
        self.quarantine(shards, &all, refused);
        self.gauges_out.send_replace(EngineGauges { shards: gauges });
        self.publish();
    }

    /// A full sync that has not begun, and why.
    fn tell_who_waits<S: Observed>(&mut self, shards: &[S], all: &[Numbers]) {
        if self.status.phase != Phase::FullSync {
            return;
        }
        let waits = shards.iter().zip(all).find_map(|(shard, numbers)| {
            let begun = numbers.phase != ShardPhase::Pending || numbers.waiting.is_empty();
            (!begun).then(|| format!("; shard {}: {}", shard.id(), numbers.waiting))
        });
        self.status.message = format!("copying the snapshot{}", waits.unwrap_or_default());
    }

    fn quarantine<S: Observed>(&mut self, shards: &[S], all: &[Numbers], refused: u64) {
        let before = self.status.quarantine.commands;
        self.status.quarantine.commands = int(refused);
        let mut kinds = BTreeMap::new();
        for (kind, count) in all.iter().flat_map(|numbers| by_name(&numbers.kinds)) {
            *kinds.entry(kind).or_default() += count;
        }
        self.status.quarantine.kinds = kinds;
        if int(refused) == before {
            return;
        }
        let samples = shards.iter().flat_map(|shard| {
            shard.progress().quarantined().into_iter().map(|entry| QuarantineSample {
                shard: shard.id().to_owned(),
                offset: entry.offset,
                db: int(entry.db),
                command: entry.refusal.command,
                key: entry.refusal.key.escape_ascii().to_string(),
                error: entry.refusal.error,
            })
        });
        // What an earlier run told of a shard that has not been copied anew since.
        let lacks = |sample: &&QuarantineSample| {
            let of_shard = shards.iter().zip(all).find(|(shard, _)| shard.id() == sample.shard);
            of_shard.is_some_and(|(_, numbers)| numbers.quarantined > 0)
        };
        let mut told: Vec<QuarantineSample> = self.told_before.iter().filter(lacks).cloned().collect();
        for sample in samples {
            // A worker that outlived that run tells its samples again.
            if !told.contains(&sample) {
                told.push(sample);
            }
        }
        told.truncate(QUARANTINE_SAMPLES);
        self.status.quarantine.samples = told;
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

pub fn entry(shard: &impl Observed, numbers: &Numbers, link: &LinkState) -> (ShardStatus, ShardGauges) {
    let last_error = if !numbers.waiting.is_empty() {
        numbers.waiting.clone()
    } else if link.attempts > 1 && !link.last_error.is_empty() {
        format!("{} ({} attempts)", link.last_error, link.attempts)
    } else {
        link.last_error.clone()
    };
    let status = ShardStatus {
        id: shard.id().to_owned(),
        slots: slots_of(shard),
        worker: shard.progress().seat.borrow().worker.clone(),
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
        keys_expired: int(numbers.keys_expired),
        commands_applied: int(numbers.commands),
        keys_filtered: int(numbers.keys_filtered),
        commands_filtered: int(numbers.commands_filtered),
        bytes_read: int(numbers.snapshot_read),
        bytes_total: int(link.snapshot_bytes.unwrap_or_default()),
        resumes: int(link.resumes),
        full_resyncs: int(link.full_resyncs),
        expiries_held: numbers.holding,
        expiries_released: int(numbers.released),
        set_aside: by_name(&numbers.kinds),
        last_error,
    };
    let gauges = ShardGauges {
        id: shard.id().to_owned(),
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
fn slots_of(shard: &impl Observed) -> String {
    let following = shard.progress().following.borrow().clone();
    let slots = shard.slots();
    if following.known && !slots.is_empty() { following.slots.to_string() } else { slots.to_owned() }
}

pub fn by_name(kinds: &BTreeMap<Loss, u64>) -> BTreeMap<String, i64> {
    kinds.iter().map(|(kind, count)| (kind.as_str().to_owned(), int(*count))).collect()
}

fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
