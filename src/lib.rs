//! The engine of redis-migration: one shard worker per source master poses as a replica, decodes
//! what arrives, and replays it onto the target. Modules in the order data flows.

pub mod api;
mod backoff;
mod clock;
pub mod command;
pub mod connection;
pub mod file;
pub mod hold;
pub mod loss;
pub mod migration;
pub mod object;
pub mod operator;
pub mod preflight;
#[cfg(test)]
mod purity;
pub mod rdb;
pub mod report;
pub mod resp;
pub mod slot;
pub mod source;
pub mod spool;
pub mod target;
pub mod telemetry;
pub mod topology;
pub mod transform;
pub mod verify;
pub mod version;
pub mod worker;
