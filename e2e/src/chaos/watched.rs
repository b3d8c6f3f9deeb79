//! A master and its replica, watched by a Sentinel that decides within a second.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::PATIENCE;
use super::deployment::{How, leave_behind, revive, role_of, wait_role};
use crate::sentinel::Timing;
use crate::{Manifest, Options, Sentinels, Server, wait_until};

/// What the Sentinel calls the master.
pub(super) const NAME: &str = "chaos";

pub struct Watched {
    /// Either may be the master.
    pub servers: Vec<Server>,
    sentinels: Sentinels,
}

impl Watched {
    pub fn start(side: &str, options: Options) -> Result<Self> {
        let master = options.clone().start()?;
        let replica = options.start()?;
        replica.conn()?.run(args!["REPLICAOF", "127.0.0.1", master.port.to_string()])?;
        replica.wait_linked()?;
        let timing =
            Timing { down_after: Duration::from_millis(500), failover_timeout: Duration::from_millis(1_500) };
        let sentinels = Sentinels::start_with(master.version, 1, NAME, &master, 1, timing)
            .with_context(|| format!("a Sentinel for the {side}"))?;
        for node in &sentinels.nodes {
            // Otherwise it takes 10 s to see that a demoted master is none, and 8 s to make it a replica.
            for (name, value) in [("info-period", "400"), ("publish-period", "250"), ("ping-period", "150")] {
                node.conn()?.run(args!["SENTINEL", "DEBUG", name, value])?;
            }
        }
        Ok(Self { servers: vec![master, replica], sentinels })
    }

    pub fn sentinel_address(&self) -> Option<String> {
        self.sentinels.addresses().first().cloned()
    }

    pub fn describe(&self, manifest: Manifest, side: &str) -> Manifest {
        manifest.sentinel(side, &self.sentinels)
    }

    pub fn ready(&mut self) -> Result<()> {
        let master = self.sentinels.master_port()?;
        for server in self.servers.iter_mut().filter(|server| server.pid().is_none()) {
            // Its own configuration makes it a master, and it is empty.
            if server.port == master { revive(server)? } else { rejoin(server, master)? }
        }
        wait_until("a master and its linked replica", PATIENCE, || {
            let master = self.sentinels.master_port()?;
            for server in &self.servers {
                let mut conn = server.conn()?;
                let is_master = role_of(&mut conn)? == "master";
                if is_master != (server.port == master) {
                    return Ok(None);
                }
                let (port, link) = (
                    conn.info("replication", "master_port")?,
                    conn.info("replication", "master_link_status")?,
                );
                if !is_master && (port != Some(master.to_string()) || link.as_deref() != Some("up")) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    pub fn fail_over(&mut self, how: How, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.ready()?;
        let before = self.sentinels.master_port()?;
        let at = self.servers.iter().position(|server| server.port == before).context("no master")?;
        let replica = self.servers.get(1 - at).context("no replica")?;
        if how == How::Asked {
            let after = self.sentinels.fail_over()?;
            if after != replica.port {
                bail!("the Sentinel made port {after} the master");
            }
            // The old one goes on as a master of its own until the Sentinel demotes it.
            return meanwhile();
        }
        if how == How::Behind {
            leave_behind(replica)?;
            meanwhile()?;
        }
        if let Some(master) = self.servers.get_mut(at) {
            master.kill();
        }
        let replica = self.servers.get(1 - at).context("no replica")?;
        wait_role(replica, "master", PATIENCE)?;
        replica.conn()?.run(args!["CONFIG", "SET", "masterauth", ""])?;
        let port = replica.port;
        wait_until("the Sentinel to say so", PATIENCE, || {
            Ok(Some(()).filter(|()| self.sentinels.master_port().is_ok_and(|now| now == port)))
        })?;
        if how != How::Behind {
            meanwhile()?;
        }
        self.servers.get_mut(at).map_or(Ok(()), |old| rejoin(old, port))
    }
}

/// Comes back as a replica: as a master it would be an empty one.
fn rejoin(server: &mut Server, master: u16) -> Result<()> {
    server.restart_with("replicaof", &format!("127.0.0.1 {master}"))
}
