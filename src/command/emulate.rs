//! Multi-key commands across slots, as steps that a cluster can run.
//!
//! Every plan can be broken off between two steps and started anew from the first: a source key is
//! deleted, or an element taken, only after the destination has it, and a missing source key stops
//! the plan before it touches the destination. (LMOVE and RPOPLPUSH push twice then, unless each
//! slot's part is guarded.)

use std::borrow::Cow;

use super::split::{Unsplittable, sorts_by_pattern};
use super::{Across, CommandSpec, is};
use crate::resp::{Args, encode_command};
use crate::slot::{slot, tag_for_slot};

/// Steps to run in their order, each after the reply to the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulation {
    /// Every slot involved, ascending: nothing else may be under way there.
    pub slots: Vec<u16>,
    pub steps: Vec<Step>,
    /// How many temporary keys the steps use.
    pub temporaries: u64,
}

/// After an error, only the [`Step::Clean`] steps that remain are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `DUMP from` and `PTTL from`, then `RESTORE to ttl payload REPLACE`, where a PTTL of -1 is ttl 0.
    Copy { from: Key, to: Key, if_missing: IfMissing },
    /// Run `read`, one command of `from_slot`; append the bulk string it answers to `command` and run
    /// that in `to_slot`. A null answer ends the plan: there is nothing to move.
    Carry { from_slot: u16, read: Vec<u8>, to_slot: u16, command: Vec<Vec<u8>> },
    /// One command. An error reply ends the plan.
    Run { slot: u16, frame: Vec<u8> },
    /// One command that deletes temporary keys, run even after an error.
    Clean { slot: u16, frame: Vec<u8> },
}

/// What to do when the key to copy does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfMissing {
    /// End the plan.
    Stop,
    /// `DEL to`: a missing operand is an empty one, and an empty result deletes the destination.
    DeleteDestination,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub slot: u16,
    pub name: Vec<u8>,
}

impl Key {
    fn new(name: &[u8]) -> Self {
        Self { slot: slot(name), name: name.to_vec() }
    }

    fn temporary(slot: u16, number: u64) -> Self {
        Self { slot, name: format!("redis-migration:{{{}}}:tmp:{number}", tag_for_slot(slot)).into_bytes() }
    }
}

/// Plans a command whose keys, at `indexes`, lie in several slots.
pub(super) fn emulate(
    spec: &CommandSpec,
    args: &Args,
    indexes: &[usize],
    temporary: u64,
) -> Result<Emulation, Unsplittable> {
    let malformed = Unsplittable::Malformed;
    let mut slots: Vec<u16> =
        indexes.iter().map(|&index| slot(args.arg(index).unwrap_or_default())).collect();
    slots.sort_unstable();
    slots.dedup();
    let ends = || Some((Key::new(args.arg(1)?), Key::new(args.arg(2)?)));
    let (steps, temporaries) = match spec.across {
        Across::Rename => (rename(ends().ok_or(malformed)?), 0),
        Across::Copy if (3..args.len()).any(|at| args.arg(at).is_some_and(|arg| is(arg, "DB"))) => {
            return Err(Unsplittable::OtherDatabase);
        }
        Across::Copy => {
            let (from, to) = ends().ok_or(malformed)?;
            (vec![Step::Copy { from, to, if_missing: IfMissing::Stop }], 0)
        }
        Across::Rotate => (list_move(ends().ok_or(malformed)?, End::Right, End::Left), 0),
        Across::ListMove => {
            let (take, put) = (End::parse(args.arg(3)), End::parse(args.arg(4)));
            (list_move(ends().ok_or(malformed)?, take.ok_or(malformed)?, put.ok_or(malformed)?), 0)
        }
        Across::StoreFirst => {
            store(args, indexes.split_first().ok_or(malformed)?, temporary, Dest::Overwritten)
        }
        Across::StoreLast if spec.name == "SORT" && sorts_by_pattern(args) => {
            return Err(Unsplittable::Patterns);
        }
        Across::StoreLast => {
            let (dest, operands) = indexes.split_last().ok_or(malformed)?;
            store(args, (dest, operands), temporary, Dest::Overwritten)
        }
        Across::Merge => store(args, indexes.split_first().ok_or(malformed)?, temporary, Dest::Operand),
        Across::Impossible | Across::EachKey | Across::EachPair | Across::Msetex | Across::MoveMember => {
            return Err(Unsplittable::Opaque);
        }
    };
    Ok(Emulation { slots, steps, temporaries })
}

fn rename((from, to): (Key, Key)) -> Vec<Step> {
    let (slot, frame) = (from.slot, frame([&b"DEL"[..], &from.name]));
    vec![Step::Copy { from, to, if_missing: IfMissing::Stop }, Step::Run { slot, frame }]
}

#[derive(Clone, Copy)]
enum End {
    Left,
    Right,
}

impl End {
    fn parse(arg: Option<&[u8]>) -> Option<Self> {
        match arg? {
            arg if is(arg, "LEFT") => Some(Self::Left),
            arg if is(arg, "RIGHT") => Some(Self::Right),
            _ => None,
        }
    }
}

fn list_move((from, to): (Key, Key), take: End, put: End) -> Vec<Step> {
    let (at, pop) = match take {
        End::Left => ("0", "LPOP"),
        End::Right => ("-1", "RPOP"),
    };
    let push = match put {
        End::Left => "LPUSH",
        End::Right => "RPUSH",
    };
    vec![
        Step::Carry {
            from_slot: from.slot,
            read: frame([&b"LINDEX"[..], &from.name, at.as_bytes()]),
            to_slot: to.slot,
            command: vec![push.into(), to.name],
        },
        Step::Run { slot: from.slot, frame: frame([pop.as_bytes(), &from.name]) },
    ]
}

/// Whether the command reads its destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dest {
    Overwritten,
    Operand,
}

/// Where all operands share a slot, the command runs there and its result travels, as ranges, radii
/// and intersections are smaller than what they are taken from; otherwise the operands travel.
fn store(
    args: &Args,
    (&dest_at, operands): (&usize, &[usize]),
    temporary: u64,
    dest_is: Dest,
) -> (Vec<Step>, u64) {
    let key = |at: usize| Key::new(args.arg(at).unwrap_or_default());
    let dest = key(dest_at);
    let home = operands.first().map_or(dest.slot, |&at| key(at).slot);
    if dest_is == Dest::Overwritten && operands.iter().all(|&at| key(at).slot == home) {
        return (store_at_operands(args, dest_at, dest, Key::temporary(home, temporary)), 1);
    }
    let mut words: Vec<Cow<[u8]>> = args.iter().map(Cow::Borrowed).collect();
    let mut steps = Vec::new();
    let mut clean = vec![b"DEL".to_vec()];
    let mut used = 0;
    for &at in operands {
        let from = key(at);
        if from.slot != dest.slot {
            let to = Key::temporary(dest.slot, temporary.wrapping_add(used));
            used += 1;
            clean.push(to.name.clone());
            if let Some(word) = words.get_mut(at) {
                *word = Cow::Owned(to.name.clone());
            }
            steps.push(Step::Copy { from, to, if_missing: IfMissing::DeleteDestination });
        }
    }
    steps.push(Step::Run { slot: dest.slot, frame: frame(words) });
    steps.push(Step::Clean { slot: dest.slot, frame: frame(clean) });
    (steps, used)
}

fn store_at_operands(args: &Args, dest_at: usize, dest: Key, result: Key) -> Vec<Step> {
    let slot = result.slot;
    let words = args.iter().enumerate().map(|(at, arg)| if at == dest_at { &result.name[..] } else { arg });
    let store = frame(words);
    let clean = frame([&b"DEL"[..], &result.name]);
    vec![
        Step::Run { slot, frame: store },
        Step::Copy { from: result, to: dest, if_missing: IfMissing::DeleteDestination },
        Step::Clean { slot, frame: clean },
    ]
}

fn frame<A: AsRef<[u8]>>(words: impl IntoIterator<Item = A>) -> Vec<u8> {
    let words: Vec<A> = words.into_iter().collect();
    let mut frame = Vec::new();
    encode_command(&words, &mut frame);
    frame
}
