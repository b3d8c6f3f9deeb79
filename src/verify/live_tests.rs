//! Against real servers.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::connection::test_server::{Server, eventually};
use crate::connection::{Connection, Dialer};
use crate::resp::Reply;
use crate::version::{Flavor, ServerVersion};

const VERSION: ServerVersion = ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 15 };

fn deployment(servers: &[&Server]) -> Deployment {
    let nodes = servers.iter().map(|server| NodeShare {
        address: server.address.clone(),
        slots: Vec::new(),
        replica: false,
    });
    let dialer = Dialer::new(servers[0].access(), "verify");
    Deployment { dialer, version: VERSION, nodes: nodes.collect(), cluster: false }
}

fn input(source: &Server, target: &Server) -> VerifyInput {
    VerifyInput {
        source: deployment(&[source]),
        target: deployment(&[target]),
        databases: BTreeMap::new(),
        include: None,
        mode: VerifyMode::Full,
        rounds: 3,
        max_samples: 100,
        chunk_above: CHUNK_ABOVE,
        settle: Arc::new(|| Box::pin(async {})),
    }
}

async fn report(input: VerifyInput) -> VerifyReport {
    let (progress, _) = watch::channel(VerifyProgress::default());
    let (_run, stop) = watch::channel(false);
    // Spawned, as its callers do.
    let verified = tokio::spawn(verify(input, progress, stop));
    tokio::time::timeout(Duration::from_secs(60), verified).await.unwrap().unwrap().unwrap()
}

/// Found differences as `kind key: detail`, sorted.
fn found(report: &VerifyReport) -> Vec<String> {
    let line = |found: &Difference| format!("{:?} {}: {}", found.kind, found.key, found.detail);
    let mut lines: Vec<String> = report.samples.iter().map(line).collect();
    lines.sort();
    lines
}

async fn run(connection: &mut Connection, command: &str) -> Reply {
    let args: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
    connection.query(&args).await.unwrap()
}

async fn run_all(connection: &mut Connection, commands: &[String]) {
    for part in commands.chunks(1000) {
        for command in part {
            let args: Vec<&str> = command.split(' ').collect();
            connection.queue(&args);
        }
        connection.send_queued().await.unwrap();
        for command in part {
            let reply = connection.receive().await.unwrap();
            assert!(!matches!(reply, Reply::Error(_)), "{command}: {reply:?}");
        }
    }
}

/// Keys of every type in small and large encodings, with and without expiry.
fn commands_of_every_type() -> Vec<String> {
    let mut all = Vec::new();
    for key in 0..2500 {
        all.push(format!("SET string:{key} value:{key}"));
    }
    for key in 0..50 {
        all.push(format!("SET int:{key} {key}"));
        all.push(format!("SET expiring:{key} x PX {}", 3_600_000 + key));
        all.push(format!("HSET hash:{key} field:{key} value other 7"));
        all.push(format!("RPUSH list:{key} a b 17 c"));
        all.push(format!("SADD ints:{key} 1 2 3 {key}"));
        all.push(format!("SADD set:{key} a b c m{key}"));
        all.push(format!("ZADD zset:{key} 1.5 a 2 b -3e5 c"));
        all.push(format!("XADD stream:{key} 1-{} f v g w", key + 1));
        all.push(format!("PFADD hll:{key} a b c"));
    }
    all.push(format!("SET long {}", "long ".repeat(10_000).trim_end().replace(' ', "_")));
    for member in 0..3000 {
        all.push(format!("HSET big:hash f{member} value:{member}"));
        all.push(format!("RPUSH big:list element:{member}"));
        all.push(format!("SADD big:set member:{member}"));
        all.push(format!("ZADD big:zset {member}.25 member:{member}"));
        all.push(format!("XADD big:stream 7-{} f {member}", member + 1));
    }
    for id in 1..5 {
        all.push(format!("XGROUP CREATE big:stream group{id} 0"));
        all.push(format!("XREADGROUP GROUP group{id} consumer COUNT {} STREAMS big:stream >", id * 40));
    }
    all.push("APPEND string:1 more".into());
    all
}

const KEYS: u64 = 2500 + 9 * 50 + 1 + 5;

/// Source and target with equal data of every type.
async fn equal_pair() -> (Server, Connection, Server, Connection) {
    let source = Server::start(&["--repl-diskless-sync-delay", "0"]);
    let target = Server::start(&[]);
    let mut near = source.connect().await;
    let mut far = target.connect().await;
    run_all(&mut near, &commands_of_every_type()).await;
    copy(&source, &target).await;
    assert_eq!(run(&mut far, "DBSIZE").await, Reply::Integer(KEYS as i64));
    run(&mut near, "PING").await;
    (source, near, target, far)
}

/// Copies everything, by the servers' own replication.
async fn copy(source: &Server, target: &Server) {
    let mut far = target.connect().await;
    let port = source.address.port;
    run(&mut far, &format!("REPLICAOF 127.0.0.1 {port}")).await;
    eventually("replica in sync", || async {
        let info = target.connect().await.query_text(&[b"INFO", b"replication"]).await.unwrap();
        info.contains("master_link_status:up").then_some(())
    })
    .await;
    run(&mut far, "REPLICAOF NO ONE").await;
}

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
async fn writes_on_their_way_settle() {
    let (source, mut near, target, _far) = equal_pair().await;
    let writes = [
        "SET string:1 changed",
        "DEL string:2",
        "SET new 1",
        "HSET big:hash f1 changed",
        "PEXPIRE int:1 500000000",
        "DEL list:1",
        "SADD list:1 a",
    ];
    for command in writes {
        run(&mut near, command).await;
    }
    let mut on_their_way = input(&source, &target);
    let address = target.connect().await;
    let late = Arc::new(tokio::sync::Mutex::new(Some(address)));
    on_their_way.settle = Arc::new(move || {
        let late = Arc::clone(&late);
        Box::pin(async move {
            if let Some(mut far) = late.lock().await.take() {
                for command in writes {
                    run(&mut far, command).await;
                }
            }
        })
    });
    let report = report(on_their_way).await;
    assert_eq!(found(&report), [""; 0]);
    assert_eq!((report.differences(), report.unsettled), (0, 0));
}

#[tokio::test]
async fn keys_that_never_rest_are_unsettled() {
    let (source, mut near, target, _far) = equal_pair().await;
    run(&mut near, "SET counter 5").await;
    run(&mut near, "SET missing 5").await;
    let mut input = input(&source, &target);
    input.rounds = 2;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let writer = Arc::new(tokio::sync::Mutex::new(near));
    input.settle = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let writer = Arc::clone(&writer);
        Box::pin(async move {
            run(&mut *writer.lock().await, "INCR counter").await;
        })
    });
    let report = report(input).await;
    assert_eq!(found(&report), ["Missing missing: string"]);
    // The counter is missing, too, but its value changes between the readings.
    assert_eq!((report.missing, report.unsettled), (1, 1));
    assert!(calls.load(Ordering::Relaxed) >= 4);
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
    assert!(lines[3].starts_with("Different big:stream: entries from "), "{lines:?}");
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
        "XDEL big:stream 7-3001",
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
        "Different big:stream: last id of the stream",
        "Different big:zset: number of elements",
        "Different long: length",
    ];
    assert_eq!(lines[0], expected[0]);
    assert!(lines[1].starts_with("Different big:list: "));
    assert_eq!(lines[2..5], expected[2..5]);
    assert!(lines[5].starts_with("Different long: "));
    // An old server knows no command for many members at once.
    let mut old = heavy(&source, &target);
    old.target.version = ServerVersion { major: 3, minor: 2, ..VERSION };
    old.source.version = ServerVersion { major: 2, minor: 8, ..VERSION };
    assert_eq!(report(old).await.different, 6);
}

#[tokio::test]
async fn databases_are_mapped_and_merged() {
    let source = Server::start(&[]);
    let target = Server::start(&[]);
    let mut near = source.connect().await;
    let mut far = target.connect().await;
    for command in ["SET a 0", "SELECT 1", "SET b 1", "SELECT 2", "SET c 2", "HSET h f v"] {
        run(&mut near, command).await;
    }
    for command in ["SET a 0", "SET b 1", "SELECT 7", "SET c 2", "HSET h f v", "SELECT 1", "SET own 1"] {
        run(&mut far, command).await;
    }
    let mut mapped = input(&source, &target);
    mapped.databases = BTreeMap::from([(1, 0), (2, 7)]);
    assert_eq!(found(&report(mapped.clone()).await), [""; 0]);
    for command in ["SELECT 0", "SET extra 1", "DEL b", "SELECT 7", "DEL h"] {
        run(&mut far, command).await;
    }
    let report = report(mapped).await;
    assert_eq!(found(&report), ["Extra extra: string", "Missing b: string", "Missing h: hash"]);
    let dbs: Vec<(&str, u64)> = report.samples.iter().map(|found| (found.key.as_str(), found.db)).collect();
    assert!(dbs.contains(&("b", 1)) && dbs.contains(&("h", 2)));
}

#[tokio::test]
async fn samples_and_key_comparisons_see_their_share() {
    let (source, _near, target, mut far) = equal_pair().await;
    for key in 0..2500 {
        if key % 2 == 0 {
            run(&mut far, &format!("SET string:{key} other")).await;
        } else {
            run(&mut far, &format!("SET extra:{key} other")).await;
        }
    }
    run(&mut far, "DEL int:1").await;
    run(&mut far, "PEXPIRE int:2 100000").await;
    let mut input = input(&source, &target);
    input.rounds = 1;
    input.mode = VerifyMode::Sample { percent: 20 };
    let sampled = report(input.clone()).await;
    assert!((400..800).contains(&sampled.keys_compared), "{}", sampled.keys_compared);
    assert!((150..350).contains(&sampled.different), "{}", sampled.different);
    assert!((150..350).contains(&sampled.extra), "{}", sampled.extra);
    let mut keys = input;
    keys.mode = VerifyMode::Keys;
    let keys = report(keys).await;
    assert_eq!((keys.missing, keys.different, keys.extra), (1, 1, 1250));
    assert_eq!(keys.samples.len(), 100);
}

#[tokio::test]
async fn lost_connections_are_replaced() {
    let (source, mut near, target, mut far) = equal_pair().await;
    run(&mut far, "DEL string:5").await;
    run(&mut near, "SET string:6 changed").await;
    let mut input = input(&source, &target);
    let killers = Arc::new(tokio::sync::Mutex::new([near, far]));
    input.settle = Arc::new(move || {
        let killers = Arc::clone(&killers);
        Box::pin(async move {
            for killer in killers.lock().await.iter_mut() {
                run(killer, "CLIENT KILL TYPE normal SKIPME yes").await;
            }
        })
    });
    // Twice, as more would use up the attempts.
    let (progress, _) = watch::channel(VerifyProgress::default());
    let (_run, stop) = watch::channel(false);
    let once = Arc::clone(&input.settle);
    let killed = Arc::new(AtomicUsize::new(0));
    input.settle = Arc::new(move || {
        let first = killed.fetch_add(1, Ordering::Relaxed) < 2;
        if first { once() } else { Box::pin(async {}) }
    });
    let report = verify(input, progress, stop).await.unwrap();
    assert_eq!(found(&report), ["Different string:6: value", "Missing string:5: string"]);
}

#[tokio::test]
async fn stops_when_told() {
    let (source, mut near, target, _far) = equal_pair().await;
    run(&mut near, "SET new 1").await;
    let mut input = input(&source, &target);
    let (stopper, stop) = watch::channel(false);
    let stopper = Arc::new(stopper);
    input.settle = Arc::new(move || {
        stopper.send_replace(true);
        Box::pin(std::future::pending())
    });
    let (progress, _) = watch::channel(VerifyProgress::default());
    let result = tokio::time::timeout(Duration::from_secs(20), verify(input, progress, stop)).await;
    assert!(matches!(result.unwrap(), Err(VerifyError::Stopped)));
}

/// Three masters that share the slots evenly.
async fn cluster() -> Vec<Server> {
    let nodes: Vec<Server> = (0..3).map(|_| Server::start(&["--cluster-enabled", "yes"])).collect();
    for (node, slots) in nodes.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
        let mut connection = node.connect().await;
        run(&mut connection, &format!("CLUSTER ADDSLOTSRANGE {slots}")).await;
        run(&mut connection, &format!("CLUSTER MEET 127.0.0.1 {}", nodes[0].address.port)).await;
    }
    for node in &nodes {
        eventually("cluster up", || async {
            let info = node.connect().await.query_text(&[b"CLUSTER", b"INFO"]).await.unwrap();
            let known = info.contains("cluster_known_nodes:3") && info.contains("cluster_slots_ok:16384");
            (known && info.contains("cluster_state:ok")).then_some(())
        })
        .await;
    }
    nodes
}

#[tokio::test]
async fn cluster_targets_are_routed_and_redirected() {
    let source = Server::start(&[]);
    let nodes = cluster().await;
    let mut near = source.connect().await;
    let commands = commands_of_every_type();
    run_all(&mut near, &commands).await;
    let mut connections = Vec::new();
    for node in &nodes {
        connections.push(node.connect().await);
    }
    let owner = |key: &str| match crate::slot::slot(key.as_bytes()) {
        0..=5460 => 0,
        5461..=10922 => 1,
        _ => 2,
    };
    // By DUMP and RESTORE, so that times and ids are the same.
    let Reply::Array(Some(keys)) = run(&mut near, "KEYS *").await else { panic!("KEYS") };
    for key in &keys {
        let key = key.bytes().unwrap();
        let Reply::Bulk(Some(payload)) = near.query(&[b"DUMP", key]).await.unwrap() else { panic!("DUMP") };
        let Reply::Integer(at) = near.query(&[b"PEXPIRETIME", key]).await.unwrap() else { panic!() };
        let at = at.max(0).to_string();
        let node = &mut connections[owner(std::str::from_utf8(key).unwrap())];
        node.query(&[b"RESTORE", key, at.as_bytes(), &payload, b"ABSTTL"]).await.unwrap();
    }
    let mut input = input(&source, &nodes[0]);
    input.target = deployment(&nodes.iter().collect::<Vec<_>>());
    input.target.cluster = true;
    let shares = [0..=5460, 5461..=10922, 10923..=16383];
    for (node, slots) in input.target.nodes.iter_mut().zip(shares.clone()) {
        node.slots = vec![slots];
    }
    let equal = report(input.clone()).await;
    assert_eq!(found(&equal), [""; 0]);
    assert_eq!((equal.keys_compared, equal.rounds), (KEYS, 1));
    // What was known about the slots is wrong by now: every key is redirected.
    let mut stale = input.clone();
    for (node, slots) in stale.target.nodes.iter_mut().rev().zip(shares) {
        node.slots = vec![slots];
    }
    assert_eq!(found(&report(stale).await), [""; 0]);
    run(&mut connections[owner("string:7")], "DEL string:7").await;
    run(&mut connections[owner("extra")], "SET extra 1").await;
    run(&mut connections[owner("big:hash")], "HSET big:hash f7 other").await;
    input.chunk_above = 20_000;
    let planted =
        ["Different big:hash: value of an element", "Extra extra: string", "Missing string:7: string"];
    assert_eq!(found(&report(input.clone()).await), planted);
    // The other way round, the cluster as the source.
    std::mem::swap(&mut input.source, &mut input.target);
    let planted =
        ["Different big:hash: value of an element", "Extra string:7: string", "Missing extra: string"];
    assert_eq!(found(&report(input).await), planted);
}
