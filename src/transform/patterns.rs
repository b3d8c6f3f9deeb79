//! Many patterns at once: prefixes by a search in a sorted list, globs one by one, regular expressions
//! together.

use regex::bytes::{RegexBuilder, RegexSet, RegexSetBuilder};

use super::glob::Glob;

/// Longest pattern, in bytes.
const LONGEST: usize = 1024;
/// What one compiled regular expression may take, and all of a list together.
const REGEX_BYTES: usize = 1 << 20;
const REGEXES_BYTES: usize = 16 << 20;

/// One pattern as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern<'a> {
    Prefix(&'a str),
    Glob(&'a str),
    /// Searched for anywhere in the key, which is bytes: `.` is any byte.
    Regex(&'a str),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("has {length} bytes; allowed: at most {LONGEST}")]
    TooLong { length: usize },
    #[error("is no regular expression that can be used: {0}")]
    Regex(String),
}

/// A list of patterns.
#[derive(Debug, Default)]
pub struct Patterns {
    /// Sorted; none begins with another.
    prefixes: Vec<Vec<u8>>,
    globs: Vec<Glob>,
    regexes: Option<RegexSet>,
}

impl Patterns {
    /// Every fault comes with the pattern's place in the list.
    pub fn new<'a>(
        patterns: impl IntoIterator<Item = Pattern<'a>>,
    ) -> Result<Self, Vec<(usize, PatternError)>> {
        let (mut made, mut regexes, mut faults) = (Self::default(), Vec::new(), Vec::new());
        let mut last_regex = 0;
        for (index, pattern) in patterns.into_iter().enumerate() {
            let (Pattern::Prefix(text) | Pattern::Glob(text) | Pattern::Regex(text)) = pattern;
            if text.len() > LONGEST {
                faults.push((index, PatternError::TooLong { length: text.len() }));
                continue;
            }
            match pattern {
                Pattern::Prefix(text) => made.prefixes.push(text.as_bytes().to_vec()),
                Pattern::Glob(text) => {
                    let glob = Glob::new(text.as_bytes());
                    match glob.as_prefix() {
                        Some(prefix) => made.prefixes.push(prefix),
                        None => made.globs.push(glob),
                    }
                }
                Pattern::Regex(text) => {
                    last_regex = index;
                    let built = RegexBuilder::new(text)
                        .unicode(false)
                        .dot_matches_new_line(true)
                        .size_limit(REGEX_BYTES)
                        .build();
                    match built {
                        Ok(_) => regexes.push(text),
                        Err(error) => faults.push((index, PatternError::Regex(in_one_line(&error)))),
                    }
                }
            }
        }
        if !regexes.is_empty() {
            let set = RegexSetBuilder::new(&regexes)
                .unicode(false)
                .dot_matches_new_line(true)
                .size_limit(REGEXES_BYTES)
                .build();
            match set {
                Ok(set) => made.regexes = Some(set),
                Err(error) => faults.push((last_regex, PatternError::Regex(in_one_line(&error)))),
            }
        }
        made.prefixes.sort_unstable();
        made.prefixes.dedup_by(|longer, shorter| longer.starts_with(shorter));
        if faults.is_empty() { Ok(made) } else { Err(faults) }
    }

    pub fn matches(&self, key: &[u8]) -> bool {
        // Of those that sort before the key, only the last can be one that it begins with.
        let behind = self.prefixes.partition_point(|prefix| prefix.as_slice() <= key);
        let prefix = behind.checked_sub(1).and_then(|at| self.prefixes.get(at));
        prefix.is_some_and(|prefix| key.starts_with(prefix))
            || self.globs.iter().any(|glob| glob.matches(key))
            || self.regexes.as_ref().is_some_and(|regexes| regexes.is_match(key))
    }
}

/// The parser draws a picture of several lines; its last one says what is wrong.
fn in_one_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Pattern::{Glob, Prefix, Regex};
    use proptest::prelude::*;

    #[test]
    fn each_kind_matches() {
        let patterns =
            Patterns::new([Prefix("user:"), Glob("*:tmp"), Regex("^x[0-9]+$"), Regex("é")]).unwrap();
        for (key, matches) in [
            (&b"user:1"[..], true),
            (b"user:", true),
            (b"user", false),
            (b"uses", false),
            (b"a:tmp", true),
            (b"a:tmp:b", false),
            (b"x12", true),
            (b"x12\n", false),
            (b"ax12", false),
            ("caf\u{e9}".as_bytes(), true),
            (b"\xff:tmp", true),
            (b"", false),
        ] {
            assert_eq!(patterns.matches(key), matches, "{}", key.escape_ascii());
        }
        assert!(Patterns::new([Regex("^a.*b$")]).unwrap().matches(b"a\n\xffb"));
        assert!(Patterns::new([Prefix("")]).unwrap().matches(b"anything"));
    }

    #[test]
    fn faults_name_their_place() {
        let long = "a".repeat(1025);
        let faults = Patterns::new([Prefix("a"), Regex("a(b"), Glob(&long), Regex("[a-z]{1000}{1000}")]);
        let faults = faults.unwrap_err();
        let places: Vec<usize> = faults.iter().map(|(at, _)| *at).collect();
        assert_eq!(places, [1, 2, 3]);
        assert_eq!(faults[0].1.to_string(), "is no regular expression that can be used: unclosed group");
        assert!(faults[2].1.to_string().contains("size limit"), "{}", faults[2].1);
    }

    proptest! {
        #[test]
        fn prefixes_are_found_as_one_by_one(
            prefixes in prop::collection::vec("[ab]{0,4}", 0..8), key in "[ab]{0,6}"
        ) {
            let patterns = Patterns::new(prefixes.iter().map(|prefix| Prefix(prefix))).unwrap();
            let expected = prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()));
            prop_assert_eq!(patterns.matches(key.as_bytes()), expected);
        }
    }
}
