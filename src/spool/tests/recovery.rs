//! What one run left, taken over by the next.

use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;

use std::fs::File;

use super::*;

/// As a kill leaves a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        // It may be gone meanwhile.
        let _ = std::fs::copy(&path, to.join(path.file_name().unwrap()));
    }
}

/// A copy of the only run's folder under another root.
fn crash(reader: &SpoolReader, root: &Path) {
    let run = reader.shared.run_folder();
    if run.exists() {
        copy(run, &root.join("spool").join("run-0"));
    }
}

#[tokio::test]
async fn another_run_goes_on_where_a_killed_one_was() {
    let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 20, 1 << 30));
    writer.begin(origin(), true);
    let sent = pattern(6_000_000, 1);
    writer.append(&sent[..1_000_000], 5).await.unwrap();
    writer.start_stream();
    writer.rename(&"b".repeat(40));
    for part in sent[1_000_000..].chunks(100_000) {
        writer.append(part, 6).await.unwrap();
    }
    assert!(read(&mut reader, 2_000_000).await == sent[..reader.position as usize]);
    reader.applied(500_000);
    idle(&reader).await;
    crash(&reader, root.path());

    let (mut writer, mut reader, recovered) = recover(limits(root.path(), 1 << 20, 1 << 30)).await.unwrap();
    let Recovered { history, origin: found, snapshot, stream_at, from, end } = recovered.clone();
    assert_eq!((snapshot, stream_at, found.offset), (true, Some(1_000_000), 100));
    assert_eq!((found.replication_id, history), ("b".repeat(40), writer.history()));
    assert!(from <= 500_000 && end > 5_500_000, "{recovered:?}");
    assert_eq!((recovered.offset(), recovered.position_of(99)), (Some(100 + end as i64 - 1_000_000), None));
    assert_eq!((recovered.position_of(150), recovered.position_of(99_999_999)), (Some(1_000_050), None));
    assert_eq!((writer.gauges().end, reader.oldest()), (end, from));
    reader.seek(700_000);
    reader.applied(700_000);
    let rest = sent[end as usize..].to_vec();
    let writing = tokio::spawn(async move {
        writer.append(&rest, 7).await.unwrap();
        writer
    });
    let mut at = 700_000;
    while at < sent.len() {
        let Next::Block(block) = reader.next().await.unwrap() else { panic!("not a new history") };
        assert_eq!(block.position, at as u64);
        assert!(sent[at..].starts_with(&block.bytes));
        match block.part {
            Part::Snapshot => assert!(at < 1_000_000),
            Part::Stream { offset } => assert_eq!(offset, 100 + at as i64 - 1_000_000),
        }
        at += block.bytes.len();
        reader.applied(at as u64);
    }
    writing.await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_gone_on_from_is_removed() {
    // Nothing was written; the end of the RDB is missing; the history is over.
    for case in 0..3 {
        let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut writer, reader) = spool(limits(folder.path(), 0, 1 << 30));
        writer.begin(origin(), true);
        if case > 0 {
            writer.append(&pattern(3 * BLOCK, 1), 5).await.unwrap();
            writer.start_stream();
            idle(&reader).await;
        }
        if case == 1 {
            let last = segments(&folder.path().join("spool")).pop().unwrap();
            File::options().write(true).open(last).unwrap().set_len(BLOCK as u64 + 100).unwrap();
        }
        if case == 2 {
            writer.begin(origin(), true);
            idle(&reader).await;
        }
        crash(&reader, root.path());
        assert!(recover(limits(root.path(), 0, 1 << 30)).await.is_none(), "case {case}");
        assert_eq!(segments(&root.path().join("spool")), Vec::<PathBuf>::new());
    }
}

#[tokio::test]
async fn a_run_whose_folder_was_taken_over_says_so_and_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let (mut old, mut old_reader) = spool(limits(folder.path(), 0, 1 << 30));
    old.begin(origin(), false);
    let sent = pattern(8 * BLOCK, 1);
    old.append(&sent[..4 * BLOCK], 5).await.unwrap();
    idle(&old_reader).await;
    // Frozen while it still may write to its segment.
    let last = segments(&folder.path().join("spool")).pop().unwrap();
    let mut frozen = File::options().read(true).write(true).open(last).unwrap();

    let (mut writer, mut reader, recovered) = recover(limits(folder.path(), 0, 1 << 30)).await.unwrap();
    assert_eq!((recovered.from, recovered.end), (0, 4 * BLOCK as u64));
    writer.append(&sent[4 * BLOCK..6 * BLOCK], 6).await.unwrap();
    idle(&reader).await;

    // It wakes: what it writes is not ours, as its source may be another by now.
    let mut record = Vec::new();
    frozen.rewind().unwrap();
    frozen.read_to_end(&mut record).unwrap();
    frozen.seek(SeekFrom::End(0)).unwrap();
    let foreign = super::super::segment::Record {
        position: 4 * BLOCK as u64,
        arrived: 9,
        stream: true,
        bytes: Bytes::from(vec![b'x'; BLOCK]),
    };
    let scratch = tempfile::tempdir().unwrap();
    let mut scratched = super::super::segment::SegmentWriter::create(scratch.path(), 1).unwrap();
    scratched.append(&[foreign], recovered.history).1.unwrap();
    frozen.write_all(&std::fs::read(&scratched.path).unwrap()).unwrap();
    old.begin(origin(), true);
    let late = async {
        loop {
            if let Err(error) = old.append(&pattern(BLOCK, 99), 9).await {
                return error;
            }
        }
    };
    let error = tokio::time::timeout(LIMIT, late).await.unwrap();
    assert!(matches!(error, SpoolError::Taken { .. }), "{error}");
    assert!(error.to_string().contains("let only one run go on"));
    old_reader.seek(0);
    drop((old, old_reader));

    assert!(read(&mut reader, 6 * BLOCK).await == sent[..6 * BLOCK]);
    // Killed as well, with and without bytes of its own.
    let root = tempfile::tempdir().unwrap();
    crash(&reader, root.path());
    for path in segments(&root.path().join("spool")) {
        if super::super::segment::parse_name(&path).unwrap().1.is_none() {
            std::fs::remove_file(path).unwrap();
        }
    }
    reader.keep(true);
    drop((writer, reader));
    for (root, end) in [(folder.path(), 6), (root.path(), 4)] {
        let (_writer, mut reader, recovered) = recover(limits(root, 0, 1 << 30)).await.unwrap();
        assert_eq!((recovered.from, recovered.end), (0, (end * BLOCK) as u64));
        assert!(read(&mut reader, end * BLOCK).await == sent[..end * BLOCK]);
    }
}

#[tokio::test]
async fn an_orderly_end_keeps_what_is_not_applied() {
    let folder = tempfile::tempdir().unwrap();
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 30, 1 << 30));
    writer.begin(origin(), false);
    let sent = pattern(1_000_000, 1);
    writer.append(&sent, 5).await.unwrap();
    read(&mut reader, BLOCK).await;
    reader.applied(BLOCK as u64);
    tokio::time::timeout(LIMIT, reader.store()).await.unwrap().unwrap();
    reader.keep(true);
    drop((writer, reader));
    let (_writer, mut reader, recovered) = recover(limits(folder.path(), 0, 1 << 30)).await.unwrap();
    assert_eq!((recovered.from, recovered.end), (BLOCK as u64, 1_000_000));
    assert!(read(&mut reader, 1_000_000 - BLOCK).await == sent[BLOCK..]);
    // No room to store anything.
    let (mut writer, mut reader) = spool(limits(folder.path(), 1 << 30, 0));
    writer.begin(origin(), false);
    writer.append(&sent, 5).await.unwrap();
    let error = tokio::time::timeout(LIMIT, reader.store()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("limits.spoolDisk"), "{error}");
}

#[derive(Clone, Debug)]
enum Op {
    Append { bytes: usize, pause: bool },
    Read { blocks: usize },
    Apply { back: u64 },
    Seek { back: u64 },
    StartStream,
    Rename,
    Begin,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (1..400_000usize, any::<bool>()).prop_map(|(bytes, pause)| Op::Append { bytes, pause }),
        4 => (1..6usize).prop_map(|blocks| Op::Read { blocks }),
        3 => (0..300_000u64).prop_map(|back| Op::Apply { back }),
        1 => (0..300_000u64).prop_map(|back| Op::Seek { back }),
        1 => Just(Op::StartStream),
        1 => Just(Op::Rename),
        1 => Just(Op::Begin),
    ]
}

#[derive(Clone, Debug)]
enum Damage {
    None,
    Cut { file: usize, at: u64 },
    Flip { file: usize, at: u64 },
    Missing { file: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    let file = 0..20usize;
    prop_oneof![
        2 => Just(Damage::None),
        4 => (file.clone(), any::<u64>()).prop_map(|(file, at)| Damage::Cut { file, at }),
        4 => (file.clone(), any::<u64>()).prop_map(|(file, at)| Damage::Flip { file, at }),
        1 => file.prop_map(|file| Damage::Missing { file }),
    ]
}

fn inflict(damage: &Damage, run: &Path) {
    let Ok(entries) = std::fs::read_dir(run) else { return };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let pick = |file: &usize| files.get(file % files.len().max(1)).cloned();
    match damage {
        Damage::None => {}
        Damage::Cut { file, at } => {
            let Some(path) = pick(file) else { return };
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(at % (file.metadata().unwrap().len() + 1)).unwrap();
        }
        Damage::Flip { file, at } => {
            let Some(path) = pick(file) else { return };
            let mut bytes = std::fs::read(&path).unwrap();
            if !bytes.is_empty() {
                let at = (*at % bytes.len() as u64) as usize;
                bytes[at] ^= 0x10;
                std::fs::write(path, bytes).unwrap();
            }
        }
        Damage::Missing { file } => {
            pick(file).into_iter().for_each(|path| std::fs::remove_file(path).unwrap());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_comes_back_as_it_was_or_not_at_all(
        ops in proptest::collection::vec(op(), 1..60),
        damage in damage(),
        (memory, disk, retain) in (0..3_000_000u64, 2_000_000..30_000_000u64, 0..2_000_000u64),
        at_rest in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async move {
            let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let limits = SpoolLimits { retain, ..limits(folder.path(), memory, disk) };
            let (mut writer, mut reader) = spool(limits.clone());
            let (mut sent, mut now, mut streams, mut seed) = (Vec::new(), 0, false, 0u8);
            writer.begin(origin(), true);
            let mut histories = Vec::new();
            for op in ops {
                match op {
                    Op::Append { bytes, pause } => {
                        now += if pause { 500 } else { 0 };
                        let bytes = pattern(sent.len() + bytes, seed).split_off(sent.len());
                        let append = writer.append(&bytes, now);
                        // Full: a cut append is good for the rest of the test, too.
                        let _ = tokio::time::timeout(Duration::from_millis(50), append).await;
                        sent = pattern(writer.gauges().end as usize, seed);
                    }
                    Op::Read { blocks } => for _ in 0..blocks {
                        if !reader.is_ready() { break }
                        match reader.next().await.unwrap() {
                            Next::Begun { .. } => {}
                            Next::Block(block) => {
                                assert!(sent[block.position as usize..].starts_with(&block.bytes));
                            }
                        }
                    },
                    Op::Apply { back } if reader.history() == writer.history() => {
                        reader.applied(reader.position.saturating_sub(back));
                    }
                    Op::Seek { back } if reader.history() == writer.history() => {
                        let to = reader.position.saturating_sub(back).max(reader.oldest());
                        reader.seek(to);
                    }
                    Op::StartStream if !streams => {
                        writer.start_stream();
                        streams = true;
                    }
                    Op::Rename => writer.rename(&"c".repeat(40)),
                    Op::Begin => {
                        histories.push((writer.history(), sent));
                        writer.begin(origin(), true);
                        (sent, streams, seed) = (Vec::new(), false, seed.wrapping_add(77));
                    }
                    _ => {}
                }
            }
            if at_rest {
                idle(&reader).await;
            }
            let (history, applied, stands, stream_at) = {
                let state = reader.shared.lock();
                let unwritten = state.entries.get(state.unwritten());
                (state.history, state.applied, unwritten.map_or(state.applied, |entry| entry.position), state.stream_at)
            };
            crash(&reader, root.path());
            inflict(&damage, &root.path().join("spool").join("run-0"));
            let found = recover(SpoolLimits { folder: root.path().join("spool"), ..limits }).await;
            if let Some((mut writer, mut again, recovered)) = found {
                // Of an earlier history while its files are being removed.
                assert!(recovered.history == history || !at_rest);
                histories.push((history, sent));
                let (_, sent) = histories.iter().find(|(history, _)| *history == recovered.history).unwrap();
                let Recovered { from, end, .. } = recovered;
                assert!(from < end && end as usize <= sent.len());
                assert!(read(&mut again, (end - from) as usize).await == sent[from as usize..end as usize]);
                again.applied(end);
                writer.append(b"more", now).await.unwrap();
                assert_eq!(read(&mut again, 4).await, b"more");
                if matches!(damage, Damage::None) && at_rest {
                    assert!(end >= stands, "{recovered:?} {applied} {stands}");
                }
            } else if matches!(damage, Damage::None) && at_rest {
                // Or the RDB's end is in memory only, so that the rest is of no use.
                assert!(stands <= applied || stream_at.is_some_and(|stream_at| stands < stream_at), "{applied} to {stands} stood there");
            }
            drop((writer, reader));
        });
    }
}
