//! A process that is really killed while it spools.

use std::process::{Child, Command, Stdio};

use super::*;

const FOLDER: &str = "SPOOL_TEST_KILLED";
const TOTAL: usize = 64 << 20;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Spools without an end, with a reader that lags.
async fn spool_on(folder: &Path) {
    let (mut writer, mut reader) = spool(limits(folder, 2 << 20, 1 << 30));
    writer.begin(origin(), false);
    let sent = pattern(TOTAL, 3);
    let mut applied = 0u64;
    for (round, part) in sent.chunks(70_001).enumerate() {
        writer.append(part, round as u64 * 40).await.unwrap();
        if round % 12 == 0
            && reader.is_ready()
            && let Next::Block(block) = reader.next().await.unwrap()
        {
            applied = block.position;
            reader.applied(applied);
        }
    }
    std::future::pending::<()>().await;
    drop((writer, reader, applied));
}

#[tokio::test]
async fn a_kill_at_any_moment_leaves_one_run_of_bytes() {
    if let Ok(folder) = std::env::var(FOLDER) {
        return spool_on(Path::new(&folder)).await;
    }
    let sent = pattern(TOTAL, 3);
    let test = std::thread::current().name().unwrap().to_owned();
    for round in 0..8u64 {
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &test])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let killed = Killed(child);
        let shard = folder.path().join("spool");
        let on_disk = || -> u64 {
            let sizes = segments(&shard).into_iter().filter_map(|path| path.metadata().ok());
            sizes.map(|file| file.len()).sum()
        };
        until("it spools", || on_disk() > round * (3 << 20) + 100_000 * round * round + 1).await;
        drop(killed);
        let size = on_disk();
        let (_writer, mut reader, recovered) = recover(limits(folder.path(), 0, 1 << 30)).await.unwrap();
        let Recovered { from, end, .. } = recovered;
        assert!(from < end);
        let lost = size.saturating_sub(end - from);
        assert!(lost < 24 << 20, "{lost} of {size} bytes are of no use");
        assert!(read(&mut reader, (end - from) as usize).await == sent[from as usize..end as usize]);
    }
}
