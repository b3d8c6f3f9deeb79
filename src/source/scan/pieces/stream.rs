//! Streams: entries, counters, groups, consumers, pending entries.

use super::{Piece, ask, fold};
use crate::clock::unix_millis;
use crate::source::scan::ScanError;
use crate::verify::frame::{Elements, Frame};

const PAGE: &[u8] = b"256";

/// What XINFO tells of the stream, or of one of its groups.
#[derive(Default)]
struct Info {
    name: Vec<u8>,
    last: Vec<u8>,
    /// `entries-added`, or `entries-read`.
    count: Option<i64>,
    max_deleted: Option<Vec<u8>>,
}

/// An entry that a consumer has not acknowledged.
struct Pending {
    id: Vec<u8>,
    consumer: Vec<u8>,
    idle: u64,
    deliveries: i64,
}

impl Piece<'_> {
    pub(super) async fn stream(&mut self) -> Result<bool, ScanError> {
        let Some(info) = self.info().await? else { return Ok(false) };
        if !self.entries().await? {
            // A stream is made by adding to it; this leaves it empty.
            self.emit(&[b"XADD", self.key, b"MAXLEN", b"0", b"0-1", b"x", b"y"]);
        }
        self.crc.update(&info.last);
        let (added, deleted);
        let mut command = vec![b"XSETID".as_slice(), self.key, &info.last];
        if let (Some(count), Some(max_deleted)) = (info.count, info.max_deleted) {
            (added, deleted) = (count.to_string(), max_deleted);
            command.extend([b"ENTRIESADDED".as_slice(), added.as_bytes(), b"MAXDELETEDID", &deleted]);
        }
        let command: Vec<Vec<u8>> = command.into_iter().map(<[u8]>::to_vec).collect();
        self.emit(&command.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for group in self.groups().await? {
            self.group(&group).await?;
        }
        Ok(true)
    }

    /// Whether there are any.
    async fn entries(&mut self) -> Result<bool, ScanError> {
        let mut start = b"-".to_vec();
        let mut any = false;
        loop {
            let args = [b"XRANGE".as_slice(), self.key, &start, b"+", b"COUNT", PAGE];
            let Self { session, emit, crc, key, db, .. } = self;
            let Some(Frame::Array(Some(mut entries))) = ask(&mut session.wire, &args, "XRANGE").await? else {
                return Ok(any);
            };
            let mut last = None;
            while let Ok(Some(Frame::Array(Some(mut entry)))) = entries.next_frame() {
                let id = entry.next_bulk().ok().flatten().unwrap_or_default();
                let Ok(Some(Frame::Array(Some(fields)))) = entry.next_frame() else { continue };
                crc.update(id);
                let mut command = vec![b"XADD".as_slice(), key, id];
                fold(fields, crc, &mut command);
                if let Some(emit) = emit {
                    emit.command(*db, &command);
                }
                last = Some(id.to_vec());
                any = true;
            }
            self.settle().await?;
            match last.as_deref().and_then(after) {
                Some(next) => start = next,
                None => return Ok(any),
            }
        }
    }

    async fn info(&mut self) -> Result<Option<Info>, ScanError> {
        let args = [b"XINFO".as_slice(), b"STREAM", self.key];
        match ask(&mut self.session.wire, &args, "XINFO").await? {
            Some(Frame::Array(Some(fields))) => Ok(Some(read_info(fields))),
            _ => Ok(None),
        }
    }

    async fn groups(&mut self) -> Result<Vec<Info>, ScanError> {
        let args = [b"XINFO".as_slice(), b"GROUPS", self.key];
        let mut found = Vec::new();
        if let Some(Frame::Array(Some(mut groups))) = ask(&mut self.session.wire, &args, "XINFO").await? {
            while let Ok(Some(Frame::Array(Some(fields)))) = groups.next_frame() {
                found.push(read_info(fields));
            }
        }
        Ok(found)
    }

    async fn group(&mut self, group: &Info) -> Result<(), ScanError> {
        self.crc.update(&group.name);
        self.crc.update(&group.last);
        let (name, key) = (group.name.as_slice(), self.key);
        let read =
            group.count.filter(|_| self.session.abilities.stream_counters).map(|read| read.to_string());
        let mut command = vec![b"XGROUP".as_slice(), b"CREATE", key, name, &group.last];
        if let Some(read) = &read {
            command.extend([b"ENTRIESREAD".as_slice(), read.as_bytes()]);
        }
        self.emit(&command);
        if self.session.abilities.create_consumer {
            for consumer in self.consumers(name).await? {
                self.crc.update(&consumer);
                self.emit(&[b"XGROUP", b"CREATECONSUMER", key, name, &consumer]);
            }
        }
        let mut start = b"-".to_vec();
        loop {
            let page = self.pending(name, &start).await?;
            let now = unix_millis();
            for entry in &page {
                let delivered = now.saturating_sub(entry.idle).to_string();
                let deliveries = entry.deliveries.to_string();
                self.crc.update(&entry.id);
                self.crc.update(&entry.consumer);
                self.emit(&[
                    b"XCLAIM",
                    key,
                    name,
                    &entry.consumer,
                    b"0",
                    &entry.id,
                    b"TIME",
                    delivered.as_bytes(),
                    b"RETRYCOUNT",
                    deliveries.as_bytes(),
                    b"FORCE",
                    b"JUSTID",
                ]);
            }
            self.settle().await?;
            match page.last().and_then(|entry| after(&entry.id)) {
                Some(next) => start = next,
                None => return Ok(()),
            }
        }
    }

    async fn consumers(&mut self, group: &[u8]) -> Result<Vec<Vec<u8>>, ScanError> {
        let args = [b"XINFO".as_slice(), b"CONSUMERS", self.key, group];
        let mut found = Vec::new();
        if let Some(Frame::Array(Some(mut consumers))) = ask(&mut self.session.wire, &args, "XINFO").await? {
            while let Ok(Some(Frame::Array(Some(fields)))) = consumers.next_frame() {
                found.push(read_info(fields).name);
            }
        }
        Ok(found)
    }

    async fn pending(&mut self, group: &[u8], start: &[u8]) -> Result<Vec<Pending>, ScanError> {
        let args = [b"XPENDING".as_slice(), self.key, group, start, b"+", PAGE];
        let mut found = Vec::new();
        if let Some(Frame::Array(Some(mut entries))) = ask(&mut self.session.wire, &args, "XPENDING").await? {
            while let Ok(Some(Frame::Array(Some(mut entry)))) = entries.next_frame() {
                let mut text = || Some(entry.next_bulk().ok()??.to_vec());
                let (Some(id), Some(consumer)) = (text(), text()) else { continue };
                let mut number = || match entry.next_frame() {
                    Ok(Some(Frame::Integer(number))) => number,
                    _ => 0,
                };
                let (idle, deliveries) = (number(), number());
                let idle = u64::try_from(idle).unwrap_or_default();
                found.push(Pending { id, consumer, idle, deliveries });
            }
        }
        Ok(found)
    }
}

/// Names and values in turn.
fn read_info(mut fields: Elements<'_>) -> Info {
    let mut info = Info::default();
    while let Ok(Some(name)) = fields.next_bulk() {
        let Ok(Some(value)) = fields.next_frame() else { break };
        match (name, value) {
            (b"name", Frame::Bulk(Some(name))) => info.name = name.to_vec(),
            (b"last-generated-id" | b"last-delivered-id", Frame::Bulk(Some(id))) => info.last = id.to_vec(),
            (b"max-deleted-entry-id", Frame::Bulk(Some(id))) => info.max_deleted = Some(id.to_vec()),
            (b"entries-added" | b"entries-read", Frame::Integer(count)) => info.count = Some(count),
            _ => {}
        }
    }
    info
}

/// The id that follows. (Ranges without their first entry are known from 6.2 only.)
fn after(id: &[u8]) -> Option<Vec<u8>> {
    let (ms, seq) = std::str::from_utf8(id).ok()?.split_once('-')?;
    let (ms, seq) = (ms.parse::<u64>().ok()?, seq.parse::<u64>().ok()?);
    let (ms, seq) = match seq.checked_add(1) {
        Some(seq) => (ms, seq),
        None => (ms.checked_add(1)?, 0),
    };
    Some(format!("{ms}-{seq}").into_bytes())
}
