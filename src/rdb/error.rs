//! What can be wrong with an RDB, and where.

use thiserror::Error;

use crate::version::Flavor;

/// A fault of the RDB stage. Nothing here is worth a retry with the same bytes: a stream must be
/// fetched again, a single value can only be passed over.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RdbError {
    /// While decoding a stream. `position` counts bytes from the first byte of the RDB.
    #[error("RDB byte {position}, database {db}{}: {fault}", in_key(.key))]
    Stream {
        position: u64,
        db: u64,
        /// Escaped and shortened, when the fault lies within a key's record.
        key: Option<String>,
        fault: Fault,
    },
    /// While decoding one value on its own; `offset` counts from the value's first byte.
    #[error("value of RDB type {type_byte}, byte {offset}: {fault}")]
    Value { type_byte: u8, offset: usize, fault: Fault },
    /// A `DUMP` reply that cannot hold type, version and checksum.
    #[error("a DUMP payload of {length} bytes; at least 11 are needed")]
    DumpTooShort { length: usize },
}

/// What is wrong, without the place.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    #[error("this is not an RDB: it begins with \"{}\", not REDIS or VALKEY and digits", .0.escape_ascii())]
    NotRdb([u8; 9]),
    #[error(
        "{0:?} RDB version {1} is not known here (Redis 1 to 13 and Valkey 80 are); use a newer redis-migration"
    )]
    UnknownVersion(Flavor, u16),
    #[error("byte {0:#04x} does not begin a length; the RDB is corrupted")]
    LengthEncoding(u8),
    #[error(
        "{what} of {length} bytes, more than the limit of {limit}; the RDB is corrupted or the limit too low"
    )]
    TooLong { what: &'static str, length: u64, limit: u64 },
    #[error(
        "{count} elements announced, more than the limit of {limit}; the RDB is corrupted or the limit too low"
    )]
    TooMany { count: u64, limit: u64 },
    #[error("compressed string does not expand to its announced length; the RDB is corrupted")]
    Lzf,
    #[error("object type {0} is not known for {1:?}; the source is newer than this redis-migration")]
    UnknownType(u8, Flavor),
    #[error("object type {0} ({1}) is not supported")]
    RefusedType(u8, &'static str),
    #[error("opcode {0} ({1}) is not supported")]
    RefusedOpcode(u8, &'static str),
    #[error("opcode {0} between a key's expiry and the key; the RDB is corrupted")]
    MisplacedOpcode(u8),
    #[error("module item kind {0} is not known; the RDB is corrupted")]
    ModuleItem(u64),
    #[error("module data does not begin with its \"when\" field; the RDB is corrupted")]
    ModuleAux,
    #[error("the value ends early: {0} is missing")]
    Missing(&'static str),
    #[error("{0} is malformed")]
    Malformed(&'static str),
    #[error("{0} bytes are left behind the end of the value")]
    Trailing(usize),
    #[error("a string where {0} was expected")]
    Unexpected(&'static str),
    #[error("decoding went on after the end of the RDB")]
    AfterEnd,
}

/// At most this many bytes of a key are shown.
const SHOWN_KEY: usize = 64;

/// A key as it appears in messages: escaped, shortened.
pub(super) fn shown_key(key: &[u8]) -> String {
    let shown = key.get(..SHOWN_KEY).unwrap_or(key);
    let more = if shown.len() < key.len() { "…" } else { "" };
    format!("{}{more}", shown.escape_ascii())
}

fn in_key(key: &Option<String>) -> String {
    key.as_ref().map(|key| format!(", key \"{key}\"")).unwrap_or_default()
}
