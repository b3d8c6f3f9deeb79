//! What a worker tells to a coordinator in another process.

use serde::{Deserialize, Serialize};

use crate::api::conditions::reason;
use crate::migration::coordinator::reason_of;
use crate::source::replication::{LinkPhase, LinkState};
use crate::worker::progress::Quarantined;
use crate::worker::{
    Checkpoint, Failed, Following, Numbers, ShardPhase, ShardProgress, Stopped, WorkerError,
};

/// Of keys and errors, which may be of any length; it is all that the status needs.
const TEXT_MAX: usize = 256;

/// All that a worker has to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    pub numbers: Numbers,
    pub link: LinkState,
    pub following: Following,
    pub quarantined: Vec<Quarantined>,
    /// The newest question that this answers.
    pub answered: u64,
    pub over: Option<Over>,
}

/// How a worker's work ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Over {
    Stopped {
        left: Left,
    },
    /// It could not begin in this process, whatever that means for others.
    Declined {
        why: String,
    },
    FellBack {
        offset: i64,
        left: Left,
    },
    KeyExists {
        key: String,
    },
    Fenced {
        message: String,
    },
    Failed {
        reason: String,
        message: String,
        resync: bool,
        left: Left,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    checkpoint: Option<Checkpoint>,
    spooled: bool,
}

impl From<Stopped> for Left {
    fn from(Stopped { checkpoint, spooled }: Stopped) -> Self {
        Self { checkpoint, spooled }
    }
}

impl From<Left> for Stopped {
    fn from(Left { checkpoint, spooled }: Left) -> Self {
        Self { checkpoint, spooled }
    }
}

impl Report {
    /// As it stands now.
    pub fn of(progress: &ShardProgress, answered: u64) -> Self {
        let mut quarantined = progress.quarantined();
        for entry in &mut quarantined {
            entry.refusal.key.truncate(TEXT_MAX);
            entry.refusal.error = shortened(&entry.refusal.error);
        }
        Self {
            // When they were told in this process means nothing in another.
            numbers: Numbers { told: None, ..progress.now() },
            link: progress.link.borrow().clone(),
            following: progress.following.borrow().clone(),
            quarantined,
            answered,
            over: None,
        }
    }

    /// Puts down for the coordinator what was told.
    pub fn put_into(&self, progress: &ShardProgress) {
        progress.replace_quarantined(self.quarantined.clone());
        // Before the numbers: whoever waits looks when these change.
        progress.answered.send_replace(self.answered);
        progress.link.send_if_modified(|link| {
            let news = *link != self.link;
            link.clone_from(&self.link);
            news
        });
        progress.following.send_if_modified(|following| {
            let news = *following != self.following;
            following.clone_from(&self.following);
            news
        });
        progress.numbers.send_replace(self.numbers.clone());
    }

    /// What must be told at once: the rest may wait some seconds.
    pub fn is_urgent_after(&self, before: &Self) -> bool {
        let urgent = |report: &Self| {
            let Report { numbers, link, following, quarantined: _, answered, over } = report.clone();
            (
                (numbers.phase, numbers.stopped, numbers.holding, numbers.why_full),
                (numbers.quarantined, numbers.waiting.is_empty(), numbers.replication_id),
                (link.phase, link.server, link.master, link.full_resyncs, link.resumes),
                (following, answered, over),
            )
        };
        urgent(self) != urgent(before)
    }

    /// Nothing but offsets and lag has moved, as they do when nobody writes.
    pub fn is_idle_after(&self, before: &Self) -> bool {
        let (mut now, mut then) = (self.clone(), before.clone());
        for report in [&mut now, &mut then] {
            let numbers = &mut report.numbers;
            numbers.received_offset = 0;
            numbers.applied_offset = 0;
            numbers.lag_millis = 0;
            // What is not yet applied was told as such.
            numbers.lag_bytes = numbers.lag_bytes.min(1);
            numbers.spool_memory = 0;
            numbers.sent_bytes = 0;
            numbers.batches = 0;
        }
        now == then
    }
}

/// Puts down that nobody works on the shard just now.
pub fn unattended(progress: &ShardProgress, why: &str) {
    progress.link.send_modify(|link| {
        link.phase = LinkPhase::Connecting;
        why.clone_into(&mut link.last_error);
    });
    // The next worker finds out from the target, as after any end of a process.
    progress.following.send_modify(|following| following.known = false);
    progress.numbers.send_modify(|numbers| {
        numbers.stopped = true;
        if numbers.phase == ShardPhase::FullSync {
            numbers.phase = ShardPhase::Pending;
        }
    });
}

impl Over {
    /// `shard`: for messages.
    pub fn of(result: Result<Stopped, Failed>) -> Self {
        let Failed { error, left } = match result {
            Ok(stopped) => return Self::Stopped { left: stopped.into() },
            Err(failed) => failed,
        };
        let left = Left::from(left);
        match error {
            WorkerError::FellBack { offset, .. } => Self::FellBack { offset, left },
            WorkerError::KeyExists { key } => Self::KeyExists { key: shortened(&key) },
            WorkerError::Fenced(message) => Self::Fenced { message },
            error => Self::Failed {
                reason: reason_of(&error).to_owned(),
                message: shortened(&error.to_string()),
                resync: error.calls_for_resync(),
                left,
            },
        }
    }

    /// What the coordinator makes of it.
    #[expect(clippy::result_large_err, reason = "once in the life of a worker")]
    pub fn result(self, shard: &str) -> Result<Stopped, Failed> {
        let failed = |error, left: Left| Err(Failed { error, left: left.into() });
        match self {
            Self::Stopped { left } => Ok(left.into()),
            Self::Declined { why } => failed(WorkerError::Target(why), Left::default()),
            Self::FellBack { offset, left } => {
                failed(WorkerError::FellBack { shard: shard.to_owned(), offset }, left)
            }
            Self::KeyExists { key } => failed(WorkerError::KeyExists { key }, Left::default()),
            Self::Fenced { message } => failed(WorkerError::Fenced(message), Left::default()),
            Self::Failed { reason, message, resync, left } => {
                failed(WorkerError::Told { reason: known_reason(&reason), message, resync }, left)
            }
        }
    }
}

fn known_reason(told: &str) -> &'static str {
    let known = [
        reason::SOURCE_UNREACHABLE,
        reason::TARGET_UNREACHABLE,
        reason::AUTH_FAILED,
        reason::FULL_RESYNC_FORCED,
        reason::COMMANDS_QUARANTINED,
        reason::TARGET_NOT_EMPTY,
    ];
    known.into_iter().find(|known| *known == told).unwrap_or(reason::ABORTED)
}

fn shortened(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Address;
    use crate::spool::{Full, Origin};
    use crate::worker::Refusal;

    #[expect(clippy::result_large_err, reason = "as what it stands for")]
    fn failed(error: WorkerError) -> Result<Stopped, Failed> {
        let checkpoint = Checkpoint { replication_id: "f".repeat(40), offset: 77, db: 0 };
        Err(Failed { error, left: Stopped { checkpoint: Some(checkpoint), spooled: true } })
    }

    fn shard() -> String {
        "h:1".to_owned()
    }

    /// The coordinator judges by these, wherever the worker was.
    #[test]
    fn an_error_told_from_elsewhere_is_judged_as_one_from_here() {
        let errors: [fn() -> WorkerError; 7] = [
            || WorkerError::FellBack { shard: shard(), offset: 5 },
            || WorkerError::KeyExists { key: "k".to_owned() },
            || WorkerError::Fenced("another process has the shard".to_owned()),
            || WorkerError::Denied("NOPERM".to_owned()),
            || WorkerError::Target("gone".to_owned()),
            || WorkerError::LostState { shard: shard(), why: "emptied" },
            || WorkerError::TooManyRefused { shard: shard(), count: 3, last: "OOM".to_owned() },
        ];
        for error in errors {
            let over = serde_json::to_string(&Over::of(failed(error()))).unwrap();
            let over: Over = serde_json::from_str(&over).unwrap();
            let Failed { error: told, left } = over.result("h:1").unwrap_err();
            let (told, error) = (told, error());
            assert_eq!(told.to_string(), error.to_string());
            assert_eq!(reason_of(&told), reason_of(&error), "{error}");
            assert_eq!(told.calls_for_resync(), error.calls_for_resync(), "{error}");
            assert_eq!(told.calls_for_restart(), error.calls_for_restart(), "{error}");
            let key_exists = |error: &WorkerError| matches!(error, WorkerError::KeyExists { .. });
            let fenced = |error: &WorkerError| matches!(error, WorkerError::Fenced(_));
            assert_eq!((key_exists(&told), fenced(&told)), (key_exists(&error), fenced(&error)));
            // From there another worker goes on.
            assert_eq!(left.checkpoint.is_some(), !key_exists(&error) && !fenced(&error), "{error}");
        }
        let stopped = Stopped { checkpoint: None, spooled: true };
        assert_eq!(Over::of(Ok(stopped.clone())).result("h:1").unwrap(), stopped);
    }

    #[test]
    fn what_others_wait_for_is_urgent_and_pings_are_idle() {
        let quiet = Report::default();
        let kind = |change: fn(&mut Report)| {
            let mut report = Report::default();
            change(&mut report);
            (report.is_urgent_after(&quiet), report.is_idle_after(&quiet))
        };
        let (urgent, progress, idle) = ((true, false), (false, false), (false, true));
        assert_eq!(kind(|_| {}), idle);
        assert_eq!(kind(|r| r.numbers.applied_offset = 14), idle);
        assert_eq!(kind(|r| r.numbers.lag_millis = 3), idle);
        assert_eq!(kind(|r| r.numbers.lag_bytes = 3), progress);
        assert_eq!(kind(|r| r.numbers.commands = 3), progress);
        assert_eq!(kind(|r| r.numbers.keys = 3), progress);
        assert_eq!(kind(|r| r.answered = 1), urgent);
        assert_eq!(kind(|r| r.numbers.phase = ShardPhase::FullSync), urgent);
        assert_eq!(kind(|r| r.numbers.holding = true), urgent);
        assert_eq!(kind(|r| r.numbers.quarantined = 1), urgent);
        assert_eq!(kind(|r| r.numbers.waiting = "OOM".to_owned()), urgent);
        assert_eq!(kind(|r| r.numbers.why_full = Some(Full::Limit)), urgent);
        assert_eq!(kind(|r| r.link.phase = LinkPhase::Streaming), urgent);
        assert_eq!(kind(|r| r.link.server = Some(Address::new("h", 1))), urgent);
        assert_eq!(kind(|r| r.following.adoptions = 1), urgent);
        assert_eq!(kind(|r| r.over = Some(Over::of(Ok(Stopped::default())))), urgent);
    }

    #[test]
    fn what_a_worker_tells_arrives_whole() {
        let there = ShardProgress::new();
        there.numbers.send_modify(|numbers| {
            numbers.phase = ShardPhase::IncrementalSync;
            numbers.applied_offset = 42;
            numbers.why_full = Some(Full::Disk { os_error: 28 });
            numbers.quarantined = 1;
        });
        there.link.send_modify(|link| {
            link.origin = Some(Origin { replication_id: "f".repeat(40), offset: 1 });
            link.server = Some(Address::new("::1", 6379));
        });
        there.following.send_modify(|following| following.slots = "0-99,7000".parse().unwrap());
        let refusal = Refusal {
            command: "SET".to_owned(),
            key: vec![255; 5000],
            error: "é".repeat(5000),
            kind: crate::loss::Loss::Commands,
        };
        there.quarantine(Quarantined { offset: 7, db: 0, refusal });
        let text = serde_json::to_string(&Report::of(&there, 3)).unwrap();
        assert!(text.len() < 5000, "{} bytes", text.len());
        let here = ShardProgress::new();
        serde_json::from_str::<Report>(&text).unwrap().put_into(&here);
        assert_eq!(*here.numbers.borrow(), *there.numbers.borrow());
        assert_eq!(*here.link.borrow(), *there.link.borrow());
        assert_eq!(*here.following.borrow(), *there.following.borrow());
        assert_eq!((here.quarantined().len(), *here.answered.borrow()), (1, 3));
    }
}
