//! What cannot go well is said at once: in under 5 seconds, in one line, with exit code 1.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::dataset::Dataset;
use e2e::tls::Certificates;
use e2e::{Cluster, Manifest, Options, Proxy, Server, Tool, Version, args};

const VERSION: Version = Version::REDIS_7_0;

/// `check` and `run` both refuse; what they say holds one of these words.
fn refused(manifest: &Manifest, words: &[&str]) -> Result<()> {
    for finished in [
        Tool::once("check", manifest)?,
        Tool::run(manifest, &[])?.wait_exit(Duration::from_secs(20)).context("run goes on")?,
    ] {
        let told = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(finished.code == 1, "exit code {}: {told}", finished.code);
        ensure!(finished.took < Duration::from_secs(5), "took {:?}: {told}", finished.took);
        let said = told
            .lines()
            .any(|line| words.iter().any(|word| line.to_lowercase().contains(&word.to_lowercase())));
        ensure!(said, "none of {words:?} in: {told}");
        ensure!(!told.contains("panicked"), "{told}");
    }
    Ok(())
}

fn pair() -> Result<(Server, Server, Manifest)> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    Ok((source, target, manifest))
}

#[test]
fn what_is_well_passes() -> Result<()> {
    let (_source, target, manifest) = pair()?;
    let finished = Tool::once("check", &manifest)?;
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    assert_eq!(target.conn()?.number(args!["DBSIZE"])?, 0, "check wrote something");
    Ok(())
}

/// Not only when the cutover is due, which may be weeks away.
#[test]
fn a_source_that_cannot_pause_its_writes_is_told_of() -> Result<()> {
    let (source, _target, manifest) = pair()?;
    let manual = manifest.clone().set("/spec/cutover/mode", "Manual");
    let told = |manifest: &Manifest| -> Result<String> {
        let finished = Tool::once("check", manifest)?;
        ensure!(finished.code == 0, "{}", finished.stderr);
        Ok(format!("{}{}", finished.stdout, finished.stderr))
    };
    ensure!(!told(&manual)?.contains("pauseSourceWrites"), "{}", told(&manual)?);
    source.conn()?.run(args!["ACL", "SETUSER", "default", "-client|pause"])?;
    let said = told(&manual)?;
    ensure!(said.contains("may not run CLIENT PAUSE") && said.contains("pauseSourceWrites: false"), "{said}");
    for silent in [manifest, manual.set("/spec/cutover/pauseSourceWrites", false)] {
        ensure!(!told(&silent)?.contains("CLIENT PAUSE"), "{}", told(&silent)?);
    }

    let (old, target) = (Server::start(Version::REDIS_5_0)?, Server::start(VERSION)?);
    let manifest = Manifest::between(&old.endpoint(), &target.endpoint());
    let said = told(&manifest.set("/spec/cutover/mode", "Manual"))?;
    ensure!(said.contains("cannot pause writes (Redis 6.2 and newer do)"), "{said}");
    Ok(())
}

#[test]
fn wrong_and_missing_passwords() -> Result<()> {
    let source = Options::new(VERSION).password("right").start()?;
    let target = Server::start(VERSION)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    refused(&manifest.clone().login("source", "", "wrong"), &["WRONGPASS", "password"])?;
    refused(&manifest.clone().login("source", "nobody", "right"), &["WRONGPASS", "password"])?;
    refused(&manifest.remove("/spec/source/redis", "auth"), &["NOAUTH", "password", "authentication"])
}

#[test]
fn wrong_ports() -> Result<()> {
    let (source, target, manifest) = pair()?;
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    for side in ["source", "target"] {
        let wrong = manifest.clone().set(&format!("/spec/{side}/redis/endpoints"), vec![free.clone()]);
        refused(&wrong, &["refused"])?;
    }
    drop((source, target));
    Ok(())
}

/// Someone listens and never answers.
#[test]
fn silent_server() -> Result<()> {
    let (_source, target, manifest) = pair()?;
    let proxy = Proxy::start(&target.address())?;
    proxy.stall(true);
    refused(&manifest.set("/spec/target/redis/endpoints", vec![proxy.address()]), &["nothing received for"])
}

#[test]
fn plain_text_to_a_tls_port_and_back() -> Result<()> {
    let certificates = Certificates::new()?;
    let source = Options::new(VERSION).tls(&certificates, false).start()?;
    let target = Server::start(VERSION)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let plain = manifest.clone().set("/spec/source/redis/endpoints", vec![source.tls_address()?]);
    refused(&plain, &["TLS"])?;
    let tls = manifest.tls("source", &source.address(), &certificates, false)?;
    refused(&tls, &["TLS"])
}

#[test]
fn target_is_a_replica() -> Result<()> {
    let (_source, target, manifest) = pair()?;
    let replica = target.replica()?;
    let manifest = manifest.set("/spec/target/redis/endpoints", vec![replica.address()]);
    refused(&manifest, &["replica"])
}

#[test]
fn source_is_loading() -> Result<()> {
    let full = Server::start(VERSION)?;
    Dataset::default().rounds(10).fill(&mut full.client()?)?;
    let source = Options::new(VERSION)
        .snapshot(&full.save()?)
        .with("key-load-delay", "20000")
        .with("loading-process-events-interval-bytes", "1024")
        .without_waiting()
        .start()?;
    let target = Server::start(VERSION)?;
    refused(&Manifest::between(&source.endpoint(), &target.endpoint()), &["loading"])
}

#[test]
fn cluster_with_uncovered_slots() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Cluster::start(VERSION, 2, 0)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let first = target.nodes.first().context("a node")?;
    first.conn()?.run(args!["CLUSTER", "DELSLOTS", "77"])?;
    refused(&Manifest::between(&source.endpoint(), &target.endpoint()), &["slot"])
}

#[test]
fn target_with_too_little_memory() -> Result<()> {
    let source = Server::start(VERSION)?;
    source.conn()?.run(args!["SET", "big", vec![b'x'; 30 << 20]])?;
    let target = Options::new(VERSION).with("maxmemory", "12mb").start()?;
    refused(&Manifest::between(&source.endpoint(), &target.endpoint()), &["maxmemory"])
}

#[test]
fn target_that_evicts() -> Result<()> {
    let source = Server::start(VERSION)?;
    source.conn()?.run(args!["SET", "big", vec![b'x'; 30 << 20]])?;
    let target =
        Options::new(VERSION).with("maxmemory", "12mb").with("maxmemory-policy", "allkeys-lru").start()?;
    refused(&Manifest::between(&source.endpoint(), &target.endpoint()), &["maxmemory", "evict"])
}

#[test]
fn target_is_the_source() -> Result<()> {
    let (source, _target, manifest) = pair()?;
    let proxy = Proxy::start(&source.address())?;
    for address in [source.address(), format!("localhost:{}", source.port), proxy.address()] {
        refused(
            &manifest.clone().set("/spec/target/redis/endpoints", vec![address]),
            &["source itself", "same"],
        )?;
    }
    Ok(())
}

#[test]
fn target_is_the_sources_own_replica() -> Result<()> {
    let (source, _target, manifest) = pair()?;
    let replica = source.replica()?;
    refused(&manifest.set("/spec/target/redis/endpoints", vec![replica.address()]), &["replica"])
}

#[test]
fn target_too_old_for_the_source() -> Result<()> {
    let pairs = [
        (Version::REDIS_7_0, Version::REDIS_6_2),
        (Version::REDIS_8_2, Version::VALKEY_9_1),
        (Version::VALKEY_9_1, Version::REDIS_8_2),
    ];
    for (from, to) in pairs {
        let (source, target) = (Server::start(from)?, Server::start(to)?);
        source.conn()?.run(args!["SET", "k", "v"])?;
        let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
        let finished = Tool::once("check", &manifest)?;
        let told = finished.stdout + &finished.stderr;
        assert_eq!(finished.code, 0, "{from} to {to}: {told}");
        let number = |version: Version| format!("{}.{}.{}", version.major, version.minor, version.patch);
        // Both versions are named.
        assert!(told.contains(&number(from)) && told.contains(&number(to)), "{told}");
        // Nothing may be left out: then it does not begin.
        let finished = Tool::once("check", &manifest.set("/spec/failurePolicy/maxQuarantined", 0))?;
        let told = finished.stdout + &finished.stderr;
        assert_eq!(finished.code, 1, "{from} to {to}: {told}");
        assert!(told.contains("maxQuarantined"), "{told}");
    }
    Ok(())
}

#[test]
fn user_without_the_right() -> Result<()> {
    let source = Options::new(VERSION).with("user", "weak on >pw ~* +@read +ping +info").start()?;
    let target = Server::start(VERSION)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).login("source", "weak", "pw");
    refused(&manifest, &["NOPERM", "permission", "psync"])
}

#[test]
fn missing_secret() -> Result<()> {
    let (_source, _target, manifest) = pair()?;
    let mut manifest = manifest.login("source", "", "pw");
    manifest.secrets.clear();
    let finished = Tool::once("check", &manifest)?;
    assert!([1, 2].contains(&finished.code), "{}", finished.stderr);
    assert!((finished.stdout + &finished.stderr).contains("source-login"));
    Ok(())
}

#[test]
fn sentinel_without_such_a_master() -> Result<()> {
    let (source, _target, manifest) = pair()?;
    let sentinels = e2e::Sentinels::start(VERSION, 1, "mymaster", &source, 0)?;
    let manifest = manifest.sentinel("source", &sentinels).set("/spec/source/redis/sentinel/master", "other");
    refused(&manifest, &["other"])
}
