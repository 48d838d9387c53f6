//! Reads the YAML file: flattens it to dotted keys, and passes each value to [`Settings::fill`] as
//! text.

use std::{collections::BTreeMap, fs, path::Path};

use serde_norway::Value;

use super::{
    ConfigError,
    keys::{FillError, KEYS, Settings},
};

/// Similarity above which a key is suggested for an unknown one (1: equal).
const SUGGESTION_THRESHOLD: f64 = 0.6;

/// Fills keys that no flag or variable has set, and returns their values.
pub(super) fn fill(settings: &mut Settings, path: &Path) -> Result<BTreeMap<String, String>, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    let root =
        serde_norway::from_str(&text).map_err(|source| ConfigError::Syntax { path: path.into(), source })?;
    if !matches!(root, Value::Null | Value::Mapping(_)) {
        return Err(ConfigError::NoMapping { path: path.into(), found: type_name(&root) });
    }
    let mut values = BTreeMap::new();
    walk("", &root, &mut |key, value| {
        values.extend(set(settings, path, key, value)?.map(|text| (key.to_owned(), text)));
        Ok(())
    })?;
    Ok(values)
}

/// Calls `leaf` for every value that is not a mapping.
fn walk<E>(at: &str, value: &Value, leaf: &mut impl FnMut(&str, &Value) -> Result<(), E>) -> Result<(), E> {
    match value {
        Value::Mapping(mapping) => {
            for (name, value) in mapping {
                let name = scalar(name).unwrap_or_else(|| type_name(name).to_owned());
                let key = if at.is_empty() { name } else { format!("{at}.{name}") };
                walk(&key, value, leaf)?;
            }
            Ok(())
        }
        // an empty file, or a section whose keys are all commented out
        Value::Null if at.is_empty() || in_section(at).next().is_some() => Ok(()),
        value => leaf(at, value),
    }
}

/// Returns the value as text, unless a flag or variable overrides it.
fn set(
    settings: &mut Settings,
    path: &Path,
    key: &str,
    value: &Value,
) -> Result<Option<String>, ConfigError> {
    if !KEYS.contains(&key) {
        return Err(ConfigError::UnknownKey { path: path.into(), key: key.to_owned(), hint: hint(key) });
    }
    let invalid = |reason| ConfigError::Form { path: path.into(), key: key.to_owned(), reason };
    let text = match value {
        Value::Null => return Err(invalid("has no value; remove the key to use its default".to_owned())),
        Value::Sequence(items) => {
            let items: Option<Vec<_>> = items.iter().map(scalar).collect();
            items
                .ok_or_else(|| {
                    invalid("must be a list of plain values; quote those that begin with ! or *".to_owned())
                })?
                .join(",")
        }
        value => scalar(value)
            .ok_or_else(|| invalid(format!("must be a plain value or a list, not {}", type_name(value))))?,
    };
    match settings.fill(key, &text) {
        Ok(is_used) => Ok(is_used.then_some(text)),
        Err(FillError::Unknown) => {
            Err(ConfigError::UnknownKey { path: path.into(), key: key.to_owned(), hint: hint(key) })
        }
        Err(FillError::Invalid(reason)) => {
            Err(ConfigError::Value { path: path.into(), key: key.to_owned(), value: text, reason })
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(value) => Some(value.to_string()),
        Value::String(value) => Some(value.clone()),
        _ => None,
    }
}

/// Help for an unknown key: the most similar one, or the keys of its section.
fn hint(key: &str) -> String {
    if in_section(key).next().is_some() {
        return format!("it is a section with the keys {}", list(in_section(key)));
    }
    if let Some(similar) = most_similar(key) {
        return format!("did you mean {similar}?");
    }
    match key.split_once('.') {
        Some((section, _)) if in_section(section).next().is_some() => {
            format!("section {section} has the keys {}", list(in_section(section)))
        }
        _ => format!("known keys are {}", list(KEYS.into_iter())),
    }
}

fn most_similar(key: &str) -> Option<&'static str> {
    // the right name in the wrong section
    let name = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let mut same_name = KEYS.into_iter().filter(|known| name(known) == name(key));
    if let (Some(known), None) = (same_name.next(), same_name.next()) {
        return Some(known);
    }
    KEYS.into_iter()
        .map(|known| (strsim::normalized_damerau_levenshtein(known, key), known))
        .filter(|(similarity, _)| *similarity >= SUGGESTION_THRESHOLD)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}

fn in_section(section: &str) -> impl Iterator<Item = &'static str> {
    KEYS.into_iter().filter(move |key| key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.')))
}

fn list(keys: impl Iterator<Item = &'static str>) -> String {
    keys.collect::<Vec<_>>().join(", ")
}

const fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "a mapping",
        Value::Tagged(_) => "a tagged value",
    }
}
