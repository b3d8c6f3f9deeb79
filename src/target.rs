//! Where the data go: one lane per target node, each a pipeline whose replies are only counted; and what
//! a migration keeps there, so that nothing is applied twice or lost.

pub mod chain;
pub mod fence;
pub mod file;
pub mod keys;
pub mod lane;
pub mod pace;
pub mod recovery;
pub mod scan;
pub mod wipe;
