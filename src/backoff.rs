//! Waiting between attempts: doubling, capped, with jitter so that many do not knock at once.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const MOST: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The next pause: between half of and the whole doubled step.
    pub fn pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(MOST);
        // Each RandomState is keyed anew, which is random enough for this.
        let part = RandomState::new().hash_one(0u8) % 512;
        step / 2 + step * u32::try_from(part).unwrap_or_default() / 1024
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.pause()).await;
    }

    pub fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_start_again() {
        let mut backoff = Backoff::default();
        let first = backoff.pause();
        assert!(first >= FIRST / 2 && first <= FIRST);
        (0..20).for_each(|_| {
            backoff.pause();
        });
        let late = backoff.pause();
        assert!(late >= MOST / 2 && late <= MOST);
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }
}
