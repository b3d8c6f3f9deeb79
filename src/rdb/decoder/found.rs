//! From what was found to the event that borrows it.

use super::large::{FoundLarge, Large};
use super::{Attributes, Decoder, Piece, State};
use crate::rdb::error::{Fault, RdbError, shown_key};
use crate::rdb::event::{Event, Items, KeyRecord, LargeHead, LargeKind, Run};
use crate::rdb::module::ModuleId;

/// An event before its slices are borrowed.
pub(super) enum Found {
    Header,
    Aux { key: Piece, value: Piece },
    SelectDb(u64),
    ResizeDb { keys: u64, expires: u64 },
    Function { code: Piece },
    ModuleAux { module: u64 },
    SlotInfo { slot: u64, keys: u64, expires: u64 },
    SlotImport { job: Piece, ranges: u64 },
    Key { key: Piece, attributes: Attributes, type_byte: u8, value: (usize, usize) },
    LargeBegin { key: Piece, attributes: Attributes, type_byte: u8, kind: LargeKind },
    Unsupported { key: Piece, type_byte: u8, why: &'static str },
    Large(FoundLarge),
    Skipped,
    End { crc: Option<u64> },
}

impl Decoder {
    #[inline]
    pub(super) fn event<'a>(&'a mut self, found: Found, input: &'a [u8]) -> Event<'a> {
        match found {
            Found::Key { key, attributes, type_byte, value } => Event::Key(KeyRecord {
                key: self.bytes(key, input),
                expire_at_ms: attributes.expire_at_ms,
                idle_seconds: attributes.idle_seconds,
                lfu: attributes.lfu,
                type_byte,
                value: input.get(value.0..value.1).unwrap_or_default(),
            }),
            other => self.rare_event(other, input),
        }
    }

    fn rare_event<'a>(&'a mut self, found: Found, input: &'a [u8]) -> Event<'a> {
        match found {
            Found::Large(found) => self.large_event(found, input),
            Found::Header => Event::Header { flavor: self.flavor, version: self.version },
            Found::Aux { key, value } => {
                Event::Aux { key: self.bytes(key, input), value: self.bytes(value, input) }
            }
            Found::SelectDb(db) => Event::SelectDb(db),
            Found::ResizeDb { keys, expires } => Event::ResizeDb { keys, expires },
            Found::Function { code } => Event::Function { code: self.bytes(code, input) },
            Found::ModuleAux { module } => Event::ModuleAux { module: ModuleId(module) },
            Found::SlotInfo { slot, keys, expires } => Event::SlotInfo { slot, keys, expires },
            Found::SlotImport { job, ranges } => Event::SlotImport { job: self.bytes(job, input), ranges },
            Found::LargeBegin { key, attributes, type_byte, kind } => Event::LargeBegin(LargeHead {
                key: self.bytes(key, input),
                expire_at_ms: attributes.expire_at_ms,
                idle_seconds: attributes.idle_seconds,
                lfu: attributes.lfu,
                type_byte,
                kind,
            }),
            Found::Unsupported { key, type_byte, why } => {
                Event::LargeUnsupported { key: self.bytes(key, input), type_byte, why }
            }
            Found::End { crc } => Event::End { crc },
            Found::Skipped | Found::Key { .. } => Event::Skipped,
        }
    }

    fn large_event<'a>(&'a mut self, found: FoundLarge, input: &'a [u8]) -> Event<'a> {
        // The key outlives the large value in the scratch, so that the state can move on.
        if let FoundLarge::End | FoundLarge::Unsupported { .. } = found {
            if let State::Large(large) = std::mem::replace(&mut self.state, State::Body) {
                let Large { key, type_byte, scan, .. } = *large;
                self.scratch = key;
                if let FoundLarge::Unsupported { why } = found {
                    self.state = State::Skip(scan.into_skipping());
                    return Event::LargeUnsupported { key: &self.scratch, type_byte, why };
                }
            }
            return Event::LargeEnd { key: &self.scratch };
        }
        let State::Large(large) = &self.state else { return Event::Skipped };
        let run = match found {
            FoundLarge::Raw { end, first } => {
                Run::Piece { bytes: input.get(..end).unwrap_or_default(), first }
            }
            FoundLarge::Expanded { first } => Run::Piece { bytes: large.expanded(), first },
            FoundLarge::Elements { end } => Run::Elements {
                elements: large.elements,
                bytes: input.get(..end).unwrap_or_default(),
                type_byte: large.type_byte,
            },
            FoundLarge::StreamTail { end } => {
                Run::StreamTail { bytes: input.get(..end).unwrap_or_default(), type_byte: large.type_byte }
            }
            FoundLarge::End | FoundLarge::Unsupported { .. } => return Event::Skipped,
        };
        Event::LargeItems { key: &large.key, items: Items(run) }
    }

    #[cold]
    pub(super) fn error(&self, fault: Fault, at: usize, input: &[u8]) -> RdbError {
        let key = match (&self.state, self.key) {
            (State::Large(large), _) => Some(shown_key(&large.key)),
            (_, Some(piece)) => Some(shown_key(self.bytes(piece, input))),
            _ => None,
        };
        RdbError::Stream { position: self.position + at as u64, db: self.db, key, fault }
    }
}
