//! Writing a file that appears under its name only when it is whole.

use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};

use bytes::Bytes;
use object_store::ObjectStoreExt;
use tokio::fs;
use tokio::io::AsyncWriteExt;

use super::parts::Parts;
use super::store::{self, Opened};
use super::{FileUri, ObjectError, StoreCredentials, find};
use crate::rdb::checksum::Crc;

/// Where a file is to stand.
#[derive(Clone, Debug)]
pub struct Destination {
    pub uri: FileUri,
    credentials: StoreCredentials,
    replace: bool,
    /// Not named before it was read again and was what was written.
    read_back: bool,
}

/// A file that is being written.
pub struct Draft {
    destination: Destination,
    to: To,
    /// Length and checksum, where it is to be read back.
    written: Option<(u64, Crc)>,
}

enum To {
    /// The file is locked as long as it is open.
    Local {
        file: fs::File,
        draft: PathBuf,
        path: PathBuf,
    },
    Store {
        upload: Parts,
        opened: Opened,
    },
}

impl Destination {
    pub fn new(uri: FileUri, credentials: StoreCredentials, replace: bool, read_back: bool) -> Self {
        Self { uri, credentials, replace, read_back }
    }

    /// Nothing stands in the way of a file there, as far as it can be told. Leaves nothing behind.
    pub async fn check(&self) -> Result<(), ObjectError> {
        self.is_free().await?;
        // That it may be written shows only when it is. Another run may just be writing.
        match self.begin_as("check").await?.to {
            To::Local { draft, file, .. } => {
                let removed = fs::remove_file(&draft).await;
                drop(file);
                removed.map_err(|error| ObjectError::file(&self.uri, error))
            }
            To::Store { upload, .. } => {
                upload.abort().await.map_err(|error| ObjectError::store(&self.uri, &error))
            }
        }
    }

    async fn is_free(&self) -> Result<(), ObjectError> {
        if self.replace {
            return Ok(());
        }
        let there = match store::open(&self.uri, &self.credentials).await? {
            Some(Opened { store, path }) => match store.head(&path).await {
                Ok(_) => true,
                Err(object_store::Error::NotFound { .. }) => false,
                Err(error) => return Err(ObjectError::store(&self.uri, &error)),
            },
            None => {
                let FileUri::Local(path) = &self.uri else { return Ok(()) };
                let there = fs::try_exists(path).await;
                there.map_err(|error| ObjectError::file(&self.uri, error))?
            }
        };
        if there { Err(ObjectError::Exists { uri: self.uri.clone() }) } else { Ok(()) }
    }

    pub async fn begin(&self) -> Result<Draft, ObjectError> {
        self.begin_as("part").await
    }

    async fn begin_as(&self, what: &str) -> Result<Draft, ObjectError> {
        let to = match (store::open(&self.uri, &self.credentials).await?, &self.uri) {
            (Some(opened), uri) => {
                let upload = opened.store.put_multipart(&opened.path).await;
                let upload = upload.map_err(|error| ObjectError::store(uri, &error))?;
                To::Store { upload: Parts::new(upload), opened }
            }
            (None, uri) => {
                let path = match uri {
                    FileUri::Local(path) => PathBuf::from(path),
                    // Not reached: `open` knows all others.
                    other => PathBuf::from(other.name()),
                };
                let draft = beside(&path, what);
                let own = draft.clone();
                let file = tokio::task::spawn_blocking(move || begin_draft(&own)).await;
                let file = file.map_err(std::io::Error::other).and_then(|file| file);
                let file = file.map_err(|error| match error.kind() {
                    std::io::ErrorKind::NotFound => ObjectError::File {
                        uri: uri.clone(),
                        source: std::io::Error::new(error.kind(), "there is no such folder; make it first"),
                    },
                    std::io::ErrorKind::ResourceBusy => ObjectError::Busy { uri: uri.clone() },
                    _ => ObjectError::file(uri, error),
                })?;
                let file = fs::File::from_std(file);
                To::Local { file, draft, path }
            }
        };
        let written = self.read_back.then(|| (0, Crc::new()));
        Ok(Draft { destination: self.clone(), to, written })
    }
}

impl Draft {
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ObjectError> {
        if let Some((size, crc)) = &mut self.written {
            *size += bytes.len() as u64;
            crc.update(&bytes);
        }
        let uri = &self.destination.uri;
        match &mut self.to {
            To::Local { file, .. } => {
                file.write_all(&bytes).await.map_err(|error| ObjectError::file(uri, error))
            }
            To::Store { upload, .. } => {
                upload.put(bytes).await.map_err(|error| ObjectError::store(uri, &error))
            }
        }
    }

    /// Gives the file its name. `goes_on` is told how many bytes were read back, and says whether to go on: false
    /// then, and nothing is left; but in a store, where it has taken an earlier one's place by then, it stays.
    pub async fn finish(self, mut goes_on: impl FnMut(u64) -> bool) -> Result<bool, ObjectError> {
        if let Err(error) = self.destination.is_free().await {
            self.abort().await;
            return Err(error);
        }
        let Self { destination, to, written } = self;
        let (uri, replace) = (&destination.uri, destination.replace);
        let written = written.map(|(size, crc)| (size, crc.value()));
        match to {
            To::Local { mut file, draft, path } => {
                let named = async {
                    let failed = |error| ObjectError::file(uri, error);
                    file.flush().await.map_err(failed)?;
                    file.sync_all().await.map_err(failed)?;
                    if let Some(written) = written {
                        let draft = FileUri::Local(draft.display().to_string());
                        if !read_back(&draft, &destination, written, &mut goes_on).await? {
                            return Ok(false);
                        }
                    }
                    let named = name_it(&draft, &path, replace).await.map_err(|error| match error.kind() {
                        std::io::ErrorKind::AlreadyExists => ObjectError::Exists { uri: uri.clone() },
                        _ => failed(error),
                    });
                    named.map(|()| true)
                };
                let named = named.await;
                if !matches!(named, Ok(true)) {
                    let _ = fs::remove_file(&draft).await;
                }
                // Not before: another run must not begin on it.
                drop(file);
                named
            }
            To::Store { upload, opened } => {
                let finished = upload.finish().await;
                finished.map_err(|error| ObjectError::store(uri, &error))?;
                let Some(written) = written else { return Ok(true) };
                let same = read_back(uri, &destination, written, &mut goes_on).await;
                let goes = match &same {
                    Ok(false) => !replace,
                    Err(ObjectError::ReadBack { .. }) => true,
                    Ok(true) | Err(_) => false,
                };
                if goes && let Err(error) = opened.store.delete(&opened.path).await {
                    let error = ObjectError::store(uri, &error);
                    tracing::error!(%error, "a file that is damaged, or was not read back, stays where it was written");
                }
                if matches!(same, Ok(false)) && !goes {
                    tracing::warn!(%uri, "the file was written to its end and took the place of the earlier one, but was not read back to its end: stopped");
                }
                same.map_err(|error| match error {
                    ObjectError::ReadBack { .. } => error,
                    error => ObjectError::Unread { source: Box::new(error) },
                })
            }
        }
    }

    /// Leaves nothing behind.
    pub async fn abort(self) {
        let uri = self.destination.uri;
        match self.to {
            To::Local { file, draft, .. } => {
                if let Err(error) = fs::remove_file(&draft).await {
                    tracing::warn!(%error, file = %draft.display(), "a file that is not whole stays");
                }
                drop(file);
            }
            To::Store { upload, .. } => {
                if let Err(error) = upload.abort().await {
                    let error = ObjectError::store(&uri, &error);
                    tracing::warn!(%error, "parts of a file that is not whole stay in the store");
                }
            }
        }
    }
}

/// An empty file that no other run writes to as long as it is open; `ResourceBusy` when one does. What an earlier run
/// left half written goes.
fn begin_draft(path: &FsPath) -> std::io::Result<std::fs::File> {
    loop {
        let file = std::fs::File::options().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(std::io::ErrorKind::ResourceBusy.into()),
            // Some file systems know no locks.
            Err(std::fs::TryLockError::Error(error)) => {
                tracing::debug!(%error, file = %path.display(), "not locked");
            }
        }
        // Whoever had the lock may have given the file its name meanwhile.
        let (ours, there) = (file.metadata()?, std::fs::metadata(path));
        match there {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                file.set_len(0)?;
                return Ok(file);
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Where the file is until it is whole: on the same disk, and not taken for one that is.
fn beside(path: &FsPath, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

async fn name_it(draft: &FsPath, path: &FsPath, replace: bool) -> std::io::Result<()> {
    if replace {
        fs::rename(draft, path).await?;
    } else {
        // A link never takes the place of what has appeared there meanwhile.
        match fs::hard_link(draft, path).await {
            Ok(()) => fs::remove_file(draft).await?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Err(error),
            // Some file systems know no links.
            Err(_) => fs::rename(draft, path).await?,
        }
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(FsPath::new(".")).to_owned();
    // The name, too, has to outlive a power loss.
    fs::File::open(folder).await?.sync_all().await
}

/// False: it is not to be read to its end. An error where it is not what was written (length and checksum).
async fn read_back(
    uri: &FileUri,
    destination: &Destination,
    written: (u64, u64),
    goes_on: &mut impl FnMut(u64) -> bool,
) -> Result<bool, ObjectError> {
    let found = find(uri, &destination.credentials).await?;
    let Some(file) = found.first() else { return Err(ObjectError::NotFound { uri: uri.clone() }) };
    let (mut chunks, mut crc, mut size) = (file.chunks(0), Crc::new(), 0);
    while let Some(chunk) = chunks.next().await? {
        crc.update(&chunk);
        size += chunk.len() as u64;
        if !goes_on(size) {
            return Ok(false);
        }
    }
    if (size, crc.value()) != written {
        return Err(ObjectError::ReadBack { uri: destination.uri.clone() });
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As with a nightly backup that still runs when the next one begins.
    #[tokio::test]
    async fn two_runs_do_not_write_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.rdb");
        let uri = FileUri::Local(path.display().to_string());
        let destination = Destination::new(uri, StoreCredentials::default(), true, false);
        let mut first = destination.begin().await.unwrap();
        first.write(Bytes::from_static(b"the first, ")).await.unwrap();
        let refused = destination.begin().await.err().unwrap();
        assert!(matches!(refused, ObjectError::Busy { .. }), "{refused}");
        first.write(Bytes::from_static(b"whole")).await.unwrap();
        assert!(first.finish(|_| true).await.unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"the first, whole");

        // What a run that was killed left is overwritten.
        std::fs::write(folder.path().join(".dump.rdb.part"), "left over, and longer than what comes")
            .unwrap();
        let mut second = destination.begin().await.unwrap();
        second.write(Bytes::from_static(b"the second")).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"the first, whole");
        assert!(second.finish(|_| true).await.unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"the second");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
