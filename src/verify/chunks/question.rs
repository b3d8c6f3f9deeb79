//! Questions about a part of a value, and pages of its elements.

use super::print::{Print, Printer, Reading};
use crate::verify::VerifyError;
use crate::verify::frame::{Elements, Frame};
use crate::verify::side::{Links, is_answer};

/// A question about part of a value, whose answer must be the same on both sides.
pub(super) struct Question<'q> {
    command: &'q [u8],
    /// Stands between command and key.
    sub: Option<&'q [u8]>,
    tail: Vec<&'q [u8]>,
    reading: Reading,
    /// Asked once per element of `tail`, where one command cannot take many.
    single: Option<&'q [u8]>,
}

impl<'q> Question<'q> {
    pub fn of(command: &'q [u8], tail: &[&'q [u8]], reading: Reading) -> Self {
        Self { command, sub: None, tail: tail.to_vec(), reading, single: None }
    }

    pub fn range(command: &'q [u8], first: &'q [u8], last: &'q [u8]) -> Self {
        Self::of(command, &[first, last], Reading::Raw)
    }

    pub fn inner(command: &'q [u8], sub: &'q [u8], reading: Reading) -> Self {
        Self { sub: Some(sub), ..Self::of(command, &[], reading) }
    }

    pub fn lookup(kind: &str, elements: &'q [Vec<u8>]) -> Self {
        let (command, single, reading): (&[u8], Option<&[u8]>, _) = match kind {
            "hash" => (b"HMGET", None, Reading::Raw),
            "set" => (b"SMISMEMBER", Some(b"SISMEMBER"), Reading::Raw),
            _ => (b"ZMSCORE", Some(b"ZSCORE"), Reading::Scores),
        };
        let tail = elements.iter().map(Vec::as_slice).collect();
        Self { command, sub: None, tail, reading, single }
    }

    pub fn field_expiries(elements: &'q [Vec<u8>]) -> Self {
        // Redis 7.4 and Valkey 9: HPEXPIRETIME key FIELDS count field …
        let mut question = Self::of(b"HPEXPIRETIME", &[b"FIELDS"], Reading::Expiries);
        question.tail.extend(elements.iter().map(Vec::as_slice));
        question
    }

    pub async fn ask(&self, links: &mut Links, key: &[u8]) -> Result<Print, VerifyError> {
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
                Frame::Error(text) if !is_answer(text) => text.to_vec(),
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

/// A page of HSCAN, SSCAN or ZSCAN.
pub(super) struct ElementPage {
    pub cursor: Vec<u8>,
    pub elements: Vec<Vec<u8>>,
    /// What looking the elements up should answer.
    pub print: Print,
}

impl ElementPage {
    pub fn of(frame: Frame<'_>, kind: &str) -> Option<Self> {
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

/// A page of XRANGE or XPENDING; `None` when there are no more entries.
pub(super) struct EntryPage {
    /// Id of the last entry.
    pub last: Vec<u8>,
    pub print: Print,
}

impl EntryPage {
    pub fn of(frame: Frame<'_>, reading: Reading) -> Option<Self> {
        Some(Self { last: last_id(frame)?, print: Print::of(frame, reading) })
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

/// The smallest id behind `id`, `None` behind the greatest; exclusive ranges are known from 6.2 only.
pub(super) fn after(id: &[u8]) -> Option<Vec<u8>> {
    let (ms, seq) = std::str::from_utf8(id).ok()?.split_once('-')?;
    let (ms, seq): (u64, u64) = (ms.parse().ok()?, seq.parse().ok()?);
    let next = match seq.checked_add(1) {
        Some(seq) => format!("{ms}-{seq}"),
        None => format!("{}-0", ms.checked_add(1)?),
    };
    Some(next.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_followed() {
        assert_eq!(after(b"5-7").unwrap(), b"5-8");
        assert_eq!(after(format!("5-{}", u64::MAX).as_bytes()).unwrap(), b"6-0");
        // Nothing can follow; beginning again would never end.
        assert_eq!(after(format!("{}-{}", u64::MAX, u64::MAX).as_bytes()), None);
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
