//! Compares source and target while traffic goes on.
//!
//! A round first looks at every key: [`scan`] reads the source's keys page by page and asks both
//! sides about each; [`extra`] reads the target's keys and finds those that the source has not.
//! Whatever is not equal at first sight is a *suspect*, and a suspect counts only after a careful
//! [`look`], which waits until the target holds what the source had written. Every further round
//! looks again at what the round before left; what the last one leaves is the result.
//!
//! Values are compared by the cheapest question that proves equality: strings by their bytes, other
//! types by DUMP (equal bytes are equal values, others are decoded and compared by content), huge
//! values in chunks. Expiries may be a second apart. A key about to expire, or one that did, is no
//! difference while it is gone on one side only. Keys of our own (`redis-migration:`) are invisible.
//! What the target cannot hold by its version (streams, expiries of hash fields) is no difference
//! either: streams that are missing there are counted apart.
//!
//! # Commands used
//!
//! All are plain reads. Source and target: SCAN, GETRANGE, STRLEN, GET, TYPE, PTTL, PEXPIRETIME,
//! EXISTS, DUMP, MEMORY USAGE, INFO; for values over [`VerifyInput::chunk_above`]: LLEN, LRANGE,
//! HLEN, HSCAN, HMGET, HPEXPIRETIME, SCARD, SSCAN, SISMEMBER, SMISMEMBER, ZCARD, ZSCAN, ZSCORE,
//! ZMSCORE, XLEN, XRANGE, XINFO, XPENDING; SELECT with several databases; in a cluster READONLY,
//! ASKING, CLUSTER SLOTS; CLIENT NO-TOUCH if allowed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::connection::{Address, ConnectionError};
use crate::resp::{Next, ReplyVerdict};
use crate::transform::script::Script;

mod chunks;
mod context;
mod expiry;
mod extra;
pub(crate) mod frame;
mod judge;
pub(crate) mod keys;
mod ledger;
mod look;
mod payload;
mod questions;
mod scan;
mod scripted;
mod side;
mod values;
pub(crate) mod wire;

use context::Context;
use extra::Pass;
use frame::FrameError;
use look::Findings;
use side::Side;
pub use side::{Deployment, NodeShare};
pub use wire::WireError;

/// What the keys that differ may take to be remembered.
const DIFFERING_BYTES: usize = 16 << 20;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Batches of keys that may wait between the scan and the comparison of values.
const HARD_BATCHES: usize = 4;

/// Resolves once everything the source had written when it was called is applied on the target.
pub type Settle = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// True for the keys that the migration copies; the number is the source's database.
pub type KeyFilter = Arc<dyn Fn(u64, &[u8]) -> bool + Send + Sync>;

/// True for the databases of the source that the migration copies.
pub type DatabaseChoice = Arc<dyn Fn(u64) -> bool + Send + Sync>;

/// What is compared, and how.
#[derive(Clone)]
pub struct VerifyInput {
    pub source: Deployment,
    pub target: Deployment,
    /// Source database → target database; those not named keep their number.
    pub databases: BTreeMap<u64, u64>,
    /// Databases of the source that the migration copies; `None`: all.
    pub copied: Option<DatabaseChoice>,
    /// `None`: every key of these.
    pub include: Option<KeyFilter>,
    /// What names and drops keys on the way: only those that it leaves alone are compared, and keys that only the
    /// target has are not looked for.
    pub script: Option<Script>,
    pub mode: VerifyMode,
    /// Looks at least once, also for 0.
    pub rounds: u32,
    /// Differences described in the report; all are counted.
    pub max_samples: usize,
    /// Values that take more bytes than this are compared in chunks. [`CHUNK_ABOVE`] is a good one.
    pub chunk_above: u64,
    pub settle: Settle,
}

/// Serializing a larger value at once would hold up the server's other clients for too long.
pub const CHUNK_ABOVE: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyMode {
    Full,
    /// As `Full`, for a share of the keys: the same ones on both sides and in every run.
    Sample {
        percent: u32,
    },
    /// Existence, type and expiry; no values.
    Keys,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    /// From 1.
    pub round: u32,
    pub keys_compared: u64,
    /// Keys of the source when the verification began, own and left out ones included.
    pub keys_total: u64,
    /// Keys not equal at first sight, not yet looked at with care.
    pub suspects: u64,
    /// Differences of the current round so far.
    pub differences: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    pub mode: VerifyMode,
    pub rounds: u32,
    /// Keys of the source that were compared; a key that SCAN returns twice counts twice.
    pub keys_compared: u64,
    pub missing: u64,
    pub different: u64,
    pub extra: u64,
    /// Keys whose value changed at every look, or holds an element too large for one reply. Nothing
    /// can be said about them: they are no differences, and not equal either.
    pub unsettled: u64,
    /// The first of them, printable.
    pub unsettled_keys: Vec<String>,
    /// Keys not equal at first sight that did not fit into memory in the last round, and were not
    /// looked at with care. Not zero: the sides are far apart, the counts above are too low.
    pub unchecked: u64,
    pub samples: Vec<Difference>,
    /// Keys of the source that the script changes or drops, which are not compared.
    pub not_compared: u64,
    /// Keys whose expiry the target holds, as it does until the migration is complete; no differences.
    pub held: u64,
    /// Keys that the target cannot hold, by its version: not compared.
    pub unsupported: u64,
    pub differing: Differing,
    /// What the last look at every key took, without the careful looks at some of them.
    pub took: Duration,
}

impl VerifyReport {
    /// All that speaks against the target holding what the source holds.
    pub fn differences(&self) -> u64 {
        self.missing + self.different + self.extra + self.unchecked
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Printable, shortened.
    pub key: String,
    /// On the source.
    pub db: u64,
    pub kind: DifferenceKind,
    /// What differs, in few words; never a value.
    pub detail: String,
}

/// Keys for who can repair them: by the source's database, no more than fit into some memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differing {
    pub keys: Vec<(u64, Vec<u8>, DifferenceKind)>,
    bytes: usize,
}

impl Differing {
    fn push(&mut self, db: u64, key: &[u8], kind: DifferenceKind) {
        let bytes = self.bytes + key.len() + size_of::<(u64, Vec<u8>, DifferenceKind)>();
        if bytes <= DIFFERING_BYTES {
            self.bytes = bytes;
            self.keys.push((db, key.to_vec(), kind));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// Only on the source.
    Missing,
    /// Type, expiry or value.
    Different,
    /// Only on the target.
    Extra,
}

/// Why a verification could not be finished. A difference is no error.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Wire(#[from] WireError),
    /// `text` is the server's.
    #[error("{address} refused {command}: {text}")]
    Refused { address: Address, command: String, text: String },
    #[error("{address} answered {command} with something else than it should")]
    Unexpected { address: Address, command: &'static str },
    #[error("no node answers for key {key}; does the cluster cover all slots?")]
    NoOwner { key: String },
    #[error("a side without nodes cannot be compared")]
    NoNode,
    #[error("spec.filter.lua: {0}")]
    Script(#[from] crate::transform::script::ScriptError),
    #[error("verification stopped")]
    Stopped,
    #[error("a part of the verification broke down: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl VerifyError {
    /// True when a new connection and another attempt may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connection(error) => error.is_transient(),
            Self::Wire(error) => !matches!(error, WireError::Garbled { .. }),
            Self::Refused { text, .. } => {
                matches!(ReplyVerdict::of(text.as_bytes()).next(), Next::Reroute | Next::RetryLater)
            }
            Self::Unexpected { .. } | Self::NoOwner { .. } | Self::NoNode => false,
            Self::Stopped | Self::Task(_) | Self::Script(_) => false,
        }
    }

    fn refused(address: &Address, command: &[u8], text: &[u8]) -> Self {
        // Of the connection's making, so that what a server echoes is cut off in one place.
        match ConnectionError::from_reply(address, command, text) {
            ConnectionError::Server { address, command, text } => Self::Refused { address, command, text },
            error => Self::Connection(error),
        }
    }

    fn garbled(address: &Address, fault: FrameError) -> Self {
        Self::Wire(WireError::Garbled { address: address.clone(), fault })
    }
}

/// Keys that there are now, those that are not compared included.
pub async fn count_keys(deployment: Deployment) -> Result<u64, VerifyError> {
    let counts = context::key_counts(&Arc::new(Side::new(deployment))).await?;
    Ok(counts.into_values().sum())
}

/// Compares, round by round, until nothing differs or the rounds are used up. `stop` turning true
/// ends it with [`VerifyError::Stopped`].
pub async fn verify(
    input: VerifyInput,
    progress: watch::Sender<VerifyProgress>,
    mut stop: watch::Receiver<bool>,
) -> Result<VerifyReport, VerifyError> {
    tokio::select! {
        // A sender that is gone never asks to stop.
        Ok(_) = stop.wait_for(|stop| *stop) => Err(VerifyError::Stopped),
        result = rounds(input, progress) => result,
    }
}

async fn rounds(
    input: VerifyInput,
    progress: watch::Sender<VerifyProgress>,
) -> Result<VerifyReport, VerifyError> {
    let rounds = input.rounds.max(1);
    let context = Arc::new(Context::prepare(input, progress).await?);
    let mut findings = Findings::default();
    let (mut unchecked, mut unsupported) = (0, 0);
    let mut ran = 0;
    let mut rescan = true;
    let mut took = Duration::ZERO;
    for round in 1..=rounds {
        ran = round;
        context.begin_round(round);
        if rescan {
            if round > 1 {
                (context.settle)().await;
            }
            let began = Instant::now();
            first_sight(&context).await?;
            took = began.elapsed();
            unsupported = 0;
        }
        let suspects = context.take_suspects();
        unchecked = suspects.dropped();
        rescan = unchecked > 0;
        let mut next = context.no_suspects();
        findings = look::look(&context, suspects.into_lists(), &mut next).await?;
        // Not looked at again.
        unsupported += findings.unsupported;
        if next.len() == 0 && !rescan {
            break;
        }
        context.give_suspects(next);
    }
    Ok(VerifyReport {
        mode: context.mode,
        rounds: ran,
        keys_compared: context.compared(),
        missing: findings.missing,
        different: findings.different,
        extra: findings.extra,
        unsettled: findings.unsettled,
        unsettled_keys: findings.unsettled_keys,
        unchecked,
        samples: findings.samples,
        not_compared: context.not_compared(),
        held: context.held(),
        unsupported,
        differing: findings.differing,
        took,
    })
}

/// Every key once, all nodes of both sides at the same time.
async fn first_sight(context: &Arc<Context>) -> Result<(), VerifyError> {
    context.start_over();
    let mut tasks = JoinSet::new();
    for node in 0..context.source.nodes() {
        let context = Arc::clone(context);
        tasks.spawn(async move {
            for pair in 0..context.pairs.len() {
                let (hand, inbox) = mpsc::channel(HARD_BATCHES);
                let values = values::compare_values(Arc::clone(&context), pair, inbox);
                let scan = scan::compare_node(Arc::clone(&context), node, pair, hand);
                let (scanned, compared) = tokio::join!(scan, values);
                // When the values failed the scan only noticed that nobody takes them.
                compared?;
                scanned?;
            }
            Ok::<(), VerifyError>(())
        });
    }
    // What the target calls the keys that a script has named is not known.
    let target_nodes = if context.script.is_none() { context.target.nodes() } else { 0 };
    for node in 0..target_nodes {
        let context = Arc::clone(context);
        tasks.spawn(async move {
            for group in 0..context.groups.len() {
                extra::pass(Arc::clone(&context), node, group, Pass::Count).await?;
            }
            Ok(())
        });
    }
    join(context, tasks).await?;
    let mut tasks = JoinSet::new();
    for (index, group) in context.groups.iter().enumerate() {
        if !group.ledger.is_balanced() {
            for node in 0..target_nodes {
                tasks.spawn(extra::pass(Arc::clone(context), node, index, Pass::Ask));
            }
        }
    }
    join(context, tasks).await
}

/// Waits for all; the first failure ends the others.
async fn join(context: &Context, mut tasks: JoinSet<Result<(), VerifyError>>) -> Result<(), VerifyError> {
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    loop {
        tokio::select! {
            done = tasks.join_next() => match done {
                Some(result) => result??,
                None => return Ok(()),
            },
            _ = ticks.tick() => context.publish(),
        }
    }
}

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod tests;
