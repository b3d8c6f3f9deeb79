//! What a killed run left on disk, taken over.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::flush::Folder;
use super::journal::Journal;
use super::segment::{HEADER, Head, is_sound, parse_name, segment_path};
use super::state::{DiskPlace, Entry, State};
use super::store::{Segment, Store};
use super::{Origin, SpoolLimits, SpoolReader, SpoolWriter, folder, open};

/// Of the newest this many bytes the data are checked at once, of older ones when they are read: a killed
/// process leaves at most its last write torn, and reading many gigabytes would hold up the start.
const CHECKED_BYTES: u64 = 256 << 20;

/// What is there to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The history's number, as [`SpoolWriter::history`] gave it to the killed run.
    pub history: u64,
    pub origin: Origin,
    /// The history begins with an RDB, at position 0.
    pub snapshot: bool,
    /// Position of the first stream byte; `None` when the RDB's end had not arrived.
    pub stream_at: Option<u64>,
    /// The bytes from `from` to before `end` are there. Appending goes on at `end`.
    pub from: u64,
    pub end: u64,
}

impl Recovered {
    /// The replication offset up to which the source's stream is there, to ask for what follows.
    pub fn offset(&self) -> Option<i64> {
        Some(self.origin.offset + i64::try_from(self.end.checked_sub(self.stream_at?)?).ok()?)
    }

    /// The position behind the stream's byte with this replication offset, when reading can go on there.
    pub fn position_of(&self, offset: i64) -> Option<u64> {
        let stream_at = self.stream_at?;
        let position = stream_at + u64::try_from(offset.checked_sub(self.origin.offset)?).ok()?;
        (self.from..=self.end).contains(&position).then_some(position)
    }
}

/// Takes over what a killed run of the same shard left, if that is of use, and removes the rest. The reader
/// stands at `from`, and does not announce the history: go on with [`SpoolReader::seek`] and
/// [`SpoolReader::applied`], or discard it all with [`SpoolWriter::begin`].
///
/// A run that is still alive, such as a frozen one, loses its folder by this, and ends with an error when it
/// next needs the disk. So fence it off first.
pub async fn recover(limits: SpoolLimits) -> Option<(SpoolWriter, SpoolReader, Recovered)> {
    let adopted = tokio::task::spawn_blocking(move || adopt(&limits).map(|adopted| (limits, adopted))).await;
    let (limits, (path, state)) = adopted.ok().flatten()?;
    let recovered = Recovered {
        history: state.history,
        origin: state.origin.clone()?,
        snapshot: state.snapshot,
        stream_at: state.stream_at,
        from: state.read,
        end: state.end(),
    };
    let (writer, reader) = open(limits, Folder::new(path, true), state);
    Some((writer, reader, recovered))
}

/// The first folder that is of use; all others are removed.
fn adopt(limits: &SpoolLimits) -> Option<(PathBuf, State)> {
    let shard = &limits.folder;
    let mut adopted = None;
    for left in folder::left_over(shard) {
        if adopted.is_some() {
            folder::remove(&left);
            continue;
        }
        let own = folder::own(shard);
        // When two processes come at once, one of them is too late.
        if std::fs::rename(&left, &own).is_err() {
            continue;
        }
        match scan(&own) {
            Ok(Some(state)) => adopted = Some((own, state)),
            Ok(None) => folder::remove(&own),
            Err(error) => {
                tracing::warn!(path = %left.display(), %error, "what an earlier run spooled is of no use");
                folder::remove(&own);
            }
        }
    }
    adopted
}

/// A segment file as it was found.
struct Found {
    id: u64,
    sealed: Option<u64>,
    /// Bytes to look at.
    size: u64,
    path: PathBuf,
}

/// The records of a folder that fit together.
#[derive(Default)]
struct Run {
    entries: VecDeque<Entry>,
    /// Up to which place each segment is of use.
    ends: BTreeMap<u64, u64>,
}

impl Run {
    /// False when the record does not fit to those before it.
    fn add(&mut self, head: &Head, segment: u64, at: u64) -> bool {
        match self.entries.back().map(Entry::end) {
            Some(end) if head.position < end => return false,
            // What was between was applied before it got to the disk, and so was all before it.
            Some(end) if head.position > end => self.entries.clear(),
            _ => {}
        }
        self.entries.push_back(Entry {
            position: head.position,
            length: head.length as u32,
            arrived: head.arrived,
            memory: None,
            disk: Some(DiskPlace { segment, at }),
        });
        self.ends.insert(segment, at + (HEADER + head.length) as u64);
        true
    }
}

/// `None`: nothing is of use.
fn scan(folder: &Path) -> io::Result<Option<State>> {
    let journal = match Journal::read(folder) {
        // It was killed before it needed the disk.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let files = files(folder)?;
    let total: u64 = files.iter().map(|file| file.size).sum();
    let mut unchecked = total.saturating_sub(CHECKED_BYTES);
    let mut run = Run::default();
    for file in &files {
        let whole = read_segment(file, &journal, &mut unchecked, &mut run)?;
        // Files that begin badly may be the rest of a history before; behind sound records they are not.
        if !whole && !run.entries.is_empty() {
            tracing::warn!(path = %file.path.display(), "what an earlier run spooled ends at a torn record");
            break;
        }
    }
    let segments = tidy(folder, &files, &run)?;
    let (Some(first), Some(last)) = (run.entries.front(), run.entries.back()) else { return Ok(None) };
    let (from, end) = (first.position, last.end());
    if journal.stream_at.is_some_and(|stream_at| end < stream_at) {
        // The end of the RDB is missing: no source sends it again.
        return Ok(None);
    }
    Ok(Some(State {
        history: journal.history,
        origin: Some(journal.origin()),
        snapshot: journal.snapshot,
        stream_at: journal.stream_at,
        entries: run.entries,
        applied: from,
        read: from,
        through: true,
        cached: from..from,
        store: Store::adopted(segments, journal),
        ..State::default()
    }))
}

/// In the order in which they were written.
fn files(folder: &Path) -> io::Result<Vec<Found>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let Some((id, sealed)) = parse_name(&path) else { continue };
        let size = entry.metadata()?.len().min(sealed.unwrap_or(u64::MAX));
        files.push(Found { id, sealed, size, path });
    }
    files.sort_by_key(|file| file.id);
    Ok(files)
}

/// Takes the records up to the first that is torn, damaged or of another history; says whether none is.
fn read_segment(found: &Found, journal: &Journal, unchecked: &mut u64, run: &mut Run) -> io::Result<bool> {
    let file = File::open(&found.path)?;
    let (mut at, mut data) = (0, Vec::new());
    let mut header = [0u8; HEADER];
    while at < found.size {
        let start = at + HEADER as u64;
        if start > found.size {
            return Ok(false);
        }
        file.read_exact_at(&mut header, at)?;
        let Some(head) = Head::parse(&header, journal.history) else { return Ok(false) };
        let end = start + head.length as u64;
        if end > found.size || head.stream != journal.stream_at.is_some_and(|from| head.position >= from) {
            return Ok(false);
        }
        if *unchecked > end - at {
            *unchecked -= end - at;
        } else {
            data.resize(head.length, 0);
            file.read_exact_at(&mut data, start)?;
            if !is_sound(&header, &head, journal.history, &data) {
                return Ok(false);
            }
        }
        if !run.add(&head, found.id, at) {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

/// Removes files of which nothing is held, and closes the last: its writer may be frozen, not dead, and what
/// it adds when it wakes must not count.
fn tidy(folder: &Path, files: &[Found], run: &Run) -> io::Result<BTreeMap<u64, Segment>> {
    let mut segments: BTreeMap<u64, Segment> = BTreeMap::new();
    for entry in &run.entries {
        let Some(DiskPlace { segment, .. }) = entry.disk else { continue };
        let bytes = run.ends.get(&segment).copied().unwrap_or_default();
        segments.entry(segment).or_insert(Segment { sealed: None, bytes, live: 0 }).live += 1;
    }
    let last = segments.keys().next_back().copied();
    for file in files {
        let Some(segment) = segments.get_mut(&file.id) else {
            std::fs::remove_file(&file.path)?;
            continue;
        };
        segment.sealed = file.sealed;
        if last == Some(file.id) && file.sealed != Some(segment.bytes) {
            // The name takes no room on a full disk, and holds also when the writer wakes in between.
            std::fs::rename(&file.path, segment_path(folder, file.id, Some(segment.bytes)))?;
            segment.sealed = Some(segment.bytes);
            let cut = File::options().write(true).open(segment_path(folder, file.id, segment.sealed));
            if let Err(error) = cut.and_then(|file| file.set_len(segment.bytes)) {
                tracing::warn!(path = %file.path.display(), %error, "a torn record could not be cut off");
            }
        }
    }
    Ok(segments)
}
