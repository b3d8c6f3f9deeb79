//! The RedisMigration resource: what is asked for ([`spec`]), what is observed ([`status`],
//! [`conditions`]), how a local file becomes one ([`manifest`]), and the validated [`plan`] that the
//! engine works from.

pub mod conditions;
pub mod crd;
pub mod manifest;
pub mod plan;
pub mod quantity;
pub mod spec;
pub mod status;

pub use plan::Plan;
pub use spec::{RedisMigration, RedisMigrationSpec};
pub use status::{Phase, Status};
