//! One MULTI … EXEC of the source, for a cluster whose transactions cannot leave a slot.

use std::collections::HashMap;

use super::{CommandError, CommandSpec, Emulation, Kind, Piece, Route, SplitPlan, Unsplittable, split};
use crate::resp::Args;

/// A part of a source transaction. Parts are run in their order; groups that stand next to each
/// other concern different slots, so their order does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Commands of one slot in the source's order: one transaction of the target.
    Group {
        slot: u16,
        commands: u32,
        frames: Vec<u8>,
    },
    /// A command without keys, `index` among the given ones. Its `kind` says where it goes: FLUSHALL or
    /// FUNCTION to every node, PUBLISH to any one, as the cluster hands the message on.
    Keyless {
        index: usize,
        kind: Kind,
        frame: Vec<u8>,
    },
    Emulate(Emulation),
    /// To be quarantined, `index` among the given ones.
    Impossible {
        index: usize,
        why: Unsplittable,
    },
}

/// Groups the commands between MULTI and EXEC by slot. SELECT and noise are left out: the caller
/// has followed them. `temporary` is as for [`split`].
pub fn group_transaction<'a>(
    commands: impl IntoIterator<Item = (&'a CommandSpec, Args<'a>)>,
    mut temporary: u64,
) -> Result<Vec<Part>, CommandError> {
    let mut grouping = Grouping::default();
    for (index, (spec, args)) in commands.into_iter().enumerate() {
        if matches!(spec.kind, Kind::Select | Kind::Multi | Kind::Exec | Kind::Noise) {
            continue;
        }
        match split(spec, &args, temporary)? {
            SplitPlan::Whole(Route::Slot(slot)) => grouping.add(slot, args.frame),
            SplitPlan::Whole(Route::Keyless | Route::CrossSlot) => {
                grouping.bar(Part::Keyless { index, kind: spec.kind, frame: args.frame.to_vec() });
            }
            SplitPlan::PerSlot(pieces) => {
                for Piece { slot, frame } in pieces {
                    grouping.add(slot, &frame);
                }
            }
            SplitPlan::Emulate(emulation) => {
                temporary = temporary.wrapping_add(emulation.temporaries);
                grouping.bar(Part::Emulate(emulation));
            }
            SplitPlan::Impossible(why) => grouping.bar(Part::Impossible { index, why }),
        }
    }
    Ok(grouping.parts)
}

#[derive(Default)]
struct Grouping {
    parts: Vec<Part>,
    /// Slot → its group in `parts`, for groups that later commands may still join.
    open: HashMap<u16, usize>,
}

impl Grouping {
    fn add(&mut self, slot: u16, frame: &[u8]) {
        let index = *self.open.entry(slot).or_insert(self.parts.len());
        match self.parts.get_mut(index) {
            Some(Part::Group { commands, frames, .. }) => {
                *commands += 1;
                frames.extend_from_slice(frame);
            }
            _ => self.parts.push(Part::Group { slot, commands: 1, frames: frame.to_vec() }),
        }
    }

    fn bar(&mut self, part: Part) {
        self.parts.push(part);
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::lookup;
    use crate::command::test_args::{TestArgs, printed};

    fn grouped(commands: &[&str]) -> Vec<String> {
        let commands: Vec<TestArgs> = commands.iter().map(|command| TestArgs::new(command)).collect();
        let given = commands.iter().map(|args| (lookup(args.args().name()).unwrap(), args.args()));
        let parts = group_transaction(given, 0).unwrap();
        parts
            .iter()
            .map(|part| match part {
                Part::Group { slot, commands, frames } => {
                    let printed = printed(frames);
                    assert_eq!(printed.len(), *commands as usize);
                    format!("{slot}: {}", printed.join("; "))
                }
                Part::Keyless { index, kind, frame } => {
                    format!("{kind:?} {index}: {}", printed(frame).join("; "))
                }
                Part::Emulate(emulation) => format!("emulate {:?}", emulation.slots),
                Part::Impossible { index, why } => format!("impossible {index}: {why:?}"),
            })
            .collect()
    }

    #[test]
    fn each_slot_keeps_its_commands_together_and_in_order() {
        assert_eq!(
            grouped(&["SET a 1", "SELECT 0", "INCR b", "APPEND a 2", "DEL b a", "PING"]),
            ["15495: SET a 1; APPEND a 2; DEL a", "3300: INCR b; DEL b"]
        );
        assert_eq!(grouped(&[]), [""; 0]);
    }

    #[test]
    fn nothing_overtakes_what_concerns_several_slots() {
        assert_eq!(
            grouped(&[
                "SET a 1",
                "RENAME a b",
                "SET a 2",
                "PUBLISH c m",
                "SET a 3",
                "EVAL s 2 a b",
                "SET a 4"
            ]),
            [
                "15495: SET a 1",
                "emulate [3300, 15495]",
                "15495: SET a 2",
                "Publish 3: PUBLISH c m",
                "15495: SET a 3",
                "impossible 5: Opaque",
                "15495: SET a 4",
            ]
        );
    }

    #[test]
    fn temporary_keys_of_one_transaction_differ() {
        let commands = ["SUNIONSTORE d a b", "SUNIONSTORE d a b"].map(TestArgs::new);
        let given = commands.iter().map(|args| (lookup(args.args().name()).unwrap(), args.args()));
        let parts = group_transaction(given, 0).unwrap();
        let [Part::Emulate(first), Part::Emulate(second)] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(first.temporaries, 2);
        assert_ne!(first.steps, second.steps);
    }
}
