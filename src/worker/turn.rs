//! When a shard may begin its full sync: no more at once than `limits.parallelShards` allows, and not while its
//! source is under pressure (`limits.source`).

use std::sync::Arc;

use tokio::sync::watch;

use crate::connection::{Address, Dialer};
use crate::source::pressure::{PressureLimits, Watched};

/// What is told of a shard that waits begins so.
const WAITS: &str = "the full sync waits";
const UNTIL: &str = " until the source is at ease: ";

/// True for what is told of a shard that waits for its source.
pub fn is_at_rest(told: &str) -> bool {
    told.strip_prefix(WAITS).is_some_and(|why| why.starts_with(UNTIL))
}

/// True for what is told of a shard that waits for its turn.
pub fn is_waiting(told: &str) -> bool {
    told.starts_with(WAITS)
}

/// Shared by the shards of a migration; what it allows may change at any time.
#[derive(Clone, Debug)]
pub struct Turns {
    counts: Arc<watch::Sender<Counts>>,
    pressure: Arc<watch::Sender<PressureLimits>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// 0: any number.
    most: usize,
    running: usize,
}

/// A full sync that is under way.
#[derive(Debug)]
pub struct Turn {
    counts: Arc<watch::Sender<Counts>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.counts.send_modify(|counts| counts.running = counts.running.saturating_sub(1));
    }
}

impl Turns {
    pub fn new(most: usize, pressure: PressureLimits) -> Self {
        Self {
            counts: Arc::new(watch::Sender::new(Counts { most, running: 0 })),
            pressure: Arc::new(watch::Sender::new(pressure)),
        }
    }

    pub fn set(&self, most: usize, pressure: PressureLimits) {
        self.counts.send_modify(|counts| counts.most = most);
        self.pressure.send_replace(pressure);
    }

    /// Waits until a full sync from the server at `address` may begin. `tell` gets what it waits for, at each
    /// change, and an empty text at the end.
    pub async fn begin(&self, dialer: &Dialer, address: &Address, mut tell: impl FnMut(&str)) -> Turn {
        let turn = self.next(&mut tell).await;
        if !self.pressure.borrow().is_off() {
            let mut watched = Watched::start(dialer.clone(), address.clone(), self.pressure.subscribe());
            watched.passed(|why| tell(&format!("{WAITS}{UNTIL}{why}"))).await;
        }
        tell("");
        turn
    }

    async fn next(&self, tell: &mut impl FnMut(&str)) -> Turn {
        let mut counts = self.counts.subscribe();
        loop {
            counts.borrow_and_update();
            let mut taken = false;
            self.counts.send_if_modified(|counts| {
                taken = counts.most == 0 || counts.running < counts.most;
                counts.running += usize::from(taken);
                taken
            });
            if taken {
                return Turn { counts: Arc::clone(&self.counts) };
            }
            tell(&format!("{WAITS} for others to end (limits.parallelShards)"));
            // The sender is ours.
            let _ = counts.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn taken(turns: &Turns) -> Option<Turn> {
        let mut tell = |_: &str| {};
        let mut next = pin!(turns.next(&mut tell));
        match next.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn),
            Poll::Pending => None,
        }
    }

    #[test]
    fn no_more_than_allowed_and_the_limit_may_change() {
        let turns = Turns::new(1, PressureLimits::default());
        let first = taken(&turns).unwrap();
        assert!(taken(&turns).is_none());
        turns.set(2, PressureLimits::default());
        let second = taken(&turns).unwrap();
        assert!(taken(&turns).is_none());
        turns.set(0, PressureLimits::default());
        let third = taken(&turns).unwrap();
        turns.set(1, PressureLimits::default());
        drop((first, second));
        assert!(taken(&turns).is_none());
        drop(third);
        assert!(taken(&turns).is_some());
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_another_ends() {
        let turns = Turns::new(1, PressureLimits::default());
        let first = taken(&turns).unwrap();
        let others = turns.clone();
        let (told, mut heard) = watch::channel(String::new());
        let waiting = tokio::spawn(async move {
            let mut tell = |why: &str| drop(told.send_replace(why.to_owned()));
            let _turn = others.next(&mut tell).await;
        });
        heard.wait_for(|why| why.contains("parallelShards")).await.unwrap();
        drop(first);
        waiting.await.unwrap();
    }
}
