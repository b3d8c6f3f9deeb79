//! Names of the keys that stand on the target, so that what vanished from the source between two passes can
//! be named. In memory while they are few, then in a file that no other process sees.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};

use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::ScanError;

/// Gathered before the file is written, and read at a time.
const CHUNK: usize = 1 << 20;
/// Length of the name and number of the database, before the name.
const HEAD: usize = 8;

pub struct Names {
    folder: PathBuf,
    stem: String,
    /// Not in the file yet.
    recent: Vec<u8>,
    file: Option<File>,
}

impl Names {
    /// `stem` begins the name that the file has for a moment.
    pub fn new(folder: &Path, stem: &str) -> Self {
        Self { folder: folder.to_owned(), stem: stem.to_owned(), recent: Vec::new(), file: None }
    }

    pub fn push(&mut self, db: u32, key: &[u8]) {
        let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
        self.recent.extend_from_slice(&length.to_le_bytes());
        self.recent.extend_from_slice(&db.to_le_bytes());
        self.recent.extend_from_slice(key);
    }

    /// To be called now and then; writes when enough has gathered.
    pub async fn settle(&mut self) -> Result<(), ScanError> {
        if self.recent.len() < CHUNK {
            return Ok(());
        }
        let written = async {
            if self.file.is_none() {
                self.file = Some(nameless(&self.folder, &self.stem).await?);
            }
            if let Some(file) = &mut self.file {
                file.write_all(&self.recent).await?;
                file.flush().await?;
            }
            self.recent.clear();
            Ok(())
        };
        written.await.map_err(|source| ScanError::Names { folder: self.folder.clone(), source })
    }

    /// What was pushed so far, to be read piece by piece; the names themselves begin anew.
    pub async fn take(&mut self) -> Result<Taken, ScanError> {
        let mut file = self.file.take();
        if let Some(file) = &mut file {
            let rewound = file.seek(SeekFrom::Start(0)).await;
            rewound.map_err(|source| ScanError::Names { folder: self.folder.clone(), source })?;
        }
        let recent = std::mem::take(&mut self.recent);
        Ok(Taken { folder: self.folder.clone(), file, recent, rest: Vec::new() })
    }
}

/// Names that were taken out.
pub struct Taken {
    folder: PathBuf,
    file: Option<File>,
    /// Behind those of the file.
    recent: Vec<u8>,
    /// Read and not yet given out: the head of a name whose end is in the next piece.
    rest: Vec<u8>,
}

impl Taken {
    /// Some more of them; empty at the end.
    pub async fn next(&mut self) -> Result<Vec<(u32, Vec<u8>)>, ScanError> {
        loop {
            let end = match &mut self.file {
                Some(file) => {
                    let mut piece = (&mut *file).take(CHUNK as u64);
                    let read = piece.read_to_end(&mut self.rest).await;
                    let folder = self.folder.clone();
                    let count = read.map_err(|source| ScanError::Names { folder, source })?;
                    if count == 0 {
                        self.file = None;
                        continue;
                    }
                    false
                }
                None => {
                    self.rest.append(&mut self.recent);
                    true
                }
            };
            let (names, used) = parse(&self.rest);
            self.rest.drain(..used);
            if end || !names.is_empty() {
                return Ok(names);
            }
        }
    }
}

/// The whole names at the front, and the bytes they take.
fn parse(bytes: &[u8]) -> (Vec<(u32, Vec<u8>)>, usize) {
    let (mut names, mut used) = (Vec::new(), 0);
    while let Some([a, b, c, d, e, f, g, h]) = bytes.get(used..).and_then(|rest| rest.first_chunk::<HEAD>()) {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let db = u32::from_le_bytes([*e, *f, *g, *h]);
        let Some(name) = bytes.get(used + HEAD..used + HEAD + length) else { break };
        names.push((db, name.to_vec()));
        used += HEAD + length;
    }
    (names, used)
}

/// A file that is removed from its folder at once, so that nothing is left of it whatever becomes of us.
async fn nameless(folder: &Path, stem: &str) -> std::io::Result<File> {
    tokio::fs::create_dir_all(folder).await?;
    let stamp = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), stem);
    let path = folder.join(format!("{stem}.names-{}-{stamp:x}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).await?;
    tokio::fs::remove_file(&path).await?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_come_back_in_order_and_leave_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut names = Names::new(folder.path(), "shard");
        let key = |number: u32| format!("key:{number}:{}", "x".repeat(number as usize % 50)).into_bytes();
        for number in 0..60_000 {
            names.push(number % 3, &key(number));
            names.settle().await.unwrap();
        }
        assert!(names.file.is_some() && !names.recent.is_empty());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut taken = names.take().await.unwrap();
        names.push(9, b"new");
        let mut number = 0;
        loop {
            let some = taken.next().await.unwrap();
            if some.is_empty() {
                break;
            }
            for (db, name) in some {
                assert_eq!((db, name), (number % 3, key(number)));
                number += 1;
            }
        }
        assert_eq!(number, 60_000);
        assert_eq!(names.take().await.unwrap().next().await.unwrap(), [(9, b"new".to_vec())]);
    }
}
