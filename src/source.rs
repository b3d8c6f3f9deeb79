//! Where the data come from. IO only: bytes go to the spool, formats are decoded behind it.

mod framing;
pub mod replication;
pub mod watch;
