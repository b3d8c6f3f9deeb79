//! Arguments, manifests, exit codes, output and the HTTP endpoints.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::scenario::{PATIENCE, stop};
use e2e::tool::binary;
use e2e::{Manifest, Server, Tool, Version, args, wait_until};

const VERSION: Version = Version::REDIS_7_0;

/// `check -f -` with this text: exit code and all that was said.
fn check(text: &str) -> Result<(i32, String)> {
    let mut child = Command::new(binary()?)
        .args(["check", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("stdin")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned()))
}

const GOOD: &str = "\
apiVersion: redis-migration.io/v1alpha1
kind: RedisMigration
metadata: {name: orders, namespace: shop}
spec:
  source:
    type: Replication
    redis:
      endpoints: [\"127.0.0.1:1\"]
  target:
    type: Redis
    redis:
      endpoints: [\"127.0.0.1:2\"]
";

#[test]
fn bad_arguments_exit_2() -> Result<()> {
    for arguments in [
        &["run"] as &[&str],
        &["run", "-f", "/nonexistent/migration.yaml"],
        &["check", "-f", "x", "--unknown"],
        &["dance"],
        &[],
        &["run", "-f", "x", "--until", "Tomorrow"],
        &["run", "-f", "x", "--output", "xml"],
    ] {
        let finished = Tool::plain(arguments)?;
        assert_eq!(finished.code, 2, "{arguments:?}: {}{}", finished.stdout, finished.stderr);
        assert!(!finished.stderr.trim().is_empty());
    }
    Ok(())
}

/// A manifest without a fault gets as far as connecting.
#[test]
fn good_manifest_reaches_the_network() -> Result<()> {
    let (code, said) = check(GOOD)?;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("refused"), "{said}");
    Ok(())
}

/// Each fault is named with what the reader needs to find it: line, field, what is allowed.
#[test]
fn bad_manifests_exit_2() -> Result<()> {
    let faults: [(&str, &str, &str, &[&str]); 14] = [
        ("unknown field", "type: Replication", "type: Replication\n    flavour: sweet", &["flavour", ":7:"]),
        ("wrong kind", "kind: RedisMigration", "kind: RedisMigratoin", &["RedisMigratoin"]),
        ("wrong version", "v1alpha1", "v7", &["v7"]),
        ("unknown type", "type: Redis\n", "type: Postgres\n", &["Postgres", "Redis"]),
        ("no endpoint", "[\"127.0.0.1:1\"]", "[]", &["endpoints"]),
        ("no port", "127.0.0.1:1", "127.0.0.1", &["127.0.0.1", "port"]),
        (
            "wrong quantity",
            "spec:\n",
            "spec:\n  limits: {spoolMemory: 12Quux}\n",
            &[":5:", "spoolMemory", "64Mi"],
        ),
        ("wrong mode", "spec:\n", "spec:\n  verification: {mode: Partly}\n", &["Partly", "Sample"]),
        ("wrong union", "type: Replication", "type: RdbFile", &["RdbFile", "rdbFile"]),
        ("not built yet", "spec:\n", "spec:\n  cutover: {switch: {service: {name: a}}}\n", &["switch"]),
        ("negative", "spec:\n", "spec:\n  limits: {pipelineCommands: -1}\n", &["pipelineCommands"]),
        (
            "long name",
            "name: orders",
            "name: orders-orders-orders-orders-orders-orders-orders-orders",
            &["52"],
        ),
        ("not yaml", "metadata: {", "metadata: {{", &[":3:"]),
        (
            "text for a number",
            "spec:\n",
            "spec:\n  limits: {keysPerSecond: many}\n",
            &[":5:", "keysPerSecond", "number"],
        ),
    ];
    let mut failures = Vec::new();
    for (what, old, new, words) in faults {
        assert!(GOOD.contains(old));
        let (code, said) = check(&GOOD.replacen(old, new, 1))?;
        if code != 2 || said.contains("panicked") || words.iter().any(|word| !said.contains(word)) {
            failures.push(format!("{what}: exit code {code}, wanted {words:?}: {said}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn two_migrations_in_a_file_exit_2() -> Result<()> {
    let (code, said) = check(&format!("{GOOD}---\n{GOOD}"))?;
    assert_eq!(code, 2, "{said}");
    let (code, said) = check("kind: Secret\napiVersion: v1\nmetadata: {name: a}\n")?;
    assert_eq!(code, 2, "{said}");
    let (code, _) = check("")?;
    assert_eq!(code, 2);
    Ok(())
}

#[test]
fn secrets_in_the_file() -> Result<()> {
    let source = e2e::Options::new(VERSION).password("pass:word").start()?;
    let target = Server::start(VERSION)?;
    // Not the other way round: the source's port may begin as the target's does.
    let text = GOOD.replace("127.0.0.1:2\"]", &format!("{}\"]", target.address())).replace(
        "127.0.0.1:1\"]",
        &format!("{}\"]\n      auth: {{passwordSecretRef: {{name: old, key: password}}}}", source.address()),
    );
    let secret = |body: &str| {
        format!("{text}---\napiVersion: v1\nkind: Secret\nmetadata: {{name: old, namespace: shop}}\n{body}\n")
    };
    for body in ["stringData: {password: \"pass:word\"}", "data: {password: cGFzczp3b3Jk}"] {
        let (code, said) = check(&secret(body))?;
        assert_eq!(code, 0, "{body}: {said}");
    }
    let (code, said) = check(&secret("stringData: {other: x}"))?;
    assert_ne!(code, 0);
    assert!(said.contains("password") && said.contains("old"), "{said}");
    Ok(())
}

#[test]
fn examples_are_valid() -> Result<()> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            // Their servers are not there, or not reachable; the manifest itself must be in order.
            let finished = Tool::plain(&["check", "-f", &path.to_string_lossy()])?;
            assert_ne!(finished.code, 2, "{}: {}", path.display(), finished.stderr);
            seen += 1;
        }
    }
    assert!(seen > 0);
    Ok(())
}

#[test]
fn crd_is_a_custom_resource_definition() -> Result<()> {
    let finished = Tool::plain(&["crd"])?;
    assert_eq!(finished.code, 0, "{}", finished.stderr);
    for part in [
        "kind: CustomResourceDefinition",
        "redismigrations.redis-migration.io",
        "rmig",
        "v1alpha1",
        "existingKeys",
    ] {
        assert!(finished.stdout.contains(part), "{part}");
    }
    Ok(())
}

#[test]
fn json_lines_each_second_and_at_changes() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &["--until", "InSync"])?;
    let finished = tool.expect_exit(0, PATIENCE)?;
    let mut phases = Vec::new();
    for line in finished.stdout.lines() {
        let line: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        assert_eq!(line["name"], "e2e");
        assert_eq!(line["namespace"], "tests");
        let phase = line["status"]["phase"].as_str().context("a phase")?.to_owned();
        if phases.last() != Some(&phase) {
            phases.push(phase);
        }
    }
    assert!(phases.len() >= 3, "{phases:?}");
    let status = finished.status()?;
    for kind in ["PreflightPassed", "FullSynced", "InSync", "Verified"] {
        assert_eq!(e2e::tool::condition(&status, kind).as_deref(), Some("True"), "{kind} in {status}");
    }
    assert_eq!(status["progress"]["keysApplied"], 1);
    assert_eq!(status["shards"].as_array().map(Vec::len), Some(1));
    assert_eq!(status["verification"]["differences"], 0);
    Ok(())
}

/// GET over plain HTTP: status line and body.
fn http(address: &str, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok((head.lines().next().unwrap_or_default().to_owned(), body.to_owned()))
}

#[test]
fn metrics_and_probes() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    source.conn()?.run(args!["SET", "k", "v"])?;
    let tool = Tool::run(&Manifest::between(&source.endpoint(), &target.endpoint()), &[])?;
    // Port 0 picks a free one and says which.
    let address = wait_until("the port of the metrics", PATIENCE, || {
        let told = tool.stderr();
        let line =
            told.lines().find_map(|line| line.split_once("127.0.0.1:").filter(|_| line.contains("listen")));
        let port = line.map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        Ok(port.filter(|port| !port.is_empty() && port != "0").map(|port| format!("127.0.0.1:{port}")))
    })?;
    tool.wait_condition("InSync", PATIENCE)?;
    assert!(http(&address, "/healthz")?.0.contains("200"));
    wait_until("readiness", PATIENCE, || Ok(http(&address, "/readyz")?.0.contains("200").then_some(())))?;
    let (_, metrics) = http(&address, "/metrics")?;
    for part in ["lag", "keys", "bytes", "commands", "shard="] {
        assert!(metrics.contains(part), "{part} in {metrics}");
    }
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        assert!(line.rsplit_once(' ').is_some_and(|(_, number)| number.parse::<f64>().is_ok()), "{line}");
    }
    let (_, statuses) = http(&address, "/metric")?;
    assert!(statuses.contains("IncrementalSync") || statuses.contains("Verifying"), "{statuses}");
    assert!(http(&address, "/nothing")?.0.contains("404"));
    stop(tool).map(drop)
}
