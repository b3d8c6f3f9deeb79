//! YAML with places: documents of a file, and trees that know where each value stands.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::{Place, Problem};

/// One value and where it begins. Not `Debug` in full: it may hold secrets.
pub(super) struct Node {
    pub place: Place,
    pub value: Value,
}

pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    /// A number that is no `i64`.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

pub(super) struct Entry {
    pub key: String,
    pub key_place: Place,
    pub value: Node,
}

/// The documents of `text` that hold something. Places count from the start of the file.
pub(super) fn documents(text: &str) -> Result<Vec<Node>, Problem> {
    let mut documents = Vec::new();
    for (first_line, part) in split(text) {
        // Spaces in place of what stands before keep the parser's line numbers those of the file.
        let padded = "\n".repeat(first_line) + part;
        let parsed: Spanned<Value> = serde_saphyr::from_str(&padded).map_err(|error| problem(&error))?;
        if !matches!(parsed.value, Value::Null) {
            documents.push(Node::from(parsed));
        }
    }
    Ok(documents)
}

/// The text of each document with its first line's index. YAML forbids a line that starts with
/// `---` or `...` inside any scalar (production c-forbidden), so lines are all there is to look at.
fn split(text: &str) -> Vec<(usize, &str)> {
    let marks = |line: &str, mark: &str| {
        line.strip_prefix(mark)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = at + line.len();
        if marks(line, "---") {
            parts.push((start_line, &text[start..at]));
            (start, start_line) = (at, index);
        } else if marks(line, "...") {
            parts.push((start_line, &text[start..at]));
            (start, start_line) = (end, index + 1);
        }
        at = end;
    }
    parts.push((start_line, &text[start..]));
    let holds_something = |part: &str| {
        part.lines().any(|line| {
            !matches!(line.trim_start().as_bytes().first(), None | Some(b'#')) && line.trim() != "---"
        })
    };
    parts.retain(|(_, part)| holds_something(part));
    parts
}

fn problem(error: &serde_saphyr::Error) -> Problem {
    let error = error.without_snippet();
    let place = error.location().map(|location| Place { line: location.line(), column: location.column() });
    let message = match error {
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("\"{key}\" is given twice")
        }
        // The parser's text ends with the place, which is said already.
        other => {
            let text = other.to_string();
            let text = text.split(" at line ").next().unwrap_or_default().trim_end_matches([',', ' ']);
            format!("not YAML: {}", text.replace('\n', " "))
        }
    };
    Problem { place, path: String::new(), message }
}

impl Node {
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    pub fn child(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    }

    /// The text of a string field.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.child(key)?.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A scalar as text; numbers and booleans as JSON writes them.
    pub fn scalar_text(&self) -> Option<String> {
        match &self.value {
            Value::Text(text) => Some(text.clone()),
            Value::Bool(value) => Some(value.to_string()),
            Value::Integer(value) => Some(value.to_string()),
            Value::Float(value) => Some(value.to_string()),
            Value::Null | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// Where the field of that path stands, or else the nearest that it would stand in.
    pub fn place_of(&self, path: &str) -> Place {
        let (mut node, mut place) = (self, self.place);
        for step in path.split(['.', '[', ']']).filter(|step| !step.is_empty()) {
            match &node.value {
                Value::Map(entries) => {
                    // Keys of free maps may hold dots; then the map's own place is near enough.
                    let Some(entry) = entries.iter().find(|entry| entry.key == step) else { break };
                    (node, place) = (&entry.value, entry.key_place);
                }
                Value::List(items) => {
                    let Some(item) = step.parse::<usize>().ok().and_then(|index| items.get(index)) else {
                        break;
                    };
                    (node, place) = (item, item.place);
                }
                _ => break,
            }
        }
        place
    }

    /// Without the nulls of maps: as on the API server, `field:` is a field that is not there.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(text) => text.clone().into(),
            Value::List(items) => items.iter().map(Node::to_json).collect(),
            Value::Map(entries) => entries
                .iter()
                .filter(|entry| !matches!(entry.value.value, Value::Null))
                .map(|entry| (entry.key.clone(), entry.value.to_json()))
                .collect(),
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({}:{})", self.place.line, self.place.column)
    }
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        Self { place: place(spanned.referenced), value: spanned.value }
    }
}

fn place(location: serde_saphyr::Location) -> Place {
    Place { line: location.line(), column: location.column() }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E: de::Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
                deserializer.deserialize_any(self)
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Integer(value))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
                Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
            }

            fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
                Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
            }

            fn visit_u128<E: de::Error>(self, value: u128) -> Result<Value, E> {
                Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
                Ok(Value::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element::<Spanned<Value>>()? {
                    list.push(item.into());
                }
                Ok(Value::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
                let mut map = Vec::new();
                while let Some(key) = fields.next_key::<Spanned<String>>()? {
                    map.push(Entry {
                        key_place: place(key.referenced),
                        key: key.value,
                        value: fields.next_value::<Spanned<Value>>()?.into(),
                    });
                }
                Ok(Value::Map(map))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
