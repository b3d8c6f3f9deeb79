//! Runs with a file on a side: they read or write what is there now, and end by themselves.

mod prepare;
mod run;

use crate::rdb::checksum::crc64;

pub use prepare::check;
pub use run::run;

/// Names a file in keys on the target: short, and the same in every run. `id`: of its shard.
pub fn lineage(id: &str) -> String {
    format!("f{:016x}", crc64(id.as_bytes()))
}
