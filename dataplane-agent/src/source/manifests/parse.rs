//! The text of a file → what it says of which objects. Pure; any text gives an answer.
//!
//! Each document stands for itself: a broken one says nothing of the others. What a document says of an object is a
//! [`Claim`]; a document of which not even the object is known makes the file [`opaque`](Content::opaque).

use std::sync::Arc;

use serde_json::Value;

use crate::{
    source::objects::{FieldError, Kind},
    state::{Object, ObjectKey},
};

/// How alike a kind is to the one that was meant (1 = the same).
const ALIKE: f64 = 0.7;

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// In the order of the file.
    pub claims: Vec<(ObjectKey, Claim)>,
    pub complaints: Vec<Complaint>,
    /// Some object of the file cannot be told: one that is missing may not be gone.
    pub opaque: bool,
}

/// What is said of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is this.
    Is(Arc<Object>),
    /// It asks for nothing (a headless service).
    Nothing,
    /// It cannot be what it says.
    Broken,
}

/// Something wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Complaint {
    /// Document and object; empty: the file.
    pub subject: String,
    pub message: String,
}

/// Where in a file, counted from 1.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// `None`: there is only one.
    document: Option<usize>,
    /// Of a List.
    item: Option<usize>,
}

/// What a file of this format says.
pub(super) fn parse(format: Format, text: &str) -> Content {
    let documents = match format {
        Format::Yaml => yaml(text),
        Format::Json => json(text),
    };
    let several = documents.len() > 1;
    let mut content = Content::default();
    for (index, document) in documents.into_iter().enumerate() {
        let place = Place { document: several.then_some(index + 1), item: None };
        match document {
            Ok(value) => content.take(place, value, None),
            Err(message) => content.complain_of_unknown(place, message),
        }
    }
    content
}

impl Content {
    /// A file that cannot be read.
    pub(super) fn unreadable(message: String) -> Self {
        let complaints = vec![Complaint { subject: String::new(), message }];
        Self { claims: Vec::new(), complaints, opaque: true }
    }

    /// Takes up a value of the file. `inherited` is the kind of an item of a typed list, which does not say it itself.
    fn take(&mut self, place: Place, value: Value, inherited: Option<Kind>) {
        let mut object = match value {
            Value::Null => return,
            Value::Object(object) => object,
            other => {
                let message = format!("expected an object, found {}", form(&other));
                return self.complain_of_unknown(place, message);
            }
        };
        let text = |field: &str| object.get(field).and_then(Value::as_str).map(str::to_owned);
        if let Some(kind) = inherited {
            return self.take_object(place, kind, Value::Object(object));
        }
        let (api_version, Some(kind)) = (text("apiVersion"), text("kind")) else {
            return self.complain_of_unknown(place, "kind: missing".to_owned());
        };
        let api_version = api_version.unwrap_or_default();
        if let Some(kind) = kind.strip_suffix("List") {
            let of = Kind::from_name(kind);
            if of.is_some() || kind.is_empty() {
                return self.take_list(place, object.remove("items"), of);
            }
        }
        self.take_kind(place, &api_version, &kind, Value::Object(object));
    }

    fn take_list(&mut self, place: Place, items: Option<Value>, kind: Option<Kind>) {
        match items {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.take(Place { item: Some(index + 1), ..place }, item, kind);
                }
            }
            Some(other) => {
                self.complain_of_unknown(place, format!("items: expected a list, found {}", form(&other)));
            }
        }
    }

    fn take_kind(&mut self, place: Place, api_version: &str, kind: &str, object: Value) {
        let group = |version: &str| version.rsplit_once('/').map(|(group, _)| group.to_owned());
        let known = Kind::ALL
            .into_iter()
            .filter(|known| api_version.is_empty() || group(known.api_version()) == group(api_version));
        let meant = known
            .map(|known| (strsim::normalized_damerau_levenshtein(known.name(), kind), known))
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        match meant {
            Some((_, known)) if known.name() == kind && known.api_version() == api_version => {
                self.take_object(place, known, object);
            }
            Some((_, known)) if known.name() == kind => {
                let reason =
                    if api_version.is_empty() { "missing".to_owned() } else { format!("{api_version:?}") };
                let reason = format!("{reason}; {kind} is read as {}", known.api_version());
                self.broken(place, known, &object, &FieldError::new("apiVersion", reason));
            }
            _ if api_version == "v1" && kind == "Endpoints" => {
                let message = "kind: Endpoints is not supported; EndpointSlice is".to_owned();
                self.complain(place, &named(kind, &object), message);
            }
            // the object that was meant is not gone
            Some((alike, known)) if alike >= ALIKE => {
                let reason = format!("{kind:?} is unknown: is {} meant?", known.name());
                self.broken(place, known, &object, &FieldError::new("kind", reason));
            }
            _ => {
                let message = format!(
                    "kind: {api_version} {kind} is unknown; Node, Namespace, Service, EndpointSlice, Pod and ServiceCIDR are read"
                );
                self.complain(place, &named(kind, &object), message);
            }
        }
    }

    fn take_object(&mut self, place: Place, kind: Kind, object: Value) {
        let Some(key) = key(kind, &object) else {
            return self.complain_of_unknown(place, format!("{}: metadata.name: missing", kind.name()));
        };
        match kind.convert(object) {
            Ok(converted) => {
                for problem in converted.problems {
                    self.complain(place, &key.to_string(), problem.to_string());
                }
                let claim = converted.object.map_or(Claim::Nothing, |object| Claim::Is(Arc::new(object)));
                self.claims.push((key, claim));
            }
            Err(error) => {
                self.complain(place, &key.to_string(), error.to_string());
                self.claims.push((key, Claim::Broken));
            }
        }
    }

    fn broken(&mut self, place: Place, kind: Kind, object: &Value, error: &FieldError) {
        let Some(key) = key(kind, object) else {
            return self.complain_of_unknown(place, error.to_string());
        };
        self.complain(place, &key.to_string(), error.to_string());
        self.claims.push((key, Claim::Broken));
    }

    fn complain_of_unknown(&mut self, place: Place, message: String) {
        self.opaque = true;
        self.complain(place, "", message);
    }

    fn complain(&mut self, place: Place, object: &str, message: String) {
        let mut subject = String::new();
        for (what, number) in [("document", place.document), ("item", place.item)] {
            if let Some(number) = number {
                let separator = if subject.is_empty() { "" } else { ", " };
                subject += &format!("{separator}{what} {number}");
            }
        }
        if !object.is_empty() {
            subject += if subject.is_empty() { "" } else { ": " };
            subject += object;
        }
        self.complaints.push(Complaint { subject, message });
    }
}

fn key(kind: Kind, object: &Value) -> Option<ObjectKey> {
    let metadata = object.get("metadata")?;
    let name = metadata.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let namespace = metadata.get("namespace").and_then(Value::as_str).unwrap_or("default");
    Some(kind.key(namespace, name))
}

/// An object of any kind, as far as it says who it is.
fn named(kind: &str, object: &Value) -> String {
    let text = |field: &str| object.get("metadata")?.get(field)?.as_str();
    match (text("namespace"), text("name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        _ => kind.to_owned(),
    }
}

const fn form(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// One value after another. Behind a broken one, nothing can be told apart any more.
fn json(text: &str) -> Vec<Result<Value, String>> {
    serde_json::Deserializer::from_str(text)
        .into_iter()
        .map(|value| value.map_err(|error| error.to_string()))
        .collect()
}

/// Document by document: the parser itself cannot go on behind a broken one.
fn yaml(text: &str) -> Vec<Result<Value, String>> {
    let mut documents = Vec::new();
    let (mut document, mut first_line) = (String::new(), 0);
    for (number, line) in text.lines().enumerate() {
        // neither can begin a line inside a document, not even in a block of text (YAML 1.2 §9.1.2)
        if let Some(rest) = marker(line, "---").or_else(|| marker(line, "...")) {
            documents.push((std::mem::take(&mut document), first_line));
            first_line = number;
            // content may follow on the marker's line, in its column
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
    // this type refuses a key that is given twice; serde_json's takes the last
    let value = match serde_norway::from_str::<serde_norway::Value>(document) {
        Ok(value) => value,
        Err(error) => {
            // parse once more where it stands in the file, for the line in the message
            let there = "\n".repeat(first_line) + document;
            let error = serde_norway::from_str::<serde_norway::Value>(&there).err().unwrap_or(error);
            return Err(error.to_string());
        }
    };
    serde_json::to_value(value).map_err(|error| error.to_string())
}
