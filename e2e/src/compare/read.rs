//! Reads everything a deployment holds into a form that two of them can be compared by.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use redis::Value;

use crate::client::{array, bytes, text};
use crate::{Batch, Client, Conn};

/// Keys asked about at once: large enough to be quick, small enough that the clock read around a
/// batch tells when its expiry times were answered.
const KEYS: usize = 256;

/// Keys of the engine's own, which are no data.
const OWN: &[u8] = b"redis-migration:";

pub struct Snapshot {
    /// By database and key. Functions are entries of database `u32::MAX`.
    pub entries: BTreeMap<(u32, Vec<u8>), Entry>,
    /// Unix ms before the first and after the last read.
    pub started: i64,
    pub ended: i64,
}

pub struct Entry {
    pub kind: String,
    /// The value in an order that does not depend on its encoding.
    pub parts: Vec<Part>,
    /// What only some versions tell, by name.
    pub properties: BTreeMap<String, String>,
    /// Unix ms
    pub expire_at: Option<i64>,
}

impl Entry {
    /// What expires in tens of thousands of years (a field: in a thousand) is held.
    pub(super) fn tell_true_times(&mut self) {
        self.expire_at = self.expire_at.map(|at| if at > 1 << 51 { at - (1 << 52) } else { at });
        for part in &mut self.parts {
            part.expire_at = part.expire_at.map(|at| if at > 1 << 45 { at - (1 << 45) } else { at });
        }
    }

    /// True when there were any.
    pub(super) fn forget_field_expiries(&mut self) -> bool {
        let mut found = false;
        for part in &mut self.parts {
            found |= part.expire_at.take().is_some();
        }
        found
    }

    pub fn is_held(&self) -> bool {
        self.expire_at.is_some_and(|at| at > 1 << 51)
            || self.parts.iter().any(|part| part.expire_at.is_some_and(|at| at > 1 << 45))
    }
}

/// An element, or field and value, or member and score; long ones as a hash.
#[derive(PartialEq, PartialOrd)]
pub struct Part {
    content: Content,
    /// Unix ms, of a hash field
    expire_at: Option<i64>,
}

#[derive(PartialEq, PartialOrd)]
enum Content {
    Bytes(Vec<u8>),
    Long { length: usize, start: Vec<u8>, hash: u64 },
    Scored(Vec<u8>, f64),
}

impl Part {
    pub(super) fn same(&self, other: &Self, tolerance: i64) -> bool {
        let expiry = match (self.expire_at, other.expire_at) {
            (Some(l), Some(r)) => (l - r).abs() <= tolerance,
            (l, r) => l == r,
        };
        expiry && self.content == other.content
    }

    fn new(content: &[u8]) -> Self {
        let content = if content.len() <= 256 {
            Content::Bytes(content.to_vec())
        } else {
            let mut hasher = DefaultHasher::new();
            content.hash(&mut hasher);
            let start = content.get(..64).unwrap_or_default().to_vec();
            Content::Long { length: content.len(), start, hash: hasher.finish() }
        };
        Self { content, expire_at: None }
    }

    /// Two byte strings such that different pairs stay different.
    fn pair(first: &[u8], second: &[u8]) -> Self {
        let mut both = format!("{}:", first.len()).into_bytes();
        both.extend_from_slice(first);
        both.push(b'=');
        both.extend_from_slice(second);
        Self::new(&both)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content {
            Content::Bytes(bytes) => write!(f, "\"{}\"", bytes.escape_ascii())?,
            Content::Long { length, start, hash } => {
                write!(f, "{length} bytes \"{}…\" (hash {hash:x})", start.escape_ascii())?;
            }
            Content::Scored(member, score) => write!(f, "\"{}\" {score}", member.escape_ascii())?,
        }
        self.expire_at.map_or(Ok(()), |at| write!(f, " until {at}"))
    }
}

impl Snapshot {
    pub fn read(client: &mut Client) -> Result<Self> {
        let started = now()?;
        let mut entries = BTreeMap::new();
        let version = client.version;
        for node in &mut client.nodes {
            let keyspace = node.text(args!["INFO", "keyspace"])?;
            for line in keyspace.lines() {
                let Some((database, _)) = line.strip_prefix("db").and_then(|rest| rest.split_once(':'))
                else {
                    continue;
                };
                let database: u32 = database.parse()?;
                if database != 0 {
                    node.select(database)?;
                }
                let mut reader = Reader { node, fields_expire: version.has_field_expiry() };
                for keys in reader.scan()?.chunks(KEYS) {
                    for (key, entry) in keys.iter().zip(reader.read(keys)?) {
                        entries.extend(entry.map(|entry| ((database, key.clone()), entry)));
                    }
                }
                if database != 0 {
                    node.select(0)?;
                }
            }
            if version.has(7, 0) {
                for library in array(&node.run(args!["FUNCTION", "LIST", "WITHCODE"])?) {
                    let field =
                        |name| property(&library, name).map(|value| bytes(&value)).unwrap_or_default();
                    let parts = vec![Part::new(&field("library_code"))];
                    let entry = Entry {
                        kind: "function".into(),
                        parts,
                        properties: BTreeMap::new(),
                        expire_at: None,
                    };
                    entries.insert((u32::MAX, field("library_name")), entry);
                }
            }
        }
        Ok(Self { entries, started, ended: now()? })
    }
}

struct Reader<'a> {
    node: &'a mut Conn,
    fields_expire: bool,
}

impl Reader<'_> {
    /// All keys of the database; the engine's own are left out.
    fn scan(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut keys = std::collections::BTreeSet::new();
        let mut cursor = String::from("0");
        loop {
            let page = array(&self.node.run(args!["SCAN", cursor, "COUNT", "1000"])?);
            let [next, page] = page.as_slice() else { bail!("odd reply to SCAN") };
            keys.extend(array(page).iter().map(bytes).filter(|key| !key.starts_with(OWN)));
            cursor = text(next);
            if cursor == "0" {
                return Ok(keys.into_iter().collect());
            }
        }
    }

    /// An entry for each key that is there.
    fn read(&mut self, keys: &[Vec<u8>]) -> Result<Vec<Option<Entry>>> {
        let mut batch = Batch::default();
        keys.iter().for_each(|key| batch.add(args!["TYPE", key]));
        let kinds: Vec<String> = self.node.pipeline(&batch)?.iter().map(text).collect();
        batch.clear();
        for (key, kind) in keys.iter().zip(&kinds) {
            match kind.as_str() {
                "string" => batch.add(args!["GET", key]),
                "list" => batch.add(args!["LRANGE", key, "0", "-1"]),
                "set" => batch.add(args!["SMEMBERS", key]),
                "hash" => batch.add(args!["HGETALL", key]),
                "zset" => batch.add(args!["ZRANGE", key, "0", "-1", "WITHSCORES"]),
                "stream" => batch.add(args!["XRANGE", key, "-", "+"]),
                "none" => batch.add(args!["EXISTS", key]),
                other => bail!("key {} of type {other}: cannot compare", key.escape_ascii()),
            }
            batch.add(args!["PTTL", key]);
        }
        let before = now()?;
        let replies = self.node.pipeline(&batch)?;
        let read_at = before + (now()? - before) / 2;
        let mut entries = Vec::new();
        for ((key, kind), replies) in keys.iter().zip(kinds).zip(replies.chunks(2)) {
            let [value, ttl] = replies else { bail!("a reply is missing") };
            let ttl: i64 = text(ttl).parse().context("odd reply to PTTL")?;
            if let Value::ServerError(error) = value {
                bail!("key {}: {error:?}", key.escape_ascii());
            }
            // Expired between the two questions.
            if kind == "none" || ttl == -2 {
                entries.push(None);
                continue;
            }
            let expire_at = (ttl >= 0).then(|| read_at + ttl);
            let parts = self.parts(key, &kind, value)?;
            let properties = if kind == "stream" { self.stream(key)? } else { BTreeMap::new() };
            entries.push(Some(Entry { kind, parts, properties, expire_at }));
        }
        Ok(entries)
    }

    fn parts(&mut self, key: &[u8], kind: &str, value: &Value) -> Result<Vec<Part>> {
        let items = array(value);
        let mut parts = match kind {
            "string" => vec![Part::new(&bytes(value))],
            "list" => return Ok(items.iter().map(|item| Part::new(&bytes(item))).collect()),
            "set" => items.iter().map(|item| Part::new(&bytes(item))).collect(),
            "hash" => self.fields(key, &items)?,
            "zset" => {
                let scored = items.chunks_exact(2).map(|pair| match pair {
                    [member, score] => {
                        // Servers print floats differently; 0 and -0 are one score to all of them.
                        let score: f64 = text(score).parse().context("odd score")?;
                        Ok(Part { content: Content::Scored(bytes(member), score + 0.0), expire_at: None })
                    }
                    _ => bail!("odd reply to ZRANGE"),
                });
                scored.collect::<Result<_>>()?
            }
            "stream" => {
                let entries = items.iter().map(|entry| {
                    let entry = array(entry);
                    let [id, fields] = entry.as_slice() else { bail!("odd reply to XRANGE") };
                    let mut content = Vec::new();
                    for field in array(fields) {
                        let field = bytes(&field);
                        content.extend_from_slice(format!("{}:", field.len()).as_bytes());
                        content.extend_from_slice(&field);
                    }
                    Ok(Part::pair(&bytes(id), &content))
                });
                return entries.collect();
            }
            _ => Vec::new(),
        };
        parts.sort_by(|left, right| left.partial_cmp(right).unwrap_or(std::cmp::Ordering::Equal));
        Ok(parts)
    }

    fn fields(&mut self, key: &[u8], items: &[Value]) -> Result<Vec<Part>> {
        let pairs: Vec<(Vec<u8>, Vec<u8>)> =
            items.chunks_exact(2).filter_map(|p| Some((bytes(p.first()?), bytes(p.get(1)?)))).collect();
        let mut parts: Vec<Part> = pairs.iter().map(|(field, value)| Part::pair(field, value)).collect();
        if self.fields_expire && !pairs.is_empty() {
            let count = pairs.len().to_string();
            let mut words = vec![b"HPEXPIRETIME".as_slice(), key, b"FIELDS", count.as_bytes()];
            words.extend(pairs.iter().map(|(field, _)| field.as_slice()));
            let times = array(&self.node.run(&words)?);
            for (part, time) in parts.iter_mut().zip(&times) {
                part.expire_at = text(time).parse().ok().filter(|&at: &i64| at >= 0);
            }
        }
        Ok(parts)
    }

    /// What XRANGE does not show: last id, counters, groups, consumers and entries pending.
    fn stream(&mut self, key: &[u8]) -> Result<BTreeMap<String, String>> {
        let mut properties = BTreeMap::new();
        let stream = self.node.run(args!["XINFO", "STREAM", key])?;
        for name in ["last-generated-id", "max-deleted-entry-id", "entries-added", "groups"] {
            properties.extend(property(&stream, name).map(|value| (name.to_owned(), text(&value))));
        }
        for group in array(&self.node.run(args!["XINFO", "GROUPS", key])?) {
            let name = bytes(&property(&group, "name").context("a group without a name")?);
            let label = format!("group {}", name.escape_ascii());
            for field in ["last-delivered-id", "entries-read"] {
                let value = property(&group, field).map(|value| text(&value));
                properties.extend(value.map(|value| (format!("{label} {field}"), value)));
            }
            let consumers = array(&self.node.run(args!["XINFO", "CONSUMERS", key, name])?);
            let mut names: Vec<String> =
                consumers.iter().filter_map(|c| property(c, "name")).map(|n| text(&n)).collect();
            names.sort();
            properties.insert(format!("{label} consumers"), names.join(","));
            let pending = array(&self.node.run(args!["XPENDING", key, name, "-", "+", "1000000"])?);
            let mut list = String::new();
            for entry in pending {
                let entry = array(&entry);
                let [id, consumer, _idle, deliveries] = entry.as_slice() else {
                    bail!("odd reply to XPENDING")
                };
                list += &format!("{} {} {}; ", text(id), text(consumer), text(deliveries));
            }
            properties.insert(format!("{label} pending"), list);
        }
        ensure!(!properties.is_empty(), "XINFO told nothing");
        Ok(properties)
    }
}

/// A value of a flat list of names and values.
fn property(list: &Value, name: &str) -> Option<Value> {
    let list = array(list);
    list.chunks_exact(2).find(|pair| pair.first().is_some_and(|n| text(n) == name))?.get(1).cloned()
}

/// Unix ms
fn now() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as i64)
}
