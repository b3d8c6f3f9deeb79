//! Commands that take a key's expiry along while a sweep is under way (PURE): a sweep that has passed the
//! destination would not see it.

use std::collections::BTreeMap;

use crate::command::{CommandSpec, Kind};
use crate::resp::Args;

/// What is remembered; past it, the sweep is repeated.
const MOST_BYTES: usize = if cfg!(test) { 64 } else { 4 << 20 };
/// What an entry takes beside its key.
const ENTRY: usize = 48;

#[derive(Debug, Default)]
pub struct Carried {
    /// Target database and key.
    keys: Vec<(u64, Vec<u8>)>,
    bytes: usize,
    /// Keys may have been missed that are not among these.
    again: bool,
}

impl Carried {
    /// `db`: of the source, where `args` is run.
    pub fn note(&mut self, spec: &CommandSpec, args: &Args<'_>, db: u64, map: &BTreeMap<u64, u64>) {
        let number = |at: usize| std::str::from_utf8(args.arg(at)?).ok()?.parse::<u64>().ok();
        let (key, db) = match (spec.kind, spec.name.as_ref()) {
            (Kind::Data, "RENAME" | "RENAMENX") => (args.arg(2), Some(db)),
            (Kind::Data, "COPY") => {
                let named = (3..args.len())
                    .find(|&at| args.arg(at).is_some_and(|arg| arg.eq_ignore_ascii_case(b"DB")));
                (args.arg(2), named.map_or(Some(db), |at| number(at + 1)))
            }
            (Kind::Move, _) => (args.arg(1), number(2)),
            // Which keys it renames or copies is not known; SWAPDB takes all.
            (Kind::Script | Kind::SwapDb | Kind::TopologyChange, _) => (None, None),
            _ => return,
        };
        match (key, db) {
            (Some(key), Some(db)) if self.bytes + key.len() + ENTRY <= MOST_BYTES => {
                self.bytes += key.len() + ENTRY;
                self.keys.push((map.get(&db).copied().unwrap_or(db), key.to_vec()));
            }
            _ => self.again = true,
        }
    }

    /// Something else says that a sweep is to be repeated.
    pub fn again(&mut self) {
        self.again = true;
    }

    /// The keys noted, and whether there may be others.
    pub fn take(&mut self) -> (Vec<(u64, Vec<u8>)>, bool) {
        let Self { keys, again, .. } = std::mem::take(self);
        (keys, again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::lookup;
    use crate::command::test_args::TestArgs;

    fn noted(commands: &[&str]) -> (Vec<(u64, String)>, bool) {
        let mut carried = Carried::default();
        for command in commands {
            let args = TestArgs::new(command);
            let spec = lookup(args.args().name()).unwrap();
            carried.note(spec, &args.args(), 1, &BTreeMap::from([(1, 11), (2, 22)]));
        }
        let (keys, again) = carried.take();
        let text = |(db, key): (u64, Vec<u8>)| (db, String::from_utf8(key).unwrap());
        (keys.into_iter().map(text).collect(), again)
    }

    #[test]
    fn destinations_are_noted_in_their_database() {
        let commands = ["RENAME a b", "copy a c REPLACE", "COPY a d DB 2", "MOVE e 3", "SET f 1 PX 5"];
        let expected = [(11, "b"), (11, "c"), (22, "d"), (3, "e")].map(|(db, key)| (db, key.to_owned()));
        assert_eq!(noted(&commands[..1]), (expected[..1].to_vec(), false));
        assert_eq!(noted(&commands[1..2]), (expected[1..2].to_vec(), false));
        assert_eq!(noted(&commands[2..3]), (expected[2..3].to_vec(), false));
        assert_eq!(noted(&commands[3..]), (expected[3..].to_vec(), false));
    }

    #[test]
    fn what_cannot_be_noted_calls_for_another_sweep() {
        for command in ["SWAPDB 1 2", "EVAL s 1 a", "FCALL f 1 a", "COPY a b DB x"] {
            assert_eq!(noted(&[command]), (Vec::new(), true), "{command}");
        }
        // More than is remembered.
        assert_eq!(noted(&["RENAME a b", "RENAME b c"]), (vec![(11, "b".to_owned())], true));
    }
}
