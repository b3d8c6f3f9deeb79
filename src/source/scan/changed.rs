//! Names of keys that have changed since they were read, each once, and not more of them than a bound.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::transform::Transform;

/// Bytes of names, and of what it costs to keep one.
const MOST_BYTES: usize = 24 << 20;
const OVERHEAD: usize = 48;

/// A database and a key in it.
pub type Name = (u32, Box<[u8]>);

#[derive(Debug, Default)]
pub struct Changed {
    state: Mutex<State>,
    /// Names that are left out are not taken up.
    transform: Option<Arc<Transform>>,
    /// Told when there is something in it.
    pub news: Notify,
}

#[derive(Debug, Default)]
struct State {
    names: HashSet<Name>,
    bytes: usize,
    /// More changed than fits: only another pass tells what.
    overflown: bool,
}

impl Changed {
    pub fn of(transform: Option<Arc<Transform>>) -> Self {
        Self { transform, ..Self::default() }
    }

    pub fn add(&self, db: u32, key: &[u8]) {
        if self.transform.as_ref().is_some_and(|transform| !transform.admits(db.into(), key)) {
            return;
        }
        let mut state = self.lock();
        if state.overflown {
            return;
        }
        if state.names.insert((db, key.into())) {
            state.bytes += key.len() + OVERHEAD;
        }
        if state.bytes > MOST_BYTES {
            *state = State { overflown: true, ..State::default() };
        }
        drop(state);
        self.news.notify_one();
    }

    /// All that is in it, and whether there was more.
    pub fn take(&self) -> (Vec<Name>, bool) {
        let State { names, bytes: _, overflown } = std::mem::take(&mut *self.lock());
        let mut names: Vec<_> = names.into_iter().collect();
        // Databases one after the other.
        names.sort_unstable_by_key(|(db, _)| *db);
        (names, overflown)
    }

    pub fn is_empty(&self) -> bool {
        let state = self.lock();
        state.names.is_empty() && !state.overflown
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transform::{DatabaseFilter, KeyFilter, Pattern, Patterns};

    #[test]
    fn a_key_is_there_once_and_too_many_are_none() {
        let changed = Changed::default();
        changed.add(1, b"a");
        changed.add(0, b"a");
        changed.add(1, b"a");
        let (names, more) = changed.take();
        assert_eq!((names.len(), more), (2, false));
        assert_eq!(names[0], (0, b"a".as_slice().into()));
        assert!(changed.is_empty());
        let long = vec![b'x'; 1 << 20];
        for number in 0..40u8 {
            changed.add(0, &[&long[..], &[number]].concat());
        }
        let (names, more) = changed.take();
        assert_eq!((names.len(), more), (0, true));
        assert!(changed.is_empty());
    }

    #[test]
    fn what_is_left_out_is_not_taken_up() {
        let keys = KeyFilter { exclude: Patterns::new([Pattern::Prefix("x")]).ok(), ..KeyFilter::default() };
        let transform = Transform::new(DatabaseFilter::new(vec![], vec![1]), keys, &[]);
        let changed = Changed::of(Some(Arc::new(transform)));
        changed.add(0, b"x:1");
        changed.add(1, b"a");
        assert!(changed.is_empty());
        changed.add(0, b"a");
        assert_eq!(changed.take().0, [(0, b"a".as_slice().into())]);
    }
}
