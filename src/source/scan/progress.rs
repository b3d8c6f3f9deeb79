//! What others know of a scan, and ask of it.

use tokio::sync::watch;

/// How far a scan is with following changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanState {
    /// False: the shard is not scanned, but replicated or read from a file.
    pub active: bool,
    /// The server tells of changes; else they are found by passes.
    pub told: bool,
    /// Passes behind the first.
    pub passes: u64,
    /// Keys that the last of them found changed or gone.
    pub changes: u64,
    /// Keys that the filter left out of the first pass; they were not read.
    pub left_out: u64,
    /// The newest request that is fulfilled, and the offset behind what it called for.
    reached: u64,
    offset: i64,
}

impl ScanState {
    /// Changes are found by reading all keys again.
    pub fn is_by_passes(&self) -> bool {
        self.active && !self.told
    }
}

#[derive(Debug, Default)]
pub struct ScanProgress {
    asked: watch::Sender<u64>,
    state: watch::Sender<ScanState>,
}

impl ScanProgress {
    pub fn now(&self) -> ScanState {
        *self.state.borrow()
    }

    /// Waits until everything that the source had done when this was called has been read: the offset behind it.
    /// `None`: nothing is scanned.
    pub async fn settle(&self) -> Option<i64> {
        if !self.now().active {
            return None;
        }
        let mut mine = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            mine = *asked;
        });
        let mut state = self.state.subscribe();
        let state = state.wait_for(|state| state.reached >= mine).await.ok()?;
        Some(state.offset)
    }

    pub(super) fn begin(&self) {
        self.state.send_modify(|state| {
            *state = ScanState { active: true, reached: state.reached, ..ScanState::default() }
        });
    }

    pub(super) fn follows(&self, told: bool) {
        self.state.send_modify(|state| state.told = told);
    }

    pub(super) fn passed(&self, changes: u64) {
        self.state.send_modify(|state| (state.passes, state.changes) = (state.passes + 1, changes));
    }

    pub(super) fn leave_out(&self, keys: u64) {
        if keys > 0 {
            self.state.send_modify(|state| state.left_out += keys);
        }
    }

    pub(super) fn asks(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    pub(super) fn reached(&self) -> u64 {
        self.state.borrow().reached
    }

    /// `written`: bytes of the stream, which are its offset.
    pub(super) fn reach(&self, asked: u64, written: u64) {
        let offset = i64::try_from(written).unwrap_or(i64::MAX);
        self.state.send_modify(|state| (state.reached, state.offset) = (asked, offset));
    }
}
