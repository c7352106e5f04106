//! YAML as a tree that knows its lines.
//!
//! Invariants: nodes hold values of Secrets, so they have no `Debug`; a key that is given twice is in the tree twice,
//! for `structure` to say so; a syntax error ends the reading, what was read before stays.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess},
};
use serde_saphyr::{DuplicateKeyPolicy, Spanned};

/// Deepest nesting; our schemas have 8 levels.
const MAX_DEPTH: usize = 32;
/// Most nodes that aliases may add to a file.
const MAX_ALIASED: usize = 10_000;

/// A value and the line that it stands on, from 1.
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

/// What a node is.
pub(super) enum Value {
    Null,
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key of a map, its line and its value.
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) value: Node,
}

/// A document of a file and its number, from 1.
pub(super) struct Document {
    pub(super) number: usize,
    pub(super) root: Node,
}

/// YAML that cannot be read.
pub(super) struct SyntaxError {
    pub(super) document: usize,
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

/// One step from a node to one within it.
#[derive(Clone, Copy)]
pub(super) enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// The documents of a text, without empty ones, up to the first syntax error.
pub(super) fn read(text: &str) -> (Vec<Document>, Vec<SyntaxError>) {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: MAX_DEPTH, flow_nesting_limit: MAX_DEPTH },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIASED },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        reject_unsupported_tags: true,
        // A snippet would show the text around an error, which may be a Secret.
        with_snippet: false,
    };
    let markers = markers(text);
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    let mut reader = text.as_bytes();
    for result in serde_saphyr::read_with_options::<_, Node>(&mut reader, options) {
        match result {
            Ok(root) => documents.push(Document { number: document_at(&markers, root.line), root }),
            Err(error) => {
                let line = error.location().map(|location| location.line() as usize).filter(|line| *line > 0);
                let document = line.map_or(documents.len() + 1, |line| document_at(&markers, line));
                let message = format!("is no valid YAML: {}", without_location(&error.render(), line));
                errors.push(SyntaxError { document, line, message });
            }
        }
    }
    (documents, errors)
}

/// Lines on which documents begin with `---`, and line 1 if something stands before the first of them. No line of a
/// document can begin with a marker: YAML ends the document there.
fn markers(text: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let marker = line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        let nothing = line.trim_start().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%');
        if marker || (lines.is_empty() && !nothing) {
            lines.push(index + 1);
        }
    }
    lines
}

fn document_at(markers: &[usize], line: usize) -> usize {
    markers.partition_point(|marker| *marker <= line).max(1)
}

/// The parser's message without the place, which stands elsewhere.
fn without_location(message: &str, line: Option<usize>) -> String {
    let message = message.lines().next().unwrap_or_default();
    let place = line.and_then(|line| message.find(&format!("line {line}")));
    let message = place.map_or(message, |place| message[..place].trim_end_matches(" at ").trim_end());
    message.trim_end_matches([',', ':', ' ']).to_owned()
}

impl Node {
    /// The node at the end of the steps, if there is one.
    pub(super) fn find(&self, steps: &[Step<'_>]) -> Option<&Node> {
        steps.iter().try_fold(self, |node, step| node.child(*step).map(|(_, child)| child))
    }

    /// The line of the last node on the way that exists.
    pub(super) fn line_of(&self, steps: &[Step<'_>]) -> usize {
        let mut line = self.line;
        let mut node = self;
        for step in steps {
            match node.child(*step) {
                Some((at, child)) => (line, node) = (at, child),
                None => break,
            }
        }
        line
    }

    fn child(&self, step: Step<'_>) -> Option<(usize, &Node)> {
        match (step, &self.value) {
            (Step::Key(key), Value::Map(entries)) => {
                entries.iter().find(|entry| entry.key == key).map(|entry| (entry.line, &entry.value))
            }
            (Step::Index(index), Value::List(items)) => items.get(index).map(|item| (item.line, item)),
            _ => None,
        }
    }

    /// The value of a key of a map.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        self.child(Step::Key(key)).map(|(_, node)| node)
    }

    /// The text, if it is one.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// What it is, for messages.
    pub(super) fn type_name(&self) -> &'static str {
        match self.value {
            Value::Null => "empty",
            Value::Boolean(_) => "a boolean",
            Value::Integer(_) => "a number",
            Value::Float(_) => "a number with a point",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }

    /// The tree as JSON; of keys that are given twice, the first.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Boolean(value) => (*value).into(),
            // No field of ours takes more than 64 bits; the schema check has said so.
            Value::Integer(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                _ => serde_json::Value::Null,
            },
            Value::Float(value) => (*value).into(),
            Value::Text(text) => text.as_str().into(),
            Value::List(items) => items.iter().map(Node::to_json).collect(),
            Value::Map(entries) => {
                let mut map = serde_json::Map::new();
                for entry in entries {
                    map.entry(entry.key.as_str()).or_insert_with(|| entry.value.to_json());
                }
                map.into()
            }
        }
    }
}

/// Steps as people write them: `spec.sources[1].path`.
pub(super) fn render(steps: &[Step<'_>]) -> String {
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Index(index) => text.push_str(&format!("[{index}]")),
            // Label and annotation keys have dots and slashes of their own.
            Step::Key(key) if key.contains(['.', '/', '[']) => text.push_str(&format!("[{}]", key.escape_debug())),
            Step::Key(key) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.extend(key.escape_debug());
            }
        }
    }
    text
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: referenced.line() as usize, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> de::Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Value, E> {
        Ok(Value::Integer(i128::try_from(value).unwrap_or(i128::MAX)))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let line = key.referenced.line() as usize;
            entries.push(Entry { key: key.value, line, value: access.next_value()? });
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_keys_and_items_are_known() {
        let text = "# head\na:\n  b: 1\n  c:\n  - x: 1\n    y: 2\n  - x: 3\n";
        let (documents, errors) = read(text);
        assert!(errors.is_empty());
        let root = &documents[0].root;
        use Step::*;
        assert_eq!(root.line_of(&[Key("a")]), 2);
        assert_eq!(root.line_of(&[Key("a"), Key("b")]), 3);
        assert_eq!(root.line_of(&[Key("a"), Key("c")]), 4);
        assert_eq!(root.line_of(&[Key("a"), Key("c"), Index(0), Key("y")]), 6);
        assert_eq!(root.line_of(&[Key("a"), Key("c"), Index(1)]), 7);
        assert_eq!(root.line_of(&[Key("a"), Key("c"), Index(1), Key("none"), Key("more")]), 7);
        assert_eq!(root.to_json(), serde_json::json!({"a": {"b": 1, "c": [{"x": 1, "y": 2}, {"x": 3}]}}));
    }

    #[test]
    fn documents_are_numbered_as_people_count_them() {
        let numbers = |text| read(text).0.iter().map(|d| (d.number, d.root.line)).collect::<Vec<_>>();
        assert_eq!(numbers("a: 1\n---\nb: 1\n"), [(1, 1), (2, 3)]);
        assert_eq!(numbers("# comment\n\n---\na: 1\n---\n---\nb: 1\n---\n"), [(1, 4), (3, 7)]);
        assert_eq!(numbers("%YAML 1.2\n---\na: 1\n...\n---\nb: 1\n"), [(1, 3), (2, 6)]);
        assert_eq!(numbers("--- # first\na: |\n  text\n   --- no\n---\nb: 1\n"), [(1, 2), (2, 6)]);
        assert_eq!(numbers("--- {a: 1}\n--- {b: 1}\n"), [(1, 1), (2, 2)]);
        assert_eq!(numbers(""), []);
        assert_eq!(numbers("# nothing\n---\n"), []);
    }

    #[test]
    fn a_syntax_error_keeps_what_came_before() {
        let (documents, errors) = read("a: 1\n---\nb: [1, 2\nc: 3\n");
        assert_eq!(documents.len(), 1);
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].document, 2);
        assert!(errors[0].line.is_some());
    }

    #[test]
    fn the_parser_is_bounded() {
        let deep = format!("{}1{}", "[".repeat(40), "]".repeat(40));
        assert_eq!(read(&deep).1.len(), 1);
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            let item = format!("*a{}, ", level - 1).repeat(10);
            bomb.push_str(&format!("a{level}: &a{level} [{item}]\n"));
        }
        let (documents, errors) = read(&bomb);
        assert!(documents.is_empty());
        assert_eq!(errors.len(), 1);
    }

    #[test]
    fn steps_are_rendered_as_people_write_them() {
        use Step::*;
        assert_eq!(render(&[Key("spec"), Key("sources"), Index(1), Key("path")]), "spec.sources[1].path");
        assert_eq!(render(&[Key("metadata"), Key("labels"), Key("a.b/c")]), "metadata.labels[a.b/c]");
        assert_eq!(render(&[]), "");
    }
}
