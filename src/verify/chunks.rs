//! Values too heavy to be asked for whole: read from the source in chunks, each compared with the
//! target's, so that neither a server is held up nor memory grows with the value.
//!
//! Strings, lists and streams are read by range on both sides; hashes, sets and sorted sets are
//! scanned on the source and their elements looked up on the target, equal lengths then rule out
//! elements that only the target has. A chunk that differs is settled as keys are: read, wait for
//! the target, read both again. One that keeps changing is halved until only the elements that
//! change remain undecided.

use self::print::{Print, Printer, Reading};
use super::frame::{Elements, Frame};
use super::questions::{amount, length_command};
use super::side::Links;
use super::{Context, VerifyError};

pub(super) mod print;

/// What a chunk should weigh, and how many elements it has at most.
const CHUNK_BYTES: u64 = 1 << 20;
const CHUNK_ELEMENTS: u64 = 1000;
/// Looks at a chunk that changes all the time.
const LOOKS: usize = 4;
/// Chunks of one value that may stay undecided before the rest is not looked at any more.
const MAX_UNSETTLED: usize = 32;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    Equal,
    Unsettled,
    /// What differs.
    Different(String),
}

/// Compares one value of type `kind` (as TYPE names it) chunk by chunk.
pub(super) async fn compare(
    context: &Context,
    source: &mut Links,
    target: &mut Links,
    key: &[u8],
    kind: &str,
) -> Result<Chunked, VerifyError> {
    let mut pair = Pair { context, source, target, key, unsettled: 0 };
    let different = match kind {
        "string" => pair.string().await?,
        "list" => pair.list().await?,
        "hash" | "set" | "zset" => pair.collection(kind).await?,
        "stream" => pair.stream().await?,
        _ => pair.opaque().await?,
    };
    Ok(match different {
        Some(what) => Chunked::Different(what),
        None if pair.unsettled > 0 => Chunked::Unsettled,
        None => Chunked::Equal,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Agreement {
    Equal,
    Unsettled,
    Different,
}

/// One key on both sides.
struct Pair<'p> {
    context: &'p Context,
    source: &'p mut Links,
    target: &'p mut Links,
    key: &'p [u8],
    unsettled: usize,
}

impl Pair<'_> {
    async fn string(&mut self) -> Result<Option<String>, VerifyError> {
        let length = self.source.ask(self.key, &[b"STRLEN", self.key], amount).await?;
        for start in (0..length).step_by(CHUNK_BYTES as usize) {
            let last = (start + CHUNK_BYTES - 1).to_string();
            let first = start.to_string();
            let range = Question::range(b"GETRANGE", first.as_bytes(), last.as_bytes());
            if self.differs(&range).await? {
                return Ok(Some(format!("value, near byte {start}")));
            }
        }
        self.length("string").await
    }

    async fn list(&mut self) -> Result<Option<String>, VerifyError> {
        let length = self.source.ask(self.key, &[b"LLEN", self.key], amount).await?;
        let step = self.chunk_elements(length).await?;
        for start in (0..length).step_by(step as usize) {
            let last = (start + step - 1).to_string();
            let first = start.to_string();
            let range = Question::range(b"LRANGE", first.as_bytes(), last.as_bytes());
            if self.differs(&range).await? {
                return Ok(Some(format!("value, near element {start}")));
            }
            if self.unsettled > MAX_UNSETTLED {
                return Ok(None);
            }
        }
        self.length("list").await
    }

    async fn collection(&mut self, kind: &str) -> Result<Option<String>, VerifyError> {
        let length = self.source.ask(self.key, &collection_length(kind, self.key), amount).await?;
        let count = self.chunk_elements(length).await?.to_string();
        let scan: &[u8] = match kind {
            "hash" => b"HSCAN",
            "set" => b"SSCAN",
            _ => b"ZSCAN",
        };
        let field_expiries = kind == "hash" && has_field_expiry(self.source) && has_field_expiry(self.target);
        let mut cursor = b"0".to_vec();
        loop {
            let args = [scan, self.key, &cursor, b"COUNT", count.as_bytes()];
            let page = self.source.ask(self.key, &args, |frame| ElementPage::of(frame, kind)).await?;
            let Some(page) = page else { return Ok(Some(format!("type, no {kind} any more"))) };
            if !page.elements.is_empty() {
                let lookup = Question::lookup(kind, &page.elements);
                let theirs = lookup.ask(self.target, self.key).await?;
                if page.print != theirs && self.settle_elements(kind, &page.elements).await? {
                    return Ok(Some("value of an element".into()));
                }
                if field_expiries {
                    let question = Question::field_expiries(&page.elements);
                    if self.differs(&question).await? {
                        return Ok(Some("expiry of a field".into()));
                    }
                }
            }
            if self.unsettled > MAX_UNSETTLED {
                return Ok(None);
            }
            cursor = page.cursor;
            if cursor == b"0" {
                return self.length(kind).await;
            }
        }
    }

    async fn stream(&mut self) -> Result<Option<String>, VerifyError> {
        let length = self.source.ask(self.key, &[b"XLEN", self.key], amount).await?;
        let count = self.chunk_elements(length).await?.to_string();
        let mut start = b"-".to_vec();
        loop {
            let tail = [&start[..], b"+", b"COUNT", count.as_bytes()];
            let question = Question::of(b"XRANGE", &tail, Reading::Raw);
            if self.differs(&question).await? {
                return Ok(Some(format!("entries from {}", start.escape_ascii())));
            }
            let args = [&b"XRANGE"[..], self.key, &start, b"+", b"COUNT", count.as_bytes()];
            match self.source.ask(self.key, &args, last_id).await? {
                Some(last) => start = after(&last),
                None => break,
            }
            if self.unsettled > MAX_UNSETTLED {
                return Ok(None);
            }
        }
        let question = Question::inner(b"XINFO", b"STREAM", Reading::StreamInfo);
        if self.differs(&question).await? {
            return Ok(Some("last id of the stream".into()));
        }
        let question = Question::inner(b"XINFO", b"GROUPS", Reading::Groups);
        if self.differs(&question).await? {
            return Ok(Some("consumer groups".into()));
        }
        let args = [&b"XINFO"[..], b"GROUPS", self.key];
        for group in self.source.ask(self.key, &args, print::group_names).await? {
            if let Some(what) = self.pending(&group, &count).await? {
                return Ok(Some(what));
            }
        }
        self.length("stream").await
    }

    async fn pending(&mut self, group: &[u8], count: &str) -> Result<Option<String>, VerifyError> {
        let mut start = b"-".to_vec();
        loop {
            let tail = [group, &start, b"+", count.as_bytes()];
            if self.differs(&Question::of(b"XPENDING", &tail, Reading::Pending)).await? {
                return Ok(Some("pending entries of a group".into()));
            }
            let args = [&b"XPENDING"[..], self.key, group, &start, b"+", count.as_bytes()];
            match self.source.ask(self.key, &args, last_id).await? {
                Some(last) => start = after(&last),
                None => return Ok(None),
            }
        }
    }

    /// A type that only its module understands: all that can be compared are its bytes.
    async fn opaque(&mut self) -> Result<Option<String>, VerifyError> {
        let question = Question::of(b"DUMP", &[], Reading::Payload);
        let different = self.differs(&question).await?;
        Ok(different.then(|| "serialized value, type not understood".into()))
    }

    async fn length(&mut self, kind: &str) -> Result<Option<String>, VerifyError> {
        let Some(command) = length_command(kind).first() else { return Ok(None) };
        let different = self.differs(&Question::of(command, &[], Reading::Raw)).await?;
        Ok(different.then(|| if kind == "string" { "length" } else { "number of elements" }.into()))
    }

    /// Elements that make a chunk of bearable weight.
    async fn chunk_elements(&mut self, length: u64) -> Result<u64, VerifyError> {
        if !self.context.source_memory_usage {
            return Ok(CHUNK_ELEMENTS / 10);
        }
        let weight = self.source.ask(self.key, &[b"MEMORY", b"USAGE", self.key], amount).await?;
        let each = (weight / length.max(1)).max(1);
        Ok((CHUNK_BYTES / each).clamp(1, CHUNK_ELEMENTS))
    }

    async fn differs(&mut self, question: &Question<'_>) -> Result<bool, VerifyError> {
        let (ours, theirs) =
            tokio::try_join!(question.ask(self.source, self.key), question.ask(self.target, self.key))?;
        if ours == theirs {
            return Ok(false);
        }
        Ok(match self.settle(question).await? {
            Agreement::Equal => false,
            Agreement::Different => true,
            Agreement::Unsettled => {
                self.unsettled += 1;
                false
            }
        })
    }

    async fn settle(&mut self, question: &Question<'_>) -> Result<Agreement, VerifyError> {
        for _ in 0..LOOKS {
            let before = question.ask(self.source, self.key).await?;
            (self.context.settle)().await;
            let (theirs, after) =
                tokio::try_join!(question.ask(self.target, self.key), question.ask(self.source, self.key))?;
            if theirs == before || theirs == after {
                return Ok(Agreement::Equal);
            }
            if before == after {
                return Ok(Agreement::Different);
            }
        }
        Ok(Agreement::Unsettled)
    }

    /// True when an element differs for good. Halves what does not settle, as one element that
    /// changes all the time must not hide the others.
    async fn settle_elements(&mut self, kind: &str, elements: &[Vec<u8>]) -> Result<bool, VerifyError> {
        let mut left = vec![elements];
        while let Some(part) = left.pop() {
            match self.settle(&Question::lookup(kind, part)).await? {
                Agreement::Equal => {}
                Agreement::Different => return Ok(true),
                Agreement::Unsettled if part.len() > 1 && self.unsettled <= MAX_UNSETTLED => {
                    let (head, tail) = part.split_at(part.len() / 2);
                    left.extend([head, tail]);
                }
                Agreement::Unsettled => self.unsettled += 1,
            }
        }
        Ok(false)
    }
}

/// A question about part of a value, whose answer must be the same on both sides.
struct Question<'q> {
    command: &'q [u8],
    /// Stands between command and key.
    sub: Option<&'q [u8]>,
    tail: Vec<&'q [u8]>,
    reading: Reading,
    /// Asked once per element of `tail`, where one command cannot take many.
    single: Option<&'q [u8]>,
}

impl<'q> Question<'q> {
    fn of(command: &'q [u8], tail: &[&'q [u8]], reading: Reading) -> Self {
        Self { command, sub: None, tail: tail.to_vec(), reading, single: None }
    }

    fn range(command: &'q [u8], first: &'q [u8], last: &'q [u8]) -> Self {
        Self::of(command, &[first, last], Reading::Raw)
    }

    fn inner(command: &'q [u8], sub: &'q [u8], reading: Reading) -> Self {
        Self { sub: Some(sub), ..Self::of(command, &[], reading) }
    }

    fn lookup(kind: &str, elements: &'q [Vec<u8>]) -> Self {
        let (command, single, reading): (&[u8], Option<&[u8]>, _) = match kind {
            "hash" => (b"HMGET", None, Reading::Raw),
            "set" => (b"SMISMEMBER", Some(b"SISMEMBER"), Reading::Raw),
            _ => (b"ZMSCORE", Some(b"ZSCORE"), Reading::Scores),
        };
        let tail = elements.iter().map(Vec::as_slice).collect();
        Self { command, sub: None, tail, reading, single }
    }

    fn field_expiries(elements: &'q [Vec<u8>]) -> Self {
        // Redis 7.4 and Valkey 9: HPEXPIRETIME key FIELDS count field …
        let mut question = Self::of(b"HPEXPIRETIME", &[b"FIELDS"], Reading::Expiries);
        question.tail.extend(elements.iter().map(Vec::as_slice));
        question
    }

    async fn ask(&self, links: &mut Links, key: &[u8]) -> Result<Print, VerifyError> {
        let reading = self.reading;
        if let Some(single) = self.single
            && !links.version().has_redis(6, 2)
        {
            return self.one_by_one(links, key, single).await;
        }
        let count = (self.tail.len().saturating_sub(1)).to_string();
        let mut args = vec![self.command];
        args.extend(self.sub);
        args.push(key);
        args.extend(&self.tail);
        if reading == Reading::Expiries {
            args.insert(3, count.as_bytes());
        }
        links.ask(key, &args, |frame| Print::of(frame, reading)).await
    }

    /// Pipelined: before 6.2 no command takes many members.
    async fn one_by_one(&self, links: &mut Links, key: &[u8], single: &[u8]) -> Result<Print, VerifyError> {
        let wire = links.open(links.node_of(key)).await?;
        for element in &self.tail {
            wire.queue(&[single, key, element]);
        }
        wire.send().await?;
        let mut printer = Printer::new();
        for _ in &self.tail {
            let refusal = match wire.reply().await? {
                Frame::Error(text) => text.to_vec(),
                frame => {
                    printer.item(frame, self.reading);
                    continue;
                }
            };
            return Err(VerifyError::refused(wire.address(), single, &refusal));
        }
        Ok(printer.finish())
    }
}

fn has_field_expiry(links: &Links) -> bool {
    let version = links.version();
    match version.flavor {
        crate::version::Flavor::Redis => version.has_redis(7, 4),
        crate::version::Flavor::Valkey => version.major >= 9,
    }
}

fn collection_length<'k>(kind: &str, key: &'k [u8]) -> [&'k [u8]; 2] {
    [length_command(kind).first().copied().unwrap_or_default(), key]
}

/// A page of HSCAN, SSCAN or ZSCAN.
struct ElementPage {
    cursor: Vec<u8>,
    elements: Vec<Vec<u8>>,
    /// What looking the elements up should answer.
    print: Print,
}

impl ElementPage {
    fn of(frame: Frame<'_>, kind: &str) -> Option<Self> {
        let Frame::Array(Some(mut reply)) = frame else { return None };
        let cursor = reply.next_bulk().ok()??.to_vec();
        let Frame::Array(Some(mut items)) = reply.next_frame().ok()?? else { return None };
        let mut elements = Vec::new();
        let mut values = Vec::new();
        while let Some(element) = items.next_bulk().ok()? {
            elements.push(element.to_vec());
            if kind != "set" {
                values.push(items.next_frame().ok()??);
            }
        }
        let print = match kind {
            "set" => Print::of_items(elements.iter().map(|_| Frame::Integer(1)), Reading::Raw),
            "hash" => Print::of_items(values.into_iter(), Reading::Raw),
            _ => Print::of_items(values.into_iter(), Reading::Scores),
        };
        Some(Self { cursor, elements, print })
    }
}

/// The id that begins the last entry of an XRANGE or XPENDING reply.
fn last_id(frame: Frame<'_>) -> Option<Vec<u8>> {
    let Frame::Array(Some(mut entries)) = frame else { return None };
    let mut last: Option<Elements<'_>> = None;
    while let Some(Frame::Array(Some(entry))) = entries.next_frame().ok()? {
        last = Some(entry);
    }
    Some(last?.next_bulk().ok()??.to_vec())
}

/// The smallest id behind `id`; exclusive ranges are known from 6.2 only.
fn after(id: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(id);
    let (ms, seq) = text.split_once('-').unwrap_or((&text, "0"));
    let ms: u64 = ms.parse().unwrap_or(u64::MAX);
    let seq: u64 = seq.parse().unwrap_or(u64::MAX);
    match seq.checked_add(1) {
        Some(seq) => format!("{ms}-{seq}"),
        None => format!("{}-0", ms.saturating_add(1)),
    }
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_followed() {
        assert_eq!(after(b"5-7"), b"5-8");
        assert_eq!(after(format!("5-{}", u64::MAX).as_bytes()), b"6-0");
        let reply = b"*2\r\n*2\r\n$3\r\n1-1\r\n*0\r\n*2\r\n$3\r\n1-2\r\n*0\r\n";
        let (frame, _) = Frame::parse(reply).unwrap();
        assert_eq!(last_id(frame), Some(b"1-2".to_vec()));
        assert_eq!(last_id(Frame::Array(None)), None);
    }

    #[test]
    fn a_scanned_page_prints_as_its_lookup() {
        let scan = b"*2\r\n$1\r\n0\r\n*4\r\n$1\r\na\r\n$3\r\n1.5\r\n$1\r\nb\r\n$3\r\ninf\r\n";
        let lookup = b"*2\r\n$4\r\n1.50\r\n$3\r\ninf\r\n";
        let page = ElementPage::of(Frame::parse(scan).unwrap().0, "zset").unwrap();
        assert_eq!(page.elements, [b"a", b"b"]);
        let lookup = Frame::parse(lookup).unwrap().0;
        assert_eq!(page.print, Print::of(lookup, Reading::Scores));
        assert_ne!(page.print, Print::of(lookup, Reading::Raw));
    }
}
