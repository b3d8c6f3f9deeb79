//! What the operator keeps on its volume.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use e2e::compare::wait_equal;
use e2e::scenario::PATIENCE;
use e2e::{ControlPlane, Migration, Operator, Options, Proxy, Server, args, wait_until};
use serde_json::Value;
use tempfile::TempDir;

use crate::operator::{VERSION, manual, nothing_left};

struct Sides {
    source: Server,
    target: Server,
    before_target: Arc<Proxy>,
}

impl Sides {
    fn start() -> Result<Self> {
        let source = Options::new(VERSION).with("repl-backlog-size", "64mb").start()?;
        source.conn()?.run(args!["SET", "key", "1"])?;
        let target = Server::start(VERSION)?;
        let before_target = Arc::new(Proxy::start(&target.address())?);
        Ok(Self { source, target, before_target })
    }

    fn apply<'a>(&self, plane: &'a ControlPlane, namespace: &str) -> Result<Migration<'a>> {
        let manifest = manual(&self.source, &self.target)
            .set("/spec/target/redis/endpoints", vec![self.before_target.address()])
            .set("/spec/target/redis/topology", "Standalone")
            .set("/spec/limits/spoolMemory", "1Mi")
            .set("/spec/limits/spoolRetain", "0");
        Migration::apply(plane, namespace, "orders", &manifest)
    }

    /// 64 KiB each, to a target that takes nothing.
    fn pile_up(&self, values: u32) -> Result<()> {
        self.before_target.stall(true);
        let mut conn = self.source.conn()?;
        for number in 0..values {
            conn.run(args!["SET", format!("long:{number}"), vec![b'x'; 65_536]])?;
        }
        Ok(())
    }
}

fn start(plane: &ControlPlane, namespace: &str, identity: &str, folder: &TempDir) -> Result<Operator> {
    let folder = folder.path().to_str().context("not UTF-8")?;
    Operator::start_with(plane, namespace, identity, &["--data-dir", folder, "--spool-size", "8Mi"])
}

/// Bytes of all files below.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        _ => entry.metadata().map_or(0, |found| found.len()),
    });
    sizes.sum()
}

fn spools(folder: &TempDir) -> Vec<String> {
    let found = std::fs::read_dir(folder.path().join("spool")).into_iter().flatten().flatten();
    found.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn wait_no_spools(folder: &TempDir) -> Result<()> {
    wait_until("spools that nobody needs to go", PATIENCE, || {
        let left = spools(folder);
        ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
}

fn degraded(status: &Value) -> Option<String> {
    let found = status["conditions"].as_array()?.iter().find(|found| found["type"] == "Degraded")?;
    (found["status"] == "True").then(|| found["message"].as_str().unwrap_or_default().to_owned())
}

/// A Pod that takes more of an emptyDir than it has is evicted.
#[test]
fn the_volume_is_not_overfilled_and_what_is_deleted_leaves_it() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("volume", &[])?;
    let folder = tempfile::tempdir()?;
    // Of a migration that was deleted while no operator was there.
    let old = folder.path().join("spool/5b1c7f0e-0000-4000-8000-000000000000.0/run-1");
    std::fs::create_dir_all(&old)?;
    std::fs::write(old.join("segment"), [0; 1000])?;
    let sides = Sides::start()?;
    let _operator = start(plane, "volume", "a", &folder)?;
    let migration = sides.apply(plane, "volume")?;
    migration.wait_condition("InSync", PATIENCE)?;
    wait_no_spools(&folder)?;

    sides.pile_up(200)?;
    let full = |status: &Value| degraded(status).is_some_and(|message| message.contains("--spool-size"));
    migration.wait_for("a full volume", PATIENCE, full)?;
    let taken = size(&folder.path().join("spool"));
    ensure!((4 << 20..8 << 20).contains(&taken), "{taken} bytes are on the volume");
    sides.before_target.stall(false);
    migration.wait_for("the end of it", PATIENCE, |status| degraded(status).is_none())?;
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), PATIENCE)?;
    assert_eq!(sides.source.syncs()?.0, 1);

    // What waits goes with the object.
    sides.pile_up(60)?;
    wait_until("a spool", PATIENCE, || Ok((size(&folder.path().join("spool")) > 1 << 20).then_some(())))?;
    sides.before_target.stall(false);
    migration.delete(PATIENCE)?;
    nothing_left(&migration, &sides.target)?;
    wait_no_spools(&folder)
}

/// The target knows where each shard goes on; a spool elsewhere lies behind that.
#[test]
fn what_another_replica_goes_on_with_leaves_the_volume() -> Result<()> {
    let plane = ControlPlane::shared()?;
    plane.namespace("moved", &[])?;
    let (folder, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let sides = Sides::start()?;
    let mut operator = start(plane, "moved", "a", &folder)?;
    let migration = sides.apply(plane, "moved")?;
    migration.wait_condition("InSync", PATIENCE)?;
    sides.pile_up(60)?;
    wait_until("a spool", PATIENCE, || Ok((size(&folder.path().join("spool")) > 1 << 20).then_some(())))?;
    operator.kill();
    let _second = start(plane, "moved", "b", &other)?;
    migration.wait_holder("b", PATIENCE)?;
    sides.before_target.stall(false);
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), PATIENCE)?;
    ensure!(spools(&folder).len() == 1, "{:?}", spools(&folder));
    let _again = start(plane, "moved", "a", &folder)?;
    wait_no_spools(&folder)?;
    migration.approve()?;
    migration.wait_condition("Succeeded", PATIENCE)?;
    wait_equal(&sides.source.endpoint(), &sides.target.endpoint(), PATIENCE)?;
    nothing_left(&migration, &sides.target)
}
