//! Every version to itself and to each newer one that loads its types, under a write load.

use anyhow::{Context, Result};
use e2e::compare::Rules;
use e2e::dataset::Dataset;
use e2e::load::Load;
use e2e::scenario::copy_under_load;
use e2e::{Manifest, Options, Server, Version};

fn from(source: Version) -> Result<()> {
    let mut targets = 0;
    for target in Version::ALL.into_iter().filter(|target| target.loads_from(source)) {
        pair(source, target).with_context(|| format!("{source} to {target}"))?;
        targets += 1;
    }
    assert!(targets > 0);
    Ok(())
}

fn pair(source: Version, target: Version) -> Result<()> {
    let source = Options::new(source).with("repl-backlog-size", "32mb").start()?;
    let target = Server::start(target)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let load = Load { databases: vec![0, 1, 9], across_databases: true, ..Load::default() };
    let report = copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &Rules::default())?;
    assert!(report.keys > 300, "{report}");
    Ok(())
}

#[test]
fn from_redis_2_8() -> Result<()> {
    from(Version::REDIS_2_8)
}

#[test]
fn from_redis_3_0() -> Result<()> {
    from(Version::REDIS_3_0)
}

#[test]
fn from_redis_3_2() -> Result<()> {
    from(Version::REDIS_3_2)
}

#[test]
fn from_redis_5_0() -> Result<()> {
    from(Version::REDIS_5_0)
}

#[test]
fn from_redis_6_2() -> Result<()> {
    from(Version::REDIS_6_2)
}

#[test]
fn from_redis_7_0() -> Result<()> {
    from(Version::REDIS_7_0)
}

#[test]
fn from_redis_8_2() -> Result<()> {
    from(Version::REDIS_8_2)
}

#[test]
fn from_valkey_8_1() -> Result<()> {
    from(Version::VALKEY_8_1)
}

#[test]
fn from_valkey_9_1() -> Result<()> {
    from(Version::VALKEY_9_1)
}
