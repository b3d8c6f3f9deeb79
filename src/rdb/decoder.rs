//! The streaming decoder: bytes of an RDB → events.

mod found;
mod large;
#[cfg(test)]
mod tests;
mod waypoint;

use crate::version::Flavor;

use self::found::Found;
use self::large::Large;
use super::cursor::{Cursor, Stop, Text, bounded};
use super::error::{Fault, RdbError};
use super::event::{LargeKind, Limits, Step, TYPE_STRING};
use super::layout::{Layout, layout};
use super::scan::{Scan, Until};
pub use waypoint::Waypoint;

/// The newest RDB versions whose layout is known.
const NEWEST_REDIS: u16 = 13;
const NEWEST_VALKEY: u16 = 80;
const OLDEST_VALKEY: u16 = 80;

/// Decodes one RDB. Holds no input: the caller keeps the bytes that were not consumed, and hands
/// them in again with more behind. Events do not depend on how the bytes were split, except that a
/// skipped part may come in more or fewer [`Event::Skipped`](super::Event::Skipped).
///
/// A clone taken after an event resumes right behind that event.
#[derive(Clone, Debug)]
pub struct Decoder {
    limits: Limits,
    /// Bytes consumed so far.
    position: u64,
    flavor: Flavor,
    version: u16,
    db: u64,
    state: State,
    /// Strings of the current event that were stored as number or compressed.
    scratch: Vec<u8>,
    /// The key whose value is being read, for errors.
    key: Option<Piece>,
}

#[derive(Clone, Debug)]
enum State {
    Header,
    Body,
    /// A key's value was scanned in part; the scan goes on where it was.
    Value(Scan),
    Large(Box<Large>),
    Skip(Scan),
    Ended,
}

/// A string's place: in the input or in the scratch.
#[derive(Clone, Copy, Debug)]
struct Piece {
    in_scratch: bool,
    start: usize,
    end: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    any: bool,
    expire_at_ms: Option<i64>,
    idle_seconds: Option<u64>,
    lfu: Option<u8>,
}

impl Decoder {
    pub fn new(limits: Limits) -> Self {
        Decoder {
            limits,
            position: 0,
            flavor: Flavor::Redis,
            version: 0,
            db: 0,
            state: State::Header,
            scratch: Vec::new(),
            key: None,
        }
    }

    /// Bytes consumed so far, which is where the next input begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whose numbering of types applies: the magic's, unless an AUX field named Valkey.
    pub fn flavor(&self) -> Flavor {
        self.flavor
    }

    /// The RDB version of the header, 0 before it.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The database that keys belong to.
    pub fn db(&self) -> u64 {
        self.db
    }

    /// Finds the next event in `input`, which begins at [`Decoder::position`].
    pub fn next<'a>(&'a mut self, input: &'a [u8]) -> Result<Step<'a>, RdbError> {
        self.scratch.clear();
        self.key = None;
        match self.find(input) {
            Ok((consumed, found)) => {
                self.position += consumed as u64;
                Ok(Step::Event { consumed, event: self.event(found, input) })
            }
            Err(Stop::NeedMore(at_least)) => Ok(Step::NeedMore { at_least }),
            Err(Stop::Fault { fault, at }) => Err(self.error(fault, at, input)),
        }
    }

    fn find(&mut self, input: &[u8]) -> Result<(usize, Found), Stop> {
        match &mut self.state {
            State::Body | State::Value(_) => self.body(input),
            State::Large(large) => {
                let (consumed, found) = large.find(input, &self.limits)?;
                Ok((consumed, Found::Large(found)))
            }
            State::Skip(_) => self.skip(input),
            State::Header => self.header(input),
            State::Ended => Err(Stop::Fault { fault: Fault::AfterEnd, at: 0 }),
        }
    }

    fn header(&mut self, input: &[u8]) -> Result<(usize, Found), Stop> {
        let mut cursor = Cursor::new(input);
        let magic: [u8; 9] = cursor.array()?;
        let not_rdb = Stop::Fault { fault: Fault::NotRdb(magic), at: 0 };
        let (flavor, digits) = if let Some(digits) = magic.strip_prefix(b"REDIS") {
            (Flavor::Redis, digits)
        } else if let Some(digits) = magic.strip_prefix(b"VALKEY") {
            (Flavor::Valkey, digits)
        } else {
            return Err(not_rdb);
        };
        let mut version = 0;
        for digit in digits {
            if !digit.is_ascii_digit() {
                return Err(not_rdb);
            }
            version = version * 10 + u16::from(digit - b'0');
        }
        let known = match flavor {
            Flavor::Redis => 1..=NEWEST_REDIS,
            Flavor::Valkey => OLDEST_VALKEY..=NEWEST_VALKEY,
        };
        if !known.contains(&version) {
            return Err(Stop::Fault { fault: Fault::UnknownVersion(flavor, version), at: 0 });
        }
        self.flavor = flavor;
        self.version = version;
        self.state = State::Body;
        Ok((cursor.at, Found::Header))
    }

    /// An opcode with its body, or what precedes a key, the key and its value.
    #[inline]
    fn body(&mut self, input: &[u8]) -> Result<(usize, Found), Stop> {
        let mut cursor = Cursor::new(input);
        let mut attributes = Attributes::default();
        loop {
            let start = cursor.at;
            match cursor.byte()? {
                252 => attributes.expire_at_ms = Some(i64::from_le_bytes(cursor.array()?)),
                253 => {
                    let seconds = i32::from_le_bytes(cursor.array()?);
                    attributes.expire_at_ms = Some(i64::from(seconds) * 1000);
                }
                248 => attributes.idle_seconds = Some(cursor.length()?),
                249 => attributes.lfu = Some(cursor.byte()?),
                opcode @ 242..=255 if attributes.any => {
                    return Err(Stop::Fault { fault: Fault::MisplacedOpcode(opcode), at: start });
                }
                opcode @ 242..=255 => return self.opcode(opcode, cursor),
                type_byte => return self.record(type_byte, attributes, cursor),
            }
            attributes.any = true;
        }
    }

    fn opcode(&mut self, opcode: u8, mut cursor: Cursor<'_>) -> Result<(usize, Found), Stop> {
        let found = match opcode {
            255 => {
                let crc = if self.version >= 5 { u64::from_le_bytes(cursor.array()?) } else { 0 };
                self.state = State::Ended;
                Found::End { crc: (crc != 0).then_some(crc) }
            }
            254 => {
                self.db = cursor.length()?;
                Found::SelectDb(self.db)
            }
            251 => Found::ResizeDb { keys: cursor.length()?, expires: cursor.length()? },
            250 => {
                let key = self.text(&mut cursor)?;
                let value = self.text(&mut cursor)?;
                if self.bytes(key, cursor.bytes) == b"valkey-ver" {
                    self.flavor = Flavor::Valkey;
                }
                Found::Aux { key, value }
            }
            247 => {
                let module = cursor.length()?;
                let start = cursor.at;
                // Opcode 2 announces an unsigned number: when the module wrote this.
                if cursor.length()? != 2 {
                    return Err(Stop::Fault { fault: Fault::ModuleAux, at: start });
                }
                cursor.length()?;
                self.state = State::Skip(Scan::module_items().into_skipping());
                Found::ModuleAux { module }
            }
            245 => Found::Function { code: self.text(&mut cursor)? },
            244 => {
                Found::SlotInfo { slot: cursor.length()?, keys: cursor.length()?, expires: cursor.length()? }
            }
            243 if self.flavor == Flavor::Valkey => {
                let job = self.text(&mut cursor)?;
                let ranges = cursor.length()?;
                if ranges > 16384 {
                    return Err(cursor.fault(Fault::TooMany { count: ranges, limit: 16384 }));
                }
                for _ in 0..ranges {
                    cursor.length()?;
                    cursor.length()?;
                }
                Found::SlotImport { job, ranges }
            }
            refused => return Err(Stop::Fault { fault: refused_opcode(refused), at: cursor.at - 1 }),
        };
        Ok((cursor.at, found))
    }

    #[inline]
    fn record(
        &mut self,
        type_byte: u8,
        attributes: Attributes,
        mut cursor: Cursor<'_>,
    ) -> Result<(usize, Found), Stop> {
        let type_at = cursor.at - 1;
        let layout = match layout(type_byte, self.flavor) {
            Ok(layout) => layout,
            Err(fault) => {
                self.key = self.text(&mut cursor).ok();
                return Err(Stop::Fault { fault, at: type_at });
            }
        };
        let key = self.text(&mut cursor)?;
        self.key = Some(key);
        let base = cursor.at;
        match self.value_end(type_byte, layout, cursor)? {
            Some(end) => {
                self.state = State::Body;
                Ok((end, Found::Key { key, attributes, type_byte, value: (base, end) }))
            }
            None => self.begin_large(type_byte, layout, attributes, key, Cursor { at: base, ..cursor }),
        }
    }

    /// Where the value at the cursor ends; `None` when it is larger than a value may be.
    #[inline]
    fn value_end(
        &mut self,
        type_byte: u8,
        layout: Layout,
        mut cursor: Cursor<'_>,
    ) -> Result<Option<usize>, Stop> {
        let base = cursor.at;
        let longest = base.saturating_add(self.limits.max_value);
        let end = if layout == Layout::Blob {
            let head = cursor.text_head()?;
            let payload = bounded("string", head.payload(), self.limits.max_string, base)?;
            let most =
                if type_byte == TYPE_STRING { self.limits.max_expanded } else { self.limits.max_undivided() };
            if head.expanded() > most {
                return Ok(None);
            }
            let end = cursor.at.saturating_add(payload);
            if end <= longest && end > cursor.bytes.len() {
                return Err(Stop::NeedMore(end));
            }
            end
        } else {
            let mut scan = match std::mem::replace(&mut self.state, State::Body) {
                State::Value(scan) => scan,
                _ => Scan::new(type_byte, self.flavor).map_err(|fault| Stop::Fault { fault, at: base })?,
            };
            let most = match layout {
                Layout::Counted(_) => self.limits.max_expanded,
                Layout::Blob | Layout::ExpiryBlob => self.limits.max_undivided(),
                // Nobody expands it.
                Layout::Module => u64::MAX,
            };
            match scan.advance(cursor.bytes, base, &self.limits, Until::Done) {
                Ok(_) | Err(Stop::NeedMore(_)) if scan.expanded() > most => return Ok(None),
                Err(Stop::NeedMore(at_least)) if at_least <= longest => {
                    self.state = State::Value(scan);
                    return Err(Stop::NeedMore(at_least));
                }
                Err(Stop::NeedMore(at_least)) => at_least,
                Err(fault) => return Err(fault),
                Ok(_) => base + scan.pos,
            }
        };
        Ok((end <= longest).then_some(end))
    }

    fn begin_large(
        &mut self,
        type_byte: u8,
        layout: Layout,
        attributes: Attributes,
        key: Piece,
        cursor: Cursor<'_>,
    ) -> Result<(usize, Found), Stop> {
        let base = cursor.at;
        let fault_at = |fault| Stop::Fault { fault, at: base };
        let mut scan = Scan::new(type_byte, self.flavor).map_err(fault_at)?;
        let why = match layout {
            Layout::Blob if type_byte == TYPE_STRING => {
                let (consumed, large) = Large::string(self.bytes(key, cursor.bytes), cursor)?;
                self.state = State::Large(Box::new(large));
                let kind = LargeKind::String;
                return Ok((consumed, Found::LargeBegin { key, attributes, type_byte, kind }));
            }
            Layout::Blob | Layout::ExpiryBlob => "a packed collection larger than one value may be",
            Layout::Module => "module data larger than one value may be",
            Layout::Counted(elements) => {
                scan.advance(cursor.bytes, base, &self.limits, Until::Elements)?;
                let consumed = base + scan.pos;
                let mut cursor = cursor;
                let (elements, _) = elements.prologue(&mut cursor)?;
                scan.drop_front(scan.pos);
                let kind = elements.kind();
                let key_bytes = self.bytes(key, cursor.bytes);
                self.state = State::Large(Box::new(Large::collection(key_bytes, type_byte, elements, scan)));
                return Ok((consumed, Found::LargeBegin { key, attributes, type_byte, kind }));
            }
        };
        self.state = State::Skip(scan.into_skipping());
        Ok((base, Found::Unsupported { key, type_byte, why }))
    }

    fn skip(&mut self, input: &[u8]) -> Result<(usize, Found), Stop> {
        let State::Skip(scan) = &mut self.state else { return Err(Stop::NeedMore(1)) };
        let mut passed = scan.skip_ahead(input.len());
        if passed == 0 {
            match scan.advance(input, 0, &self.limits, Until::Done) {
                Err(Stop::NeedMore(_)) if scan.pos > 0 => {}
                Err(stop) => return Err(stop),
                Ok(_) => {}
            }
            passed = scan.pos;
            scan.drop_front(passed);
            if passed == 0 && scan.has_ahead() {
                return Err(Stop::NeedMore(1));
            }
        }
        if scan.is_done() && !scan.has_ahead() {
            self.state = State::Body;
        }
        Ok((passed, Found::Skipped))
    }

    /// A string that is held whole: a key, an AUX field, a function.
    #[inline]
    fn text(&mut self, cursor: &mut Cursor<'_>) -> Result<Piece, Stop> {
        let at = cursor.at;
        let limit = self.limits.max_key as u64;
        match cursor.text(limit)? {
            Text::Raw(bytes) => {
                Ok(Piece { in_scratch: false, start: cursor.at - bytes.len(), end: cursor.at })
            }
            other => {
                let start = self.scratch.len();
                other.append_to(&mut self.scratch, limit, at)?;
                Ok(Piece { in_scratch: true, start, end: self.scratch.len() })
            }
        }
    }

    #[inline]
    fn bytes<'a>(&'a self, piece: Piece, input: &'a [u8]) -> &'a [u8] {
        let within: &'a [u8] = if piece.in_scratch { &self.scratch } else { input };
        within.get(piece.start..piece.end).unwrap_or_default()
    }
}

fn refused_opcode(opcode: u8) -> Fault {
    let what = match opcode {
        242 => "commands inside a snapshot, of an unreleased Valkey",
        243 => "key metadata of a module, Redis 8.6",
        246 => "functions of a 7.0 release candidate",
        _ => "unknown",
    };
    Fault::RefusedOpcode(opcode, what)
}
