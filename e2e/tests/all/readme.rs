//! What the README claims: its manifest, its users, its list of what is refused, its links and options.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::chaos::{Shards, SlotMove};
use e2e::client::slot;
use e2e::compare::wait_equal;
use e2e::dataset::Dataset;
use e2e::load::Load;
use e2e::scenario::{PATIENCE, copy_at_rest, copy_under_load, stop};
use e2e::tool::Finished;
use e2e::{Cluster, Manifest, Sentinels, Server, Tool, Version, args, compare::Rules, wait_until};

const VERSION: Version = Version::REDIS_7_0;
const WITH_ACL: [Version; 5] =
    [Version::REDIS_6_2, Version::REDIS_7_0, Version::REDIS_8_2, Version::VALKEY_8_1, Version::VALKEY_9_1];
/// As the README's lines and manifest have them.
const SOURCE_PASSWORD: &str = "change-me";
const TARGET_PASSWORD: &str = "change-me-too";

#[test]
fn the_manifest_goes_through_every_step() -> Result<()> {
    let source = Server::start(VERSION)?;
    let target = Cluster::start(VERSION, 3, 0)?;
    let readme = Readme::read()?;
    readme.user(&source, "source", &["cutover", "check", "name"])?;
    for node in &target.nodes {
        readme.user(node, "target", &["cluster", "check", "name"])?;
    }
    small().databases(&[]).fill(&mut source.client()?)?;
    let first = target.nodes.first().context("no node")?;
    let text = readme
        .block("manifest")?
        .replace("redis-old:6379", &source.address())
        .replace("redis-new:6379", &first.address());
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("orders.yaml");
    let data = folder.path().join("orders.data");
    let run = |text: &str, words: &[&str]| -> Result<Finished> {
        std::fs::write(&file, text)?;
        let mut arguments = vec![words[0], "-f", path(&file)?, "--output", "json"];
        arguments.extend(&words[1..]);
        let finished = Tool::plain(&arguments)?;
        ensure!(finished.code == 0, "{words:?}: {}\n{}{}", finished.code, finished.stdout, finished.stderr);
        Ok(finished)
    };
    let listen = ["--listen", "127.0.0.1:0"];
    let data = ["--data-dir", path(&data)?];

    run(&text, &["check"])?;
    let in_sync = [["run", "--until"].as_slice(), &["InSync"], &data, &listen].concat();
    run(&text, &in_sync)?;
    let checkpoint = Path::new(data[1]).join("default.orders.checkpoint.json");
    assert!(checkpoint.is_file(), "the checkpoint is not where the README says");

    source.conn()?.run(args!["SET", "written-between", "the two runs"])?;
    let approved = text.replace("approved: false", "approved: true");
    assert_ne!(approved, text);
    let status = run(&approved, &[["run"].as_slice(), &data, &listen].concat())?.status()?;
    assert_eq!(status["phase"], "Completed", "{status}");
    assert_eq!(status["replication"]["resumes"], 1, "{status}");
    assert_eq!(status["replication"]["fullResyncs"], 0, "{status}");
    assert!(status["cutover"]["completionTime"].is_string(), "{status}");
    wait_equal(&source.endpoint(), &target.endpoint(), Duration::ZERO)?;
    run(&text, &[["verify"].as_slice(), &listen].concat())?;

    assert_nothing_refused(&source)?;
    target.nodes.iter().try_for_each(assert_nothing_refused)
}

/// The least that the README gives, and no more, under writes of every family; nothing is refused.
#[test]
fn the_least_permissions_suffice_for_a_standalone_target() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let readme = Readme::read()?;
    readme.user(&source, "source", &[])?;
    readme.user(&target, "target", &[])?;
    small().fill(&mut source.client()?)?;
    let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()));
    let load = Load { databases: vec![0, 1], across_databases: true, ..Load::default() };
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &Rules::default())?;
    assert_only_optional_refused(&source)?;
    assert_only_optional_refused(&target)
}

/// With one word fewer, something that is not optional is refused.
#[test]
fn every_permission_on_the_source_is_needed() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let readme = Readme::read()?;
    readme.user(&target, "target", &[])?;
    small().fill(&mut source.client()?)?;
    // A command that is refused for good must not be waited for.
    let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()))
        .set("/spec/failurePolicy/progressDeadlineSeconds", 5);
    let line = readme.block("acl source")?;
    let mut seen = 0;
    for word in line.split_whitespace().filter(|word| word.starts_with('+')) {
        readme.user(&source, "source", &[])?;
        source.conn()?.run(args!["ACL", "SETUSER", "migrator", word.replacen('+', "-", 1)])?;
        source.conn()?.run(args!["ACL", "LOG", "RESET"])?;
        target.conn()?.run(args!["FLUSHALL"])?;
        Tool::until_in_sync(&manifest)?.wait_exit(PATIENCE)?;
        let why = format!("{word} is not needed");
        assert_only_optional_refused(&source).expect_err(&why);
        seen += 1;
    }
    assert!(seen > 1, "the line was not found");
    Ok(())
}

#[test]
fn the_least_permissions_suffice_for_clusters_and_their_replicas() -> Result<()> {
    let (source, target) = (Cluster::start(VERSION, 2, 1)?, Cluster::start(VERSION, 2, 0)?);
    let readme = Readme::read()?;
    for node in &source.nodes {
        readme.user(node, "source", &["cluster", "check", "name"])?;
    }
    for node in &target.nodes {
        readme.user(node, "target", &["cluster", "check", "name", "spublish"])?;
    }
    small().databases(&[]).fill(&mut source.client()?)?;
    let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()))
        .set("/spec/source/redis/readFrom", "PreferReplica");
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &Rules::default())?;
    source.nodes.iter().chain(&target.nodes).try_for_each(assert_nothing_refused)
}

#[test]
fn the_least_permissions_suffice_for_slots_that_move() -> Result<()> {
    for to_cluster in [false, true] {
        let shards = Shards { cluster: Cluster::start(VERSION, 2, 0)? };
        let (server, cluster) = (Server::start(VERSION)?, Cluster::start(VERSION, 2, 0)?);
        let target = if to_cluster { cluster.endpoint() } else { server.endpoint() };
        let readme = Readme::read()?;
        let rows = |row| ["cluster", "check", "name", row];
        for node in &shards.cluster.nodes {
            readme.user(node, "source", &rows("moving-source"))?;
        }
        for node in cluster.nodes.iter().chain([&server]) {
            readme.user(node, "target", &rows("moving-target"))?;
        }
        let endpoint = shards.cluster.endpoint();
        let mut client = shards.cluster.client()?;
        for number in 0..50 {
            let key = format!("{{0}}:{number}");
            client.on(key.as_bytes())?.run(args!["SET", key, "1"])?;
        }
        let tool = Tool::run(&logins(Manifest::between(&endpoint, &target)), &[])?;
        tool.wait_condition("InSync", PATIENCE)?;
        let moved = SlotMove::begin(&shards, slot(b"0"), 0)?;
        ensure!(moved.finish(&shards)?, "the cluster failed over by itself");
        let arrived = || {
            let mut client = shards.cluster.client()?;
            client.on(b"{0}:new")?.run(args!["SET", "{0}:new", "1"])?;
            Ok((e2e::compare::compare(&endpoint, &target)?.differences.is_empty()).then_some(()))
        };
        wait_until("the slot that moved", PATIENCE, arrived)?;
        stop(tool)?;
        shards
            .cluster
            .nodes
            .iter()
            .chain(&cluster.nodes)
            .chain([&server])
            .try_for_each(assert_nothing_refused)?;
    }
    Ok(())
}

#[test]
fn the_least_permissions_suffice_behind_sentinels() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let sentinels = Sentinels::start(VERSION, 1, "mymaster", &source, 0)?;
    let readme = Readme::read()?;
    readme.user(&source, "source", &["watched", "check", "name"])?;
    readme.user(&target, "target", &["check", "name"])?;
    for sentinel in &sentinels.nodes {
        readme.user(sentinel, "sentinel", &["name"])?;
        // So that nothing goes on as the default user.
        sentinel.conn()?.run(args!["ACL", "SETUSER", "default", "resetpass", ">other"])?;
    }
    small().fill(&mut source.client()?)?;
    let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()))
        .sentinel("source", &sentinels)
        .set("/spec/source/redis/sentinel/auth/username", "migrator")
        .set("/spec/source/redis/sentinel/auth/passwordSecretRef/name", "source-login")
        .set("/spec/source/redis/sentinel/auth/passwordSecretRef/key", "password");
    copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &Rules::default())?;
    assert_nothing_refused(&source)?;
    assert_nothing_refused(&target)
}

/// Servers differ in which commands, subcommands and categories they know.
#[test]
fn every_server_with_users_takes_the_lines() -> Result<()> {
    let readme = Readme::read()?;
    for version in WITH_ACL {
        let (source, target) = (Server::start(version)?, Server::start(version)?);
        let mut rows = vec!["cluster", "watched", "cutover", "name", "check"];
        rows.extend(version.has(7, 2).then_some("no-touch"));
        rows.extend((!version.has(7, 0)).then_some("rules"));
        readme.user(&source, "source", &rows)?;
        readme.user(&target, "target", &rows)?;
        small().fill(&mut source.client()?)?;
        let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()))
            .set("/spec/cutover/mode", "Automatic");
        let finished = Tool::run(&manifest, &[])?.expect_exit(0, PATIENCE)?;
        assert_eq!(finished.status()?["phase"], "Completed", "{version}");
        assert_nothing_refused(&source).with_context(|| version.to_string())?;
        assert_nothing_refused(&target).with_context(|| version.to_string())?;
    }
    Ok(())
}

/// Preflight names the command and the run does not begin, as the README says of missing permissions.
#[test]
fn a_user_without_psync_is_told_so() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    let readme = Readme::read()?;
    readme.user(&source, "source", &["check"])?;
    readme.user(&target, "target", &["check"])?;
    source.conn()?.run(args!["ACL", "SETUSER", "migrator", "-psync"])?;
    let manifest = logins(Manifest::between(&source.endpoint(), &target.endpoint()));
    let finished = Tool::once("check", &manifest)?;
    assert_eq!(finished.code, 1);
    assert!(finished.stderr.contains("the user may not run PSYNC"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn what_is_not_built_is_refused_by_name() -> Result<()> {
    let (source, target) = ("127.0.0.1:1", "127.0.0.1:2");
    let readme = Readme::read()?;
    let mut seen = 0;
    for line in readme.block("refused")?.lines() {
        let (field, value) = line.split_once(": ").with_context(|| format!("not a field: {line}"))?;
        let mut text = format!(
            "apiVersion: redis-migration.io/v1alpha1\nkind: RedisMigration\nmetadata: {{name: x}}\nspec:\n  \
             source: {{type: Replication, redis: {{endpoints: [\"{source}\"]}}}}\n  \
             target: {{type: Redis, redis: {{endpoints: [\"{target}\"]}}}}\n"
        );
        let parts: Vec<&str> = field.split('.').skip(1).collect();
        if parts == ["source", "type"] || parts == ["target", "type"] {
            let side = parts[0];
            let place = text.find(&format!("{side}: {{type: ")).context("the side")? + side.len() + 9;
            let end = place + text[place..].find(',').context("the type's end")?;
            text.replace_range(place..end, value);
        } else {
            let (last, above) = parts.split_last().context("an empty field")?;
            for (depth, part) in above.iter().enumerate() {
                text += &format!("{}{part}:\n", "  ".repeat(depth + 1));
            }
            text += &format!("{}{last}: {value}\n", "  ".repeat(above.len() + 1));
        }
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("m.yaml");
        std::fs::write(&file, &text)?;
        let finished = Tool::plain(&["check", "-f", path(&file)?])?;
        assert_eq!(finished.code, 2, "{text}{}", finished.stderr);
        let said = format!("{field}: not supported by this version yet");
        assert!(finished.stderr.contains(&said), "{said} is not in:\n{}", finished.stderr);
        seen += 1;
    }
    assert!(seen > 1, "the list was not found");
    Ok(())
}

#[test]
fn every_option_is_described() -> Result<()> {
    let readme = Readme::read()?;
    for command in ["run", "check", "verify", "crd"] {
        assert!(readme.text.contains(&format!("redis-migration {command}")), "{command}");
        let help = Tool::plain(&[command, "--help"])?.stdout;
        let options = help.split_whitespace().filter(|word| word.starts_with("--"));
        for option in options.map(|word| word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric())) {
            assert!(
                option == "--help" || readme.text.contains(&format!("`{option}")) || option == "--file",
                "{option}"
            );
        }
    }
    Ok(())
}

#[test]
fn links_lead_somewhere_and_make_knows_the_targets() -> Result<()> {
    let repository = repository();
    let makefile = std::fs::read_to_string(repository.join("Makefile"))?;
    for page in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        let text = std::fs::read_to_string(repository.join(page)).with_context(|| page.to_owned())?;
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let outside = link.is_empty() || link.starts_with("https://");
            assert!(outside || repository.join(link).exists(), "{page}: {link}");
        }
        for target in text.split("make ").skip(1).filter_map(|rest| rest.split(['`', ' ', '\n']).next()) {
            let command =
                ["demo", "test", "bench", "setup", "unit", "e2e", "lint", "fmt", "deny"].contains(&target);
            assert!(!command || makefile.contains(&format!("\n{target}:")), "{page}: make {target}");
        }
    }
    Ok(())
}

struct Readme {
    text: String,
}

impl Readme {
    fn read() -> Result<Self> {
        Ok(Self { text: std::fs::read_to_string(repository().join("README.md"))? })
    }

    fn after(&self, name: &str) -> Result<&str> {
        let mark = format!("<!-- test: {name} -->");
        Ok(self.text.split_once(&mark).with_context(|| format!("the README has no {mark}"))?.1)
    }

    /// The fenced block behind a mark.
    fn block(&self, name: &str) -> Result<String> {
        let (_, rest) = self.after(name)?.split_once("```").context("no block")?;
        let (_, rest) = rest.split_once('\n').context("no line")?;
        Ok(rest.split_once("```").context("no end of the block")?.0.to_owned())
    }

    /// Makes the user of a line on a server, with the permissions of these rows of the table.
    fn user(&self, server: &Server, line: &str, rows: &[&str]) -> Result<()> {
        let line = self.block(&format!("acl {line}"))?;
        let mut words: Vec<String> = line.split_whitespace().skip(1).map(str::to_owned).collect();
        ensure!(words.first().is_some_and(|name| name == "migrator"), "not a user: {line}");
        for row in rows {
            let rest = self.after(&format!("acl {row}"))?;
            let rest = rest.strip_prefix('`').with_context(|| format!("no code at {row}"))?;
            let code = rest.split_once('`').context("no end of the code")?.0;
            words.extend(code.split_whitespace().map(|word| word.replace("\\|", "|")));
        }
        let mut command: Vec<&[u8]> = vec![b"ACL", b"SETUSER"];
        command.extend(words.iter().map(String::as_bytes));
        server.conn()?.run(&command).with_context(|| format!("{}: {words:?}", server.version))?;
        Ok(())
    }
}

fn logins(manifest: Manifest) -> Manifest {
    manifest.login("source", "migrator", SOURCE_PASSWORD).login("target", "migrator", TARGET_PASSWORD)
}

fn small() -> Dataset {
    Dataset::default().rounds(1)
}

fn assert_nothing_refused(server: &Server) -> Result<()> {
    let refused = refused(server)?;
    ensure!(refused.is_empty(), "refused to the user: {refused:?}");
    Ok(())
}

/// What the README calls optional may be asked for and refused.
fn assert_only_optional_refused(server: &Server) -> Result<()> {
    let optional = ["command", "command|info", "config|get", "module|list", "acl|whoami", "client|setname"];
    let mut refused = refused(server)?;
    refused.retain(|command| !optional.contains(&command.as_str()));
    ensure!(refused.is_empty(), "refused to the user: {refused:?}");
    Ok(())
}

/// Names of the commands that ACL LOG has.
fn refused(server: &Server) -> Result<Vec<String>> {
    let log = server.conn()?.run(args!["ACL", "LOG"])?;
    let field = |entry: &redis::Value, name: &str| {
        let parts = e2e::client::array(entry);
        let at = parts.iter().position(|part| e2e::client::text(part) == name)?;
        parts.get(at + 1).map(e2e::client::text)
    };
    Ok(e2e::client::array(&log).iter().filter_map(|entry| field(entry, "object")).collect())
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}
