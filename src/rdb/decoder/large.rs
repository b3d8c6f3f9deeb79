//! Values beyond the limit, in runs that fit into bounded memory.

use crate::rdb::cursor::{Cursor, Stop, TextHead};
use crate::rdb::error::Fault;
use crate::rdb::event::Limits;
use crate::rdb::layout::Elements;
use crate::rdb::lzf;
use crate::rdb::scan::{Rest, Scan, Until};

/// A run of elements or string bytes ends once it has this many bytes.
const RUN: usize = 256 << 10;
/// Expanded bytes a piece; small, because a resume snapshot copies them.
const EXPANDED_PIECE: usize = 64 << 10;

const LARGE_ELEMENT: &str = "an element larger than one value may be";
const LARGE_TAIL: &str = "consumer groups larger than one value may be";

#[derive(Clone, Debug)]
pub(super) struct Large {
    pub key: Vec<u8>,
    pub type_byte: u8,
    pub elements: Elements,
    pub scan: Scan,
    /// No piece of a string came yet.
    first: bool,
    part: Part,
}

#[derive(Clone, Debug)]
enum Part {
    Raw { left: u64 },
    Lzf(Expansion),
    Elements,
    Unsupported(&'static str),
    End,
}

/// An LZF string under expansion. `start <= window.len()`; what stands from `start` on is the
/// piece in the making, before it what references may reach.
#[derive(Clone, Debug)]
struct Expansion {
    compressed_left: u64,
    expanded_left: u64,
    window: Vec<u8>,
    start: usize,
    /// Bytes of the input that are worked in, but not consumed.
    read: usize,
    /// The piece was handed out: the next call begins a new one.
    handed_out: bool,
}

/// An event before its slices are borrowed; `end` bytes of the input belong to it.
#[derive(Clone, Copy)]
pub(super) enum FoundLarge {
    Raw { end: usize, first: bool },
    Expanded { first: bool },
    Elements { end: usize },
    StreamTail { end: usize },
    End,
    Unsupported { why: &'static str },
}

impl Large {
    /// Begins the string at the cursor: bytes consumed up to its payload, and the state.
    pub fn string(key: &[u8], mut cursor: Cursor<'_>) -> Result<(usize, Self), Stop> {
        let part = match cursor.text_head()? {
            TextHead::Lzf { compressed, length } => Part::Lzf(Expansion {
                compressed_left: compressed,
                expanded_left: length,
                window: Vec::new(),
                start: 0,
                read: 0,
                handed_out: true,
            }),
            head => Part::Raw { left: head.payload() },
        };
        let large = Large { part, ..Self::collection(key, 0, Elements::List, Scan::module_items()) };
        Ok((cursor.at, large))
    }

    /// Begins a collection whose `scan` rests at its first element.
    pub fn collection(key: &[u8], type_byte: u8, elements: Elements, scan: Scan) -> Self {
        Large { key: key.to_vec(), type_byte, elements, scan, first: true, part: Part::Elements }
    }

    /// The piece that [`FoundLarge::Expanded`] speaks of.
    pub fn expanded(&self) -> &[u8] {
        match &self.part {
            Part::Lzf(expansion) => expansion.window.get(expansion.start..).unwrap_or_default(),
            _ => &[],
        }
    }

    pub fn find(&mut self, input: &[u8], limits: &Limits) -> Result<(usize, FoundLarge), Stop> {
        match &mut self.part {
            Part::Raw { left: 0 } | Part::End => Ok((0, FoundLarge::End)),
            Part::Raw { left } => {
                let end = usize::try_from(*left).unwrap_or(RUN).min(RUN);
                if input.len() < end {
                    return Err(Stop::NeedMore(end));
                }
                *left -= end as u64;
                Ok((end, FoundLarge::Raw { end, first: std::mem::take(&mut self.first) }))
            }
            Part::Lzf(expansion) => {
                if expansion.handed_out && expansion.compressed_left == 0 {
                    return if expansion.expanded_left == 0 {
                        Ok((0, FoundLarge::End))
                    } else {
                        Err(Stop::Fault { fault: Fault::Lzf, at: 0 })
                    };
                }
                let consumed = expansion.expand(input)?;
                Ok((consumed, FoundLarge::Expanded { first: std::mem::take(&mut self.first) }))
            }
            Part::Elements => self.find_elements(input, limits),
            Part::Unsupported(why) => {
                let why = *why;
                let consumed = self.scan.pos;
                self.scan.drop_front(consumed);
                Ok((consumed, FoundLarge::Unsupported { why }))
            }
        }
    }

    fn find_elements(&mut self, input: &[u8], limits: &Limits) -> Result<(usize, FoundLarge), Stop> {
        let rest = self.scan.advance(input, 0, limits, Until::Run { bytes: RUN });
        let boundary = self.scan.boundary;
        match rest {
            Err(Stop::NeedMore(at_least)) if at_least - boundary <= limits.max_value => {
                return Err(Stop::NeedMore(at_least));
            }
            Err(fault @ Stop::Fault { .. }) => return Err(fault),
            Ok(Rest::Done) if self.elements == Elements::StreamNodes => {
                if self.scan.pos <= limits.max_value && self.scan.expanded() <= limits.max_undivided() {
                    self.part = Part::End;
                    return Ok((self.scan.pos, FoundLarge::StreamTail { end: self.scan.pos }));
                }
                self.part = Part::Unsupported(LARGE_TAIL);
            }
            Ok(Rest::Done) => self.part = Part::End,
            Ok(Rest::Run | Rest::AtStreamTail | Rest::AtElements) => {}
            Ok(Rest::TooLarge) | Err(Stop::NeedMore(_)) => {
                let why = if self.scan.is_in_elements() { LARGE_ELEMENT } else { LARGE_TAIL };
                self.part = Part::Unsupported(why);
            }
        }
        if boundary == 0 {
            return self.find(input, limits);
        }
        self.scan.drop_front(boundary);
        Ok((boundary, FoundLarge::Elements { end: boundary }))
    }
}

impl Expansion {
    /// Expands one more piece: how much input it took.
    fn expand(&mut self, input: &[u8]) -> Result<usize, Stop> {
        if self.handed_out {
            let drop = self.window.len().saturating_sub(lzf::WINDOW);
            self.window.drain(..drop);
            self.start = self.window.len();
            self.read = 0;
            self.handed_out = false;
        }
        let left = usize::try_from(self.compressed_left).unwrap_or(usize::MAX);
        let available = input.get(..left.min(input.len())).unwrap_or_default();
        let limit = usize::try_from(self.expanded_left).unwrap_or(usize::MAX);
        let end = self.start.saturating_add(limit);
        while self.window.len() - self.start < EXPANDED_PIECE && self.read < left {
            let step = lzf::step(available, self.read, 0, end, &mut self.window);
            match step.map_err(|fault| Stop::Fault { fault, at: self.read })? {
                Some(taken) => self.read += taken,
                None if available.len() < left => {
                    return Err(Stop::NeedMore((self.read + lzf::LONGEST_STEP).min(left)));
                }
                None => return Err(Stop::Fault { fault: Fault::Lzf, at: self.read }),
            }
        }
        self.compressed_left -= self.read as u64;
        self.expanded_left -= (self.window.len() - self.start) as u64;
        self.handed_out = true;
        Ok(self.read)
    }
}
