use super::*;
use crate::resp::frame::parse_frame;
use crate::version::Flavor;

fn take(stream: &mut Stream, outbox: &mut Outbox<()>, end: u64, words: &[&str]) {
    let rules = StreamRules {
        target: ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 15 },
        database_map: BTreeMap::new(),
        sole_source: true,
        dynamic: DynamicTable::default(),
        holding: Holding::default(),
    };
    let (mut frame, mut spans) = (Vec::new(), Vec::new());
    encode_command(words, &mut frame);
    parse_frame(&frame, &mut spans).unwrap();
    let args = Args { frame: &frame, spans: &spans };
    let moment = Moment { arrived: 0, now: 0 };
    let gate = &mut Gate::default();
    let mut to = Onward { rules: &rules, router: &Router::Single, outbox, gate, moment, end, carried: None };
    let taken = stream.take(&args, &mut to);
    assert!(matches!(taken, Taken::Done { .. }), "{taken:?}");
}

fn names(outbox: &mut Outbox<()>) -> Vec<String> {
    let bytes = outbox.pending(0).unwrap().bytes.clone();
    let mut names = Vec::new();
    each_frame(&bytes, |args| names.push(String::from_utf8_lossy(args.name()).into_owned()));
    names
}

#[test]
fn a_transaction_too_large_for_memory_is_cut_where_batches_may_part() {
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    take(&mut stream, &mut outbox, 1, &["MULTI"]);
    assert!(!stream.may_part());
    take(&mut stream, &mut outbox, 2, &["SET", "a", &"x".repeat(LARGEST_TRANSACTION)]);
    assert!(stream.may_part() && stream.in_transaction());
    take(&mut stream, &mut outbox, 3, &["SET", "b", "y"]);
    assert!(!stream.may_part());
    take(&mut stream, &mut outbox, 4, &["EXEC"]);
    assert!(stream.may_part() && !stream.in_transaction());
    let expected = ["SELECT", "MULTI", "SET", "EXEC", "MULTI", "SET", "EXEC"];
    assert_eq!(names(&mut outbox), expected);
}

#[test]
fn a_select_inside_a_transaction_is_not_relied_on() {
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    let commands: [&[&str]; 5] =
        [&["MULTI"], &["SELECT", "1"], &["SET", "a", "1"], &["EXEC"], &["SET", "b", "2"]];
    for (end, words) in commands.iter().enumerate() {
        take(&mut stream, &mut outbox, end as u64 + 1, words);
    }
    // The target may have refused the transaction, and with it its SELECT.
    let expected = ["SELECT", "MULTI", "SELECT", "SET", "EXEC", "SELECT", "SET"];
    assert_eq!(names(&mut outbox), expected);
}
