//! What a status says when no run tells it, and how much of a change is worth a request (PURE).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::api::conditions::{self, Conditions, Truth, is_true, reason};
use crate::api::status::ShardStatus;
use crate::api::{Phase, Status};

/// How soon a change has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    Nothing,
    /// Offsets and lag, which move even when nobody writes.
    Idle,
    Progress,
    Transition,
}

/// Of the migration as a whole, its shards aside.
pub fn change(before: &Status, now: &Status) -> Change {
    if transition(before) != transition(now) {
        return Change::Transition;
    }
    let without_shards = |status: &Status| Status { shards: Vec::new(), ..status.clone() };
    let (before, mut now) = (without_shards(before), without_shards(now));
    if before == now {
        return Change::Nothing;
    }
    now.replication.lag_bytes = before.replication.lag_bytes;
    now.replication.lag_millis = before.replication.lag_millis;
    now.progress.keys_per_second = before.progress.keys_per_second;
    now.progress.eta_seconds = before.progress.eta_seconds;
    if before == now { Change::Idle } else { Change::Progress }
}

pub fn shard_change(before: Option<&ShardStatus>, now: &ShardStatus) -> Change {
    let Some(before) = before else { return Change::Transition };
    if before == now {
        return Change::Nothing;
    }
    // Nobody but the status remembers what is lacking when this process is gone.
    let told = |shard: &ShardStatus| (shard.phase, shard.worker.clone(), shard.set_aside.is_empty());
    if told(before) != told(now) {
        return Change::Transition;
    }
    let moving = ShardStatus {
        received_offset: before.received_offset,
        applied_offset: before.applied_offset,
        lag_bytes: before.lag_bytes,
        lag_millis: before.lag_millis,
        ..now.clone()
    };
    if *before == moving { Change::Idle } else { Change::Progress }
}

/// What others wait for: told at once.
#[derive(PartialEq)]
struct Transition<'a> {
    phase: Phase,
    generation: i64,
    conditions: Vec<(&'a str, &'a str, &'a str)>,
    refused: bool,
    cut_over: (bool, bool),
    verified: bool,
}

fn transition(status: &Status) -> Transition<'_> {
    fn told(condition: &Condition) -> (&str, &str, &str) {
        (&condition.type_, &condition.status, &condition.reason)
    }
    Transition {
        phase: status.phase,
        generation: status.observed_generation,
        conditions: status.conditions.iter().map(told).collect(),
        refused: status.quarantine.commands > 0,
        cut_over: (status.cutover.start_time.is_some(), status.cutover.completion_time.is_some()),
        verified: status.verification.completion_time.is_some(),
    }
}

/// A status that no run tells, built on the one there was.
pub struct Told<'a> {
    pub before: &'a Status,
    pub generation: i64,
    pub now: Time,
}

impl Told<'_> {
    /// The spec cannot be carried out.
    pub fn invalid(&self, message: &str) -> Status {
        let mut status = self.begin(Phase::Pending, message);
        self.set(&mut status, conditions::READY, false, reason::INVALID_SPEC, message);
        self.set(&mut status, conditions::STALLED, true, reason::INVALID_SPEC, message);
        status
    }

    /// Something that may pass is in the way; it is tried again.
    pub fn waiting(&self, reason: &str, message: &str) -> Status {
        let mut status = self.begin(Phase::Pending, message);
        status.start_time.get_or_insert_with(|| self.now.clone());
        self.set(&mut status, conditions::READY, false, reason, message);
        self.set(&mut status, conditions::RECONCILING, true, reason, message);
        status
    }

    pub fn suspended(&self, message: &str) -> Status {
        let mut status = self.begin(Phase::Suspended, message);
        self.set(&mut status, conditions::READY, false, reason::SUSPENDED, message);
        status
    }

    /// It could not be done.
    pub fn failed(&self, reason: &str, message: &str) -> Status {
        let mut status = self.begin(Phase::Failed, message);
        status.completion_time = Some(self.now.clone());
        self.set(&mut status, conditions::READY, false, reason, message);
        self.set(&mut status, conditions::STALLED, true, reason, message);
        self.set(&mut status, conditions::FINISHED, true, reason, message);
        self.set(&mut status, conditions::SUCCEEDED, false, reason, message);
        status
    }

    /// The same, for another generation of the spec.
    pub fn same(&self) -> Status {
        let mut status = self.before.clone();
        status.observed_generation = self.generation;
        for condition in &mut status.conditions {
            condition.observed_generation = Some(self.generation);
        }
        status
    }

    /// What was true while it ran is so no more; what was reached stays.
    fn begin(&self, phase: Phase, message: &str) -> Status {
        let mut status = self.same();
        status.phase = phase;
        message.clone_into(&mut status.message);
        status.completion_time = None;
        status.cutover.start_time = None;
        let kept =
            [conditions::READY, conditions::PREFLIGHT_PASSED, conditions::FULL_SYNCED, conditions::DEGRADED];
        status.conditions.retain(|condition| kept.contains(&condition.type_.as_str()));
        status
    }

    fn set(&self, status: &mut Status, type_: &str, truth: impl Into<Truth>, reason: &str, message: &str) {
        let mut conditions = Conditions::new(&mut status.conditions, self.generation);
        conditions.set(type_, truth.into(), reason, message, &self.now);
    }
}

/// A changed spec that cannot be carried out, while the run goes on by the one before.
pub fn with_fault(mut status: Status, generation: i64, message: &str, now: &Time) -> Status {
    status.observed_generation = generation;
    let mut conditions = Conditions::new(&mut status.conditions, generation);
    conditions.set(conditions::STALLED, Truth::True, reason::INVALID_SPEC, message, now);
    conditions.set(conditions::READY, Truth::False, reason::INVALID_SPEC, message, now);
    for condition in &mut status.conditions {
        condition.observed_generation = Some(generation);
    }
    status
}

/// Keeps the time of the last transition where nothing has changed since `before`: a new run sets all
/// conditions anew.
pub fn keep_times(status: &mut Status, before: &[Condition]) {
    for condition in &mut status.conditions {
        let same = |old: &&Condition| old.type_ == condition.type_ && old.status == condition.status;
        if let Some(old) = before.iter().find(same) {
            condition.last_transition_time = old.last_transition_time.clone();
        }
    }
}

/// Neither a run nor we have anything to add.
pub fn is_finished(status: &Status) -> bool {
    is_true(&status.conditions, conditions::FINISHED)
}

/// Things that may pass by themselves or by somebody's hand, with no change of the spec.
pub fn is_transient(found: &str) -> bool {
    [reason::SOURCE_UNREACHABLE, reason::TARGET_UNREACHABLE, reason::AUTH_FAILED, reason::SECRET_NOT_FOUND]
        .contains(&found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn types(status: &Status) -> Vec<(&str, &str)> {
        status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect()
    }

    #[test]
    fn what_others_wait_for_is_told_at_once() {
        let quiet = Status::default();
        let with = |change: fn(&mut Status)| {
            let mut status = Status::default();
            change(&mut status);
            super::change(&quiet, &status)
        };
        assert_eq!(with(|_| {}), Change::Nothing);
        assert_eq!(with(|s| s.replication.lag_millis = 3), Change::Idle);
        assert_eq!(with(|s| s.progress.keys_applied = 3), Change::Progress);
        assert_eq!(with(|s| s.phase = Phase::FullSync), Change::Transition);
        assert_eq!(with(|s| s.observed_generation = 2), Change::Transition);
        assert_eq!(with(|s| s.quarantine.commands = 1), Change::Transition);
        assert_eq!(with(|s| s.shards.push(ShardStatus::default())), Change::Nothing);
        let shard = ShardStatus::default();
        assert_eq!(shard_change(None, &shard), Change::Transition);
        let moved = ShardStatus { received_offset: 14, applied_offset: 14, ..shard.clone() };
        assert_eq!(shard_change(Some(&shard), &moved), Change::Idle);
        let worked = ShardStatus { commands_applied: 1, ..moved };
        assert_eq!(shard_change(Some(&shard), &worked), Change::Progress);
        let other = ShardStatus { worker: "b".to_owned(), ..shard.clone() };
        assert_eq!(shard_change(Some(&shard), &other), Change::Transition);
        let lacks = |count| ShardStatus { set_aside: [("Values".to_owned(), count)].into(), ..shard.clone() };
        assert_eq!(shard_change(Some(&shard), &lacks(1)), Change::Transition);
        assert_eq!(shard_change(Some(&lacks(1)), &lacks(2)), Change::Progress);
    }

    #[test]
    fn statuses_without_a_run_obey_kstatus() {
        let mut before = Status::default();
        let mut list = Conditions::new(&mut before.conditions, 1);
        for type_ in
            [conditions::READY, conditions::IN_SYNC, conditions::FULL_SYNCED, conditions::CUTOVER_READY]
        {
            list.set(type_, Truth::True, reason::INCREMENTAL_SYNC, "", &at(1));
        }
        let told = Told { before: &before, generation: 2, now: at(5) };
        let suspended = told.suspended("");
        assert_eq!(types(&suspended), [("Ready", "False"), ("FullSynced", "True")]);
        assert_eq!(
            types(&told.invalid("")),
            [("Ready", "False"), ("FullSynced", "True"), ("Stalled", "True")]
        );
        let waiting = told.waiting(reason::AUTH_FAILED, "");
        assert_eq!(types(&waiting), [("Ready", "False"), ("FullSynced", "True"), ("Reconciling", "True")]);
        let failed = Told { before: &waiting, ..told }.failed(reason::DEADLINE_EXCEEDED, "");
        assert!(is_finished(&failed) && types(&failed).contains(&("Succeeded", "False")));
        assert!(!types(&failed).iter().any(|(type_, _)| *type_ == "Reconciling"));
        for status in [&suspended, &waiting, &failed] {
            assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(2)));
            assert_eq!(status.observed_generation, 2);
        }
        let faulty = with_fault(before.clone(), 3, "no", &at(9));
        assert!(
            types(&faulty).contains(&("Stalled", "True")) && types(&faulty).contains(&("Ready", "False"))
        );
    }

    #[test]
    fn a_new_run_keeps_the_times_of_what_is_still_so() {
        let mut before = Status::default();
        Conditions::new(&mut before.conditions, 1).set(conditions::READY, Truth::False, "A", "", &at(1));
        let mut now = Status::default();
        let mut list = Conditions::new(&mut now.conditions, 1);
        list.set(conditions::READY, Truth::False, "B", "", &at(7));
        list.set(conditions::FULL_SYNCED, Truth::True, "B", "", &at(7));
        keep_times(&mut now, &before.conditions);
        let times: Vec<_> = now.conditions.iter().map(|c| c.last_transition_time.clone()).collect();
        assert_eq!(times, [at(1), at(7)]);
    }
}
