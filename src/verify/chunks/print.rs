//! PURE. Replies reduced to what must be equal on both sides, without keeping them.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::hold::true_field;
use crate::verify::expiry::TOLERANCE_MS;
use crate::verify::frame::Frame;

/// What counts in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Every byte.
    Raw,
    /// Numbers, however a version prints them.
    Scores,
    /// Times, within tolerance.
    Expiries,
    /// XPENDING: id and consumer. When and how often it was delivered is not replicated whenever a
    /// consumer reads its own entries again.
    Pending,
    /// XINFO GROUPS: name, pending and last id of each.
    Groups,
    /// XINFO STREAM: last id.
    StreamInfo,
    /// DUMP, without version and checksum.
    Payload,
}

/// Stands for a reply. Equal for replies that mean the same.
#[derive(Clone, Debug)]
pub enum Print {
    /// Two hashes of the same content.
    Content(u64, u64),
    Times(Vec<i64>),
    /// An error, or a reply too long to be kept. Equal to nothing, not even to its like: two sides
    /// that both do not tell have not been compared.
    Unknown,
}

impl PartialEq for Print {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Print::Content(a, b), Print::Content(c, d)) => (a, b) == (c, d),
            (Print::Times(ours), Print::Times(theirs)) => {
                ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| close(*a, *b))
            }
            _ => false,
        }
    }
}

fn close(a: i64, b: i64) -> bool {
    // The target's may be held.
    let [a, b] = [a, b].map(|at| true_field(at).unwrap_or(at));
    // Negative answers are states: no such field, no expiry.
    a == b || (a >= 0 && b >= 0 && a.abs_diff(b) <= TOLERANCE_MS.unsigned_abs())
}

impl Print {
    pub fn of(frame: Frame<'_>, reading: Reading) -> Print {
        match frame {
            Frame::Array(Some(mut items)) => {
                Self::of_items(std::iter::from_fn(|| items.next_frame().ok().flatten()), reading)
            }
            Frame::Error(_) | Frame::TooLong(_) => Print::Unknown,
            frame => {
                let mut printer = Printer::new();
                printer.item(frame, reading);
                printer.finish()
            }
        }
    }

    /// As of an array with these items.
    pub fn of_items<'a>(items: impl Iterator<Item = Frame<'a>>, reading: Reading) -> Print {
        if reading == Reading::Expiries {
            let time = |item| match item {
                Frame::Integer(time) => Some(time),
                _ => None,
            };
            return items.map(time).collect::<Option<_>>().map_or(Print::Unknown, Print::Times);
        }
        let mut printer = Printer::new();
        match reading {
            Reading::Groups => {
                // In the order of names: servers list them in the order of a tree or of a table.
                let mut groups: Vec<_> = items.map(|item| fields(item, GROUP_FIELDS)).collect();
                groups.sort_unstable();
                groups.hash(&mut printer.first);
                groups.hash(&mut printer.second);
            }
            Reading::StreamInfo => {
                let items: Vec<Frame<'_>> = items.collect();
                let info = pick(&items, STREAM_FIELDS);
                info.hash(&mut printer.first);
                info.hash(&mut printer.second);
            }
            _ => items.for_each(|item| printer.item(item, reading)),
        }
        printer.finish()
    }
}

/// Names of the groups in a reply of XINFO GROUPS.
pub fn group_names(frame: Frame<'_>) -> Vec<Vec<u8>> {
    let Frame::Array(Some(mut groups)) = frame else { return Vec::new() };
    let each = std::iter::from_fn(|| groups.next_frame().ok().flatten());
    each.filter_map(|group| fields(group, &["name"]).into_iter().next()).collect()
}

const GROUP_FIELDS: &[&str] = &["name", "pending", "last-delivered-id"];
const STREAM_FIELDS: &[&str] = &["last-generated-id"];

fn fields(frame: Frame<'_>, wanted: &[&str]) -> Vec<Vec<u8>> {
    let Frame::Array(Some(mut items)) = frame else { return Vec::new() };
    let items: Vec<Frame<'_>> = std::iter::from_fn(|| items.next_frame().ok().flatten()).collect();
    pick(&items, wanted)
}

/// Values of the wanted names in a flat list of names and values, in the order wanted.
fn pick(items: &[Frame<'_>], wanted: &[&str]) -> Vec<Vec<u8>> {
    let value = |name: &&str| {
        items.as_chunks::<2>().0.iter().find_map(|[key, value]| match (key, value) {
            (Frame::Bulk(Some(key)), Frame::Bulk(Some(value))) if *key == name.as_bytes() => {
                Some(value.to_vec())
            }
            (Frame::Bulk(Some(key)), Frame::Integer(value)) if *key == name.as_bytes() => {
                Some(value.to_string().into_bytes())
            }
            _ => None,
        })
    };
    wanted.iter().filter_map(value).collect()
}

/// Makes a print of the items of an array, one after the other.
pub struct Printer {
    first: DefaultHasher,
    second: DefaultHasher,
    /// An item was none that can be compared.
    unknown: bool,
}

impl Printer {
    pub fn new() -> Self {
        let first = DefaultHasher::new();
        let mut second = DefaultHasher::new();
        second.write_u8(1);
        Self { first, second, unknown: false }
    }

    pub fn finish(self) -> Print {
        match self.unknown {
            true => Print::Unknown,
            false => Print::Content(self.first.finish(), self.second.finish()),
        }
    }

    pub fn item(&mut self, frame: Frame<'_>, reading: Reading) {
        match (frame, reading) {
            (Frame::Bulk(Some(text)), Reading::Scores) => {
                let score = std::str::from_utf8(text).ok().and_then(|text| text.parse::<f64>().ok());
                // Zero has two signs and one value.
                self.content(b's', &score.map(|score| (score + 0.0).to_bits()).hash_bytes());
            }
            (Frame::Bulk(Some(payload)), Reading::Payload) => {
                let end = payload.len().saturating_sub(10);
                self.content(b'$', payload.get(..end).unwrap_or_default());
            }
            (Frame::Bulk(Some(text)), _) => self.content(b'$', text),
            (Frame::Simple(text), _) => self.content(b'+', text),
            (Frame::Integer(number), _) => self.content(b':', &number.to_le_bytes()),
            (Frame::Error(_) | Frame::TooLong(_), _) => self.unknown = true,
            (Frame::Bulk(None) | Frame::Array(None), _) => self.content(b'0', b""),
            (Frame::Array(Some(mut items)), reading) => {
                self.content(b'*', &(items.len() as u64).to_le_bytes());
                let mut index = 0;
                while let Ok(Some(item)) = items.next_frame() {
                    // Behind id and consumer stand time and count of deliveries.
                    if reading != Reading::Pending || index < 2 {
                        self.item(item, reading);
                    }
                    index += 1;
                }
            }
        }
    }

    fn content(&mut self, marker: u8, bytes: &[u8]) {
        for hasher in [&mut self.first, &mut self.second] {
            hasher.write_u8(marker);
            bytes.hash(hasher);
        }
    }
}

trait HashBytes {
    fn hash_bytes(self) -> [u8; 9];
}

impl HashBytes for Option<u64> {
    fn hash_bytes(self) -> [u8; 9] {
        let mut bytes = [0; 9];
        if let Some(bits) = self {
            let [head, tail @ ..] = &mut bytes;
            *head = 1;
            *tail = bits.to_le_bytes();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(reply: &str, reading: Reading) -> Print {
        Print::of(Frame::parse(reply.as_bytes()).unwrap().0, reading)
    }

    #[test]
    fn boundaries_count() {
        let ab_c = print("*2\r\n$2\r\nab\r\n$1\r\nc\r\n", Reading::Raw);
        let a_bc = print("*2\r\n$1\r\na\r\n$2\r\nbc\r\n", Reading::Raw);
        assert_ne!(ab_c, a_bc);
        assert_ne!(print("*1\r\n$-1\r\n", Reading::Raw), print("*1\r\n$0\r\n\r\n", Reading::Raw));
    }

    #[test]
    fn what_is_not_told_equals_nothing() {
        for reply in ["-WRONGTYPE Operation against a key\r\n", "*2\r\n$1\r\na\r\n-ERR no\r\n"] {
            for reading in [Reading::Raw, Reading::Scores, Reading::Pending] {
                assert_ne!(print(reply, reading), print(reply, reading));
            }
        }
        assert_ne!(
            Print::of(Frame::TooLong(9), Reading::Payload),
            Print::of(Frame::TooLong(9), Reading::Payload)
        );
    }

    #[test]
    fn times_have_a_tolerance_and_states_have_none() {
        let times = |a: i64, b: i64| print(&format!("*2\r\n:{a}\r\n:{b}\r\n"), Reading::Expiries);
        assert_eq!(times(5000, -1), times(5900, -1));
        assert_ne!(times(5000, -1), times(6100, -1));
        assert_ne!(times(5000, -1), times(5000, -2));
        assert_ne!(times(5000, -1), times(5000, 0));
    }

    #[test]
    fn pending_entries_do_not_age() {
        let entry = |consumer: &str, idle: u32, count: u32| {
            let reply = format!("*1\r\n*4\r\n$3\r\n1-1\r\n$1\r\n{consumer}\r\n:{idle}\r\n:{count}\r\n");
            print(&reply, Reading::Pending)
        };
        assert_eq!(entry("c", 5, 1), entry("c", 77, 1));
        assert_ne!(entry("c", 5, 1), entry("d", 5, 1));
        assert_eq!(entry("c", 5, 1), entry("c", 5, 2));
    }

    #[test]
    fn groups_have_no_order_and_foreign_fields_do_not_count() {
        let group = |name: &str, id: &str| {
            format!(
                "*6\r\n$4\r\nname\r\n$1\r\n{name}\r\n$7\r\npending\r\n:3\r\n$17\r\nlast-delivered-id\r\n$3\r\n{id}\r\n"
            )
        };
        let newer = |name: &str, id: &str| {
            format!(
                "*8\r\n$4\r\nname\r\n$1\r\n{name}\r\n$7\r\npending\r\n:3\r\n$17\r\nlast-delivered-id\r\n$3\r\n{id}\r\n$3\r\nlag\r\n:9\r\n"
            )
        };
        let both = |a: String, b: String| print(&format!("*2\r\n{a}{b}"), Reading::Groups);
        assert_eq!(both(group("a", "1-1"), group("b", "2-1")), both(newer("b", "2-1"), newer("a", "1-1")));
        assert_ne!(both(group("a", "1-1"), group("b", "2-1")), both(group("b", "2-2"), group("a", "1-1")));
    }
}
