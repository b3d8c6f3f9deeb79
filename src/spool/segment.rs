//! Segment files of the spool: records of raw replication bytes, each with its position and checksum.
//!
//! Record: length (4 bytes), position (8 bytes), CRC-64/XZ of the bytes (8 bytes), bytes; integers little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::SpoolError;

/// A segment is closed once it holds this many bytes.
pub const SEGMENT_BYTES: u64 = 64 << 20;
const HEADER: usize = 20;

/// The segment that is being written.
pub struct SegmentWriter {
    file: Arc<File>,
    pub id: u64,
    pub path: PathBuf,
    size: u64,
}

impl SegmentWriter {
    /// Creates `FOLDER/<id>.spool`, and the folder when it is missing.
    pub async fn create(folder: &Path, id: u64) -> Result<Self, SpoolError> {
        let path = segment_path(folder, id);
        let wanted = (folder.to_path_buf(), path.clone());
        let file = blocking(move || {
            std::fs::create_dir_all(&wanted.0)?;
            File::options().write(true).create(true).truncate(true).open(&wanted.1)
        })
        .await
        .map_err(|source| SpoolError::Write { path: path.clone(), source })?;
        Ok(Self { file: Arc::new(file), id, path, size: 0 })
    }

    pub fn is_full(&self) -> bool {
        self.size >= SEGMENT_BYTES
    }

    /// Appends one record and gives the place of its header in the file.
    pub async fn append(&mut self, position: u64, bytes: Bytes) -> Result<u64, SpoolError> {
        let at = self.size;
        let file = Arc::clone(&self.file);
        let length = bytes.len();
        blocking(move || {
            let mut header = [0u8; HEADER];
            header[..4].copy_from_slice(&(length as u32).to_le_bytes());
            header[4..12].copy_from_slice(&position.to_le_bytes());
            header[12..].copy_from_slice(&checksum(&bytes).to_le_bytes());
            file.write_all_at(&header, at)?;
            file.write_all_at(&bytes, at + HEADER as u64)
        })
        .await
        .map_err(|source| SpoolError::Write { path: self.path.clone(), source })?;
        self.size += (HEADER + length) as u64;
        Ok(at)
    }
}

/// Reads records; keeps the last segment open, as records are read in order.
#[derive(Default)]
pub struct SegmentReader {
    open: Option<(u64, Arc<File>)>,
}

impl SegmentReader {
    /// The bytes of the record whose header stands at `at`; position and checksum are checked.
    pub async fn read(
        &mut self,
        folder: &Path,
        segment: u64,
        at: u64,
        position: u64,
        length: u32,
    ) -> Result<Vec<u8>, SpoolError> {
        let path = segment_path(folder, segment);
        let known = self.open.as_ref().filter(|(id, _)| *id == segment).map(|(_, file)| Arc::clone(file));
        let wanted = path.clone();
        let (file, record) = blocking(move || {
            let file = match known {
                Some(file) => file,
                None => Arc::new(File::open(&wanted)?),
            };
            let mut record = vec![0u8; HEADER + length as usize];
            file.read_exact_at(&mut record, at)?;
            Ok((file, record))
        })
        .await
        .map_err(|source| SpoolError::Read { path: path.clone(), source })?;
        self.open = Some((segment, file));
        let bytes = checked(&record, position).ok_or(SpoolError::Corrupt { path, at })?;
        Ok(bytes.to_vec())
    }
}

/// The record's bytes, if header, position and checksum agree.
fn checked(record: &[u8], position: u64) -> Option<&[u8]> {
    let (header, bytes) = record.split_at_checked(HEADER)?;
    let length = u32::from_le_bytes(header.get(..4)?.try_into().ok()?);
    let stored_position = u64::from_le_bytes(header.get(4..12)?.try_into().ok()?);
    let stored_checksum = u64::from_le_bytes(header.get(12..)?.try_into().ok()?);
    let sound =
        length as usize == bytes.len() && stored_position == position && stored_checksum == checksum(bytes);
    sound.then_some(bytes)
}

pub fn segment_path(folder: &Path, id: u64) -> PathBuf {
    folder.join(format!("{id:012}.spool"))
}

/// Removes the segment files in `folder`, and nothing else.
pub fn remove_segments(folder: &Path) {
    // Mostly there is no such folder.
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path());
    for path in files.filter(|path| path.extension().is_some_and(|ending| ending == "spool")) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "an old spool file could not be removed");
        }
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(bytes);
    digest.sum64()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| Err(io::Error::other(join)))
}
