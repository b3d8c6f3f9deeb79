//! A cluster of real servers.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::{array, text};
use crate::{Client, Endpoint, Options, Server, Version, wait_until};

const READY: Duration = Duration::from_secs(40);

pub struct Cluster {
    /// Masters first, each with a share of the slots in order; then the replicas, first those of the first master.
    pub nodes: Vec<Server>,
    pub masters: usize,
}

impl Cluster {
    pub fn start(version: Version, masters: usize, replicas_each: usize) -> Result<Self> {
        Self::start_with(Options::new(version), masters, replicas_each)
    }

    /// Every node with these options (with TLS, `tls-cluster` among them); with a fixed port, the nodes take that one and the next ones.
    pub fn start_with(options: Options, masters: usize, replicas_each: usize) -> Result<Self> {
        let cluster = Self::start_unassigned(options, masters, replicas_each)?;
        let share = |master: usize| master * 16_384 / masters;
        for (i, node) in cluster.nodes.iter().take(masters).enumerate() {
            let slots: Vec<String> = (share(i)..share(i + 1)).map(|slot| slot.to_string()).collect();
            let mut words: Vec<&[u8]> = vec![b"CLUSTER", b"ADDSLOTS"];
            words.extend(slots.iter().map(String::as_bytes));
            node.conn()?.run(&words)?;
        }
        cluster.attach_replicas(replicas_each)?;
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// Nodes that know each other and serve no slot.
    pub fn start_unassigned(options: Options, masters: usize, replicas_each: usize) -> Result<Self> {
        ensure!(masters > 0, "a cluster needs a master");
        // What the caller sets comes later in the file, and so holds.
        let options = options
            .before("cluster-enabled", "yes")
            .before("cluster-config-file", "nodes.conf")
            .before("cluster-node-timeout", "5000");
        let count = masters * (1 + replicas_each);
        let nodes = (0..count)
            .map(|i| match options.fixed_port() {
                Some(port) => options.clone().port(port + i as u16).start(),
                None => options.clone().start(),
            })
            .collect::<Result<Vec<_>>>()?;
        let cluster = Self { nodes, masters };
        // With TLS between the nodes it is the TLS port that the bus port is counted from.
        let first = cluster.nodes.first().context("no node")?;
        let first = first.tls_port.unwrap_or(first.port).to_string();
        for (i, node) in cluster.nodes.iter().enumerate() {
            let mut conn = node.conn()?;
            // Epochs of their own from the start: otherwise nodes spend seconds settling who has which.
            conn.run(args!["CLUSTER", "SET-CONFIG-EPOCH", (i + 1).to_string()])?;
            if i > 0 {
                conn.run(args!["CLUSTER", "MEET", "127.0.0.1", first])?;
            }
        }
        wait_until("nodes that know each other", READY, || {
            for node in &cluster.nodes {
                let nodes = node.conn()?.text(args!["CLUSTER", "NODES"])?;
                let known =
                    nodes.lines().filter(|line| !line.contains("handshake") && line.contains("connected"));
                if known.count() != count || nodes.contains("disconnected") {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        Ok(cluster)
    }

    /// Another master, which serves this slot; nobody may have keys in it.
    pub fn join(&mut self, options: Options, slot: u16) -> Result<()> {
        let node = options.before("cluster-enabled", "yes").before("cluster-node-timeout", "5000").start()?;
        let first = self.nodes.first().context("no node")?.port.to_string();
        let mut conn = node.conn()?;
        conn.run(args!["CLUSTER", "SET-CONFIG-EPOCH", "1000"])?;
        conn.run(args!["CLUSTER", "MEET", "127.0.0.1", first])?;
        let id = conn.text(args!["CLUSTER", "MYID"])?;
        wait_until("a node that all know", READY, || {
            let knows = |node: &Server| {
                Ok::<_, anyhow::Error>(node.conn()?.text(args!["CLUSTER", "NODES"])?.contains(&id))
            };
            let knows: Vec<bool> = self.nodes.iter().map(knows).collect::<Result<_>>()?;
            Ok(knows.into_iter().all(|knows| knows).then_some(()))
        })?;
        self.nodes.insert(self.masters, node);
        self.masters += 1;
        for node in self.nodes.iter().take(self.masters).rev() {
            node.conn()?.run(args!["CLUSTER", "SETSLOT", slot.to_string(), "NODE", id])?;
        }
        self.wait_ready()
    }

    pub fn version(&self) -> Option<Version> {
        self.nodes.first().map(|node| node.version)
    }

    /// By way of the first node.
    pub fn endpoint(&self) -> Endpoint {
        let mut endpoint = self
            .nodes
            .first()
            .map_or_else(|| Endpoint { address: String::new(), cluster: true, auth: None }, Server::endpoint);
        endpoint.cluster = true;
        endpoint
    }

    pub fn client(&self) -> Result<Client> {
        Client::open(&self.endpoint())
    }

    /// Every slot served, every node of one mind about it, every replica linked.
    pub fn wait_ready(&self) -> Result<()> {
        wait_until("a complete cluster", READY, || {
            let mut views = Vec::new();
            for node in &self.nodes {
                let mut conn = node.conn()?;
                if !conn.text(args!["CLUSTER", "INFO"])?.contains("cluster_state:ok") {
                    return Ok(None);
                }
                let mut view: Vec<String> = array(&conn.run(args!["CLUSTER", "SLOTS"])?)
                    .iter()
                    .map(|range| {
                        let range = array(range);
                        let nodes: Vec<String> =
                            range.iter().skip(2).filter_map(|node| array(node).get(1).map(text)).collect();
                        let ends: Vec<String> = range.iter().take(2).map(text).collect();
                        // The master leads; replicas have no order.
                        let (master, replicas) =
                            nodes.split_first().map(|(m, r)| (m.clone(), r.to_vec())).unwrap_or_default();
                        let mut replicas = replicas;
                        replicas.sort();
                        format!("{} {master} {}", ends.join("-"), replicas.join(","))
                    })
                    .collect();
                view.sort();
                views.push(view);
                if conn.info("replication", "master_link_status")?.is_some_and(|status| status != "up") {
                    return Ok(None);
                }
            }
            views.dedup();
            Ok((views.len() == 1).then_some(()))
        })
    }

    fn attach_replicas(&self, each: usize) -> Result<()> {
        let (masters, replicas) = self.nodes.split_at(self.masters);
        for (i, replica) in replicas.iter().enumerate() {
            let master = masters.get(i / each.max(1)).context("more replicas than masters can have")?;
            let nodes = master.conn()?.text(args!["CLUSTER", "NODES"])?;
            let id =
                nodes.lines().find(|line| line.contains("myself")).and_then(|line| line.split(' ').next());
            let id = id.context("a node that does not know itself")?;
            let mut conn = replica.conn()?;
            wait_until("a replica that knows its master", READY, || {
                conn.run(args!["CLUSTER", "REPLICATE", id]).map(Some)
            })?;
        }
        Ok(())
    }
}
