//! The careful look at suspects. Both sides change while they are compared, so a difference counts
//! only if it cannot be a write on its way: the source is read, then everything it had written is
//! waited for, then the target is read and the source once more. A source that answered the same
//! before and after should have been found on the target in between; one that changed says
//! nothing, and is looked at again.

use std::sync::Arc;
use std::time::Instant;

use super::chunks::{self, Chunked};
use super::context::Context;
use super::expiry::{Expiry, Question};
use super::frame::{Frame, FrameError};
use super::judge::{Finding, Judged, Mark, Slack, Value, judge};
use super::keys::{KeyArena, Suspects, printable};
use super::payload::ValueMark;
use super::side::{ATTEMPTS, Links, back_off};
use super::wire::WireError;
use super::{Difference, DifferenceKind, Differing, VerifyError, VerifyMode, questions};

/// Keys looked at together, behind one wait for the target.
const BATCH: usize = 512;
/// Looks at a key that changes all the time, before it is called unsettled.
const LOOKS: usize = 4;
/// Keys named of those that could not be compared.
const NAMED: usize = 3;

/// What a look at all suspects found.
#[derive(Default)]
pub(super) struct Findings {
    pub missing: u64,
    pub different: u64,
    pub extra: u64,
    /// Keys about which nothing can be said.
    pub unsettled: u64,
    /// The first of them.
    pub unsettled_keys: Vec<String>,
    /// Keys that the target cannot hold.
    pub unsupported: u64,
    pub samples: Vec<Difference>,
    /// The keys that differ, as far as they are kept.
    pub differing: Differing,
}

impl Findings {
    pub fn differences(&self) -> u64 {
        self.missing + self.different + self.extra
    }
}

/// Looks at every key of `lists` (indexed by pair); those that differ go into `next`.
pub(super) async fn look(
    context: &Arc<Context>,
    lists: Vec<KeyArena>,
    next: &mut Suspects,
) -> Result<Findings, VerifyError> {
    let mut findings = Findings::default();
    for (pair, list) in lists.iter().enumerate() {
        if list.is_empty() {
            continue;
        }
        let databases = context.pair(pair);
        let mut looker = Looker {
            source: context.source.links(databases.source),
            target: context.target.links(databases.target),
            context,
            pair,
        };
        let keys: Vec<&[u8]> = list.iter().collect();
        for batch in keys.chunks(BATCH) {
            let verdicts = looker.patiently(batch).await?;
            for (key, verdict) in batch.iter().zip(verdicts) {
                match verdict {
                    Verdict::Equal => continue,
                    Verdict::Unsupported => {
                        findings.unsupported += 1;
                        continue;
                    }
                    Verdict::Unsettled => {
                        findings.unsettled += 1;
                        if findings.unsettled_keys.len() < NAMED {
                            findings.unsettled_keys.push(printable(key));
                        }
                    }
                    Verdict::Differs(kind, detail) => {
                        *match kind {
                            DifferenceKind::Missing => &mut findings.missing,
                            DifferenceKind::Different => &mut findings.different,
                            DifferenceKind::Extra => &mut findings.extra,
                        } += 1;
                        findings.differing.push(databases.source, key, kind);
                        if findings.samples.len() < context.max_samples {
                            let db = databases.source;
                            findings.samples.push(Difference { key: printable(key), db, kind, detail });
                        }
                    }
                }
                next.push(pair, key);
            }
            context.publish_differences(findings.differences());
        }
    }
    Ok(findings)
}

#[derive(Clone)]
enum Verdict {
    Equal,
    /// Not compared: it changed at every look, or cannot be read.
    Unsettled,
    /// Not on the target, which cannot hold it.
    Unsupported,
    Differs(DifferenceKind, String),
}

impl Verdict {
    fn of(found: Finding) -> Self {
        Verdict::Differs(found.kind(), found.detail)
    }
}

/// A key on which no look has decided yet, by its index in the batch.
struct Open {
    index: usize,
    /// What all looks so far found alike.
    lasting: Option<Finding>,
}

struct Readings {
    before: Vec<Mark>,
    theirs: Vec<Mark>,
    after: Vec<Mark>,
    slack: Slack,
}

impl Readings {
    fn marks(&self) -> impl Iterator<Item = (&Mark, &Mark, &Mark)> {
        let source = self.before.iter().zip(&self.after);
        source.zip(&self.theirs).map(|((before, after), theirs)| (before, theirs, after))
    }
}

struct Looker<'c> {
    context: &'c Arc<Context>,
    pair: usize,
    source: Links,
    target: Links,
}

impl Looker<'_> {
    async fn patiently(&mut self, keys: &[&[u8]]) -> Result<Vec<Verdict>, VerifyError> {
        let mut attempt = 0;
        loop {
            match self.batch(keys).await {
                Ok(verdicts) => return Ok(verdicts),
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    attempt += 1;
                    self.source.reset();
                    self.target.reset();
                    back_off(attempt).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn batch(&mut self, keys: &[&[u8]]) -> Result<Vec<Verdict>, VerifyError> {
        let mut verdicts = vec![Verdict::Unsettled; keys.len()];
        let mut heavy = Vec::new();
        let mut open: Vec<Open> = (0..keys.len()).map(|index| Open { index, lasting: None }).collect();
        for look in 0..LOOKS {
            if open.is_empty() {
                break;
            }
            let asked: Vec<&[u8]> = open.iter().filter_map(|open| keys.get(open.index).copied()).collect();
            let readings = self.read(&asked).await?;
            let mut unsettled = Vec::new();
            for (key, (before, theirs, after)) in open.iter_mut().zip(readings.marks()) {
                let Some(verdict) = verdicts.get_mut(key.index) else { continue };
                match judge(before, theirs, after, readings.slack) {
                    Judged::Equal => *verdict = Verdict::Equal,
                    // Stays unsettled until its chunks have been compared.
                    Judged::Heavy(kind) => heavy.push((key.index, kind)),
                    Judged::Differs(found) => *verdict = Verdict::of(found),
                    Judged::Moving(found) => {
                        let before = key.lasting.take();
                        let same = |found: &Finding| {
                            look == 0 || before.is_some_and(|before| before.aspect == found.aspect)
                        };
                        unsettled.push(Open { index: key.index, lasting: found.filter(same) });
                    }
                }
            }
            open = unsettled;
        }
        // What every look found is no write on its way, though the value never came to rest.
        for Open { index, lasting } in open {
            if let (Some(found), Some(verdict)) = (lasting, verdicts.get_mut(index)) {
                *verdict = Verdict::of(found);
            }
        }
        for (index, kind) in heavy {
            let (Some(key), Some(verdict)) = (keys.get(index), verdicts.get_mut(index)) else { continue };
            let compared = chunks::compare(self.context, &mut self.source, &mut self.target, key, &kind);
            let chunked = match compared.await {
                // A single element over what a reply may have; nothing can be said about it, and the
                // rest of its reply is still to come.
                Err(VerifyError::Wire(WireError::Garbled { fault: FrameError::Length(_), .. })) => {
                    self.source.reset();
                    self.target.reset();
                    Chunked::Unsettled
                }
                chunked => chunked?,
            };
            *verdict = match chunked {
                Chunked::Equal => Verdict::Equal,
                Chunked::Unsettled => Verdict::Unsettled,
                Chunked::Different(what) => Verdict::Differs(DifferenceKind::Different, what),
            };
        }
        self.spare_merged(keys, &mut verdicts).await?;
        if !self.context.abilities.streams {
            for verdict in &mut verdicts {
                if matches!(verdict, Verdict::Differs(DifferenceKind::Missing, kind) if kind == "stream") {
                    *verdict = Verdict::Unsupported;
                }
            }
        }
        Ok(verdicts)
    }

    /// Source, target, and source again, with a wait for the target behind the first.
    async fn read(&mut self, keys: &[&[u8]]) -> Result<Readings, VerifyError> {
        let context = self.context;
        let clock = Instant::now();
        let before = marks(context, &mut self.source, keys, clock, context.source_memory_usage).await?;
        let first = millis(clock);
        (context.settle)().await;
        let settled = millis(clock);
        let (theirs, after) = tokio::try_join!(
            marks(context, &mut self.target, keys, clock, context.target_memory_usage),
            marks(context, &mut self.source, keys, clock, context.source_memory_usage),
        )?;
        let reading = millis(clock) - settled;
        let expiry = match context.question {
            Question::Absolute => 0,
            // A time left is known to lie within the reading that asked for it.
            Question::Relative => first + reading,
        };
        Ok(Readings { before, theirs, after, slack: Slack { expiry, reading } })
    }

    /// Where several databases are merged into one, an extra key may come from another of them.
    async fn spare_merged(&mut self, keys: &[&[u8]], verdicts: &mut [Verdict]) -> Result<(), VerifyError> {
        for other in self.context.merged_with(self.pair) {
            let mut links = None;
            for (key, verdict) in keys.iter().zip(verdicts.iter_mut()) {
                if !matches!(verdict, Verdict::Differs(DifferenceKind::Extra, _)) {
                    continue;
                }
                let links = links.get_or_insert_with(|| self.context.source.links(other));
                if links.ask(key, &[b"EXISTS", key], questions::amount).await? > 0 {
                    *verdict = Verdict::Equal;
                }
            }
        }
        Ok(())
    }
}

/// Reads each key on one side. Relative expiries are counted from `clock`, so that readings at
/// different times can be compared.
async fn marks(
    context: &Context,
    links: &mut Links,
    keys: &[&[u8]],
    clock: Instant,
    memory_usage: bool,
) -> Result<Vec<Mark>, VerifyError> {
    let types = questions::types(links, keys).await?;
    let lefts = expiries(links, keys, Question::Relative).await?;
    let expiries = match context.question {
        Question::Absolute => expiries(links, keys, Question::Absolute).await?,
        Question::Relative => {
            let passed = millis(clock);
            let later = |left: &Expiry| match *left {
                Expiry::At(left) => Expiry::At(left.saturating_add(passed)),
                other => other,
            };
            lefts.iter().map(later).collect()
        }
    };
    let values = if context.mode == VerifyMode::Keys {
        keys.iter().map(|_| Some(Value::Ignored)).collect()
    } else {
        values(context, links, keys, &types, memory_usage).await?
    };
    let seen = types.into_iter().zip(expiries).zip(lefts).zip(values);
    Ok(seen
        .map(|(((kind, expiry), left), value)| match value {
            Some(value) if kind != "none" && expiry != Expiry::NoKey && left != Expiry::NoKey => {
                Mark::Present { kind, expiry, left, value }
            }
            _ => Mark::Absent,
        })
        .collect())
}

async fn expiries(links: &mut Links, keys: &[&[u8]], question: Question) -> Result<Vec<Expiry>, VerifyError> {
    let head = [question.command()];
    let replies = questions::each(links, keys, |_| &head, |frame| Expiry::of(&frame)).await?;
    let known = replies.into_iter().zip(keys).map(|(reply, key)| {
        // An answer that is none must not pass for a key that is not there.
        reply.ok_or_else(|| links.unexpected(key, question.name()))
    });
    known.collect()
}

/// `None` for a key that is not there.
async fn values(
    context: &Context,
    links: &mut Links,
    keys: &[&[u8]],
    types: &[String],
    memory_usage: bool,
) -> Result<Vec<Option<Value>>, VerifyError> {
    let weights = questions::weights(links, keys, types, memory_usage).await?;
    let mut values: Vec<Option<Value>> = Vec::with_capacity(keys.len());
    let mut light = Vec::new();
    for (index, weight) in weights.into_iter().enumerate() {
        if weight > context.chunk_above {
            values.push(Some(Value::Heavy));
        } else {
            values.push(None);
            light.push((index, weight));
        }
    }
    let flavor = links.version().flavor;
    for group in questions::groups(&light) {
        let asked: Vec<&[u8]> = group.iter().filter_map(|&(index, _)| keys.get(index).copied()).collect();
        let read = |frame: Frame<'_>| match frame {
            Frame::Bulk(Some(payload)) => {
                Some(Some(Value::Marked(ValueMark::of(payload, flavor, context.abilities))))
            }
            Frame::Bulk(None) => Some(None),
            Frame::TooLong(_) => Some(Some(Value::Heavy)),
            _ => None,
        };
        let payloads = questions::each(links, &asked, |_| &[b"DUMP"], read).await?;
        for ((&(index, _), key), payload) in group.iter().zip(&asked).zip(payloads) {
            let value = payload.ok_or_else(|| links.unexpected(key, "DUMP"))?;
            if let Some(place) = values.get_mut(index) {
                *place = value;
            }
        }
    }
    Ok(values)
}

fn millis(since: Instant) -> i64 {
    since.elapsed().as_millis() as i64
}
