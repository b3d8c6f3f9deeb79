//! Any shape of deployment to any other.

use anyhow::Result;
use e2e::compare::{Report, Rules, compare_with};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, copy_at_rest, copy_under_load, stop};
use e2e::{Client, Cluster, Endpoint, Manifest, Options, Sentinels, Server, Tool, Version, args};

const VERSION: Version = Version::REDIS_7_0;

fn dataset() -> Dataset {
    Dataset::default().rounds(3).databases(&[])
}

fn copy(manifest: &Manifest, source: &Endpoint, target: &Endpoint) -> Result<Report> {
    dataset().fill(&mut Client::open(source)?)?;
    copy_under_load(manifest, source, target, Load::default(), &Rules::default())
}

#[test]
fn standalone_to_cluster() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 3, 0)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    copy(&manifest, &source.endpoint(), &target.endpoint())?;
    // Not all on one node.
    for node in &target.nodes {
        assert!(node.conn()?.number(args!["DBSIZE"])? > 50);
    }
    Ok(())
}

#[test]
fn cluster_to_cluster_with_other_shards() -> Result<()> {
    let (source, target) = (Cluster::start(VERSION, 2, 0)?, Cluster::start(VERSION, 3, 1)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    copy(&manifest, &source.endpoint(), &target.endpoint()).map(drop)
}

#[test]
fn cluster_to_standalone() -> Result<()> {
    let (source, target) = (Cluster::start(VERSION, 3, 0)?, Server::start(VERSION)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    copy(&manifest, &source.endpoint(), &target.endpoint()).map(drop)
}

#[test]
fn old_cluster_to_new_cluster() -> Result<()> {
    let (source, target) =
        (Cluster::start(Version::REDIS_3_0, 2, 0)?, Cluster::start(Version::VALKEY_9_1, 2, 0)?);
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    copy(&manifest, &source.endpoint(), &target.endpoint()).map(drop)
}

#[test]
fn sentinel_to_sentinel() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let _replica = target.replica()?;
    let of_source = Sentinels::start(VERSION, 1, "mymaster", &source, 0)?;
    let of_target = Sentinels::start(VERSION, 3, "other", &target, 1)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .sentinel("source", &of_source)
        .sentinel("target", &of_target);
    copy(&manifest, &source.endpoint(), &target.endpoint()).map(drop)
}

#[test]
fn sentinel_to_cluster() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 3, 0)?);
    let sentinels = Sentinels::start(VERSION, 1, "mymaster", &source, 0)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).sentinel("source", &sentinels);
    copy(&manifest, &source.endpoint(), &target.endpoint()).map(drop)
}

/// Every slave of the source is the tool or the replica; the tool must hang on the latter.
#[test]
fn replica_is_preferred_when_asked_for() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    dataset().databases(&[3]).fill(&mut source.client()?)?;
    let replica = source.replica()?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/readFrom", "PreferReplica");
    let writer = Writer::start(
        &source.endpoint(),
        Load { databases: vec![3, 0], across_databases: true, ..Load::default() },
    )?;
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    assert_eq!(replica.conn()?.info("replication", "connected_slaves")?.as_deref(), Some("1"));
    assert_eq!(source.conn()?.info("replication", "connected_slaves")?.as_deref(), Some("1"));
    writer.wait_more(1_000, PATIENCE)?;
    writer.stop()?;
    e2e::compare::wait_equal(&source.endpoint(), &target.endpoint(), PATIENCE)?;
    stop(tool).map(drop)
}

/// An endpoint that is a replica itself, read from as it is.
#[test]
fn endpoint_that_is_a_replica() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    dataset().fill(&mut source.client()?)?;
    let replica = source.replica()?;
    let manifest = Manifest::between(&replica.endpoint(), &target.endpoint())
        .set("/spec/source/redis/readFrom", "PreferReplica");
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())
        .map(drop)
}

#[test]
fn databases_fold_into_a_cluster_by_the_map() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 2, 0)?);
    let mut conn = source.conn()?;
    for (database, prefix) in [(0, "zero"), (1, "one"), (5, "five")] {
        conn.select(database)?;
        for i in 0..200 {
            conn.run(args!["RPUSH", format!("{prefix}:{i}"), "a", "b"])?;
        }
    }
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    // Without a map it is refused before anything is written.
    let refused = Tool::once("check", &manifest)?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!((refused.stdout + &refused.stderr).contains("databaseMap"));

    let manifest = manifest.set("/spec/databaseMap", serde_json::json!({"1": 0, "5": 0}));
    let rules = Rules { database_map: [(1, 0), (5, 0)].into(), ..Rules::default() };
    let report = copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &rules)?;
    assert_eq!(report.keys, 600);
    Ok(())
}

#[test]
fn sixteen_databases() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let all: Vec<u32> = (1..16).collect();
    Dataset::default().rounds(1).databases(&all).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let load = Load { databases: (0..16).collect(), across_databases: true, ..Load::default() };
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &Rules::default())?;
    assert!(target.conn()?.text(args!["INFO", "keyspace"])?.contains("db14:"));
    Ok(())
}

#[test]
fn databases_are_kept_where_a_cluster_has_them() -> Result<()> {
    let source = Server::start(Version::VALKEY_9_1)?;
    let target =
        Cluster::start_with(Options::new(Version::VALKEY_9_1).with("cluster-databases", "16"), 2, 0)?;
    Dataset::default().rounds(2).databases(&[1, 9]).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    Tool::until_in_sync(&manifest)?.expect_exit(0, PATIENCE)?;
    let report = compare_with(&source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert!(report.differences.is_empty(), "{report}");
    Ok(())
}
