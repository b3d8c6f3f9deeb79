//! A live migration to look at: a standalone Redis that a client keeps writing to moves to a
//! cluster of three. Ports are those of examples/standalone-to-cluster.yaml.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::tool::binary;
use e2e::{Cluster, Options, Server, Version, args, wait_until};

const SOURCE_PORT: u16 = 6400;
const TARGET_PORT: u16 = 6410;
const NODES: usize = 3;
const KEYS: usize = 300_000;
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

    let started = Instant::now();
    run(&manifest, &source, &["--until", "InSync"])?;
    let in_sync = started.elapsed();
    writer.wait_more(1_000, PATIENCE)?;
    say("stopping the client, which wrote on meanwhile; the second run resumes where the first one stopped");
    let written = writer.stop()?;
    run(&manifest, &source, &[])?;

    say("comparing every key of both sides, by ordinary commands and not by the tool");
    let compared = Instant::now();
    let report = wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    let compared = compared.elapsed();

    let mut parts = Vec::new();
    for node in &target.nodes {
        parts.push(format!("{} on :{}", node.conn()?.number(args!["DBSIZE"])?, node.port));
    }
    say("done:");
    say(&format!(
        "  {} keys moved while {} commands were written to the source",
        report.keys, written.commands
    ));
    say(&format!("  in sync and verified by the tool after {:.1} s", in_sync.as_secs_f64()));
    say(&format!("  then compared key by key in {:.1} s: no difference", compared.as_secs_f64()));
    say(&format!("  the cluster holds {}", parts.join(", ")));
    say("stopping the servers");
    Ok(())
}

/// `redis-migration run` with its output on our terminal, to its end.
fn run(manifest: &Path, source: &Server, further: &[&str]) -> Result<()> {
    say(&["redis-migration run -f examples/standalone-to-cluster.yaml"]
        .iter()
        .chain(further)
        .copied()
        .collect::<Vec<_>>()
        .join(" "));
    let mut child = Command::new(binary()?)
        .arg("run")
        .arg("-f")
        .arg(manifest)
        // Inside the server's folder, which goes with it whatever happens to us.
        .arg("--data-dir")
        .arg(source.folder().join("tool"))
        .args(["--listen", "127.0.0.1:0"])
        .args(further)
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
        .spawn()?;
    let status = wait_until("end of redis-migration", PATIENCE, || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
        child.wait()?;
    }
    let status = status?;
    ensure!(status.success(), "redis-migration ended with {status}");
    Ok(())
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
