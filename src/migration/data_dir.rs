//! Where a process keeps what outlasts a run: spools and checkpoints.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::setup::file_name;
use crate::spool::{self, Volume};

/// A folder, and what spools may take there.
#[derive(Clone, Debug)]
pub struct DataDir {
    path: PathBuf,
    pub volume: Volume,
}

impl DataDir {
    /// `size`: bytes of the volume that it is on; `None`: what the disk takes.
    pub fn new(path: PathBuf, size: Option<u64>) -> Self {
        let volume = size.map_or_else(Volume::default, |size| Volume::new(size, &spools(&path)));
        Self { path, volume }
    }

    /// The folder with those of the shards.
    pub fn spools(&self) -> PathBuf {
        spools(&self.path)
    }

    /// What shards of migrations with uids of an API server have there.
    pub fn spools_left(&self) -> Vec<SpoolLeft> {
        let found = std::fs::read_dir(self.spools()).into_iter().flatten().flatten();
        let left = found.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let uid = name.split_once('.')?.0.to_owned();
            let is_folder = entry.file_type().ok()?.is_dir();
            is_folder.then(|| SpoolLeft { path: entry.path(), uid, name })
        });
        left.collect()
    }
}

impl Deref for DataDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

fn spools(path: &Path) -> PathBuf {
    path.join("spool")
}

/// The spool of a shard.
#[derive(Clone, Debug)]
pub struct SpoolLeft {
    pub path: PathBuf,
    pub uid: String,
    /// As [`spool_name`].
    pub name: String,
}

impl SpoolLeft {
    /// Nobody takes it up any more; [`Self::remove`] is still to come.
    pub fn doom(&self) {
        spool::doom(&self.path);
    }

    /// Removes what was doomed: blocks for as long as the disk takes.
    pub fn remove(&self) {
        spool::remove_doomed(&self.path);
    }
}

/// The folder's name of a shard's spool.
pub fn spool_name(uid: &str, lineage: &str) -> String {
    file_name(uid, lineage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spools_are_found_by_their_migration_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let data_dir = DataDir::new(root.path().to_owned(), Some(1000));
        assert!(data_dir.spools_left().is_empty());
        let name = spool_name("3f2c-9", "0");
        let run = data_dir.spools().join(&name).join("run-1");
        std::fs::create_dir_all(&run).unwrap();
        std::fs::write(run.join("segment"), [0; 10]).unwrap();
        std::fs::write(data_dir.spools().join("3f2c-9.names"), [0; 10]).unwrap();
        let left = data_dir.spools_left();
        assert_eq!(
            left.iter().map(|spool| (spool.uid.as_str(), &spool.name)).collect::<Vec<_>>(),
            [("3f2c-9", &name)]
        );
        left[0].doom();
        assert!(!run.exists());
        // One that begins meanwhile.
        std::fs::create_dir_all(&run).unwrap();
        left[0].remove();
        assert!(run.exists() && std::fs::read_dir(data_dir.spools().join(&name)).unwrap().count() == 1);
        data_dir.spools_left()[0].doom();
        left[0].remove();
        assert!(data_dir.spools_left().is_empty() && !run.exists());
    }
}
