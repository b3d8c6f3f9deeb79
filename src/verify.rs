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
//!
//! # Commands used
//!
//! All are plain reads. Source and target: SCAN, GETRANGE, STRLEN, GET, TYPE, PTTL, PEXPIRETIME,
//! EXISTS, DUMP, MEMORY USAGE, INFO; for values over [`VerifyInput::chunk_above`]: LLEN, LRANGE,
//! HLEN, HSCAN, HMGET, HPEXPIRETIME, SCARD, SSCAN, SISMEMBER, SMISMEMBER, ZCARD, ZSCAN, ZSCORE,
//! ZMSCORE, XLEN, XRANGE, XINFO, XPENDING; SELECT with several databases; in a cluster READONLY,
//! ASKING, CLUSTER SLOTS; CLIENT NO-TOUCH if allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::connection::{Address, ConnectionError};
use crate::resp::{Next, ReplyVerdict};

mod chunks;
mod expiry;
mod extra;
mod frame;
mod keys;
mod ledger;
mod look;
mod payload;
mod questions;
mod scan;
mod side;
mod values;
mod wire;

use expiry::Question;
use extra::Pass;
use frame::{Frame, FrameError};
use keys::{Sample, Suspects};
use ledger::Ledger;
use look::Findings;
pub use side::{Deployment, NodeShare};
use side::{Links, Side};
pub use wire::WireError;

/// Keys under suspicion take no more memory than this; past it the next round scans again.
const SUSPECT_BYTES: usize = 64 << 20;
/// Buckets of all ledgers together, 512 KiB: writes leave single buckets open, not all keys.
const LEDGER_BUCKETS: usize = 1 << 16;
/// Keys with this prefix are ours, on either side.
const OWN_PREFIX: &[u8] = b"redis-migration:";
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Batches of keys that may wait between the scan and the comparison of values.
const HARD_BATCHES: usize = 4;

/// Resolves once everything the source had written when it was called is applied on the target.
pub type Settle = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// True for the keys that the migration copies; the number is the source's database.
pub type KeyFilter = Arc<dyn Fn(u64, &[u8]) -> bool + Send + Sync>;

/// What is compared, and how.
#[derive(Clone)]
pub struct VerifyInput {
    pub source: Deployment,
    pub target: Deployment,
    /// Source database → target database; those not named keep their number.
    pub databases: BTreeMap<u64, u64>,
    /// `None`: every key.
    pub include: Option<KeyFilter>,
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
    /// Keys that changed at every look, or hold an element too large for one reply, so that nothing
    /// can be said; no differences.
    pub unsettled: u64,
    /// Keys not equal at first sight that did not fit into memory in the last round, and were not
    /// looked at with care. Not zero: the sides are far apart, the counts above are too low.
    pub unchecked: u64,
    pub samples: Vec<Difference>,
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
            Self::Stopped | Self::Task(_) => false,
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
    let mut unchecked = 0;
    let mut ran = 0;
    let mut rescan = true;
    for round in 1..=rounds {
        ran = round;
        context.begin_round(round);
        if rescan {
            if round > 1 {
                (context.settle)().await;
            }
            first_sight(&context).await?;
        }
        let suspects = context.take_suspects();
        unchecked = suspects.dropped();
        rescan = unchecked > 0;
        let mut next = context.no_suspects();
        findings = look::look(&context, suspects.into_lists(), &mut next).await?;
        if next.len() == 0 && !rescan {
            break;
        }
        context.give_suspects(next);
    }
    Ok(VerifyReport {
        mode: context.mode,
        rounds: ran,
        keys_compared: context.compared.load(Ordering::Relaxed),
        missing: findings.missing,
        different: findings.different,
        extra: findings.extra,
        unsettled: findings.unsettled,
        unchecked,
        samples: findings.samples,
    })
}

/// Every key once, all nodes of both sides at the same time.
async fn first_sight(context: &Arc<Context>) -> Result<(), VerifyError> {
    context.compared.store(0, Ordering::Relaxed);
    context.give_suspects(context.no_suspects());
    context.groups.iter().for_each(|group| group.ledger.clear());
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
    for node in 0..context.target.nodes() {
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
            for node in 0..context.target.nodes() {
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

/// Two databases that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    source: u64,
    target: u64,
}

/// A database of the target, with the keys of all source databases that end in it.
struct Group {
    /// Indexes of pairs, never empty.
    pairs: Vec<usize>,
    ledger: Ledger,
}

fn groups_of(pairs: &[Pair]) -> Vec<Group> {
    let mut by_target: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        by_target.entry(pair.target).or_default().push(index);
    }
    let buckets = (LEDGER_BUCKETS / by_target.len().max(1)).max(256);
    by_target.into_values().map(|pairs| Group { pairs, ledger: Ledger::new(buckets) }).collect()
}

/// What all tasks of one verification share.
struct Context {
    source: Arc<Side>,
    target: Arc<Side>,
    pairs: Vec<Pair>,
    groups: Vec<Group>,
    include: Option<KeyFilter>,
    mode: VerifyMode,
    sample: Option<Sample>,
    question: Question,
    source_memory_usage: bool,
    target_memory_usage: bool,
    chunk_above: u64,
    max_samples: usize,
    settle: Settle,
    compared: AtomicU64,
    /// Locked for the few keys that are not equal at first sight.
    suspects: Mutex<Suspects>,
    progress: watch::Sender<VerifyProgress>,
}

impl Context {
    async fn prepare(
        input: VerifyInput,
        progress: watch::Sender<VerifyProgress>,
    ) -> Result<Self, VerifyError> {
        let VerifyInput {
            source,
            target,
            databases,
            include,
            mode,
            rounds: _,
            max_samples,
            chunk_above,
            settle,
        } = input;
        let absolute = source.version.has_redis(7, 0) && target.version.has_redis(7, 0);
        let source = Arc::new(Side::new(source));
        let target = Arc::new(Side::new(target));
        let held = key_counts(&source).await?;
        let taken = key_counts(&target).await?;
        let pairs = pairs_of(held.keys().copied(), taken.keys().copied(), &databases);
        let keys_total = held.values().sum();
        progress.send_modify(|progress| progress.keys_total = keys_total);
        Ok(Self {
            source_memory_usage: knows_memory_usage(&source).await?,
            target_memory_usage: knows_memory_usage(&target).await?,
            source,
            target,
            suspects: Mutex::new(Suspects::new(pairs.len(), SUSPECT_BYTES)),
            groups: groups_of(&pairs),
            pairs,
            include,
            mode,
            sample: match mode {
                VerifyMode::Sample { percent } => Some(Sample::percent(percent)),
                VerifyMode::Full | VerifyMode::Keys => None,
            },
            question: if absolute { Question::Absolute } else { Question::Relative },
            chunk_above,
            max_samples,
            settle,
            compared: AtomicU64::new(0),
            progress,
        })
    }

    fn pair(&self, index: usize) -> Pair {
        self.pairs.get(index).copied().unwrap_or(Pair { source: 0, target: 0 })
    }

    /// Other source databases that end in the same target database.
    fn merged_with(&self, index: usize) -> Vec<u64> {
        let this = self.pair(index);
        let others = self.pairs.iter().filter(|pair| pair.target == this.target && **pair != this);
        others.map(|pair| pair.source).collect()
    }

    fn visible(&self, pair: usize, key: &[u8]) -> bool {
        !key.starts_with(OWN_PREFIX)
            && self.sample.is_none_or(|sample| sample.picks(key))
            && self.include.as_ref().is_none_or(|include| include(self.pair(pair).source, key))
    }

    /// Enters a key of the source into the ledger of the target database it belongs to.
    fn enter(&self, pair: usize, key: &[u8]) {
        let target = self.pair(pair).target;
        let group = self
            .groups
            .iter()
            .find(|group| group.pairs.first().is_some_and(|&first| self.pair(first).target == target));
        if let Some(group) = group {
            group.ledger.add(key);
        }
    }

    fn suspect(&self, pair: usize, key: &[u8]) {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).push(pair, key);
    }

    fn no_suspects(&self) -> Suspects {
        Suspects::new(self.pairs.len(), SUSPECT_BYTES)
    }

    fn take_suspects(&self) -> Suspects {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *suspects, self.no_suspects())
    }

    fn give_suspects(&self, suspects: Suspects) {
        *self.suspects.lock().unwrap_or_else(PoisonError::into_inner) = suspects;
    }

    fn count_compared(&self, keys: usize) {
        self.compared.fetch_add(keys as u64, Ordering::Relaxed);
    }

    fn begin_round(&self, round: u32) {
        self.progress.send_modify(|progress| {
            progress.round = round;
            progress.differences = 0;
        });
    }

    fn publish(&self) {
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        let keys_compared = self.compared.load(Ordering::Relaxed);
        self.progress.send_modify(|progress| {
            progress.keys_compared = keys_compared;
            progress.suspects = suspects;
        });
    }

    fn publish_differences(&self, differences: u64) {
        self.publish();
        self.progress.send_modify(|progress| progress.differences = differences);
    }
}

/// Every source database that holds keys, and every target database that one of the source maps
/// onto: keys in a target database that nothing maps onto are none of the migration's.
fn pairs_of(
    source: impl Iterator<Item = u64>,
    target: impl Iterator<Item = u64>,
    map: &BTreeMap<u64, u64>,
) -> Vec<Pair> {
    let mapped = |source: u64| map.get(&source).copied().unwrap_or(source);
    let mut pairs: BTreeSet<Pair> = source.map(|source| Pair { source, target: mapped(source) }).collect();
    for target in target {
        let named = map.iter().filter(|(_, to)| **to == target).map(|(from, _)| *from);
        let same = (mapped(target) == target).then_some(target);
        pairs.extend(named.chain(same).map(|source| Pair { source, target }));
    }
    pairs.into_iter().collect()
}

/// Keys in each database of a side, from INFO.
async fn key_counts(side: &Arc<Side>) -> Result<BTreeMap<u64, u64>, VerifyError> {
    let mut counts = BTreeMap::new();
    let mut links = side.links(0);
    for node in 0..side.nodes() {
        let text = match patient_info(&mut links, node).await? {
            Some(text) => text,
            // Not allowed: the first database is what can be assumed.
            None => b"db0:keys=0".to_vec(),
        };
        for line in text.split(|byte| *byte == b'\n') {
            let Some((db, keys)) = keyspace_line(line) else { continue };
            *counts.entry(db).or_default() += keys;
        }
    }
    Ok(counts)
}

async fn patient_info(links: &mut Links, node: usize) -> Result<Option<Vec<u8>>, VerifyError> {
    let mut attempt = 0;
    loop {
        let asked = async {
            let wire = links.open(node).await?;
            let refusal = match wire.call(&[&b"INFO"[..], b"keyspace"]).await? {
                Frame::Bulk(Some(text)) => return Ok(Some(text.to_vec())),
                Frame::Error(text) => text.to_vec(),
                _ => return Ok(None),
            };
            let error = VerifyError::refused(wire.address(), b"INFO", &refusal);
            if error.is_transient() { Err(error) } else { Ok(None) }
        };
        match asked.await {
            Err(error) if error.is_transient() && attempt < side::ATTEMPTS => {
                links.reset();
                side::back_off(attempt).await;
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// `db3:keys=12,expires=0,…`
fn keyspace_line(line: &[u8]) -> Option<(u64, u64)> {
    let line = std::str::from_utf8(line).ok()?.trim();
    let (db, rest) = line.strip_prefix("db")?.split_once(":keys=")?;
    let keys = rest.split(',').next()?;
    Some((db.parse().ok()?, keys.parse().ok()?))
}

/// MEMORY USAGE came with Redis 4.0, and providers may forbid it.
async fn knows_memory_usage(side: &Arc<Side>) -> Result<bool, VerifyError> {
    if !side.deployment.version.has_redis(4, 0) {
        return Ok(false);
    }
    let mut links = side.links(0);
    let wire = links.open(0).await?;
    let reply = wire.call(&[&b"MEMORY"[..], b"USAGE", b"redis-migration:probe"]).await?;
    // In a cluster the probe may belong to another node, which is an answer, too.
    Ok(match reply {
        Frame::Error(text) => matches!(ReplyVerdict::of(text).next(), Next::Reroute | Next::RetryLater),
        _ => true,
    })
}

/// The value of `name:` in a reply of INFO; empty when there is none.
fn info_field<'i>(info: &'i [u8], name: &[u8]) -> &'i [u8] {
    let mut lines = info.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(b":"));
    value.unwrap_or_default().trim_ascii_end()
}

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod tests;
