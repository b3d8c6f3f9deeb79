//! What all tasks of one verification share: both sides, which databases of them are compared, the
//! ledgers of their keys, and what is under suspicion.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::expiry::Question;
use super::frame::Frame;
use super::keys::{Sample, Suspects};
use super::ledger::Ledger;
use super::side::{self, Links, Side};
use super::{KeyFilter, Settle, VerifyError, VerifyInput, VerifyMode, VerifyProgress};
use crate::resp::{Next, ReplyVerdict};
use crate::target::keys::PREFIX;
use crate::transform::script::Script;
use crate::version::ServerVersion;

/// Keys under suspicion take no more memory than this; past it the next round scans again.
const SUSPECT_BYTES: usize = 64 << 20;
/// Buckets of all ledgers together, 512 KiB: writes leave single buckets open, not all keys.
const LEDGER_BUCKETS: usize = 1 << 16;

/// Two databases that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pair {
    pub source: u64,
    pub target: u64,
}

/// A database of the target, with the keys of all source databases that end in it.
pub(super) struct Group {
    /// Indexes of pairs, never empty.
    pub pairs: Vec<usize>,
    pub ledger: Ledger,
}

fn groups_of(pairs: &[Pair]) -> Vec<Group> {
    let mut by_target: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        by_target.entry(pair.target).or_default().push(index);
    }
    let buckets = (LEDGER_BUCKETS / by_target.len().max(1)).max(256);
    by_target.into_values().map(|pairs| Group { pairs, ledger: Ledger::new(buckets) }).collect()
}

/// What both sides can hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    pub field_expiries: bool,
    pub streams: bool,
}

impl Abilities {
    fn of(source: ServerVersion, target: ServerVersion) -> Self {
        Abilities {
            field_expiries: source.has_field_expiry() && target.has_field_expiry(),
            streams: target.has_redis(5, 0),
        }
    }
}

/// What all tasks of one verification share.
pub(super) struct Context {
    pub source: Arc<Side>,
    pub target: Arc<Side>,
    pub pairs: Vec<Pair>,
    pub groups: Vec<Group>,
    include: Option<KeyFilter>,
    pub script: Option<Script>,
    not_compared: AtomicU64,
    pub mode: VerifyMode,
    sample: Option<Sample>,
    pub question: Question,
    pub abilities: Abilities,
    pub source_memory_usage: bool,
    pub target_memory_usage: bool,
    pub chunk_above: u64,
    pub max_samples: usize,
    pub settle: Settle,
    compared: AtomicU64,
    held: AtomicU64,
    /// Locked for the few keys that are not equal at first sight.
    suspects: Mutex<Suspects>,
    progress: watch::Sender<VerifyProgress>,
}

impl Context {
    pub async fn prepare(
        input: VerifyInput,
        progress: watch::Sender<VerifyProgress>,
    ) -> Result<Self, VerifyError> {
        let VerifyInput {
            source,
            target,
            databases,
            copied,
            include,
            script,
            mode,
            rounds: _,
            max_samples,
            chunk_above,
            settle,
        } = input;
        let absolute = source.version.has_redis(7, 0) && target.version.has_redis(7, 0);
        let abilities = Abilities::of(source.version, target.version);
        let source = Arc::new(Side::new(source));
        let target = Arc::new(Side::new(target));
        let held = key_counts(&source).await?;
        let taken = key_counts(&target).await?;
        let mut pairs = pairs_of(held.keys().copied(), taken.keys().copied(), &databases);
        // The target need not have these at all.
        pairs.retain(|pair| copied.as_ref().is_none_or(|copied| copied(pair.source)));
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
            script,
            not_compared: AtomicU64::new(0),
            mode,
            sample: match mode {
                VerifyMode::Sample { percent } => Some(Sample::percent(percent)),
                VerifyMode::Full | VerifyMode::Keys => None,
            },
            abilities,
            question: if absolute { Question::Absolute } else { Question::Relative },
            chunk_above,
            max_samples,
            settle,
            compared: AtomicU64::new(0),
            held: AtomicU64::new(0),
            progress,
        })
    }

    pub fn pair(&self, index: usize) -> Pair {
        self.pairs.get(index).copied().unwrap_or(Pair { source: 0, target: 0 })
    }

    /// Other source databases that end in the same target database.
    pub fn merged_with(&self, index: usize) -> Vec<u64> {
        let this = self.pair(index);
        let others = self.pairs.iter().filter(|pair| pair.target == this.target && **pair != this);
        others.map(|pair| pair.source).collect()
    }

    pub fn visible(&self, pair: usize, key: &[u8]) -> bool {
        !key.starts_with(PREFIX)
            && self.sample.is_none_or(|sample| sample.picks(key))
            && self.include.as_ref().is_none_or(|include| include(self.pair(pair).source, key))
    }

    /// Enters a key of the source into the ledger of the target database it belongs to.
    pub fn enter(&self, pair: usize, key: &[u8]) {
        let target = self.pair(pair).target;
        let group = self
            .groups
            .iter()
            .find(|group| group.pairs.first().is_some_and(|&first| self.pair(first).target == target));
        if let Some(group) = group {
            group.ledger.add(key);
        }
    }

    pub fn suspect(&self, pair: usize, key: &[u8]) {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).push(pair, key);
    }

    pub fn no_suspects(&self) -> Suspects {
        Suspects::new(self.pairs.len(), SUSPECT_BYTES)
    }

    pub fn take_suspects(&self) -> Suspects {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *suspects, self.no_suspects())
    }

    pub fn give_suspects(&self, suspects: Suspects) {
        *self.suspects.lock().unwrap_or_else(PoisonError::into_inner) = suspects;
    }

    pub fn compared(&self) -> u64 {
        self.compared.load(Ordering::Relaxed)
    }

    /// Keys that the script changes or drops.
    pub fn not_compared(&self) -> u64 {
        self.not_compared.load(Ordering::Relaxed)
    }

    pub fn count_not_compared(&self, keys: usize) {
        self.not_compared.fetch_add(keys as u64, Ordering::Relaxed);
    }

    /// Keys whose expiry the target holds.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    pub fn count_held(&self, held: bool) {
        if held {
            self.held.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn count_compared(&self, keys: usize) {
        self.compared.fetch_add(keys as u64, Ordering::Relaxed);
    }

    /// Before every key is looked at once more.
    pub fn start_over(&self) {
        self.compared.store(0, Ordering::Relaxed);
        self.held.store(0, Ordering::Relaxed);
        self.not_compared.store(0, Ordering::Relaxed);
        self.give_suspects(self.no_suspects());
        self.groups.iter().for_each(|group| group.ledger.clear());
    }

    pub fn begin_round(&self, round: u32) {
        self.progress.send_modify(|progress| {
            progress.round = round;
            progress.differences = 0;
        });
    }

    pub fn publish(&self) {
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        let keys_compared = self.compared();
        self.progress.send_modify(|progress| {
            progress.keys_compared = keys_compared;
            progress.suspects = suspects;
        });
    }

    pub fn publish_differences(&self, differences: u64) {
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
pub(super) async fn key_counts(side: &Arc<Side>) -> Result<BTreeMap<u64, u64>, VerifyError> {
    // Servers that only look like Redis may not count their keys (Kvrocks): SCAN tells whether there are any.
    let mut counts = BTreeMap::from([(0, 0)]);
    let mut links = side.links(0);
    for node in 0..side.nodes() {
        for line in patient_info(&mut links, node).await?.split(|byte| *byte == b'\n') {
            let Some((db, keys)) = keyspace_line(line) else { continue };
            *counts.entry(db).or_default() += keys;
        }
    }
    Ok(counts)
}

/// Refused, it is an error: databases that are not known would be left out.
async fn patient_info(links: &mut Links, node: usize) -> Result<Vec<u8>, VerifyError> {
    let mut attempt = 0;
    loop {
        let asked = async {
            let wire = links.open(node).await?;
            let refusal = match wire.call(&[&b"INFO"[..], b"keyspace"]).await? {
                Frame::Bulk(Some(text)) => return Ok(text.to_vec()),
                Frame::Error(text) => text.to_vec(),
                _ => {
                    let address = wire.address().clone();
                    return Err(VerifyError::Unexpected { address, command: "INFO" });
                }
            };
            Err(VerifyError::refused(wire.address(), b"INFO", &refusal))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(source: &[u64], target: &[u64], map: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let map = map.iter().copied().collect();
        let pairs = pairs_of(source.iter().copied(), target.iter().copied(), &map);
        pairs.into_iter().map(|pair| (pair.source, pair.target)).collect()
    }

    #[test]
    fn databases_are_paired_by_the_map() {
        assert_eq!(pairs(&[0, 3], &[0], &[]), [(0, 0), (3, 3)]);
        // A database that only the target has keys in belongs to the same number of the source.
        assert_eq!(pairs(&[0], &[0, 5], &[]), [(0, 0), (5, 5)]);
        assert_eq!(pairs(&[0, 1], &[0], &[(1, 0)]), [(0, 0), (1, 0)]);
        // Nothing ends in database 1 any more.
        assert_eq!(pairs(&[1], &[1, 0], &[(1, 0)]), [(0, 0), (1, 0)]);
    }

    #[test]
    fn key_counts_are_read() {
        assert_eq!(keyspace_line(b"db12:keys=34,expires=5,avg_ttl=0\r"), Some((12, 34)));
        assert_eq!(keyspace_line(b"# Keyspace\r"), None);
    }
}
