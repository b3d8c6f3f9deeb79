//! The servers of one side: started once, made ready again for each run, and broken on purpose.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Shape;
use super::shards::Shards;
use super::watched::Watched;
use crate::{Client, Conn, Endpoint, Options, Server, Version, wait_until};

const VERSION: Version = Version::REDIS_7_0;

/// Which end of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Source,
    Target,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// How a replica takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As an operator asks for it, nothing being lost in a cluster.
    Asked,
    /// CLUSTER FAILOVER FORCE or TAKEOVER.
    Forced(&'static str),
    /// The master is killed.
    Crash,
    /// It is killed while its replica lacks what was written last.
    Behind,
}

pub enum Deployment {
    Standalone(Server),
    Watched(Watched),
    Cluster(Shards),
}

impl Deployment {
    pub fn start(side: Side, shape: Shape) -> Result<Self> {
        // Short limits make short runs: a dead or silent peer is noticed within seconds.
        let options = Options::new(VERSION)
            .with("repl-backlog-size", "64mb")
            .with("repl-timeout", "5")
            .with("repl-ping-replica-period", "1");
        let started = match shape {
            Shape::Standalone if side == Side::Target => {
                let options = options.with("appendonly", "yes").with("appendfsync", "always");
                Self::Standalone(options.start()?)
            }
            Shape::Standalone => Self::Standalone(options.start()?),
            Shape::Sentinel => Self::Watched(Watched::start(side.name(), options)?),
            Shape::Cluster => Self::Cluster(Shards::start(options)?),
        };
        Ok(started)
    }

    pub fn servers(&self) -> &[Server] {
        match self {
            Self::Standalone(server) => std::slice::from_ref(server),
            Self::Watched(watched) => &watched.servers,
            Self::Cluster(shards) => &shards.cluster.nodes,
        }
    }

    pub fn finder(&self) -> Finder {
        Finder {
            cluster: matches!(self, Self::Cluster(_)),
            servers: self.servers().iter().map(Server::address).collect(),
            sentinel: match self {
                Self::Watched(watched) => watched.sentinel_address(),
                _ => None,
            },
        }
    }

    /// All servers run, masters are agreed upon and every replica is linked to its own.
    pub fn ready(&mut self) -> Result<()> {
        match self {
            Self::Standalone(server) => revive(server),
            Self::Watched(watched) => watched.ready(),
            Self::Cluster(shards) => shards.ready(),
        }
    }

    /// Empty and as it was started, for another run.
    pub fn reset(&mut self) -> Result<()> {
        for server in self.servers() {
            if server.pid().is_some() {
                usual_settings(server)?;
            }
        }
        self.ready()?;
        for node in &mut self.finder().client()?.nodes {
            node.run(args!["FLUSHALL"])?;
            node.run(args!["FUNCTION", "FLUSH"])?;
        }
        Ok(())
    }

    /// Lets a replica take over from the master that `pick` chooses, and brings that one back as its
    /// replica. `meanwhile` runs while the replica is cut off, or the master away.
    pub fn fail_over(
        &mut self,
        how: How,
        pick: u64,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        match self {
            // Without a replica it is the server itself that comes back, with what it kept.
            Self::Standalone(server) => {
                server.kill();
                let result = meanwhile();
                revive(server).and(result)
            }
            Self::Watched(watched) => watched.fail_over(how, meanwhile),
            Self::Cluster(shards) => shards.fail_over(how, pick, meanwhile),
        }
    }

    /// Sets a configuration on every running server.
    pub fn configure(&self, name: &str, value: &str) -> Result<()> {
        for server in self.servers().iter().filter(|server| server.pid().is_some()) {
            server.conn()?.run(args!["CONFIG", "SET", name, value])?;
        }
        Ok(())
    }
}

/// Settings that faults change and that must not outlive them.
fn usual_settings(server: &Server) -> Result<()> {
    let mut conn = server.conn()?;
    for (name, value) in [
        ("maxmemory", "0"),
        ("masterauth", ""),
        ("rdb-key-save-delay", "0"),
        ("repl-diskless-sync", "yes"),
        ("repl-backlog-size", "64mb"),
    ] {
        conn.run(args!["CONFIG", "SET", name, value])?;
    }
    Ok(())
}

pub(super) fn revive(server: &mut Server) -> Result<()> {
    if server.pid().is_some() { Ok(()) } else { server.restart() }
}

/// Cuts a replica off from its master without the master noticing why: it cannot log in again.
pub(super) fn leave_behind(replica: &Server) -> Result<()> {
    let mut conn = replica.conn()?;
    conn.run(args!["CONFIG", "SET", "masterauth", "astray"])?;
    conn.run(args!["CLIENT", "KILL", "TYPE", "master"]).map(drop)
}

pub(super) fn wait_role(server: &Server, role: &str, timeout: Duration) -> Result<()> {
    wait_until(&format!("the server on port {} to be {role}", server.port), timeout, || {
        let found = role_of(&mut server.conn()?)?;
        Ok((found == role).then_some(()))
    })
}

pub(super) fn role_of(conn: &mut Conn) -> Result<String> {
    let reply = crate::client::array(&conn.run(args!["ROLE"])?);
    Ok(reply.first().map(crate::client::text).unwrap_or_default())
}

/// Finds who is master now, from another thread too.
#[derive(Clone)]
pub struct Finder {
    cluster: bool,
    servers: Vec<String>,
    /// Address of the Sentinel.
    sentinel: Option<String>,
}

impl Finder {
    pub fn endpoint(&self) -> Result<Endpoint> {
        let address = match &self.sentinel {
            Some(sentinel) => self.watched(sentinel)?,
            None if self.cluster => self.member()?,
            None => self.servers.first().cloned().context("no server")?,
        };
        Ok(Endpoint { address, cluster: self.cluster, auth: None })
    }

    pub fn client(&self) -> Result<Client> {
        Client::open(&self.endpoint()?)
    }

    fn watched(&self, sentinel: &str) -> Result<String> {
        let reply = Conn::open(sentinel, None)?.run(args![
            "SENTINEL",
            "get-master-addr-by-name",
            super::watched::NAME
        ])?;
        let reply: Vec<String> = crate::client::array(&reply).iter().map(crate::client::text).collect();
        let address = reply.join(":");
        // The Sentinel may be ahead of the server, or behind it.
        if role_of(&mut Conn::open(&address, None)?)? != "master" {
            bail!("{address} is not the master yet");
        }
        Ok(address)
    }

    /// A node that sees all slots served.
    fn member(&self) -> Result<String> {
        for address in &self.servers {
            let state = Conn::open(address, None).and_then(|mut node| node.text(args!["CLUSTER", "INFO"]));
            if state.is_ok_and(|state| state.contains("cluster_state:ok")) {
                return Ok(address.clone());
            }
        }
        bail!("no node sees a complete cluster")
    }
}
