//! How fast a migration may write to its target: budgets of bytes and of keys a second, which all shards of a
//! process share. They are asked once for each batch, never for a key.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may gather while nothing is sent: more would come as a burst.
const BURST: Duration = Duration::from_millis(100);
/// Batches are this many times smaller than what a second may take, so that the target gets them evenly.
const BATCHES_A_SECOND: u64 = 20;

/// Rates may change at any time; 0: no limit.
#[derive(Debug, Default)]
pub struct Pace {
    bytes_per_second: AtomicU64,
    keys_per_second: AtomicU64,
    budgets: Mutex<(Budget, Budget)>,
}

impl Pace {
    pub fn set(&self, bytes_per_second: u64, keys_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
        self.keys_per_second.store(keys_per_second, Ordering::Relaxed);
    }

    fn rates(&self) -> (u64, u64) {
        (self.bytes_per_second.load(Ordering::Relaxed), self.keys_per_second.load(Ordering::Relaxed))
    }

    pub fn is_limited(&self) -> bool {
        self.rates() != (0, 0)
    }

    /// How long nothing may be sent; asked again then, as the rates may have changed.
    pub fn wait(&self) -> Duration {
        let (bytes, keys) = self.rates();
        let now = Instant::now();
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        let (of_bytes, of_keys) = &mut *budgets;
        of_bytes.wait(bytes, now).max(of_keys.wait(keys, now))
    }

    /// A batch goes out. It may take more than there is: then the next one waits for it.
    pub fn spend(&self, bytes: u64, keys: u64) {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        let (of_bytes, of_keys) = &mut *budgets;
        of_bytes.left -= bytes as f64;
        of_keys.left -= keys as f64;
    }

    /// Commands and bytes that a batch should not pass by much.
    pub fn batch(&self) -> (u64, u64) {
        let share = |rate: u64| if rate == 0 { u64::MAX } else { (rate / BATCHES_A_SECOND).max(1) };
        let (bytes, keys) = self.rates();
        (share(keys), share(bytes).max(1024))
    }
}

/// What may still be sent; below 0 what was sent too early.
#[derive(Debug, Default)]
struct Budget {
    left: f64,
    /// Of the last look. `None`: there was no limit.
    at: Option<Instant>,
}

impl Budget {
    fn wait(&mut self, rate: u64, now: Instant) -> Duration {
        if rate == 0 {
            *self = Self::default();
            return Duration::ZERO;
        }
        let rate = rate as f64;
        let passed = match self.at.replace(now) {
            Some(before) => now.saturating_duration_since(before).as_secs_f64(),
            None => {
                // What was sent without a limit is no debt.
                self.left = 0.0;
                0.0
            }
        };
        self.left = (self.left + passed * rate).min(rate * BURST.as_secs_f64());
        if self.left >= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(-self.left / rate).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_kept_over_time_and_gathers_little() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let mut budget = Budget::default();
        assert_eq!(budget.wait(1000, at(0)), Duration::ZERO);
        budget.left -= 500.0;
        assert_eq!(budget.wait(1000, at(0)), Duration::from_millis(500));
        assert_eq!(budget.wait(1000, at(100)), Duration::from_millis(400));
        // A higher rate holds from now on.
        assert_eq!(budget.wait(4000, at(100)), Duration::from_millis(100));
        assert_eq!(budget.wait(4000, at(200)), Duration::ZERO);
        // An hour of rest is worth a tenth of a second.
        assert_eq!(budget.wait(1000, at(3_600_000)), Duration::ZERO);
        budget.left -= 1100.0;
        assert_eq!(budget.wait(1000, at(3_600_000)), Duration::from_secs(1));
        // No limit, no debt.
        assert_eq!(budget.wait(0, at(3_600_000)), Duration::ZERO);
        assert_eq!(budget.wait(1000, at(3_600_000)), Duration::ZERO);
    }

    #[test]
    fn either_of_both_limits_holds_and_batches_shrink_with_them() {
        let pace = Pace::default();
        assert!(!pace.is_limited() && pace.batch() == (u64::MAX, u64::MAX));
        pace.set(1_000_000, 100);
        assert!(pace.is_limited() && pace.batch() == (5, 50_000));
        assert_eq!(pace.wait(), Duration::ZERO);
        pace.spend(0, 1000);
        assert!(pace.wait() > Duration::from_secs(9));
        pace.set(1_000_000, 0);
        assert_eq!(pace.wait(), Duration::ZERO);
        pace.set(0, 3);
        assert_eq!(pace.batch(), (1, u64::MAX));
    }
}
