//! The nodes of a cluster out of CLUSTER NODES and CLUSTER SLOTS. Source of the formats:
//! `clusterGenNodeDescription` and `clusterReplyMultiBulkSlots` in cluster.c of Redis 3.0 to 8.2 and Valkey 9.1.

use thiserror::Error;

use crate::connection::Address;
use crate::resp::Reply;
use crate::slot::{SLOT_COUNT, SlotRanges};

/// Clusters beyond this many nodes do not exist; the text is from the network.
const MAX_NODES: usize = 20_000;

/// One node as another one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNode {
    pub id: String,
    /// Host empty: the host that was asked. Port 0: no address known.
    pub announced: Address,
    /// From 7.0, when the node announces one.
    pub hostname: Option<String>,
    /// The node that was asked.
    pub myself: bool,
    pub master: bool,
    /// Of a replica.
    pub master_id: Option<String>,
    /// Marked `fail` by the cluster, or `fail?` by the node that was asked.
    pub failing: bool,
    /// `handshake` and `noaddr` nodes cannot be used yet, or no more.
    pub usable: bool,
    /// Configuration epoch of the node, of a replica that of its master: who claims a slot with the higher
    /// one has it. 0 where it is not told.
    pub epoch: u64,
    pub slots: SlotRanges,
    /// (slot, id of the node that takes it over); only known for `myself`.
    pub migrating: Vec<(u16, String)>,
    /// (slot, id of the node that still owns it); only known for `myself`.
    pub importing: Vec<(u16, String)>,
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ClusterNodesError {
    #[error("line {line}: {what} is missing")]
    Missing { line: usize, what: &'static str },
    #[error("line {line}: {what} is not understood: {text:?}")]
    Bad { line: usize, what: &'static str, text: String },
    #[error("more than {MAX_NODES} nodes")]
    TooMany,
}

/// Reads the text of CLUSTER NODES.
pub fn parse_cluster_nodes(text: &str) -> Result<Vec<ClusterNode>, ClusterNodesError> {
    let mut nodes = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if nodes.len() == MAX_NODES {
            return Err(ClusterNodesError::TooMany);
        }
        nodes.push(node(line, index + 1)?);
    }
    Ok(nodes)
}

/// Reads the reply of CLUSTER SLOTS, for servers that forbid CLUSTER NODES. Failed nodes and moving
/// slots do not show in it; before 4.0 node ids neither.
pub fn parse_cluster_slots(reply: &Reply) -> Result<Vec<ClusterNode>, ClusterNodesError> {
    let mut nodes: Vec<ClusterNode> = Vec::new();
    for (index, range) in reply.items().iter().enumerate() {
        let line = index + 1;
        let missing = |what| ClusterNodesError::Missing { line, what };
        let slot = |at: usize| range.items().get(at).and_then(Reply::integer).and_then(valid_slot);
        let (Some(first), Some(last)) = (slot(0), slot(1)) else { return Err(missing("slot range")) };
        let mut master_id = None;
        for (place, entry) in range.items().iter().skip(2).enumerate() {
            let entry = entry.items();
            let host = entry.first().and_then(Reply::text).unwrap_or_default();
            let port = entry.get(1).and_then(Reply::integer).and_then(|port| u16::try_from(port).ok());
            let announced = Address::new(host, port.ok_or(missing("port"))?);
            let id = entry.get(2).and_then(Reply::text).map_or_else(|| announced.to_string(), str::to_owned);
            let at = match nodes.iter().position(|known| known.id == id) {
                Some(at) => at,
                None if nodes.len() == MAX_NODES => return Err(ClusterNodesError::TooMany),
                None => {
                    nodes.push(ClusterNode {
                        id: id.clone(),
                        announced,
                        hostname: None,
                        myself: false,
                        master: place == 0,
                        master_id: master_id.clone(),
                        failing: false,
                        usable: true,
                        epoch: 0,
                        slots: SlotRanges::default(),
                        migrating: Vec::new(),
                        importing: Vec::new(),
                    });
                    nodes.len() - 1
                }
            };
            if place == 0 {
                if let Some(master) = nodes.get_mut(at) {
                    master.slots.insert(first, last);
                }
                master_id = Some(id);
            }
        }
    }
    Ok(nodes)
}

/// `<id> <ip:port@cport,hostname> <flags> <master> <ping> <pong> <epoch> <link> <slot> …`
fn node(text: &str, line: usize) -> Result<ClusterNode, ClusterNodesError> {
    let mut words = text.split_ascii_whitespace();
    let mut word = |what| words.next().ok_or(ClusterNodesError::Missing { line, what });
    let id = word("node id")?.to_owned();
    let (announced, hostname) = address(word("address")?, line)?;
    let flags: Vec<&str> = word("flags")?.split(',').collect();
    let master_id = word("master id")?;
    for what in ["ping time", "pong time"] {
        word(what)?;
    }
    let epoch = word("epoch")?.parse().unwrap_or(0);
    word("link state")?;
    let has = |flag: &str| flags.contains(&flag);
    let mut node = ClusterNode {
        id,
        usable: announced.port != 0 && !has("noaddr") && !has("handshake"),
        announced,
        hostname,
        myself: has("myself"),
        master: has("master"),
        master_id: (master_id != "-").then(|| master_id.to_owned()),
        failing: has("fail") || has("fail?"),
        epoch,
        slots: SlotRanges::default(),
        migrating: Vec::new(),
        importing: Vec::new(),
    };
    for word in words {
        slots(word, line, &mut node)?;
    }
    Ok(node)
}

/// `ip:port` (3.x), `ip:port@cport` (4.0), with `,hostname` and further `,name=value` (7.0).
fn address(text: &str, line: usize) -> Result<(Address, Option<String>), ClusterNodesError> {
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let ip_port = first.split_once('@').map_or(first, |(before, _)| before);
    let bad = || ClusterNodesError::Bad { line, what: "address", text: text.to_owned() };
    let announced = Address::parse_announced(ip_port).ok_or_else(bad)?;
    let hostname = parts.next().filter(|name| !name.is_empty() && !name.contains('=')).map(str::to_owned);
    Ok((announced, hostname))
}

/// `5`, `0-5460`, `[5->-id]` or `[5-<-id]`.
fn slots(word: &str, line: usize, node: &mut ClusterNode) -> Result<(), ClusterNodesError> {
    let bad = || ClusterNodesError::Bad { line, what: "slots", text: word.to_owned() };
    let slot = |text: &str| text.parse().ok().and_then(valid_slot).ok_or_else(bad);
    if let Some(moving) = word.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        if let Some((number, to)) = moving.split_once("->-") {
            node.migrating.push((slot(number)?, to.to_owned()));
        } else if let Some((number, from)) = moving.split_once("-<-") {
            node.importing.push((slot(number)?, from.to_owned()));
        } else {
            return Err(bad());
        }
        return Ok(());
    }
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    node.slots.insert(slot(first)?, slot(last)?);
    Ok(())
}

fn valid_slot(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|slot| *slot < SLOT_COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use proptest::prelude::*;

    #[test]
    fn lines_of_every_age() {
        let nodes = parse_cluster_nodes(
            "aa 10.0.0.1:6379 myself,master - 0 0 1 connected 0-5460 5462 [5461->-bb] [9-<-cc]\n\
             bb 10.0.0.2:6379@16379 master,fail? - 0 1 2 connected 5461-10922\n\
             cc :7000@17000,cache-3.example master - 0 1 3 connected 10923-16383\n\
             dd 10.0.0.4:6379@16379,,tls-port=0,shard-id=xy slave aa 0 1 1 connected\n\
             ee :0@0 master,fail,noaddr - 1 1 4 disconnected\n",
        )
        .unwrap();
        assert_eq!(nodes[0].slots.to_string(), "0-5460,5462");
        assert_eq!(nodes[0].migrating, [(5461, "bb".to_owned())]);
        assert_eq!(nodes[0].importing, [(9, "cc".to_owned())]);
        assert_eq!((nodes[0].epoch, nodes[2].epoch), (1, 3));
        assert!(nodes[0].myself && nodes[0].usable && !nodes[0].failing);
        assert!(nodes[1].failing && nodes[1].usable);
        assert_eq!(
            (nodes[2].announced.host.as_str(), nodes[2].hostname.as_deref()),
            ("", Some("cache-3.example"))
        );
        assert_eq!(
            (nodes[3].master, nodes[3].master_id.as_deref(), &nodes[3].hostname),
            (false, Some("aa"), &None)
        );
        assert!(!nodes[4].usable);
    }

    #[test]
    fn faults_name_the_line() {
        let fault = |text: &str| parse_cluster_nodes(text).unwrap_err();
        assert_eq!(fault("aa\n"), ClusterNodesError::Missing { line: 1, what: "address" });
        let line = "aa 10.0.0.1:6379 master - 0 0 1 connected";
        assert!(matches!(fault(&format!("{line}\n{line} 16384")), ClusterNodesError::Bad { line: 2, .. }));
        assert!(matches!(fault(&format!("{line} [5-x-bb]")), ClusterNodesError::Bad { what: "slots", .. }));
    }

    #[test]
    fn cluster_slots_with_ids_and_without() {
        let wire = b"*2\r\n*4\r\n:0\r\n:8191\r\n*3\r\n$9\r\n127.0.0.1\r\n:7000\r\n$2\r\naa\r\n*3\r\n$-1\r\n:7001\r\n$2\r\nbb\r\n\
                     *3\r\n:8192\r\n:16383\r\n*2\r\n$0\r\n\r\n:7002\r\n";
        let reply = crate::resp::parse_reply(&mut BytesMut::from(&wire[..])).unwrap().unwrap();
        let nodes = parse_cluster_slots(&reply).unwrap();
        assert_eq!(nodes.len(), 3);
        assert_eq!(nodes[0].slots.to_string(), "0-8191");
        assert_eq!((nodes[1].master, nodes[1].master_id.as_deref()), (false, Some("aa")));
        assert_eq!((nodes[2].announced.host.as_str(), nodes[2].slots.count()), ("", 8192));
    }

    proptest! {
        #[test]
        fn any_text_ends_in_a_value_or_an_error(text in "[a-z0-9:@, \\[\\]<>\\-\n]{0,200}") {
            let _ = parse_cluster_nodes(&text);
        }
    }
}
