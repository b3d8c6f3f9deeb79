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
    let mut pushed = Pushed::new(limits);
    let mut chunk = vec![0; CHUNK];
    while !pushed.is_over() {
        let position = pushed.position() + pushed.undecoded() as u64;
        match read.read(&mut chunk) {
            Ok(0) => return Err(FileError::Truncated { position }),
            Ok(count) => pushed.push(chunk.get(..count).unwrap_or_default(), &mut sink)?,
            Err(source) if source.kind() == ErrorKind::Interrupted => {}
            Err(source) => return Err(FileError::Read { position, source }),
        }
    }
    Ok(pushed.position())
}

/// The same for who is given the bytes, instead of asking for them.
pub struct Pushed {
    decoder: Decoder,
    crc: Crc,
    /// Unread: `window[at..]`. In the checksum: what lies before `summed`.
    window: Vec<u8>,
    at: usize,
    summed: usize,
    need: usize,
    ended: bool,
}

impl Pushed {
    pub fn new(limits: Limits) -> Self {
        let (window, crc) = (Vec::new(), Crc::new());
        Self { decoder: Decoder::new(limits), crc, window, at: 0, summed: 0, need: 1, ended: false }
    }

    /// Bytes of the RDB decoded so far.
    pub fn position(&self) -> u64 {
        self.decoder.position()
    }

    /// True behind the end of the RDB, whose checksum fits.
    pub fn is_over(&self) -> bool {
        self.ended
    }

    /// Bytes that were pushed and are not decoded.
    pub fn undecoded(&self) -> usize {
        self.window.len() - self.at
    }

    /// Hands every event that is whole by now to `sink`.
    pub fn push(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(Place, Event<'_>) -> std::io::Result<()>,
    ) -> Result<(), FileError> {
        self.push_raw(bytes, |place, event, _| sink(place, event))
    }

    /// The same with the bytes that each event took: all of them together are the RDB.
    pub fn push_raw(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(Place, Event<'_>, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), FileError> {
        self.compact();
        self.window.extend_from_slice(bytes);
        while !self.ended && self.undecoded() >= self.need {
            let (db, flavor, version) = (self.decoder.db(), self.decoder.flavor(), self.decoder.version());
            let input = self.window.get(self.at..).unwrap_or_default();
            let (consumed, event) = match self.decoder.next(input)? {
                Step::NeedMore { at_least } => {
                    self.need = at_least.max(input.len() + 1);
                    return Ok(());
                }
                Step::Event { consumed, event } => (consumed, event),
            };
            self.need = 1;
            if let Event::End { crc: stored } = event {
                let covered = self.at + consumed.min(1);
                self.crc.update(self.window.get(self.summed..covered).unwrap_or_default());
                let computed = self.crc.value();
                // 0: the writer was told not to compute one.
                if let Some(stored) = stored.filter(|&stored| stored != 0 && stored != computed) {
                    return Err(FileError::Checksum { computed, stored });
                }
                self.ended = true;
            }
            let raw = input.get(..consumed).unwrap_or_default();
            sink(Place { db, flavor, version, bytes: consumed }, event, raw).map_err(FileError::Sink)?;
            self.at += consumed;
        }
        Ok(())
    }

    fn compact(&mut self) {
        self.crc.update(self.window.get(self.summed..self.at).unwrap_or_default());
        self.window.drain(..self.at);
        if self.window.len() < CHUNK && self.window.capacity() > 4 * CHUNK {
            self.window.shrink_to(CHUNK);
        }
        (self.at, self.summed) = (0, 0);
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

    /// What comes of it does not depend on how the bytes are split.
    #[test]
    fn pushed_bytes_give_the_same_keys() {
        let rdb = sample();
        let (_, expected) = keys(&rdb);
        for size in [1, 7, 4096, rdb.len()] {
            let (mut pushed, mut found) = (Pushed::new(Limits::default()), 0);
            for bytes in rdb.chunks(size) {
                assert!(!pushed.is_over());
                pushed
                    .push(bytes, |_, event| {
                        found += usize::from(matches!(event, Event::Key(_)));
                        Ok(())
                    })
                    .unwrap();
            }
            assert!(pushed.is_over() && pushed.undecoded() == 0);
            assert_eq!((found, pushed.position()), (expected, rdb.len() as u64));
        }
        let mut damaged = rdb.clone();
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        let mut pushed = Pushed::new(Limits::default());
        assert!(matches!(pushed.push(&damaged, |_, _| Ok(())), Err(FileError::Checksum { .. })));
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
