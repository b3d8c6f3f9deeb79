//! Condition types and reasons: the only place where their names are written, since `kubectl wait`
//! and other people's scripts depend on them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Always there. True: in sync, or completed.
pub const READY: &str = "Ready";
/// There only while true, never beside [`STALLED`].
pub const RECONCILING: &str = "Reconciling";
/// There only while true, never beside [`RECONCILING`].
pub const STALLED: &str = "Stalled";
pub const PREFLIGHT_PASSED: &str = "PreflightPassed";
pub const FULL_SYNCED: &str = "FullSynced";
pub const IN_SYNC: &str = "InSync";
pub const VERIFIED: &str = "Verified";
pub const CUTOVER_READY: &str = "CutoverReady";
pub const DEGRADED: &str = "Degraded";
/// On every outcome, good or bad.
pub const FINISHED: &str = "Finished";
/// True or False once [`FINISHED`].
pub const SUCCEEDED: &str = "Succeeded";

/// Values of `Condition.reason`.
pub mod reason {
    pub const PREFLIGHT_FAILED: &str = "PreflightFailed";
    pub const INVALID_SPEC: &str = "InvalidSpec";
    pub const SECRET_NOT_FOUND: &str = "SecretNotFound";
    pub const AUTH_FAILED: &str = "AuthFailed";
    pub const SOURCE_UNREACHABLE: &str = "SourceUnreachable";
    pub const TARGET_UNREACHABLE: &str = "TargetUnreachable";
    pub const TARGET_NOT_EMPTY: &str = "TargetNotEmpty";
    pub const FULL_SYNC: &str = "FullSync";
    pub const INCREMENTAL_SYNC: &str = "IncrementalSync";
    pub const AWAITING_APPROVAL: &str = "AwaitingApproval";
    pub const LAG_ABOVE_THRESHOLD: &str = "LagAboveThreshold";
    pub const NOT_CONVERGING: &str = "NotConverging";
    pub const FULL_RESYNC_FORCED: &str = "FullResyncForced";
    pub const SLOTS_MOVED: &str = "SlotsMoved";
    pub const SPOOL_FULL: &str = "SpoolFull";
    pub const COMMANDS_QUARANTINED: &str = "CommandsQuarantined";
    pub const VERIFICATION_FAILED: &str = "VerificationFailed";
    pub const PAUSE_TIMEOUT: &str = "PauseTimeout";
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    pub const SUSPENDED: &str = "Suspended";
    pub const ABORTED: &str = "Aborted";
    pub const COMPLETED: &str = "Completed";
}

/// A condition's `status`. `Unknown` is never written: an unknown milestone is an absent condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    True,
    False,
}

impl Truth {
    pub const fn as_str(self) -> &'static str {
        match self {
            Truth::True => "True",
            Truth::False => "False",
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Truth::True } else { Truth::False }
    }
}

/// `status.conditions`, edited in place.
pub struct Conditions<'a> {
    list: &'a mut Vec<Condition>,
    observed_generation: i64,
}

impl<'a> Conditions<'a> {
    /// `observed_generation`: the `metadata.generation` that what is set from here on was judged by.
    pub fn new(list: &'a mut Vec<Condition>, observed_generation: i64) -> Self {
        Self { list, observed_generation }
    }

    /// Sets one condition. `lastTransitionTime` becomes `now` only when the status changes, as
    /// Kubernetes demands. Answers whether the status, reason or message changed.
    pub fn set(&mut self, type_: &str, truth: Truth, reason: &str, message: &str, now: &Time) -> bool {
        if truth == Truth::True {
            match type_ {
                RECONCILING => drop(self.remove(STALLED)),
                STALLED => drop(self.remove(RECONCILING)),
                _ => {}
            }
        }
        if let Some(condition) = self.list.iter_mut().find(|condition| condition.type_ == type_) {
            let turned = condition.status != truth.as_str();
            let changed = turned || condition.reason != reason || condition.message != message;
            if turned {
                condition.last_transition_time = now.clone();
                condition.status = truth.as_str().to_owned();
            }
            if changed {
                condition.reason = reason.to_owned();
                condition.message = message.to_owned();
            }
            condition.observed_generation = Some(self.observed_generation);
            return changed;
        }
        self.list.push(Condition {
            type_: type_.to_owned(),
            status: truth.as_str().to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            observed_generation: Some(self.observed_generation),
            last_transition_time: now.clone(),
        });
        true
    }

    /// Takes a condition away, such as `Reconciling` when it is over. Answers whether it was there.
    pub fn remove(&mut self, type_: &str) -> bool {
        let before = self.list.len();
        self.list.retain(|condition| condition.type_ != type_);
        self.list.len() != before
    }
}

/// Whether the condition is there and True.
pub fn is_true(list: &[Condition], type_: &str) -> bool {
    list.iter().any(|condition| condition.type_ == type_ && condition.status == Truth::True.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let mut list = Vec::new();
        assert!(Conditions::new(&mut list, 1).set(READY, Truth::False, reason::FULL_SYNC, "copying", &at(1)));
        assert!(!Conditions::new(&mut list, 2).set(
            READY,
            Truth::False,
            reason::FULL_SYNC,
            "copying",
            &at(2)
        ));
        assert!(Conditions::new(&mut list, 2).set(
            READY,
            Truth::False,
            reason::FULL_SYNC,
            "half way",
            &at(3)
        ));
        assert_eq!(list[0].last_transition_time, at(1));
        assert_eq!(list[0].observed_generation, Some(2));
        assert_eq!(list[0].message, "half way");
        assert!(Conditions::new(&mut list, 2).set(
            READY,
            Truth::True,
            reason::INCREMENTAL_SYNC,
            "in sync",
            &at(4)
        ));
        assert_eq!(list[0].last_transition_time, at(4));
        assert_eq!(list.len(), 1);
        assert!(is_true(&list, READY));
    }

    #[test]
    fn reconciling_and_stalled_exclude_each_other() {
        let mut list = Vec::new();
        let mut conditions = Conditions::new(&mut list, 1);
        conditions.set(RECONCILING, Truth::True, reason::FULL_SYNC, "", &at(1));
        conditions.set(STALLED, Truth::True, reason::NOT_CONVERGING, "", &at(2));
        assert_eq!(list.iter().map(|c| c.type_.as_str()).collect::<Vec<_>>(), [STALLED]);
        let mut conditions = Conditions::new(&mut list, 1);
        conditions.set(RECONCILING, Truth::True, reason::FULL_SYNC, "", &at(3));
        assert!(conditions.remove(RECONCILING));
        assert!(!conditions.remove(RECONCILING));
        assert!(list.is_empty());
    }
}
