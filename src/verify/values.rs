//! Values that are no short strings: first how much they weigh, then GET or DUMP of both sides in
//! small groups. What is too heavy to ask for whole is left to the careful look, which goes
//! through it in chunks.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::context::Context;
use super::frame::Frame;
use super::keys::KeyArena;
use super::side::{ATTEMPTS, Links, back_off};
use super::{VerifyError, payload, questions};

/// Keys that the scan passes on.
#[derive(Default)]
pub(super) struct HardKeys {
    pub keys: KeyArena,
    /// Of each key: true for a string, which GET returns cheaper than DUMP.
    strings: Vec<bool>,
}

impl HardKeys {
    pub fn push(&mut self, key: &[u8], string: bool) {
        self.keys.push(key);
        self.strings.push(string);
    }
}

/// Compares what the scan of one node passes on, until it ends.
pub(super) async fn compare_values(
    context: Arc<Context>,
    pair: usize,
    mut inbox: mpsc::Receiver<HardKeys>,
) -> Result<(), VerifyError> {
    let databases = context.pair(pair);
    let mut source = context.source.links(databases.source);
    let mut target = context.target.links(databases.target);
    while let Some(batch) = inbox.recv().await {
        let mut attempt = 0;
        loop {
            match compare_batch(&context, pair, &mut source, &mut target, &batch).await {
                Ok(()) => break,
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    attempt += 1;
                    source.reset();
                    target.reset();
                    back_off(attempt).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

async fn compare_batch(
    context: &Context,
    pair: usize,
    source: &mut Links,
    target: &mut Links,
    batch: &HardKeys,
) -> Result<(), VerifyError> {
    let keys: Vec<&[u8]> = batch.keys.iter().collect();
    let is_string = |index: usize| batch.strings.get(index).copied().unwrap_or(false);
    let memory_usage = context.source_memory_usage;
    let types = if memory_usage { Vec::new() } else { questions::types(source, &keys).await? };
    let weights = if memory_usage {
        let head: &(dyn Fn(usize) -> &'static [&'static [u8]] + Send + Sync) =
            &|index| if is_string(index) { &[b"STRLEN"] } else { &[b"MEMORY", b"USAGE"] };
        questions::each(source, &keys, head, questions::amount).await?
    } else {
        questions::weights(source, &keys, &types, false).await?
    };
    let mut light = Vec::with_capacity(keys.len());
    for (index, weight) in weights.into_iter().enumerate() {
        if weight > context.chunk_above {
            context.suspect(pair, batch.keys.key(index));
        } else {
            light.push((index, weight));
        }
    }
    let flavors = (source.version().flavor, target.version().flavor);
    for group in questions::groups(&light) {
        for &(index, _) in group {
            let key = batch.keys.key(index);
            let command: &[u8] = if is_string(index) { b"GET" } else { b"DUMP" };
            let node = source.node_of(key);
            source.open_busy(node).await?.queue(&[command, key]);
            let node = target.node_of(key);
            target.open_busy(node).await?.queue(&[command, key]);
        }
        source.send_all().await?;
        target.send_all().await?;
        for &(index, _) in group {
            let key = batch.keys.key(index);
            let (near, far) = (source.node_of(key), target.node_of(key));
            let ours = source.wire(near)?.reply().await?;
            let theirs = target.wire(far)?.reply().await?;
            let equal = match (ours, theirs) {
                (Frame::Bulk(Some(ours)), Frame::Bulk(Some(theirs))) if is_string(index) => ours == theirs,
                (Frame::Bulk(Some(ours)), Frame::Bulk(Some(theirs))) => {
                    payload::equal((ours, flavors.0), (theirs, flavors.1), context.abilities)
                }
                // Gone, moved, refused: the careful look tells.
                _ => false,
            };
            if !equal {
                context.suspect(pair, key);
            }
        }
    }
    Ok(())
}
