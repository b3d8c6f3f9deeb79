//! Commands whose keys lie in several slots of a cluster: into one command per slot where each key
//! stands for itself, otherwise into steps that have the same effect (`emulate.rs`).
//!
//! The commands come from a replication stream, which carries a conditional command only when it
//! took effect. MSETNX, RENAMENX, COPY without REPLACE and MSETEX NX are therefore carried out
//! without asking again: the source has proved the condition, and half-applied ones, met a second
//! time after a crash, must be completed and not refused.

use super::emulate::{Emulation, emulate};
use super::{Across, CommandError, CommandSpec, Route, is, is_any, keys, route};
use crate::resp::{Args, array_header, bulk, encode_command};
use crate::slot::slot;

/// How a command reaches a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitPlan {
    /// As it is. Never `Route::CrossSlot`.
    Whole(Route),
    /// One command per slot; their order does not matter.
    PerSlot(Vec<Piece>),
    /// Step by step, while no other command of the slots involved is under way.
    Emulate(Emulation),
    /// Not at all: quarantine it.
    Impossible(Unsplittable),
}

/// One command of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub slot: u16,
    /// One RESP command.
    pub frame: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsplittable {
    #[error("its keys lie in several slots and what it does with them is not known")]
    Opaque,
    #[error("BY or GET patterns reach keys of other slots")]
    Patterns,
    #[error("it copies into another database, which keys in several slots do not allow")]
    OtherDatabase,
    #[error("its arguments do not fit the command")]
    Malformed,
}

/// Plans `args` for a cluster. `temporary` numbers the first temporary key of an emulation,
/// `redis-migration:{tag}:tmp:<n>`; further ones count up from it, and [`Emulation::temporaries`]
/// says how many there are. Two emulations under way at once must not share numbers.
pub fn split(spec: &CommandSpec, args: &Args, temporary: u64) -> Result<SplitPlan, CommandError> {
    let found = route(spec, args)?;
    if found != Route::CrossSlot {
        return Ok(SplitPlan::Whole(found));
    }
    let mut indexes = Vec::new();
    keys(spec, args, &mut |index| indexes.push(index))?;
    let plan = match spec.across {
        Across::Impossible => Err(Unsplittable::Opaque),
        Across::EachKey => each_key(args, &indexes, args.name(), 1),
        Across::EachPair => each_key(args, &indexes, b"MSET", 2),
        Across::Msetex => msetex(args, &indexes),
        Across::MoveMember => move_member(args),
        _ => emulate(spec, args, &indexes, temporary).map(SplitPlan::Emulate),
    };
    Ok(plan.unwrap_or_else(SplitPlan::Impossible))
}

/// `name` and, for each key of a slot in its order, the `width` arguments that begin with it.
fn each_key(args: &Args, indexes: &[usize], name: &[u8], width: usize) -> Result<SplitPlan, Unsplittable> {
    let pieces = by_slot(args, indexes).into_iter().map(|(slot, indexes)| {
        let mut frame = Vec::new();
        array_header(1 + indexes.len() * width, &mut frame);
        bulk(name, &mut frame);
        append_owned(args, &indexes, width, &mut frame)?;
        Ok(Piece { slot, frame })
    });
    pieces.collect::<Result<_, _>>().map(SplitPlan::PerSlot)
}

fn msetex(args: &Args, indexes: &[usize]) -> Result<SplitPlan, Unsplittable> {
    let behind_pairs = 2 + indexes.len() * 2;
    let options: Vec<&[u8]> = (behind_pairs..args.len())
        .filter_map(|at| args.arg(at))
        .filter(|option| !is_any(option, &["NX", "XX"]))
        .collect();
    let pieces = by_slot(args, indexes).into_iter().map(|(slot, indexes)| {
        let mut frame = Vec::new();
        array_header(2 + indexes.len() * 2 + options.len(), &mut frame);
        bulk(b"MSETEX", &mut frame);
        bulk(itoa::Buffer::new().format(indexes.len()).as_bytes(), &mut frame);
        append_owned(args, &indexes, 2, &mut frame)?;
        options.iter().for_each(|option| bulk(option, &mut frame));
        Ok(Piece { slot, frame })
    });
    pieces.collect::<Result<_, _>>().map(SplitPlan::PerSlot)
}

/// SMOVE took effect, so the member was there: adding and removing it do the same, in any order.
fn move_member(args: &Args) -> Result<SplitPlan, Unsplittable> {
    let [from, to, member] = [args.arg(1), args.arg(2), args.arg(3)];
    let (Some(from), Some(to), Some(member)) = (from, to, member) else {
        return Err(Unsplittable::Malformed);
    };
    let pieces = [("SADD", to), ("SREM", from)].map(|(name, key)| {
        let mut frame = Vec::new();
        encode_command(&[name.as_bytes(), key, member], &mut frame);
        Piece { slot: slot(key), frame }
    });
    Ok(SplitPlan::PerSlot(pieces.into()))
}

/// The key indexes of each slot, in their order.
fn by_slot(args: &Args, indexes: &[usize]) -> Vec<(u16, Vec<usize>)> {
    let mut placed: Vec<(u16, usize)> =
        indexes.iter().map(|&index| (slot(args.arg(index).unwrap_or_default()), index)).collect();
    placed.sort_unstable();
    placed
        .chunk_by(|(a, _), (b, _)| a == b)
        .filter_map(|run| Some((run.first()?.0, run.iter().map(|&(_, index)| index).collect())))
        .collect()
}

fn append_owned(
    args: &Args,
    indexes: &[usize],
    width: usize,
    frame: &mut Vec<u8>,
) -> Result<(), Unsplittable> {
    for &index in indexes {
        for at in index..index + width {
            bulk(args.arg(at).ok_or(Unsplittable::Malformed)?, frame);
        }
    }
    Ok(())
}

/// Whether SORT reads keys that its arguments do not name.
pub(super) fn sorts_by_pattern(args: &Args) -> bool {
    (2..args.len()).any(|at| {
        args.arg(at).is_some_and(|arg| is(arg, "BY") || is(arg, "GET"))
            && args.arg(at + 1).is_some_and(|pattern| pattern.contains(&b'*'))
    })
}

#[cfg(test)]
mod tests;
