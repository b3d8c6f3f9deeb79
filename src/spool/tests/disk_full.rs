//! A disk that takes nothing more, for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::*;

const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const EIO: i32 = 5;
const EACCES: i32 = 13;

fn fault(reader: &SpoolReader) -> Arc<AtomicI32> {
    Arc::clone(&reader.shared.folder.lock().unwrap().fault)
}

/// Appends on a task, as the link does.
async fn append(mut writer: SpoolWriter, bytes: Vec<u8>) -> Result<SpoolWriter, SpoolError> {
    for part in bytes.chunks(100_000) {
        writer.append(part, 5).await?;
    }
    Ok(writer)
}

#[tokio::test]
async fn a_disk_that_is_full_for_a_while_slows_the_source_down_and_loses_nothing() {
    for code in [ENOSPC, EDQUOT, EIO] {
        let folder = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 1 << 30));
        writer.begin(origin(), true);
        // Some stands on disk before it is full.
        writer.append(&pattern(2 << 20, 1), 5).await.unwrap();
        idle(&reader).await;
        let fault = fault(&reader);
        fault.store(code, Ordering::SeqCst);
        let writing = tokio::spawn(append(writer, pattern(4 << 20, 2)));
        until("the writer waits", || reader.gauges().full).await;
        assert_eq!(reader.gauges().why_full, Some(Full::Disk { os_error: code }));
        let why = reader.gauges().why_full.unwrap().to_string();
        assert!(why.contains("the disk takes no more: ") && why.contains("os error"), "{why}");
        let end = reader.gauges().end;
        assert!(end < 4 << 20 && reader.gauges().memory_bytes <= (1 << 20) + 2 * BLOCK as u64);
        // The target goes on with what is there.
        assert!(read(&mut reader, 2 << 20).await == pattern(2 << 20, 1));
        fault.store(0, Ordering::SeqCst);
        let writer = tokio::time::timeout(LIMIT, writing).await.unwrap().unwrap().unwrap();
        assert!(read(&mut reader, 4 << 20).await == pattern(4 << 20, 2));
        assert_eq!((writer.gauges().full, writer.gauges().end), (false, 6 << 20));
    }
}

#[tokio::test]
async fn a_full_disk_is_no_obstacle_to_a_target_that_catches_up() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 1 << 30));
    writer.begin(origin(), true);
    fault(&reader).store(ENOSPC, Ordering::SeqCst);
    let writing = tokio::spawn(append(writer, pattern(8 << 20, 2)));
    let mut found = Vec::new();
    while found.len() < 8 << 20 {
        if let Next::Block(block) = tokio::time::timeout(LIMIT, reader.next()).await.unwrap().unwrap() {
            found.extend_from_slice(&block.bytes);
            reader.applied(found.len() as u64);
        }
    }
    assert!(found == pattern(8 << 20, 2));
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_value_larger_than_the_memory_passes_a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 1 << 30));
    writer.begin(origin(), true);
    fault(&reader).store(ENOSPC, Ordering::SeqCst);
    let writing = tokio::spawn(append(writer, pattern(4 << 20, 2)));
    let mut found = Vec::new();
    let passing = async {
        while found.len() < 4 << 20 {
            while !reader.is_ready() {
                reader.starves();
                tokio::task::yield_now().await;
            }
            if let Next::Block(block) = reader.next().await.unwrap() {
                found.extend_from_slice(&block.bytes);
            }
        }
    };
    tokio::time::timeout(LIMIT, passing).await.unwrap();
    assert!(found == pattern(4 << 20, 2));
    reader.applied(4 << 20);
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_error_that_time_does_not_mend_ends_the_append() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, reader) = spool(limits(folder.path(), 1 << 20, 1 << 30));
    writer.begin(origin(), true);
    fault(&reader).store(EACCES, Ordering::SeqCst);
    let ended = tokio::time::timeout(LIMIT, append(writer, pattern(4 << 20, 2))).await.unwrap();
    let text = ended.err().unwrap().to_string();
    assert!(text.contains("Permission denied") && text.contains("--data-dir"), "{text}");
}

/// In a mount namespace of its own, so that the file system goes with the process.
#[tokio::test]
async fn a_real_file_system_that_is_full_is_waited_for() {
    const FOLDER: &str = "SPOOL_TEST_SMALL_FILE_SYSTEM";
    let Ok(folder) = std::env::var(FOLDER) else {
        let folder = tempfile::tempdir().unwrap();
        let script = "mount -t tmpfs -o size=3m spool \"$1\" && exec \"$2\" --exact \"$3\" --nocapture";
        let test = std::thread::current().name().unwrap().to_owned();
        let namespaces = ["-m", "-Urm"].map(|flags| {
            let mut command = std::process::Command::new("unshare");
            command.args([flags, "sh", "-c", script, "sh"]).arg(folder.path());
            command.arg(std::env::current_exe().unwrap()).arg(&test).env(FOLDER, folder.path());
            command.output().unwrap()
        });
        let ran = |output: &std::process::Output| {
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed")
        };
        assert!(namespaces.iter().any(ran), "{namespaces:#?}");
        return;
    };
    let folder = Path::new(&folder);
    // Other data are there as well.
    let ballast = folder.join("ballast");
    std::fs::write(&ballast, vec![0u8; 1 << 20]).unwrap();
    let (mut writer, mut reader) = spool(limits(folder, 1 << 20, 1 << 30));
    writer.begin(origin(), true);
    let writing = tokio::spawn(append(writer, pattern(8 << 20, 2)));
    until("the writer waits", || reader.gauges().full).await;
    assert_eq!(reader.gauges().why_full, Some(Full::Disk { os_error: ENOSPC }));
    let stuck = reader.gauges();
    assert!(stuck.disk_bytes > 1 << 20 && stuck.end < 4 << 20, "{stuck:?}");
    // A killed run finds what got to the disk.
    let run = super::super::folder::left_over(&folder.join("spool")).remove(0);
    let copy = tempfile::tempdir().unwrap();
    recovery::copy(&run, &copy.path().join("spool").join("run-0"));
    let (_, mut again, recovered) = recover(limits(copy.path(), 1 << 20, 1 << 30)).await.unwrap();
    assert_eq!((recovered.from, recovered.history), (0, reader.shared.lock().history));
    assert!(recovered.end > 1 << 20, "{recovered:?}");
    assert!(read(&mut again, recovered.end as usize).await == pattern(8 << 20, 2)[..recovered.end as usize]);
    // Room by another hand, then by what is applied.
    std::fs::remove_file(ballast).unwrap();
    until("it goes on by itself", || reader.gauges().end > stuck.end).await;
    let mut found = Vec::new();
    while found.len() < 8 << 20 {
        if let Next::Block(block) = tokio::time::timeout(LIMIT, reader.next()).await.unwrap().unwrap() {
            found.extend_from_slice(&block.bytes);
            reader.applied(found.len() as u64);
        }
    }
    assert!(found == pattern(8 << 20, 2));
    writing.await.unwrap().unwrap();
}
