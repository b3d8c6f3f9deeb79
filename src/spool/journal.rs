//! The journal: what the records of a spool folder are of. One small file, replaced as a whole.
//!
//! First line: CRC-64/XZ of the rest, in hexadecimal; then JSON.

use std::io;
use std::path::{Path, PathBuf};

use super::Origin;

const NAME: &str = "journal";
const VERSION: u32 = 1;
/// More than any journal has.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Journal {
    version: u32,
    pub history: u64,
    replication_id: String,
    offset: i64,
    /// An RDB comes first.
    pub snapshot: bool,
    /// Position of the first stream byte, once known.
    pub stream_at: Option<u64>,
}

impl Journal {
    pub fn new(history: u64, origin: &Origin, snapshot: bool, stream_at: Option<u64>) -> Self {
        let Origin { replication_id, offset } = origin.clone();
        Self { version: VERSION, history, replication_id, offset, snapshot, stream_at }
    }

    pub fn says(&self, history: u64, origin: &Origin, stream_at: Option<u64>) -> bool {
        self.history == history
            && self.replication_id == origin.replication_id
            && self.offset == origin.offset
            && self.stream_at == stream_at
    }

    pub fn origin(&self) -> Origin {
        Origin { replication_id: self.replication_id.clone(), offset: self.offset }
    }

    pub fn read(folder: &Path) -> io::Result<Self> {
        let path = path(folder);
        if std::fs::metadata(&path)?.len() > MAX_BYTES {
            return Err(damaged("it is too long"));
        }
        let text = std::fs::read_to_string(path)?;
        let (sum, json) = text.split_once('\n').ok_or_else(|| damaged("it has one line"))?;
        if sum != checksum(json) {
            return Err(damaged("its checksum does not fit"));
        }
        let journal: Self = serde_json::from_str(json)?;
        if journal.version != VERSION {
            return Err(damaged("it is of another version of this program"));
        }
        Ok(journal)
    }

    /// Written beside and moved over: a kill leaves the old one or the new one. It is not forced to the
    /// disk: after a power loss it may be missing or old, and records that do not fit it are not used.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let json = serde_json::to_string(self)?;
        let path = path(folder);
        let beside = path.with_extension("new");
        std::fs::write(&beside, format!("{}\n{json}", checksum(&json)))?;
        std::fs::rename(beside, path)
    }

    pub fn remove(folder: &Path) -> io::Result<()> {
        match std::fs::remove_file(path(folder)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

pub fn path(folder: &Path) -> PathBuf {
    folder.join(NAME)
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn checksum(text: &str) -> String {
    let mut digest = crc64fast::Digest::new();
    digest.write(text.as_bytes());
    format!("{:016x}", digest.sum64())
}
