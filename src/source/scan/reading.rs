//! Keys and their values, page by page, in few round trips.
//!
//! A page of SCAN is followed by two questions about each key: when it expires, and the first bytes of it as
//! a string (GETRANGE costs the server less than half of what DUMP costs). What is no short string is
//! asked for its size, and then dumped, as much at a time as a bound allows, or read in pieces if it is big.
//! While the replies about one page are read, the server works on the next.

use super::emit::Value;
use super::usage::{Usage, UsageQuestion};
use super::{Place, ScanError, Session, Work};
use crate::connection::Address;
use crate::resp::{Next, ReplyVerdict};
use crate::verify::frame::Frame;
use crate::verify::keys::KeyArena;
use crate::verify::wire::Wire;

/// Keys a page.
const PAGE: usize = 1000;
const PAGE_TEXT: &[u8] = b"1000";
/// A string that is longer is asked for its size first.
const PREFIX: usize = 16 << 10;
const PREFIX_LAST: &[u8] = b"16383";
/// Bytes of values that are dumped together, by what they take in the server's memory.
const DUMPED: u64 = 4 << 20;
/// Keys that may wait for their second question before the next page is read.
const MOST_WAITING: usize = 4 * PAGE;
/// What an element takes, where the server does not tell the size of a value.
const ELEMENT: u64 = 64;

/// A key about which more has to be asked.
#[derive(Debug)]
pub struct Later {
    key: Vec<u8>,
    step: Step,
    /// Bytes in the server's memory, once known.
    size: u64,
    usage: Usage,
}

impl Later {
    fn new(key: &[u8], usage: Usage) -> Self {
        Self { key: key.to_vec(), step: Step::Size, size: 0, usage }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Size,
    Type,
    Length(&'static str, u64),
    Dump,
}

/// What was asked together.
#[derive(Debug, Default)]
struct Batch {
    keys: KeyArena,
    /// Cursor of the page behind this one; empty where the keys do not come of a scan.
    next: Vec<u8>,
    /// The server's time was asked for.
    timed: bool,
    /// Its keys were asked about at first sight.
    sighted: bool,
    /// … and for this, before anything that counts as a use.
    usage: Option<UsageQuestion>,
    /// How many of those that wait were asked about.
    laters: usize,
    /// Keys that the filter left out of the page.
    left_out: u64,
}

/// What the answers about one key come to.
enum Found {
    Gone,
    /// Another node has it.
    Elsewhere,
}

/// When a key expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    Gone,
    None,
    /// Unix ms by the server's clock.
    At(i64),
}

impl Expiry {
    pub fn at(self) -> Option<i64> {
        match self {
            Self::At(at) => Some(at),
            Self::Gone | Self::None => None,
        }
    }
}

impl Work {
    /// All keys of a database, from `cursor` on.
    pub(super) async fn read_database(
        &mut self,
        session: &mut Session,
        db: u32,
        cursor: &[u8],
    ) -> Result<(), ScanError> {
        session.select(db).await?;
        self.asked = 0;
        let mut page = Batch::default();
        queue_page(&mut session.wire, cursor);
        session.wire.send().await?;
        self.read_page(session, db, &mut page).await?;
        let mut asked: Option<Batch> = None;
        loop {
            let more = page.next != b"0";
            self.ask(session, &mut page, more).await?;
            let mut spare = Batch::default();
            if let Some(mut before) = asked.take() {
                self.judge(session, db, &mut before).await?;
                self.reached(session, db, &before);
                spare = before;
            }
            if !more {
                self.judge(session, db, &mut page).await?;
                self.finish(session, db).await?;
                self.count_left_out(&page);
                return Ok(());
            }
            self.read_page(session, db, &mut spare).await?;
            let mut before = std::mem::replace(&mut page, spare);
            if self.waiting.len() > MOST_WAITING || self.has_big_ones() {
                self.judge(session, db, &mut before).await?;
                self.finish(session, db).await?;
                self.reached(session, db, &before);
            } else {
                asked = Some(before);
            }
        }
    }

    /// These keys as they are now, whatever was known of them.
    pub(super) async fn read_again(
        &mut self,
        session: &mut Session,
        db: u32,
        keys: &[&[u8]],
    ) -> Result<(), ScanError> {
        session.select(db).await?;
        self.asked = 0;
        let mut asked: Option<Batch> = None;
        for page in keys.chunks(PAGE) {
            let mut batch = Batch::default();
            page.iter().for_each(|key| batch.keys.push(key));
            self.ask(session, &mut batch, false).await?;
            if let Some(mut before) = asked.replace(batch) {
                self.judge(session, db, &mut before).await?;
            }
        }
        if let Some(mut before) = asked {
            self.judge(session, db, &mut before).await?;
        }
        self.finish(session, db).await
    }

    /// Until nothing waits any more.
    async fn finish(&mut self, session: &mut Session, db: u32) -> Result<(), ScanError> {
        while !self.waiting.is_empty() {
            let mut batch = Batch::default();
            self.ask(session, &mut batch, false).await?;
            self.judge(session, db, &mut batch).await?;
        }
        if !self.emit.in_snapshot() {
            self.read_big_ones(session).await?;
        }
        Ok(())
    }

    fn reached(&mut self, session: &Session, db: u32, page: &Batch) {
        self.count_left_out(page);
        if !page.next.is_empty() {
            let run_id = session.run_id.clone();
            self.place = Some(Place { db, cursor: page.next.clone(), run_id });
        }
    }

    /// Only with a page that need not be read again.
    fn count_left_out(&self, page: &Batch) {
        if self.first {
            self.progress.leave_out(page.left_out);
        }
    }

    /// The answer to SCAN, without what the filter leaves out.
    async fn read_page(&self, session: &mut Session, db: u32, page: &mut Batch) -> Result<(), ScanError> {
        let Session { wire, address, .. } = session;
        page.keys.clear();
        page.left_out = 0;
        let unexpected = |_| ScanError::Unexpected { address: address.clone(), command: "SCAN" };
        let mut reply = match wire.reply().await? {
            Frame::Array(Some(reply)) => reply,
            Frame::Error(text) => return Err(ScanError::refused(address, "SCAN", text)),
            _ => return Err(unexpected(())),
        };
        let cursor = reply.next_bulk().map_err(|_| unexpected(()))?.unwrap_or_default();
        page.next.clear();
        page.next.extend_from_slice(cursor);
        let Some(Frame::Array(Some(mut keys))) = reply.next_frame().map_err(|_| unexpected(()))? else {
            return Err(unexpected(()));
        };
        while let Some(key) = keys.next_bulk().map_err(|_| unexpected(()))? {
            if self.rules.admits(db, key) {
                page.keys.push(key);
            } else {
                page.left_out += 1;
            }
        }
        Ok(())
    }

    /// Sends the questions about the keys of `batch` and about some that wait; `more`: and for the next page.
    async fn ask(&mut self, session: &mut Session, batch: &mut Batch, more: bool) -> Result<(), ScanError> {
        let Session { wire, abilities, usage, .. } = session;
        if more {
            // First, so that its keys are known before the other answers are read.
            queue_page(wire, &batch.next);
        }
        batch.timed = abilities.time && !abilities.pexpiretime;
        if batch.timed {
            wire.queue(&[b"TIME"]);
        }
        let question: &[u8] = if abilities.pexpiretime { b"PEXPIRETIME" } else { b"PTTL" };
        (batch.sighted, batch.usage) = (abilities.getrange, *usage);
        for key in batch.keys.iter() {
            if let Some(usage) = batch.usage {
                usage.queue(wire, key);
            }
            if batch.sighted {
                wire.queue(&[question, key]);
                wire.queue(&[b"GETRANGE", key, b"0", PREFIX_LAST]);
            }
        }
        batch.laters = 0;
        let mut bytes = 0;
        for later in self.waiting.iter_mut().skip(self.asked) {
            if later.step == Step::Size && !abilities.memory_usage {
                later.step = Step::Type;
            }
            let key = later.key.as_slice();
            match later.step {
                Step::Size => wire.queue(&[b"MEMORY".as_slice(), b"USAGE", key]),
                Step::Type => wire.queue(&[b"TYPE", key]),
                Step::Length(command, _) => wire.queue(&[command.as_bytes(), key]),
                Step::Dump => {
                    bytes += later.size;
                    if bytes > DUMPED && bytes > later.size {
                        break;
                    }
                    wire.queue(&[question, key]);
                    wire.queue(&[b"DUMP", key]);
                }
            }
            batch.laters += 1;
        }
        self.asked += batch.laters;
        wire.send().await?;
        Ok(())
    }

    /// Reads the answers to what was asked with `batch`, apart from the page.
    async fn judge(&mut self, session: &mut Session, db: u32, batch: &mut Batch) -> Result<(), ScanError> {
        let now = match batch.timed {
            true => server_time(session.wire.reply().await?),
            false => None,
        };
        let now = now.unwrap_or_else(|| i64::try_from(crate::clock::unix_millis()).unwrap_or(i64::MAX));
        for key in batch.keys.iter() {
            let mut usage = Usage::Unknown;
            if let Some(question) = batch.usage {
                let told;
                (usage, told) = question.answer(&mut session.wire).await?;
                if !told {
                    session.usage = None;
                }
            }
            if batch.sighted {
                self.judge_sight(session, db, key, now, usage).await?;
                self.emit.settle().await?;
            } else {
                self.waiting.push_back(Later::new(key, usage));
            }
        }
        for _ in 0..batch.laters {
            self.judge_later(session, db, now).await?;
            self.emit.settle().await?;
        }
        batch.keys.clear();
        self.names.settle().await?;
        self.check_count(session)
    }

    async fn judge_sight(
        &mut self,
        session: &mut Session,
        db: u32,
        key: &[u8],
        now: i64,
        usage: Usage,
    ) -> Result<(), ScanError> {
        let exact = session.abilities.pexpiretime;
        let Session { wire, address, .. } = session;
        let expiry = read_expiry(wire, address, exact, now).await?;
        let mut verdict = None;
        match wire.reply().await? {
            // A file gets no later word: whether an empty text is one, or nothing any more, DUMP tells.
            Frame::Bulk(Some(text))
                if text.len() < PREFIX && !(text.is_empty() && self.rules.whole_values) =>
            {
                match expiry {
                    Ok(Expiry::Gone) => self.absent(db, key, &Found::Gone),
                    // Text can always be passed on.
                    Ok(expiry) => _ = self.take(db, key, expiry.at(), exact, Value::Text(text), usage),
                    Err(found) => self.absent(db, key, &found),
                }
            }
            Frame::Bulk(_) => verdict = Some(ReplyVerdict::WrongType),
            Frame::Error(text) => match ReplyVerdict::of(text) {
                found if found == ReplyVerdict::WrongType || found.next() == Next::Reroute => {
                    verdict = Some(found);
                }
                _ => return Err(ScanError::refused(address, "GETRANGE", text)),
            },
            _ => return Err(ScanError::Unexpected { address: address.clone(), command: "GETRANGE" }),
        }
        match verdict {
            Some(ReplyVerdict::WrongType) => {
                self.waiting.push_back(Later::new(key, usage));
            }
            Some(_) => self.absent(db, key, &Found::Elsewhere),
            None => {}
        }
        Ok(())
    }

    /// The first that waits.
    async fn judge_later(&mut self, session: &mut Session, db: u32, now: i64) -> Result<(), ScanError> {
        let Some(step) = self.waiting.front().map(|later| later.step) else { return Ok(()) };
        let Session { wire, address, abilities, .. } = session;
        let exact = abilities.pexpiretime;
        let expiry = match step {
            Step::Dump => read_expiry(wire, address, exact, now).await?,
            _ => Ok(Expiry::None),
        };
        let reply = wire.reply().await?;
        let whole = abilities.dump;
        // Taken away only now: what was asked on a connection that broke is asked again.
        let Some(mut later) = self.waiting.pop_front() else { return Ok(()) };
        self.asked = self.asked.saturating_sub(1);
        if let Frame::Error(text) = reply {
            let verdict = ReplyVerdict::of(text);
            if verdict.next() == Next::Reroute {
                self.absent(db, &later.key, &Found::Elsewhere);
                return Ok(());
            }
            // It has become a key of another type since.
            if verdict == ReplyVerdict::WrongType {
                later.step = Step::Size;
                self.waiting.push_back(later);
                return Ok(());
            }
            let command = match step {
                Step::Size => "MEMORY",
                Step::Type => "TYPE",
                Step::Length(command, _) => command,
                Step::Dump => "DUMP",
            };
            return Err(ScanError::refused(address, command, text));
        }
        match (step, reply) {
            (Step::Size, Frame::Integer(size)) => {
                later.size = u64::try_from(size).unwrap_or_default();
                self.sized(db, later, whole);
            }
            // Gone, or the server cannot tell.
            (Step::Size, _) => self.sized(db, later, whole),
            (Step::Type, Frame::Simple(b"none")) => self.absent(db, &later.key, &Found::Gone),
            (Step::Type, Frame::Simple(type_)) => match length_command(type_) {
                Some((command, each)) => {
                    later.step = Step::Length(command, each);
                    self.waiting.push_back(later);
                }
                None => self.sized(db, later, true),
            },
            (Step::Length(_, each), Frame::Integer(count)) => {
                later.size = u64::try_from(count).unwrap_or_default().saturating_mul(each);
                self.sized(db, later, whole);
            }
            (Step::Dump, Frame::Bulk(Some(payload))) => match expiry {
                Ok(Expiry::Gone) => self.absent(db, &later.key, &Found::Gone),
                Ok(expiry) => {
                    if !self.take(db, &later.key, expiry.at(), exact, Value::Dump(payload), later.usage) {
                        let (address, key) = (address.clone(), later.key.escape_ascii().to_string());
                        return Err(ScanError::UnknownForm { address, key });
                    }
                }
                Err(found) => self.absent(db, &later.key, &found),
            },
            (Step::Dump, Frame::Bulk(None)) => self.absent(db, &later.key, &Found::Gone),
            (Step::Dump, Frame::TooLong(length)) if self.rules.whole_values => {
                let (address, key) = (address.clone(), later.key.escape_ascii().to_string());
                return Err(ScanError::TooLarge { address, key, length });
            }
            (Step::Dump, Frame::TooLong(length)) => self.big.push((db, later.key, length)),
            _ => return Err(ScanError::Unexpected { address: address.clone(), command: "DUMP" }),
        }
        Ok(())
    }

    /// Its size is known: dumped, or read in pieces.
    fn sized(&mut self, db: u32, mut later: Later, dump: bool) {
        let big = later.size > self.rules.big_above && !self.rules.whole_values;
        if big || !dump {
            self.big.push((db, later.key, later.size));
        } else {
            later.step = Step::Dump;
            self.waiting.push_back(later);
        }
    }

    fn absent(&mut self, db: u32, key: &[u8], found: &Found) {
        match found {
            Found::Gone => self.gone(db, key),
            Found::Elsewhere => {}
        }
    }
}

fn queue_page(wire: &mut Wire, cursor: &[u8]) {
    wire.queue(&[b"SCAN", cursor, b"COUNT", PAGE_TEXT]);
}

/// `exact`: the answer is a time, not a span. The inner error: another node has the key.
async fn read_expiry(
    wire: &mut Wire,
    address: &Address,
    exact: bool,
    now: i64,
) -> Result<Result<Expiry, Found>, ScanError> {
    Ok(Ok(match wire.reply().await? {
        Frame::Integer(-1) => Expiry::None,
        Frame::Integer(..-1) => Expiry::Gone,
        Frame::Integer(at) if exact => Expiry::At(at),
        Frame::Integer(left) => Expiry::At(now.saturating_add(left)),
        Frame::Error(text) if ReplyVerdict::of(text).next() == Next::Reroute => {
            return Ok(Err(Found::Elsewhere));
        }
        Frame::Error(text) => return Err(ScanError::refused(address, "PTTL", text)),
        _ => return Err(ScanError::Unexpected { address: address.clone(), command: "PTTL" }),
    }))
}

/// As `read_expiry`, for a key that is known to be here.
pub async fn expiry_of(session: &mut Session, key: &[u8]) -> Result<Expiry, ScanError> {
    let exact = session.abilities.pexpiretime;
    let Session { wire, address, abilities, .. } = session;
    let timed = abilities.time && !exact;
    if timed {
        wire.queue(&[b"TIME"]);
    }
    wire.queue(&[if exact { b"PEXPIRETIME".as_slice() } else { b"PTTL" }, key]);
    wire.send().await?;
    let now = if timed { server_time(wire.reply().await?) } else { None };
    let now = now.unwrap_or_else(|| i64::try_from(crate::clock::unix_millis()).unwrap_or(i64::MAX));
    Ok(read_expiry(wire, address, exact, now).await?.unwrap_or(Expiry::Gone))
}

/// Seconds and microseconds; in ms.
fn server_time(reply: Frame<'_>) -> Option<i64> {
    let Frame::Array(Some(mut parts)) = reply else { return None };
    let mut number = || std::str::from_utf8(parts.next_bulk().ok()??).ok()?.parse::<i64>().ok();
    let (seconds, micros) = (number()?, number()?);
    seconds.checked_mul(1000)?.checked_add(micros / 1000)
}

/// The command that counts the elements of a value of this type, and what one of them takes, about.
fn length_command(type_: &[u8]) -> Option<(&'static str, u64)> {
    Some(match type_ {
        b"string" => ("STRLEN", 1),
        b"list" => ("LLEN", ELEMENT),
        b"set" => ("SCARD", ELEMENT),
        b"zset" => ("ZCARD", ELEMENT),
        b"hash" => ("HLEN", 2 * ELEMENT),
        b"stream" => ("XLEN", 2 * ELEMENT),
        _ => return None,
    })
}
