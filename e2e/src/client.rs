//! Commands to a standalone server or to the masters of a cluster, through the `redis` crate.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use redis::{
    Client as RedisClient, ConnectionAddr, ConnectionLike, IntoConnectionInfo, ProtocolVersion,
    RedisConnectionInfo, Value,
};

use crate::Version;

/// Where a server, or any node of a cluster, listens, and who asks.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `host:port`
    pub address: String,
    pub cluster: bool,
    /// User (empty: the default one) and password.
    pub auth: Option<(String, String)>,
}

/// One connection.
pub struct Conn {
    inner: redis::Connection,
    pub address: String,
}

impl Conn {
    pub fn open(address: &str, auth: Option<&(String, String)>) -> Result<Self> {
        let (host, port) = address.rsplit_once(':').context("address without a port")?;
        let mut settings =
            RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        if let Some((user, password)) = auth {
            if !user.is_empty() {
                settings = settings.set_username(user);
            }
            settings = settings.set_password(password);
        }
        let info = ConnectionAddr::Tcp(host.to_owned(), port.parse()?)
            .into_connection_info()?
            .set_redis_settings(settings);
        let inner = RedisClient::open(info)?
            .get_connection_with_timeout(Duration::from_secs(5))
            .with_context(|| format!("connecting to {address}"))?;
        inner.set_read_timeout(Some(Duration::from_secs(60)))?;
        inner.set_write_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { inner, address: address.to_owned() })
    }

    /// One command; an error reply is an error.
    pub fn run(&mut self, words: &[&[u8]]) -> Result<Value> {
        let mut batch = Batch::default();
        batch.add(words);
        match self.pipeline(&batch)?.pop() {
            Some(Value::ServerError(error)) => {
                let name = String::from_utf8_lossy(words.first().copied().unwrap_or_default()).into_owned();
                bail!("{name} to {}: {} {}", self.address, error.code(), error.details().unwrap_or_default())
            }
            Some(value) => Ok(value),
            None => bail!("no reply from {}", self.address),
        }
    }

    pub fn text(&mut self, words: &[&[u8]]) -> Result<String> {
        Ok(String::from_utf8_lossy(&bytes(&self.run(words)?)).into_owned())
    }

    pub fn number(&mut self, words: &[&[u8]]) -> Result<i64> {
        self.text(words)?.parse().context("not a number")
    }

    /// All commands at once; error replies stay in the answers.
    pub fn pipeline(&mut self, batch: &Batch) -> Result<Vec<Value>> {
        if batch.count == 0 {
            return Ok(Vec::new());
        }
        self.inner
            .req_packed_commands(&batch.bytes, 0, batch.count)
            .with_context(|| format!("talking to {}", self.address))
    }

    pub fn select(&mut self, database: u32) -> Result<()> {
        self.run(args!["SELECT", database.to_string()]).map(drop)
    }

    /// A field of INFO.
    pub fn info(&mut self, section: &str, field: &str) -> Result<Option<String>> {
        let text = self.text(args!["INFO", section])?;
        Ok(text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .map(|v| v.trim().to_owned()))
    }

    pub fn version(&mut self) -> Result<Version> {
        let (name, text) = match self.info("server", "valkey_version")? {
            Some(text) => ("valkey", text),
            None => ("redis", self.info("server", "redis_version")?.context("INFO without a version")?),
        };
        format!("{name}-{text}").parse()
    }
}

/// Commands as they go over the wire, one after the other.
#[derive(Default)]
pub struct Batch {
    pub bytes: Vec<u8>,
    pub count: usize,
}

impl Batch {
    pub fn add(&mut self, words: &[&[u8]]) {
        self.bytes.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            self.bytes.extend_from_slice(word);
            self.bytes.extend_from_slice(b"\r\n");
        }
        self.count += 1;
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
    }
}

/// A standalone server, or a cluster with a connection to each master.
pub struct Client {
    pub nodes: Vec<Conn>,
    /// Node of each slot; empty when standalone.
    owners: Vec<u16>,
    pub version: Version,
}

impl Client {
    pub fn open(endpoint: &Endpoint) -> Result<Self> {
        let auth = endpoint.auth.as_ref();
        let mut first = Conn::open(&endpoint.address, auth)?;
        let version = first.version()?;
        if !endpoint.cluster {
            return Ok(Self { nodes: vec![first], owners: Vec::new(), version });
        }
        let mut nodes: Vec<Conn> = Vec::new();
        let mut owners = vec![u16::MAX; 16_384];
        for range in array(&first.run(args!["CLUSTER", "SLOTS"])?) {
            let range = array(&range);
            let [from, to, master, ..] = range.as_slice() else { bail!("odd CLUSTER SLOTS") };
            let master = array(master);
            let [host, port, ..] = master.as_slice() else { bail!("odd CLUSTER SLOTS") };
            let address = format!("{}:{}", text(host), text(port));
            let node = match nodes.iter().position(|node| node.address == address) {
                Some(node) => node,
                None => {
                    nodes.push(Conn::open(&address, auth)?);
                    nodes.len() - 1
                }
            };
            let (from, to): (usize, usize) = (text(from).parse()?, text(to).parse()?);
            owners.get_mut(from..=to).context("slots out of range")?.fill(node as u16);
        }
        Ok(Self { nodes, owners, version })
    }

    pub fn is_cluster(&self) -> bool {
        !self.owners.is_empty()
    }

    /// The index in `nodes` of the one that serves this key.
    pub fn node_of(&self, key: &[u8]) -> Result<usize> {
        if self.owners.is_empty() {
            return Ok(0);
        }
        let node = self.owners.get(slot(key) as usize).copied().map_or(usize::MAX, usize::from);
        if node >= self.nodes.len() {
            bail!("slot {} is not served", slot(key))
        }
        Ok(node)
    }

    /// The connection that serves this key.
    pub fn on(&mut self, key: &[u8]) -> Result<&mut Conn> {
        let node = self.node_of(key)?;
        self.nodes.get_mut(node).context("no such node")
    }

    /// Database of the commands that follow; a cluster has only database 0.
    pub fn select(&mut self, database: u32) -> Result<()> {
        if self.is_cluster() && database == 0 {
            return Ok(());
        }
        self.nodes.iter_mut().try_for_each(|node| node.select(database))
    }
}

/// Cluster slot of a key: CRC16/XMODEM of its hash tag, or of all of it (Redis Cluster specification).
pub fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|&b| b == b'{').and_then(|open| {
        let rest = key.get(open + 1..)?;
        let close = rest.iter().position(|&b| b == b'}')?;
        rest.get(..close).filter(|tag| !tag.is_empty())
    });
    let crc = tag.unwrap_or(key).iter().fold(0_u16, |crc, &byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    });
    crc % 16_384
}

/// The bytes of a reply that is a string or a number; empty for nil.
pub fn bytes(value: &Value) -> Vec<u8> {
    match value {
        Value::BulkString(bytes) => bytes.clone(),
        Value::SimpleString(text) => text.clone().into_bytes(),
        Value::Int(number) => number.to_string().into_bytes(),
        Value::Okay => b"OK".to_vec(),
        _ => Vec::new(),
    }
}

pub fn text(value: &Value) -> String {
    String::from_utf8_lossy(&bytes(value)).into_owned()
}

/// The elements of an array reply; none for anything else.
pub fn array(value: &Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items.clone(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_follow_the_specification() {
        assert_eq!(slot(b"123456789"), 0x31c3);
        assert_eq!(slot(b"{user1000}.following"), slot(b"user1000"));
        assert_eq!(slot(b"foo{{bar}}zap"), slot(b"{bar"));
        assert_ne!(slot(b"foo{}{bar}"), slot(b"bar"));
    }
}
