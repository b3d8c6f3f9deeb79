//! What to do next about one RedisMigration (PURE): one step at a time, from what is known of it.

/// All that a decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// Our finalizer is on the object.
    pub finalizer: bool,
    pub suspend: bool,
    /// What the status says of the outcome.
    pub recorded: Recorded,
    /// The target may hold what a later run goes on from.
    pub kept: bool,
    /// The status answers the present generation.
    pub observed: bool,
    /// This process has judged the present generation, and the status says what came of it: a wrong spec, or
    /// suspended.
    pub parked: bool,
    pub claim: Claim,
    pub run: Run,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    Nothing,
    Completed,
    Failed,
}

/// Who holds the migration's Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    Mine,
    /// Nobody, or one who is gone.
    Free,
    Theirs,
}

/// The run in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    Idle,
    /// Tried again after a while; `current`: with the present generation.
    Waiting {
        current: bool,
    },
    Running {
        /// It works by the present generation.
        current: bool,
    },
    /// Asked to stop.
    Stopping,
    Ended(End),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it was asked to.
    Stopped,
    Completed,
    /// For good.
    Failed,
    /// Of something that may pass, such as a server that is not there.
    Transient,
    /// Another process writes to the target.
    Superseded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until something changes.
    Wait,
    /// Take the Lease.
    Claim,
    /// Give the Lease up.
    Release,
    /// Resolve, validate, then start, or say what is wrong.
    Start,
    /// Hand the changed spec to the run.
    Update,
    Stop(Why),
    /// The run has ended and nothing is to be told of it.
    Forget,
    /// Try again after a while.
    PutOff,
    /// Write the outcome.
    Conclude,
    ShowSuspended,
    /// Remove what is kept in the target, then the finalizer.
    CleanUp,
    DropFinalizer,
    /// The outcome stands, whatever the spec says now.
    Acknowledge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Deleted,
    Suspended,
    /// The Lease is somebody else's.
    Lost,
}

pub fn decide(s: &Situation) -> Step {
    match s.run {
        Run::Stopping => Step::Wait,
        Run::Ended(end) => ended(s, end),
        Run::Running { current } => running(s, current),
        Run::Idle => idle(s, false),
        Run::Waiting { current } => idle(s, current),
    }
}

fn ended(s: &Situation, end: End) -> Step {
    match end {
        // True whoever holds the Lease by now: what a later run would go on from is gone from the target.
        End::Completed => Step::Conclude,
        // Where one run failed, as with a pause that ran out while it was frozen, its successor need not.
        End::Failed if s.claim == Claim::Theirs => Step::Forget,
        End::Failed => Step::Conclude,
        End::Stopped => Step::Forget,
        End::Transient | End::Superseded if s.claim != Claim::Mine || s.deleting || s.suspend => Step::Forget,
        End::Transient | End::Superseded => Step::PutOff,
    }
}

fn running(s: &Situation, current: bool) -> Step {
    match s.claim {
        Claim::Theirs => Step::Stop(Why::Lost),
        _ if s.deleting => Step::Stop(Why::Deleted),
        _ if s.suspend => Step::Stop(Why::Suspended),
        // Somebody took our Lease away and nobody has it: the run goes on.
        Claim::Free => Step::Claim,
        Claim::Mine if !current => Step::Update,
        Claim::Mine => Step::Wait,
    }
}

fn idle(s: &Situation, waiting: bool) -> Step {
    if s.claim == Claim::Theirs {
        return Step::Wait;
    }
    let mine = s.claim == Claim::Mine;
    let needs_claim = |step: Step| if mine { step } else { Step::Claim };
    let rest = if mine { Step::Release } else { Step::Wait };
    if s.deleting {
        return if s.finalizer { needs_claim(Step::CleanUp) } else { rest };
    }
    // A failed migration is tried again when its spec is changed; a completed one never.
    let over = s.recorded == Recorded::Completed || s.recorded == Recorded::Failed && s.observed;
    if over {
        let resumable = s.recorded == Recorded::Failed && s.kept;
        return match () {
            () if s.finalizer && !resumable => needs_claim(Step::DropFinalizer),
            () if !s.observed => Step::Acknowledge,
            () => rest,
        };
    }
    if s.parked {
        return rest;
    }
    if s.suspend {
        return needs_claim(Step::ShowSuspended);
    }
    if waiting && mine { Step::Wait } else { needs_claim(Step::Start) }
}

#[cfg(test)]
mod tests;
