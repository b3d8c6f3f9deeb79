//! What the filter makes of a command of the stream.

use std::collections::HashSet;

use super::Transform;
use crate::command::{CommandSpec, Kind, Narrowed, database_args, decimal, keys, narrow};
use crate::resp::Args;

/// Longest name that is looked for; no command has one of that length.
const LONGEST_NAME: usize = 64;

/// What is to be done with a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    /// It concerns nothing that is copied.
    Drop,
    /// One command was appended in its place.
    Changed,
    /// FLUSHALL: of these databases of the source.
    FlushEach(Vec<u64>),
    /// What it does to what is copied cannot be told.
    Refused(&'static str),
}

/// Commands that are left out, upper case.
#[derive(Debug, Default)]
pub(super) struct Names(HashSet<Vec<u8>>);

impl Names {
    pub(super) fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| name.to_ascii_uppercase().into_bytes()).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn has(&self, name: &[u8]) -> bool {
        let mut upper = [0; LONGEST_NAME];
        let Some(upper) = upper.get_mut(..name.len()).filter(|_| !self.0.is_empty()) else { return false };
        upper.copy_from_slice(name);
        upper.make_ascii_uppercase();
        self.0.contains(&*upper)
    }
}

impl Transform {
    /// Judges a command that is run in database `db` of the source; with [`Verdict::Changed`] the one that
    /// takes its place was appended to `out`. `spec`: `None` for one that nobody knows.
    pub fn command(
        &self,
        spec: Option<&CommandSpec>,
        args: &Args<'_>,
        db: u64,
        out: &mut Vec<u8>,
    ) -> Verdict {
        let here = self.databases.admits(db);
        let Some(spec) = spec else {
            return match () {
                () if self.names.has(args.name()) || !here => Verdict::Drop,
                () if self.keys.is_open() => Verdict::Keep,
                () => Verdict::Refused("which of its arguments are keys is not known, and keys are filtered"),
            };
        };
        match spec.kind {
            // Of the stream itself.
            Kind::Noise | Kind::Select | Kind::Multi | Kind::Exec | Kind::TopologyChange => Verdict::Keep,
            _ if self.names.has(args.name()) => Verdict::Drop,
            Kind::Publish | Kind::ShardPublish | Kind::ScriptCache | Kind::Function => Verdict::Keep,
            Kind::Flush => self.flush(args, here),
            Kind::SwapDb => self.swap(args),
            Kind::Move => self.r#move(args, here, out),
            Kind::Script => self.script(spec, args, here, out),
            Kind::Data => self.data(spec, args, here, out),
        }
    }

    fn flush(&self, args: &Args<'_>, here: bool) -> Verdict {
        let all = args.name().eq_ignore_ascii_case(b"FLUSHALL");
        if !all && !here {
            return Verdict::Drop;
        }
        if !self.keys.is_open() {
            // The target may hold others, which are not ours to remove.
            return Verdict::Refused("it removes keys whatever their name, and keys are filtered");
        }
        match self.databases.named() {
            _ if !all || self.databases.is_open() => Verdict::Keep,
            Some(named) => Verdict::FlushEach(named.to_vec()),
            None => Verdict::Refused(
                "it removes the keys of all databases, and some are excluded; filter.databases.include would tell which to empty",
            ),
        }
    }

    fn swap(&self, args: &Args<'_>) -> Verdict {
        let admits = |at: usize| args.arg(at).and_then(decimal).is_some_and(|db| self.databases.admits(db));
        match (admits(1), admits(2)) {
            (true, true) => Verdict::Keep,
            (false, false) => Verdict::Drop,
            _ => Verdict::Refused("it swaps a database that is copied with one that is not"),
        }
    }

    /// MOVE took effect: the key was here, and the other database did not have it.
    fn r#move(&self, args: &Args<'_>, here: bool, out: &mut Vec<u8>) -> Verdict {
        let (Some(key), Some(to)) = (args.arg(1), args.arg(2).and_then(decimal)) else {
            return Verdict::Keep;
        };
        match (here, self.databases.admits(to)) {
            _ if !self.keys.admits(key) => Verdict::Drop,
            (true, true) => Verdict::Keep,
            (false, false) => Verdict::Drop,
            (true, false) => {
                crate::resp::encode_command(&[b"DEL".as_slice(), key], out);
                Verdict::Changed
            }
            (false, true) => Verdict::Refused("it brings a key out of a database that is not copied"),
        }
    }

    fn script(&self, spec: &CommandSpec, args: &Args<'_>, here: bool, out: &mut Vec<u8>) -> Verdict {
        if !here {
            return Verdict::Drop;
        }
        if self.keys.is_open() {
            return Verdict::Keep;
        }
        let mut any = false;
        if keys(spec, args, &mut |_| any = true).is_err() || !any {
            return Verdict::Refused("which keys the script uses is not known, and keys are filtered");
        }
        self.narrowed(spec, args, |_| true, out)
    }

    fn data(&self, spec: &CommandSpec, args: &Args<'_>, here: bool, out: &mut Vec<u8>) -> Verdict {
        let mut other = None;
        if !self.databases.is_open() && spec.name == "COPY" {
            database_args(spec, args, &mut |at| other = args.arg(at).and_then(decimal));
        }
        let there = other.map_or(here, |db| self.databases.admits(db));
        if !here && !there {
            return Verdict::Drop;
        }
        if self.keys.is_open() && here == there {
            return Verdict::Keep;
        }
        // Only COPY has a second database, that of its second key.
        self.narrowed(spec, args, |at| if at == 2 { there } else { here }, out)
    }

    /// `in_database`: whether the key at this argument is of a database that is copied.
    fn narrowed(
        &self,
        spec: &CommandSpec,
        args: &Args<'_>,
        in_database: impl Fn(usize) -> bool,
        out: &mut Vec<u8>,
    ) -> Verdict {
        // `there` of COPY stands for argument 2 alone; the other commands have one database.
        let included = |at: usize| in_database(at) && args.arg(at).is_some_and(|key| self.keys.admits(key));
        match narrow(spec, args, included, out) {
            Ok(Narrowed::Whole) => Verdict::Keep,
            Ok(Narrowed::Nothing) => Verdict::Drop,
            Ok(Narrowed::Replaced) => Verdict::Changed,
            Ok(Narrowed::Impossible(why)) => Verdict::Refused(why),
            Err(_) => {
                Verdict::Refused("which of its arguments are keys cannot be told, and keys are filtered")
            }
        }
    }
}
