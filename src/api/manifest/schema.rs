//! Checks a document against the structural schema of the CustomResourceDefinition: the keywords
//! that it uses, no others.

use serde_json::Value as Json;

use super::yaml::{Entry, Node, Value};
use super::{Place, Problem};
use crate::api::quantity::Quantity;

/// Fields that every object has, whatever its schema.
const OBJECT_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// Every fault of a document; empty when the API server would take it, rules (CEL) aside.
pub(super) fn faults(document: &Node, schema: &Json) -> Vec<Problem> {
    let mut check = Check { problems: Vec::new() };
    for entry in document.entries() {
        if let Some(field) = property(schema, &entry.key) {
            // What an object looked like when it was exported is of no concern to a new run.
            if entry.key != "status" {
                check.value(&entry.value, entry.key_place, field, &entry.key);
            }
        } else if !OBJECT_FIELDS.contains(&entry.key.as_str()) {
            let allowed = OBJECT_FIELDS.iter().copied().chain(property_names(schema));
            check.unknown(entry, &entry.key, allowed);
        }
    }
    check.metadata(document);
    check.required(document, document.place, schema, "");
    check.problems
}

struct Check {
    problems: Vec<Problem>,
}

impl Check {
    /// `place` is where the field's key stands, which is what people look for.
    fn value(&mut self, node: &Node, place: Place, schema: &Json, path: &str) {
        if matches!(node.value, Value::Null) {
            return;
        }
        if flag(schema, "x-kubernetes-int-or-string") {
            return self.quantity(node, path);
        }
        match (schema.get("type").and_then(Json::as_str), &node.value) {
            (Some("object"), Value::Map(entries)) => self.object(node, entries, place, schema, path),
            (Some("array"), Value::List(items)) => self.list(node, items, schema, path),
            (Some("string"), Value::Text(text)) => self.text(node, text, schema, path),
            (Some("integer"), Value::Integer(number)) => self.integer(node, *number, schema, path),
            (Some("boolean"), Value::Bool(_)) | (None, _) => {}
            (Some(expected), value) => {
                let unquoted = expected == "string" && matches!(value, Value::Bool(_));
                let hint = if unquoted { "; unquoted, YAML takes it for true or false" } else { "" };
                self.fault(node.place, path, mismatch(expected, schema) + hint);
            }
        }
    }

    fn object(&mut self, node: &Node, entries: &[Entry], place: Place, schema: &Json, path: &str) {
        for entry in entries {
            let path = join(path, &entry.key);
            let values = schema.get("additionalProperties").filter(|values| values.is_object());
            match property(schema, &entry.key).or(values) {
                Some(field) => self.value(&entry.value, entry.key_place, field, &path),
                None => self.unknown(entry, &path, property_names(schema)),
            }
        }
        if let Some(most) = bound(schema, "maxProperties").filter(|most| entries.len() as i64 > *most) {
            self.fault(place, path, format!("has {} entries; allowed: at most {most}", entries.len()));
        }
        self.required(node, place, schema, path);
    }

    fn required(&mut self, node: &Node, place: Place, schema: &Json, path: &str) {
        let required = schema.get("required").and_then(Json::as_array);
        for field in required.into_iter().flatten().filter_map(Json::as_str) {
            if node.child(field).is_none_or(|child| matches!(child.value, Value::Null)) {
                let hint = property(schema, field).map(allowed_values).unwrap_or_default();
                self.fault(place, &join(path, field), format!("is missing{hint}"));
            }
        }
    }

    fn list(&mut self, node: &Node, items: &[Node], schema: &Json, path: &str) {
        if let Some(least) = bound(schema, "minItems").filter(|least| (items.len() as i64) < *least) {
            self.fault(node.place, path, format!("has {} entries; allowed: at least {least}", items.len()));
        }
        if let Some(most) = bound(schema, "maxItems").filter(|most| items.len() as i64 > *most) {
            self.fault(node.place, path, format!("has {} entries; allowed: at most {most}", items.len()));
        }
        if let Some(item_schema) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                self.value(item, item.place, item_schema, &format!("{path}[{index}]"));
            }
        }
    }

    fn text(&mut self, node: &Node, text: &str, schema: &Json, path: &str) {
        let choices = choices(schema);
        if !choices.is_empty() && !choices.contains(&text) {
            let near = near(text, choices.iter().copied()).map(|near| format!("; did you mean {near}?"));
            let message =
                format!("\"{text}\" is not known{}{}", allowed_values(schema), near.unwrap_or_default());
            return self.fault(node.place, path, message);
        }
        let length = text.chars().count() as i64;
        if bound(schema, "minLength").is_some_and(|least| length < least) {
            self.fault(node.place, path, "is empty".to_owned());
        }
        if let Some(most) = bound(schema, "maxLength").filter(|most| length > *most) {
            self.fault(node.place, path, format!("has {length} characters; allowed: at most {most}"));
        }
    }

    fn integer(&mut self, node: &Node, number: i64, schema: &Json, path: &str) {
        let (least, most) = (bound(schema, "minimum"), bound(schema, "maximum"));
        if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
            self.fault(node.place, path, format!("{number} is out of range{}", allowed_range(schema)));
        }
    }

    fn quantity(&mut self, node: &Node, path: &str) {
        let text = match &node.value {
            Value::Text(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            _ => String::new(),
        };
        if let Err(error) = text.parse::<Quantity>() {
            self.fault(node.place, path, error.to_string());
        }
    }

    /// The fields of `metadata` that are used; the API server alone knows the others.
    fn metadata(&mut self, document: &Node) {
        let Some(metadata) = document.child("metadata") else {
            return self.fault(document.place, "metadata.name", "is missing".to_owned());
        };
        for field in ["name", "namespace", "uid"] {
            match metadata.child(field).map(|node| (&node.value, node.place)) {
                Some((Value::Text(_), _)) => {}
                Some((Value::Null, place)) if field == "name" => {
                    self.fault(place, "metadata.name", "is missing".to_owned());
                }
                None if field == "name" => {
                    self.fault(document.place_of("metadata"), "metadata.name", "is missing".to_owned());
                }
                Some((Value::Null, _)) | None => {}
                Some((_, place)) => {
                    self.fault(place, &format!("metadata.{field}"), "must be a string".to_owned())
                }
            }
        }
    }

    fn unknown<'a>(&mut self, entry: &Entry, path: &str, allowed: impl Iterator<Item = &'a str>) {
        let mut allowed: Vec<&str> = allowed.collect();
        allowed.sort_unstable();
        let near = near(&entry.key, allowed.iter().copied());
        let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        self.fault(entry.key_place, path, format!("unknown field; allowed: {}{near}", allowed.join(", ")));
    }

    fn fault(&mut self, place: Place, path: &str, message: String) {
        self.problems.push(Problem { place: Some(place), path: path.to_owned(), message });
    }
}

fn mismatch(expected: &str, schema: &Json) -> String {
    let noun = match expected {
        "object" => "a map",
        "array" => "a list",
        "integer" => "a whole number",
        "boolean" => "true or false",
        _ => "a string",
    };
    format!("must be {noun}{}{}", allowed_values(schema), allowed_range(schema))
}

fn allowed_values(schema: &Json) -> String {
    let choices = choices(schema);
    if choices.is_empty() { String::new() } else { format!("; allowed: {}", choices.join(", ")) }
}

fn allowed_range(schema: &Json) -> String {
    match (bound(schema, "minimum"), bound(schema, "maximum")) {
        (Some(least), Some(most)) => format!("; allowed: {least} to {most}"),
        (Some(least), None) => format!("; allowed: {least} or more"),
        (None, Some(most)) => format!("; allowed: {most} or less"),
        (None, None) => String::new(),
    }
}

fn choices(schema: &Json) -> Vec<&str> {
    schema.get("enum").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str).collect()
}

fn property<'a>(schema: &'a Json, name: &str) -> Option<&'a Json> {
    schema.get("properties")?.get(name)
}

fn property_names(schema: &Json) -> impl Iterator<Item = &str> {
    schema.get("properties").and_then(Json::as_object).into_iter().flatten().map(|(name, _)| name.as_str())
}

/// Bounds may be written as 1.0.
fn bound(schema: &Json, keyword: &str) -> Option<i64> {
    let bound = schema.get(keyword)?;
    bound.as_i64().or_else(|| bound.as_f64().map(|bound| bound as i64))
}

fn flag(schema: &Json, keyword: &str) -> bool {
    schema.get(keyword).and_then(Json::as_bool).unwrap_or(false)
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// The allowed name that was most likely meant: equal but for case, or at most two edits away.
fn near<'a>(given: &str, allowed: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let given = given.to_lowercase();
    let distance = |name: &str| edits(&given, &name.to_lowercase());
    allowed.map(|name| (distance(name), name)).filter(|(edits, _)| *edits <= 2).min().map(|(_, name)| name)
}

/// Levenshtein distance. Names are short; a long one is simply far away.
fn edits(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}
