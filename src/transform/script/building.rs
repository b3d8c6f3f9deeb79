//! Commands that build a value, through `command(c)`.

use super::{CommandChange, Runner};
use crate::command::{keys, lookup};
use crate::resp::Args;
use crate::resp::frame::each_frame;

/// Appends what the script makes of commands that build a value.
pub fn pass_through(runner: &mut Runner, made: &[u8], db: u64, out: &mut Vec<u8>) -> Result<(), String> {
    let mut failed = None;
    each_frame(made, |args| {
        if failed.is_none() {
            match runner.command(lookup(args.name()), args, db, out) {
                Ok(CommandChange::Keep) => out.extend_from_slice(args.frame),
                Ok(CommandChange::Drop | CommandChange::Replaced(_)) => {}
                Err(why) => failed = Some(why),
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// Which arguments are the key that a value is built under; an error where the command is about another one.
pub fn only_key(args: &Args<'_>, name: &[u8]) -> Result<Vec<usize>, String> {
    let mut indexes = Vec::new();
    let known = lookup(args.name()).map(|spec| keys(spec, args, &mut |index| indexes.push(index)));
    let alone = matches!(known, Some(Ok(())))
        && !indexes.is_empty()
        && indexes.iter().all(|index| args.arg(*index) == Some(name));
    if alone {
        return Ok(indexes);
    }
    Err(format!(
        "filter.lua: of a key that is rewritten, command returned {}, which is not about the key that key(k) names",
        args.name().escape_ascii()
    ))
}
