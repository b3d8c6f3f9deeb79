//! Reading back, writing first and removing at last what a migration keeps in its target.

use std::collections::BTreeMap;

use super::keys::{KeyNames, PREFIX, Record, TERRITORY_SLOTS, Territory, parse_guard};
use super::wipe::{PAGE, page};
use crate::clock::unix_millis;
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::{Next, Reply, ReplyVerdict};
use crate::slot::SlotRanges;
use crate::topology::ServerInfo;

/// Slots asked about in one go.
const SLOTS_AT_ONCE: usize = 512;
/// More keys than this are not those of migrations alone.
const OWN_KEYS: u64 = 1000;

/// What one node keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    pub records: Vec<Record>,
    /// Several for a slot where there are several databases.
    pub guards: Vec<Guard>,
    pub territories: Vec<Territory>,
    /// Guards may lie behind commands that do not stand; see [`Refusals`].
    pub doubtful: bool,
}

/// Slot, history, offset.
pub type Guard = (u16, u64, i64);

/// Reads what a node keeps for this shard. `slots`: those that it serves; `None` on a single server. The
/// connection is in any database afterwards.
pub async fn read(
    connection: &mut Connection,
    dialer: &Dialer,
    names: &KeyNames,
    slots: Option<&SlotRanges>,
) -> Result<NodeState, ConnectionError> {
    let mut state = NodeState::default();
    // Of those under one name, one a database, the last one counts.
    let mut records: BTreeMap<u16, Record> = BTreeMap::new();
    for db in databases_with(connection, slots).await? {
        if db > 0 || slots.is_none() {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
        }
        match slots {
            None => {
                let reply = connection.query(&[b"GET", &names.at(0)]).await?;
                if let Some(record) = reply.bytes().and_then(|value| Record::parse(value)) {
                    keep_newest(&mut records, 0, record);
                }
                let reply = connection.query(&[b"GET", &names.territory(0)]).await?;
                state.territories.extend(reply.bytes().and_then(|value| Territory::parse(value)));
            }
            Some(slots) => {
                read_slots(connection, dialer, names, slots, (&mut records, &mut state.guards)).await?;
                for slot in TERRITORY_SLOTS.into_iter().filter(|slot| slots.contains(*slot)) {
                    let key = names.territory(slot);
                    let reply = connection.call(&[b"GET", &key]).await?;
                    let found = value(connection, dialer, &key, &reply).await?;
                    state.territories.extend(found.and_then(|value| Territory::parse(&value)));
                }
            }
        }
    }
    state.records = records.into_values().collect();
    Ok(state)
}

async fn read_slots(
    connection: &mut Connection,
    dialer: &Dialer,
    names: &KeyNames,
    slots: &SlotRanges,
    (records, guards): (&mut BTreeMap<u16, Record>, &mut Vec<Guard>),
) -> Result<(), ConnectionError> {
    let all: Vec<u16> = slots.iter().collect();
    for chunk in all.chunks(SLOTS_AT_ONCE) {
        for &slot in chunk {
            connection.queue(&[b"GET".as_slice(), &names.at(slot)]);
            connection.queue(&[b"GET".as_slice(), &names.guard(slot)]);
        }
        connection.send_queued().await?;
        // Every reply is taken before one of them ends this.
        let mut replies = Vec::with_capacity(2 * chunk.len());
        for _ in 0..2 * chunk.len() {
            replies.push(connection.receive().await?);
        }
        for (&slot, pair) in chunk.iter().zip(replies.chunks(2)) {
            if let Some(reply) = pair.first() {
                let found = value(connection, dialer, &names.at(slot), reply).await?;
                if let Some(record) = found.and_then(|value| Record::parse(&value)) {
                    keep_newest(records, slot, record);
                }
            }
            if let Some(reply) = pair.get(1) {
                let found = value(connection, dialer, &names.guard(slot), reply).await?;
                let guard = found.and_then(|value| parse_guard(&value));
                guards.extend(guard.map(|(history, offset)| (slot, history, offset)));
            }
        }
    }
    Ok(())
}

fn keep_newest(records: &mut BTreeMap<u16, Record>, slot: u16, record: Record) {
    let key = |record: &Record| (record.history, record.layout, record.order());
    if records.get(&slot).is_none_or(|kept| key(kept) < key(&record)) {
        records.insert(slot, record);
    }
}

/// The value in the reply to `GET key`; a key of a slot on the move may be at the slot's next owner.
async fn value(
    connection: &Connection,
    dialer: &Dialer,
    key: &[u8],
    reply: &Reply,
) -> Result<Option<Vec<u8>>, ConnectionError> {
    let text = match reply {
        Reply::Error(text) => text,
        reply => return Ok(reply.bytes().map(|bytes| bytes.to_vec())),
    };
    let ReplyVerdict::Ask { address, .. } = ReplyVerdict::of(text) else {
        return Err(ConnectionError::from_reply(connection.address(), b"GET", text));
    };
    let mut there = dialer.connect(&address.or_host_of(connection.address())).await?;
    there.query(&[b"ASKING"]).await?;
    let reply = there.query(&[b"GET", key]).await?;
    Ok(reply.bytes().map(|bytes| bytes.to_vec()))
}

/// What a node of a cluster tells of commands that it refused for a moment. It may have taken a later one then, whose
/// guard says that both stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusals {
    /// Since its start; `None`: it does not count them, or not all (before Redis 6.2).
    count: Option<u64>,
    uptime_seconds: Option<u64>,
    run_id: String,
    /// One that was promoted does not know what the master before it refused.
    promoted: bool,
    replication_id: String,
}

impl Refusals {
    pub async fn ask(connection: &mut Connection) -> Result<Self, ConnectionError> {
        Ok(Self::parse(&connection.query_text(&[b"INFO"]).await?))
    }

    fn parse(text: &str) -> Self {
        let (mut count, mut uptime_seconds) = (None, None);
        for line in text.lines() {
            let line = line.trim();
            if line.eq_ignore_ascii_case("# errorstats") {
                count = Some(0);
            }
            let Some((name, value)) = line.split_once(':') else { continue };
            if name == "uptime_in_seconds" {
                uptime_seconds = value.parse().ok();
            }
            let Some(code) = name.strip_prefix("errorstat_") else { continue };
            if code.starts_with("ERRORSTATS") {
                count = None;
                break;
            }
            if is_momentary(code) {
                let times: u64 =
                    value.strip_prefix("count=").and_then(|times| times.parse().ok()).unwrap_or(1);
                count = count.map(|count| count + times);
            }
        }
        let ServerInfo { run_id, replication_id, former_replication_id, .. } = ServerInfo::parse(text);
        let promoted = !former_replication_id.is_empty();
        Self { count, uptime_seconds, run_id, promoted, replication_id }
    }

    /// True when there may have been some since `since` (Unix ms).
    pub fn any_since(&self, since: u64) -> bool {
        let age = unix_millis().saturating_sub(since) / 1000;
        self.count != Some(0) || self.promoted || self.uptime_seconds.is_none_or(|uptime| uptime < age)
    }

    /// True when there may have been some since it told `before`.
    pub fn any_after(&self, before: &Self) -> bool {
        let history = |told: &Self| (told.run_id.clone(), told.replication_id.clone());
        self.count.is_none() || self.count != before.count || history(self) != history(before)
    }
}

/// Of a slot that is moving, some commands are refused and others are not, though not with MOVED: for that it
/// would have to go and come back.
fn is_momentary(code: &str) -> bool {
    let next = ReplyVerdict::of(code.as_bytes()).next();
    code == "ASK" || matches!(next, Next::RetryLater | Next::RetryUntilOperator)
}

async fn info(connection: &mut Connection) -> Result<ServerInfo, ConnectionError> {
    Ok(ServerInfo::parse(&connection.query_text(&[b"INFO", b"keyspace"]).await?))
}

/// Databases that may hold anything, in ascending order: those with keys, and 0, of which not every server (Kvrocks)
/// counts them.
pub(super) async fn databases(connection: &mut Connection) -> Result<Vec<u64>, ConnectionError> {
    Ok(or_uncounted(&info(connection).await?))
}

fn or_uncounted(info: &ServerInfo) -> Vec<u64> {
    let counted = info.keyspace.iter().map(|(db, _)| *db).filter(|db| *db > 0);
    std::iter::once(0).chain(counted).collect()
}

/// The same; of a node of a cluster, all of which count their keys, those that have any.
async fn databases_with(
    connection: &mut Connection,
    slots: Option<&SlotRanges>,
) -> Result<Vec<u64>, ConnectionError> {
    match slots {
        None => databases(connection).await,
        Some(_) => Ok(info(connection).await?.keyspace.into_iter().map(|(db, _)| db).collect()),
    }
}

/// True when a node holds no data: no key, or none but what migrations keep for themselves. `single`: it is
/// no node of a cluster, where old versions refuse SELECT, even of 0.
pub async fn is_empty(connection: &mut Connection, single: bool) -> Result<bool, ConnectionError> {
    let info = info(connection).await?;
    if info.keys() > OWN_KEYS {
        return Ok(false);
    }
    for db in or_uncounted(&info) {
        if db > 0 || single {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
        }
        let mut cursor = b"0".to_vec();
        loop {
            let reply = connection.query(&[b"SCAN", &cursor, b"COUNT", PAGE]).await?;
            let Some((next, keys)) = page(&reply) else { return Err(connection.unexpected(b"SCAN")) };
            if keys.iter().any(|key| !key.starts_with(PREFIX)) {
                return Ok(false);
            }
            if next == b"0" {
                break;
            }
            cursor = next.to_vec();
        }
    }
    Ok(true)
}

/// What is removed in one go. The epochs of all shards go last: whoever finds any record left finds its epoch as
/// well, and so whether it was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Records,
    Epochs,
}

/// Removes what this shard kept on a node.
pub async fn remove(
    dialer: &Dialer,
    address: &Address,
    names: &KeyNames,
    slots: Option<&SlotRanges>,
    part: Part,
) -> Result<(), ConnectionError> {
    let mut connection = dialer.connect(address).await?;
    for db in databases_with(&mut connection, slots).await? {
        if db > 0 || slots.is_none() {
            connection.query(&[b"SELECT", db.to_string().as_bytes()]).await?;
        }
        let all: Vec<u16> = slots.map_or_else(|| vec![0], |slots| slots.iter().collect());
        for chunk in all.chunks(SLOTS_AT_ONCE) {
            for &slot in chunk {
                if part == Part::Epochs {
                    connection.queue(&[b"DEL".as_slice(), &names.epoch(slot)]);
                    continue;
                }
                let [at, guard, territory] = &[names.at(slot), names.guard(slot), names.territory(slot)];
                let chain = if slots.is_none() { names.chain() } else { guard.clone() };
                connection.queue(&[b"DEL".as_slice(), at, guard, territory, &chain]);
            }
            connection.send_queued().await?;
            for _ in chunk {
                if let Reply::Error(text) = connection.receive().await? {
                    let error = ConnectionError::from_reply(connection.address(), b"DEL", &text);
                    // A slot that is just moving: its keys stay, and are ours to nobody's harm.
                    if ReplyVerdict::of(&text).next() != Next::Reroute {
                        return Err(error);
                    }
                    tracing::warn!(%error, "a key of the migration stays on the target");
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(errors: &str) -> Refusals {
        Refusals::parse(&format!(
            "# Server\r\nrun_id:a\r\nuptime_in_seconds:100\r\n# Errorstats\r\n{errors}\r\n"
        ))
    }

    #[test]
    fn refusals_that_pass_are_told_from_others() {
        let since = |age_s: u64| unix_millis() - age_s * 1000;
        for code in ["OOM", "MISCONF", "CLUSTERDOWN", "NOREPLICAS", "TRYAGAIN", "ASK", "ERRORSTATS_OVERFLOW"]
        {
            assert!(told(&format!("errorstat_{code}:count=1")).any_since(since(50)), "{code}");
        }
        for code in ["ERR", "MOVED", "WRONGTYPE", "NOSCRIPT", "EXECABORT"] {
            assert!(!told(&format!("errorstat_{code}:count=1")).any_since(since(50)), "{code}");
        }
        assert!(!told("").any_since(since(50)));
        assert!(told("").any_since(since(200)), "it was started again since");
        assert!(told("master_replid2:8d1b5ba4a0b0d2a0a3b1").any_since(since(50)), "it was promoted");
        assert!(!told(&format!("master_replid2:{}", "0".repeat(40))).any_since(since(50)));
        assert!(Refusals::parse("uptime_in_seconds:100\r\n").any_since(since(50)), "too old to say");
    }

    #[test]
    fn what_happened_between_two_looks_is_seen() {
        let before = told("errorstat_OOM:count=7\r\nerrorstat_ERR:count=1");
        assert!(!told("errorstat_OOM:count=7\r\nerrorstat_ERR:count=9").any_after(&before));
        assert!(told("errorstat_OOM:count=8").any_after(&before));
        assert!(told("errorstat_OOM:count=7\r\nerrorstat_ASK:count=1").any_after(&before));
        assert!(told("errorstat_OOM:count=7\r\nrun_id:b").any_after(&before));
        assert!(told("errorstat_OOM:count=7\r\nmaster_replid:b").any_after(&before));
        let old = Refusals::parse("run_id:a\r\n");
        assert!(old.any_after(&old));
    }
}
