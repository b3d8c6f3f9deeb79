mod disk_full;
mod killed;
mod recovery;

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::FutureExt;

use super::segment::parse_name;
use super::*;

const LIMIT: Duration = Duration::from_secs(20);

pub fn limits(folder: &Path, memory: u64, disk: u64) -> SpoolLimits {
    SpoolLimits { memory, disk, retain: 0, folder: folder.join("spool"), volume: Volume::default() }
}

pub fn origin() -> Origin {
    Origin { replication_id: "a".repeat(40), offset: 100 }
}

/// Bytes that say their position, so that a gap or a repetition shows.
pub fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ (at >> 16) as u8 ^ seed).collect()
}

pub async fn read(reader: &mut SpoolReader, length: usize) -> Vec<u8> {
    let mut found = Vec::new();
    while found.len() < length {
        match tokio::time::timeout(LIMIT, reader.next()).await.unwrap().unwrap() {
            Next::Block(block) => found.extend_from_slice(&block.bytes),
            Next::Begun { .. } => assert!(found.is_empty()),
        }
    }
    found
}

pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, wait).await.is_ok(), "not within {LIMIT:?}: {what}");
}

/// Until nobody is at work in the folder.
pub async fn idle(reader: &SpoolReader) {
    until("the folder is idle", || !reader.shared.lock().store.busy).await;
}

pub fn segments(folder: &Path) -> Vec<PathBuf> {
    let runs = super::folder::left_over(folder);
    let files = runs.iter().flat_map(|run| std::fs::read_dir(run).unwrap());
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.retain(|path| parse_name(path).is_some());
    files.sort();
    files
}

#[tokio::test]
async fn bytes_past_the_memory_limit_go_to_disk_and_come_back_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 600_000, 1 << 30));
    writer.begin(origin(), true);
    let sent = pattern(3_000_000, 1);
    for part in sent.chunks(100_001) {
        writer.append(part, 5).await.unwrap();
        let gauges = writer.gauges();
        assert!(gauges.memory_bytes <= 600_000 + 2 * BLOCK as u64, "{gauges:?}");
    }
    idle(&reader).await;
    assert!(writer.gauges().disk_bytes > 2_500_000, "all but the newest stand there: {:?}", writer.gauges());
    assert!(read(&mut reader, sent.len()).await == sent);
    reader.seek(1_234_567);
    assert!(read(&mut reader, sent.len() - 1_234_567).await == sent[1_234_567..]);
    reader.applied(sent.len() as u64);
    idle(&reader).await;
    assert_eq!(reader.gauges().disk_bytes, 0);
    assert_eq!(segments(&folder.path().join("spool")), Vec::<PathBuf>::new());
    writer.append(b"more", 6).await.unwrap();
    assert_eq!(read(&mut reader, 4).await, b"more");
    drop((writer, reader));
    until("the files are gone", || !folder.path().join("spool").exists()).await;
}

/// Two of them, and no room for what both hold back.
#[tokio::test]
async fn spools_on_one_volume_share_its_room() {
    let folder = tempfile::tempdir().unwrap();
    let volume = Volume::new(4 * BLOCK as u64, folder.path());
    let open = |name: &str| {
        spool(SpoolLimits {
            folder: folder.path().join(name),
            volume: volume.clone(),
            ..limits(folder.path(), 0, 1 << 30)
        })
    };
    let ((mut first, mut reader), (mut second, mut other)) = (open("a"), open("b"));
    let sent = pattern(2 * BLOCK, 3);
    first.begin(origin(), true);
    first.append(&sent, 0).await.unwrap();
    until("the first is on disk", || reader.gauges().disk_bytes > 2 * BLOCK as u64).await;
    second.begin(origin(), true);
    let expected = pattern(5 * BLOCK, 7);
    let bytes = expected.clone();
    let writing = tokio::spawn(async move { second.append(&bytes, 0).await.map(|()| second) });
    until("the second waits", || other.gauges().full).await;
    assert_eq!(other.gauges().why_full, Some(Full::Volume));
    let told = Full::Volume.to_string();
    assert!(told.contains("--spool-size"), "{told}");
    assert!(volume.room() < BLOCK as u64, "{}", volume.room());
    // What the first lets go is room for the second, which nobody tells.
    let mut at = 0;
    while at < sent.len() {
        if let Next::Block(block) = reader.next().await.unwrap() {
            at += block.bytes.len();
            reader.applied(at as u64);
        }
    }
    until("the second goes on", || other.gauges().disk_bytes > 2 * BLOCK as u64).await;
    let mut found = Vec::new();
    while found.len() < expected.len() {
        if let Next::Block(block) = other.next().await.unwrap() {
            found.extend_from_slice(&block.bytes);
            other.applied(found.len() as u64);
        }
    }
    assert!(found == expected);
    writing.await.unwrap().unwrap();
}

/// All decide at once, when none has written yet.
#[tokio::test]
async fn spools_that_write_at_once_stay_within_the_volume() {
    const SPOOLS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let volume = Volume::new(15 * BLOCK as u64, folder.path());
    let limit = volume.room();
    let mut spools: Vec<_> = (0..SPOOLS)
        .map(|number| {
            let folder = folder.path().join(number.to_string());
            spool(SpoolLimits { volume: volume.clone(), ..limits(&folder, 0, 1 << 30) })
        })
        .collect();
    let block = pattern(BLOCK, 3);
    let append = |spools: &mut Vec<(SpoolWriter, SpoolReader)>| {
        for (writer, _) in spools {
            writer.append(&block, 0).now_or_never().unwrap().unwrap();
        }
    };
    spools.iter_mut().for_each(|(writer, _)| writer.begin(origin(), true));
    append(&mut spools);
    for (_, reader) in &spools {
        until("the first block is on disk", || reader.gauges().disk_bytes > BLOCK as u64).await;
        idle(reader).await;
    }
    {
        let shared: Vec<_> = spools.iter().map(|(_, reader)| Arc::clone(&reader.shared)).collect();
        let _at_rest: Vec<_> = shared.iter().map(|shared| shared.folder.lock().unwrap()).collect();
        append(&mut spools);
    }
    for (_, reader) in &spools {
        idle(reader).await;
    }
    let on_disk: u64 = spools.iter().map(|(_, reader)| reader.gauges().disk_bytes).sum();
    assert!(on_disk <= limit && on_disk > limit - 2 * BLOCK as u64, "{on_disk} of {limit}");
    assert_eq!(volume.room(), limit - on_disk);
}

#[tokio::test]
async fn what_an_idle_spool_keeps_for_a_replay_makes_room_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let volume = Volume::new(5 * BLOCK as u64, folder.path());
    let open = |name: &str| {
        let limits = limits(&folder.path().join(name), 0, 1 << 30);
        spool(SpoolLimits { retain: 1 << 30, volume: volume.clone(), ..limits })
    };
    let ((mut first, mut idles), (mut second, reader)) = (open("a"), open("b"));
    first.begin(origin(), true);
    let sent = pattern(3 * BLOCK, 3);
    first.append(&sent, 0).await.unwrap();
    assert!(read(&mut idles, sent.len()).await == sent);
    idle(&idles).await;
    idles.applied(sent.len() as u64);
    assert_eq!(idles.oldest(), 0);
    second.begin(origin(), true);
    let writing =
        tokio::spawn(async move { second.append(&pattern(3 * BLOCK, 7), 0).await.map(|()| second) });
    until("the second is on disk", || reader.gauges().disk_bytes > 3 * BLOCK as u64).await;
    assert!(idles.oldest() > 0 && idles.gauges().disk_bytes == 0, "{:?}", idles.gauges());
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reader_that_keeps_up_needs_no_disk() {
    let folder = tempfile::tempdir().unwrap();
    let limits = SpoolLimits { retain: 1 << 30, ..limits(folder.path(), 600_000, 1 << 30) };
    let (mut writer, mut reader) = spool(limits);
    writer.begin(origin(), true);
    let sent = pattern(5_000_000, 1);
    let mut found = Vec::new();
    for part in sent.chunks(100_001) {
        writer.append(part, 5).await.unwrap();
        found.extend(read(&mut reader, part.len()).await);
        reader.applied(found.len() as u64);
        assert!(reader.gauges().memory_bytes <= 600_000 + BLOCK as u64);
    }
    assert!(found == sent);
    assert!(!folder.path().join("spool").exists());
    assert!(found.len() as u64 - reader.oldest() >= 300_000, "half of the memory is for a replay");
}

#[tokio::test]
async fn after_the_reader_caught_up_blocks_pass_through_memory_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 600_000, 1 << 30));
    writer.begin(origin(), true);
    writer.append(&pattern(3_000_000, 1), 5).await.unwrap();
    assert!(reader.shared.lock().through);
    read(&mut reader, 3_000_000).await;
    reader.applied(3_000_000);
    idle(&reader).await;
    assert_eq!(reader.gauges().disk_bytes, 0);
    for _ in 0..100 {
        writer.append(&pattern(50_000, 2), 5).await.unwrap();
        assert_eq!(read(&mut reader, 50_000).await, pattern(50_000, 2));
        reader.applied(reader.position);
    }
    idle(&reader).await;
    assert_eq!((reader.gauges().disk_bytes, reader.shared.lock().through), (0, false));
}

#[tokio::test]
async fn a_full_spool_holds_the_writer_until_bytes_are_applied() {
    let folder = tempfile::tempdir().unwrap();
    let disk = 2 * BLOCK as u64 + 1000;
    let (mut writer, mut reader) = spool(limits(folder.path(), 0, disk));
    writer.begin(origin(), true);
    let sent = pattern(6 * BLOCK, 3);
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.append(&sent, 0).await.unwrap();
        writer
    });
    until("the writer waits", || reader.gauges().full).await;
    assert_eq!(reader.gauges().why_full, Some(Full::Limit));
    assert_eq!(Full::Limit.to_string(), "limits.spoolDisk is reached");
    let mut found = Vec::new();
    while found.len() < expected.len() {
        if let Next::Block(block) = reader.next().await.unwrap() {
            assert!(reader.gauges().disk_bytes <= disk);
            found.extend_from_slice(&block.bytes);
            reader.applied(found.len() as u64);
        }
    }
    assert!(found == expected);
    assert!(!writing.await.unwrap().gauges().full);
}

#[tokio::test]
async fn a_reader_that_keeps_up_but_lets_nothing_go_does_not_fill_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 100_000, 1 << 30));
    writer.begin(origin(), true);
    let sent = pattern(2_000_000, 5);
    let mut found = Vec::new();
    for part in sent.chunks(10_000) {
        writer.append(part, 5).await.unwrap();
        found.extend(read(&mut reader, part.len()).await);
        assert!(reader.gauges().memory_bytes <= 110_000, "{:?}", reader.gauges());
    }
    assert!(found == sent);
    reader.seek(0);
    assert!(read(&mut reader, sent.len()).await == sent);
}

#[tokio::test]
async fn what_is_larger_than_the_spool_passes_when_the_reader_starves() {
    for disk in [0, BLOCK as u64] {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 0, disk));
        writer.begin(origin(), true);
        let sent = pattern(5 * BLOCK, 7);
        let expected = sent.clone();
        let writing = tokio::spawn(async move { writer.append(&sent, 0).await.map(|()| writer) });
        let mut found = Vec::new();
        while found.len() < expected.len() {
            while !reader.is_ready() {
                reader.starves();
                tokio::task::yield_now().await;
            }
            if let Next::Block(block) = reader.next().await.unwrap() {
                found.extend_from_slice(&block.bytes);
            }
        }
        assert!(found == expected);
        reader.applied(found.len() as u64);
        assert!(writing.await.unwrap().is_ok());
        assert_eq!(folder.path().join("spool").exists(), disk > 0);
    }
}

#[tokio::test]
async fn bytes_outlive_a_cancelled_append() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 0, BLOCK as u64 + 100));
    writer.begin(origin(), true);
    let sent = pattern(4 * BLOCK, 11);
    // The first block goes to disk, the second stays in memory, the third finds no room.
    for _ in 0..3 {
        let end = writer.gauges().end as usize;
        let append = writer.append(&sent[end..], 0);
        assert!(tokio::time::timeout(Duration::from_millis(200), append).await.is_err());
    }
    let taken = writer.gauges().end as usize;
    assert_eq!(taken, 2 * BLOCK);
    assert!(read(&mut reader, taken).await == sent[..taken]);
    reader.applied(taken as u64);
    let (rest, done) = (sent[taken..].to_vec(), sent.len() - taken);
    let writing = tokio::spawn(async move { writer.append(&rest, 0).await.map(|()| writer) });
    assert!(read(&mut reader, done).await == sent[taken..]);
    reader.applied(sent.len() as u64);
    assert!(writing.await.unwrap().is_ok());
}

#[tokio::test]
async fn what_killed_runs_left_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let limits = limits(folder.path(), 0, 0);
    for left in ["run-1", "gone-2"] {
        std::fs::create_dir_all(limits.folder.join(left)).unwrap();
        std::fs::write(segment::segment_path(&limits.folder.join(left), 7, None), "left").unwrap();
    }
    std::fs::write(limits.folder.join("other"), "not ours").unwrap();
    let left = limits.folder.clone();
    let _spool = spool(limits);
    let names: Vec<_> = std::fs::read_dir(left).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(names, ["other"]);
}

#[tokio::test]
async fn blocks_say_their_part_and_offset() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 0));
    writer.begin(origin(), true);
    writer.append(b"rdb", 1).await.unwrap();
    writer.start_stream();
    writer.append(b"stream", 2).await.unwrap();
    let Next::Begun { origin: begun, snapshot } = reader.next().await.unwrap() else { panic!("not begun") };
    assert_eq!((begun, snapshot), (origin(), true));
    let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
    assert_eq!((block.part, &block.bytes[..]), (Part::Snapshot, &b"rdb"[..]));
    assert_eq!(reader.arrived(4), Some(2));
    let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
    assert_eq!((block.part, &block.bytes[..]), (Part::Stream { offset: 100 }, &b"stream"[..]));
    assert!(!reader.is_ready());
    reader.seek(5);
    let Next::Block(block) = reader.next().await.unwrap() else { panic!("no block") };
    assert_eq!((block.part, &block.bytes[..]), (Part::Stream { offset: 102 }, &b"ream"[..]));
    writer.begin(origin(), false);
    assert!(matches!(reader.next().await.unwrap(), Next::Begun { .. }));
}

#[tokio::test]
async fn a_history_is_known_by_its_own_id_only() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 0));
    writer.begin(origin(), false);
    let promoted = "b".repeat(40);
    writer.rename(&promoted);
    let Next::Begun { origin: begun, snapshot } = reader.next().await.unwrap() else { panic!("not begun") };
    assert_eq!((begun.replication_id.as_str(), begun.offset, snapshot), (promoted.as_str(), 100, false));
    assert_eq!((reader.replication_id(), reader.history()), (Some(promoted), writer.history()));
    // The reader is still at a place of the old history: the new id does not go with it.
    writer.begin(origin(), true);
    assert_eq!(reader.replication_id(), None);
    assert_ne!(reader.history(), writer.history());
}

#[tokio::test]
async fn a_damaged_record_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 0, 1 << 30));
    writer.begin(origin(), true);
    writer.append(&pattern(BLOCK, 9), 0).await.unwrap();
    idle(&reader).await;
    let file = segments(&folder.path().join("spool")).remove(0);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    // It may be that memory still had it.
    reader.shared.lock().entries[0].memory = None;
    assert!(matches!(reader.next().await.unwrap(), Next::Begun { .. }));
    assert!(matches!(reader.next().await, Err(SpoolError::Corrupt { .. })));
}

#[tokio::test]
async fn what_is_applied_stays_for_a_replay_as_far_as_asked_for() {
    for memory in [1 << 30, 2_000_000] {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits { retain: 1_000_000, ..limits(folder.path(), memory, 1 << 30) };
        let (mut writer, mut reader) = spool(limits);
        writer.begin(origin(), true);
        let sent = pattern(3_000_000, 1);
        let mut applied = 0;
        for part in sent.chunks(50_000) {
            writer.append(part, 5).await.unwrap();
            applied += read(&mut reader, part.len()).await.len();
            reader.applied(applied as u64);
        }
        let oldest = reader.oldest();
        assert!((1_950_000 - BLOCK as u64..=2_000_000).contains(&oldest), "{oldest}");
        // The target lost what it had acknowledged: now all of it is needed, however much comes.
        reader.seek(oldest);
        assert!(read(&mut reader, sent.len() - oldest as usize).await == sent[oldest as usize..]);
        writer.append(&sent, 5).await.unwrap();
        assert_eq!(reader.oldest(), oldest);
        reader.seek(0);
        assert!(matches!(reader.next().await, Err(SpoolError::Gone { position: 0, .. })));
    }
}

#[tokio::test]
async fn what_is_kept_for_a_replay_makes_room_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let limits = SpoolLimits { retain: 1 << 30, ..limits(folder.path(), 0, 4 * BLOCK as u64) };
    let (mut writer, mut reader) = spool(limits);
    writer.begin(origin(), true);
    let mut applied = 0;
    for part in 0..20 {
        writer.append(&pattern(BLOCK, part), 5).await.unwrap();
        applied += read(&mut reader, BLOCK).await.len();
        reader.applied(applied as u64);
        assert!(reader.gauges().disk_bytes <= 4 * BLOCK as u64);
    }
}
