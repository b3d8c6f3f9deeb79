//! The elements of values as JSON.

use super::text::{byte_string, number, score};
use crate::rdb::packed::Entry;
use crate::rdb::walk::{Pending, Sink, StreamId, StreamState};

/// Appends the elements of a value; the brackets around them are the caller's.
pub(super) struct Values<'a> {
    out: &'a mut Vec<u8>,
    /// Something stands in the current array.
    begun: bool,
    /// A group's object is open.
    group: Option<Group>,
    /// Members of a sorted set that is written in order: score, and the member as JSON.
    scored: Option<Vec<(f64, Vec<u8>)>>,
    digits: itoa::Buffer,
}

/// What the consumers of a group have, as two arrays side by side.
#[derive(Default)]
struct Group {
    pending: Vec<u8>,
    consumers: Vec<u8>,
    consumer: Vec<u8>,
}

impl<'a> Values<'a> {
    /// `begun`: something stands in the current array. `sorted`: a sorted set is written by score and
    /// member, which takes the whole of it.
    pub fn new(out: &'a mut Vec<u8>, begun: bool, sorted: bool) -> Self {
        let scored = sorted.then(Vec::new);
        Self { out, begun, group: None, scored, digits: itoa::Buffer::new() }
    }

    /// Writes what was held back. True when something stands in the current array.
    pub fn finish(mut self) -> bool {
        self.close_group();
        let mut scored = self.scored.take().unwrap_or_default();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        for (score, member) in scored {
            self.scored_member(score, &member);
        }
        self.begun
    }

    #[inline]
    fn comma(&mut self) {
        if self.begun {
            self.out.push(b',');
        }
        self.begun = true;
    }

    fn scored_member(&mut self, number: f64, member: &[u8]) {
        self.comma();
        self.out.extend_from_slice(b"{\"member\":");
        self.out.extend_from_slice(member);
        self.out.extend_from_slice(b",\"score\":");
        score(number, self.out);
        self.out.push(b'}');
    }

    fn close_group(&mut self) {
        let Some(group) = self.group.take() else { return };
        self.out.extend_from_slice(b"\"pending\":[");
        self.out.extend_from_slice(&group.pending);
        self.out.extend_from_slice(b"],\"consumers\":[");
        self.out.extend_from_slice(&group.consumers);
        self.out.extend_from_slice(b"]}");
    }
}

impl Sink for Values<'_> {
    fn string(&mut self, bytes: &[u8]) {
        byte_string(bytes, self.out);
    }

    fn item(&mut self, item: &[u8]) {
        self.comma();
        byte_string(item, self.out);
    }

    fn member(&mut self, member: &[u8]) {
        self.item(member);
    }

    fn scored(&mut self, member: &[u8], score: f64) {
        let mut text = Vec::with_capacity(member.len() + 2);
        byte_string(member, &mut text);
        match &mut self.scored {
            Some(scored) => scored.push((score, text)),
            None => self.scored_member(score, &text),
        }
    }

    fn field(&mut self, field: &[u8], value: &[u8], expire_at_ms: Option<i64>) {
        self.comma();
        self.out.extend_from_slice(b"{\"field\":");
        byte_string(field, self.out);
        self.out.extend_from_slice(b",\"value\":");
        byte_string(value, self.out);
        if let Some(at) = expire_at_ms {
            self.out.extend_from_slice(b",\"expireAt\":");
            number(at, self.out);
        }
        self.out.push(b'}');
    }

    fn entry(&mut self, entry_id: StreamId, fields: &[(Entry<'_>, Entry<'_>)]) {
        self.comma();
        self.out.extend_from_slice(b"{\"id\":");
        id(entry_id, self.out);
        self.out.extend_from_slice(b",\"fields\":[");
        for (index, (field, value)) in fields.iter().enumerate() {
            self.out.extend_from_slice(if index == 0 { b"[" } else { b",[" });
            byte_string(field.text(&mut self.digits), self.out);
            self.out.push(b',');
            byte_string(value.text(&mut self.digits), self.out);
            self.out.push(b']');
        }
        self.out.extend_from_slice(b"]}");
    }

    fn stream(&mut self, state: StreamState) {
        self.out.extend_from_slice(b"],\"lastId\":");
        id(state.last, self.out);
        if let Some((max_deleted, added)) = state.counters {
            self.out.extend_from_slice(b",\"maxDeletedId\":");
            id(max_deleted, self.out);
            self.out.extend_from_slice(b",\"entriesAdded\":");
            self.out.extend_from_slice(self.digits.format(added).as_bytes());
        }
        self.out.extend_from_slice(b",\"groups\":[");
        self.begun = false;
    }

    fn group(&mut self, name: &[u8], last: StreamId, entries_read: Option<u64>) {
        self.close_group();
        self.comma();
        self.out.extend_from_slice(b"{\"name\":");
        byte_string(name, self.out);
        self.out.extend_from_slice(b",\"lastId\":");
        id(last, self.out);
        if let Some(read) = entries_read {
            self.out.extend_from_slice(b",\"entriesRead\":");
            self.out.extend_from_slice(self.digits.format(read).as_bytes());
        }
        self.out.push(b',');
        self.group = Some(Group::default());
    }

    fn consumer(&mut self, name: &[u8]) {
        let Some(Group { consumers, consumer, .. }) = &mut self.group else { return };
        if !consumers.is_empty() {
            consumers.push(b',');
        }
        consumer.clear();
        byte_string(name, consumer);
        consumers.extend_from_slice(consumer);
    }

    fn pending(&mut self, entry: Pending) {
        let Some(Group { pending, consumer, .. }) = &mut self.group else { return };
        pending.extend_from_slice(if pending.is_empty() { b"{\"id\":" } else { b",{\"id\":" });
        id(entry.id, pending);
        pending.extend_from_slice(b",\"consumer\":");
        pending.extend_from_slice(consumer);
        pending.extend_from_slice(b",\"deliveredAt\":");
        number(entry.delivered_at_ms, pending);
        pending.extend_from_slice(b",\"deliveries\":");
        pending.extend_from_slice(self.digits.format(entry.deliveries).as_bytes());
        pending.push(b'}');
    }

    /// Written by the caller, who knows the module.
    fn module(&mut self, _: &[u8]) {}
}

fn id(id: StreamId, out: &mut Vec<u8>) {
    use std::io::Write;
    // Writing to a vector does not fail.
    let _ = write!(out, "\"{id}\"");
}
