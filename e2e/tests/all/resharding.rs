//! Slots move between the shards of the source while it is written to, as redis-cli moves them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::chaos::{Shards, SlotMove};
use e2e::client::slot;
use e2e::compare::wait_equal;
use e2e::scenario::{PATIENCE, stop};
use e2e::{
    Batch, Client, Cluster, Conn, Endpoint, Manifest, Options, Server, Tool, Version, args, wait_until,
};
use redis::Value as Reply;
use serde_json::Value;

const VERSION: Version = Version::REDIS_7_0;
/// Hash tags that are written to.
const TAGS: u64 = 12;

fn options(version: Version) -> Options {
    Options::new(version).with("repl-backlog-size", "16mb")
}

/// Writes commands that show when they are lost or repeated, and follows MOVED and ASK as clients do.
struct Roaming {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    /// Why it ended before it was told to.
    failed: Arc<Mutex<String>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Roaming {
    fn start(endpoint: Endpoint) -> Self {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let failed = Arc::<Mutex<String>>::default();
        let told = Arc::clone(&failed);
        let write = move || -> Result<()> {
            let mut client = Client::open(&endpoint)?;
            let mut others = HashMap::new();
            while !stopping.load(SeqCst) {
                let round = counted.load(SeqCst);
                for words in commands(round) {
                    send(&endpoint, &mut client, &mut others, &words)?;
                }
                counted.fetch_add(1, SeqCst);
            }
            Ok(())
        };
        let thread = thread::spawn(move || {
            write().inspect_err(|error| {
                *told.lock().unwrap_or_else(PoisonError::into_inner) = format!("{error:#}");
            })
        });
        Self { stop, rounds, failed, thread: Some(thread) }
    }

    fn wait_more(&self, count: u64) -> Result<()> {
        let wanted = self.rounds.load(SeqCst) + count;
        wait_until("more commands", PATIENCE, || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            ensure!(
                !ended,
                "the writer ended: {}",
                self.failed.lock().unwrap_or_else(PoisonError::into_inner)
            );
            Ok((self.rounds.load(SeqCst) >= wanted).then_some(()))
        })
    }

    fn finish(mut self) -> Result<()> {
        self.stop.store(true, SeqCst);
        let thread = self.thread.take().context("stopped twice")?;
        thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }
}

impl Drop for Roaming {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keys come, grow, expire and go, in every slot in turn.
fn commands(round: u64) -> Vec<Vec<String>> {
    let tag = round % TAGS;
    let number = round / TAGS % 9;
    let key = |kind: &str| format!("{kind}:{{{tag}}}:{number}");
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let mut found = vec![
        words(&["INCR", &format!("count:{{{tag}}}")]),
        words(&["RPUSH", &key("list"), &round.to_string()]),
        words(&["SADD", &key("set"), &round.to_string()]),
        words(&["APPEND", &key("text"), "x"]),
    ];
    if round.is_multiple_of(7) {
        found.push(words(&["DEL", &key("list")]));
    }
    if round.is_multiple_of(11) {
        found.push(words(&["SPOP", &key("set")]));
        found.push(words(&["PEXPIRE", &key("text"), "3600000"]));
    }
    found
}

fn send(
    endpoint: &Endpoint,
    client: &mut Client,
    others: &mut HashMap<String, Conn>,
    words: &[String],
) -> Result<()> {
    let words: Vec<&[u8]> = words.iter().map(String::as_bytes).collect();
    let key = words.get(1).copied().unwrap_or_default();
    let mut batch = Batch::default();
    batch.add(&words);
    let begun = Instant::now();
    loop {
        let reply = client.on(key)?.pipeline(&batch)?.pop().context("no reply")?;
        let Reply::ServerError(error) = reply else { return Ok(()) };
        let key = key.escape_ascii();
        ensure!(begun.elapsed() < PATIENCE, "no node takes {key}: {error:?}");
        match error.code() {
            "ASK" => {
                let address =
                    error.details().and_then(|text| text.split(' ').nth(1)).context("ASK where?")?;
                let conn = match others.remove(address) {
                    Some(conn) => conn,
                    None => Conn::open(address, None)?,
                };
                let conn = others.entry(address.to_owned()).or_insert(conn);
                let mut asking = Batch::default();
                asking.add(&[b"ASKING"]);
                asking.add(&words);
                match conn.pipeline(&asking)?.pop().context("no reply")? {
                    Reply::ServerError(_) => {}
                    _ => return Ok(()),
                }
            }
            "MOVED" | "TRYAGAIN" => *client = Client::open(endpoint)?,
            _ => anyhow::bail!("{error:?}"),
        }
        // As clients do: the servers have to agree first.
        thread::sleep(Duration::from_millis(1));
    }
}

fn full_resyncs(status: &Value) -> i64 {
    status["replication"]["fullResyncs"].as_i64().unwrap_or(-1)
}

fn degraded(status: &Value) -> Option<&str> {
    let conditions = status["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "Degraded")?["reason"].as_str()
}

/// Slots of the load, each by its tag.
fn slots(tags: std::ops::Range<u64>) -> Vec<u16> {
    tags.map(|tag| slot(tag.to_string().as_bytes())).collect()
}

/// Moves slots key by key while the load goes on; `between`: when half of the keys have gone.
fn move_slots(
    shards: &Shards,
    load: &Roaming,
    slots: &[u16],
    pick: u64,
    between: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let moves: Vec<SlotMove> =
        slots.iter().map(|&slot| SlotMove::begin(shards, slot, pick)).collect::<Result<_>>()?;
    for moved in &moves {
        moved.advance(shards, 10)?;
    }
    load.wait_more(100)?;
    between()?;
    for moved in &moves {
        moved.advance(shards, 3)?;
        load.wait_more(20)?;
        ensure!(moved.finish(shards)?, "the cluster failed over by itself");
    }
    load.wait_more(100)
}

fn at_rest(tool: &Tool) -> Result<Value> {
    tool.wait_for("slots that are followed where they are", PATIENCE, |status| degraded(status).is_none())
}

fn during_the_stream(version: Version, target: &Endpoint, source: Cluster) -> Result<()> {
    let shards = Shards { cluster: source };
    let endpoint = shards.cluster.endpoint();
    let load = Roaming::start(endpoint.clone());
    load.wait_more(300)?;
    let manifest = Manifest::between(&endpoint, target);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let folder = Arc::clone(&tool.folder);
    let named = || {
        let named = |status: &Value| degraded(status) == Some("SlotsMoved");
        tool.wait_for("slots that move to be named", PATIENCE, named).map(drop)
    };
    move_slots(&shards, &load, &slots(0..5), 0, named)?;
    at_rest(&tool)?;
    load.wait_more(200)?;
    // Some move on, some back.
    move_slots(&shards, &load, &slots(0..3), 1, || Ok(()))?;
    move_slots(&shards, &load, &slots(2..8), 0, || Ok(()))?;
    load.wait_more(100)?;
    load.finish()?;
    wait_equal(&endpoint, target, PATIENCE).with_context(|| version.to_string())?;
    let status = at_rest(&tool)?;
    ensure!(full_resyncs(&status) == 0 && status["quarantine"]["commands"] == 0, "{status}");
    stop(tool)?;

    // What was taken over is known to the next run, and there can be a cutover.
    let cutover = manifest
        .set("/spec/cutover/mode", "Automatic")
        .set("/spec/cutover/pauseSourceWrites", version.has(6, 2))
        .set("/spec/verification/mode", "Full");
    let finished = Tool::run_in(folder, &cutover, &[])?.expect_exit(0, PATIENCE)?;
    ensure!(full_resyncs(&finished.status()?) == 0, "{}", finished.status()?);
    wait_equal(&endpoint, target, PATIENCE).map(drop)
}

#[test]
fn slots_that_move_during_the_stream_to_a_server() -> Result<()> {
    let target = Server::start(VERSION)?;
    during_the_stream(VERSION, &target.endpoint(), Cluster::start_with(options(VERSION), 3, 0)?)
}

#[test]
fn slots_that_move_during_the_stream_to_a_cluster() -> Result<()> {
    let target = Cluster::start(VERSION, 3, 0)?;
    during_the_stream(VERSION, &target.endpoint(), Cluster::start_with(options(VERSION), 3, 0)?)
}

/// Each version tells its offset in a transaction in its own way.
#[test]
fn slots_that_move_on_sources_of_several_versions() -> Result<()> {
    for version in [Version::REDIS_3_2, Version::REDIS_5_0, Version::REDIS_6_2, Version::VALKEY_9_1] {
        let target = Server::start(Version::VALKEY_9_1)?;
        during_the_stream(version, &target.endpoint(), Cluster::start_with(options(version), 2, 0)?)?;
    }
    Ok(())
}

/// They go while the snapshots are being sent: what one shard's snapshot lacks, another's may not have yet.
#[test]
fn slots_that_move_during_the_full_sync() -> Result<()> {
    let (target, shards) = (Server::start(VERSION)?, Cluster::start_with(options(VERSION), 3, 0)?);
    let shards = Shards { cluster: shards };
    let endpoint = shards.cluster.endpoint();
    let load = Roaming::start(endpoint.clone());
    load.wait_more(500)?;
    for node in &shards.cluster.nodes {
        node.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "20000"])?;
    }
    let tool = Tool::run(&Manifest::between(&endpoint, &target.endpoint()), &[])?;
    tool.wait_phase("FullSync", PATIENCE)?;
    move_slots(&shards, &load, &slots(0..6), 0, || Ok(()))?;
    for node in &shards.cluster.nodes {
        node.conn()?.run(args!["CONFIG", "SET", "rdb-key-save-delay", "0"])?;
    }
    tool.wait_condition("InSync", PATIENCE)?;
    load.wait_more(100)?;
    load.finish()?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    ensure!(full_resyncs(&at_rest(&tool)?) == 0, "a full resync");
    stop(tool).map(drop)
}

/// Killed before the slots were taken over, and slots that move while no process runs: the target tells the next
/// one what is to be done, as a process that was killed leaves no other memory of it.
#[test]
fn slots_that_move_while_the_tool_is_away() -> Result<()> {
    for to_cluster in [false, true] {
        let cluster = if to_cluster { Some(Cluster::start(VERSION, 3, 0)?) } else { None };
        let server = Server::start(VERSION)?;
        let target = cluster.as_ref().map_or_else(|| server.endpoint(), Cluster::endpoint);
        let shards = Shards { cluster: Cluster::start_with(options(VERSION), 3, 0)? };
        let endpoint = shards.cluster.endpoint();
        let load = Roaming::start(endpoint.clone());
        load.wait_more(300)?;
        let manifest = Manifest::between(&endpoint, &target);
        let mut tool = Tool::run(&manifest, &[])?;
        let folder = Arc::clone(&tool.folder);
        tool.wait_condition("InSync", PATIENCE)?;
        for round in 0..4 {
            let tags = slots(round * 3..round * 3 + 3);
            if round % 2 == 0 {
                // In the middle of it.
                let killed = &mut tool;
                move_slots(&shards, &load, &tags, round, || killed.kill())?;
            } else {
                move_slots(&shards, &load, &tags, round, || Ok(()))?;
                tool.kill()?;
            }
            load.wait_more(100)?;
            tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
            tool.wait_condition("InSync", PATIENCE)?;
        }
        load.wait_more(100)?;
        load.finish()?;
        wait_equal(&endpoint, &target, Duration::from_secs(40))?;
        let status = at_rest(&tool)?;
        ensure!(full_resyncs(&status) == 0 && status["quarantine"]["commands"] == 0, "{status}");
        stop(tool)?;
    }
    Ok(())
}

/// No worker follows a shard that was not there when the migration began: it says so, and the next run does.
#[test]
fn slots_that_move_to_a_shard_that_has_joined() -> Result<()> {
    let target = Server::start(VERSION)?;
    let mut shards = Shards { cluster: Cluster::start_with(options(VERSION), 3, 0)? };
    let endpoint = shards.cluster.endpoint();
    let load = Roaming::start(endpoint.clone());
    load.wait_more(300)?;
    let manifest = Manifest::between(&endpoint, &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    shards.cluster.join(options(VERSION), 0)?;
    for slot in slots(0..4) {
        // The new one is the first, as it has the lowest slot.
        let at = shards.masters()?.iter().position(|master| master.serves(slot)).context("unserved")?;
        move_slots(&shards, &load, &[slot], 3 - at as u64, || Ok(()))?;
    }
    let status = tool.wait_for("slots that went to a strange shard to be named", PATIENCE, |status| {
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        let told = |c: &Value| {
            c["reason"] == "SlotsMoved"
                && c["message"].as_str().is_some_and(|text| text.contains("stop it and start it again"))
        };
        conditions.iter().any(told)
    })?;
    ensure!(status["quarantine"]["commands"] == 0, "{status}");
    stop(tool)?;

    load.wait_more(100)?;
    let tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
    tool.wait_for("four shards in sync", PATIENCE, |status| status["replication"]["shardsInSync"] == "4/4")?;
    load.wait_more(200)?;
    load.finish()?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    at_rest(&tool)?;
    stop(tool)?;
    let cutover = manifest
        .set("/spec/cutover", serde_json::json!({"mode": "Automatic"}))
        .set("/spec/verification/mode", "Full");
    Tool::run_in(folder, &cutover, &[])?.expect_exit(0, PATIENCE)?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE).map(drop)
}

/// Valkey 9 hands slots over as a whole, and its streams say so in words of their own.
#[test]
fn slots_that_valkey_moves_as_a_whole() -> Result<()> {
    const VERSION: Version = Version::VALKEY_9_1;
    let target = Server::start(VERSION)?;
    let shards = Shards { cluster: Cluster::start_with(options(VERSION), 2, 0)? };
    let endpoint = shards.cluster.endpoint();
    let load = Roaming::start(endpoint.clone());
    load.wait_more(300)?;
    let tool = Tool::run(&Manifest::between(&endpoint, &target.endpoint()), &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    for slot in slots(0..4) {
        let masters = shards.masters()?;
        let from = masters.iter().find(|master| master.serves(slot)).context("an unserved slot")?;
        let to = masters.iter().find(|master| master.id != from.id).context("no other master")?;
        let range = slot.to_string();
        let mut conn = shards.server(from.port)?.conn()?;
        conn.run(args!["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", range, range, "NODE", to.id])?;
        let arrived = || {
            let masters = shards.masters()?;
            let there = masters.iter().any(|master| master.id == to.id && master.serves(slot));
            Ok(there.then_some(()))
        };
        wait_until("a slot that has moved", PATIENCE, arrived)?;
        load.wait_more(50)?;
    }
    load.wait_more(100)?;
    load.finish()?;
    wait_equal(&endpoint, &target.endpoint(), PATIENCE)?;
    let status = at_rest(&tool)?;
    ensure!(full_resyncs(&status) == 0 && status["quarantine"]["commands"] == 0, "{status}");
    stop(tool).map(drop)
}
