//! Segment files: records of raw replication bytes, each with its position and checksums.
//!
//! Record, integers little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 4 | length of the data; bit 31 set: of the command stream, else of the RDB |
//! | 4 | the lower half of a CRC-64/XZ of the history's number and the other header fields but the last |
//! | 8 | position of the first byte |
//! | 8 | its arrival, Unix ms |
//! | 8 | CRC-64/XZ of the same header fields and the data |
//!
//! The history's number is not stored with the record: what was written for another history is not sound
//! for this one. What a writer wrote as a whole record it never changes or cuts off afterwards.

use std::fs::File;
use std::io::{self, IoSlice, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::{BLOCK, SpoolError};

pub const HEADER: usize = 32;
const STREAM: u32 = 1 << 31;

/// What is written as one record.
#[derive(Clone, Debug)]
pub struct Record {
    pub position: u64,
    pub arrived: u64,
    pub stream: bool,
    pub bytes: Bytes,
}

impl Record {
    pub fn size(&self) -> u64 {
        (HEADER + self.bytes.len()) as u64
    }

    fn header(&self, history: u64) -> [u8; HEADER] {
        let head = Head {
            position: self.position,
            arrived: self.arrived,
            stream: self.stream,
            length: self.bytes.len(),
        };
        let digest = head.digest(history);
        let mut header = [0u8; HEADER];
        header[..4].copy_from_slice(&head.word().to_le_bytes());
        header[4..8].copy_from_slice(&(digest.sum64() as u32).to_le_bytes());
        header[8..16].copy_from_slice(&self.position.to_le_bytes());
        header[16..24].copy_from_slice(&self.arrived.to_le_bytes());
        header[24..].copy_from_slice(&with(digest, &self.bytes).to_le_bytes());
        header
    }
}

/// The header fields that both checksums cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub position: u64,
    pub arrived: u64,
    pub stream: bool,
    pub length: usize,
}

impl Head {
    /// `None` when it is not sound, or not of this history.
    pub fn parse(header: &[u8; HEADER], history: u64) -> Option<Self> {
        let word = u32::from_le_bytes(header[..4].try_into().ok()?);
        let head = Self {
            position: u64::from_le_bytes(header[8..16].try_into().ok()?),
            arrived: u64::from_le_bytes(header[16..24].try_into().ok()?),
            stream: word & STREAM != 0,
            length: (word & !STREAM) as usize,
        };
        let check = u32::from_le_bytes(header[4..8].try_into().ok()?);
        let sound = check == head.digest(history).sum64() as u32 && (1..=BLOCK).contains(&head.length);
        sound.then_some(head)
    }

    fn word(&self) -> u32 {
        self.length as u32 | if self.stream { STREAM } else { 0 }
    }

    fn digest(&self, history: u64) -> crc64fast::Digest {
        let mut digest = crc64fast::Digest::new();
        digest.write(&history.to_le_bytes());
        digest.write(&self.word().to_le_bytes());
        digest.write(&self.position.to_le_bytes());
        digest.write(&self.arrived.to_le_bytes());
        digest
    }
}

/// Whether the data are those that the header was written with.
pub fn is_sound(header: &[u8; HEADER], head: &Head, history: u64, data: &[u8]) -> bool {
    header[24..] == with(head.digest(history), data).to_le_bytes()
}

fn with(mut digest: crc64fast::Digest, data: &[u8]) -> u64 {
    digest.write(data);
    digest.sum64()
}

/// The segment that is being written.
pub struct SegmentWriter {
    file: File,
    pub id: u64,
    pub path: PathBuf,
    /// End of the last whole record.
    pub size: u64,
    /// A torn record behind it could not be cut off: nothing can follow.
    pub torn: bool,
}

impl SegmentWriter {
    /// Creates the file; the folder is there, or was taken away.
    pub fn create(folder: &Path, id: u64) -> Result<Self, (PathBuf, io::Error)> {
        let path = segment_path(folder, id, None);
        match File::options().write(true).create(true).truncate(true).open(&path) {
            Ok(file) => Ok(Self { file, id, path, size: 0, torn: false }),
            Err(error) => Err((path, error)),
        }
    }

    /// Appends the records in one write and gives the places of those that stand whole in the file, which
    /// are fewer than all only beside an error. A torn one is cut off again.
    pub fn append(&mut self, records: &[Record], history: u64) -> (Vec<u64>, io::Result<()>) {
        let headers: Vec<_> = records.iter().map(|record| record.header(history)).collect();
        let mut slices = Vec::with_capacity(2 * records.len());
        for (record, header) in records.iter().zip(&headers) {
            slices.push(IoSlice::new(header));
            slices.push(IoSlice::new(&record.bytes));
        }
        let (written, result) = write_all(&mut &self.file, &mut slices);
        let (start, mut places) = (self.size, Vec::with_capacity(records.len()));
        for record in records {
            if self.size + record.size() > start + written {
                break;
            }
            places.push(self.size);
            self.size += record.size();
        }
        let result = result.and_then(|()| match places.len() == records.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        });
        if result.is_err() {
            let cut = self.file.set_len(self.size).and_then(|()| self.file.seek(SeekFrom::Start(self.size)));
            if let Err(error) = cut {
                self.torn = true;
                tracing::warn!(path = %self.path.display(), %error, "a torn record could not be cut off");
            }
        }
        (places, result)
    }
}

/// Gives the bytes written, also beside an error.
fn write_all(file: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> (u64, io::Result<()>) {
    let mut written = 0u64;
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                written += count as u64;
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// Where a record stands.
#[derive(Clone, Debug)]
pub struct RecordPlace {
    pub path: PathBuf,
    pub at: u64,
    pub position: u64,
    pub length: u32,
    pub history: u64,
}

/// Reads records; keeps the last segment open, as records are read in order.
#[derive(Default)]
pub struct SegmentReader {
    open: Option<(PathBuf, Arc<File>)>,
}

impl SegmentReader {
    /// The data of a record; position and checksums are checked.
    pub async fn read(&mut self, place: RecordPlace) -> Result<Bytes, SpoolError> {
        let known =
            self.open.as_ref().filter(|(path, _)| *path == place.path).map(|(_, file)| Arc::clone(file));
        let wanted = place.clone();
        let read = tokio::task::spawn_blocking(move || {
            let file = match known {
                Some(file) => file,
                None => Arc::new(File::open(&wanted.path)?),
            };
            let mut record = vec![0u8; HEADER + wanted.length as usize];
            file.read_exact_at(&mut record, wanted.at)?;
            Ok((file, record))
        });
        let read = read.await.unwrap_or_else(|join| Err(io::Error::other(join)));
        let RecordPlace { path, at, position, length, history } = place;
        let (file, record) = read.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SpoolError::Taken { path: path.clone() },
            // Cut short by another hand.
            io::ErrorKind::UnexpectedEof => SpoolError::Corrupt { path: path.clone(), at },
            _ => SpoolError::Read { path: path.clone(), source },
        })?;
        self.open = Some((path.clone(), file));
        let record = Bytes::from(record);
        let data = record.slice(HEADER.min(record.len())..);
        let sound = record.first_chunk::<HEADER>().is_some_and(|header| {
            Head::parse(header, history).is_some_and(|head| {
                head.position == position
                    && head.length == length as usize
                    && is_sound(header, &head, history, &data)
            })
        });
        if sound { Ok(data) } else { Err(SpoolError::Corrupt { path, at }) }
    }
}

/// `FOLDER/<id>.spool`, or `FOLDER/<id>.<length>.spool` for one that an earlier process left: no byte
/// behind that length is of use, whoever may still write there.
pub fn segment_path(folder: &Path, id: u64, sealed: Option<u64>) -> PathBuf {
    match sealed {
        Some(length) => folder.join(format!("{id:012}.{length}.spool")),
        None => folder.join(format!("{id:012}.spool")),
    }
}

/// The id and sealed length in a segment's name.
pub fn parse_name(path: &Path) -> Option<(u64, Option<u64>)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".spool")?;
    match stem.split_once('.') {
        Some((id, length)) => Some((id.parse().ok()?, Some(length.parse().ok()?))),
        None => Some((stem.parse().ok()?, None)),
    }
}
