//! Commands for tests, and a plain reader of the frames that the code under test writes.

use crate::resp::{Args, Span, encode_command};

/// A command that owns its frame.
pub struct TestArgs {
    frame: Vec<u8>,
    spans: Vec<Span>,
}

impl TestArgs {
    /// The words of `command`; `""` is an empty argument.
    pub fn new(command: &str) -> Self {
        Self::of(command.split_ascii_whitespace().map(|word| if word == "\"\"" { "" } else { word }))
    }

    pub fn of<A: AsRef<[u8]>>(words: impl IntoIterator<Item = A>) -> Self {
        let words: Vec<A> = words.into_iter().collect();
        let mut frame = Vec::new();
        encode_command(&words, &mut frame);
        let (spans, end) = read_frame(&frame);
        assert_eq!(end, frame.len());
        Self { frame, spans }
    }

    pub fn args(&self) -> Args<'_> {
        Args { frame: &self.frame, spans: &self.spans }
    }
}

/// The commands in `frames`, words joined by spaces, an empty word as `""`.
pub fn printed(frames: &[u8]) -> Vec<String> {
    let mut rest = frames;
    let mut commands = Vec::new();
    while !rest.is_empty() {
        let (spans, end) = read_frame(rest);
        let words: Vec<String> = Args { frame: &rest[..end], spans: &spans }
            .iter()
            .map(|arg| if arg.is_empty() { "\"\"".to_owned() } else { String::from_utf8_lossy(arg).into() })
            .collect();
        commands.push(words.join(" "));
        rest = &rest[end..];
    }
    commands
}

fn read_frame(bytes: &[u8]) -> (Vec<Span>, usize) {
    let mut at = 0;
    let count = read_header(bytes, &mut at, b'*');
    let mut spans = Vec::new();
    for _ in 0..count {
        let length = read_header(bytes, &mut at, b'$');
        spans.push(Span { start: at as u32, end: (at + length) as u32 });
        at += length;
        assert_eq!(&bytes[at..at + 2], b"\r\n");
        at += 2;
    }
    (spans, at)
}

fn read_header(bytes: &[u8], at: &mut usize, marker: u8) -> usize {
    assert_eq!(bytes[*at], marker);
    let end = *at + bytes[*at..].iter().position(|&byte| byte == b'\r').unwrap();
    let number = std::str::from_utf8(&bytes[*at + 1..end]).unwrap().parse().unwrap();
    assert_eq!(bytes[end + 1], b'\n');
    *at = end + 2;
    number
}
