//! Reading a file from a place on, a few chunks ahead.

use std::path::PathBuf;

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore};
use tokio::sync::mpsc;

use super::store::Opened;
use super::{FileUri, ObjectError};
use crate::rdb::checksum::Crc;

/// Bytes that a disk is asked for at once.
const DISK_CHUNK: usize = 1 << 20;
/// Bytes that a store is asked for at once.
const STORE_CHUNK: u64 = 4 << 20;
/// Chunks that are read ahead of those who need them.
const AHEAD: usize = 2;

/// A file as it was found.
#[derive(Clone, Debug)]
pub struct SourceFile {
    pub uri: FileUri,
    pub size: u64,
    /// Changes when the content does: the store's tag for it, else when it was written.
    pub version: String,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) enum Place {
    Local(PathBuf),
    Store { opened: Opened, tag: Option<String> },
}

/// The bytes of a file, in order.
pub struct Chunks(BoxStream<'static, Result<Bytes, ObjectError>>);

impl Chunks {
    pub async fn next(&mut self) -> Result<Option<Bytes>, ObjectError> {
        self.0.try_next().await
    }
}

impl SourceFile {
    /// Tells this content from any other, in this run and in others. Never 0.
    pub fn fingerprint(&self) -> u64 {
        let mut crc = Crc::new();
        // Shown without a signature, which is another each time.
        for part in [&self.uri.to_string(), &self.size.to_string(), &self.version] {
            crc.update(part.as_bytes());
            crc.update(b"\0");
        }
        crc.value().max(1)
    }

    /// The bytes from `from` on.
    pub fn chunks(&self, from: u64) -> Chunks {
        let file = self.clone();
        match &self.place {
            Place::Local(path) => Chunks(local(path.clone(), file, from)),
            Place::Store { opened, tag } if matches!(self.uri, FileUri::Http(_)) => {
                let (opened, tag) = (opened.clone(), tag.clone());
                Chunks(stream::once(http(opened, tag, file, from)).try_flatten().boxed())
            }
            Place::Store { opened, tag } => Chunks(ranges(opened.clone(), tag.clone(), file, from)),
        }
    }
}

fn local(path: PathBuf, file: SourceFile, from: u64) -> BoxStream<'static, Result<Bytes, ObjectError>> {
    let (chunks, taken) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        use std::io::{Read, Seek, SeekFrom};
        let read = |chunks: &mpsc::Sender<Result<Bytes, ObjectError>>| {
            let mut opened = std::fs::File::open(&path)?;
            opened.seek(SeekFrom::Start(from))?;
            let mut left = file.size.saturating_sub(from);
            while left > 0 {
                let mut chunk = Vec::with_capacity(DISK_CHUNK);
                // Not further than it was long: what grows is not what was looked at.
                let most = left.min(DISK_CHUNK as u64);
                let count = Read::by_ref(&mut opened).take(most).read_to_end(&mut chunk)? as u64;
                left = if count < most { 0 } else { left - count };
                if chunks.blocking_send(Ok(chunk.into())).is_err() {
                    return Ok(true);
                }
            }
            let meta = opened.metadata()?;
            Ok(meta.len() == file.size && version_of(&meta) == file.version)
        };
        let error = match read(&chunks) {
            Ok(true) => return,
            Ok(false) => ObjectError::Changed { uri: file.uri.clone() },
            Err(source) => ObjectError::file(&file.uri, source),
        };
        // Nobody waits for it any more.
        let _ = chunks.blocking_send(Err(error));
    });
    stream::unfold(taken, |mut taken| async move { Some((taken.recv().await?, taken)) }).boxed()
}

/// Several requests at once, each for a part.
fn ranges(
    opened: Opened,
    tag: Option<String>,
    file: SourceFile,
    from: u64,
) -> BoxStream<'static, Result<Bytes, ObjectError>> {
    let starts = (from..file.size).step_by(STORE_CHUNK as usize);
    stream::iter(starts)
        .map(move |start| {
            let end = (start + STORE_CHUNK).min(file.size);
            let options = GetOptions {
                range: Some(GetRange::Bounded(start..end)),
                if_match: tag.clone(),
                ..GetOptions::default()
            };
            let (store, path, uri) = (opened.store.clone(), opened.path.clone(), file.uri.clone());
            let version = tag.is_none().then(|| file.version.clone());
            async move {
                let answer = store.get_opts(&path, options).await;
                let answer = answer.map_err(|error| ObjectError::store(&uri, &error))?;
                if is_later(&answer.meta, &version) {
                    return Err(ObjectError::Changed { uri });
                }
                answer.bytes().await.map_err(|error| ObjectError::store(&uri, &error))
            }
        })
        .buffered(AHEAD)
        .boxed()
}

/// One request; many servers know no parts.
async fn http(
    opened: Opened,
    tag: Option<String>,
    file: SourceFile,
    from: u64,
) -> Result<BoxStream<'static, Result<Bytes, ObjectError>>, ObjectError> {
    let Opened { store, path } = opened;
    let part = (from > 0).then_some(GetRange::Offset(from));
    let answer = store.get_opts(&path, GetOptions { range: part, ..GetOptions::default() }).await;
    let (answer, mut skip) = match answer {
        // That is how an answer which is not the part is told, too.
        Err(object_store::Error::NotSupported { .. } | object_store::Error::Generic { .. }) if from > 0 => {
            tracing::info!(file = %file.uri, from, "the server knows no parts of files: reading from the beginning");
            (store.get_opts(&path, GetOptions::default()).await, from)
        }
        answer => (answer, 0),
    };
    let uri = file.uri.clone();
    let answer = answer.map_err(|error| ObjectError::store(&uri, &error))?;
    // Some servers tell a tag with the content only, and not when they are asked for the head.
    let version = tag.is_none().then(|| file.version.clone());
    let other = tag.is_some_and(|tag| answer.meta.e_tag.as_ref().is_some_and(|now| *now != tag));
    if answer.meta.size != file.size || other || is_later(&answer.meta, &version) {
        return Err(ObjectError::Changed { uri });
    }
    let stream = answer.into_stream().map(move |chunk| {
        let mut chunk = chunk.map_err(|error| ObjectError::store(&uri, &error))?;
        let skipped = skip.min(chunk.len() as u64);
        skip -= skipped;
        Ok(chunk.split_off(usize::try_from(skipped).unwrap_or(usize::MAX).min(chunk.len())))
    });
    Ok(stream.boxed())
}

/// Where there is no tag (`version`: the time, then): written at another time than what was found. A server that does
/// not tell the time with each answer is believed.
fn is_later(meta: &ObjectMeta, version: &Option<String>) -> bool {
    let (now, none) = (time_of(meta), "0");
    version.as_ref().is_some_and(|found| found != none && now != none && *found != now)
}

pub(super) fn time_of(meta: &ObjectMeta) -> String {
    meta.last_modified.timestamp_millis().to_string()
}

/// Of a file on a disk: when it was written.
pub(super) fn version_of(meta: &std::fs::Metadata) -> String {
    let at = meta.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    at.unwrap_or_default().as_nanos().to_string()
}
