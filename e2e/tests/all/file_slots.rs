//! Slots of a source cluster that move while its shards are read into files.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::chaos::{Shards, SlotMove};
use e2e::client::slot;
use e2e::proxy::Proxy;
use e2e::scenario::PATIENCE;
use e2e::{Cluster, Manifest, Options, Tool, Version, args};
use serde_json::{Value, json};

const VERSION: Version = Version::REDIS_7_0;

fn manifest(shards: &Shards, way: &str, folder: &Path) -> Result<Manifest> {
    let uri = folder.join("{shard}.rdb");
    let target = json!({"type": "RdbFile", "rdbFile": {"uri": uri.to_str().context("path")?}});
    let endpoint = shards.cluster.endpoint();
    Ok(Manifest::between(&endpoint, &endpoint).set("/spec/source/type", way).set("/spec/target", target))
}

/// A key of a slot that moves between two snapshots would be in both files, or in none.
#[test]
fn slots_that_move_are_told_and_their_shards_files_are_not_written() -> Result<()> {
    let options = Options::new(VERSION).with("repl-diskless-sync-delay", "0");
    let shards = Shards { cluster: Cluster::start_with(options, 2, 0)? };
    let mut client = shards.cluster.client()?;
    for number in 0..400 {
        let key = format!("key:{number}");
        client.on(key.as_bytes())?.run(args!["SET", key, noise(number, 16 << 10)])?;
    }
    let moving = slot(b"key:7");
    for way in ["Scan", "Replication"] {
        let folder = tempfile::tempdir()?;
        let manifest = manifest(&shards, way, folder.path())?;
        let files = || Ok::<_, anyhow::Error>(std::fs::read_dir(folder.path())?.count());
        let refused = |status: &Value, stderr: &str| {
            let said = status["message"].as_str().unwrap_or_default();
            ensure!(
                said.contains(&format!("slots {moving} of the source move")),
                "{way}: {status}\n{stderr}"
            );
            let conditions = status["conditions"].as_array().context("conditions")?;
            let told = conditions.iter().find(|found| found["type"] == "Succeeded").context("no outcome")?;
            ensure!(told["status"] == "False" && told["reason"] == "SlotsMoved", "{way}: {told}");
            Ok(())
        };
        // On its way before anything is read.
        let moved = SlotMove::begin(&shards, moving, 0)?;
        let finished = Tool::run(&manifest, &[])?.wait_exit(PATIENCE)?;
        ensure!(finished.code == 1, "{way}: {}", finished.stderr);
        refused(&finished.status()?, &finished.stderr)?;
        ensure!(files()? == 0, "{way}: {} file(s)", files()?);
        ensure!(moved.finish(&shards)?, "the cluster failed over by itself");
        shards.cluster.wait_ready()?;

        // While a shard is read.
        let at = shards.masters()?.iter().position(|master| !master.serves(moving)).context("no other")?;
        let address = format!("127.0.0.1:{}", shards.masters()?[at].port);
        let proxy = Proxy::start(&address)?;
        proxy.limit(Some(1 << 20));
        let slow = manifest.clone().set("/spec/source/redis/endpointMap", json!({&address: proxy.address()}));
        let tool = Tool::run(&slow, &[])?;
        tool.wait_for("some of the slow shard", PATIENCE, |status| {
            let all = status["shards"].as_array().into_iter().flatten();
            all.filter(|shard| shard["keysApplied"].as_i64().is_some_and(|keys| keys > 20)).count() == 2
        })?;
        let moved = SlotMove::begin(&shards, moving, 0)?;
        ensure!(moved.finish(&shards)?, "the cluster failed over by itself");
        let finished = tool.wait_exit(PATIENCE)?;
        ensure!(finished.code == 1, "{way}: {}\n{}", finished.status()?, finished.stderr);
        refused(&finished.status()?, &finished.stderr)?;
        // The quick one may have been whole before.
        let left: Vec<_> = std::fs::read_dir(folder.path())?.collect::<Result<_, _>>()?;
        let slow_file = format!("{}.rdb", address.replace(':', "-"));
        ensure!(left.iter().all(|file| file.file_name() != slow_file.as_str()), "{way}: {left:?}");
        ensure!(left.len() < 2, "{way}: {left:?}");
        proxy.limit(None);
        shards.cluster.wait_ready()?;
        let finished = Tool::run(&manifest.set("/spec/target/existingKeys", "Replace"), &[])?;
        let finished = finished.wait_exit(PATIENCE)?;
        ensure!(finished.code == 0, "{way}: {}", finished.stderr);
        ensure!(finished.status()?["progress"]["keysApplied"] == 400, "{way}: {}", finished.status()?);
        ensure!(files()? == 2, "{way}: {} file(s)", files()?);
    }
    Ok(())
}

/// Not to be compressed, so that a limit of bytes is one of keys.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}
