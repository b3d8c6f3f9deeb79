//! Byte strings and numbers as JSON.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A JSON string, or `{"base64":"…"}` for what is not UTF-8.
#[inline]
pub(super) fn byte_string(bytes: &[u8], out: &mut Vec<u8>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => string(text, out),
        Err(_) => {
            out.push(b'{');
            base64_member(bytes, out);
            out.push(b'}');
        }
    }
}

fn string(text: &str, out: &mut Vec<u8>) {
    // Most texts need no escaping; the rest goes through the library.
    if text.bytes().all(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    } else {
        // Writing to a vector does not fail.
        let _ = serde_json::to_writer(out, text);
    }
}

/// `"base64":"…"`
pub(super) fn base64_member(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"\"base64\":\"");
    let mut base64 = Base64::default();
    base64.push(bytes, out);
    base64.finish(out);
    out.push(b'"');
}

pub(super) fn number(number: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// JSON knows no infinity and no NaN: these are strings.
pub(super) fn score(score: f64, out: &mut Vec<u8>) {
    let plain = score == 0.0 || (1e-5..1e17).contains(&score.abs());
    // Writing to a vector does not fail. The shortest text that reads back as the same number.
    let _ = match score {
        _ if score.is_nan() => out.write_all(b"\"nan\""),
        f64::INFINITY => out.write_all(b"\"inf\""),
        f64::NEG_INFINITY => out.write_all(b"\"-inf\""),
        _ if plain => write!(out, "{score}"),
        _ => write!(out, "{score:e}"),
    };
}

/// Base64 of bytes that come in parts.
#[derive(Debug, Default)]
pub(super) struct Base64 {
    /// Less than three bytes, which do not make four letters yet.
    rest: Vec<u8>,
}

impl Base64 {
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            let missing = 3usize.saturating_sub(self.rest.len()).min(bytes.len());
            let (first, others) = bytes.split_at(missing);
            self.rest.extend_from_slice(first);
            bytes = others;
            if self.rest.len() < 3 {
                return;
            }
            encode(&self.rest, out);
            self.rest.clear();
        }
        let (whole, rest) = bytes.split_at(bytes.len() - bytes.len() % 3);
        encode(whole, out);
        self.rest.extend_from_slice(rest);
    }

    pub fn finish(&mut self, out: &mut Vec<u8>) {
        encode(&self.rest, out);
        self.rest.clear();
    }
}

fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let room = out.get_mut(start..).unwrap_or_default();
    // The room is exactly what padded base64 takes.
    let _ = STANDARD.encode_slice(bytes, room);
}
