use super::*;
use crate::connection::Address;
use crate::resp::frame::parse_frame;
use crate::slot::SlotRanges;
use crate::target::keys::KeyNames;
use crate::topology::{Node, Shard, SlotMap, Topology, TopologyKind};
use crate::transform::{DatabaseFilter, KeyFilter, Pattern, Patterns};
use crate::version::Flavor;
use crate::worker::outbox::Kept;

fn take(stream: &mut Stream, outbox: &mut Outbox<()>, end: u64, words: &[&str]) {
    let (taken, _) = take_through(None, &Router::Single, stream, outbox, end, words);
    assert!(matches!(taken, Taken::Done { .. }), "{taken:?}");
}

/// And how many commands the filter left out.
fn take_through(
    transform: Option<Arc<Transform>>,
    router: &Router,
    stream: &mut Stream,
    outbox: &mut Outbox<()>,
    end: u64,
    words: &[&str],
) -> (Taken, u64) {
    take_by(&rules(transform), router, stream, outbox, end, words)
}

fn rules(transform: Option<Arc<Transform>>) -> StreamRules {
    StreamRules {
        target: ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 15 },
        database_map: BTreeMap::new(),
        sole_source: true,
        dynamic: DynamicTable::default(),
        holding: Holding::default(),
        transform,
        scanned: false,
    }
}

fn take_by(
    rules: &StreamRules,
    router: &Router,
    stream: &mut Stream,
    outbox: &mut Outbox<()>,
    end: u64,
    words: &[impl AsRef<[u8]>],
) -> (Taken, u64) {
    let mut filtered = 0;
    let script = rules.transform.as_ref().and_then(|it| it.script.as_ref());
    let mut runner = script.map(|it| it.runner().unwrap());
    let (mut frame, mut spans) = (Vec::new(), Vec::new());
    encode_command(words, &mut frame);
    parse_frame(&frame, &mut spans).unwrap();
    let args = Args { frame: &frame, spans: &spans };
    let moment = Moment { arrived: 0, now: 0 };
    let gate = &mut Gate::default();
    let start = end.saturating_sub(frame.len() as u64);
    let mut to = Onward {
        rules,
        router,
        outbox,
        gate,
        moment,
        start,
        end,
        filtered: &mut filtered,
        script: runner.as_mut(),
        carried: None,
    };
    let taken = stream.take(&args, &mut to);
    (taken, filtered)
}

fn names(outbox: &mut Outbox<()>) -> Vec<String> {
    let bytes = outbox.pending(0).unwrap().bytes.clone();
    let mut names = Vec::new();
    each_frame(&bytes, |args| names.push(String::from_utf8_lossy(args.name()).into_owned()));
    names
}

/// What is sent for a command to a target of this version, with database 3 of the source as 5.
fn mapped(version: (u16, u16), command: &[&str]) -> String {
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    let (major, minor) = version;
    let target = ServerVersion { flavor: Flavor::Redis, major, minor, patch: 0 };
    let rules = StreamRules { target, database_map: BTreeMap::from([(3, 5)]), ..rules(None) };
    let (taken, _) = take_by(&rules, &Router::Single, &mut stream, &mut outbox, 1, command);
    assert!(matches!(taken, Taken::Done { .. }), "{taken:?}");
    let (bytes, mut last) = (outbox.pending(0).unwrap().bytes.clone(), String::new());
    each_frame(&bytes, |args| {
        // Not the text of a script.
        let words = args.iter().map(String::from_utf8_lossy).filter(|word| word.len() < 20);
        last = words.collect::<Vec<_>>().join(" ");
    });
    last
}

#[test]
fn commands_that_name_a_mapped_database_are_rewritten_for_the_target_too() {
    assert_eq!(mapped((7, 0), &["MOVE", "a", "3"]), "MOVE a 5");
    assert_eq!(mapped((2, 8), &["MOVE", "a", "3"]), "EVAL 1 a 5");
    assert_eq!(mapped((7, 0), &["COPY", "a", "b", "DB", "3", "REPLACE"]), "COPY a b DB 5 REPLACE");
    assert_eq!(mapped((6, 0), &["COPY", "a", "b", "DB", "3", "REPLACE"]), "EVAL 2 a b 5");
    assert_eq!(mapped((7, 0), &["SET", "a", "3"]), "SET a 3");
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

fn taken(transform: Transform, commands: &[&str]) -> (Vec<String>, u64) {
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    let transform = Arc::new(transform);
    let mut filtered = 0;
    for (end, command) in commands.iter().enumerate() {
        let words: Vec<&str> = command.split(' ').collect();
        let transform = Some(Arc::clone(&transform));
        let (taken, left_out) =
            take_through(transform, &Router::Single, &mut stream, &mut outbox, end as u64 + 1, &words);
        assert!(matches!(taken, Taken::Done { .. }), "{taken:?}");
        filtered += left_out;
    }
    let bytes = outbox.pending(0).unwrap().bytes.clone();
    (crate::command::test_args::printed(&bytes), filtered)
}

#[test]
fn a_transaction_stays_one_without_what_is_left_out() {
    let keys = KeyFilter { exclude: Patterns::new([Pattern::Prefix("x")]).ok(), ..KeyFilter::default() };
    let transform = Transform::new(DatabaseFilter::new(vec![], vec![1]), keys, &["INCR".to_owned()]);
    let commands =
        ["MULTI", "SET x 1", "DEL a x", "INCR b", "SELECT 1", "SET c 1", "EXEC", "SELECT 0", "SET d 1"];
    let (left, filtered) = taken(transform, &commands);
    assert_eq!(left, ["SELECT 0", "MULTI", "DEL a", "EXEC", "SELECT 0", "SET d 1"]);
    assert_eq!(filtered, 4);
}

#[test]
fn included_databases_are_emptied_one_by_one() {
    let transform = Transform::new(DatabaseFilter::new(vec![2, 4], vec![]), KeyFilter::default(), &[]);
    let (left, _) = taken(transform, &["FLUSHALL ASYNC", "SELECT 4", "SET a 1"]);
    assert_eq!(left, ["SELECT 2", "FLUSHDB ASYNC", "SELECT 4", "FLUSHDB ASYNC", "SET a 1"]);
}

#[test]
fn a_script_takes_what_the_filter_left() {
    let text = "function command(c)
        if c.name == 'DEL' then return {{name = 'UNLINK', args = c.args}, {name = 'SET', args = {'seen', #c.args}}} end
        if c.name == 'INCR' then return false end
    end";
    let script = crate::transform::script::Script::new(text, true).ok();
    let keys = KeyFilter { exclude: Patterns::new([Pattern::Prefix("x")]).ok(), ..KeyFilter::default() };
    let transform = Transform::new(DatabaseFilter::default(), keys, &[]).with_script(script);
    let (left, filtered) = taken(transform, &["DEL a x b", "INCR a", "SET a 1", "PING"]);
    assert_eq!(left, ["SELECT 0", "UNLINK a b", "SET seen 2", "SET a 1"]);
    assert_eq!(filtered, 2);
}

/// One node with all slots.
fn cluster() -> Router {
    let address = Address { host: "127.0.0.1".to_owned(), port: 1 };
    let master = Node { address: address.clone(), announced: address, id: String::new(), failing: false };
    let shard = Shard { id: String::new(), master, replicas: Vec::new(), slots: SlotRanges::all() };
    let server = ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 15 };
    let kind = TopologyKind::Cluster;
    Router::Slots(SlotMap::new(&Topology { kind, server, shards: vec![shard], databases: None }))
}

fn scripted(body: &str) -> Option<Arc<Transform>> {
    let script = crate::transform::script::Script::new(&format!("function command(c) {body} end"), true).ok();
    Some(Arc::new(Transform::default().with_script(script)))
}

/// A resume begins where the source's command did, however long the one is that took its place.
#[test]
fn a_barrier_begins_where_the_commands_of_the_source_did() {
    let transform = scripted("return {name = 'RENAME', args = {'a', 'b'}}");
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    let words = ["RENAME", "{a long tag}:a", "{a long tag}:b"];
    let mut frame = Vec::new();
    encode_command(&words, &mut frame);
    let end = 1000 + frame.len() as u64;
    let (taken, _) = take_through(transform, &cluster(), &mut stream, &mut outbox, end, &words);
    let Taken::Barrier(barrier) = taken else { panic!("{taken:?}") };
    assert_eq!((barrier.from, barrier.end), (1000, end));
}

/// With a guard of its own for each, a replay would take the first for both.
#[test]
fn commands_in_the_place_of_one_share_the_guard_of_their_slot() {
    let transform = scripted(
        "return {{name = 'INCR', args = {'a'}}, {name = 'INCR', args = {'b'}}, {name = 'INCR', args = {'a'}}}",
    );
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    outbox.kept = Some(Kept::new(KeyNames::new("u", "0"), 1, 1));
    let (taken, _) = take_through(transform, &cluster(), &mut stream, &mut outbox, 100, &["INCR", "x"]);
    assert!(matches!(taken, Taken::Done { commands: 1 }), "{taken:?}");
    let one = ["MULTI", "EXISTS", "INCR", "SET", "EXEC"];
    let two = ["MULTI", "EXISTS", "INCR", "INCR", "SET", "EXEC"];
    assert_eq!(names(&mut outbox), [&["SELECT"], &two[..], &one[..]].concat());
    assert!(!stream.in_transaction());
}

/// What a scan tells of a key, through this script: the commands of the target, or why not.
fn read_again(script: &str, command: &[&[u8]]) -> Vec<String> {
    let script = crate::transform::script::Script::new(script, true).unwrap();
    let transform = Transform::default().with_script(Some(script));
    let rules = StreamRules { scanned: true, ..rules(Some(Arc::new(transform))) };
    let (mut stream, mut outbox) = (Stream::default(), Outbox::with_lanes(1));
    let (taken, _) = take_by(&rules, &Router::Single, &mut stream, &mut outbox, 1, command);
    if let Taken::Refused { why, .. } = taken {
        return vec![why];
    }
    let bytes = outbox.pending(0).unwrap().bytes.clone();
    let mut printed = crate::command::test_args::printed(&bytes);
    printed.retain(|command| command != "SELECT 0");
    printed
}

/// Script, command, and what becomes of it.
type Case<'a> = (&'a str, &'a [&'a [u8]], &'a [&'a str]);

#[test]
fn what_a_scan_reads_again_goes_through_key() {
    const NAMES: &str = "local function renamed(key) return (key:gsub('^old:', 'new:')) end
        function key(k) return {key = renamed(k.key)} end
        function command(c) c.args[1] = renamed(c.args[1]) return c end";
    const TYPES: &str = "function key(k) return k.type == 'string' end function command(c) end";
    const EXPIRY: &str = "function key(k) return {expireAt = k.expireAt and k.expireAt + 1 or 9} end
        function command(c) end";
    const REWRITES: &str = "function key(k) return {rewrite = true, key = 'n:' .. k.key} end
        function command(c)
            if c.name == 'DEL' then return {name = 'UNLINK', args = {'n:' .. c.args[1]}} end
            c.args[1] = 'n:' .. c.args[1]
            if c.args[2] == 'secret' then c.args[2] = '***' end
            return c
        end";
    // `RPUSH l a`, `DUMP l` on Redis 7.0.15, which prints as it is.
    const LIST: &[u8] =
        b"\x12\x01\x02\x0a\x0a\x00\x00\x00\x01\x00\x81a\x02\xff\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let list = |words: &[&str]| {
        let shown = String::from_utf8_lossy(LIST).into_owned();
        words.iter().map(|word| word.replace("LIST", &shown)).collect::<Vec<_>>()
    };
    let cases: [Case<'_>; 13] = [
        (NAMES, &[b"SET", b"old:a", b"1"], &["SET new:a 1"]),
        (NAMES, &[b"SET", b"a", b"1", b"PXAT", b"7"], &["SET a 1 PXAT 7"]),
        (NAMES, &[b"DEL", b"old:a"], &["DEL new:a"]),
        (
            NAMES,
            &[b"RESTORE", b"old:a", b"7", LIST, b"REPLACE", b"ABSTTL"],
            &["RESTORE new:a 7 LIST REPLACE ABSTTL"],
        ),
        (TYPES, &[b"SET", b"a", b"1"], &["SET a 1"]),
        // What the key was before does not stay.
        (TYPES, &[b"RESTORE", b"a", b"0", LIST, b"REPLACE"], &["DEL a"]),
        (EXPIRY, &[b"SET", b"a", b"1", b"PXAT", b"7"], &["SET a 1 PXAT 8"]),
        (EXPIRY, &[b"SET", b"a", b"1"], &["SET a 1 PXAT 9"]),
        (EXPIRY, &[b"RESTORE", b"a", b"0", LIST, b"REPLACE"], &["RESTORE a 9 LIST REPLACE ABSTTL"]),
        // By whatever command the script has it deleted.
        (REWRITES, &[b"SET", b"a", b"secret"], &["UNLINK n:a", "DEL n:a", "SET n:a ***"]),
        (
            REWRITES,
            &[b"RESTORE", b"l", b"7", LIST, b"REPLACE", b"ABSTTL"],
            &["UNLINK n:l", "DEL n:l", "RPUSH n:l a", "PEXPIREAT n:l 7"],
        ),
        (
            "function key(k) return {key = 'b'} end function command(c) end",
            &[b"SET", b"a", b"1"],
            &["DEL a", "SET b 1"],
        ),
        (
            "function key(k) error('no') end function command(c) end",
            &[b"SET", b"a", b"1"],
            &["filter.lua:1: no"],
        ),
    ];
    for (script, command, expected) in cases {
        assert_eq!(read_again(script, command), list(expected), "{script}");
    }
}
