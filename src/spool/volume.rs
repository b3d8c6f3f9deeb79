//! What the spools of a process may take of the volume that they share. (A file system cannot be asked: the size of
//! an `emptyDir` is only a limit beyond which the Pod is evicted.)

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Shared as Spool;

/// Left free of the volume: segments that are being removed, and other files.
const FREE_PERCENT: u64 = 10;

/// Clones share it. The default has no limit.
#[derive(Clone, Debug, Default)]
pub struct Volume(Option<Arc<Shared>>);

struct Shared {
    limit: u64,
    /// Bytes of each shard's folder, with those that are on their way there.
    held: Mutex<HashMap<PathBuf, u64>>,
    spools: Mutex<Vec<Weak<Spool>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("limit", &self.limit).field("held", &self.held).finish_non_exhaustive()
    }
}

impl Volume {
    /// `size`: of the volume. `folder`: that holds those of the shards; what an earlier process left there counts.
    pub fn new(size: u64, folder: &Path) -> Self {
        let held = entries(folder).map(|path| (path.clone(), size_of(&path))).collect();
        let limit = size - size / 100 * FREE_PERCENT;
        Self(Some(Arc::new(Shared { limit, held: Mutex::new(held), spools: Mutex::default() })))
    }

    pub(super) fn join(&self, spool: &Arc<Spool>) {
        if let Some(shared) = &self.0 {
            let mut spools = shared.spools.lock().unwrap_or_else(PoisonError::into_inner);
            spools.retain(|spool| spool.strong_count() > 0);
            spools.push(Arc::downgrade(spool));
        }
    }

    /// The spools of the other folders give up what they keep for a replay only. Called without any spool's lock.
    pub(super) fn ask_others(&self, folder: &Path) {
        let Some(shared) = &self.0 else { return };
        let spools: Vec<_> = {
            let spools = shared.spools.lock().unwrap_or_else(PoisonError::into_inner);
            spools.iter().filter_map(Weak::upgrade).collect()
        };
        for spool in spools.iter().filter(|spool| spool.limits.folder != folder) {
            spool.spare();
        }
    }

    /// Bytes that may be added.
    pub fn room(&self) -> u64 {
        let Some(shared) = &self.0 else { return u64::MAX };
        shared.room(&shared.lock())
    }

    /// Counts bytes that a folder is about to get, until [`Self::holds`] says what it has. False, and nothing is
    /// counted, when there is no room for them by now, unless they `must` go there.
    pub fn take(&self, folder: &Path, bytes: u64, must: bool) -> bool {
        let Some(shared) = &self.0 else { return true };
        let mut held = shared.lock();
        let fits = must || shared.room(&held) >= bytes;
        if fits {
            *held.entry(folder.to_owned()).or_default() += bytes;
        }
        fits
    }

    /// A shard's folder takes so many bytes now.
    pub fn holds(&self, folder: &Path, bytes: u64) {
        let Some(shared) = &self.0 else { return };
        let mut held = shared.lock();
        match held.get_mut(folder) {
            Some(known) => *known = bytes,
            None if bytes > 0 => _ = held.insert(folder.to_owned(), bytes),
            None => {}
        }
    }

    /// The folders that are not there any more take nothing.
    pub fn look(&self) {
        if let Some(shared) = &self.0 {
            shared.lock().retain(|folder, _| folder.exists());
        }
    }
}

impl Shared {
    fn room(&self, held: &HashMap<PathBuf, u64>) -> u64 {
        self.limit.saturating_sub(held.values().sum())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, u64>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn size_of(path: &Path) -> u64 {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => entries(path).map(|path| size_of(&path)).sum(),
        Ok(found) => found.len(),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_folders_count_and_those_that_are_gone_do_not() {
        let root = tempfile::tempdir().unwrap();
        let (left, gone) = (root.path().join("a"), root.path().join("b"));
        std::fs::create_dir_all(left.join("run-1")).unwrap();
        std::fs::write(left.join("run-1/segment"), [0; 300]).unwrap();
        let volume = Volume::new(1000, root.path());
        assert_eq!(volume.room(), 600);
        let other = volume.clone();
        other.holds(&gone, 500);
        assert_eq!(volume.room(), 100);
        other.holds(&left, 100);
        assert_eq!(volume.room(), 300);
        volume.look();
        assert_eq!(other.room(), 800);
        other.holds(&left, 5000);
        assert_eq!(volume.room(), 0);
        other.holds(&left, 100);
        assert!(volume.take(&left, 500, false) && !volume.take(&gone, 301, false));
        assert!(
            volume.take(&gone, 300, false) && !volume.take(&gone, 1, false) && volume.take(&gone, 1, true)
        );
        assert_eq!(volume.room(), 0);
        assert_eq!(Volume::default().room(), u64::MAX);
    }
}
