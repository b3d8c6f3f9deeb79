//! Where the data come from. IO only: bytes go to the spool, formats are decoded behind it.

pub mod file;
mod framing;
pub mod pressure;
pub mod replication;
pub mod scan;
pub mod watch;
