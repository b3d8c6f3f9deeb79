use std::collections::BTreeMap;

use super::*;
use crate::command::emulate::{IfMissing, Step};
use crate::command::test_args::{TestArgs, printed};
use crate::command::{KeySpec, Kind, all, lookup};
use proptest::prelude::*;

/// Slots: a 15495, b 3300, c 7365, d 11298. A temporary key is printed with its slot as tag.
fn planned(command: &str) -> String {
    let args = TestArgs::new(command);
    let spec = lookup(args.args().name()).unwrap();
    match split(spec, &args.args(), 7).unwrap() {
        SplitPlan::Whole(route) => format!("{route:?}"),
        SplitPlan::PerSlot(pieces) => {
            pieces.iter().map(|piece| sent(piece.slot, &piece.frame)).collect::<Vec<_>>().join(" | ")
        }
        SplitPlan::Emulate(emulation) => {
            assert!(emulation.slots.is_sorted() && emulation.slots.len() > 1);
            for step in &emulation.steps {
                for slot in slots_of(step) {
                    assert!(emulation.slots.contains(&slot), "{command}: {slot} is not behind the barrier");
                }
            }
            emulation.steps.iter().map(shown).collect::<Vec<_>>().join(" | ")
        }
        SplitPlan::Impossible(why) => format!("{why:?}"),
    }
}

fn slots_of(step: &Step) -> Vec<u16> {
    match step {
        Step::Copy { from, to, .. } => vec![from.slot, to.slot],
        Step::Carry { from_slot, to_slot, .. } => vec![*from_slot, *to_slot],
        Step::Run { slot, .. } | Step::Clean { slot, .. } => vec![*slot],
    }
}

fn shown(step: &Step) -> String {
    match step {
        Step::Copy { from, to, if_missing } => {
            for key in [from, to] {
                assert_eq!(slot(&key.name), key.slot);
            }
            let otherwise = match if_missing {
                IfMissing::Stop => "stop",
                IfMissing::DeleteDestination => "del",
            };
            format!("copy {} {} or {otherwise}", name(&from.name), name(&to.name))
        }
        Step::Carry { from_slot, read, to_slot, command } => {
            let words: Vec<String> = command.iter().map(|word| name(word)).collect();
            format!("{} into {}@{to_slot}", sent(*from_slot, read), words.join(" "))
        }
        Step::Run { slot, frame } => sent(*slot, frame),
        Step::Clean { slot, frame } => format!("finally {}", sent(*slot, frame)),
    }
}

/// The command, and where it goes. Checks that its keys are of that slot.
fn sent(slot_number: u16, frame: &[u8]) -> String {
    let [command] = <[String; 1]>::try_from(printed(frame)).unwrap();
    let args = TestArgs::new(&command);
    if let Some(spec) = lookup(args.args().name()) {
        assert_eq!(route(spec, &args.args()), Ok(Route::Slot(slot_number)), "{command}");
    }
    let words: Vec<String> = command.split(' ').map(|word| name(word.as_bytes())).collect();
    format!("{}@{slot_number}", words.join(" "))
}

fn name(key: &[u8]) -> String {
    let text = String::from_utf8_lossy(key).into_owned();
    match text.strip_prefix("redis-migration:{").and_then(|rest| rest.split_once("}:tmp:")) {
        Some((_, number)) => format!("tmp{number}"),
        None => text,
    }
}

#[test]
fn keys_that_stand_for_themselves_go_to_their_slots() {
    for (command, expected) in [
        ("del a b {a}2 c", "del b@3300 | del c@7365 | del a {a}2@15495"),
        ("DEL {a}1 {a}2", "Slot(15495)"),
        ("UNLINK a b", "UNLINK b@3300 | UNLINK a@15495"),
        ("PFCOUNT a b", "PFCOUNT b@3300 | PFCOUNT a@15495"),
        ("MSET a 1 b 2 {a}2 3 a 4", "MSET b 2@3300 | MSET a 1 {a}2 3 a 4@15495"),
        ("MSETNX a 1 b 2", "MSET b 2@3300 | MSET a 1@15495"),
        ("MSETEX 3 a 1 b 2 a 3 NX PXAT 9", "MSETEX 1 b 2 PXAT 9@3300 | MSETEX 2 a 1 a 3 PXAT 9@15495"),
        ("SMOVE a b m", "SADD b m@3300 | SREM a m@15495"),
    ] {
        assert_eq!(planned(command), expected, "{command}");
    }
}

#[test]
fn a_key_moves_only_when_it_has_arrived() {
    for (command, expected) in [
        ("RENAME a b", "copy a b or stop | DEL a@15495"),
        ("RENAMENX a b", "copy a b or stop | DEL a@15495"),
        ("COPY a b", "copy a b or stop"),
        ("COPY a b REPLACE", "copy a b or stop"),
        ("RPOPLPUSH a b", "LINDEX a -1@15495 into LPUSH b@3300 | RPOP a@15495"),
        ("BRPOPLPUSH a b 0", "LINDEX a -1@15495 into LPUSH b@3300 | RPOP a@15495"),
        ("LMOVE a b left RIGHT", "LINDEX a 0@15495 into RPUSH b@3300 | LPOP a@15495"),
        ("LMOVE a b RIGHT RIGHT", "LINDEX a -1@15495 into RPUSH b@3300 | RPOP a@15495"),
        ("BLMOVE a b LEFT LEFT 0", "LINDEX a 0@15495 into LPUSH b@3300 | LPOP a@15495"),
    ] {
        assert_eq!(planned(command), expected, "{command}");
    }
}

#[test]
fn a_result_travels_when_the_operands_are_together() {
    for (command, expected) in [
        (
            "SUNIONSTORE d a {a}2",
            "SUNIONSTORE tmp7 a {a}2@15495 | copy tmp7 d or del | finally DEL tmp7@15495",
        ),
        ("ZRANGESTORE d a 0 9", "ZRANGESTORE tmp7 a 0 9@15495 | copy tmp7 d or del | finally DEL tmp7@15495"),
        ("SORT a STORE d", "SORT a STORE tmp7@15495 | copy tmp7 d or del | finally DEL tmp7@15495"),
        (
            "SORT a BY nosort GET # STORE d",
            "SORT a BY nosort GET # STORE tmp7@15495 | copy tmp7 d or del | finally DEL tmp7@15495",
        ),
        (
            "GEORADIUS a 1 2 3 km STORE d",
            "GEORADIUS a 1 2 3 km STORE tmp7@15495 | copy tmp7 d or del | finally DEL tmp7@15495",
        ),
        ("BITOP NOT d a", "BITOP NOT tmp7 a@15495 | copy tmp7 d or del | finally DEL tmp7@15495"),
        (
            "ZUNIONSTORE d 1 a WEIGHTS 2",
            "ZUNIONSTORE tmp7 1 a WEIGHTS 2@15495 | copy tmp7 d or del | finally DEL tmp7@15495",
        ),
    ] {
        assert_eq!(planned(command), expected, "{command}");
    }
}

#[test]
fn operands_travel_when_they_are_apart() {
    for (command, expected) in [
        (
            "SINTERSTORE d a b {d}2",
            "copy a tmp7 or del | copy b tmp8 or del | SINTERSTORE d tmp7 tmp8 {d}2@11298 | finally DEL tmp7 tmp8@11298",
        ),
        ("SDIFFSTORE a a b", "copy b tmp7 or del | SDIFFSTORE a a tmp7@15495 | finally DEL tmp7@15495"),
        (
            "ZINTERSTORE d 2 a b AGGREGATE MAX",
            "copy a tmp7 or del | copy b tmp8 or del | ZINTERSTORE d 2 tmp7 tmp8 AGGREGATE MAX@11298 | finally DEL tmp7 tmp8@11298",
        ),
        ("BITOP AND d d a", "copy a tmp7 or del | BITOP AND d d tmp7@11298 | finally DEL tmp7@11298"),
        // The destination is an operand, too: merging at the source's slot would lose what it has.
        ("PFMERGE d a", "copy a tmp7 or del | PFMERGE d tmp7@11298 | finally DEL tmp7@11298"),
    ] {
        assert_eq!(planned(command), expected, "{command}");
    }
}

#[test]
fn what_cannot_be_told_apart_is_refused() {
    for (command, why) in [
        ("EVAL s 2 a b", Unsplittable::Opaque),
        ("LMPOP 2 a b LEFT", Unsplittable::Opaque),
        ("SORT a BY w_* STORE d", Unsplittable::Patterns),
        ("SORT a GET w_* STORE d", Unsplittable::Patterns),
        ("COPY a b DB 1", Unsplittable::OtherDatabase),
        ("LMOVE a b UP DOWN", Unsplittable::Malformed),
        ("MSET a 1 b", Unsplittable::Malformed),
        ("SMOVE a b", Unsplittable::Malformed),
    ] {
        assert_eq!(planned(command), format!("{why:?}"), "{command}");
    }
}

#[test]
fn temporary_keys_are_counted_and_named_in_their_slot() {
    let args = TestArgs::new("SINTERSTORE d a b");
    let plan = split(lookup(b"SINTERSTORE").unwrap(), &args.args(), 41).unwrap();
    let SplitPlan::Emulate(Emulation { steps, temporaries, slots }) = plan else { panic!("{plan:?}") };
    assert_eq!((temporaries, slots), (2, vec![3300, 11298, 15495]));
    let Step::Copy { to, .. } = &steps[1] else { panic!("{steps:?}") };
    let expected = format!("redis-migration:{{{}}}:tmp:42", crate::slot::tag_for_slot(11298));
    assert_eq!(String::from_utf8_lossy(&to.name), expected);
}

proptest! {
    /// The pieces hold every key, each with what belongs to it, in order within its slot, and no other.
    #[test]
    fn pieces_together_are_the_original(
        pairs in prop::collection::vec(("[a-e]{1,2}", "[0-9]{1,3}"), 1..40),
        kind in 0..3,
    ) {
        let mut words: Vec<&str> = Vec::new();
        match kind {
            0 => words.push("UNLINK"),
            1 => words.push("MSET"),
            _ => words.push("MSETEX"),
        }
        let count = pairs.len().to_string();
        if kind == 2 {
            words.push(&count);
        }
        for (key, value) in &pairs {
            words.push(key);
            if kind > 0 {
                words.push(value);
            }
        }
        let mut expected: BTreeMap<u16, Vec<(&str, &str)>> = BTreeMap::new();
        for (key, value) in &pairs {
            expected.entry(slot(key.as_bytes())).or_default().push((key, if kind > 0 { value } else { "" }));
        }
        let args = TestArgs::of(&words);
        match split(lookup(words[0].as_bytes()).unwrap(), &args.args(), 0).unwrap() {
            SplitPlan::Whole(found) => {
                prop_assert_eq!(expected.len(), 1);
                prop_assert_eq!(Some(found), expected.keys().next().map(|&slot| Route::Slot(slot)));
            }
            SplitPlan::PerSlot(pieces) => {
                prop_assert_eq!(pieces.len(), expected.len());
                for Piece { slot: piece_slot, frame } in pieces {
                    let commands = printed(&frame);
                    prop_assert_eq!(commands.len(), 1);
                    let mut found = commands[0].split(' ').skip(if kind == 2 { 2 } else { 1 });
                    let mut held = Vec::new();
                    while let Some(key) = found.next() {
                        held.push((key, if kind > 0 { found.next().unwrap() } else { "" }));
                    }
                    prop_assert_eq!(Some(&held), expected.get(&piece_slot));
                }
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn any_arguments_are_planned_or_refused(
        at in 0..all().len(),
        words in prop::collection::vec("[0-9]{1,2}|STORE|STREAMS|KEYS|DB|LEFT|[a-z]{0,2}", 0..9),
    ) {
        let spec = &all()[at];
        let args = TestArgs::of(std::iter::once(spec.name.to_string()).chain(words));
        match split(spec, &args.args(), 0) {
            Ok(SplitPlan::Whole(found)) => {
                prop_assert_ne!(found, Route::CrossSlot);
                prop_assert!(found != Route::Keyless || spec.keys != KeySpec::Single || spec.kind != Kind::Data);
            }
            Ok(SplitPlan::PerSlot(pieces)) => prop_assert!(pieces.len() > 1),
            Ok(SplitPlan::Emulate(emulation)) => prop_assert!(!emulation.steps.is_empty()),
            Ok(SplitPlan::Impossible(_)) | Err(_) => {}
        }
    }
}
