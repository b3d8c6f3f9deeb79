//! One question about each of many keys, pipelined to whoever holds them; how much a value weighs;
//! values whole, in groups that stay small.

use super::VerifyError;
use super::frame::Frame;
use super::side::{Links, is_answer};

/// Values asked for together weigh no more than this, or are one alone.
const GROUP_BYTES: u64 = 4 << 20;
/// What an element of a collection is taken to weigh where the server cannot tell (before 4.0).
const ELEMENT_BYTES: u64 = 256;

/// Asks `head key tail` about each key; `read` makes a value of the reply. Keys that have moved, or
/// whose node is busy, are asked for again with patience. What `read` sees as an error is one that
/// [`is_answer`] lets through.
pub(super) async fn each<'h, T: Send>(
    links: &mut Links,
    keys: &[&[u8]],
    head: impl Fn(usize) -> &'h [&'h [u8]] + Send + Sync,
    read: impl Fn(Frame<'_>) -> T + Send + Sync,
) -> Result<Vec<T>, VerifyError> {
    let nodes: Vec<usize> = keys.iter().map(|key| links.node_of(key)).collect();
    for (index, (key, &node)) in keys.iter().zip(&nodes).enumerate() {
        let wire = links.open_busy(node).await?;
        wire.queue_many(head(index), std::iter::once(*key));
    }
    links.send_all().await?;
    let mut answers = Vec::with_capacity(keys.len());
    for &node in &nodes {
        answers.push(match links.wire(node)?.reply().await? {
            Frame::Error(text) if !is_answer(text) => None,
            frame => Some(read(frame)),
        });
    }
    let mut settled = Vec::with_capacity(keys.len());
    for (index, (key, answer)) in keys.iter().zip(answers).enumerate() {
        settled.push(match answer {
            Some(answer) => answer,
            None => {
                let mut args = head(index).to_vec();
                args.push(key);
                links.ask(key, &args, &read).await?
            }
        });
    }
    Ok(settled)
}

/// TYPE of each key; `none` when there is no such key.
pub(super) async fn types(links: &mut Links, keys: &[&[u8]]) -> Result<Vec<String>, VerifyError> {
    let read = |frame: Frame<'_>| match frame {
        Frame::Simple(name) => Some(String::from_utf8_lossy(name).into_owned()),
        _ => None,
    };
    let types = each(links, keys, |_| &[b"TYPE"], read).await?;
    let known = types.into_iter().zip(keys);
    known.map(|(kind, key)| kind.ok_or_else(|| links.unexpected(key, "TYPE"))).collect()
}

/// About how many bytes each value takes, 0 for what is gone. `types` are those of [`types`].
pub(super) async fn weights(
    links: &mut Links,
    keys: &[&[u8]],
    types: &[String],
    memory_usage: bool,
) -> Result<Vec<u64>, VerifyError> {
    if memory_usage {
        return each(links, keys, |_| &[b"MEMORY", b"USAGE"], amount).await;
    }
    let kind = |index: usize| types.get(index).map_or("", String::as_str);
    let lengths = each(links, keys, |index| length_command(kind(index)), amount).await?;
    let by_element = |(index, length)| if kind(index) == "string" { length } else { length * ELEMENT_BYTES };
    Ok(lengths.into_iter().enumerate().map(by_element).collect())
}

/// The command that tells how many bytes or elements a value has.
pub(super) fn length_command(kind: &str) -> &'static [&'static [u8]] {
    match kind {
        "list" => &[b"LLEN"],
        "set" => &[b"SCARD"],
        "zset" => &[b"ZCARD"],
        "hash" => &[b"HLEN"],
        "stream" => &[b"XLEN"],
        _ => &[b"STRLEN"],
    }
}

pub(super) fn amount(frame: Frame<'_>) -> u64 {
    match frame {
        Frame::Integer(amount) => amount.clamp(0, 1 << 50) as u64,
        _ => 0,
    }
}

/// Splits indexes into runs that may be asked for together.
pub(super) fn groups(weights: &[(usize, u64)]) -> Vec<&[(usize, u64)]> {
    let mut groups = Vec::new();
    let mut start = 0;
    let mut bytes = 0;
    for (at, &(_, weight)) in weights.iter().enumerate() {
        if at > start && bytes + weight > GROUP_BYTES {
            groups.extend(weights.get(start..at));
            (start, bytes) = (at, 0);
        }
        bytes += weight;
    }
    groups.extend(weights.get(start..).filter(|rest| !rest.is_empty()));
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_stay_small_and_lose_nothing() {
        let weights: Vec<(usize, u64)> =
            [1 << 20, 3 << 20, 1, 9 << 20, 5, 6].into_iter().enumerate().collect();
        let sizes: Vec<usize> = groups(&weights).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [2, 1, 1, 2]);
        assert!(groups(&[]).is_empty());
    }
}
