//! Streams: options that came after 5.0.

use super::super::{integer, is, is_any};
use super::{Rewrite, Writer, has};

/// The options of XADD and XTRIM before the id or the end.
#[derive(Default)]
struct Options {
    /// Behind them.
    end: usize,
    no_stream: bool,
    keeps_references: bool,
    /// `MAXLEN` or `MINID`, where `=` and the threshold stand.
    trim: Option<(bool, usize)>,
    exact: bool,
    limit: bool,
}

impl<'a> Writer<'a, '_> {
    /// XADD, XTRIM: what an older target does not know, and LIMIT: a master has made an approximate length an
    /// exact one and left the LIMIT, which only a replica takes. NOMKSTREAM (6.2) took effect, so the stream is
    /// there; trimming by MINID (6.2) is done behind the command.
    pub(super) fn trimming(mut self) -> Option<Rewrite> {
        let options = self.stream_options()?;
        let newer = self.target.has_redis(6, 2);
        let by_id = options.trim.filter(|(by_id, _)| *by_id && !newer);
        let drops = options.limit && options.exact
            || options.no_stream && !newer
            || options.keeps_references && !has(self.target, (8, 2), (u16::MAX, 0));
        if !drops && by_id.is_none() {
            return None;
        }
        let (key, adds) = (self.arg(1)?, is(self.args.name(), "XADD"));
        let mut commands = 0;
        if adds || by_id.is_none() {
            let mut words = vec![key];
            if options.no_stream && newer {
                words.push(b"NOMKSTREAM");
            }
            if let Some((minimum, at)) = options.trim.filter(|_| by_id.is_none()) {
                words.push(if minimum { b"MINID" } else { b"MAXLEN" });
                if options.exact {
                    words.push(b"=");
                }
                words.push(self.arg(at)?);
            }
            let name = if adds { "XADD" } else { "XTRIM" };
            self.append_around(name, 0..0, &words, options.end..self.args.len());
            commands += 1;
        }
        if let Some((_, at)) = by_id {
            match id_before(self.arg(at)?)? {
                Some(last) => {
                    self.append_trimming_script(key, last.as_bytes());
                    commands += 1;
                }
                // Nothing comes before 0-0.
                None if commands == 0 => return Some(Rewrite::Drop),
                None => {}
            }
        }
        Some(Rewrite::Replaced(commands))
    }

    fn stream_options(&self) -> Option<Options> {
        let mut options = Options { end: 2, ..Options::default() };
        while let Some(word) = self.arg(options.end) {
            match word {
                _ if is(word, "NOMKSTREAM") => options.no_stream = true,
                _ if is(word, "KEEPREF") => options.keeps_references = true,
                // What these do to groups nothing else does.
                _ if is_any(word, &["DELREF", "ACKED"]) => return None,
                _ if is_any(word, &["MAXLEN", "MINID"]) => {
                    let mut at = options.end + 1;
                    match self.arg(at)? {
                        b"=" => (options.exact, at) = (true, at + 1),
                        // Approximate trimming depends on the server's nodes: not in a stream, and not guessed at.
                        b"~" => return None,
                        _ => {}
                    }
                    options.trim = Some((is(word, "MINID"), at));
                    options.end = at;
                }
                _ if is(word, "LIMIT") => {
                    options.limit = true;
                    options.end += 1;
                }
                _ => break,
            }
            options.end += 1;
        }
        Some(options)
    }

    /// XDELEX (8.2) that leaves the groups alone is XDEL.
    pub(super) fn xdelex(mut self) -> Option<Rewrite> {
        if has(self.target, (8, 2), (u16::MAX, 0)) {
            return None;
        }
        let ids = if is(self.arg(2)?, "KEEPREF") { 3 } else { 2 };
        if !is(self.arg(ids)?, "IDS") || integer(self.arg(ids + 1)?)? < 1 {
            return None;
        }
        let end = self.args.len();
        self.append_around("XDEL", 1..2, &[], ids + 2..end);
        Some(Rewrite::Replaced(1))
    }

    /// ENTRIESREAD (7.0) is a counter that older servers do not keep; CREATECONSUMER came with 6.2, and before
    /// that whoever asks for what is pending to it is a consumer.
    pub(super) fn xgroup(self) -> Option<Rewrite> {
        if is(self.arg(1)?, "CREATECONSUMER") && !self.target.has_redis(6, 2) {
            let words: [&[u8]; 8] =
                [b"GROUP", self.arg(3)?, self.arg(4)?, b"COUNT", b"1", b"STREAMS", self.arg(2)?, b"0"];
            return self.command("XREADGROUP", 0..0, &words);
        }
        let option =
            (5..self.args.len()).find(|&at| self.arg(at).is_some_and(|arg| is(arg, "ENTRIESREAD")))?;
        if self.target.has_redis(7, 0) || option + 2 != self.args.len() {
            return None;
        }
        self.command("XGROUP", 1..option, &[])
    }

    /// ENTRIESADDED, MAXDELETEDID (7.0), likewise.
    pub(super) fn xsetid(self) -> Option<Rewrite> {
        if self.target.has_redis(7, 0) {
            return None;
        }
        self.command("XSETID", 1..3, &[])
    }
}

/// The id just before `id`; `Some(None)`: there is none. `None`: it is not an id.
fn id_before(id: &[u8]) -> Option<Option<String>> {
    let text = std::str::from_utf8(id).ok()?;
    let (ms, seq) = text.split_once('-').unwrap_or((text, "0"));
    let (ms, seq): (u64, u64) = (ms.parse().ok()?, seq.parse().ok()?);
    Some(match (ms, seq) {
        (0, 0) => None,
        (ms, 0) => Some(format!("{}-{}", ms - 1, u64::MAX)),
        (ms, seq) => Some(format!("{ms}-{}", seq - 1)),
    })
}
