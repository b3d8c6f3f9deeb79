//! RDBs of real servers of every version, named by it.

use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rdb/testdata")
}

pub fn captured(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap()
}

/// Each with its name.
pub fn all_captured() -> impl Iterator<Item = (String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let rdbs = entries.filter(|path| path.extension().is_some_and(|extension| extension == "rdb"));
    rdbs.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap()))
}
