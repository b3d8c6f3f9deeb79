//! Passwords, ACL users, TLS and certificates of the client; and that no secret is ever shown.

use anyhow::Result;
use e2e::compare::Rules;
use e2e::dataset::Dataset;
use e2e::load::Load;
use e2e::scenario::{PATIENCE, copy_under_load};
use e2e::tls::Certificates;
use e2e::{Cluster, Manifest, Options, Sentinels, Server, Tool, Version, args};

const VERSION: Version = Version::REDIS_7_0;
const SOURCE_PASSWORD: &str = "Gr8-source-secret";
const TARGET_PASSWORD: &str = "t@rget:secret/%20";

/// What a user needs at least; the README gives the same lines.
const SOURCE_ACL: &str = "+psync +replconf +ping +info +client +command +select +config|get +@read ~* +cluster|nodes +cluster|slots +cluster|info";

fn rounds(rounds: usize) -> Dataset {
    Dataset::default().rounds(rounds)
}

#[test]
fn mutual_tls_and_acl_users_on_both_sides() -> Result<()> {
    let (ours, theirs) = (Certificates::new()?, Certificates::new()?);
    let source = Options::new(VERSION)
        .tls(&ours, true)
        .with("user", &format!("migrator on >{SOURCE_PASSWORD} ~* &* +@all"))
        .start()?;
    let target = Options::new(VERSION)
        .tls(&theirs, false)
        .with("user", &format!("migrator on >{TARGET_PASSWORD} ~* &* +@all"))
        .start()?;
    rounds(2).fill(&mut source.client()?)?;
    // A secret of the target's authority of its own: the two must not be mixed up.
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .login("source", "migrator", SOURCE_PASSWORD)
        .login("target", "migrator", TARGET_PASSWORD)
        .tls("source", &source.tls_address()?, &ours, true)?
        .secret("target-ca", "ca.crt", &theirs.pem("ca.crt")?)
        .set("/spec/target/redis/endpoints", vec![target.tls_address()?])
        .set("/spec/target/redis/tls/enabled", true)
        .set("/spec/target/redis/tls/caSecretRef/name", "target-ca")
        .set("/spec/target/redis/tls/caSecretRef/key", "ca.crt");
    let load = Load { databases: vec![0, 1], ..Load::default() };
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &Rules::default())?;

    // Without the client's certificate the source does not let us in.
    let refused =
        Tool::once("check", &manifest.clone().remove("/spec/source/redis/tls", "clientCertSecretRef"))?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    // The wrong authority is not trusted, unless the user says that this does not matter.
    let other = manifest.set("/spec/target/redis/tls/caSecretRef/name", "ca");
    let refused = Tool::once("check", &other)?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!((refused.stdout + &refused.stderr).to_lowercase().contains("certificate"));
    Ok(())
}

#[test]
fn server_name_differs_from_the_address() -> Result<()> {
    let certificates = Certificates::new()?;
    let source = Options::new(VERSION).tls(&certificates, false).start()?;
    let target = Server::start(VERSION)?;
    rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).tls(
        "source",
        &format!("127.0.0.1:{}", source.tls_port.unwrap_or_default()),
        &certificates,
        false,
    )?;
    let wrong = manifest.clone().set("/spec/source/redis/tls/serverName", "elsewhere.test");
    let refused = Tool::once("check", &wrong)?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let right = manifest.set("/spec/source/redis/tls/serverName", "redis.test");
    Tool::until_in_sync(&right)?.expect_exit(0, PATIENCE)?;
    Ok(())
}

#[test]
fn tls_cluster_and_passwords() -> Result<()> {
    let certificates = Certificates::new()?;
    let options = Options::new(VERSION)
        .tls(&certificates, true)
        .with("tls-cluster", "yes")
        .with("tls-replication", "yes")
        .password(TARGET_PASSWORD);
    let target = Cluster::start_with(options, 3, 0)?;
    let source = Options::new(VERSION).password(SOURCE_PASSWORD).start()?;
    rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let first = target.nodes.first().expect("a node").tls_address()?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .tls("target", &first, &certificates, true)?
        // The cluster announces addresses, the certificate holds them too.
        .set("/spec/target/redis/topology", "Cluster");
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())
        .map(drop)
}

#[test]
fn sentinel_with_passwords() -> Result<()> {
    let source = Options::new(VERSION).password(SOURCE_PASSWORD).start()?;
    let target = Server::start(VERSION)?;
    let sentinels = Sentinels::start(VERSION, 1, "mymaster", &source, 0)?;
    rounds(1).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint()).sentinel("source", &sentinels);
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())
        .map(drop)
}

#[test]
fn least_privileges_suffice() -> Result<()> {
    let source = Options::new(VERSION)
        .with("user", &format!("migrator on >{SOURCE_PASSWORD} {SOURCE_ACL}"))
        .start()?;
    let target = Options::new(VERSION)
        .with(
            "user",
            &format!(
                "migrator on >{TARGET_PASSWORD} ~* &* +@all -@admin -debug +info +command +client +config|get"
            ),
        )
        .start()?;
    rounds(1).fill(&mut source.client()?)?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint())
        .login("source", "migrator", SOURCE_PASSWORD)
        .login("target", "migrator", TARGET_PASSWORD);
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())
        .map(drop)
}

/// Output, log at its most talkative, metrics, arguments: nowhere.
#[test]
fn secrets_are_never_shown() -> Result<()> {
    let source = Options::new(VERSION).password(SOURCE_PASSWORD).start()?;
    let target = Options::new(VERSION).password(TARGET_PASSWORD).start()?;
    source.conn()?.run(args!["SET", "k", "v"])?;
    let manifest = Manifest::between(&source.endpoint(), &target.endpoint());
    let tool = Tool::run_with_env(&manifest, &["--until", "InSync"], &[("RUST_LOG", "trace")])?;
    let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", tool.pid())).unwrap_or_default();
    let finished = tool.expect_exit(0, PATIENCE)?;
    let wrong = manifest.clone().login("source", "", "Wr0ng-but-secret");
    let refused = Tool::once("check", &wrong)?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let shown = [arguments, finished.stdout, finished.stderr, refused.stdout, refused.stderr].concat();
    for secret in [SOURCE_PASSWORD, TARGET_PASSWORD, "Wr0ng-but-secret"] {
        assert!(!shown.contains(secret), "a password is in the output");
    }
    Ok(())
}
