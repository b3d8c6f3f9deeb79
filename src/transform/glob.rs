//! Glob patterns over bytes as KEYS has them (`stringmatchlen` of Redis' src/util.c): `*`, `?`, `[abc]`,
//! `[^a-z]`, and `\` before a byte that is meant as it is. Matching takes time in proportion to key and
//! pattern, never more.

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    Any,
    Many,
    Class(Class),
}

/// A set of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Class([u64; 4]);

impl Class {
    fn add(&mut self, byte: u8) {
        if let Some(word) = self.0.get_mut(usize::from(byte >> 6)) {
            *word |= 1 << (byte & 63);
        }
    }

    fn has(&self, byte: u8) -> bool {
        self.0.get(usize::from(byte >> 6)).is_some_and(|word| word >> (byte & 63) & 1 == 1)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(Vec<Token>);

impl Glob {
    /// Every pattern is one: what is not closed ends with the pattern, as in Redis.
    pub fn new(pattern: &[u8]) -> Self {
        let mut rest = pattern;
        let mut tokens = Vec::new();
        while let Some((&first, after)) = rest.split_first() {
            rest = after;
            tokens.push(match first {
                b'*' => {
                    if tokens.last() == Some(&Token::Many) {
                        continue;
                    }
                    Token::Many
                }
                b'?' => Token::Any,
                b'[' => Token::Class(class(&mut rest)),
                b'\\' => match rest.split_first() {
                    Some((&byte, after)) => {
                        rest = after;
                        Token::Byte(byte)
                    }
                    None => Token::Byte(b'\\'),
                },
                byte => Token::Byte(byte),
            });
        }
        Self(tokens)
    }

    /// What a key starts with, if that is all the pattern asks for.
    pub fn as_prefix(&self) -> Option<Vec<u8>> {
        let (last, before) = self.0.split_last()?;
        let bytes = before.iter().map(|token| match token {
            Token::Byte(byte) => Some(*byte),
            _ => None,
        });
        if *last == Token::Many { bytes.collect() } else { None }
    }

    pub fn matches(&self, key: &[u8]) -> bool {
        let tokens = self.0.as_slice();
        let (mut token, mut at) = (0, 0);
        // Where the last `*` stands, and how much it has taken so far: no earlier one need take more.
        let mut many: Option<(usize, usize)> = None;
        loop {
            let fits = match (tokens.get(token), key.get(at)) {
                (None, None) => return true,
                (Some(Token::Many), _) => {
                    many = Some((token, at));
                    token += 1;
                    continue;
                }
                (Some(Token::Any), Some(_)) => true,
                (Some(Token::Byte(wanted)), Some(byte)) => wanted == byte,
                (Some(Token::Class(class)), Some(byte)) => class.has(*byte),
                (None, Some(_)) | (Some(_), None) => false,
            };
            if fits {
                (token, at) = (token + 1, at + 1);
                continue;
            }
            match many {
                Some((star, taken)) if taken < key.len() => {
                    many = Some((star, taken + 1));
                    (token, at) = (star + 1, taken + 1);
                }
                _ => return false,
            }
        }
    }
}

/// What stands between `[` and `]`.
fn class(rest: &mut &[u8]) -> Class {
    let mut class = Class::default();
    let negated = rest.first() == Some(&b'^');
    if negated {
        *rest = rest.get(1..).unwrap_or_default();
    }
    loop {
        match **rest {
            [] => break,
            [b'\\', byte, ..] => {
                class.add(byte);
                *rest = rest.get(2..).unwrap_or_default();
            }
            [b']', ..] => {
                *rest = rest.get(1..).unwrap_or_default();
                break;
            }
            [from, b'-', to, ..] => {
                (from.min(to)..=from.max(to)).for_each(|byte| class.add(byte));
                *rest = rest.get(3..).unwrap_or_default();
            }
            [byte, ..] => {
                class.add(byte);
                *rest = rest.get(1..).unwrap_or_default();
            }
        }
    }
    if negated {
        class.0.iter_mut().for_each(|word| *word = !*word);
    }
    class
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, key, matches) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("**", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abbd", false),
            ("*:tmp", "x:tmp:tmp", true),
            ("*:tmp", "x:tmp:", false),
            ("?", "", false),
            ("h?llo", "hello", true),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("[a-c]", "b", true),
            ("[c-a]", "b", true),
            ("[a-c]", "d", false),
            // A range needs no end: `]` is one.
            ("[a-]", "^", true),
            ("[a-]", "-", false),
            ("[a\\]b]", "]", true),
            ("[]", "]", false),
            ("[^]", "x", true),
            ("[ab", "b", true),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("a\\", "a\\", true),
            ("a**b*c", "a1b2bc", true),
        ] {
            assert_eq!(Glob::new(pattern.as_bytes()).matches(key.as_bytes()), matches, "{pattern} {key}");
        }
        assert!(Glob::new(b"\xff*").matches(b"\xff\xfe"), "bytes, not text");
    }

    #[test]
    fn many_stars_take_no_more_time_than_one() {
        let pattern = b"*a".repeat(200);
        let key = [b"a".repeat(199), b"b".repeat(100_000)].concat();
        assert!(!Glob::new(&pattern).matches(&key));
    }

    #[test]
    fn what_only_asks_for_a_beginning_is_told() {
        assert_eq!(Glob::new(b"user:*").as_prefix(), Some(b"user:".to_vec()));
        assert_eq!(Glob::new(b"us\\*r**").as_prefix(), Some(b"us*r".to_vec()));
        assert_eq!(Glob::new(b"*").as_prefix(), Some(Vec::new()));
        for pattern in ["", "user", "us?r*", "u*r*", "[u]*"] {
            assert_eq!(Glob::new(pattern.as_bytes()).as_prefix(), None, "{pattern}");
        }
    }

    /// As the source has it: by trying all.
    fn plainly(tokens: &[Token], key: &[u8]) -> bool {
        match (tokens.split_first(), key.split_first()) {
            (None, rest) => rest.is_none(),
            (Some((Token::Many, after)), rest) => {
                plainly(after, key) || rest.is_some_and(|(_, key)| plainly(tokens, key))
            }
            (Some(_), None) => false,
            (Some((token, after)), Some((byte, key))) => {
                let fits = match token {
                    Token::Byte(wanted) => wanted == byte,
                    Token::Class(class) => class.has(*byte),
                    Token::Any | Token::Many => true,
                };
                fits && plainly(after, key)
            }
        }
    }

    proptest! {
        #[test]
        fn matching_agrees_with_trying_all(pattern in "[ab*?\\[\\]^-]{0,10}", key in "[ab]{0,10}") {
            let glob = Glob::new(pattern.as_bytes());
            prop_assert_eq!(glob.matches(key.as_bytes()), plainly(&glob.0, key.as_bytes()));
        }
    }
}
