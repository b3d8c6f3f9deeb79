//! One of the two deployments that are compared, and a task's own connections to its nodes:
//! opened when first needed, routed by slot, redirected where slots moved.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use super::VerifyError;
use super::frame::{Elements, Frame};
use super::wire::Wire;
use crate::connection::{Address, Dialer};
use crate::resp::{Next, ReplyVerdict};
use crate::slot;
use crate::version::ServerVersion;

/// Source or target of a verification.
#[derive(Clone)]
pub struct Deployment {
    pub dialer: Dialer,
    pub version: ServerVersion,
    /// Never empty. More than one only in a cluster.
    pub nodes: Vec<NodeShare>,
    /// True: keys are routed by slot, also when one node holds all of them.
    pub cluster: bool,
}

/// One node that is read, and the slots that it answers for.
#[derive(Clone, Debug)]
pub struct NodeShare {
    pub address: Address,
    /// Ignored outside a cluster.
    pub slots: Vec<RangeInclusive<u16>>,
    /// True: a replica is read, which in a cluster wants READONLY first.
    pub replica: bool,
}

pub(super) const ATTEMPTS: u32 = 8;
const MAX_REDIRECTIONS: usize = 5;
const SLOTS: usize = 16384;

/// Waits between attempts: 50 ms, doubled up to 3.2 s.
pub(super) async fn back_off(attempt: u32) {
    let millis = 50u64 << attempt.min(6);
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

/// True for an error reply that says something about the value. All others concern the node or our
/// rights: two sides that refuse the same command must not pass for equal.
pub(super) fn is_answer(text: &[u8]) -> bool {
    // A consumer group or, to XINFO, a key that is gone by now.
    text.starts_with(b"NOGROUP")
        || text.starts_with(b"ERR no such key")
        || ReplyVerdict::of(text) == ReplyVerdict::WrongType
}

pub(super) struct Side {
    pub deployment: Deployment,
    /// Replaced as a whole when slots moved; held for a clone of the pointer only.
    layout: RwLock<Arc<Layout>>,
}

struct Layout {
    nodes: Vec<NodeShare>,
    /// Slot → index of the node; empty outside a cluster.
    table: Vec<u16>,
}

impl Layout {
    fn new(nodes: Vec<NodeShare>, cluster: bool) -> Self {
        let mut table = Vec::new();
        if cluster {
            table = vec![0; SLOTS];
            for (index, node) in nodes.iter().enumerate() {
                for slot in node.slots.iter().cloned().flatten() {
                    if let Some(entry) = table.get_mut(usize::from(slot)) {
                        *entry = index as u16;
                    }
                }
            }
        }
        Self { nodes, table }
    }

    fn node_of(&self, key: &[u8]) -> usize {
        if self.table.is_empty() {
            return 0;
        }
        let slot = usize::from(slot::slot(key));
        self.table.get(slot).copied().map_or(0, usize::from)
    }
}

impl Side {
    pub fn new(deployment: Deployment) -> Self {
        let layout = Layout::new(deployment.nodes.clone(), deployment.cluster);
        Self { deployment, layout: RwLock::new(Arc::new(layout)) }
    }

    /// How many nodes are scanned. The nodes a scan visits are those the verification began with.
    pub fn nodes(&self) -> usize {
        self.deployment.nodes.len()
    }

    pub fn links(self: &Arc<Self>, db: u64) -> Links {
        let layout = self.layout();
        let wires = layout.nodes.iter().map(|_| None).collect();
        Links { side: Arc::clone(self), layout, db, wires, detours: BTreeMap::new() }
    }

    fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    async fn open(&self, node: &NodeShare, db: u64) -> Result<Wire, VerifyError> {
        let connection = self.deployment.dialer.connect(&node.address).await?;
        let (stream, received, address) = connection.into_parts();
        let mut wire = Wire::new(stream, received, address);
        if self.deployment.version.has_redis(7, 2) {
            // Reading must not make cold keys look hot to eviction; forbidden is fine.
            wire.call(&[&b"CLIENT"[..], b"NO-TOUCH", b"ON"]).await?;
        }
        if node.replica && self.deployment.cluster {
            expect_ok(&mut wire, &[b"READONLY"]).await?;
        }
        if db != 0 {
            let number = db.to_string();
            expect_ok(&mut wire, &[b"SELECT", number.as_bytes()]).await?;
        }
        Ok(wire)
    }
}

async fn expect_ok(wire: &mut Wire, args: &[&[u8]]) -> Result<(), VerifyError> {
    let refusal = match wire.call(args).await? {
        Frame::Error(text) => text.to_vec(),
        _ => return Ok(()),
    };
    Err(VerifyError::refused(wire.address(), args.first().copied().unwrap_or_default(), &refusal))
}

/// A task's own connections to one side, all in one database.
pub(super) struct Links {
    side: Arc<Side>,
    layout: Arc<Layout>,
    db: u64,
    /// Indexed as the layout's nodes are.
    wires: Vec<Option<Wire>>,
    /// Nodes that only redirections named.
    detours: BTreeMap<Address, Wire>,
}

impl Links {
    pub fn version(&self) -> ServerVersion {
        self.side.deployment.version
    }

    pub fn is_cluster(&self) -> bool {
        self.side.deployment.cluster
    }

    pub fn node_of(&self, key: &[u8]) -> usize {
        self.layout.node_of(key)
    }

    /// Opens every connection that is not open or was left in the middle of a batch, so that
    /// [`Links::wire`] has them all.
    pub async fn open_all(&mut self) -> Result<(), VerifyError> {
        for index in 0..self.layout.nodes.len() {
            self.open(index).await?;
        }
        Ok(())
    }

    pub async fn open(&mut self, index: usize) -> Result<&mut Wire, VerifyError> {
        let (Some(place), Some(node)) = (self.wires.get_mut(index), self.layout.nodes.get(index)) else {
            return Err(VerifyError::NoNode);
        };
        match place {
            Some(wire) if wire.is_idle() => {}
            _ => *place = Some(self.side.open(node, self.db).await?),
        }
        place.as_mut().ok_or(VerifyError::NoNode)
    }

    /// As `open`, while gathering a batch: commands may be queued already, but not sent.
    pub async fn open_busy(&mut self, index: usize) -> Result<&mut Wire, VerifyError> {
        let gathering = matches!(self.wires.get(index), Some(Some(wire)) if wire.is_gathering());
        if gathering { self.wire(index) } else { self.open(index).await }
    }

    /// A connection that `open` or `open_all` made.
    pub fn wire(&mut self, index: usize) -> Result<&mut Wire, VerifyError> {
        self.wires.get_mut(index).and_then(Option::as_mut).ok_or(VerifyError::NoNode)
    }

    pub async fn send_all(&mut self) -> Result<(), VerifyError> {
        for wire in self.wires.iter_mut().flatten() {
            wire.send().await?;
        }
        Ok(())
    }

    /// Forgets every connection, as after a failure nobody knows which replies are still to come,
    /// and takes up what others found out about the slots.
    pub fn reset(&mut self) {
        self.layout = self.side.layout();
        self.wires = self.layout.nodes.iter().map(|_| None).collect();
        self.detours.clear();
    }

    /// For a reply about `key` that is of another kind than `command` has.
    pub fn unexpected(&self, key: &[u8], command: &'static str) -> VerifyError {
        match self.layout.nodes.get(self.node_of(key)) {
            Some(node) => VerifyError::Unexpected { address: node.address.clone(), command },
            None => VerifyError::NoNode,
        }
    }

    /// One command about `key` to whoever holds it now; follows redirections, waits out states that
    /// pass, reconnects. `read` turns the reply into a value; an error reply it sees is one that
    /// [`is_answer`] lets through.
    pub async fn ask<T: Send>(
        &mut self,
        key: &[u8],
        args: &[&[u8]],
        read: impl Fn(Frame<'_>) -> T + Send + Sync,
    ) -> Result<T, VerifyError> {
        let mut redirected: Option<(Address, bool)> = None;
        let mut redirections = 0;
        let mut attempt = 0;
        loop {
            let verdict = match self.ask_once(key, args, &redirected, &read).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(verdict)) => verdict,
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    self.reset();
                    redirected = None;
                    back_off(attempt).await;
                    attempt += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let asked = match &redirected {
                Some((address, _)) => Some(address.clone()),
                None => self.layout.nodes.get(self.node_of(key)).map(|node| node.address.clone()),
            };
            let announced = |address: Address| match &asked {
                Some(asked) => address.or_host_of(asked),
                None => address,
            };
            redirections += 1;
            redirected = match verdict {
                ReplyVerdict::Moved { address, .. } if redirections <= MAX_REDIRECTIONS => {
                    let address = announced(address);
                    self.refresh(&address).await;
                    Some((address, false))
                }
                ReplyVerdict::Ask { address, .. } if redirections <= MAX_REDIRECTIONS => {
                    Some((announced(address), true))
                }
                _ if attempt < ATTEMPTS => {
                    back_off(attempt).await;
                    attempt += 1;
                    redirections = 0;
                    None
                }
                _ => return Err(VerifyError::NoOwner { key: super::keys::printable(key) }),
            };
        }
    }

    async fn ask_once<T: Send>(
        &mut self,
        key: &[u8],
        args: &[&[u8]],
        redirected: &Option<(Address, bool)>,
        read: &(impl Fn(Frame<'_>) -> T + Send + Sync),
    ) -> Result<Result<T, ReplyVerdict>, VerifyError> {
        let (wire, asking) = match redirected {
            Some((address, asking)) => (self.detour(address).await?, *asking),
            None => (self.open(self.node_of(key)).await?, false),
        };
        if asking {
            wire.queue(&[b"ASKING"]);
        }
        wire.queue(args);
        wire.send().await?;
        if asking {
            wire.reply().await?;
        }
        let refusal = match wire.reply().await? {
            Frame::Error(text) => {
                let verdict = ReplyVerdict::of(text);
                match verdict.next() {
                    Next::Reroute | Next::RetryLater => return Ok(Err(verdict)),
                    _ if is_answer(text) => return Ok(Ok(read(Frame::Error(text)))),
                    _ => text.to_vec(),
                }
            }
            frame => return Ok(Ok(read(frame))),
        };
        Err(VerifyError::refused(wire.address(), args.first().copied().unwrap_or_default(), &refusal))
    }

    async fn detour(&mut self, address: &Address) -> Result<&mut Wire, VerifyError> {
        let stale = self.detours.get(address).is_none_or(|wire| !wire.is_idle());
        if stale {
            let node = NodeShare { address: address.clone(), slots: Vec::new(), replica: false };
            let wire = self.side.open(&node, self.db).await?;
            self.detours.insert(address.clone(), wire);
        }
        self.detours.get_mut(address).ok_or(VerifyError::NoNode)
    }

    /// Learns from a node that knows better who holds which slot. Failing is harmless: each key is
    /// redirected by itself then.
    async fn refresh(&mut self, address: &Address) {
        let known = self.layout.nodes.clone();
        let side = Arc::clone(&self.side);
        let Ok(wire) = self.detour(address).await else { return };
        let Ok(reply) = wire.call(&[&b"CLUSTER"[..], b"SLOTS"]).await else { return };
        let Frame::Array(Some(ranges)) = reply else { return };
        let dialer = side.deployment.dialer.clone();
        let reachable = |announced: Address| dialer.reachable(&announced.or_host_of(address));
        if let Some(nodes) = owners(ranges, known, reachable) {
            let layout = Arc::new(Layout::new(nodes, true));
            *side.layout.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&layout);
            // Indexes of known nodes stay, so open connections keep their place.
            self.wires.resize_with(layout.nodes.len(), || None);
            self.layout = layout;
        }
    }
}

/// CLUSTER SLOTS: `[first, last, [host, port, id, …], replicas…]` per range. Nodes keep their index;
/// those that are new come behind.
fn owners(
    mut ranges: Elements<'_>,
    mut nodes: Vec<NodeShare>,
    reachable: impl Fn(Address) -> Address,
) -> Option<Vec<NodeShare>> {
    // Replicas are read by choice of address; the table names masters, which are left aside then.
    if nodes.iter().any(|node| node.replica) {
        return None;
    }
    nodes.iter_mut().for_each(|node| node.slots.clear());
    while let Some(Frame::Array(Some(mut range))) = ranges.next_frame().ok()? {
        let Some(Frame::Integer(first)) = range.next_frame().ok()? else { return None };
        let Some(Frame::Integer(last)) = range.next_frame().ok()? else { return None };
        let Some(Frame::Array(Some(mut master))) = range.next_frame().ok()? else { return None };
        let host = String::from_utf8_lossy(master.next_bulk().ok()??).into_owned();
        let Some(Frame::Integer(port)) = master.next_frame().ok()? else { return None };
        let address = reachable(Address { host, port: u16::try_from(port).ok()? });
        let slots = u16::try_from(first).ok()?..=u16::try_from(last).ok()?;
        match nodes.iter_mut().find(|node| node.address == address) {
            Some(node) => node.slots.push(slots),
            None => nodes.push(NodeShare { address, slots: vec![slots], replica: false }),
        }
    }
    Some(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(port: u16, slots: RangeInclusive<u16>) -> NodeShare {
        NodeShare { address: Address { host: "h".into(), port }, slots: vec![slots], replica: false }
    }

    #[test]
    fn only_what_is_said_about_a_value_is_an_answer() {
        for text in ["WRONGTYPE Operation against", "NOGROUP No such key", "ERR no such key"] {
            assert!(is_answer(text.as_bytes()), "{text}");
        }
        for text in ["ERR unknown command 'DUMP'", "NOPERM this user", "LOADING", "MOVED 1 a:1", "ERR other"]
        {
            assert!(!is_answer(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn moved_slots_keep_the_indexes_of_known_nodes() {
        let reply = b"*2\r\n*3\r\n:0\r\n:99\r\n*3\r\n$0\r\n\r\n:2\r\n$1\r\nx\r\n*3\r\n:100\r\n:16383\r\n*2\r\n$1\r\nh\r\n:3\r\n";
        let (Frame::Array(Some(ranges)), _) = Frame::parse(reply).unwrap() else { panic!("array expected") };
        let known = vec![node(1, 0..=99), node(2, 100..=16383)];
        let nodes = owners(ranges, known, |address| Address { host: "h".into(), ..address }).unwrap();
        let ports: Vec<u16> = nodes.iter().map(|node| node.address.port).collect();
        assert_eq!(ports, [1, 2, 3]);
        let layout = Layout::new(nodes, true);
        assert_eq!(layout.table[5], 1);
        assert_eq!(layout.table[100], 2);
    }
}
