//! Replayable or guarded: the arguments that decide it.
//! The reasoning for each command: running the whole rest of the stream a second time must end in
//! the same data.

use super::{Class, CommandSpec, Condition, is, is_any};
use crate::resp::Args;

/// The class of this very command. `args` that make no sense for it give a class, too: the target refuses them anyway.
pub fn class_of(spec: &CommandSpec, args: &Args) -> Class {
    let guarded = match spec.condition {
        Condition::None => return spec.class,
        // What follows IFEQ may read like an option, but then IFEQ came before it.
        Condition::Set => any_from(args, 3, &["NX", "XX", "IFEQ", "IFNE", "IFDEQ", "IFDNE"]),
        Condition::Expire => any_from(args, 3, &["NX", "XX", "GT", "LT"]),
        Condition::HashExpire => options(args, 2)
            .take_while(|arg| !is(arg, "FIELDS"))
            .any(|arg| is_any(arg, &["NX", "XX", "GT", "LT", "FNX", "FXX"])),
        Condition::Msetex => msetex_condition(args),
        Condition::SortedAdd => options(args, 2)
            .take_while(|arg| is_any(arg, &["NX", "XX", "GT", "LT", "CH", "INCR"]))
            .any(|arg| !is(arg, "CH")),
        Condition::WithoutReplace => !any_from(args, 4, &["REPLACE"]),
        Condition::Bitfield => increments(args),
        // Merging a key into itself adds nothing; other sources may have changed since.
        Condition::Merge => options(args, 2).any(|source| Some(source) != args.arg(1)),
        // A length depends on what was trimmed before, an id does not.
        Condition::Trim => args.arg(2).is_none_or(|arg| !is(arg, "MINID")) || any_from(args, 4, &["LIMIT"]),
        // Without both, the pending entry gets a time or a count that depends on the moment.
        Condition::Claim => !(any_from(args, 5, &["TIME"]) && any_from(args, 5, &["RETRYCOUNT"])),
        // `$` is the end of the stream at this moment.
        Condition::Group => args.arg(4).is_some_and(|id| id == b"$"),
        Condition::Function => function_fails_twice(args),
    };
    if guarded { Class::Guarded } else { spec.class }
}

fn options<'a>(args: &Args<'a>, from: usize) -> impl Iterator<Item = &'a [u8]> {
    let args = *args;
    (from..args.len()).filter_map(move |index| args.arg(index))
}

fn any_from(args: &Args, from: usize, words: &[&str]) -> bool {
    options(args, from).any(|arg| is_any(arg, words))
}

fn msetex_condition(args: &Args) -> bool {
    let pairs = args.arg(1).and_then(super::integer).and_then(|count| usize::try_from(count).ok());
    let from = pairs.and_then(|pairs| pairs.checked_mul(2)?.checked_add(2)).unwrap_or(2);
    any_from(args, from, &["NX", "XX"])
}

fn increments(args: &Args) -> bool {
    let mut at = 2;
    while let Some(arg) = args.arg(at) {
        if is(arg, "INCRBY") {
            return true;
        }
        at += if is(arg, "SET") {
            4
        } else if is(arg, "GET") {
            3
        } else {
            2
        };
    }
    false
}

fn function_fails_twice(args: &Args) -> bool {
    let Some(subcommand) = args.arg(1) else { return true };
    if is(subcommand, "LOAD") {
        return args.arg(2).is_none_or(|arg| !is(arg, "REPLACE"));
    }
    if is(subcommand, "RESTORE") {
        return !any_from(args, 3, &["REPLACE", "FLUSH"]);
    }
    !is(subcommand, "FLUSH")
}

#[cfg(test)]
mod tests;
