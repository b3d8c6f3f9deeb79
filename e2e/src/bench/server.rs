//! Redis servers of a benchmark: empty, on free ports of 127.0.0.1, stopped when dropped.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::client::{Client, poll};
use crate::process;

const TICK: Duration = Duration::from_millis(5);

/// One running redis-server without persistence of its own.
pub struct Server {
    child: Child,
    port: u16,
    // Only removed with the server; a source keeps its data set elsewhere.
    _home: TempDir,
}

impl Server {
    /// An empty server.
    pub fn start() -> Result<Server> {
        Server::start_with(&[])
    }

    /// A server with further configuration, as name and value.
    pub fn start_with(config: &[(&str, &str)]) -> Result<Server> {
        let home = TempDir::with_prefix("redis-migration-bench-")?;
        // Between choosing a port and the server binding it, another process may take it.
        for _ in 0..5 {
            let port = free_port()?;
            let mut child = spawn(home.path(), port, config)?;
            let up = poll("redis-server answers", TICK, Duration::from_secs(120), || {
                if child.try_wait()?.is_some() {
                    return Ok(Some(false));
                }
                let answer = Client::connect(port).and_then(|mut client| client.call(&["PING"]));
                Ok(answer.is_ok().then_some(true))
            });
            match up {
                Ok(true) => return Ok(Server { child, port, _home: home }),
                Ok(false) => continue,
                Err(error) => {
                    process::end(&mut child);
                    return Err(error);
                }
            }
        }
        let log = fs::read_to_string(home.path().join("log")).unwrap_or_default();
        bail!("redis-server does not start; its log ends: {}", log.lines().last().unwrap_or("(empty)"))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn client(&self) -> Result<Client> {
        Client::connect(self.port)
    }

    /// CPU that the server used since it started, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        process::cpu_seconds(self.child.id())
    }

    /// Waits until the replicas of an earlier measurement are gone, and with them the child that saved for them.
    pub fn settle(&self) -> Result<()> {
        let mut client = self.client()?;
        poll("the source is at rest", TICK, Duration::from_secs(60), || {
            let saving = client.info("persistence", "rdb_bgsave_in_progress")? != "0";
            let replicas = client.info("replication", "connected_slaves")? != "0";
            Ok((!saving && !replicas).then_some(()))
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        process::end(&mut self.child);
    }
}

/// Where data goes: one server, or a cluster of three masters.
pub struct Target {
    pub nodes: Vec<Server>,
}

impl Target {
    /// An empty standalone server.
    pub fn standalone() -> Result<Target> {
        Ok(Target { nodes: vec![Server::start()?] })
    }

    /// Three empty masters that agree that every slot is covered.
    pub fn cluster() -> Result<Target> {
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..3 {
            let bus = free_port()?;
            let config = [
                ("cluster-enabled", "yes"),
                ("cluster-port", &bus.to_string()),
                ("cluster-node-timeout", "5000"),
            ];
            nodes.push(Server::start_with(&config)?);
            buses.push(bus.to_string());
        }
        for (index, (node, range)) in nodes.iter().zip(SLOTS).enumerate() {
            let mut client = node.client()?;
            client.call(&["CLUSTER", "ADDSLOTSRANGE", range.0, range.1])?;
            // Equal epochs would be resolved by the servers, but only after seconds.
            client.call(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()])?;
            if index > 0 {
                let first = nodes.first().map(Server::port).unwrap_or_default().to_string();
                let bus = buses.first().map(String::as_str).unwrap_or_default();
                client.call(&["CLUSTER", "MEET", "127.0.0.1", &first, bus])?;
            }
        }
        for node in &nodes {
            let mut client = node.client()?;
            poll("the cluster covers all slots", TICK, Duration::from_secs(30), || {
                let text = client.call(&["CLUSTER", "INFO"])?.into_bytes()?;
                let text = String::from_utf8_lossy(&text).into_owned();
                let ready = text.contains("cluster_state:ok") && text.contains("cluster_known_nodes:3");
                Ok(ready.then_some(()))
            })?;
        }
        Ok(Target { nodes })
    }

    pub fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(Server::port).collect()
    }

    /// CPU of all nodes since they started, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.nodes.iter().map(Server::cpu_seconds).sum()
    }

    /// Fails unless the target holds exactly the data of `source` (database 0), by the servers' own digest.
    ///
    /// DEBUG DIGEST starts from a constant and XORs one digest a key (Redis 7.0 debug.c,
    /// computeDatasetDigest), so the XOR over an odd number of nodes, none of them empty, is the
    /// digest of their union.
    pub fn must_equal(&self, source: &Server) -> Result<()> {
        let (mut keys, mut digest) = (0, [0u8; 40]);
        for (index, node) in self.nodes.iter().enumerate() {
            remove_checkpoints(node)?;
            let held = dbsize(node)?;
            if held == 0 && self.nodes.len() > 1 {
                bail!("127.0.0.1:{} holds no key", node.port());
            }
            keys += held;
            let part = digest_of(node)?;
            if index == 0 {
                digest.copy_from_slice(&part);
            } else {
                xor_hex(&mut digest, &part);
            }
        }
        let expected = dbsize(source)?;
        if keys != expected {
            bail!("the target has {keys} keys, the source {expected}");
        }
        if digest != digest_of(source)? {
            bail!("the target has as many keys as the source, but their digests differ");
        }
        Ok(())
    }
}

const SLOTS: [(&str, &str); 3] = [("0", "5460"), ("5461", "10922"), ("10923", "16383")];

/// Keys of a server's database 0.
pub fn dbsize(server: &Server) -> Result<i64> {
    match server.client()?.call(&["DBSIZE"])? {
        crate::client::Reply::Integer(keys) => Ok(keys),
        other => bail!("DBSIZE answered {other:?}"),
    }
}

fn digest_of(server: &Server) -> Result<[u8; 40]> {
    let text = server.client()?.call(&["DEBUG", "DIGEST"])?.into_bytes()?;
    text.try_into().map_err(|_| anyhow::anyhow!("DEBUG DIGEST did not answer 40 digits"))
}

fn xor_hex(digest: &mut [u8; 40], other: &[u8; 40]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let value = |digit: u8| (digit as char).to_digit(16).unwrap_or(0) as usize;
    for (left, right) in digest.iter_mut().zip(other) {
        *left = DIGITS[(value(*left) ^ value(*right)) & 15];
    }
}

/// A stopped tool leaves its checkpoint so that it could go on; that is no difference of the data.
fn remove_checkpoints(node: &Server) -> Result<()> {
    let mut client = node.client()?;
    let mut cursor = b"0".to_vec();
    loop {
        let mut page = client
            .call(&[b"SCAN".as_slice(), &cursor, b"MATCH", b"redis-migration:*", b"COUNT", b"100000"])?
            .into_array()?
            .into_iter();
        cursor = page.next().context("SCAN without cursor")?.into_bytes()?;
        for key in page.next().context("SCAN without keys")?.into_array()? {
            client.call(&[b"DEL".as_slice(), &key.into_bytes()?])?;
        }
        if cursor == b"0" {
            return Ok(());
        }
    }
}

fn spawn(home: &Path, port: u16, config: &[(&str, &str)]) -> Result<Child> {
    let program = std::env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
    let mut command = Command::new(&program);
    command.args([
        "--port",
        &port.to_string(),
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
    ]);
    command.args(["--save", "", "--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"]);
    // A replica that is slow is to show in the figures, not to be cut off.
    command.args(["--client-output-buffer-limit", "replica 0 0 0"]);
    command.arg("--logfile").arg(home.join("log"));
    if !config.iter().any(|(name, _)| *name == "dir") {
        command.arg("--dir").arg(home);
    }
    for (name, value) in config {
        command.arg(format!("--{name}")).arg(value);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().with_context(|| format!("start {program} (package redis-server, or REDIS_SERVER=path)"))
}

/// A port that nobody listened on a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Reply;
    use crate::workload;

    fn copy_key(from: &mut Client, to: &mut Client, key: &[u8]) -> Result<Reply> {
        let Reply::Integer(left) = from.call(&[b"PTTL", key])? else { bail!("PTTL did not answer a number") };
        let payload = from.call(&[b"DUMP", key])?.into_bytes()?;
        to.call(&[b"RESTORE", key, left.max(0).to_string().as_bytes(), &payload])
    }

    /// What every row's correctness rests on: a whole copy passes, one changed value or lost key does not.
    #[test]
    fn a_cluster_equals_its_source_until_one_value_differs() {
        let source = Server::start().unwrap();
        workload::fill(source.port(), 0.0002).unwrap();
        let target = Target::cluster().unwrap();
        let mut nodes: Vec<Client> = target.nodes.iter().map(|node| node.client().unwrap()).collect();
        let mut client = source.client().unwrap();
        for key in client.call(&["KEYS", "*"]).unwrap().into_array().unwrap() {
            let key = key.into_bytes().unwrap();
            // The node that owns the slot takes it, the others answer MOVED.
            let taken: usize =
                nodes.iter_mut().map(|node| usize::from(copy_key(&mut client, node, &key).is_ok())).sum();
            assert_eq!(taken, 1);
        }
        target.must_equal(&source).unwrap();

        client.call(&["SET", "str:1", "changed"]).unwrap();
        let error = target.must_equal(&source).unwrap_err().to_string();
        assert!(error.contains("digests differ"), "{error}");

        assert_eq!(client.call(&["DEL", "str:1"]).unwrap(), Reply::Integer(1));
        let error = target.must_equal(&source).unwrap_err().to_string();
        assert!(error.contains("keys"), "{error}");
    }
}
