//! A look at a spool from outside.

use std::sync::Weak;

use super::{Shared, SpoolGauges};

/// Keeps no spool alive.
#[derive(Clone, Default)]
pub struct SpoolView {
    pub(super) shared: Weak<Shared>,
}

impl SpoolView {
    /// Sizes now, and Unix ms at which the byte at `position` arrived (`None`: it has not); nothing when the
    /// spool is gone, or in another history than this one.
    pub fn look(&self, history: u64, position: u64) -> Option<(SpoolGauges, Option<u64>)> {
        let shared = self.shared.upgrade()?;
        let state = shared.lock();
        (state.history == history).then(|| (state.gauges(), state.arrived(position)))
    }
}

impl std::fmt::Debug for SpoolView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SpoolView")
    }
}
