//! Servers of a benchmark, on top of the test harness: what a measurement needs to know of them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use e2e::{Cluster, Endpoint, Options, Version};

use crate::client::{Client, Reply, poll};
use crate::process;

const TICK: Duration = Duration::from_millis(5);

/// The version that the figures are promised for.
pub const VERSION: Version = Version::REDIS_7_0;

/// One running server, stopped when dropped.
pub struct Server(e2e::Server);

impl Server {
    /// An empty server.
    pub fn start() -> Result<Server> {
        Ok(Server(options().start()?))
    }

    /// A server that has loaded this RDB file.
    pub fn holding(snapshot: &Path) -> Result<Server> {
        let server = Server(options().snapshot(snapshot).without_waiting().start()?);
        poll("the server has loaded its data", Duration::from_millis(20), Duration::from_secs(120), || {
            let loading = server.client()?.info("persistence", "loading")?;
            Ok((loading == "0").then_some(()))
        })?;
        Ok(server)
    }

    pub fn port(&self) -> u16 {
        self.0.port
    }

    pub fn endpoint(&self) -> Endpoint {
        self.0.endpoint()
    }

    pub fn client(&self) -> Result<Client> {
        Client::connect(self.port())
    }

    /// Writes an RDB file that lives as long as the server, and says where.
    pub fn save(&self) -> Result<PathBuf> {
        self.0.save()
    }

    /// CPU that the server used since it started, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        process::cpu_seconds(self.0.pid().context("the server has ended")?)
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
        // DEBUG DIGEST of two million keys keeps a node silent for longer than others wait by default.
        let nodes = Cluster::start_with(options().with("cluster-node-timeout", "60000"), 3, 0)?.nodes;
        Ok(Target { nodes: nodes.into_iter().map(Server).collect() })
    }

    /// By way of the first node.
    pub fn endpoint(&self) -> Result<Endpoint> {
        let first = self.nodes.first().context("a target without nodes")?.endpoint();
        Ok(Endpoint { cluster: self.nodes.len() > 1, ..first })
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

/// A replica that is slow is to show in the figures, not to be cut off.
fn options() -> Options {
    Options::new(VERSION).with("client-output-buffer-limit", "replica 0 0 0")
}

/// Keys of a server's database 0.
pub fn dbsize(server: &Server) -> Result<i64> {
    match server.client()?.call(&["DBSIZE"])? {
        Reply::Integer(keys) => Ok(keys),
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

#[cfg(test)]
mod tests {
    use super::*;
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
