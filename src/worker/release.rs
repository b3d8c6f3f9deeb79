//! Held expiries (`hold.rs`) get their true time back: when the migration is about to be complete, every
//! shard looks through its keys on the target.
//!
//! While nothing of the stream is under way, a page of keys is asked when they expire, and those whose answer
//! is a held time are given the true one; then the stream goes on, until the next page. A time that is past
//! deletes the key, whose DEL is on its way. Doing it twice is harmless, so nothing of it is kept: after a
//! lost connection expiries are held again, and another sweep begins once all is caught up.
//!
//! Expiries of hash fields come last and in one go, without the stream in between: a condition such as GT
//! must not compare a true time with a held one, and held ones are in the order of true ones.

mod carried;
mod fields;
mod sweep;

use std::time::{Duration, Instant};

pub use carried::Carried;
pub use sweep::{NodeSweep, Sweep, owners};

use crate::hold::Holding;

/// A switch for tests only: expiries are not held, to see what is lost then.
const UNHELD: &str = "REDIS_MIGRATION_TEST_UNHELD";
/// A sweep that may have missed keys is repeated; while every third is under way, the stream waits.
const PASSES_BESIDE: u32 = 3;
/// Before a sweep is repeated: a slot may be on the move.
const PAUSE: Duration = Duration::from_millis(200);

/// How far a shard is with giving times back.
#[derive(Debug)]
pub struct Release {
    pub stage: Stage,
    /// What a sweep may have missed.
    pub carried: Carried,
    /// Sweeps over keys that were not the last.
    pub passes: u32,
    /// Keys and fields that got their time back.
    pub released: u64,
    /// When the stream has had its share.
    due: Instant,
    /// Nothing is gained by going on before, though the stream has nothing to do.
    pauses: bool,
    unheld: bool,
}

#[derive(Debug)]
pub enum Stage {
    /// Nothing is given back; what arrives is held.
    Holding,
    /// What arrives for keys keeps its time.
    Keys(Sweep),
    /// Nothing is held any more.
    Done,
}

impl Release {
    /// `renewed`: commands that renew what expires may follow. Without, nothing is held.
    pub fn new(renewed: bool) -> Self {
        let told = std::env::var_os(UNHELD).is_some_and(|value| value == "1");
        if told {
            tracing::warn!("{UNHELD} is set: keys may be lost while the target lags");
        }
        let unheld = told || !renewed;
        Self {
            stage: if unheld { Stage::Done } else { Stage::Holding },
            carried: Carried::default(),
            passes: 0,
            released: 0,
            due: Instant::now(),
            pauses: false,
            unheld,
        }
    }

    /// What is held of that which arrives now.
    pub fn holding(&self) -> Holding {
        match self.stage {
            Stage::Holding => Holding::ALL,
            Stage::Keys(_) => Holding { keys: false, fields: true },
            Stage::Done => Holding::default(),
        }
    }

    /// Something may have been lost or run again: all over again.
    pub fn reset(&mut self) {
        if !self.unheld {
            self.stage = Stage::Holding;
            self.carried = Carried::default();
            self.passes = 0;
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// Where commands are noted that take a held time elsewhere; nowhere before the sweep begins.
    #[inline]
    pub fn carried(&mut self) -> Option<&mut Carried> {
        matches!(self.stage, Stage::Keys(_)).then_some(&mut self.carried)
    }

    /// True while the stream has to wait for the end of a sweep, which would else never see all keys.
    pub fn is_exclusive(&self) -> bool {
        self.passes % PASSES_BESIDE == PASSES_BESIDE - 1
    }

    /// `idle`: the stream has nothing to do.
    pub fn is_due(&self, idle: bool) -> bool {
        idle && !self.pauses || Instant::now() >= self.due
    }

    /// The stream gets as much time as it had to wait.
    pub fn rest(&mut self, worked: Duration) {
        self.due = self.due.max(Instant::now() + worked);
    }

    /// All keys are to be gone through once more with `sweep`.
    pub fn repeat(&mut self, sweep: Sweep) {
        self.stage = Stage::Keys(sweep);
        self.passes += 1;
        self.pauses = true;
        self.due = Instant::now() + PAUSE;
    }

    /// Nothing of the stream is under way.
    pub fn begin_page(&mut self) {
        // What came before a sweep's first page is seen by it.
        if std::mem::take(&mut self.pauses) {
            self.carried = Carried::default();
        }
    }
}
