//! A cluster of three masters with a replica each.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::PATIENCE;
use super::deployment::{How, leave_behind, revive, wait_role};
use crate::{Cluster, Options, Server, wait_until};

const MASTERS: usize = 3;

pub struct Shards {
    pub cluster: Cluster,
}

/// A line of CLUSTER NODES.
#[derive(Clone, Debug)]
pub struct Member {
    pub id: String,
    pub port: u16,
    /// Id of its master; a master has none.
    pub master: Option<String>,
    pub slots: Vec<(u16, u16)>,
}

impl Member {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [id, address, _flags, master, _ping, _pong, _epoch, _link, slots @ ..] = words.as_slice() else {
            return None;
        };
        // Before 4.0 without the port of the bus.
        let port = address.split('@').next()?.rsplit_once(':')?.1.parse().ok()?;
        let range = |word: &&str| -> Option<(u16, u16)> {
            // Slots on the move are listed once more, in brackets.
            let (from, to) = word.split_once('-').unwrap_or((word, word));
            Some((from.parse().ok()?, to.parse().ok()?))
        };
        Some(Self {
            id: (*id).to_owned(),
            port,
            master: (*master != "-").then(|| (*master).to_owned()),
            slots: slots.iter().filter_map(range).collect(),
        })
    }

    pub fn serves(&self, slot: u16) -> bool {
        self.slots.iter().any(|(from, to)| (*from..=*to).contains(&slot))
    }
}

impl Shards {
    pub fn start(options: Options) -> Result<Self> {
        let options = options
            .with("cluster-node-timeout", "1000")
            .with("cluster-replica-validity-factor", "0")
            .with("cluster-allow-replica-migration", "no");
        Ok(Self { cluster: Cluster::start_with(options, MASTERS, 1)? })
    }

    /// As the first node that runs sees it.
    pub fn members(&self) -> Result<Vec<Member>> {
        let node = self.cluster.nodes.iter().find(|node| node.pid().is_some()).context("no node runs")?;
        let text = node.conn()?.text(args!["CLUSTER", "NODES"])?;
        Ok(text.lines().filter_map(Member::parse).collect())
    }

    /// Those that serve slots, by their lowest one.
    pub fn masters(&self) -> Result<Vec<Member>> {
        let mut masters = self.members()?;
        masters.retain(|member| member.master.is_none() && !member.slots.is_empty());
        masters.sort_by_key(|member| member.slots.clone());
        Ok(masters)
    }

    pub fn server(&self, port: u16) -> Result<&Server> {
        self.cluster.nodes.iter().find(|node| node.port == port).context("a node that is none of ours")
    }

    pub fn ready(&mut self) -> Result<()> {
        self.cluster.nodes.iter_mut().try_for_each(revive)?;
        wait_until("a replica for each master", PATIENCE, || {
            self.cluster.wait_ready()?;
            let members = self.members()?;
            let masters = self.masters()?;
            let complete = masters.len() == MASTERS
                && masters.iter().all(|m| members.iter().any(|r| r.master.as_ref() == Some(&m.id)));
            Ok(complete.then_some(()))
        })
    }

    pub fn fail_over(
        &mut self,
        how: How,
        pick: u64,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.ready()?;
        let masters = self.masters()?;
        let master = masters.get(pick as usize % masters.len().max(1)).context("no master")?;
        let replica = self.members()?.into_iter().find(|member| member.master.as_ref() == Some(&master.id));
        let replica = replica.context("a master without a replica")?.port;
        match how {
            How::Asked => self.promote(replica, None)?,
            How::Forced(word) => self.promote(replica, Some(word))?,
            How::Crash | How::Behind => return self.crash(how, master.port, replica, meanwhile),
        }
        meanwhile()
    }

    fn promote(&self, replica: u16, word: Option<&str>) -> Result<()> {
        let server = self.server(replica)?;
        wait_until("a promoted replica", PATIENCE, || {
            let mut words: Vec<&[u8]> = vec![b"CLUSTER", b"FAILOVER"];
            words.extend(word.map(str::as_bytes));
            let asked = server.conn()?.run(&words);
            match wait_role(server, "master", Duration::from_secs(6)) {
                Ok(()) => Ok(Some(())),
                // Asked again: an election can fail.
                Err(error) => asked.and(Err(error)),
            }
        })
    }

    fn crash(
        &mut self,
        how: How,
        master: u16,
        replica: u16,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        if how == How::Behind {
            leave_behind(self.server(replica)?)?;
            meanwhile()?;
        }
        let at = self.cluster.nodes.iter().position(|node| node.port == master);
        let at = at.context("a node that is none of ours")?;
        if let Some(node) = self.cluster.nodes.get_mut(at) {
            node.kill();
        }
        // Only then may the old one come back: before, it would be an empty master of its slots.
        let promoted = wait_role(self.server(replica)?, "master", PATIENCE);
        promoted.with_context(|| format!("after the end of port {master}"))?;
        self.server(replica)?.conn()?.run(args!["CONFIG", "SET", "masterauth", ""])?;
        if how != How::Behind {
            meanwhile()?;
        }
        self.cluster.nodes.get_mut(at).map_or(Ok(()), revive)
    }
}

/// A slot on its way from one master to another, as redis-cli moves it.
pub struct SlotMove {
    slot: u16,
    from: Member,
    to: Member,
}

impl SlotMove {
    /// Both sides know; from now on the old one redirects whoever asks for a key it does not have.
    pub fn begin(shards: &Shards, slot: u16, pick: u64) -> Result<Self> {
        let masters = shards.masters()?;
        let at = masters.iter().position(|master| master.serves(slot)).context("an unserved slot")?;
        ensure!(masters.len() > 1, "nowhere to move a slot to");
        let other = (at + 1 + pick as usize % (masters.len() - 1)) % masters.len();
        let (Some(from), Some(to)) = (masters.get(at).cloned(), masters.get(other).cloned()) else {
            bail!("no two masters");
        };
        let moved = Self { slot, from, to };
        let slot = slot.to_string();
        let mut conn = shards.server(moved.to.port)?.conn()?;
        conn.run(args!["CLUSTER", "SETSLOT", slot, "IMPORTING", moved.from.id])?;
        let mut conn = shards.server(moved.from.port)?.conn()?;
        conn.run(args!["CLUSTER", "SETSLOT", slot, "MIGRATING", moved.to.id])?;
        Ok(moved)
    }

    /// Moves up to so many keys; `false` when none is left.
    pub fn advance(&self, shards: &Shards, keys: usize) -> Result<bool> {
        let mut conn = shards.server(self.from.port)?.conn()?;
        let slot = self.slot.to_string();
        let listed = conn.run(args!["CLUSTER", "GETKEYSINSLOT", slot, keys.to_string()])?;
        let listed: Vec<Vec<u8>> = crate::client::array(&listed).iter().map(crate::client::bytes).collect();
        if listed.is_empty() {
            return Ok(false);
        }
        let port = self.to.port.to_string();
        let mut words: Vec<&[u8]> =
            vec![b"MIGRATE", b"127.0.0.1", port.as_bytes(), b"", b"0", b"5000", b"KEYS"];
        words.extend(listed.iter().map(Vec::as_slice));
        conn.run(&words).with_context(|| format!("moving slot {slot}"))?;
        Ok(true)
    }

    /// Moves what is left, and tells every master. `false`: a failover came between, which loses the
    /// keys of a slot on the move whatever the tool does.
    pub fn finish(&self, shards: &Shards) -> Result<bool> {
        let masters = shards.masters()?;
        let still = |member: &Member| masters.iter().any(|master| master.id == member.id);
        if !still(&self.from)
            || !still(&self.to)
            || !masters.iter().any(|m| m.id == self.from.id && m.serves(self.slot))
        {
            return Ok(false);
        }
        while self.advance(shards, 50)? {}
        // The new owner first, so that the slot never has none.
        for id in [&self.to.id, &self.from.id] {
            let member = masters.iter().find(|master| master.id == *id).context("no such master")?;
            self.assign(shards, member)?;
        }
        for member in masters.iter().filter(|master| ![&self.to.id, &self.from.id].contains(&&master.id)) {
            self.assign(shards, member)?;
        }
        self.agree(shards, &masters)?;
        Ok(true)
    }

    /// Two masters with the same epoch may give a slot back to each other, and each then names the other for ever.
    fn agree(&self, shards: &Shards, masters: &[Member]) -> Result<()> {
        wait_until("masters that agree on a slot", PATIENCE, || {
            for member in masters {
                let mut conn = shards.server(member.port)?.conn()?;
                let text = conn.text(args!["CLUSTER", "NODES"])?;
                let owner = text.lines().filter_map(Member::parse).find(|found| found.serves(self.slot));
                if owner.is_some_and(|owner| owner.id == self.to.id) {
                    continue;
                }
                if member.id == self.to.id {
                    let slot = self.slot.to_string();
                    conn.run(args!["CLUSTER", "SETSLOT", slot, "IMPORTING", self.from.id])?;
                }
                self.assign(shards, member)?;
                return Ok(None);
            }
            Ok(Some(()))
        })
    }

    fn assign(&self, shards: &Shards, member: &Member) -> Result<()> {
        let mut conn = shards.server(member.port)?.conn()?;
        conn.run(args!["CLUSTER", "SETSLOT", self.slot.to_string(), "NODE", self.to.id]).map(drop)
    }
}
