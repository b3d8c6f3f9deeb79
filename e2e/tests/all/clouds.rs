//! What managed services do: commands that are forbidden, connections that end when idle, passwords that change,
//! nodes that announce names or addresses which only the inside knows.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::compare::{Rules, wait_equal, wait_equal_with};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, copy_under_load, stop, verify};
use e2e::{Cluster, Manifest, Options, Server, Tool, Version, wait_until};
use serde_json::{Map, Value};

const FORBIDDEN: &[&str] = &[
    "CONFIG", "CLIENT", "DEBUG", "MEMORY", "OBJECT", "WAIT", "CLUSTER", "SLOWLOG", "LATENCY", "COMMAND",
    "MODULE", "ACL", "MONITOR", "SHUTDOWN", "BGSAVE", "SAVE", "ROLE",
];

/// A server that has none of them.
fn poor(version: Version) -> Result<Server> {
    let known = |name: &&&str| match **name {
        "MODULE" | "MEMORY" => version.has(4, 0),
        "ACL" => version.has(6, 0),
        _ => true,
    };
    let options = Options::new(version).with("repl-backlog-size", "32mb");
    let forbidden = FORBIDDEN.iter().filter(known);
    forbidden.fold(options, |options, name| options.with("rename-command", &format!("{name} \"\""))).start()
}

#[test]
fn all_optional_commands_may_be_forbidden() -> Result<()> {
    for (from, to) in [(Version::REDIS_5_0, Version::REDIS_7_0), (Version::REDIS_7_0, Version::REDIS_3_2)] {
        let (source, target) = (poor(from)?, poor(to)?);
        Dataset::default().rounds(1).fill(&mut source.client()?)?;
        let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
        let without: &[&str] =
            if to.has(5, 0) { &[] } else { &["X*", "PFMERGE", "GEORADIUS", "GEOSEARCHSTORE"] };
        let load = Load { without, ..Load::default() };
        if to.has(5, 0) {
            copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &Rules::default())?;
            continue;
        }
        let writer = Writer::start(&source.endpoint(), load)?;
        let tool = Tool::run(&manifest, &[])?;
        tool.wait_condition("InSync", PATIENCE)?;
        writer.wait_more(1000, PATIENCE)?;
        writer.stop()?;
        let rules = Rules { as_the_target_can: true, ..Rules::default() };
        wait_equal_with(&source.endpoint(), &target.endpoint(), &rules, PATIENCE)?;
        tool.wait_condition("Verified", PATIENCE)?;
        verify(&manifest, 0)?;
        stop(tool)?;
    }
    Ok(())
}

/// The target ends connections that were idle, the source all that are not replicas; the password of both changes,
/// and what is connected with the old one is thrown out.
#[test]
fn idle_connections_end_and_passwords_change() -> Result<()> {
    let options = || Options::new(Version::REDIS_7_0).with("timeout", "1").password("before");
    let (source, target) = (options().start()?, options().start()?);
    source.conn()?.run(&[b"SET", b"first", b"1"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    let mut watching = target.conn()?;
    let mut number = |section: &str, field: &str| -> Result<u64> {
        Ok(watching.info(section, field)?.context("a field of INFO")?.parse()?)
    };
    let connections = number("stats", "total_connections_received")?;
    // Nobody is connected any more but us, or somebody has come back.
    wait_until("the target's end of idle connections", PATIENCE, || {
        let gone = number("clients", "connected_clients")? == 1;
        Ok((gone || number("stats", "total_connections_received")? > connections).then_some(()))
    })?;
    source.conn()?.run(&[b"SET", b"second", b"2"])?;
    let wanted = |key: &'static str, value: &'static str, password: &'static str| {
        let auth = (String::new(), password.to_owned());
        let address = target.address();
        move || {
            let mut conn = e2e::Conn::open(&address, Some(&auth))?;
            Ok((conn.text(&[b"GET", key.as_bytes()])? == value).then_some(()))
        }
    };
    wait_until("what was written then", PATIENCE, wanted("second", "2", "before"))?;
    let secrets = tool.folder.path().join("secrets");
    for (side, server) in [("source", &source), ("target", &target)] {
        let mut conn = server.conn()?;
        // As passwords are rotated: both hold for a moment.
        conn.run(&[b"ACL", b"SETUSER", b"default", b">after"])?;
        std::fs::write(secrets.join(format!("{side}-login")).join("password"), "after")?;
        conn.run(&[b"ACL", b"SETUSER", b"default", b"<before"])?;
        for kind in [&b"replica"[..], b"normal"] {
            conn.run(&[b"CLIENT", b"KILL", b"TYPE", kind])?;
        }
    }
    let auth = (String::new(), "after".to_owned());
    e2e::Conn::open(&source.address(), Some(&auth))?.run(&[b"SET", b"third", b"3"])?;
    wait_until("what was written with the new password", PATIENCE, wanted("third", "3", "after"))?;
    let status = tool.status().context("no status")?;
    ensure!(status["replication"]["fullResyncs"] == 0, "{status}");
    stop(tool).map(drop)
}

/// Nodes announce names that nobody can resolve; the manifest says where they are.
#[test]
fn announced_names_are_mapped_to_what_can_be_reached() -> Result<()> {
    let source = Cluster::start(Version::REDIS_7_0, 2, 0)?;
    let target = Cluster::start(Version::REDIS_7_0, 2, 0)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    let mut manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    for (side, cluster) in [("source", &source), ("target", &target)] {
        let mut map = Map::new();
        for node in &cluster.nodes {
            let name = format!("node-{}.invalid", node.port);
            let mut conn = node.conn()?;
            conn.run(&[b"CONFIG", b"SET", b"cluster-announce-hostname", name.as_bytes()])?;
            map.insert(format!("{name}:{}", node.port), Value::from(node.address()));
        }
        for node in &cluster.nodes {
            let mut conn = node.conn()?;
            wait_until("names that all nodes know", PATIENCE, || {
                let nodes = conn.text(&[b"CLUSTER", b"NODES"])?;
                Ok((nodes.matches(".invalid").count() == cluster.nodes.len()).then_some(()))
            })?;
            conn.run(&[b"CONFIG", b"SET", b"cluster-preferred-endpoint-type", b"hostname"])?;
        }
        manifest = manifest.set(&format!("/spec/{side}/redis/endpointMap"), Value::Object(map));
    }
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    writer.wait_more(1000, PATIENCE)?;
    writer.stop()?;
    tool.wait_condition("Verified", PATIENCE)?;
    verify(&manifest, 0)?;
    // The comparison knows nothing of the map.
    for node in source.nodes.iter().chain(&target.nodes) {
        node.conn()?.run(&[b"CONFIG", b"SET", b"cluster-preferred-endpoint-type", b"ip"])?;
    }
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::from_secs(30))?;
    stop(tool).map(drop)
}
