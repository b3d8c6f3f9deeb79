//! Where the data go: one lane per target node, each a pipeline whose replies are only counted.

pub mod lane;
