//! What needs no server.

#[test]
fn pure_files_stay_pure() {
    let files = [
        include_str!("frame.rs"),
        include_str!("judge.rs"),
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
