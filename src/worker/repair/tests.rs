use super::*;
use crate::resp::encode_command;
use crate::target::lane::{Batch, Exception};

const READING: Reading = Reading { snapshot: false, replay: false };

pub(crate) fn trouble(commands: &[&[&str]], errors: &[(u32, &str)]) -> Trouble {
    let mut bytes = Vec::new();
    commands.iter().for_each(|command| encode_command(command, &mut bytes));
    let exceptions = errors
        .iter()
        .map(|&(index, text)| Exception {
            index,
            element: None,
            kind: ExceptionKind::Error(text.as_bytes().to_vec()),
        })
        .collect();
    let batch =
        Batch { bytes, commands: commands.len() as u32, sequence: 1, db: Some(0), head: 0, bulk: false };
    Trouble { lane: 2, batch, exceptions }
}

#[test]
fn a_moved_command_is_sent_again_in_its_database() {
    let trouble =
        trouble(&[&["SELECT", "3"], &["SET", "k", "v"], &["INCR", "n"]], &[(1, "MOVED 7629 127.0.0.1:7001")]);
    let findings = examine(&trouble, READING);
    assert!(findings.refused.is_empty());
    let [unit] = &findings.retry[..] else { panic!("{findings:?}") };
    assert_eq!((unit.db, unit.slot, unit.replies), (Some(3), Some(7629), 1));
    assert_eq!(unit.frames, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n");
}

#[test]
fn a_transaction_is_sent_again_as_a_whole() {
    let trouble = trouble(
        &[&["MULTI"], &["SET", "k", "v"], &["INCR", "k"], &["EXEC"], &["DEL", "k"]],
        &[
            (1, "MOVED 7629 127.0.0.1:7001"),
            (2, "MOVED 7629 127.0.0.1:7001"),
            (3, "EXECABORT Transaction discarded because of previous errors."),
        ],
    );
    let findings = examine(&trouble, READING);
    let [unit] = &findings.retry[..] else { panic!("{findings:?}") };
    assert_eq!((unit.slot, unit.replies), (Some(7629), 4));
}

#[test]
fn refusals_name_command_and_key_but_no_value() {
    let trouble =
        trouble(&[&["lpush", "k", "secret"]], &[(0, "WRONGTYPE Operation against a key holding ...")]);
    let findings = examine(&trouble, READING);
    let [refusal] = &findings.refused[..] else { panic!("{findings:?}") };
    assert_eq!((refusal.command.as_str(), refusal.key.as_slice()), ("LPUSH", b"k".as_slice()));
    assert!(!format!("{refusal:?}").contains("secret"));
}

#[test]
fn an_aborted_transaction_is_refused_command_by_command() {
    let trouble = trouble(
        &[&["MULTI"], &["SET", "k", "v"], &["NOSUCH", "k"], &["EXEC"]],
        &[(2, "ERR unknown command 'NOSUCH'"), (3, "EXECABORT Transaction discarded")],
    );
    assert_eq!(examine(&trouble, READING).refused.len(), 2);
}

#[test]
fn a_key_that_was_there_is_told_in_the_full_sync_only() {
    let trouble = trouble(&[&["RESTORE", "k", "0", "x"]], &[(0, "BUSYKEY Target key name already exists.")]);
    let snapshot = Reading { snapshot: true, ..READING };
    assert_eq!(examine(&trouble, snapshot).existing, [b"k".to_vec()]);
    assert!(examine(&trouble, Reading { replay: true, ..snapshot }).existing.is_empty());
    assert_eq!(examine(&trouble, READING).refused.len(), 1);
}

#[test]
fn a_large_value_that_met_a_key_is_told_by_that_key() {
    let stage = "redis-migration:{a}:load:s";
    let mut met = trouble(&[&["RENAMENX", stage, "k"], &["SET", stage, "", "NX"], &["DEL", stage]], &[]);
    met.exceptions.push(Exception { index: 1, element: None, kind: ExceptionKind::Nil });
    let snapshot = Reading { snapshot: true, ..READING };
    assert_eq!(examine(&met, snapshot).existing, [b"k".to_vec()]);
    let expired = trouble(&[&["RENAMENX", stage, "k"]], &[(0, "ERR no such key")]);
    assert_eq!(examine(&expired, snapshot), Findings::default());
}

#[test]
fn a_database_that_the_target_lacks_is_fatal() {
    let trouble = trouble(&[&["SELECT", "20"], &["SET", "k", "v"]], &[(0, "ERR DB index is out of range")]);
    assert!(matches!(examine(&trouble, READING).fatal, Some(Fatal::NoDatabase { db, .. }) if db == "20"));
}

#[test]
fn a_lost_password_is_fatal() {
    let trouble = trouble(&[&["SET", "k", "v"]], &[(0, "NOPERM this user has no permissions")]);
    assert!(examine(&trouble, READING).fatal.is_some());
}
