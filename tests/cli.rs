//! The binary's promises to scripts: exit codes, what goes where.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn tool(arguments: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_redis-migration"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A tool that refuses its arguments does not read what is piped into it.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn crd_is_printed() {
    let output = tool(&["crd"], "");
    assert_eq!(output.status.code(), Some(0));
    let committed = include_bytes!("../crds/redismigrations.yaml");
    assert!(output.stdout == committed, "differs from crds/redismigrations.yaml");
}

#[test]
fn bad_arguments_end_with_2() {
    for arguments in [
        &["dance"][..],
        &["run"],
        &["run", "-f", "x", "--output", "xml"],
        &["run", "-f", "/nonexistent/manifest.yaml"],
        &["operator", "--listen", "nowhere"],
        &["decode", "/nonexistent/file.rdb"],
        &["stat", "/nonexistent/file.rdb"],
    ] {
        let output = tool(arguments, "");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_bad_manifest_ends_with_2_and_names_the_place() {
    let manifest = "apiVersion: redis-migration.io/v1alpha1\nkind: RedisMigration\nmetadata: {name: a}\nspec:\n  \
                    source: {type: Replication, redis: {endpoints: [\"127.0.0.1:1\"]}}\n  \
                    target: {type: Redis, redis: {endpoints: [\"127.0.0.1:2\"]}}\n  suspend: true\n";
    for command in ["run", "check", "verify"] {
        let output = tool(&[command, "-f", "-"], manifest);
        assert_eq!(output.status.code(), Some(2), "{command}");
        assert_eq!(
            said(&output),
            "<stdin>:7:3: spec.suspend: not supported by this version yet\n",
            "{command}"
        );
    }
}
