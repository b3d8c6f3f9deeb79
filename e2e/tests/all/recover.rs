//! A run that ends in the middle, and what its spool on disk is good for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop, wait_noted};
use e2e::{Cluster, Endpoint, Manifest, Options, Proxy, Server, Tool, Version, args, wait_until};
use serde_json::{Map, Value};
use tempfile::TempDir;

const VERSION: Version = Version::REDIS_7_0;
/// What the tool says when it uses what an earlier run spooled.
const TAKEN_UP: &str = "going on with the spool that an earlier run left";
/// Bytes a second to each node of a target that is slower than the source.
const SLOW: u64 = 400_000;
/// Bytes of the RDB that stand before a run is killed.
const NOTED: u64 = 100_000;

/// An RDB of some 8 MB, with values of all kinds.
fn source(options: Options) -> Result<Server> {
    let source = options.with("rdbcompression", "no").with("enable-debug-command", "yes").start()?;
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    source.conn()?.run(args!["DEBUG", "POPULATE", "6000", "filler", "1000"])?;
    Ok(source)
}

fn load() -> Load {
    Load { rate: 1_000, additive: 80, ..Load::default() }
}

/// A target behind proxies.
struct Target {
    endpoint: Endpoint,
    proxies: Vec<Proxy>,
    servers: Servers,
}

enum Servers {
    One(Server),
    Cluster(Cluster),
}

impl Target {
    fn standalone() -> Result<Self> {
        let server = Server::start(VERSION)?;
        Ok(Self {
            endpoint: server.endpoint(),
            proxies: vec![Proxy::start(&server.address())?],
            servers: Servers::One(server),
        })
    }

    fn cluster() -> Result<Self> {
        let cluster = Cluster::start(VERSION, 3, 0)?;
        let proxies = cluster.nodes.iter().map(|node| Proxy::start(&node.address()));
        Ok(Self {
            endpoint: cluster.endpoint(),
            proxies: proxies.collect::<Result<_>>()?,
            servers: Servers::Cluster(cluster),
        })
    }

    /// The migration there, with little memory for the spool, so that it is soon on disk, and little under way,
    /// behind which the record of how far it came would be.
    fn manifest(&self, source: &Server) -> Manifest {
        let addresses: Vec<String> = self.proxies.iter().map(Proxy::address).collect();
        let manifest = Manifest::between(&source.endpoint(), &self.endpoint)
            .set("/spec/target/redis/endpoints", addresses.clone())
            .set("/spec/limits/spoolMemory", "1Mi")
            .set("/spec/limits/pipelineBytes", "64Ki")
            .set("/spec/limits/pipelineCommands", 64)
            .set("/spec/limits/maxRestoreBytes", "256Ki");
        match &self.servers {
            Servers::One(_) => manifest.set("/spec/target/redis/topology", "Standalone"),
            Servers::Cluster(cluster) => {
                let nodes = cluster.nodes.iter().map(Server::address);
                let map: Map<String, Value> = nodes.zip(addresses.into_iter().map(Value::from)).collect();
                manifest
                    .set("/spec/target/redis/topology", "Cluster")
                    .set("/spec/target/redis/endpointMap", map)
            }
        }
    }

    fn limit(&self, bytes_per_second: Option<u64>) {
        self.proxies.iter().for_each(|proxy| proxy.limit(bytes_per_second));
    }

    fn nodes(&self) -> &[Server] {
        match &self.servers {
            Servers::One(server) => std::slice::from_ref(server),
            Servers::Cluster(cluster) => &cluster.nodes,
        }
    }

    fn stall(&self, stalled: bool) {
        self.proxies.iter().for_each(|proxy| proxy.stall(stalled));
    }
}

/// What stands in the spool's folder of the only shard.
struct Spooled {
    run: PathBuf,
    /// Position of the first stream byte, once the journal has it, and the offset before it.
    stream_at: Option<u64>,
    offset: u64,
    /// Behind the last whole record.
    end: u64,
}

impl Spooled {
    /// `None`: there is no such folder, or it is just being written.
    fn look(folder: &Path) -> Result<Option<Self>> {
        let Some(run) = runs(folder)?.pop() else { return Ok(None) };
        let Ok(journal) = std::fs::read_to_string(run.join("journal")) else { return Ok(None) };
        let (_, json) = journal.split_once('\n').context("a journal of one line")?;
        let journal: Value = serde_json::from_str(json)?;
        let end = segments(&run)?.iter().filter_map(|segment| end_of(segment)).max().unwrap_or(0);
        let offset = journal["offset"].as_u64().context("a journal without an offset")?;
        Ok(Some(Self { run, stream_at: journal["streamAt"].as_u64(), offset, end }))
    }

    /// The RDB, and something behind it.
    fn whole(folder: &Path) -> Result<Self> {
        wait_until("the whole RDB in the spool on disk", PATIENCE, || {
            let spooled = Self::look(folder)?;
            Ok(spooled.filter(|spooled| spooled.stream_at.is_some_and(|stream_at| spooled.end >= stream_at)))
        })
    }
}

/// Folders of runs.
fn runs(folder: &Path) -> Result<Vec<PathBuf>> {
    let shards = folder.join("data").join("spool");
    let mut found = Vec::new();
    for shard in std::fs::read_dir(shards).into_iter().flatten() {
        for run in std::fs::read_dir(shard?.path())? {
            found.push(run?.path());
        }
    }
    found.sort();
    Ok(found)
}

fn segments(run: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(run)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "spool") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The position behind the last record of a segment; `None` for one that was removed meanwhile.
fn end_of(segment: &Path) -> Option<u64> {
    let bytes = std::fs::read(segment).ok()?;
    let (mut at, mut end) = (0, None);
    while let Some(header) = bytes.get(at..at + 32) {
        let length = (u32::from_le_bytes(header[..4].try_into().ok()?) & 0x7fff_ffff) as usize;
        let position = u64::from_le_bytes(header[8..16].try_into().ok()?);
        at += 32 + length;
        if at <= bytes.len() {
            end = Some(position + length as u64);
        }
    }
    end
}

fn keys_applied(status: &Value) -> i64 {
    status["progress"]["keysApplied"].as_i64().unwrap_or(0)
}

/// A run that is killed with the whole RDB on disk and a part of it on the target; the folder of its data.
fn killed_in_full_sync(manifest: &Manifest, target: &Target) -> Result<Arc<TempDir>> {
    target.limit(Some(SLOW));
    let mut tool = Tool::run(manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    wait_noted(target.nodes(), NOTED)?;
    Spooled::whole(folder.path())?;
    kill(&mut tool)?;
    Ok(folder)
}

fn kill(tool: &mut Tool) -> Result<()> {
    let status = tool.status().context("no status")?;
    ensure!(status["phase"] == "FullSync", "the full sync was over: {status}");
    tool.kill()
}

/// The spool position at which a run went on with what was left to it.
fn taken_up_at(tool: &Tool) -> Result<u64> {
    let said = tool.stderr();
    let line = said.lines().find(|line| line.contains(TAKEN_UP)).with_context(|| said.clone())?;
    let position = line.split_once("position=").context("no position")?.1;
    Ok(position.split(' ').next().unwrap_or_default().parse()?)
}

/// Lets it come to its end, and compares what an independent client reads on both sides.
fn finish(tool: Tool, writer: Writer, source: &Server, target: &Target) -> Result<Value> {
    target.limit(None);
    let status = tool.wait_condition("InSync", PATIENCE)?;
    writer.wait_more(300, PATIENCE)?;
    writer.stop()?;
    wait_equal(&source.endpoint(), &target.endpoint, PATIENCE)?;
    ensure!(status["quarantine"]["commands"].as_i64().unwrap_or(0) == 0, "{}", status["quarantine"]);
    let folder = Arc::clone(&tool.folder);
    stop(tool)?;
    // All is applied: nothing of it is of use any more.
    ensure!(runs(folder.path())?.is_empty(), "{:?}", runs(folder.path())?);
    Ok(status)
}

/// Killed time and again in the full sync, it ends with the one that it began.
fn goes_on_with_the_full_sync(target: &Target) -> Result<()> {
    let source = source(Options::new(VERSION).with("repl-backlog-size", "64mb"))?;
    let manifest = target.manifest(&source);
    let writer = Writer::start(&source.endpoint(), load())?;
    writer.wait_more(300, PATIENCE)?;
    let folder = killed_in_full_sync(&manifest, target)?;
    let mut before = 0;
    for _ in 0..2 {
        writer.wait_more(300, PATIENCE)?;
        let mut tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
        let status = tool.wait_for("keys", PATIENCE, |status| keys_applied(status) > 0)?;
        let position = taken_up_at(&tool)?;
        // What stood is not copied again. (Records are a MiB apart, which a run may be killed in between.)
        ensure!(position > NOTED && position >= before, "{position} after {before}: {status}");
        before = position;
        let more = keys_applied(&status) + 500;
        tool.wait_for("more of the keys", PATIENCE, |status| keys_applied(status) > more)?;
        kill(&mut tool)?;
    }
    let tool = Tool::run_in(folder, &manifest, &[])?;
    let status = finish(tool, writer, &source, target)?;
    assert_eq!(source.syncs()?.0, 1);
    assert_eq!(status["replication"]["fullResyncs"], 0);
    Ok(())
}

#[test]
fn sigkill_in_the_full_sync_to_standalone_goes_on_from_the_spool() -> Result<()> {
    goes_on_with_the_full_sync(&Target::standalone()?)
}

#[test]
fn sigkill_in_the_full_sync_to_cluster_goes_on_from_the_spool() -> Result<()> {
    goes_on_with_the_full_sync(&Target::cluster()?)
}

/// A stop leaves what was received, on disk or not, to the next run, and says so.
#[test]
fn sigterm_in_the_full_sync_goes_on_from_the_spool() -> Result<()> {
    let target = Target::standalone()?;
    let source = source(Options::new(VERSION).with("repl-backlog-size", "64mb"))?;
    // All of it fits into memory.
    let manifest = target.manifest(&source).set("/spec/limits/spoolMemory", "64Mi");
    let writer = Writer::start(&source.endpoint(), load())?;
    target.limit(Some(SLOW));
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_for("a part of the keys, and all of the RDB", PATIENCE, |status| {
        keys_applied(status) > 500 && status["progress"]["bytesTotal"].as_i64().unwrap_or(0) > 0
    })?;
    source.conn()?.run(args!["CONFIG", "SET", "repl-ping-replica-period", "1"])?;
    wait_until("the source to stream", PATIENCE, || {
        let replica = source.conn()?.info("replication", "slave0")?.unwrap_or_default();
        Ok(replica.contains("state=online").then_some(()))
    })?;
    ensure!(Spooled::look(folder.path())?.is_none(), "the disk was needed");
    let finished = stop(tool)?;
    let said = finished.status()?["message"].to_string();
    ensure!(said.contains("goes on from the spool"), "{said}");
    Spooled::whole(folder.path())?;
    writer.wait_more(300, PATIENCE)?;
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_condition("PreflightPassed", PATIENCE)?;
    let status = finish(tool, writer, &source, &target)?;
    assert_eq!((source.syncs()?.0, &status["replication"]["fullResyncs"]), (1, &Value::from(0)));
    Ok(())
}

/// An RDB cannot be asked for from its middle.
#[test]
fn sigkill_before_the_rdb_is_whole_copies_anew() -> Result<()> {
    let target = Target::standalone()?;
    let source = source(Options::new(VERSION).with("repl-backlog-size", "64mb"))?;
    let proxy = Proxy::start(&source.address())?;
    let manifest = target
        .manifest(&source)
        .set("/spec/source/redis/endpoints", vec![proxy.address()])
        .set("/spec/source/redis/topology", "Standalone");
    let writer = Writer::start(&source.endpoint(), load())?;
    target.limit(Some(SLOW / 4));
    proxy.limit(Some(700_000));
    let mut tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    wait_until("a part of the RDB on disk", PATIENCE, || {
        Ok(Spooled::look(folder.path())?.filter(|spooled| spooled.end > 1_000_000))
    })?;
    // The rest crawls, so that it is not whole at the kill however slow this machine is.
    proxy.limit(Some(1_000));
    tool.wait_for("a part of the keys", PATIENCE, |status| keys_applied(status) > 20)?;
    kill(&mut tool)?;
    let spooled = Spooled::look(folder.path())?.context("no spool")?;
    ensure!(spooled.stream_at.is_none(), "the RDB was whole");
    proxy.limit(None);
    anew(folder, &manifest, writer, &source, &target, "the end of the RDB had not arrived")
}

/// Starts again, and expects a second full sync that says why.
fn anew(
    folder: Arc<TempDir>,
    manifest: &Manifest,
    writer: Writer,
    source: &Server,
    target: &Target,
    why: &str,
) -> Result<()> {
    target.limit(None);
    writer.wait_more(300, PATIENCE)?;
    let tool = Tool::run_in(folder, manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let said = tool.stderr();
    ensure!(said.contains(why) && said.contains("copying anew") && !said.contains(TAKEN_UP), "{said}");
    finish(tool, writer, source, target)?;
    assert_eq!(source.syncs()?.0, 2);
    Ok(())
}

#[test]
fn a_torn_spool_copies_anew() -> Result<()> {
    let target = Target::standalone()?;
    let source = source(Options::new(VERSION).with("repl-backlog-size", "64mb"))?;
    let manifest = target.manifest(&source);
    let writer = Writer::start(&source.endpoint(), load())?;
    let folder = killed_in_full_sync(&manifest, &target)?;
    let spooled = Spooled::look(folder.path())?.context("no spool")?;
    let segment = segments(&spooled.run)?.pop().context("no segment")?;
    std::fs::File::options().write(true).open(segment)?.set_len(5_000_000)?;
    anew(folder, &manifest, writer, &source, &target, "what an earlier run spooled ends at a torn record")
}

#[test]
fn a_damaged_spool_copies_anew() -> Result<()> {
    let target = Target::standalone()?;
    let source = source(Options::new(VERSION).with("repl-backlog-size", "64mb"))?;
    let manifest = target.manifest(&source);
    let writer = Writer::start(&source.endpoint(), load())?;
    let folder = killed_in_full_sync(&manifest, &target)?;
    let spooled = Spooled::look(folder.path())?.context("no spool")?;
    let segment = segments(&spooled.run)?.pop().context("no segment")?;
    let mut bytes = std::fs::read(&segment)?;
    bytes[5_000_000] ^= 1;
    std::fs::write(&segment, bytes)?;
    anew(folder, &manifest, writer, &source, &target, "nothing of use is left of its spool")
}

/// The source's backlog has only what came after the spool's end.
fn goes_on_in_the_stream(target: &Target) -> Result<()> {
    let options =
        Options::new(VERSION).with("repl-backlog-size", "16kb").with("repl-ping-replica-period", "1");
    let source = options.start()?;
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    let manifest = target.manifest(&source).set("/spec/failurePolicy/onFullResync", "Fail");
    let mut tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    let before = source.syncs()?;
    target.limit(Some(20_000));
    let writer = Writer::start(&source.endpoint(), Load { rate: 20_000, additive: 80, ..Load::default() })?;
    let begun = Spooled::offset_of(&source)?;
    wait_until("more than fits into memory", PATIENCE, || {
        Ok((Spooled::offset_of(&source)? > begun + 1_500_000).then_some(()))
    })?;
    writer.stop()?;
    wait_until("all but the last PINGs on disk", PATIENCE, || {
        let spooled = Spooled::look(folder.path())?.context("no spool yet")?;
        let end = spooled.offset + spooled.end - spooled.stream_at.context("no stream")?;
        ensure!(end + 4_000 > Spooled::offset_of(&source)?, "up to {end}");
        Ok(Some(()))
    })?;
    // Otherwise the target has come too far for the test.
    tool.wait_for("much that is not applied", PATIENCE, |status| {
        status["replication"]["lagBytes"].as_i64().unwrap_or(0) > 100_000
    })?;
    tool.kill()?;
    target.limit(None);
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    taken_up_at(&tool)?;
    wait_equal(&source.endpoint(), &target.endpoint, PATIENCE)?;
    assert_eq!(source.syncs()?, (before.0, before.1 + 1));
    stop(tool).map(drop)
}

impl Spooled {
    fn offset_of(source: &Server) -> Result<u64> {
        Ok(source.conn()?.info("replication", "master_repl_offset")?.unwrap_or_default().parse()?)
    }
}

#[test]
fn sigkill_in_the_stream_to_standalone_needs_no_backlog_where_the_spool_has_it() -> Result<()> {
    goes_on_in_the_stream(&Target::standalone()?)
}

#[test]
fn sigkill_in_the_stream_to_cluster_needs_no_backlog_where_the_spool_has_it() -> Result<()> {
    goes_on_in_the_stream(&Target::cluster()?)
}

/// The same by SIGTERM: what the target did not take in time is left on disk.
#[test]
fn sigterm_in_the_stream_leaves_what_is_not_applied() -> Result<()> {
    let target = Target::standalone()?;
    let options =
        Options::new(VERSION).with("repl-backlog-size", "16kb").with("repl-ping-replica-period", "1");
    let source = options.start()?;
    Dataset::default().rounds(2).databases(&[]).fill(&mut source.client()?)?;
    let manifest = target
        .manifest(&source)
        .set("/spec/failurePolicy/onFullResync", "Fail")
        .set("/spec/limits/spoolMemory", "64Mi");
    let tool = Tool::run(&manifest, &[])?;
    let folder = Arc::clone(&tool.folder);
    tool.wait_condition("InSync", PATIENCE)?;
    let before = source.syncs()?;
    target.stall(true);
    let writer = Writer::start(&source.endpoint(), load())?;
    writer.wait_more(3_000, PATIENCE)?;
    writer.stop()?;
    tool.wait_for("all of it to arrive", PATIENCE, |status| {
        status["replication"]["lagBytes"].as_i64().unwrap_or(0) > 100_000
    })?;
    stop(tool)?;
    target.stall(false);
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    taken_up_at(&tool)?;
    wait_equal(&source.endpoint(), &target.endpoint, PATIENCE)?;
    assert_eq!(source.syncs()?, (before.0, before.1 + 1));
    stop(tool).map(drop)
}
