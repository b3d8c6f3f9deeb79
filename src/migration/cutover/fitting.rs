//! PURE. How much of the source is compared while its writers wait.

use std::time::Duration;

use crate::verify::VerifyMode;

/// Of the pause: the target has to catch up before, and clients are switched after.
const SHARE_OF_PAUSE: u32 = 5;
/// Of what is left of it.
const SHARE_OF_REST: u32 = 2;
/// How much slower than measured it may go and still end in time.
const MARGIN: u128 = 2;

/// What an earlier look at every key took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    pub took: Duration,
    /// Of the source, compared or not.
    pub keys: u64,
}

/// How long may be compared in a pause of `limit` that began `elapsed` ago.
pub fn budget(limit: Duration, elapsed: Duration) -> Duration {
    (limit / SHARE_OF_PAUSE).min(limit.saturating_sub(elapsed) / SHARE_OF_REST)
}

impl Measured {
    /// What is compared of `keys` within `budget`: all that is `planned` if it fits, else a sample that does.
    pub fn fitting(self, planned: VerifyMode, keys: u64, budget: Duration) -> VerifyMode {
        let expected = self.took.as_nanos().saturating_mul(u128::from(keys)) / u128::from(self.keys.max(1));
        let needed = expected.saturating_mul(MARGIN);
        if needed <= budget.as_nanos() {
            return planned;
        }
        let share = match planned {
            VerifyMode::Sample { percent } => percent,
            VerifyMode::Full | VerifyMode::Keys => 100,
        };
        let fits = u128::from(share).saturating_mul(budget.as_nanos()) / needed.max(1);
        VerifyMode::Sample { percent: u32::try_from(fits).unwrap_or(share).clamp(1, share.max(1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_fifth_of_the_pause_and_half_of_what_is_left_at_most() {
        for (limit, elapsed, expected) in [
            (10, 0, 2000),
            (10, 6, 2000),
            (10, 8, 1000),
            (10, 10, 0),
            (10, 11, 0),
            (0, 0, 0),
            (3600, 1, 720_000),
        ] {
            let found = budget(SECOND * limit, SECOND * elapsed);
            assert_eq!(found, Duration::from_millis(expected), "{elapsed} of {limit} s");
        }
    }

    #[test]
    fn what_fits_is_compared() {
        let (all, names) = (VerifyMode::Full, VerifyMode::Keys);
        let sample = |percent| VerifyMode::Sample { percent };
        // Milliseconds that so many keys took, keys now, milliseconds there are.
        for (took, then, planned, now, budget, expected) in [
            (1000, 1000, all, 1000, 2000, all),
            (1000, 1000, all, 1001, 2000, sample(99)),
            (1000, 1000, all, 10_000, 2000, sample(10)),
            (1000, 1000, names, 1000, 2000, names),
            (1000, 1000, names, 2000, 2000, sample(50)),
            (1000, 1000, sample(10), 1000, 2000, sample(10)),
            (1000, 1000, sample(10), 2000, 2000, sample(5)),
            (1000, 1000, sample(1), 1_000_000, 2000, sample(1)),
            (1000, 1000, all, 1_000_000_000, 2000, sample(1)),
            (1000, 1000, all, 1000, 0, sample(1)),
            (1, 0, all, 5, 2000, all),
            (0, 0, all, 0, 0, all),
            (u64::MAX, 1, all, u64::MAX, 2000, sample(1)),
        ] {
            let measured = Measured { took: Duration::from_millis(took), keys: then };
            let found = measured.fitting(planned, now, Duration::from_millis(budget));
            assert_eq!(found, expected, "{took} ms for {then}, {now} keys, {budget} ms");
        }
    }
}
