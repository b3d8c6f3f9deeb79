//! What needs no server.

use super::*;

fn pairs(source: &[u64], target: &[u64], map: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let map = map.iter().copied().collect();
    let pairs = pairs_of(source.iter().copied(), target.iter().copied(), &map);
    pairs.into_iter().map(|pair| (pair.source, pair.target)).collect()
}

#[test]
fn databases_are_paired_by_the_map() {
    assert_eq!(pairs(&[0, 3], &[0], &[]), [(0, 0), (3, 3)]);
    // A database that only the target has keys in belongs to the same number of the source.
    assert_eq!(pairs(&[0], &[0, 5], &[]), [(0, 0), (5, 5)]);
    assert_eq!(pairs(&[0, 1], &[0], &[(1, 0)]), [(0, 0), (1, 0)]);
    // Nothing ends in database 1 any more.
    assert_eq!(pairs(&[1], &[1, 0], &[(1, 0)]), [(0, 0), (1, 0)]);
}

#[test]
fn info_is_read() {
    assert_eq!(keyspace_line(b"db12:keys=34,expires=5,avg_ttl=0\r"), Some((12, 34)));
    assert_eq!(keyspace_line(b"# Keyspace\r"), None);
    assert_eq!(info_field(b"# Server\r\nrun_id:abc\r\nx:1\r\n", b"run_id"), b"abc");
    assert_eq!(info_field(b"# Server\r\n", b"run_id"), b"");
}

#[test]
fn pure_files_stay_pure() {
    let files = [
        include_str!("frame.rs"),
        include_str!("keys.rs"),
        include_str!("expiry.rs"),
        include_str!("ledger.rs"),
        include_str!("payload.rs"),
        include_str!("chunks/print.rs"),
    ];
    for text in files {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for word in ["tokio", "std::net", "std::fs", "std::io", "Instant", "SystemTime"] {
            assert!(!code.contains(word), "{word}");
        }
    }
}
