//! The RDB format, without any I/O: bytes → events, value extents, values → commands, `RESTORE`
//! payloads, digests for comparing values, and what each server version can load.
//!
//! Format source: Redis `rdb.c`/`rdb.h` 2.8 … 8.6, Valkey `rdb.c` 8.1 and 9.1.

pub mod checksum;
pub mod commands;
pub mod compat;
mod cursor;
pub mod decoder;
pub mod digest;
mod error;
mod event;
mod held;
pub mod json;
mod layout;
mod lzf;
mod module;
mod packed;
mod payload;
mod rebuild;
mod recode;
mod record;
mod scan;
pub mod stat;
#[cfg(test)]
pub mod test_captured;
mod walk;

pub use commands::{Dialect, value_to_commands};
pub use decoder::{Decoder, Waypoint};
pub use digest::{ValueDigest, canonical};
pub use error::{Fault, RdbError};
pub use event::{Event, Items, KeyRecord, LargeHead, LargeKind, Limits, Step};
pub use held::hold_fields;
pub use module::{ModuleId, module_of};
pub use payload::{Dump, PlainString, append_restore_payload, parse_dump, plain_string, restore_payload_len};
pub use rebuild::{NotRebuilt, rebuild};
pub use recode::{NotRecoded, append_length, append_string, recode};
pub use record::{RecordHead, value_start};
