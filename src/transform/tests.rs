use super::*;
use crate::command::lookup;
use crate::command::test_args::{TestArgs, printed};
use proptest::prelude::*;

/// Databases 0 and 1 of 0 to 3, keys that do not begin with x, no PUBLISH.
fn both() -> Transform {
    let keys = KeyFilter { exclude: Patterns::new([Pattern::Prefix("x")]).ok(), ..KeyFilter::default() };
    Transform::new(DatabaseFilter::new(vec![0, 1], vec![]), keys, &["publish".to_owned()])
}

fn databases(include: &[u64], exclude: &[u64]) -> Transform {
    Transform::new(DatabaseFilter::new(include.to_vec(), exclude.to_vec()), KeyFilter::default(), &[])
}

fn judged(transform: &Transform, db: u64, command: &str) -> String {
    let args = TestArgs::new(command);
    let args = args.args();
    let mut out = Vec::new();
    match transform.command(lookup(args.name()), &args, db, &mut out) {
        Verdict::Keep => "keep".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Changed => printed(&out).join("; "),
        Verdict::FlushEach(databases) => format!("flush {databases:?}"),
        Verdict::Refused(_) => "refused".to_owned(),
    }
}

#[test]
fn commands_of_included_databases_are_judged_by_their_keys() {
    let both = both();
    for (command, here, elsewhere) in [
        ("SET a 1", "keep", "drop"),
        ("SET x 1", "drop", "drop"),
        ("DEL a x b", "DEL a b", "drop"),
        ("RENAME x a", "refused", "drop"),
        ("PING", "keep", "keep"),
        ("SELECT 3", "keep", "keep"),
        ("MULTI", "keep", "keep"),
        ("EXEC", "keep", "keep"),
        ("PUBLISH a m", "drop", "drop"),
        ("SPUBLISH x m", "keep", "keep"),
        ("FUNCTION FLUSH", "keep", "keep"),
        ("SCRIPT FLUSH", "keep", "keep"),
        ("FLUSHDB", "refused", "drop"),
        ("FLUSHALL", "refused", "refused"),
        ("SWAPDB 0 1", "keep", "keep"),
        ("SWAPDB 2 3", "drop", "drop"),
        ("SWAPDB 1 2", "refused", "refused"),
        ("MOVE a 1", "keep", "refused"),
        ("MOVE a 2", "DEL a", "drop"),
        ("MOVE x 1", "drop", "drop"),
        ("COPY a b DB 1", "keep", "refused"),
        ("COPY a b DB 2", "drop", "drop"),
        ("COPY a x DB 1", "drop", "drop"),
        ("COPY x a", "refused", "drop"),
        ("COPY a x", "drop", "drop"),
        ("EVAL s 1 a", "keep", "drop"),
        ("EVAL s 1 x", "drop", "drop"),
        ("EVAL s 2 a x", "refused", "drop"),
        ("EVAL s 0", "refused", "drop"),
        ("JSON.SET a . 1", "refused", "drop"),
    ] {
        assert_eq!(judged(&both, 0, command), here, "{command}");
        assert_eq!(judged(&both, 2, command), elsewhere, "{command} elsewhere");
    }
}

#[test]
fn flushes_empty_what_is_included() {
    let (named, but) = (databases(&[0, 2], &[2, 3]), databases(&[], &[3]));
    for (command, here, elsewhere) in [
        ("FLUSHALL", "flush [0]", "flush [0]"),
        ("FLUSHDB ASYNC", "keep", "drop"),
        ("EVAL s 0", "keep", "drop"),
        ("JSON.SET a . 1", "keep", "drop"),
        ("COPY a b", "keep", "drop"),
        ("COPY a b DB 3", "drop", "drop"),
        ("COPY a b DB 0", "keep", "refused"),
    ] {
        assert_eq!(judged(&named, 0, command), here, "{command}");
        assert_eq!(judged(&named, 3, command), elsewhere, "{command} elsewhere");
    }
    assert_eq!(judged(&but, 0, "FLUSHALL"), "refused");
    assert_eq!(judged(&but, 7, "FLUSHDB"), "keep");
}

#[test]
fn keys_of_the_target_are_claimed_by_where_they_come_from() {
    let map = BTreeMap::from([(1, 0), (2, 5)]);
    let transform = databases(&[1, 2], &[]);
    for (db, claimed) in [(0, true), (1, false), (2, false), (5, true), (7, false)] {
        assert_eq!(transform.claims(&map, db, b"k"), claimed, "{db}");
    }
    // 1 maps away, so that nothing of the source ends there, filtered or not.
    assert!(!databases(&[], &[9]).claims(&map, 1, b"k"));
    assert!(both().claims(&BTreeMap::new(), 0, b"k") && !both().claims(&BTreeMap::new(), 0, b"xk"));
}

fn any_command() -> impl Strategy<Value = String> {
    let key = || prop::sample::select(vec!["a", "b", "x1", "x2", "{a}x", ""]);
    let word = prop::sample::select(vec!["1", "2", "DB", "LEFT", "STORE", "BY", "w*", "REPLACE", "0"]);
    let names: Vec<&str> = crate::command::all().iter().map(|spec| spec.name.as_ref()).collect();
    let words = prop::collection::vec(prop_oneof![3 => key(), 1 => word], 0..7);
    (prop::sample::select(names), words).prop_map(|(name, words)| {
        let words: Vec<&str> =
            words.into_iter().map(|word| if word.is_empty() { "\"\"" } else { word }).collect();
        format!("{name} {}", words.join(" "))
    })
}

proptest! {
    /// What is left passes as it is.
    #[test]
    fn the_filter_leaves_alone_what_it_left(command in any_command(), db in 0..4u64) {
        let both = both();
        let once = judged(&both, db, &command);
        if !["keep", "drop", "refused"].contains(&once.as_str()) && !once.starts_with("flush") {
            prop_assert_eq!(judged(&both, db, &once), "keep", "{} became {}", command, once);
        }
    }

    /// What is left stands in its order.
    #[test]
    fn what_is_left_keeps_its_order(keys in prop::collection::vec("[abx][0-9]", 1..12)) {
        let left: Vec<&str> = keys.iter().map(String::as_str).filter(|key| !key.starts_with('x')).collect();
        let judged = judged(&both(), 0, &format!("DEL {}", keys.join(" ")));
        let expected = match (left.len(), keys.len()) {
            (0, _) => "drop".to_owned(),
            (kept, all) if kept == all => "keep".to_owned(),
            _ => format!("DEL {}", left.join(" ")),
        };
        prop_assert_eq!(judged, expected);
    }
}
