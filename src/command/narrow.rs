//! Commands of which only some keys are followed: what they mean for those.
//!
//! As in `split.rs`, the commands come from a replication stream, which carries a conditional one only when it
//! took effect.

use super::split::sorts_by_pattern;
use super::{Across, CommandError, CommandSpec, first_key_fast, is, is_any, keys};
use crate::resp::{Args, array_header, bulk, encode_command};

/// What a command means for the keys that are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Narrowed {
    /// As it is: it has no key that is not followed.
    Whole,
    /// Nothing.
    Nothing,
    /// One command that was appended.
    Replaced,
    /// Something that only the keys left out could tell.
    Impossible(&'static str),
}

const UNKNOWN_VALUE: Narrowed = Narrowed::Impossible("what it writes is derived from a key that is left out");

/// `followed` says so of the key at this argument. A command without keys is followed.
pub fn narrow(
    spec: &CommandSpec,
    args: &Args<'_>,
    followed: impl Fn(usize) -> bool,
    out: &mut Vec<u8>,
) -> Result<Narrowed, CommandError> {
    if first_key_fast(spec, args).is_some() {
        return Ok(if followed(1) { Narrowed::Whole } else { Narrowed::Nothing });
    }
    let (mut all, mut any, mut visited) = (true, false, false);
    keys(spec, args, &mut |index| {
        let followed = followed(index);
        visited = true;
        all &= followed;
        any |= followed;
    })?;
    Ok(match () {
        () if visited && !any => Narrowed::Nothing,
        () if spec.name == "SORT" && sorts_by_pattern(args) => {
            Narrowed::Impossible("its BY or GET patterns may reach keys that are left out")
        }
        () if all => Narrowed::Whole,
        () => {
            let mut indexes = Vec::new();
            keys(spec, args, &mut |index| indexes.push(index))?;
            mixed(spec, args, &indexes, followed, out).unwrap_or(Narrowed::Impossible(
                "its arguments do not fit the command, of which some keys are left out",
            ))
        }
    })
}

/// Some are followed, and some are not. `None`: an argument is missing.
fn mixed(
    spec: &CommandSpec,
    args: &Args<'_>,
    indexes: &[usize],
    followed: impl Fn(usize) -> bool,
    out: &mut Vec<u8>,
) -> Option<Narrowed> {
    let kept: Vec<usize> = indexes.iter().copied().filter(|&index| followed(index)).collect();
    let (first, last) = (followed(*indexes.first()?), followed(*indexes.last()?));
    let mut write = |words: &[&[u8]]| {
        encode_command(words, out);
        Some(Narrowed::Replaced)
    };
    match spec.across {
        Across::EachKey => write(&head_and(args, args.name(), &kept, 1)?),
        Across::EachPair => write(&head_and(args, b"MSET", &kept, 2)?),
        Across::Msetex => msetex(args, indexes.len(), &kept, out),
        // The key is gone from where it was.
        Across::Rename if first => write(&[b"DEL", args.arg(1)?]),
        Across::Rename => Some(UNKNOWN_VALUE),
        Across::Copy if first => Some(Narrowed::Nothing),
        Across::Copy => Some(UNKNOWN_VALUE),
        Across::MoveMember if first => write(&[b"SREM", args.arg(1)?, args.arg(3)?]),
        Across::MoveMember => write(&[b"SADD", args.arg(2)?, args.arg(3)?]),
        Across::Rotate if first => write(&[b"RPOP", args.arg(1)?]),
        Across::ListMove if first => {
            let pop: &[u8] = if is(args.arg(3)?, "LEFT") { b"LPOP" } else { b"RPOP" };
            write(&[pop, args.arg(1)?])
        }
        Across::Rotate | Across::ListMove => Some(UNKNOWN_VALUE),
        Across::StoreFirst | Across::Merge => Some(if first { UNKNOWN_VALUE } else { Narrowed::Nothing }),
        Across::StoreLast => Some(if last { UNKNOWN_VALUE } else { Narrowed::Nothing }),
        Across::Impossible => Some(Narrowed::Impossible(
            "some of its keys are left out, and what it does with them is not known",
        )),
    }
}

/// `name` and, for each key of `kept`, the `width` arguments that begin with it.
fn head_and<'a>(args: &Args<'a>, name: &'a [u8], kept: &[usize], width: usize) -> Option<Vec<&'a [u8]>> {
    let mut words = vec![name];
    for &index in kept {
        for at in index..index + width {
            words.push(args.arg(at)?);
        }
    }
    Some(words)
}

fn msetex(args: &Args<'_>, pairs: usize, kept: &[usize], out: &mut Vec<u8>) -> Option<Narrowed> {
    let options: Vec<&[u8]> = (2 + pairs * 2..args.len())
        .filter_map(|at| args.arg(at))
        .filter(|option| !is_any(option, &["NX", "XX"]))
        .collect();
    let words = head_and(args, b"MSETEX", kept, 2)?;
    array_header(1 + words.len() + options.len(), out);
    bulk(b"MSETEX", out);
    bulk(itoa::Buffer::new().format(kept.len()).as_bytes(), out);
    words.iter().skip(1).chain(&options).for_each(|word| bulk(word, out));
    Some(Narrowed::Replaced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::lookup;
    use crate::command::test_args::{TestArgs, printed};

    /// Keys that begin with x are left out.
    fn narrowed(command: &str) -> String {
        let args = TestArgs::new(command);
        let args = args.args();
        let mut out = Vec::new();
        let followed = |at: usize| !args.arg(at).unwrap().starts_with(b"x");
        match narrow(lookup(args.name()).unwrap(), &args, followed, &mut out).unwrap() {
            Narrowed::Replaced => printed(&out).join("; "),
            Narrowed::Whole => "whole".to_owned(),
            Narrowed::Nothing => "nothing".to_owned(),
            Narrowed::Impossible(_) => "impossible".to_owned(),
        }
    }

    #[test]
    fn commands_keep_what_they_do_to_the_keys_that_are_followed() {
        for (command, expected) in [
            ("SET a 1", "whole"),
            ("SET x 1", "nothing"),
            ("PUBLISH x 1", "whole"),
            ("DEL a b", "whole"),
            ("DEL x1 x2", "nothing"),
            ("DEL a x b", "DEL a b"),
            ("unlink x a", "unlink a"),
            ("MSET a 1 x 2 b 3", "MSET a 1 b 3"),
            ("MSETNX x 2 b 3", "MSET b 3"),
            ("MSETEX 2 a 1 x 2 NX PX 5", "MSETEX 1 a 1 PX 5"),
            ("RENAME a b", "whole"),
            ("RENAME x1 x2", "nothing"),
            ("RENAME a x", "DEL a"),
            ("RENAMENX a x", "DEL a"),
            ("RENAME x a", "impossible"),
            ("COPY a x", "nothing"),
            ("COPY x a REPLACE", "impossible"),
            ("SMOVE a x m", "SREM a m"),
            ("SMOVE x a m", "SADD a m"),
            ("RPOPLPUSH a x", "RPOP a"),
            ("BRPOPLPUSH a x 0", "RPOP a"),
            ("LMOVE a x LEFT RIGHT", "LPOP a"),
            ("LMOVE a x right LEFT", "RPOP a"),
            ("LMOVE x a LEFT RIGHT", "impossible"),
            ("SUNIONSTORE a b c", "whole"),
            ("SUNIONSTORE x b c", "nothing"),
            ("SUNIONSTORE a b x", "impossible"),
            ("ZUNIONSTORE a 2 b x", "impossible"),
            ("ZUNIONSTORE x 2 a b", "nothing"),
            ("BITOP AND x a b", "nothing"),
            ("PFMERGE a x", "impossible"),
            ("PFMERGE x a", "nothing"),
            ("SORT a STORE b", "whole"),
            ("SORT a STORE x", "nothing"),
            ("SORT x STORE a", "impossible"),
            ("SORT a BY w* STORE b", "impossible"),
            ("SORT x1 BY w* STORE x2", "nothing"),
            ("GEORADIUS a 0 0 1 m STORE x", "nothing"),
            ("EVAL s 2 a b", "whole"),
            ("EVAL s 2 a x", "impossible"),
            ("EVAL s 1 x", "nothing"),
            ("BLPOP a x 0", "impossible"),
        ] {
            assert_eq!(narrowed(command), expected, "{command}");
        }
    }

    #[test]
    fn what_is_left_is_followed_whole() {
        for command in ["DEL a x b", "MSET a 1 x 2 b 3", "MSETEX 2 a 1 x 2 PX 5", "SMOVE x a m"] {
            let once = narrowed(command);
            assert_eq!(narrowed(&once), "whole", "{command} became {once}");
        }
    }
}
