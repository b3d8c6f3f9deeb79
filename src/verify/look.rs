//! The careful look at suspects. Both sides change while they are compared, so a difference counts
//! only if it cannot be a write on its way: the source is read, then everything it had written is
//! waited for, then the target is read and the source once more. A source that answered the same
//! before and after should have been found on the target in between; one that changed says
//! nothing, and is looked at again.

use std::sync::Arc;
use std::time::Instant;

use super::chunks::{self, Chunked};
use super::expiry::{Expiry, TOLERANCE_MS};
use super::frame::{Frame, FrameError};
use super::keys::{KeyArena, Suspects, printable};
use super::payload::ValueMark;
use super::side::{ATTEMPTS, Links, back_off};
use super::wire::WireError;
use super::{Context, Difference, DifferenceKind, VerifyError, VerifyMode, questions};

/// Keys looked at together, behind one wait for the target.
const BATCH: usize = 512;
/// Looks at a key that changes all the time, before it is called unsettled.
const LOOKS: usize = 4;

/// What a look at all suspects found.
#[derive(Default)]
pub(super) struct Findings {
    pub missing: u64,
    pub different: u64,
    pub extra: u64,
    /// Keys whose value changed at every look.
    pub unsettled: u64,
    pub samples: Vec<Difference>,
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
                    Verdict::Unsettled => findings.unsettled += 1,
                    Verdict::Differs(kind, detail) => {
                        *match kind {
                            DifferenceKind::Missing => &mut findings.missing,
                            DifferenceKind::Different => &mut findings.different,
                            DifferenceKind::Extra => &mut findings.extra,
                        } += 1;
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
    Unsettled,
    Differs(DifferenceKind, String),
}

/// One key on one side at one moment.
enum Mark {
    Absent,
    Present { kind: String, expiry: Expiry, left: Expiry, value: Value },
}

enum Value {
    /// `Keys` mode.
    Ignored,
    /// Too heavy to be asked for whole.
    Heavy,
    Marked(ValueMark),
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
        let mut open: Vec<usize> = (0..keys.len()).collect();
        for _ in 0..LOOKS {
            if open.is_empty() {
                break;
            }
            let asked: Vec<&[u8]> = open.iter().filter_map(|&index| keys.get(index).copied()).collect();
            let since = Instant::now();
            let before = marks(self.context, &mut self.source, &asked, true).await?;
            (self.context.settle)().await;
            let (theirs, after) = tokio::try_join!(
                marks(self.context, &mut self.target, &asked, false),
                marks(self.context, &mut self.source, &asked, true),
            )?;
            let slack = since.elapsed().as_millis() as i64;
            let mut unsettled = Vec::new();
            for (((&index, before), theirs), after) in open.iter().zip(&before).zip(&theirs).zip(&after) {
                let judged = judge(before, theirs, after, slack);
                if let Some(verdict) = verdicts.get_mut(index) {
                    *verdict = match judged {
                        Judged::Equal => Verdict::Equal,
                        Judged::Heavy(kind) => {
                            heavy.push((index, kind));
                            Verdict::Equal
                        }
                        Judged::Differs(kind, detail) => Verdict::Differs(kind, detail),
                        Judged::Moving => {
                            unsettled.push(index);
                            Verdict::Unsettled
                        }
                    };
                }
            }
            open = unsettled;
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
        Ok(verdicts)
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

enum Judged {
    Equal,
    Moving,
    Heavy(String),
    Differs(DifferenceKind, String),
}

/// `before` and `after` are the source around the moment of `theirs`, the target.
fn judge(before: &Mark, theirs: &Mark, after: &Mark, slack: i64) -> Judged {
    let compared = difference(after, theirs, slack);
    match compared {
        Compared::Equal => return Judged::Equal,
        Compared::Heavy(kind) => return Judged::Heavy(kind),
        Compared::Differs(..) => {}
    }
    match difference(before, theirs, slack) {
        Compared::Equal => return Judged::Equal,
        Compared::Heavy(kind) => return Judged::Heavy(kind),
        Compared::Differs(..) => {}
    }
    match (difference(before, after, slack), compared) {
        (Compared::Equal, Compared::Differs(kind, detail)) => Judged::Differs(kind, detail),
        _ => Judged::Moving,
    }
}

enum Compared {
    Equal,
    /// Equal but for a value that is too heavy to tell at once; its type.
    Heavy(String),
    Differs(DifferenceKind, String),
}

fn difference(ours: &Mark, theirs: &Mark, slack: i64) -> Compared {
    // A key about to expire may be gone on one side already.
    let expiring = |left: Expiry| matches!(left, Expiry::At(left) if left <= TOLERANCE_MS + slack);
    let differs = |detail: String| Compared::Differs(DifferenceKind::Different, detail);
    match (ours, theirs) {
        (Mark::Absent, Mark::Absent) => Compared::Equal,
        (Mark::Present { left, .. }, Mark::Absent) | (Mark::Absent, Mark::Present { left, .. })
            if expiring(*left) =>
        {
            Compared::Equal
        }
        (Mark::Present { kind, .. }, Mark::Absent) => {
            Compared::Differs(DifferenceKind::Missing, kind.clone())
        }
        (Mark::Absent, Mark::Present { kind, .. }) => Compared::Differs(DifferenceKind::Extra, kind.clone()),
        (
            Mark::Present { kind: our_kind, expiry: our_expiry, value: ours, .. },
            Mark::Present { kind: their_kind, expiry: their_expiry, value: theirs, .. },
        ) => {
            if our_kind != their_kind {
                return differs(format!("type {our_kind} ≠ {their_kind}"));
            }
            if let Some(apart) = our_expiry.apart(*their_expiry, slack) {
                return differs(apart.to_string());
            }
            match (ours, theirs) {
                (Value::Ignored, _) | (_, Value::Ignored) => Compared::Equal,
                (Value::Marked(ours), Value::Marked(theirs)) if ours.agrees(theirs) => Compared::Equal,
                (Value::Marked(ours), Value::Marked(theirs)) => {
                    let decoded = ours.is_decoded() && theirs.is_decoded();
                    differs(if decoded { "value" } else { "serialized value, type not understood" }.into())
                }
                _ => Compared::Heavy(our_kind.clone()),
            }
        }
    }
}

/// Reads each key on one side. Slack for relative expiries is the caller's.
async fn marks(
    context: &Context,
    links: &mut Links,
    keys: &[&[u8]],
    source: bool,
) -> Result<Vec<Mark>, VerifyError> {
    let types = questions::types(links, keys).await?;
    let head = [context.question.command()];
    let expiries = questions::each(links, keys, |_| &head, |frame| Expiry::of(&frame)).await?;
    let lefts = questions::each(links, keys, |_| &[b"PTTL"], |frame| Expiry::of(&frame)).await?;
    let mut values: Vec<Option<Value>> = Vec::new();
    if context.mode == VerifyMode::Keys {
        values.extend(keys.iter().map(|_| Some(Value::Ignored)));
    } else {
        let memory_usage = if source { context.source_memory_usage } else { context.target_memory_usage };
        let weights = questions::weights(links, keys, &types, memory_usage).await?;
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
            let payloads = questions::each(
                links,
                &asked,
                |_| &[b"DUMP"],
                |frame| match frame {
                    Frame::Bulk(Some(payload)) => Some(Value::Marked(ValueMark::of(payload, flavor))),
                    Frame::TooLong(_) => Some(Value::Heavy),
                    _ => None,
                },
            )
            .await?;
            for (&(index, _), value) in group.iter().zip(payloads) {
                if let Some(place) = values.get_mut(index) {
                    *place = value;
                }
            }
        }
    }
    let seen = types.into_iter().zip(expiries).zip(lefts).zip(values);
    Ok(seen
        .map(|(((kind, expiry), left), value)| match (expiry, left, value) {
            (Some(expiry), Some(left), Some(value))
                if kind != "none" && expiry != Expiry::NoKey && left != Expiry::NoKey =>
            {
                Mark::Present { kind, expiry, left, value }
            }
            _ => Mark::Absent,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use DifferenceKind::*;

    fn present(kind: &str, expiry: Expiry) -> Mark {
        Mark::Present { kind: kind.into(), expiry, left: expiry, value: Value::Ignored }
    }

    fn differs(judged: Judged) -> Option<(DifferenceKind, String)> {
        match judged {
            Judged::Differs(kind, detail) => Some((kind, detail)),
            _ => None,
        }
    }

    #[test]
    fn only_a_source_at_rest_convicts() {
        let key = || present("set", Expiry::Never);
        let found = differs(judge(&key(), &Mark::Absent, &key(), 0));
        assert_eq!(found, Some((Missing, "set".into())));
        // Created between the two readings: may be on its way.
        assert!(matches!(judge(&Mark::Absent, &Mark::Absent, &key(), 0), Judged::Equal));
        let other = || present("list", Expiry::Never);
        let third = present("zset", Expiry::Never);
        assert!(matches!(judge(&key(), &third, &other(), 0), Judged::Moving));
        assert!(matches!(judge(&key(), &other(), &other(), 0), Judged::Equal));
        assert!(matches!(judge(&key(), &key(), &other(), 0), Judged::Equal));
        let found = differs(judge(&Mark::Absent, &key(), &Mark::Absent, 0));
        assert_eq!(found, Some((Extra, "set".into())));
        let found = differs(judge(&key(), &other(), &key(), 0));
        assert_eq!(found, Some((Different, "type set ≠ list".into())));
    }

    #[test]
    fn keys_about_to_expire_are_no_difference() {
        let soon = || present("hash", Expiry::At(900));
        let later = || present("hash", Expiry::At(30_000));
        assert!(matches!(judge(&soon(), &Mark::Absent, &soon(), 0), Judged::Equal));
        assert!(matches!(judge(&Mark::Absent, &soon(), &Mark::Absent, 0), Judged::Equal));
        assert!(differs(judge(&later(), &Mark::Absent, &later(), 0)).is_some());
        let found = differs(judge(&later(), &present("hash", Expiry::At(32_500)), &later(), 0));
        assert_eq!(found, Some((Different, "expiry 2.5 s apart".into())));
    }
}
