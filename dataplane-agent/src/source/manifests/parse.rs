//! Parses the text of a file into declarations of objects. Pure; accepts any text.
//!
//! Documents are independent: an invalid one does not affect the others. What a document says about
//! an object is a [`Declaration`]; a document that does not identify its object makes the file
//! [`incomplete`](Content::incomplete).

use std::sync::Arc;

use serde_json::Value;

use crate::{
    source::objects::{FieldError, Kind},
    state::{Object, ObjectKey},
};

/// Similarity (1 = equal) from which an unknown kind counts as a misspelt one.
const SIMILARITY_MIN: f64 = 0.7;

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// The parsed content of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// In file order.
    pub declarations: Vec<(ObjectKey, Declaration)>,
    pub problems: Vec<FileProblem>,
    /// Some object of the file could not be identified: an object missing from `declarations` may
    /// still exist.
    pub incomplete: bool,
}

/// What a document says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Declaration {
    /// A valid object.
    Valid(Arc<Object>),
    /// An object the agent does not use, such as a headless Service.
    Unused,
    /// An invalid object.
    Invalid,
}

/// A problem in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileProblem {
    /// Document and object; empty for the file itself.
    pub subject: String,
    pub message: String,
}

/// Position in a file, counted from 1.
#[derive(Clone, Copy, Debug)]
struct Position {
    /// `None`: the file has one document.
    document: Option<usize>,
    /// Item of a List.
    item: Option<usize>,
}

/// Parses a file of this format.
pub(super) fn parse(format: Format, text: &str) -> Content {
    let documents = match format {
        Format::Yaml => yaml(text),
        Format::Json => json(text),
    };
    let several = documents.len() > 1;
    let mut content = Content::default();
    for (index, document) in documents.into_iter().enumerate() {
        let position = Position { document: several.then_some(index + 1), item: None };
        match document {
            Ok(value) => content.add_value(position, value, None),
            Err(message) => content.add_unidentified(position, message),
        }
    }
    content
}

impl Content {
    /// The content of a file that cannot be read.
    pub(super) fn unreadable(message: String) -> Self {
        let problems = vec![FileProblem { subject: String::new(), message }];
        Self { declarations: Vec::new(), problems, incomplete: true }
    }

    /// Adds a value of the file. `inherited` is the kind of an item of a typed list, which does not
    /// repeat it.
    fn add_value(&mut self, position: Position, value: Value, inherited: Option<Kind>) {
        let mut object = match value {
            Value::Null => return,
            Value::Object(object) => object,
            other => {
                let message = format!("expected an object, found {}", type_name(&other));
                return self.add_unidentified(position, message);
            }
        };
        let text = |field: &str| object.get(field).and_then(Value::as_str).map(str::to_owned);
        if let Some(kind) = inherited {
            return self.add_object(position, kind, Value::Object(object));
        }
        let (api_version, Some(kind)) = (text("apiVersion"), text("kind")) else {
            return self.add_unidentified(position, "kind: missing".to_owned());
        };
        let api_version = api_version.unwrap_or_default();
        if let Some(kind) = kind.strip_suffix("List") {
            let of = Kind::from_name(kind);
            if of.is_some() || kind.is_empty() {
                return self.add_list(position, object.remove("items"), of);
            }
        }
        self.add_by_kind(position, &api_version, &kind, Value::Object(object));
    }

    fn add_list(&mut self, position: Position, items: Option<Value>, kind: Option<Kind>) {
        match items {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.add_value(Position { item: Some(index + 1), ..position }, item, kind);
                }
            }
            Some(other) => {
                self.add_unidentified(
                    position,
                    format!("items: expected a list, found {}", type_name(&other)),
                );
            }
        }
    }

    fn add_by_kind(&mut self, position: Position, api_version: &str, kind: &str, object: Value) {
        let group = |version: &str| version.rsplit_once('/').map(|(group, _)| group.to_owned());
        let known = Kind::ALL
            .into_iter()
            .filter(|known| api_version.is_empty() || group(known.api_version()) == group(api_version));
        let closest = known
            .map(|known| (strsim::normalized_damerau_levenshtein(known.name(), kind), known))
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        match closest {
            Some((_, known)) if known.name() == kind && known.api_version() == api_version => {
                self.add_object(position, known, object);
            }
            Some((_, known)) if known.name() == kind => {
                let reason =
                    if api_version.is_empty() { "missing".to_owned() } else { format!("{api_version:?}") };
                let reason = format!("{reason}; {kind} is read in version {}", known.api_version());
                self.add_invalid(position, known, &object, &FieldError::new("apiVersion", reason));
            }
            _ if api_version == "v1" && kind == "Endpoints" => {
                let message = "kind: Endpoints is not supported; use EndpointSlice".to_owned();
                self.add_problem(position, &describe(kind, &object), message);
            }
            // the object of the intended kind may still exist
            Some((similarity, known)) if similarity >= SIMILARITY_MIN => {
                let reason = format!("{kind:?} is unknown: did you mean {}?", known.name());
                self.add_invalid(position, known, &object, &FieldError::new("kind", reason));
            }
            _ => {
                let message = format!(
                    "kind: {api_version} {kind} is not supported; supported kinds: Node, Namespace, Service, EndpointSlice, Pod, ServiceCIDR"
                );
                self.add_problem(position, &describe(kind, &object), message);
            }
        }
    }

    fn add_object(&mut self, position: Position, kind: Kind, object: Value) {
        let Some(key) = key(kind, &object) else {
            return self.add_unidentified(position, format!("{}: metadata.name: missing", kind.name()));
        };
        match kind.convert(object) {
            Ok(converted) => {
                for problem in converted.problems {
                    self.add_problem(position, &key.to_string(), problem.to_string());
                }
                let declaration = converted
                    .object
                    .map_or(Declaration::Unused, |object| Declaration::Valid(Arc::new(object)));
                self.declarations.push((key, declaration));
            }
            Err(error) => {
                self.add_problem(position, &key.to_string(), error.to_string());
                self.declarations.push((key, Declaration::Invalid));
            }
        }
    }

    fn add_invalid(&mut self, position: Position, kind: Kind, object: &Value, error: &FieldError) {
        let Some(key) = key(kind, object) else {
            return self.add_unidentified(position, error.to_string());
        };
        self.add_problem(position, &key.to_string(), error.to_string());
        self.declarations.push((key, Declaration::Invalid));
    }

    fn add_unidentified(&mut self, position: Position, message: String) {
        self.incomplete = true;
        self.add_problem(position, "", message);
    }

    fn add_problem(&mut self, position: Position, object: &str, message: String) {
        let mut subject = String::new();
        for (label, number) in [("document", position.document), ("item", position.item)] {
            if let Some(number) = number {
                let separator = if subject.is_empty() { "" } else { ", " };
                subject += &format!("{separator}{label} {number}");
            }
        }
        if !object.is_empty() {
            subject += if subject.is_empty() { "" } else { ": " };
            subject += object;
        }
        self.problems.push(FileProblem { subject, message });
    }
}

fn key(kind: Kind, object: &Value) -> Option<ObjectKey> {
    let metadata = object.get("metadata")?;
    let name = metadata.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let namespace = metadata.get("namespace").and_then(Value::as_str).unwrap_or("default");
    Some(kind.key(namespace, name))
}

/// Kind, namespace and name of any object, as far as present.
fn describe(kind: &str, object: &Value) -> String {
    let text = |field: &str| object.get("metadata")?.get(field)?.as_str();
    match (text("namespace"), text("name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        _ => kind.to_owned(),
    }
}

const fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Parses concatenated JSON values. Nothing after an invalid one can be told apart.
fn json(text: &str) -> Vec<Result<Value, String>> {
    serde_json::Deserializer::from_str(text)
        .into_iter()
        .map(|value| value.map_err(|error| error.to_string()))
        .collect()
}

/// Splits the text into documents, because the parser cannot continue after an invalid one.
fn yaml(text: &str) -> Vec<Result<Value, String>> {
    let mut documents = Vec::new();
    let (mut document, mut first_line) = (String::new(), 0);
    for (number, line) in text.lines().enumerate() {
        // neither can start a line inside a document, not even in a block scalar (YAML 1.2 §9.1.2)
        if let Some(rest) = marker(line, "---").or_else(|| marker(line, "...")) {
            documents.push((std::mem::take(&mut document), first_line));
            first_line = number;
            // content may follow the marker on its line, in the same column
            document.push_str("   ");
            document.push_str(rest);
        } else if !(line.starts_with('%') && is_blank(&document)) {
            document.push_str(line);
        }
        document.push('\n');
    }
    documents.push((document, first_line));
    documents
        .into_iter()
        .filter(|(document, _)| !is_blank(document))
        .map(|(document, first_line)| yaml_document(&document, first_line))
        .collect()
}

fn marker<'a>(line: &'a str, marker: &str) -> Option<&'a str> {
    line.strip_prefix(marker).filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r']))
}

/// Only comments and empty lines.
fn is_blank(document: &str) -> bool {
    document.lines().map(str::trim_start).all(|line| line.is_empty() || line.starts_with('#'))
}

fn yaml_document(document: &str, first_line: usize) -> Result<Value, String> {
    // this type rejects duplicate keys; serde_json's takes the last
    let value = match serde_norway::from_str::<serde_norway::Value>(document) {
        Ok(value) => value,
        Err(error) => {
            // parse again at its line in the file, for the line number in the message
            let padded = "\n".repeat(first_line) + document;
            let error = serde_norway::from_str::<serde_norway::Value>(&padded).err().unwrap_or(error);
            return Err(error.to_string());
        }
    };
    serde_json::to_value(value).map_err(|error| error.to_string())
}
