//! Keys that only the target has. The target's keys are scanned; whether the source has them is
//! answered by a [`super::ledger`] of both scans, which costs the source nothing, and only for keys
//! in buckets that do not balance, as under traffic some never will, by EXISTS on the source.
//!
//! Counting keys would not do: a missing key hides an extra one. EXISTS for every key would be a
//! fifth of the source's whole effort: its keys come in the target's order, each a cache miss.

use std::sync::Arc;

use super::VerifyError;
use super::context::Context;
use super::frame::Frame;
use super::keys::KeyArena;
use super::scan::{Resume, queue_page, read_page};
use super::side::{ATTEMPTS, Links, back_off};
use crate::resp::{Next, ReplyVerdict};

/// Keys of one EXISTS; when one is missing, so many are asked again one by one.
const GROUP: usize = 100;

/// What to do with the keys of a target node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Enter them into the ledger.
    Count,
    /// Ask the source about those that the ledger leaves open.
    Ask,
}

/// Looks through one database of one target node, the `group`-th.
pub(super) async fn pass(
    context: Arc<Context>,
    node: usize,
    group: usize,
    pass: Pass,
) -> Result<(), VerifyError> {
    let pairs = context.groups.get(group).map(|group| group.pairs.clone()).unwrap_or_default();
    let Some(&first) = pairs.first() else { return Ok(()) };
    let sources = pairs.iter().map(|&pair| (pair, context.source.links(context.pair(pair).source))).collect();
    let mut search = Search {
        target: context.target.links(context.pair(first).target),
        sources,
        context,
        node,
        group,
        first,
        pass,
        resume: Resume::default(),
    };
    let mut attempt = 0;
    loop {
        let reached = search.resume.cursor.clone();
        match search.run().await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                attempt = if search.resume.cursor == reached { attempt + 1 } else { 0 };
                search.target.reset();
                search.sources.iter_mut().for_each(|(_, links)| links.reset());
                back_off(attempt).await;
            }
            Err(error) => return Err(error),
        }
    }
}

struct Search {
    context: Arc<Context>,
    node: usize,
    group: usize,
    /// One of the pairs that end in this database.
    first: usize,
    pass: Pass,
    target: Links,
    sources: Vec<(usize, Links)>,
    resume: Resume,
}

impl Search {
    async fn run(&mut self) -> Result<(), VerifyError> {
        let wire = self.target.open(self.node).await?;
        self.resume.check(wire).await?;
        if self.pass == Pass::Ask {
            for (_, links) in &mut self.sources {
                links.open_all().await?;
            }
        }
        let wire = self.target.open(self.node).await?;
        queue_page(wire, &self.resume.cursor);
        wire.send().await?;
        let mut next = Vec::new();
        let mut keys = KeyArena::default();
        loop {
            keys.clear();
            let wire = self.target.wire(self.node)?;
            let Some(ledger) = self.context.groups.get(self.group).map(|group| &group.ledger) else {
                return Ok(());
            };
            read_page(wire, &mut next, |key| {
                if !self.sources.iter().any(|(pair, _)| self.context.visible(*pair, key)) {
                    return;
                }
                match self.pass {
                    Pass::Count => ledger.subtract(key),
                    Pass::Ask if ledger.is_open(key) => keys.push(key),
                    Pass::Ask => {}
                }
            })
            .await?;
            let more = next != b"0";
            if more {
                queue_page(wire, &next);
                wire.send().await?;
            }
            let mut left = std::mem::take(&mut keys);
            for (_, links) in &mut self.sources {
                if left.is_empty() {
                    break;
                }
                let absent = absent_keys(links, &left).await?;
                let mut rest = KeyArena::default();
                for key in absent {
                    rest.push(left.key(key));
                }
                // The keys' own buffer is kept for the next page.
                keys = std::mem::replace(&mut left, rest);
            }
            for key in left.iter() {
                self.context.suspect(self.first, key);
            }
            if !more {
                return Ok(());
            }
            self.resume.cursor.clone_from(&next);
        }
    }
}

/// Indexes of the keys that this side does not have, or would not tell about.
async fn absent_keys(links: &mut Links, keys: &KeyArena) -> Result<Vec<usize>, VerifyError> {
    let all: Vec<usize> = (0..keys.len()).collect();
    // Many keys in one EXISTS: from Redis 3.0.3, and not across slots.
    if links.is_cluster() || !links.version().has_redis(3, 2) {
        return absent_one_by_one(links, keys, &all).await;
    }
    let wire = links.wire(0)?;
    for group in all.chunks(GROUP) {
        wire.queue_many(&[b"EXISTS"], group.iter().map(|&index| keys.key(index)));
    }
    wire.send().await?;
    let mut doubtful = Vec::new();
    for group in all.chunks(GROUP) {
        match wire.reply().await? {
            Frame::Integer(count) if count == group.len() as i64 => {}
            // Asked again, alone: that tells whether the error is about a key.
            _ => doubtful.extend_from_slice(group),
        }
    }
    absent_one_by_one(links, keys, &doubtful).await
}

async fn absent_one_by_one(
    links: &mut Links,
    keys: &KeyArena,
    asked: &[usize],
) -> Result<Vec<usize>, VerifyError> {
    for &index in asked {
        let key = keys.key(index);
        let node = links.node_of(key);
        links.wire(node)?.queue(&[b"EXISTS", key]);
    }
    links.send_all().await?;
    let mut absent = Vec::new();
    for &index in asked {
        let node = links.node_of(keys.key(index));
        let wire = links.wire(node)?;
        let refusal = match wire.reply().await? {
            Frame::Integer(1) => continue,
            Frame::Error(text) if !is_about_key(text) => text.to_vec(),
            _ => {
                absent.push(index);
                continue;
            }
        };
        return Err(VerifyError::refused(wire.address(), b"EXISTS", &refusal));
    }
    Ok(absent)
}

/// A moved key is looked at again with care; other errors concern the node.
fn is_about_key(text: &[u8]) -> bool {
    let verdict = ReplyVerdict::of(text);
    verdict.next() == Next::Reroute || verdict == ReplyVerdict::TryAgain
}
