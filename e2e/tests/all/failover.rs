//! The source changes under the migration: failovers behind Sentinels and in a cluster, promoted replicas
//! that lack something, links that fall silent or are slow.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::scenario::{PATIENCE, stop};
use e2e::{
    Client, Cluster, Endpoint, Manifest, Options, Proxy, Sentinels, Server, Tool, Version, args, wait_until,
};
use serde_json::Value;

const VERSION: Version = Version::REDIS_7_0;

/// A backlog that reaches back far enough, and no PING that only one of master and replica has.
fn quiet() -> Options {
    Options::new(VERSION).with("repl-backlog-size", "16mb").with("repl-ping-replica-period", "3600")
}

/// Commands that count double when they are repeated, from a client that finds the master again.
struct Counting {
    endpoint: Arc<Mutex<Endpoint>>,
    held: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    idle: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Counting {
    fn start(endpoint: Endpoint) -> Self {
        let mut counting = Self {
            endpoint: Arc::new(Mutex::new(endpoint)),
            held: Arc::default(),
            stop: Arc::default(),
            rounds: Arc::default(),
            idle: Arc::default(),
            thread: None,
        };
        let (endpoint, held, stop) =
            (Arc::clone(&counting.endpoint), Arc::clone(&counting.held), Arc::clone(&counting.stop));
        let (rounds, idle) = (Arc::clone(&counting.rounds), Arc::clone(&counting.idle));
        counting.thread = Some(thread::spawn(move || {
            while !stop.load(SeqCst) {
                let at = endpoint.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let Ok(mut client) = Client::open(&at) else {
                    thread::sleep(Duration::from_millis(20));
                    continue;
                };
                while !stop.load(SeqCst) {
                    if held.load(SeqCst) {
                        idle.fetch_add(1, SeqCst);
                        thread::sleep(Duration::from_millis(2));
                        // What is held back begins with a new connection.
                        if !held.load(SeqCst) {
                            break;
                        }
                        continue;
                    }
                    if round(&mut client, rounds.load(SeqCst)).is_err() {
                        break;
                    }
                    rounds.fetch_add(1, SeqCst);
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }));
        counting
    }

    fn wait_more(&self, count: u64) -> Result<()> {
        let wanted = self.rounds.load(SeqCst) + count;
        wait_until("more commands", PATIENCE, || Ok((self.rounds.load(SeqCst) >= wanted).then_some(())))
    }

    /// Nothing is under way when it returns.
    fn hold(&self) -> Result<()> {
        self.held.store(true, SeqCst);
        let seen = self.idle.load(SeqCst);
        wait_until("a writer that rests", PATIENCE, || Ok((self.idle.load(SeqCst) > seen + 1).then_some(())))
    }

    fn go_on(&self, endpoint: Endpoint) {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = endpoint;
        self.held.store(false, SeqCst);
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn round(client: &mut Client, round: u64) -> Result<()> {
    let tag = round % 50;
    let (count, list) = (format!("count:{{{tag}}}"), format!("list:{{{tag}}}"));
    client.on(count.as_bytes())?.run(args!["INCR", count])?;
    client.on(list.as_bytes())?.run(args!["RPUSH", list, round.to_string()])?;
    Ok(())
}

fn field(server: &Server, section: &str, name: &str) -> Result<i64> {
    Ok(server.conn()?.info(section, name)?.context("no such field")?.parse()?)
}

/// The replica has all that its master wrote.
fn level(master: &Server, replica: &Server) -> Result<()> {
    wait_until("a replica that has everything", PATIENCE, || {
        let offset = |server| field(server, "replication", "master_repl_offset");
        Ok((offset(master)? == offset(replica)?).then_some(()))
    })
}

fn resumes(status: &Value) -> i64 {
    status["replication"]["resumes"].as_i64().unwrap_or(0)
}

fn full_resyncs(status: &Value) -> i64 {
    status["replication"]["fullResyncs"].as_i64().unwrap_or(0)
}

fn reason(status: &Value, kind: &str) -> Option<(String, String)> {
    let conditions = status["conditions"].as_array()?;
    let condition = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |name: &str| condition[name].as_str().unwrap_or_default().to_owned();
    Some((text("reason"), text("message")))
}

/// The old master stays a master, unharmed and linked, for seconds: only the Sentinels tell.
#[test]
fn sentinels_promote_a_replica() -> Result<()> {
    let master = quiet().start()?;
    let replica = master.replica_with(quiet())?;
    let target = Server::start(VERSION)?;
    let sentinels = Sentinels::start(VERSION, 1, "main", &master, 1)?;
    let load = Counting::start(master.endpoint());
    load.wait_more(200)?;
    let manifest = Manifest::between(&master.endpoint(), &target.endpoint()).sentinel("source", &sentinels);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    load.wait_more(200)?;

    load.hold()?;
    // Also what Sentinels publish: the promoted server would not have it.
    master.conn()?.run(args!["CLIENT", "PAUSE", "60000", "WRITE"])?;
    level(&master, &replica)?;
    let syncs = field(&replica, "stats", "sync_full")?;
    sentinels.fail_over()?;
    load.go_on(replica.endpoint());
    let status = tool.wait_for("a resumption", PATIENCE, |status| resumes(status) >= 1)?;
    load.wait_more(300)?;
    load.hold()?;
    wait_equal(&replica.endpoint(), &target.endpoint(), PATIENCE)?;
    ensure!(full_resyncs(&status) == 0, "{status}");
    ensure!(field(&replica, "stats", "sync_full")? == syncs, "the new master sent everything");
    ensure!(status["shards"][0]["id"] == "main", "{status}");
    stop(tool).map(drop)
}

/// Masters of a cluster are handed over and die; the shards keep their ids, also in a second run.
#[test]
fn cluster_masters_fail_over() -> Result<()> {
    let mut source = Cluster::start_with(quiet(), 3, 1)?;
    let target = Server::start(VERSION)?;
    for node in &source.nodes {
        node.conn()?.run(args!["CONFIG", "SET", "cluster-node-timeout", "1500"])?;
    }
    let load = Counting::start(source.endpoint());
    load.wait_more(200)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let addresses: Vec<String> = source.nodes.iter().map(Server::address).collect();
    // The first node is one of those that change.
    let manifest = manifest.set("/spec/source/redis/endpoints", addresses[1..3].to_vec());
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    let ids = |status: &Value| -> Vec<String> {
        let shards = status["shards"].as_array().cloned().unwrap_or_default();
        shards.iter().map(|shard| shard["id"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let first = ids(&tool.wait_condition("InSync", PATIENCE)?);
    ensure!(first == addresses[..3], "{first:?}");

    source.nodes[3].conn()?.run(args!["CLUSTER", "FAILOVER"])?;
    tool.wait_for("the first resumption", PATIENCE, |status| resumes(status) >= 1)?;
    wait_until("a writer that found the new master", PATIENCE, || {
        let role = source.nodes[0].conn()?.info("replication", "role")?;
        Ok((role.as_deref() == Some("slave")).then_some(()))
    })?;
    load.wait_more(200)?;

    load.hold()?;
    level(&source.nodes[1], &source.nodes[4])?;
    source.nodes[1].kill();
    tool.wait_for("the second resumption", PATIENCE, |status| resumes(status) >= 2)?;
    let mut endpoint = source.nodes[2].endpoint();
    endpoint.cluster = true;
    let served = wait_until("a complete cluster", PATIENCE, || {
        let info = source.nodes[2].conn()?.text(args!["CLUSTER", "INFO"])?;
        Ok(info.contains("cluster_state:ok").then_some(()))
    });
    served?;
    load.go_on(endpoint.clone());
    load.wait_more(200)?;
    load.hold()?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    let status = tool.status().context("no status")?;
    ensure!(full_resyncs(&status) == 0, "{status}");
    ensure!(ids(&status) == first, "{status}");
    stop(tool)?;

    let tool =
        Tool::run_in(folder, &manifest.set("/spec/source/redis/endpoints", vec![addresses[2].clone()]), &[])?;
    let status = tool.wait_condition("InSync", PATIENCE)?;
    ensure!(ids(&status) == first && full_resyncs(&status) == 0, "{status}");

    // A slot that begins to move between the shards is named.
    let to = source.nodes[2].conn()?.text(args!["CLUSTER", "MYID"])?;
    source.nodes[3].conn()?.run(args!["CLUSTER", "SETSLOT", "7", "MIGRATING", to])?;
    let status = tool.wait_for("the slot that moves", PATIENCE, |status| {
        reason(status, "Degraded").is_some_and(|(reason, _)| reason == "SlotsMoved")
    })?;
    let (_, message) = reason(&status, "Degraded").context("no reason")?;
    ensure!(message.contains(&format!("slots 7 of shard {}", first[0])), "{message}");
    stop(tool).map(drop)
}

/// The replica that is read from dies: another one, or else the master, goes on.
#[test]
fn replica_that_is_read_from_dies() -> Result<()> {
    let master = quiet().start()?;
    let mut replicas = vec![master.replica_with(quiet())?, master.replica_with(quiet())?];
    let target = Server::start(VERSION)?;
    let load = Counting::start(master.endpoint());
    let manifest = Manifest::between(&master.endpoint(), &target.endpoint())
        .set("/spec/source/redis/readFrom", "PreferReplica");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    for resumption in 1..=2 {
        load.wait_more(100)?;
        // Nobody is ahead of another.
        load.hold()?;
        for replica in &replicas {
            level(&master, replica)?;
        }
        let read = wait_until("the replica that is read from", PATIENCE, || {
            for (index, replica) in replicas.iter().enumerate() {
                if field(replica, "replication", "connected_slaves")? == 1 {
                    return Ok(Some(index));
                }
            }
            Ok(None)
        })?;
        drop(replicas.swap_remove(read));
        tool.wait_for("a resumption", PATIENCE, |status| resumes(status) >= resumption)?;
        load.go_on(master.endpoint());
    }
    load.wait_more(100)?;
    load.hold()?;
    wait_equal(&master.endpoint(), &target.endpoint(), PATIENCE)?;
    let status = tool.status().context("no status")?;
    ensure!(full_resyncs(&status) == 0, "{status}");
    stop(tool).map(drop)
}

/// It never got the last write, which the target has: everything is sent again, and the reason is told.
/// Where that is not wanted, the run ends.
#[test]
fn promoted_replica_lacks_what_was_applied() -> Result<()> {
    let mut master = quiet().start()?;
    let to_master = Proxy::start(&master.address())?;
    let (host, port) =
        to_master.address().split_once(':').map(|(h, p)| (h.to_owned(), p.to_owned())).context("proxy")?;
    let replica = quiet().with("replicaof", &format!("{host} {port}")).start()?;
    replica.wait_linked()?;
    let (allowed, forbidden) = (Server::start(VERSION)?, Server::start(VERSION)?);
    master.conn()?.run(args!["SET", "first", "1"])?;
    let manifest = |target: &Server| {
        Manifest::between(&master.endpoint(), &target.endpoint())
            .set("/spec/source/redis/topology", "Standalone")
            .set("/spec/source/redis/endpoints", vec![master.address(), replica.address()])
    };
    let allows = Tool::run(&manifest(&allowed), &[])?;
    let forbids = Tool::run(
        &manifest(&forbidden).set("/spec/failurePolicy", serde_json::json!({"onFullResync": "Fail"})),
        &[],
    )?;
    allows.wait_condition("InSync", PATIENCE)?;
    forbids.wait_condition("InSync", PATIENCE)?;

    // A master begins to stream to a new replica up to a second after its snapshot.
    level(&master, &replica)?;
    to_master.stall(true);
    master.conn()?.run(args!["SET", "lost", "1"])?;
    for target in [&allowed, &forbidden] {
        wait_until("the write that will be lost", PATIENCE, || {
            Ok((target.conn()?.number(args!["EXISTS", "lost"])? == 1).then_some(()))
        })?;
    }
    replica.conn()?.run(args!["REPLICAOF", "NO", "ONE"])?;
    master.kill();

    let finished = forbids.expect_exit(1, PATIENCE)?;
    let (why, message) = reason(&finished.status()?, "Succeeded").context("no outcome")?;
    ensure!(why == "FullResyncForced", "{why}");
    ensure!(
        message.contains("does not have what was received") && message.contains("onFullResync"),
        "{message}"
    );
    let status = allows.wait_for("an announced full resync", PATIENCE, |status| {
        full_resyncs(status) == 1 && reason(status, "Degraded").is_some()
    })?;
    let (why, message) = reason(&status, "Degraded").context("no reason")?;
    ensure!(
        why == "FullResyncForced" && message.contains("does not have what was received"),
        "{why}: {message}"
    );
    replica.conn()?.run(args!["SET", "lost", "2"])?;
    wait_equal(&replica.endpoint(), &allowed.endpoint(), PATIENCE)?;
    stop(allows).map(drop)
}

/// Connections that stay open and say nothing, as those of a host that froze.
#[test]
fn silent_link_is_noticed() -> Result<()> {
    let options = Options::new(VERSION).with("repl-timeout", "3").with("repl-ping-replica-period", "1");
    let (source, target) = (options.start()?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/verification/mode", "Off")
        .set("/spec/source/redis/topology", "Standalone");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["SET", "before", "1"])?;
    signal(&source, "-STOP")?;
    let began = Instant::now();
    tool.wait_for("a link that is called half-open", PATIENCE, |status| {
        status["shards"][0]["lastError"].as_str().is_some_and(|error| error.contains("half-open"))
    })?;
    let took = began.elapsed();
    signal(&source, "-CONT")?;
    ensure!(took > Duration::from_secs(3) && took < Duration::from_secs(20), "after {took:?}");
    source.conn()?.run(args!["SET", "behind", "1"])?;
    tool.wait_for("a resumption", PATIENCE, |status| resumes(status) >= 1)?;
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

pub fn signal(server: &Server, name: &str) -> Result<()> {
    let pid = server.pid().context("not running")?.to_string();
    let status = std::process::Command::new("kill").args([name, &pid]).status()?;
    ensure!(status.success(), "no process to signal");
    Ok(())
}

/// Slower than the silence that is allowed, were it not for the bytes that trickle in.
#[test]
fn slow_link_is_not_taken_for_dead() -> Result<()> {
    let options = Options::new(VERSION).with("repl-timeout", "3").with("repl-ping-replica-period", "1");
    let (source, target) = (options.start()?, Server::start(VERSION)?);
    let mut conn = source.conn()?;
    let noise = |seed: u64| -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..1000).map(next).collect()
    };
    for number in 0..40 {
        conn.run(args!["SET", format!("key:{number}"), noise(number)])?;
    }
    let slow = slow_replication(&source.address(), 5_000)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/topology", "Standalone")
        .set("/spec/source/redis/endpoints", vec![slow]);
    let began = Instant::now();
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("FullSynced", PATIENCE)?;
    ensure!(began.elapsed() > Duration::from_secs(7), "the link was not slow: {:?}", began.elapsed());
    for number in 100..130 {
        conn.run(args!["SET", format!("key:{number}"), noise(number)])?;
    }
    wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    let status = tool.status().context("no status")?;
    ensure!((resumes(&status), full_resyncs(&status)) == (0, 0), "{status}");
    ensure!(field(&source, "stats", "sync_full")? == 1, "more than one full sync");
    stop(tool).map(drop)
}

/// A proxy that lets a connection on which REPLCONF was sent receive only so many bytes a second. Its threads
/// end with their connections, and with the process.
fn slow_replication(upstream: &str, bytes_per_second: u64) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let upstream = upstream.to_owned();
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let Ok(far) = TcpStream::connect(&upstream) else { continue };
            let (Ok(near_copy), Ok(far_copy)) = (near.try_clone(), far.try_clone()) else { continue };
            let slow = Arc::new(AtomicBool::new(false));
            let sniffed = Arc::clone(&slow);
            thread::spawn(move || {
                pump(near, far, |bytes| {
                    if bytes.windows(8).any(|word| word == b"REPLCONF") {
                        sniffed.store(true, SeqCst);
                    }
                    0
                });
            });
            thread::spawn(move || {
                pump(far_copy, near_copy, |_| if slow.load(SeqCst) { bytes_per_second } else { 0 });
            });
        }
    });
    Ok(address)
}

/// Copies at the rate that `look` gives for what was read; 0: as it comes.
fn pump(mut from: TcpStream, mut to: TcpStream, mut look: impl FnMut(&[u8]) -> u64) {
    let mut buffer = vec![0; 4096];
    'copy: while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        let rate = look(bytes);
        for piece in bytes.chunks(if rate > 0 { 256 } else { count }) {
            if let Some(millis) = (piece.len() as u64 * 1000).checked_div(rate) {
                thread::sleep(Duration::from_millis(millis));
            }
            if to.write_all(piece).is_err() {
                break 'copy;
            }
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
