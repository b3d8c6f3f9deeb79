//! Guards the promise that some modules work on bytes alone, so that they can be tested and reused
//! without a socket, a file or a clock.

use std::fs;
use std::path::{Path, PathBuf};

/// Files, and folders with all below them, relative to `src`. One that does not exist yet is skipped.
const PURE: &[&str] = &[
    "resp.rs",
    "resp",
    "command.rs",
    "command",
    "hold.rs",
    "migration/cutover/fitting.rs",
    "loss.rs",
    "slot.rs",
    "rdb.rs",
    "rdb",
    "source/scan/table.rs",
    "transform.rs",
    "transform",
    "operator/balance.rs",
    "operator/decide.rs",
    "operator/status.rs",
];

const FORBIDDEN: &[&str] = &[
    "tokio",
    "kube",
    "socket",
    "socket2",
    "TcpStream",
    "std::fs",
    "std::net",
    "std::io::stdin",
    "SystemTime",
    "Instant",
];

#[test]
fn pure_modules_name_no_io_and_no_clock() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files: Vec<PathBuf> = PURE.iter().flat_map(|path| rust_files(&source.join(path))).collect();
    assert!(files.len() >= 3, "the list does not fit the tree any more");
    let mut faults = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in product_code(&text) {
            faults.extend(FORBIDDEN.iter().filter(|word| names(line, word)).map(|word| {
                format!("{}:{number} names {word}", file.strip_prefix(&source).unwrap().display())
            }));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_guard_finds_what_it_looks_for() {
    assert!(names("use tokio::net::TcpStream;", "tokio"));
    assert!(names("    let now = Instant::now();", "Instant"));
    assert!(!names("struct Instantaneous;", "Instant"));
    assert!(!names("fn tokio_free() {}", "tokio"));
    let text = "use a;\n// tokio\n#[cfg(test)]\nmod tests { use tokio; }\n";
    assert_eq!(product_code(text).collect::<Vec<_>>(), [(1, "use a;")]);
    let text = "#[cfg(test)]\nmod test_args;\nuse tokio;\n";
    assert!(product_code(text).any(|(_, line)| line == "use tokio;"));
}

/// `path` itself, or every `.rs` file below it; test modules excepted.
fn rust_files(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if path.is_dir() {
        let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        return if name == "tests" {
            Vec::new()
        } else {
            entries.flat_map(|path| rust_files(&path)).collect()
        };
    }
    let test_code = name == "tests.rs" || name.starts_with("test_");
    if path.is_file() && name.ends_with(".rs") && !test_code { vec![path.to_owned()] } else { Vec::new() }
}

/// Numbered lines without comments, up to the test module.
fn product_code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let code = text.get(..tests).unwrap_or_default();
    code.lines()
        .enumerate()
        .filter_map(|(index, line)| (!line.trim_start().starts_with("//")).then_some((index + 1, line)))
}

fn names(line: &str, word: &str) -> bool {
    let part_of_name = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        let after = line.get(at + word.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(part_of_name) && !after.is_some_and(part_of_name)
    })
}
