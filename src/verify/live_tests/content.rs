//! What is found in values and expiries.

use super::*;

#[tokio::test]
async fn equal_data_is_equal() {
    let (source, _near, target, _far) = equal_pair().await;
    let report = report(input(&source, &target)).await;
    assert_eq!(found(&report), [""; 0]);
    assert_eq!((report.keys_compared, report.rounds), (KEYS, 1));
    assert_eq!((report.differences(), report.unsettled), (0, 0));
}

#[tokio::test]
async fn differences_of_every_kind_are_found() {
    let (source, mut near, target, mut far) = equal_pair().await;
    for command in [
        "DEL string:7",
        "SET string:8 valuE:8",
        "SET string:10 ",
        "SET only:target 1",
        "SETRANGE long 49998 ?",
        "DEL hash:1",
        "HSET hash:2 other 8",
        "RPUSH list:2 d",
        "SREM ints:2 1",
        "SADD set:2 d",
        "ZADD zset:2 1.25 a",
        "XADD stream:2 9-9 f v",
        "DEL set:3",
        "RPUSH set:3 a b c",
        "PERSIST expiring:1",
        "PEXPIRE expiring:2 1800000",
        "PEXPIRE int:3 3600000",
        "HSET big:hash f2999 value",
        "LSET big:list -1 element",
        "SADD big:set member",
        "ZADD big:zset 2999.5 member:2999",
        "XACK big:stream group3 7-1",
        "SET redis-migration:checkpoint 5",
    ] {
        run(&mut far, command).await;
    }
    run(&mut near, "SET redis-migration:other 5").await;
    let report = report(input(&source, &target)).await;
    let expected = [
        "Different big:hash: value",
        "Different big:list: value",
        "Different big:set: value",
        "Different big:stream: value",
        "Different big:zset: value",
        "Different expiring:1: expiry only on the source",
        "Different hash:2: value",
        "Different int:3: expiry only on the target",
        "Different ints:2: value",
        "Different list:2: value",
        "Different long: value",
        "Different set:2: value",
        "Different set:3: type set ≠ list",
        "Different stream:2: value",
        "Different string:10: value",
        "Different string:8: value",
        "Different zset:2: value",
        "Extra only:target: string",
        "Missing hash:1: hash",
        "Missing string:7: string",
    ];
    let mut lines = found(&report);
    let apart: Vec<String> = lines.extract_if(.., |line| line.contains("s apart")).collect();
    assert_eq!(lines, expected);
    assert_eq!(apart.len(), 1);
    // Half an hour, less what passed between the two commands.
    let seconds = apart[0].strip_prefix("Different expiring:2: expiry ").unwrap().split('.').next().unwrap();
    assert!((1700..=1800).contains(&seconds.parse::<u32>().unwrap()), "{apart:?}");
    assert_eq!((report.missing, report.different, report.extra), (2, 18, 1));
    assert_eq!((report.rounds, report.unchecked, report.unsettled), (3, 0, 0));
}

#[tokio::test]
async fn encodings_do_not_matter() {
    let source = Server::start(&[]);
    let small = [
        "--hash-max-listpack-entries",
        "1",
        "--zset-max-listpack-entries",
        "1",
        "--set-max-intset-entries",
        "1",
        "--list-max-listpack-size",
        "1",
        "--rdbcompression",
        "no",
    ];
    let target = Server::start(&small);
    let mut commands = commands_of_every_type();
    run_all(&mut source.connect().await, &commands).await;
    // Another order of insertion, too; but for streams and lists it counts.
    let unordered = |command: &String| command.starts_with(['S', 'H', 'Z']);
    commands.sort_by_key(|command| !unordered(command));
    let split = commands.iter().position(|command| !unordered(command)).unwrap();
    commands[..split].reverse();
    run_all(&mut target.connect().await, &commands).await;
    let mut far = target.connect().await;
    run(&mut far, "SET string:1 value:1more").await;
    let mut input = input(&source, &target);
    // Their times are relative to when the command came.
    input.include = Some(Arc::new(|_, key| !key.starts_with(b"expiring:")));
    let report = report(input).await;
    assert_eq!(found(&report), [""; 0]);
    assert_eq!(report.keys_compared, KEYS - 50);
}

#[tokio::test]
async fn expiries_have_a_tolerance() {
    let source = Server::start(&[]);
    let target = Server::start(&[]);
    let mut near = source.connect().await;
    let mut far = target.connect().await;
    let Reply::Array(Some(now)) = run(&mut near, "TIME").await else { panic!("TIME") };
    let now: i64 = now[0].text().unwrap().parse::<i64>().unwrap() * 1000;
    for (key, ours, theirs) in
        [("close", 600_000, 600_900), ("far", 600_000, 601_500), ("same", 600_000, 600_000)]
    {
        run(&mut near, &format!("SET {key} v PXAT {}", now + ours)).await;
        run(&mut far, &format!("SET {key} v PXAT {}", now + theirs)).await;
    }
    // About to expire, gone already on one side.
    run(&mut near, "SET vanishing v PX 900").await;
    run(&mut far, "SET leaving v PX 900").await;
    let absolute = report(input(&source, &target)).await;
    assert_eq!(found(&absolute), ["Different far: expiry 1.5 s apart"]);
    let mut old = input(&source, &target);
    old.source.version = ServerVersion { major: 6, minor: 2, ..VERSION };
    // Relative times allow for the time between the questions.
    run(&mut far, &format!("PEXPIREAT far {}", now + 610_000)).await;
    let relative = report(old).await;
    assert_eq!(relative.different, 1);
    assert!(relative.samples[0].detail.contains("s apart"));
}

#[tokio::test]
async fn heavy_values_are_compared_in_chunks() {
    let (source, mut near, target, mut far) = equal_pair().await;
    let heavy = |source: &Server, target: &Server| {
        let mut input = input(source, target);
        input.chunk_above = 20_000;
        input
    };
    assert_eq!(found(&report(heavy(&source, &target)).await), [""; 0]);
    for command in [
        "SETRANGE long 49998 ?",
        "HSET big:hash f2999 value",
        "LSET big:list -1 element",
        "SREM big:set member:2999",
        "ZADD big:zset 2999.5 member:2999",
        "XADD big:stream 7-3001 f v",
    ] {
        run(&mut far, command).await;
    }
    let lines = found(&report(heavy(&source, &target)).await);
    assert_eq!(lines[0], "Different big:hash: value of an element");
    assert!(lines[1].starts_with("Different big:list: value, near element "), "{lines:?}");
    assert_eq!(lines[2], "Different big:set: value of an element");
    assert_eq!(lines[3], "Different big:stream: last id of the stream");
    assert_eq!(lines[4], "Different big:zset: value of an element");
    assert!(lines[5].starts_with("Different long: value, near byte "), "{lines:?}");
    assert_eq!(lines.len(), 6);
    // What only the target holds shows in the length.
    for command in [
        "SETRANGE long 49998 _",
        "HSET big:hash f2999 value:2999",
        "LSET big:list -1 element:2999",
        "SADD big:set member:2999 more",
        "ZADD big:zset 2999.25 member:2999",
        "ZADD big:zset 1 more",
        "XDEL big:stream 7-1500 7-3001",
        "HSET big:hash more 1",
        "RPUSH big:list more",
        "APPEND long more",
    ] {
        run(&mut far, command).await;
    }
    run(&mut near, "PING").await;
    let lines = found(&report(heavy(&source, &target)).await);
    let expected = [
        "Different big:hash: number of elements",
        "Different big:list: number of elements",
        "Different big:set: number of elements",
        "Different big:stream: entries from ",
        "Different big:zset: number of elements",
        "Different long: length",
    ];
    assert_eq!(lines[0], expected[0]);
    assert!(lines[1].starts_with("Different big:list: "));
    assert_eq!(lines[2], expected[2]);
    assert!(lines[3].starts_with(expected[3]), "{lines:?}");
    assert_eq!(lines[4], expected[4]);
    assert!(lines[5].starts_with("Different long: "));
    // An old server knows no command for many members at once.
    let mut old = heavy(&source, &target);
    old.target.version = ServerVersion { major: 3, minor: 2, ..VERSION };
    old.source.version = ServerVersion { major: 2, minor: 8, ..VERSION };
    assert_eq!(report(old).await.different, 6);
}

/// What a heavy value does is not seen at one look: every one of these once passed for unsettled.
#[tokio::test]
async fn heavy_keys_that_are_missing_or_of_another_kind_are_found() {
    let (source, _near, target, mut far) = equal_pair().await;
    for command in [
        "DEL big:stream",
        "DEL big:hash",
        "DEL long",
        "PEXPIRE big:zset 1800000",
        "DEL big:set",
        "RPUSH big:set a",
        "RENAME big:list big:other",
    ] {
        run(&mut far, command).await;
    }
    let mut input = input(&source, &target);
    input.chunk_above = 20_000;
    input.rounds = 1;
    let mut keys = input.clone();
    let full = report(input).await;
    let expected = [
        "Different big:set: type set ≠ list",
        "Different big:zset: expiry only on the target",
        "Extra big:other: list",
        "Missing big:hash: hash",
        "Missing big:list: list",
        "Missing big:stream: stream",
        "Missing long: string",
    ];
    assert_eq!(found(&full), expected);
    assert_eq!((full.differences(), full.unsettled), (7, 0));
    keys.mode = VerifyMode::Keys;
    assert_eq!(found(&report(keys).await), expected);
}
