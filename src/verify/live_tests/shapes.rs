//! Databases, modes, clusters.

use super::*;

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
