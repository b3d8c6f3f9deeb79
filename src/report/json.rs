//! One JSON object a line.

use std::io::Write;

use crate::api::Status;
use crate::telemetry::StatusLine;

pub struct JsonLines<W> {
    /// `None` once the reader has gone; the migration goes on without it.
    out: Option<W>,
    name: String,
    namespace: String,
}

impl<W: Write> JsonLines<W> {
    pub fn new(out: W, name: &str, namespace: &str) -> Self {
        Self { out: Some(out), name: name.to_owned(), namespace: namespace.to_owned() }
    }

    pub fn show(&mut self, status: &Status) {
        let Some(out) = &mut self.out else { return };
        let line = StatusLine { name: &self.name, namespace: &self.namespace, status }.to_json() + "\n";
        if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
            self.out = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_with_name_namespace_and_status() {
        let mut lines = JsonLines::new(Vec::new(), "orders", "shop");
        lines.show(&Status { message: "two\nlines".to_owned(), ..Status::default() });
        lines.show(&Status::default());
        let text = String::from_utf8(lines.out.unwrap()).unwrap();
        assert_eq!(text.lines().count(), 2);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["name"], "orders");
        assert_eq!(first["namespace"], "shop");
        assert_eq!(first["status"]["message"], "two\nlines");
        assert_eq!(first.as_object().unwrap().len(), 3);
        assert!(text.starts_with(
            r#"{"name":"orders","namespace":"shop","status":{"observedGeneration":0,"phase":"Pending","#
        ));
    }
}
