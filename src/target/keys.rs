//! The keys that a migration keeps in its target (PURE): names and contents.
//!
//! All begin with `redis-migration:`, hold a hash tag, and are removed when the migration is complete:
//!
//! - `…:epoch`, one a node: who may write. A later process raises it, an earlier one stops when it sees that.
//! - `…:at`, one a node: a [`Record`]; everything of this shard for this node up to there stands.
//! - `…:guard`, one a slot of a cluster: every command of this shard for this slot up to there stands.
//! - `…:none`, one a slot of a cluster: never there. On a slot that is moving it is refused, and with it the transaction that asks for it.
//! - `…:shards`, some, without a shard's name: which shards there are, for a run without a data directory.
//! - `…:slots`, some: the [`Territory`] of a shard of a source cluster.
//! - `…:chain`, single servers only: lets a batch take effect only if the one before it did (see `chain`).

use crate::rdb::Waypoint;
use crate::resp::header;
use crate::slot::{SlotRanges, tag_for_slot};
use crate::version::Flavor;

/// Keys of the tool's own begin with this; no verification looks at them.
pub const PREFIX: &[u8] = b"redis-migration:";
const NONE: &str = "none";
/// First word of a [`Record`]; another form gets another.
const RECORD_FORM: &str = "1";
/// Where a cluster keeps a [`Territory`]: on several nodes, as one of them may lose what it got last.
pub const TERRITORY_SLOTS: [u16; 3] = [0, 5461, 10923];
/// First word of a [`Load`]; another form gets another.
const LOAD_FORM: &str = "load1";

/// Key names of one shard of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyNames {
    /// `<uid>:<lineage>`
    name: String,
}

impl KeyNames {
    /// `uid`: of the migration; `lineage`: of the source shard, the same after a failover.
    pub fn new(uid: &str, lineage: &str) -> Self {
        Self { name: format!("{uid}:{lineage}") }
    }

    /// Names our connections in CLIENT LIST, followed by epoch and number.
    pub fn client(&self) -> String {
        // No spaces are allowed there, and none are in a uid.
        format!("redis-migration:{}", self.name)
    }

    pub fn epoch(&self, slot: u16) -> Vec<u8> {
        self.key(slot, "epoch")
    }

    pub fn at(&self, slot: u16) -> Vec<u8> {
        self.key(slot, "at")
    }

    pub fn guard(&self, slot: u16) -> Vec<u8> {
        self.key(slot, "guard")
    }

    /// Appends the guard's key as an argument, without allocating.
    pub fn append_guard(&self, slot: u16, out: &mut Vec<u8>) {
        self.append(slot, "guard", out);
    }

    /// Appends the key that is never there as an argument.
    pub fn append_none(&self, slot: u16, out: &mut Vec<u8>) {
        self.append(slot, NONE, out);
    }

    fn append(&self, slot: u16, kind: &str, out: &mut Vec<u8>) {
        let tag = tag_for_slot(slot).as_bytes();
        header(b'$', PREFIX.len() + tag.len() + self.name.len() + kind.len() + 4, out);
        for part in [PREFIX, b"{", tag, b"}:", self.name.as_bytes(), b":", kind.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }

    pub fn territory(&self, slot: u16) -> Vec<u8> {
        self.key(slot, "slots")
    }

    pub fn chain(&self) -> Vec<u8> {
        self.key(0, "chain")
    }

    fn key(&self, slot: u16, kind: &str) -> Vec<u8> {
        format!("redis-migration:{{{}}}:{}:{kind}", tag_for_slot(slot), self.name).into_bytes()
    }
}

/// Where it is kept which shards a source cluster has, of all of them together. In `slot`, one of
/// [`TERRITORY_SLOTS`]; 0 on a single server.
pub fn shards_key(uid: &str, slot: u16) -> Vec<u8> {
    format!("redis-migration:{{{}}}:{uid}:shards", tag_for_slot(slot)).into_bytes()
}

/// How far one shard has come on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which full sync this belongs to; a later one has a higher number.
    pub history: u64,
    /// The set of nodes that records were written for; each set has a higher number than the one before.
    pub layout: u64,
    /// How many records the layout has.
    pub nodes: u32,
    /// Cross-slot commands up to this offset were run: a replay must not begin before it.
    pub barrier: i64,
    pub place: RecordPlace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordPlace {
    /// In the RDB, at this spool position.
    Snapshot {
        position: u64,
        /// `None`: another process cannot go on from here.
        load: Option<Load>,
    },
    Stream {
        replication_id: String,
        offset: i64,
        /// The source's database behind `offset`.
        db: u64,
    },
}

/// What another process needs to go on in the middle of an RDB, beside the spool that holds the rest of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Number of the spool's history: it tells this RDB from all others.
    pub spool: u64,
    /// Of the same position as the record.
    pub waypoint: Waypoint,
    /// Checksum of all before it.
    pub crc: u64,
    /// The database in which the source's stream starts, as the RDB tells in front of all keys.
    pub stream_db: u64,
    /// Keys before it, and keys announced so far: for those who watch.
    pub keys: u64,
    pub keys_total: u64,
}

impl Load {
    fn encode(&self, out: &mut Vec<u8>) {
        use std::io::Write;
        let Self { spool, waypoint, crc, stream_db, keys, keys_total } = self;
        let Waypoint { position: _, flavor, version, db } = waypoint;
        let flavor = match flavor {
            Flavor::Redis => "redis",
            Flavor::Valkey => "valkey",
        };
        let _ = write!(
            out,
            " {LOAD_FORM} {spool} {flavor} {version} {db} {crc:016x} {stream_db} {keys} {keys_total}"
        );
    }

    /// What stands behind its first word.
    fn parse<'a>(position: u64, mut words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let spool = words.next()?.parse().ok()?;
        let flavor = match words.next()? {
            "redis" => Flavor::Redis,
            "valkey" => Flavor::Valkey,
            _ => return None,
        };
        let version: u16 = words.next()?.parse().ok()?;
        let db = words.next()?.parse().ok()?;
        let crc = u64::from_str_radix(words.next()?, 16).ok()?;
        let stream_db = words.next()?.parse().ok()?;
        let keys = words.next()?.parse().ok()?;
        let keys_total = words.next()?.parse().ok()?;
        let fits = words.next().is_none() && (position == 0) == (version == 0);
        let waypoint = Waypoint { position, flavor, version, db };
        fits.then_some(Self { spool, waypoint, crc, stream_db, keys, keys_total })
    }
}

impl Record {
    pub fn encode(&self, out: &mut Vec<u8>) {
        use std::io::Write;
        let Self { history, layout, nodes, barrier, .. } = self;
        // Writing to a vector does not fail.
        let _ = write!(out, "{RECORD_FORM} {history} {layout} {nodes} {barrier} ");
        let _ = match &self.place {
            RecordPlace::Snapshot { position, load } => {
                let written = write!(out, "snapshot {position}");
                if let Some(load) = load {
                    load.encode(out);
                }
                written
            }
            RecordPlace::Stream { replication_id, offset, db } => {
                write!(out, "stream {replication_id} {offset} {db}")
            }
        };
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    /// `None`: not one that we wrote.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.split(' ');
        if words.next()? != RECORD_FORM {
            return None;
        }
        let history = words.next()?.parse().ok()?;
        let layout = words.next()?.parse().ok()?;
        let nodes = words.next()?.parse().ok()?;
        let barrier = words.next()?.parse().ok()?;
        let place = match words.next()? {
            "snapshot" => {
                let position = words.next()?.parse().ok()?;
                let load = match words.next() {
                    None => None,
                    Some(LOAD_FORM) => Some(Load::parse(position, words.by_ref())?),
                    // Of another version of this program: how far it came is all that can be told.
                    Some(form) if form.starts_with("load") => {
                        words.by_ref().for_each(drop);
                        None
                    }
                    Some(_) => return None,
                };
                RecordPlace::Snapshot { position, load }
            }
            "stream" => RecordPlace::Stream {
                replication_id: words.next()?.to_owned(),
                offset: words.next()?.parse().ok()?,
                db: words.next()?.parse().ok()?,
            },
            _ => return None,
        };
        words.next().is_none().then_some(Self { history, layout, nodes, barrier, place })
    }

    /// Records of one history in the order of their places.
    pub fn order(&self) -> (bool, i64) {
        match self.place {
            RecordPlace::Snapshot { position, .. } => (false, i64::try_from(position).unwrap_or(i64::MAX)),
            RecordPlace::Stream { offset, .. } => (true, offset),
        }
    }
}

/// Which slots of the source the shard's stream is followed for. Written anew when it changes; of several the
/// one with the highest version counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Territory {
    pub history: u64,
    pub version: u64,
    pub slots: SlotRanges,
}

impl Territory {
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { history, version, slots } = self;
        format!("{RECORD_FORM} {history} {version} {slots}").into_bytes()
    }

    /// `None`: not one that we wrote.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.split(' ');
        if words.next()? != RECORD_FORM {
            return None;
        }
        let (history, version) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let slots = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { history, version, slots })
    }
}

/// What a guard holds: `history offset`.
pub fn guard_value(history: u64, offset: i64) -> Vec<u8> {
    format!("{history} {offset}").into_bytes()
}

/// The same, appended as an argument.
pub fn append_guard_value(history: u64, offset: i64, out: &mut Vec<u8>) {
    let (mut first, mut second) = (itoa::Buffer::new(), itoa::Buffer::new());
    let (history, offset) = (first.format(history).as_bytes(), second.format(offset).as_bytes());
    header(b'$', history.len() + 1 + offset.len(), out);
    for part in [history, b" ", offset, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

/// True for the name of the key that is never there.
pub fn is_none(key: &[u8]) -> bool {
    key.starts_with(PREFIX) && key.ends_with(b":none")
}

pub fn parse_guard(value: &[u8]) -> Option<(u64, i64)> {
    let (history, offset) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some((history.parse().ok()?, offset.parse().ok()?))
}

/// What the records of all nodes come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing was ever written.
    Nothing,
    /// Everything before the lowest of these stands everywhere.
    At(Box<Record>),
    /// Records are missing or contradict each other: a node has lost what it had.
    Lost(&'static str),
}

/// `records`: all that were found, of any layout; on a single server one for each database that holds one.
/// The newest layout that is whole decides; an older one only lies further back.
pub fn standing(records: &[Record], single: bool) -> Standing {
    let Some(history) = records.iter().map(|record| record.history).max() else { return Standing::Nothing };
    let current = records.iter().filter(|record| record.history == history);
    if single {
        // Each batch leaves one in the database that it ended in; the last one counts.
        return match current.max_by_key(|record| record.order()) {
            Some(record) => Standing::At(Box::new(record.clone())),
            None => Standing::Nothing,
        };
    }
    let mut layouts: Vec<u64> = current.clone().map(|record| record.layout).collect();
    layouts.sort_unstable();
    layouts.dedup();
    for layout in layouts.into_iter().rev() {
        let of_layout = || current.clone().filter(|record| record.layout == layout);
        let whole = of_layout().next().is_some_and(|record| record.nodes as usize <= of_layout().count());
        if !whole {
            continue;
        }
        let barrier = records.iter().map(|record| record.barrier).max().unwrap_or_default();
        if let Some(lowest) = of_layout().min_by_key(|record| record.order()) {
            let (in_stream, offset) = lowest.order();
            if in_stream && offset < barrier {
                return Standing::Lost(
                    "a command over several slots was applied on one node and lost on another",
                );
            }
            return Standing::At(Box::new(Record { barrier, ..lowest.clone() }));
        }
    }
    Standing::Lost("the record of a node is missing")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::bulk;
    use crate::slot::slot;

    fn record(layout: u64, nodes: u32, offset: i64) -> Record {
        let place = RecordPlace::Stream { replication_id: "f".repeat(40), offset, db: 3 };
        Record { history: 7, layout, nodes, barrier: 0, place }
    }

    #[test]
    fn keys_are_of_their_slot_and_records_are_read_as_written() {
        let names = KeyNames::new("u-1", "0");
        for number in [0, 1, 5000, 16383] {
            for key in [names.epoch(number), names.at(number), names.guard(number)] {
                assert_eq!(slot(&key), number);
                assert!(key.starts_with(PREFIX));
            }
        }
        let mut appended = Vec::new();
        names.append_guard(5000, &mut appended);
        append_guard_value(7, 12, &mut appended);
        names.append_none(5000, &mut appended);
        let mut expected = Vec::new();
        for argument in [names.guard(5000), guard_value(7, 12), names.key(5000, NONE)] {
            bulk(&argument, &mut expected);
        }
        assert_eq!(appended, expected);
        assert!(is_none(&names.key(5000, NONE)) && !is_none(&names.guard(5000)));
        let written = record(1, 3, 99);
        assert_eq!(Record::parse(&written.to_bytes()), Some(written.clone()));
        for wrong in ["", "1", "2 7 1 1 0 snapshot 4", "1 7 1 1 0 snapshot 4 5", "1 7 1 1 0 stream x"] {
            assert_eq!(Record::parse(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(parse_guard(&guard_value(7, 12)), Some((7, 12)));
    }

    #[test]
    fn territories_are_read_as_written() {
        for slots in ["", "7", "0-5460,5462"] {
            let written = Territory { history: 7, version: 2, slots: slots.parse().unwrap() };
            assert_eq!(Territory::parse(&written.to_bytes()), Some(written));
        }
        for wrong in ["", "1 7 2", "2 7 2 0-9", "1 7 2 9-0", "1 7 2 0-9 x"] {
            assert_eq!(Territory::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn a_place_in_the_rdb_is_read_as_written_and_one_of_another_version_is_no_place_to_go_on_from() {
        let waypoint = Waypoint { position: 9_000, flavor: Flavor::Valkey, version: 80, db: 3 };
        let load = Load { spool: 1, waypoint, crc: 0xfe, stream_db: 2, keys: 40, keys_total: 50 };
        for load in [None, Some(load)] {
            let written =
                Record { place: RecordPlace::Snapshot { position: 9_000, load }, ..record(1, 3, 0) };
            assert_eq!(Record::parse(&written.to_bytes()), Some(written));
        }
        let written =
            Record { place: RecordPlace::Snapshot { position: 9_000, load: Some(load) }, ..record(1, 3, 0) };
        let text = String::from_utf8(written.to_bytes()).unwrap();
        let other = text.replace("load1", "load2") + " and more";
        let place = Record::parse(other.as_bytes()).unwrap().place;
        assert_eq!(place, RecordPlace::Snapshot { position: 9_000, load: None });
        for (from, to) in [("valkey", "keydb"), (" 80 ", " 0 "), (" 40 50", " 40"), (" 40 50", " 40 50 60")] {
            let wrong = text.replace(from, to);
            assert!(wrong != text && Record::parse(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn the_lowest_record_of_the_newest_whole_layout_counts() {
        let records = [record(1, 2, 10), record(1, 2, 12), record(2, 3, 50), record(2, 3, 51)];
        assert_eq!(standing(&records, false), Standing::At(Box::new(records[0].clone())));
        let whole = [&records[..], &[record(2, 3, 49)]].concat();
        assert_eq!(standing(&whole, false), Standing::At(Box::new(record(2, 3, 49))));
        assert!(matches!(standing(&records[2..], false), Standing::Lost(_)));
        assert_eq!(standing(&[], false), Standing::Nothing);
    }

    #[test]
    fn a_node_that_fell_behind_a_command_over_several_slots_is_lost() {
        let ahead = Record { barrier: 40, ..record(1, 2, 60) };
        assert!(matches!(standing(&[ahead, record(1, 2, 30)], false), Standing::Lost(_)));
    }

    #[test]
    fn a_single_server_is_where_its_newest_record_says() {
        let older = Record { history: 6, ..record(1, 1, 900) };
        assert_eq!(
            standing(&[record(1, 1, 10), record(1, 1, 70), older], true),
            Standing::At(Box::new(record(1, 1, 70)))
        );
    }
}
