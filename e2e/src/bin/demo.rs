//! A live migration to look at: a standalone Redis that a client keeps writing to moves to a
//! cluster of three. Ports are those of examples/standalone-to-cluster.yaml.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::tool::{binary, condition};
use e2e::{Cluster, Options, Server, Version, args, wait_until};
use serde_json::Value;

const SOURCE_PORT: u16 = 6400;
const TARGET_PORT: u16 = 6410;
const NODES: usize = 3;
const KEYS: usize = 300_000;
/// How long the copy follows the writer once it is in sync, so that one sees it do so.
const FOLLOW: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    if let Err(error) = demo() {
        eprintln!("demo: {error:#}");
        std::process::exit(1);
    }
}

fn demo() -> Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/standalone-to-cluster.yaml");
    ensure!(manifest.is_file(), "{} is missing", manifest.display());
    binary()?;
    ports_are_free()?;

    say(&format!("starting a Redis on 127.0.0.1:{SOURCE_PORT} and filling it with keys of every type"));
    let source =
        Options::new(Version::REDIS_7_0).with("repl-backlog-size", "64mb").port(SOURCE_PORT).start()?;
    let dataset =
        Dataset { rounds: 60, many: KEYS, large: 20_000, databases: Vec::new(), ..Dataset::default() };
    dataset.fill(&mut source.client()?)?;
    say(&format!("{} keys are there", source.conn()?.number(args!["DBSIZE"])?));

    say(&format!("starting a cluster of {NODES} nodes from 127.0.0.1:{TARGET_PORT}"));
    let target = Cluster::start_with(Options::new(Version::REDIS_7_0).port(TARGET_PORT), NODES, 0)?;

    say("starting a client that keeps writing commands of every family to the source");
    let writer = Writer::start(&source.endpoint(), Load { rate: 3_000, ..Load::default() })?;

    let outcome = migrate(&manifest, &source, &writer);
    let mut tool = outcome?;
    say("stopping the client");
    let written = writer.stop()?;
    let compared = Instant::now();
    say("comparing every key of both sides, by ordinary commands and not by the tool");
    let report = wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    let compared = compared.elapsed();
    tool.stop()?;

    let mut parts = Vec::new();
    for node in &target.nodes {
        parts.push(format!("{} on :{}", node.conn()?.number(args!["DBSIZE"])?, node.port));
    }
    say("done:");
    say(&format!(
        "  {} keys moved while {} commands were written to the source",
        report.keys, written.commands
    ));
    say(&format!("  in sync and verified by the tool after {:.1} s", tool.in_sync.as_secs_f64()));
    say(&format!("  then compared key by key in {:.1} s: no difference", compared.as_secs_f64()));
    say(&format!("  the cluster holds {}", parts.join(", ")));
    say("stopping the servers");
    Ok(())
}

/// Runs the tool until it says that both sides are in sync and verified, and follows for a while.
fn migrate(manifest: &Path, source: &Server, writer: &Writer) -> Result<Running> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    say("redis-migration run -f examples/standalone-to-cluster.yaml");
    let child = Command::new(binary()?)
        .arg("run")
        .arg("-f")
        .arg(manifest)
        // Inside the server's folder, which goes with it whatever happens to us.
        .arg("--data-dir")
        .arg(source.folder().join("tool"))
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
        .spawn()?;
    let mut running = Running { child, in_sync: Duration::ZERO };
    let started = Instant::now();
    wait_until("in sync and verified", PATIENCE, || {
        if let Some(status) = running.child.try_wait()? {
            return Ok(Some(Err(anyhow::anyhow!("redis-migration ended early: {status}"))));
        }
        let status = status(port)?;
        let is = |kind| condition(&status, kind).as_deref() == Some("True");
        Ok((is("InSync") && is("Verified")).then_some(Ok(())))
    })??;
    running.in_sync = started.elapsed();
    let commands = writer.commands();
    std::thread::sleep(FOLLOW);
    ensure!(writer.commands() > commands, "the writing client stopped");
    Ok(running)
}

struct Running {
    child: Child,
    in_sync: Duration,
}

impl Running {
    /// SIGTERM, as a user's Ctrl-C would: it keeps its checkpoint and says so by its exit code.
    fn stop(&mut self) -> Result<()> {
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        let status =
            wait_until("end of redis-migration", Duration::from_secs(15), || Ok(self.child.try_wait()?))?;
        ensure!(status.code() == Some(4), "redis-migration ended with {status}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The status as the tool's HTTP endpoint tells it.
fn status(port: u16) -> Result<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "GET /metric HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let body: Value = serde_json::from_str(body)?;
    let one = body.as_array().and_then(|all| all.first()).unwrap_or(&body);
    one.get("status").cloned().context("no status")
}

fn ports_are_free() -> Result<()> {
    let nodes = (0..NODES as u16).flat_map(|i| [TARGET_PORT + i, TARGET_PORT + i + 10_000]);
    for port in [SOURCE_PORT].into_iter().chain(nodes) {
        if let Err(error) = TcpListener::bind(("127.0.0.1", port)) {
            bail!(
                "port {port} is taken ({error}); the demo needs {SOURCE_PORT}, {TARGET_PORT} to {}, and the same plus 10000 for the cluster: stop what listens there",
                TARGET_PORT + NODES as u16 - 1
            );
        }
    }
    Ok(())
}

fn say(text: &str) {
    println!("demo: {text}");
}
