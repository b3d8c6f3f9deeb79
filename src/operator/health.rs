//! Whether the operator still hears what happens.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A watch that fails for so long, although the API server answers, is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(90);
/// A watch tries again within 5 s at most; one that has not failed for longer works.
const QUIET: Duration = Duration::from_secs(45);

#[derive(Default)]
pub struct Health {
    watches: Mutex<HashMap<String, Watch>>,
    errors: AtomicUsize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    listed: bool,
    /// Leases, not objects.
    leases: bool,
    /// First and last failure of those that followed each other.
    failing: Option<(Instant, Instant)>,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Watch>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn reconcile_failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    pub fn errors(&self) -> usize {
        self.errors.load(Ordering::Relaxed)
    }

    /// A watch begins.
    pub fn expect(&self, watch: &str, leases: bool) {
        self.lock().insert(watch.to_owned(), Watch { leases, ..Watch::default() });
    }

    pub fn listed(&self, watch: &str) {
        if let Some(watch) = self.lock().get_mut(watch) {
            watch.listed = true;
        }
    }

    pub fn heard(&self, watch: &str) {
        if let Some(watch) = self.lock().get_mut(watch) {
            watch.failing = None;
        }
    }

    pub fn failed(&self, watch: &str, now: Instant) {
        if let Some(watch) = self.lock().get_mut(watch) {
            let since = watch.failing.filter(|(_, last)| now.duration_since(*last) < QUIET);
            watch.failing = Some((since.map_or(now, |(first, _)| first), now));
        }
    }

    /// All Leases were read once: it is known who holds what.
    pub fn leases_listed(&self) -> bool {
        self.lock().values().all(|watch| watch.listed || !watch.leases)
    }

    pub fn ready(&self) -> Result<(), String> {
        match self.lock().iter().find(|(_, watch)| !watch.listed) {
            Some((name, _)) => Err(format!("not listed yet: {name}")),
            None => Ok(()),
        }
    }

    /// `contact`: the API server answers. While it does not, there is nothing that a restart would mend.
    pub fn healthy(&self, contact: bool, now: Instant) -> Result<(), String> {
        let stuck = |watch: &Watch| {
            watch.failing.is_some_and(|(first, last)| {
                now.duration_since(first) > STUCK_AFTER && now.duration_since(last) < QUIET
            })
        };
        match self.lock().iter().find(|(_, watch)| contact && stuck(watch)) {
            Some((name, _)) => Err(format!("the watch is stuck: {name}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_stuck_when_it_fails_again_and_again_while_the_server_answers() {
        let health = Health::default();
        health.expect("leases", true);
        assert!(health.ready().is_err() && !health.leases_listed());
        health.listed("leases");
        assert!(health.ready().is_ok() && health.leases_listed());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in [0, 30, 60, 90, 100] {
            health.failed("leases", at(second));
            assert!(health.healthy(true, at(second)).is_ok() == (second < 91), "{second}");
            assert!(health.healthy(false, at(second)).is_ok());
        }
        // It has not failed since: it works.
        assert!(health.healthy(true, at(200)).is_ok());
        health.failed("leases", at(201));
        assert!(health.healthy(true, at(201)).is_ok());
        health.heard("leases");
        assert!(health.healthy(true, at(300)).is_ok());
    }
}
