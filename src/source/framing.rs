//! How a master frames the RDB it sends (PURE): `$<length>` or `$EOF:<mark>`, and where it ends.
//! Source: Redis `replication.c` (readSyncBulkPayload).

use memchr::memmem;

/// Length of the end mark of a transfer without a known length.
pub const MARK: usize = 40;

/// The line before the RDB.
#[derive(Debug, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Mark([u8; MARK]),
}

impl Framing {
    /// `line`: without CRLF, starting with `$`.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let rest = line.strip_prefix(b"$")?;
        match rest.strip_prefix(b"EOF:") {
            Some(mark) => mark.try_into().ok().map(Self::Mark),
            None => std::str::from_utf8(rest).ok()?.parse().ok().map(Self::Length),
        }
    }
}

/// Splits what arrives into RDB bytes and what follows them.
pub struct Splitter {
    state: SplitState,
}

enum SplitState {
    Left(u64),
    /// Bytes that may be the beginning of the mark are held back; never more than `MARK - 1`.
    Until {
        finder: Box<memmem::Finder<'static>>,
        held: Vec<u8>,
    },
    Done,
}

/// One step: these bytes belong to the RDB, this many of the input were used.
#[derive(Debug, PartialEq, Eq)]
pub struct Split {
    /// RDB bytes that were held back by an earlier step, to go before `direct`.
    pub held: Vec<u8>,
    /// RDB bytes: `input[..direct]`.
    pub direct: usize,
    /// The input from here on is not part of the RDB; only when `ended`.
    pub used: usize,
    pub ended: bool,
}

impl Splitter {
    pub fn new(framing: Framing) -> Self {
        Self {
            state: match framing {
                Framing::Length(length) => SplitState::Left(length),
                Framing::Mark(mark) => SplitState::Until {
                    finder: Box::new(memmem::Finder::new(&mark).into_owned()),
                    held: Vec::new(),
                },
            },
        }
    }

    pub fn split(&mut self, input: &[u8]) -> Split {
        match &mut self.state {
            SplitState::Done => Split { held: Vec::new(), direct: 0, used: 0, ended: true },
            SplitState::Left(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= take as u64;
                let ended = *left == 0;
                if ended {
                    self.state = SplitState::Done;
                }
                Split { held: Vec::new(), direct: take, used: take, ended }
            }
            SplitState::Until { finder, held } => {
                // A mark that straddles reads lies in what was held plus the first MARK - 1 new bytes.
                let before = held.len();
                let seam = input.len().min(MARK - 1);
                held.extend_from_slice(input.get(..seam).unwrap_or_default());
                if let Some(at) = finder.find(held) {
                    let mut rdb = std::mem::take(held);
                    rdb.truncate(at);
                    self.state = SplitState::Done;
                    return Split { held: rdb, direct: 0, used: at + MARK - before, ended: true };
                }
                held.truncate(before);
                if let Some(at) = finder.find(input) {
                    let held = std::mem::take(held);
                    self.state = SplitState::Done;
                    return Split { held, direct: at, used: at + MARK, ended: true };
                }
                let total = before + input.len();
                let keep = total.min(MARK - 1);
                if keep >= input.len() {
                    held.extend_from_slice(input);
                    let out = held.drain(..total - keep).collect();
                    return Split { held: out, direct: 0, used: input.len(), ended: false };
                }
                let out = std::mem::take(held);
                let direct = input.len() - keep;
                held.extend_from_slice(input.get(direct..).unwrap_or_default());
                Split { held: out, direct, used: input.len(), ended: false }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARK_BYTES: &[u8; MARK] = b"aaaaaaaaabbbbbbbbbbaaaaaaaaaacccccccccca";

    fn run(mut splitter: Splitter, parts: &[&[u8]]) -> (Vec<u8>, Vec<u8>, bool) {
        let (mut rdb, mut rest, mut ended) = (Vec::new(), Vec::new(), false);
        for part in parts {
            if ended {
                rest.extend_from_slice(part);
                continue;
            }
            let split = splitter.split(part);
            rdb.extend_from_slice(&split.held);
            rdb.extend_from_slice(&part[..split.direct]);
            ended = split.ended;
            if ended {
                rest.extend_from_slice(&part[split.used..]);
            } else {
                assert_eq!(split.used, part.len());
            }
        }
        (rdb, rest, ended)
    }

    #[test]
    fn lines_are_read() {
        assert_eq!(Framing::parse(b"$176"), Some(Framing::Length(176)));
        let line = [b"$EOF:".as_slice(), MARK_BYTES].concat();
        assert_eq!(Framing::parse(&line), Some(Framing::Mark(*MARK_BYTES)));
        assert_eq!(Framing::parse(b"$EOF:short"), None);
        assert_eq!(Framing::parse(b"$-1"), None);
    }

    #[test]
    fn a_length_ends_where_it_says() {
        let splitter = Splitter::new(Framing::Length(5));
        assert_eq!(run(splitter, &[b"abc", b"de*1\r\n"]), (b"abcde".to_vec(), b"*1\r\n".to_vec(), true));
    }

    proptest! {
        #[test]
        fn a_mark_is_found_however_reads_split(
            // Few letters, so that parts of the mark occur often.
            rdb in prop::collection::vec(prop::sample::select(vec![b'a', b'b', b'c']), 0..120),
            cuts in prop::collection::vec(0usize..200, 0..12),
        ) {
            prop_assume!(memmem::find(&[&rdb[..], &MARK_BYTES[..]].concat(), MARK_BYTES) == Some(rdb.len()));
            let all = [&rdb[..], &MARK_BYTES[..], b"*1\r\n"].concat();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(all.len())).collect();
            cuts.push(0);
            cuts.push(all.len());
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|pair| &all[pair[0]..pair[1]]).collect();
            let splitter = Splitter::new(Framing::Mark(*MARK_BYTES));
            prop_assert_eq!(run(splitter, &parts), (rdb, b"*1\r\n".to_vec(), true));
        }
    }
}
