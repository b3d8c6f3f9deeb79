//! Against real servers.

use super::*;
use crate::connection::test_server::{Server, eventually};
use crate::connection::{Connection, Dialer};
use crate::resp::Reply;
use crate::version::{Flavor, ServerVersion};

mod content;
mod shapes;
mod traffic;

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
        copied: None,
        include: None,
        script: None,
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
