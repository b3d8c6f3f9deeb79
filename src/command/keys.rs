//! Which arguments of a command are keys.

use super::{Begin, CommandError, CommandSpec, Find, KeyRule, KeySpec, Kind, integer, is, is_any};
use crate::resp::Args;
use crate::slot::slot;

/// Where a command goes in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// No key: see the command's [`Kind`].
    Keyless,
    Slot(u16),
    /// Keys in several slots: see [`super::split`].
    CrossSlot,
}

/// Calls `visit` with the index of every key argument, in the order `COMMAND GETKEYS` lists them
/// (a destination that stands before the count comes first). Allocates nothing. On an error some may have been visited already.
pub fn keys(spec: &CommandSpec, args: &Args, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
    let finder = Finder { spec, args };
    match &spec.keys {
        KeySpec::None => Ok(()),
        KeySpec::Single => finder.one(1, visit),
        &KeySpec::Range { first, last, step } => {
            finder.range(first.into(), finder.last(last.into()), step.into(), visit)
        }
        &KeySpec::Counted { dest, count, step } => {
            if dest != 0 {
                finder.one(dest.into(), visit)?;
            }
            let count = usize::from(count);
            finder.counted(count, count + 1, step.into(), visit)
        }
        KeySpec::Sort => finder.sort(visit),
        KeySpec::Radius => finder.radius(visit),
        KeySpec::Streams => finder.streams(visit),
        KeySpec::Migrate => finder.migrate(visit),
        KeySpec::Rules(rules) => rules.iter().try_for_each(|rule| finder.rule(rule, visit)),
        KeySpec::Unknown => Err(CommandError::KeysUnknown { command: spec.name.clone() }),
    }
}

/// The key of a command that has exactly one, at argument 1; `None` for all others.
pub fn first_key_fast<'a>(spec: &CommandSpec, args: &Args<'a>) -> Option<&'a [u8]> {
    match spec.keys {
        KeySpec::Single => args.arg(1),
        _ => None,
    }
}

/// The slot that all keys share, if they do.
pub fn route(spec: &CommandSpec, args: &Args) -> Result<Route, CommandError> {
    if let Some(key) = first_key_fast(spec, args) {
        return Ok(Route::Slot(slot(key)));
    }
    if spec.kind == Kind::ShardPublish {
        return Ok(args.arg(1).map_or(Route::Keyless, |channel| Route::Slot(slot(channel))));
    }
    let mut route = Route::Keyless;
    keys(spec, args, &mut |index| {
        let here = Route::Slot(slot(args.arg(index).unwrap_or_default()));
        route = match route {
            Route::Keyless => here,
            Route::Slot(_) if route == here => here,
            _ => Route::CrossSlot,
        };
    })?;
    Ok(route)
}

/// Calls `visit` with the index of every argument that is a database number, so that a database map
/// can be applied to SELECT, MOVE, SWAPDB and COPY … DB.
pub fn database_args(spec: &CommandSpec, args: &Args, visit: &mut impl FnMut(usize)) {
    match spec.kind {
        Kind::Select => visit(1),
        Kind::Move => visit(2),
        Kind::SwapDb => {
            visit(1);
            visit(2);
        }
        Kind::Data if spec.name == "COPY" => {
            if let Some(index) = (3..args.len()).find(|&at| args.arg(at).is_some_and(|arg| is(arg, "DB"))) {
                visit(index + 1);
            }
        }
        _ => {}
    }
}

struct Finder<'a> {
    spec: &'a CommandSpec,
    args: &'a Args<'a>,
}

impl Finder<'_> {
    fn one(&self, index: usize, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        if index >= self.args.len() {
            return Err(self.missing(index));
        }
        visit(index);
        Ok(())
    }

    /// Every `step`-th argument of `first..=last`.
    fn range(
        &self,
        first: usize,
        last: Option<usize>,
        step: usize,
        visit: &mut impl FnMut(usize),
    ) -> Result<(), CommandError> {
        let last = last.filter(|&last| last >= first).ok_or_else(|| self.missing(first))?;
        if last >= self.args.len() {
            return Err(self.missing(last));
        }
        (first..=last).step_by(step.max(1)).for_each(visit);
        Ok(())
    }

    /// An index that counts from the end when it is negative.
    fn last(&self, index: i64) -> Option<usize> {
        if index < 0 {
            self.args.len().checked_sub(usize::try_from(index.unsigned_abs()).ok()?)
        } else {
            usize::try_from(index).ok()
        }
    }

    fn counted(
        &self,
        count_at: usize,
        first: usize,
        step: usize,
        visit: &mut impl FnMut(usize),
    ) -> Result<(), CommandError> {
        let step = step.max(1);
        let bad = || CommandError::BadKeyCount { command: self.spec.name.clone(), index: count_at };
        let text = self.args.arg(count_at).ok_or_else(|| self.missing(count_at))?;
        let count = integer(text).and_then(|count| usize::try_from(count).ok()).ok_or_else(bad)?;
        // Each key owns `step` arguments, the last one included: MSETEX needs its values.
        let room = self.args.len().saturating_sub(first) / step;
        if count > room {
            return Err(bad());
        }
        (0..count).for_each(|nth| visit(first + nth * step));
        Ok(())
    }

    fn sort(&self, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        self.one(1, visit)?;
        let (mut at, mut store) = (2, None);
        while let Some(arg) = self.args.arg(at) {
            at += if is(arg, "LIMIT") {
                3
            } else if is_any(arg, &["GET", "BY"]) {
                2
            } else if is(arg, "STORE") {
                store = Some(at + 1);
                2
            } else {
                1
            };
        }
        store.map_or(Ok(()), |index| self.one(index, visit))
    }

    fn radius(&self, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        self.one(1, visit)?;
        let (mut at, mut store) = (5, None);
        while let Some(arg) = self.args.arg(at) {
            if is_any(arg, &["STORE", "STOREDIST"]) && at + 1 < self.args.len() {
                store = Some(at + 1);
                at += 1;
            }
            at += 1;
        }
        store.map_or(Ok(()), |index| self.one(index, visit))
    }

    fn streams(&self, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        let mut at = 1;
        while let Some(arg) = self.args.arg(at) {
            if is(arg, "STREAMS") {
                let rest = self.args.len() - at - 1;
                return self.range(at + 1, Some(at + rest / 2), 1, visit);
            }
            at += if is(arg, "GROUP") {
                3
            } else if is_any(arg, &["BLOCK", "COUNT", "CLAIM"]) {
                2
            } else {
                1
            };
        }
        Err(self.missing(at))
    }

    fn migrate(&self, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        if self.args.arg(3).is_none_or(|key| !key.is_empty()) {
            return self.one(3, visit);
        }
        let mut at = 6;
        while let Some(arg) = self.args.arg(at) {
            if is(arg, "KEYS") {
                return self.range(at + 1, self.last(-1), 1, visit);
            }
            at += if is(arg, "AUTH2") {
                3
            } else if is(arg, "AUTH") {
                2
            } else {
                1
            };
        }
        self.one(3, visit)
    }

    fn rule(&self, rule: &KeyRule, visit: &mut impl FnMut(usize)) -> Result<(), CommandError> {
        let begin = match &rule.begin {
            Begin::Index(index) => *index as usize,
            Begin::Keyword { word, from } => match self.after_keyword(word, *from) {
                Some(begin) => begin,
                // An optional part of the command that is not there.
                None => return Ok(()),
            },
        };
        match rule.find {
            Find::Range { last, step, limit } => {
                let last = match usize::try_from(last) {
                    Ok(last) => begin.checked_add(last),
                    Err(_) if limit > 1 => {
                        let part = self.args.len().saturating_sub(begin) / limit as usize;
                        (begin + part).checked_sub(last.unsigned_abs() as usize)
                    }
                    Err(_) => self.last(last.into()),
                };
                self.range(begin, last, step as usize, visit)
            }
            Find::Counted { count, first, step } => {
                self.counted(begin + count as usize, begin + first as usize, step as usize, visit)
            }
        }
    }

    fn after_keyword(&self, word: &[u8], from: i32) -> Option<usize> {
        let matches = |&at: &usize| self.args.arg(at).is_some_and(|arg| arg.eq_ignore_ascii_case(word));
        let start = self.last(from.into())?;
        let found =
            if from < 0 { (1..=start).rev().find(matches) } else { (start..self.args.len()).find(matches) };
        found.map(|at| at + 1)
    }

    fn missing(&self, index: usize) -> CommandError {
        CommandError::MissingArgument { command: self.spec.name.clone(), index }
    }
}

#[cfg(test)]
mod tests;
