//! Every version to every other, up and down, under a write load: 81 pairs. The targets of a source share its
//! traffic. What the target's version cannot hold is counted on both sides of the comparison, and nothing else
//! may be missing.

use anyhow::{Context, Result, ensure};
use e2e::compare::{Report, Rules, wait_equal_with};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, stop, verify};
use e2e::{Manifest, Options, Server, Tool, Version};
use serde_json::Value;

/// What has no equivalent before 5.0 and would leave other data behind on such a target.
const NEW: &[&str] = &["X*", "BITFIELD", "GEORADIUS", "GEOSEARCHSTORE", "SWAPDB", "PFMERGE"];

/// From one version to all; what a target cannot have keeps the others of the source from nothing.
fn from(source: Version) -> Result<()> {
    let (new, old): (Vec<_>, Vec<_>) = Version::ALL.into_iter().partition(|target| target.has(5, 0));
    let (new, old) = if source.has(3, 2) {
        (new, old)
    } else {
        // Nothing that one of them lacks.
        ([new, old].concat(), Vec::new())
    };
    // Before 7.0 expiries travel as the time that is left, so that whoever waits long for its snapshot gets them
    // late; and snapshots on disk are made one after the other.
    let most = if source.has(7, 0) { 9 } else { 3 };
    for (targets, without) in [(new, &[][..]), (old, NEW)] {
        targets.chunks(most).try_for_each(|targets| together(source, targets, without))?;
    }
    Ok(())
}

fn together(source: Version, targets: &[Version], without: &'static [&'static str]) -> Result<()> {
    let server = Options::new(source).with("repl-backlog-size", "32mb").start()?;
    Dataset::default().rounds(2).fill(&mut server.client()?)?;
    let load = Load { databases: vec![0, 1, 9], across_databases: true, without, ..Load::default() };
    let writer = Writer::start(&server.endpoint(), load)?;
    writer.wait_more(300, PATIENCE)?;
    let pairs = targets.iter().map(|&target| Pair::start(&server, target)).collect::<Result<Vec<_>>>()?;
    for pair in &pairs {
        pair.tool.wait_condition("InSync", PATIENCE).with_context(|| pair.name())?;
    }
    writer.wait_more(1_500, PATIENCE)?;
    writer.stop()?;
    // The tools take little when nothing is written, so what each has to show is asked one after the other.
    let mut failed = Vec::new();
    for pair in pairs {
        let name = pair.name();
        if let Err(error) = pair.finish(&server) {
            failed.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

struct Pair {
    source: Version,
    target: Server,
    manifest: Manifest,
    tool: Tool,
}

impl Pair {
    fn start(source: &Server, target: Version) -> Result<Self> {
        let server = Server::start(target)?;
        let manifest = Manifest::between(&source.endpoint(), &server.endpoint());
        let tool = Tool::run(&manifest, &[])?;
        Ok(Self { source: source.version, target: server, manifest, tool })
    }

    fn name(&self) -> String {
        format!("{} to {}", self.source, self.target.version)
    }

    fn finish(self, source: &Server) -> Result<()> {
        let rules = Rules { as_the_target_can: true, ..Rules::default() };
        let report = wait_equal_with(&source.endpoint(), &self.target.endpoint(), &rules, PATIENCE)?;
        ensure!(report.keys > 300, "{report}");
        let status = self.tool.wait_condition("Verified", PATIENCE)?;
        counted(&status, &report).with_context(|| format!("{report}: {status}"))?;
        verify(&self.manifest, 0)?;
        stop(self.tool).map(drop)
    }
}

/// The status names what is missing, and nothing else.
fn counted(status: &Value, report: &Report) -> Result<()> {
    let kinds = &status["quarantine"]["kinds"];
    let kind = |name: &str| kinds[name].as_u64().unwrap_or(0) as usize;
    ensure!(kind("Streams") == report.lost.streams, "streams: {:?}", report.lost);
    ensure!(kind("Functions") == report.lost.functions, "functions: {:?}", report.lost);
    // Of these, commands count, too.
    ensure!((kind("FieldExpiry") > 0) == (report.lost.field_expiries > 0), "fields: {:?}", report.lost);
    let refused = (report.lost.streams + report.lost.functions) as u64;
    ensure!(
        status["quarantine"]["commands"].as_u64() == Some(refused),
        "more is missing: {}",
        status["quarantine"]
    );
    ensure!(status["verification"]["differences"] == 0 && status["verification"]["round"] != 0);
    ensure!(status["verification"]["unsupported"].as_u64() == Some(report.lost.streams as u64));
    Ok(())
}

#[test]
fn from_redis_2_8() -> Result<()> {
    from(Version::REDIS_2_8)
}

#[test]
fn from_redis_3_0() -> Result<()> {
    from(Version::REDIS_3_0)
}

#[test]
fn from_redis_3_2() -> Result<()> {
    from(Version::REDIS_3_2)
}

#[test]
fn from_redis_5_0() -> Result<()> {
    from(Version::REDIS_5_0)
}

#[test]
fn from_redis_6_2() -> Result<()> {
    from(Version::REDIS_6_2)
}

#[test]
fn from_redis_7_0() -> Result<()> {
    from(Version::REDIS_7_0)
}

#[test]
fn from_redis_8_2() -> Result<()> {
    from(Version::REDIS_8_2)
}

#[test]
fn from_valkey_8_1() -> Result<()> {
    from(Version::VALKEY_8_1)
}

#[test]
fn from_valkey_9_1() -> Result<()> {
    from(Version::VALKEY_9_1)
}

/// What arrives after the snapshot and has no equivalent is counted by kind; and with nothing to be lost, nothing
/// begins.
#[test]
fn commands_without_an_equivalent_are_counted_by_kind() -> Result<()> {
    let source = Server::start(Version::REDIS_8_2)?;
    let target = Server::start(Version::REDIS_3_2)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let strict = manifest.clone().set("/spec/failurePolicy/maxQuarantined", 0);
    let finished = Tool::once("check", &strict)?;
    ensure!(
        finished.code == 1 && finished.stderr.contains("no equivalent for streams"),
        "{}",
        finished.stderr
    );
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    let mut client = source.conn()?;
    for command in [
        "XADD x 1-1 f v",
        "XADD x 2-1 f v",
        "BITFIELD b SET u8 0 200",
        "SET a xx",
        "BITOP DIFF d a b",
        "SET plain value",
        "INCRBYFLOAT plain2 1.5",
        "PEXPIRE plain2 5000000",
        "INCRBYFLOAT plain2 1.5",
        "HSET h a 1 b 2",
        "HPEXPIRE h 5000000 FIELDS 1 a",
        "HINCRBYFLOAT h a 1.5",
    ] {
        let words: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
        client.run(&words)?;
    }
    let kinds = |status: &Value| {
        let count = |name: &str| status["quarantine"]["kinds"][name].as_i64().unwrap_or(0);
        (count("Streams"), count("Commands"), count("FieldExpiry"))
    };
    let status = tool.wait_for("the counts", PATIENCE, |status| kinds(status) == (2, 1, 1))?;
    ensure!(status["quarantine"]["commands"] == 3, "{status}");
    let rules = Rules { ignore: |key| key == b"d", as_the_target_can: true, ..Rules::default() };
    let report = wait_equal_with(&source.endpoint(), &target.endpoint(), &rules, PATIENCE)?;
    ensure!(report.lost.streams == 1 && report.lost.field_expiries == 1, "{report}: {:?}", report.lost);
    stop(tool).map(drop)
}
