//! Values too heavy to be asked for whole: read from the source in chunks, each compared with the
//! target's, so that neither a server is held up nor memory grows with the value.
//!
//! Strings, lists and streams are read by range on both sides; hashes, sets and sorted sets are
//! scanned on the source and their elements looked up on the target, equal lengths then rule out
//! elements that only the target has. A chunk that differs is settled as keys are: read, wait for
//! the target, read both again. One that keeps changing is halved until only the elements that
//! change remain undecided.

use self::print::{Print, Reading};
use self::question::{ElementPage, EntryPage, Question, after};
use super::VerifyError;
use super::context::Context;
use super::frame::Frame;
use super::questions::{amount, length_command};
use super::side::Links;

pub(super) mod print;
mod question;

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
            if self.unsettled > MAX_UNSETTLED {
                return Ok(None);
            }
        }
        self.length("string").await
    }

    async fn list(&mut self) -> Result<Option<String>, VerifyError> {
        let length = self.source.ask(self.key, &[b"LLEN", self.key], amount).await?;
        let step = self.chunk_elements(length).await?;
        let end = (step - 1).to_string();
        let head = Question::range(b"LRANGE", b"0", end.as_bytes());
        let head_before = head.ask(self.source, self.key).await?;
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
        // Elements move when others before them go, and those that moved into a chunk already
        // compared were not seen.
        if head.ask(self.source, self.key).await? != head_before {
            self.unsettled += 1;
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
        let field_expiries = kind == "hash" && self.context.abilities.field_expiries;
        let mut cursor = b"0".to_vec();
        loop {
            let args = [scan, self.key, &cursor, b"COUNT", count.as_bytes()];
            let page = self.source.ask(self.key, &args, |frame| ElementPage::of(frame, kind)).await?;
            let Some(page) = page else {
                // Replaced by a value of another type meanwhile.
                self.unsettled += 1;
                return Ok(None);
            };
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
        let beyond = one_more(&count);
        let mut start = b"-".to_vec();
        loop {
            let args = [&b"XRANGE"[..], self.key, &start, b"+", b"COUNT", count.as_bytes()];
            let page = self.source.ask(self.key, &args, |frame| EntryPage::of(frame, Reading::Raw)).await?;
            let Some(page) = page else { break };
            // With its end, as the target may have entries between that the source has not.
            let tail = [&start[..], &page.last, b"COUNT", beyond.as_bytes()];
            let question = Question::of(b"XRANGE", &tail, Reading::Raw);
            if self.differs_from(&page.print, &question).await? {
                return Ok(Some(format!("entries from {}", start.escape_ascii())));
            }
            if self.unsettled > MAX_UNSETTLED {
                return Ok(None);
            }
            let Some(next) = after(&page.last) else { break };
            start = next;
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
        let beyond = one_more(count);
        let mut start = b"-".to_vec();
        loop {
            let args = [&b"XPENDING"[..], self.key, group, &start, b"+", count.as_bytes()];
            let read = |frame: Frame<'_>| EntryPage::of(frame, Reading::Pending);
            let Some(page) = self.source.ask(self.key, &args, read).await? else { return Ok(None) };
            let tail = [group, &start, &page.last, beyond.as_bytes()];
            let question = Question::of(b"XPENDING", &tail, Reading::Pending);
            if self.differs_from(&page.print, &question).await? {
                return Ok(Some("pending entries of a group".into()));
            }
            match after(&page.last) {
                Some(next) if self.unsettled <= MAX_UNSETTLED => start = next,
                _ => return Ok(None),
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
        self.settles_apart(question).await
    }

    /// As `differs`, where the source has answered already.
    async fn differs_from(&mut self, ours: &Print, question: &Question<'_>) -> Result<bool, VerifyError> {
        if *ours == question.ask(self.target, self.key).await? {
            return Ok(false);
        }
        self.settles_apart(question).await
    }

    async fn settles_apart(&mut self, question: &Question<'_>) -> Result<bool, VerifyError> {
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

fn collection_length<'k>(kind: &str, key: &'k [u8]) -> [&'k [u8]; 2] {
    [length_command(kind).first().copied().unwrap_or_default(), key]
}

/// A count that shows whether there is more than `count`.
fn one_more(count: &str) -> String {
    count.parse().map_or(CHUNK_ELEMENTS, |count: u64| count + 1).to_string()
}
