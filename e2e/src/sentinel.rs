//! Sentinels that watch one master.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::{Conn, Options, Server, Version, wait_until};

pub struct Sentinels {
    pub nodes: Vec<Server>,
    pub name: String,
}

/// How patient the sentinels are.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Silence after which a server counts as down.
    pub down_after: Duration,
    /// Half of the least time between two failovers that they decide on.
    pub failover_timeout: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { down_after: Duration::from_millis(1500), failover_timeout: Duration::from_secs(6) }
    }
}

impl Sentinels {
    /// As many sentinels watch `master` under this name; a majority decides. Returns once each knows
    /// the master, its replicas and the other sentinels.
    pub fn start(
        version: Version,
        count: usize,
        name: &str,
        master: &Server,
        replicas: usize,
    ) -> Result<Self> {
        Self::start_with(version, count, name, master, replicas, Timing::default())
    }

    pub fn start_with(
        version: Version,
        count: usize,
        name: &str,
        master: &Server,
        replicas: usize,
        timing: Timing,
    ) -> Result<Self> {
        let Timing { down_after, failover_timeout } = timing;
        let quorum = count / 2 + 1;
        let nodes = (0..count)
            .map(|_| {
                let mut options = Options::new(version)
                    .sentinel()
                    .with("sentinel monitor", &format!("{name} 127.0.0.1 {} {quorum}", master.port))
                    .with("sentinel down-after-milliseconds", &format!("{name} {}", down_after.as_millis()))
                    .with("sentinel failover-timeout", &format!("{name} {}", failover_timeout.as_millis()));
                if let Some((_, password)) = master.endpoint().auth {
                    options = options.with("sentinel auth-pass", &format!("{name} {password}"));
                }
                options.start()
            })
            .collect::<Result<Vec<_>>>()?;
        let sentinels = Self { nodes, name: name.to_owned() };
        wait_until("sentinels that know each other", Duration::from_secs(40), || {
            for node in &sentinels.nodes {
                let line = node.conn()?.info("sentinel", "master0")?.unwrap_or_default();
                let all = line.contains("status=ok")
                    && line.contains(&format!("slaves={replicas},"))
                    && line.ends_with(&format!("sentinels={count}"));
                if !all {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        Ok(sentinels)
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(Server::address).collect()
    }

    /// Port of the master that the first sentinel answers with.
    pub fn master_port(&self) -> Result<u16> {
        let Some(node) = self.nodes.first() else { bail!("no sentinel") };
        let answer = node.conn()?.run(args!["SENTINEL", "get-master-addr-by-name", self.name])?;
        match crate::client::array(&answer).as_slice() {
            [_, port] => Ok(crate::client::text(port).parse()?),
            _ => bail!("no master of that name"),
        }
    }

    /// Makes a replica the master, and waits until the sentinels say so.
    pub fn fail_over(&self) -> Result<u16> {
        let before = self.master_port()?;
        let Some(node) = self.nodes.first() else { bail!("no sentinel") };
        let mut conn: Conn = node.conn()?;
        wait_until("a failover that starts", Duration::from_secs(20), || {
            conn.run(args!["SENTINEL", "failover", self.name]).map(Some)
        })?;
        wait_until("another master", Duration::from_secs(40), || {
            Ok(Some(self.master_port()?).filter(|&port| port != before))
        })
    }
}
