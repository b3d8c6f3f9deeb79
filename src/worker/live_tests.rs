//! A worker between real servers, disturbed.

use std::time::{Duration, Instant};

use super::*;
use crate::connection::test_server::{Server, eventually};
use crate::connection::{Connection, Dialer};
use crate::resp::{Reply, encode_command};
use crate::spool::{Origin, spool};
use crate::topology::server_info;
use crate::version::Flavor;

struct Pair {
    source: Server,
    target: Server,
    folder: tempfile::TempDir,
}

impl Pair {
    fn start() -> Self {
        let source = Server::start(&[
            "--repl-diskless-sync-delay",
            "0",
            "--repl-backlog-size",
            "64mb",
            "--enable-debug-command",
            "yes",
        ]);
        Self {
            source,
            target: Server::start(&["--enable-debug-command", "yes"]),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn setup(&self) -> WorkerSetup {
        let version = ServerVersion { flavor: Flavor::Redis, major: 7, minor: 0, patch: 15 };
        WorkerSetup {
            uid: "u".to_owned(),
            lineage: "0".to_owned(),
            siblings: Vec::new(),
            exactly_once: false,
            shard: "s".to_owned(),
            file_name: "s".to_owned(),
            feed: Feed::Replication(Upstream {
                address: self.source.address.clone(),
                shard: None,
                prefer_replica: false,
                dialer: Dialer::new(self.source.access(), "from"),
                psync_command: "PSYNC".to_owned(),
                allow_full_resync: true,
            }),
            dynamic: Arc::default(),
            target: TargetShape::Standalone(self.target.address.clone()),
            target_dialer: Dialer::new(self.target.access(), "to"),
            target_version: version,
            target_databases: None,
            existing_keys: ExistingKeys::Fail,
            database_map: BTreeMap::new(),
            transform: None,
            sole_source: true,
            slots: None,
            serves: None,
            lane: LaneLimits::new(64, 64 << 10),
            turns: crate::worker::turn::Turns::new(0, Default::default()),
            max_restore_bytes: 64 << 20,
            spool: SpoolSetup {
                memory: 1 << 20,
                disk: 1 << 30,
                retain: 0,
                folder: self.folder.path().to_path_buf(),
                volume: Default::default(),
                lasts: true,
            },
            max_quarantined: 0,
            resume: None,
            restarted: false,
            anew: false,
            own_keys: false,
        }
    }

    /// Until the target has what the source has now.
    async fn caught_up(&self, progress: &ShardProgress) {
        let dialer = Dialer::new(self.source.access(), "test");
        let offset = server_info(&dialer, &self.source.address).await.unwrap().offset;
        let mut numbers = progress.numbers.subscribe();
        let reached = numbers.wait_for(|numbers| numbers.stopped || numbers.applied_offset >= offset);
        let reached = tokio::time::timeout(Duration::from_secs(60), reached).await;
        assert!(!reached.expect("caught up within 60 s").unwrap().stopped, "the worker ended");
    }

    async fn same_data(&self) {
        let (mut from, mut to) = (self.source.connect().await, self.target.connect().await);
        let digest: [&[u8]; 2] = [b"DEBUG", b"DIGEST"];
        assert_eq!(from.query(&digest).await.unwrap(), to.query(&digest).await.unwrap());
    }
}

fn upstream(setup: &mut WorkerSetup) -> &mut Upstream {
    let Feed::Replication(upstream) = &mut setup.feed else { unreachable!() };
    upstream
}

/// Runs one script on a server.
async fn eval(connection: &mut Connection, script: &str) {
    connection.query(&[b"EVAL", script.as_bytes(), b"0"]).await.unwrap();
}

/// Ends the worker's connections to the target; true when there was one.
async fn cut(target: &mut Connection) -> bool {
    let list = target.query_text(&[b"CLIENT", b"LIST"]).await.unwrap();
    let lanes = list.lines().filter(|line| line.contains(" name=to "));
    let ids: Vec<&str> = lanes.filter_map(|line| line.strip_prefix("id=")?.split(' ').next()).collect();
    for id in &ids {
        let _ = target.call(&[b"CLIENT", b"KILL", b"ID", id.as_bytes()]).await.unwrap();
    }
    !ids.is_empty()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_lanes_lose_nothing_from_the_snapshot_to_the_stream() {
    let pair = Pair::start();
    let mut source = pair.source.connect().await;
    eval(&mut source, "for i=1,40000 do redis.call('SET', 'k'..i, string.rep('x', 100)) end").await;
    let progress = ShardProgress::new();
    let (drain, asked) = watch::channel(false);
    let worker = tokio::spawn(run(pair.setup(), Arc::clone(&progress), asked));
    let mut target = pair.target.connect().await;
    let (mut cuts, mut round, began) = (0, 0, std::time::Instant::now());
    // Overwrites what the snapshot holds: a replay of it must not win.
    while round < 60 || cuts <= 5 {
        let script = format!("for i=1,2000 do redis.call('SET', 'k'..i, '{round}') end");
        eval(&mut source, &script).await;
        cuts += usize::from(cut(&mut target).await);
        round += 1;
        assert!(began.elapsed() < Duration::from_secs(60), "only {cuts} connections were cut");
    }
    pair.caught_up(&progress).await;
    pair.same_data().await;
    assert!(progress.numbers.borrow().target_reconnects > 0);
    drain.send_replace(true);
    let stopped = tokio::time::timeout(Duration::from_secs(10), worker).await.unwrap().unwrap().unwrap();
    assert!(stopped.checkpoint.is_some());
}

/// Between the snapshot's last mark and the stream's first, a lost lane goes back into the snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_replayed_does_not_win_over_the_stream() {
    let pair = Pair::start();
    let setup = pair.setup();
    // One command at a time, so that there is time to cut in.
    setup.lane.set(1, 64 << 10);
    let folder = pair.folder.path().join("spool");
    let (mut writer, reader) =
        spool(SpoolLimits { memory: 1 << 20, disk: 0, retain: 0, folder, volume: Default::default() });
    let mut rdb = b"REDIS0009\xfe\x00".to_vec();
    let mut stream = Vec::new();
    encode_command(&["SELECT", "0"], &mut stream);
    for digit in b'0'..=b'9' {
        rdb.extend_from_slice(&[0, 2, b'k', digit, 3, b'o', b'l', b'd']);
        encode_command(&["SET", &format!("k{}", char::from(digit)), "new"], &mut stream);
    }
    rdb.extend_from_slice(b"\xff\0\0\0\0\0\0\0\0");
    for number in 0..5000 {
        encode_command(&["SET", "p", &number.to_string()], &mut stream);
    }
    // All is there from the start, and too little for a mark on the way.
    assert!(rdb.len() + stream.len() < 250 << 10);
    writer.begin(Origin { replication_id: "a".repeat(40), offset: 100 }, true);
    writer.append(&rdb, 1).await.unwrap();
    writer.start_stream();
    writer.append(&stream, 1).await.unwrap();

    let progress = ShardProgress::new();
    let (acknowledge, _acknowledged) = watch::channel(Acknowledged::default());
    let mut applier = Applier::new(setup, Router::Single, reader, acknowledge, Arc::clone(&progress), None);
    let (_drain, asked) = watch::channel(false);
    let applying = tokio::spawn(async move { applier.run(asked).await });
    let mut target = pair.target.connect().await;
    let began = Instant::now();
    while target.query(&[b"GET", b"p"]).await.unwrap().bytes().is_none() {
        assert!(began.elapsed() < Duration::from_secs(30) && !applying.is_finished());
    }
    assert!(cut(&mut target).await);
    let all = 100 + stream.len() as i64;
    let mut numbers = progress.numbers.subscribe();
    let reached = numbers.wait_for(|numbers| numbers.applied_offset >= all);
    let reached = tokio::time::timeout(Duration::from_secs(60), reached).await.unwrap().unwrap().clone();
    assert_eq!((reached.target_reconnects, reached.quarantined), (1, 0));
    let keys: [&[u8]; 4] = [b"MGET", b"k0", b"k9", b"p"];
    let Reply::Array(Some(values)) = target.query(&keys).await.unwrap() else { panic!("not an array") };
    let values: Vec<&[u8]> = values.iter().filter_map(|value| value.bytes().map(AsRef::as_ref)).collect();
    assert_eq!(values, [&b"new"[..], b"new", b"4999"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_outlives_a_run_that_cannot_begin_and_one_that_fails() {
    let pair = Pair::start();
    let checkpoint = Checkpoint { replication_id: "f".repeat(40), offset: 77, db: 3 };
    let progress = ShardProgress::new();
    let mut nowhere = pair.setup();
    upstream(&mut nowhere).address = crate::connection::Address::new("127.0.0.1", 1);
    nowhere.resume = Some(checkpoint.clone());
    let (drain, asked) = watch::channel(false);
    let worker = tokio::spawn(run(nowhere, Arc::clone(&progress), asked));
    eventually("a failed attempt", || async { (progress.link.borrow().attempts > 0).then_some(()) }).await;
    drain.send_replace(true);
    let stopped = tokio::time::timeout(Duration::from_secs(10), worker).await.unwrap().unwrap().unwrap();
    assert_eq!(stopped.checkpoint, Some(checkpoint.clone()));

    let mut forbidden = pair.setup();
    forbidden.resume = Some(checkpoint.clone());
    upstream(&mut forbidden).allow_full_resync = false;
    let (_drain, asked) = watch::channel(false);
    let ended = run(forbidden, ShardProgress::new(), asked);
    let failed = tokio::time::timeout(Duration::from_secs(30), ended).await.unwrap().unwrap_err();
    assert!(matches!(failed.error, WorkerError::Source(ReplicationError::FullResyncForbidden { .. })));
    assert_eq!(failed.left.checkpoint, Some(checkpoint));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_on_from_the_checkpoint_of_a_source_that_was_promoted() {
    let pair = Pair::start();
    let promoted = Server::start(&[]);
    let port = pair.source.address.port.to_string();
    let mut replica = promoted.connect().await;
    replica.query(&[b"REPLICAOF", b"127.0.0.1", port.as_bytes()]).await.unwrap();
    eventually("the replica is linked", || async {
        let text = promoted.connect().await.query_text(&[b"INFO", b"replication"]).await.ok()?;
        text.contains("master_link_status:up").then_some(())
    })
    .await;
    let mut source = pair.source.connect().await;
    eval(&mut source, "for i=1,100 do redis.call('INCR', 'n') end").await;
    let progress = ShardProgress::new();
    let (drain, asked) = watch::channel(false);
    let worker = tokio::spawn(run(pair.setup(), Arc::clone(&progress), asked));
    pair.caught_up(&progress).await;
    drain.send_replace(true);
    let checkpoint = worker.await.unwrap().unwrap().checkpoint.unwrap();

    eval(&mut source, "for i=1,100 do redis.call('INCR', 'n') end").await;
    let Reply::Integer(1) = source.query(&[b"WAIT", b"1", b"5000"]).await.unwrap() else {
        panic!("no replica")
    };
    replica.query(&[b"REPLICAOF", b"NO", b"ONE"]).await.unwrap();
    let mut setup = pair.setup();
    upstream(&mut setup).address = promoted.address.clone();
    upstream(&mut setup).dialer = Dialer::new(promoted.access(), "from");
    upstream(&mut setup).allow_full_resync = false;
    setup.resume = Some(checkpoint.clone());
    let progress = ShardProgress::new();
    let (drain, asked) = watch::channel(false);
    let worker = tokio::spawn(run(setup, Arc::clone(&progress), asked));
    replica.query(&[b"INCR", b"n"]).await.unwrap();
    eventually("the last write", || async {
        assert!(!progress.numbers.borrow().stopped, "the worker ended");
        let n = pair.target.connect().await.query(&[b"GET", b"n"]).await.ok()?;
        (n.bytes()?.as_ref() == b"201").then_some(())
    })
    .await;
    drain.send_replace(true);
    let stopped = worker.await.unwrap().unwrap().checkpoint.unwrap();
    assert_ne!(stopped.replication_id, checkpoint.replication_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_that_change_hold_at_once() {
    let pair = Pair::start();
    let mut source = pair.source.connect().await;
    eval(&mut source, "for i=1,9000 do redis.call('SET', 'k'..i, 'v') end").await;
    let mut setup = pair.setup();
    let (lane, turns) = (setup.lane.clone(), setup.turns.clone());
    turns.set(1, Default::default());
    let Upstream { dialer, address, .. } = upstream(&mut setup).clone();
    let _other = turns.begin(&dialer, &address, |_| {}).await;
    lane.pace().set(0, 100);
    let progress = ShardProgress::new();
    let (drain, asked) = watch::channel(false);
    let worker = tokio::spawn(run(setup, Arc::clone(&progress), asked));
    let mut numbers = progress.numbers.subscribe();
    let mut seen = async |what: fn(&Numbers) -> bool| {
        let seen = tokio::time::timeout(Duration::from_secs(60), numbers.wait_for(what)).await;
        assert!(seen.expect("within 60 s").is_ok());
    };
    seen(|numbers| numbers.waiting.contains("parallelShards")).await;
    turns.set(2, Default::default());
    // At this rate the rest takes a minute and a half.
    seen(|numbers| numbers.keys > 0).await;
    assert!(progress.numbers.borrow().keys < 2000);
    lane.pace().set(0, 0);
    seen(|numbers| numbers.phase == ShardPhase::IncrementalSync).await;
    pair.same_data().await;
    drain.send_replace(true);
    worker.await.unwrap().unwrap();
}

/// One that was frozen begins again, as after an error, and finds that a later process has taken over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_begins_again_takes_nothing_back() {
    let pair = Pair::start();
    let mut source = pair.source.connect().await;
    eval(&mut source, "for i=1,100 do redis.call('INCR', 'n') end").await;
    let (ours, theirs) = (ShardProgress::new(), ShardProgress::new());
    let setup = || WorkerSetup { exactly_once: true, restarted: true, ..pair.setup() };
    let work = async |progress: &Arc<ShardProgress>| {
        let (drain, asked) = watch::channel(false);
        progress.numbers.send_replace(Numbers::default());
        let mut worker = tokio::spawn(run(setup(), Arc::clone(progress), asked));
        let mut numbers = progress.numbers.subscribe();
        let streams = numbers.wait_for(|numbers| numbers.phase == ShardPhase::IncrementalSync);
        tokio::select! {
            streams = tokio::time::timeout(Duration::from_secs(60), streams) => {
                assert!(streams.expect("in sync within 60 s").is_ok());
            }
            ended = &mut worker => return ended.unwrap(),
        }
        drain.send_replace(true);
        worker.await.unwrap()
    };
    // Its own it takes again and again.
    work(&ours).await.unwrap();
    work(&ours).await.unwrap();
    work(&theirs).await.unwrap();
    let refused = work(&ours).await.unwrap_err();
    assert!(matches!(refused.error, WorkerError::Fenced(_)), "{:?}", refused.error);
    work(&theirs).await.unwrap();
    let n = pair.target.connect().await.query(&[b"GET", b"n"]).await.unwrap();
    assert_eq!(n, Reply::Bulk(Some(b"100".as_slice().into())));
}
