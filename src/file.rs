//! RDB files: read from end to end, checksum included.

use std::io::{ErrorKind, Read};

use thiserror::Error;

use crate::rdb::checksum::Crc;
use crate::rdb::{Decoder, Event, Limits, RdbError, Step};
use crate::version::Flavor;

/// Asked of the file at once, at least.
const CHUNK: usize = 1 << 20;

#[derive(Debug, Error)]
pub enum FileError {
    #[error("{0}")]
    Rdb(#[from] RdbError),
    #[error("the file ends at byte {position}, in the middle of an RDB: it is truncated")]
    Truncated { position: u64 },
    #[error("the RDB's checksum is {computed:016x}, its end says {stored:016x}: the file is damaged")]
    Checksum { computed: u64, stored: u64 },
    #[error("byte {position}: {source}")]
    Read { position: u64, source: std::io::Error },
    /// What the events were given to could not go on.
    #[error("{0}")]
    Sink(std::io::Error),
}

/// Where an event stands.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub db: u64,
    /// Whose numbering of types applies.
    pub flavor: Flavor,
    /// RDB version of the header, 0 before it.
    pub version: u16,
    /// Bytes that the event took.
    pub bytes: usize,
}

/// Hands every event of the RDB to `sink`, in order. Gives the number of bytes of the RDB. Memory: what
/// `limits` lets a value take, and a few MiB.
pub fn each_event(
    read: &mut impl Read,
    limits: Limits,
    mut sink: impl FnMut(Place, Event<'_>) -> std::io::Result<()>,
) -> Result<u64, FileError> {
    let mut decoder = Decoder::new(limits);
    let mut crc = Crc::new();
    let mut buffer: Vec<u8> = Vec::new();
    // Of the buffer: decoded, and read. What is decoded is added to the checksum in long runs.
    let (mut start, mut end) = (0, 0);
    loop {
        let before = decoder.position();
        let (db, flavor, version) = (decoder.db(), decoder.flavor(), decoder.version());
        match decoder.next(buffer.get(start..end).unwrap_or_default())? {
            Step::Event { consumed, event } => {
                if let Event::End { crc: stored } = event {
                    crc.update(buffer.get(..start + 1).unwrap_or_default());
                    let computed = crc.value();
                    return match stored {
                        // 0: the writer was told not to compute one.
                        Some(stored) if stored != 0 && stored != computed => {
                            Err(FileError::Checksum { computed, stored })
                        }
                        _ => {
                            sink(Place { db, flavor, version, bytes: consumed }, event)
                                .map_err(FileError::Sink)?;
                            Ok(before + consumed as u64)
                        }
                    };
                }
                sink(Place { db, flavor, version, bytes: consumed }, event).map_err(FileError::Sink)?;
                start += consumed;
            }
            Step::NeedMore { at_least } => {
                crc.update(buffer.get(..start).unwrap_or_default());
                buffer.copy_within(start..end, 0);
                (start, end) = (0, end - start);
                let wanted = at_least.max(end + 1).max(CHUNK);
                if buffer.len() < wanted {
                    // Grown as bytes arrive, not as a length in the file announces.
                    buffer.resize(wanted.min(end.saturating_mul(2).max(2 * CHUNK)), 0);
                }
                let room = buffer.get_mut(end..).unwrap_or_default();
                match read.read(room) {
                    Ok(0) => return Err(FileError::Truncated { position: before + end as u64 }),
                    Ok(count) => end += count,
                    Err(source) if source.kind() == ErrorKind::Interrupted => {}
                    Err(source) => return Err(FileError::Read { position: before + end as u64, source }),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rdb/testdata/redis-7.0.15.rdb");
        std::fs::read(path).unwrap()
    }

    fn keys(mut bytes: &[u8]) -> (Result<u64, FileError>, usize) {
        let mut keys = 0;
        let result = each_event(&mut bytes, Limits::default(), |_, event| {
            keys += usize::from(matches!(event, Event::Key(_)));
            Ok(())
        });
        (result, keys)
    }

    #[test]
    fn a_whole_file_is_read_to_its_end() {
        let rdb = sample();
        let (result, found) = keys(&rdb);
        assert_eq!(result.unwrap(), rdb.len() as u64);
        assert!(found > 10);
    }

    #[test]
    fn a_truncated_file_says_where() {
        let rdb = sample();
        let (result, found) = keys(&rdb[..rdb.len() - 9]);
        assert!(matches!(result, Err(FileError::Truncated { position }) if position == rdb.len() as u64 - 9));
        assert!(found > 10);
        assert!(matches!(keys(b"").0, Err(FileError::Truncated { position: 0 })));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let rdb = sample();
        for at in (9..rdb.len()).step_by(97) {
            let mut damaged = rdb.clone();
            damaged[at] ^= 0x10;
            assert!(keys(&damaged).0.is_err(), "byte {at}");
        }
    }
}
