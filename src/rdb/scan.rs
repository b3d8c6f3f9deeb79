//! Where a value ends, found without decoding it and resumable at any byte.
//! Format source: Redis rdb.c, `rdbLoadObject`.

use crate::version::Flavor;

use super::cursor::{Cursor, Stop, bounded};
use super::error::Fault;
use super::event::Limits;
use super::layout::{Atom, Elements, Layout, layout, stream_layout};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Blob,
    ExpiryBlob,
    Count,
    Expiry,
    Elements,
    StreamHead,
    GroupCount,
    Group,
    Pending,
    ConsumerCount,
    Consumer,
    ConsumerPending,
    ProducerCount,
    Producer,
    ProducerIds,
    StreamCounters,
    ModuleId,
    ModuleItems,
    Done,
}

/// Where a scan came to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    Done,
    /// Before the first element.
    AtElements,
    /// At the end of an element, the run so far being long enough.
    Run,
    /// Behind the last element of a stream.
    AtStreamTail,
    /// An element is longer than a value may be.
    TooLarge,
}

/// When to come to rest before the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    Done,
    Elements,
    Run { bytes: usize },
}

/// A scan of one value. `0 <= boundary <= pos`, both counted from the value's first byte that the
/// caller still holds.
#[derive(Clone, Debug)]
pub(super) struct Scan {
    stage: Stage,
    /// Index into the pattern of the stage.
    atom: u8,
    stream: u8,
    /// Whether payloads may be left to [`Scan::skip_ahead`] instead of asked for.
    skipping: bool,
    elements: Elements,
    /// Repetitions of the stage's pattern that remain.
    left: u64,
    count: u64,
    groups: u64,
    consumers: u64,
    /// Bytes of a payload that are yet to be passed over when skipping.
    ahead: u64,
    /// Bytes that the strings passed over are longer by once expanded, since the front was dropped last.
    grown: u64,
    /// Those of them that lie before `boundary`.
    grown_before: u64,
    pub pos: usize,
    /// End of the last whole element.
    pub boundary: usize,
}

impl Scan {
    pub fn new(type_byte: u8, flavor: Flavor) -> Result<Self, Fault> {
        let (stage, elements) = match layout(type_byte, flavor)? {
            Layout::Blob => (Stage::Blob, Elements::List),
            Layout::ExpiryBlob => (Stage::ExpiryBlob, Elements::List),
            Layout::Counted(elements @ Elements::HashExpiry { .. }) => (Stage::Expiry, elements),
            Layout::Counted(elements) => (Stage::Count, elements),
            Layout::Module => (Stage::ModuleId, Elements::List),
        };
        Ok(Scan { stage, elements, stream: stream_layout(type_byte), ..Self::module_items() })
    }

    /// A scan of module items without the module's id.
    pub fn module_items() -> Self {
        Scan {
            stage: Stage::ModuleItems,
            atom: 0,
            stream: 0,
            skipping: false,
            elements: Elements::List,
            left: 1,
            count: 0,
            groups: 0,
            consumers: 0,
            ahead: 0,
            grown: 0,
            grown_before: 0,
            pos: 0,
            boundary: 0,
        }
    }

    /// The same scan for bytes that nobody wants: it passes over payloads that are not there yet.
    pub fn into_skipping(mut self) -> Self {
        self.skipping = true;
        self
    }

    pub fn is_in_elements(&self) -> bool {
        self.stage == Stage::Elements
    }

    /// A payload was announced that the input did not hold in full.
    pub fn has_ahead(&self) -> bool {
        self.ahead > 0
    }

    /// Bytes passed over, once expanded.
    pub fn expanded(&self) -> u64 {
        self.grown.saturating_add(self.pos as u64)
    }

    pub fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// What lies behind `boundary`, once expanded.
    fn element(&self) -> u64 {
        (self.grown - self.grown_before).saturating_add((self.pos - self.boundary) as u64)
    }

    /// The caller drops the first `bytes` of the value: all, or those before `boundary`.
    pub fn drop_front(&mut self, bytes: usize) {
        self.grown = if bytes < self.pos { self.grown - self.grown_before } else { 0 };
        self.grown_before = 0;
        self.pos = self.pos.saturating_sub(bytes);
        self.boundary = self.boundary.saturating_sub(bytes);
    }

    /// Goes on from where it was; `input[base]` is the first byte of the value still held.
    pub fn advance(
        &mut self,
        input: &[u8],
        base: usize,
        limits: &Limits,
        until: Until,
    ) -> Result<Rest, Stop> {
        let mut cursor = Cursor { bytes: input, at: base + self.pos };
        loop {
            match (self.stage, until) {
                (Stage::Done, _) => return Ok(Rest::Done),
                (Stage::Elements, Until::Elements) => return Ok(Rest::AtElements),
                (Stage::StreamHead, Until::Run { .. })
                    if self.pos == self.boundary && self.atom == 0 && self.boundary > 0 =>
                {
                    return Ok(Rest::AtStreamTail);
                }
                _ => {}
            }
            let pattern = self.pattern();
            while self.left > 0 {
                while let Some(&atom) = pattern.get(usize::from(self.atom)) {
                    self.pass(&mut cursor, atom, limits)?;
                    self.atom += 1;
                    self.pos = cursor.at - base;
                }
                self.atom = 0;
                self.left -= 1;
                if let (Stage::Elements, Until::Run { bytes }) = (self.stage, until) {
                    if self.pos - self.boundary > limits.max_value || self.element() > limits.max_undivided()
                    {
                        return Ok(Rest::TooLarge);
                    }
                    self.boundary = self.pos;
                    self.grown_before = self.grown;
                    if self.expanded() >= bytes as u64 {
                        return Ok(Rest::Run);
                    }
                }
            }
            self.enter_next();
        }
    }

    /// When skipping: passes over as much of an announced payload as the input holds.
    pub fn skip_ahead(&mut self, available: usize) -> usize {
        let passed = usize::try_from(self.ahead).unwrap_or(usize::MAX).min(available);
        self.ahead -= passed as u64;
        passed
    }

    #[inline]
    fn pass(&mut self, cursor: &mut Cursor<'_>, atom: Atom, limits: &Limits) -> Result<(), Stop> {
        match atom {
            Atom::Text => self.pass_text(cursor, limits),
            Atom::Length => cursor.length().map(drop),
            Atom::Fixed(bytes) => cursor.take(bytes).map(drop),
            Atom::ScoreText => match cursor.byte()? {
                253..=255 => Ok(()),
                length => cursor.take(usize::from(length)).map(drop),
            },
            Atom::Count => {
                let start = cursor.at;
                let count = cursor.length()?;
                if count > limits.max_elements {
                    let fault = Fault::TooMany { count, limit: limits.max_elements };
                    return Err(Stop::Fault { fault, at: start });
                }
                self.count = count;
                Ok(())
            }
            Atom::ModuleItem => self.pass_module_item(cursor, limits),
        }
    }

    #[inline]
    fn pass_text(&mut self, cursor: &mut Cursor<'_>, limits: &Limits) -> Result<(), Stop> {
        let start = cursor.at;
        let head = cursor.text_head()?;
        let payload = bounded("string", head.payload(), limits.max_string, start)?;
        bounded("expanded string", head.expanded(), limits.max_string, start)?;
        let available = cursor.bytes.len() - cursor.at;
        if self.skipping && available < payload {
            self.ahead = (payload - available) as u64;
            cursor.at = cursor.bytes.len();
            return Ok(());
        }
        cursor.take(payload)?;
        self.grown = self.grown.saturating_add(head.expanded().saturating_sub(head.payload()));
        Ok(())
    }

    /// Source: Redis rdb.c, `rdbLoadCheckModuleValue`.
    fn pass_module_item(&mut self, cursor: &mut Cursor<'_>, limits: &Limits) -> Result<(), Stop> {
        let start = cursor.at;
        match cursor.length()? {
            0 => return Ok(()),
            1 | 2 => cursor.length().map(drop)?,
            3 => cursor.take(4).map(drop)?,
            4 => cursor.take(8).map(drop)?,
            5 => self.pass_text(cursor, limits)?,
            other => return Err(Stop::Fault { fault: Fault::ModuleItem(other), at: start }),
        }
        self.left += 1;
        Ok(())
    }

    fn pattern(&self) -> &'static [Atom] {
        use Atom::{Count, Fixed, Length, ModuleItem, Text};
        match self.stage {
            Stage::Blob => &[Text],
            Stage::ExpiryBlob => &[Fixed(8), Text],
            Stage::Count | Stage::GroupCount | Stage::ConsumerCount => &[Count],
            Stage::Expiry => &[Fixed(8), Count],
            Stage::Elements => self.elements.pattern(),
            // Length, last id; from layout 2 on first id, greatest deleted id, entries added.
            Stage::StreamHead => &[Length],
            // Name, last id, from layout 2 on entries read; then the number of pending entries.
            Stage::Group if self.stream == 1 => &[Text, Length, Length, Count],
            Stage::Group => &[Text, Length, Length, Length, Count],
            Stage::Pending => &[Fixed(16), Fixed(8), Length],
            // Name, seen time, from layout 3 on active time; then the number of pending entries.
            Stage::Consumer if self.stream < 3 => &[Text, Fixed(8), Count],
            Stage::Consumer => &[Text, Fixed(8), Fixed(8), Count],
            Stage::ConsumerPending => &[Fixed(16)],
            Stage::ProducerCount => &[Length, Length, Count],
            Stage::Producer => &[Text, Count],
            Stage::ProducerIds => &[Text, Length, Length],
            Stage::StreamCounters => &[Length, Length],
            Stage::ModuleId => &[Length],
            Stage::ModuleItems => &[ModuleItem],
            Stage::Done => &[],
        }
    }

    fn enter(&mut self, stage: Stage, repetitions: u64) {
        self.stage = stage;
        self.left = repetitions;
    }

    fn enter_next(&mut self) {
        let count = self.count;
        match self.stage {
            Stage::Blob | Stage::ExpiryBlob | Stage::ModuleItems | Stage::StreamCounters => {
                self.enter(Stage::Done, 0);
            }
            Stage::Count | Stage::Expiry => self.enter(Stage::Elements, count),
            Stage::Elements if self.stream == 0 => self.enter(Stage::Done, 0),
            Stage::Elements => self.enter(Stage::StreamHead, if self.stream == 1 { 3 } else { 8 }),
            Stage::StreamHead => self.enter(Stage::GroupCount, 1),
            Stage::GroupCount => {
                self.groups = count;
                self.enter_next_group();
            }
            Stage::Group => self.enter(Stage::Pending, count),
            Stage::Pending => self.enter(Stage::ConsumerCount, 1),
            Stage::ConsumerCount => {
                self.consumers = count;
                self.enter_next_consumer();
            }
            Stage::Consumer => self.enter(Stage::ConsumerPending, count),
            Stage::ConsumerPending => self.enter_next_consumer(),
            Stage::ProducerCount => {
                self.groups = count;
                self.enter_next_producer();
            }
            Stage::Producer => self.enter(Stage::ProducerIds, count),
            Stage::ProducerIds => self.enter_next_producer(),
            Stage::ModuleId => self.enter(Stage::ModuleItems, 1),
            Stage::Done => {}
        }
    }

    fn enter_next_group(&mut self) {
        if self.groups > 0 {
            self.groups -= 1;
            self.enter(Stage::Group, 1);
        } else if self.stream >= 4 {
            self.enter(Stage::ProducerCount, 1);
        } else {
            self.enter(Stage::Done, 0);
        }
    }

    fn enter_next_consumer(&mut self) {
        if self.consumers > 0 {
            self.consumers -= 1;
            self.enter(Stage::Consumer, 1);
        } else {
            self.enter_next_group();
        }
    }

    fn enter_next_producer(&mut self) {
        if self.groups > 0 {
            self.groups -= 1;
            self.enter(Stage::Producer, 1);
        } else {
            self.enter(Stage::StreamCounters, 1);
        }
    }
}
