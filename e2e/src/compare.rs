//! Are two deployments equal? Read with ordinary commands through the client library, key by key;
//! shapes (standalone, cluster) and versions may differ.

mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{Client, Endpoint};

pub use read::{Entry, Snapshot};

/// How strict a comparison is.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How far expiry times may be apart.
    pub expiry_tolerance: Duration,
    /// Number of entries that stream groups have read. A Redis before 8 does not replicate it, so it
    /// is comparable only for data that was there before the copy began.
    pub entries_read: bool,
    /// Database of the target for one of the source; others keep their number.
    pub database_map: BTreeMap<u32, u32>,
    /// Keys of the source that are not to arrive.
    pub ignore: fn(&[u8]) -> bool,
    /// What the target's version cannot hold (streams, functions, expiries of hash fields) is left out and counted;
    /// without it, that it lacks them is a difference.
    pub as_the_target_can: bool,
    /// The target may hold expiries, as it does until the migration is complete: they lie 2^52 ms later (of
    /// hash fields, 2^45 ms).
    pub held: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            expiry_tolerance: Duration::from_millis(1500),
            entries_read: false,
            database_map: BTreeMap::new(),
            ignore: |_| false,
            as_the_target_can: false,
            held: true,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub database: u32,
    pub key: Vec<u8>,
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "db {} key {}: {}", self.database, self.key.escape_ascii(), self.what)
    }
}

impl Rules {
    /// Of a target that is complete.
    pub fn complete() -> Self {
        Self { held: false, ..Self::default() }
    }
}

/// What a comparison found.
#[derive(Debug)]
pub struct Report {
    /// Keys of the source, functions included.
    pub keys: usize,
    pub differences: Vec<Difference>,
    pub lost: Lost,
}

/// What the source has and the target cannot hold.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    pub streams: usize,
    pub functions: usize,
    /// Hashes with fields that expire.
    pub field_expiries: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys, {} differences", self.keys, self.differences.len())?;
        for difference in self.differences.iter().take(12) {
            write!(f, "\n  {difference}")?;
        }
        Ok(())
    }
}

pub fn compare(source: &Endpoint, target: &Endpoint) -> Result<Report> {
    compare_with(source, target, &Rules::default())
}

/// Both sides should be at rest: a key that changes in between looks different.
pub fn compare_with(source: &Endpoint, target: &Endpoint, rules: &Rules) -> Result<Report> {
    let mut source = Snapshot::read(&mut Client::open(source)?)?;
    let mut client = Client::open(target)?;
    let mut target = Snapshot::read(&mut client)?;
    let mut lost = Lost::default();
    if rules.as_the_target_can {
        let version = client.version;
        source.entries.retain(|(database, _), entry| {
            let function = *database == u32::MAX;
            if function && !version.has(7, 0) {
                lost.functions += 1;
            } else if entry.kind == "stream" && !version.has(5, 0) {
                lost.streams += 1;
            } else {
                if !version.has_field_expiry() && entry.forget_field_expiries() {
                    lost.field_expiries += 1;
                }
                return true;
            }
            false
        });
    }
    if rules.held {
        target.entries.values_mut().for_each(Entry::tell_true_times);
    }
    if !rules.database_map.is_empty() {
        let map = |database: u32| rules.database_map.get(&database).copied().unwrap_or(database);
        let entries = std::mem::take(&mut source.entries);
        source.entries = entries.into_iter().map(|((db, key), entry)| ((map(db), key), entry)).collect();
    }
    source.entries.retain(|(_, key), _| !(rules.ignore)(key));
    Ok(Report { lost, ..differences(&source, &target, rules) })
}

/// Compares until both are equal; the error holds the last differences.
pub fn wait_equal(source: &Endpoint, target: &Endpoint, timeout: Duration) -> Result<Report> {
    wait_equal_with(source, target, &Rules::default(), timeout)
}

pub fn wait_equal_with(
    source: &Endpoint,
    target: &Endpoint,
    rules: &Rules,
    timeout: Duration,
) -> Result<Report> {
    let start = Instant::now();
    loop {
        let late = start.elapsed() > timeout;
        match compare_with(source, target, rules) {
            Ok(report) if report.differences.is_empty() => return Ok(report),
            Ok(report) if late => anyhow::bail!("not equal after {timeout:?}: {report}"),
            // A key may go while it is read: looked at again, like any other difference.
            Err(error) if late => return Err(error),
            Ok(_) | Err(_) => {}
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn differences(source: &Snapshot, target: &Snapshot, rules: &Rules) -> Report {
    let tolerance = rules.expiry_tolerance.as_millis() as i64;
    // What was about to expire while both sides were read may be there on one of them only.
    let (from, to) =
        (source.started.min(target.started) - tolerance, source.ended.max(target.ended) + tolerance);
    let expiring = |entry: &Entry| entry.expire_at.is_some_and(|at| (from..=to).contains(&at) || at < from);
    let mut found = Vec::new();
    let mut report = |database: u32, key: &[u8], what: String| {
        found.push(Difference { database, key: key.to_vec(), what });
    };
    for ((database, key), left) in &source.entries {
        match target.entries.get(&(*database, key.clone())) {
            None if expiring(left) => {}
            None => report(*database, key, format!("missing ({})", left.kind)),
            Some(right) if expiring(left) || expiring(right) => {}
            Some(right) => {
                if let Some(what) = difference(left, right, rules, tolerance) {
                    report(*database, key, what);
                }
            }
        }
    }
    for ((database, key), right) in &target.entries {
        if !source.entries.contains_key(&(*database, key.clone())) && !expiring(right) {
            report(*database, key, format!("extra ({})", right.kind));
        }
    }
    Report { keys: source.entries.len(), differences: found, lost: Lost::default() }
}

fn difference(left: &Entry, right: &Entry, rules: &Rules, tolerance: i64) -> Option<String> {
    if left.kind != right.kind {
        return Some(format!("{} became {}", left.kind, right.kind));
    }
    let mismatch = left.parts.iter().zip(&right.parts).position(|(l, r)| !l.same(r, tolerance));
    if left.parts.len() != right.parts.len() || mismatch.is_some() {
        let at = mismatch.unwrap_or(left.parts.len().min(right.parts.len()));
        let show = |entry: &Entry| entry.parts.get(at).map_or_else(|| "nothing".into(), ToString::to_string);
        return Some(format!(
            "{} of {} parts, there {}; part {at} is {}, there {}",
            left.kind,
            left.parts.len(),
            right.parts.len(),
            show(left),
            show(right)
        ));
    }
    // Older servers do not tell all of these: only what both tell is compared.
    for (name, value) in &left.properties {
        let skipped = name.ends_with("entries-read") && !rules.entries_read;
        if let Some(there) = right.properties.get(name).filter(|there| *there != value && !skipped) {
            return Some(format!("{} {name} is {value}, there {there}", left.kind));
        }
    }
    match (left.expire_at, right.expire_at) {
        (None, None) => None,
        (Some(l), Some(r)) if (l - r).abs() <= tolerance => None,
        (l, r) => Some(format!("{} expires at {l:?}, there {r:?} (Unix ms)", left.kind)),
    }
}
