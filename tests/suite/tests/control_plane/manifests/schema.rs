//! JSON Schema, as far as the chart's schema uses it: a word it does not know is an error, so that the schema cannot say
//! more than is checked. `helm` itself applies the whole of it.

use anyhow::{Context as _, Result, bail};
use regex::Regex;
use serde_json::Value;

/// Words that constrain nothing.
const SILENT: [&str; 3] = ["$schema", "title", "definitions"];

/// What is wrong with a value, each with its place; nothing if it is as the schema wants it.
pub(crate) fn violations(schema: &Value, value: &Value) -> Result<Vec<String>> {
    let mut found = Vec::new();
    visit(schema, schema, value, "values", &mut found)?;
    Ok(found)
}

fn visit(root: &Value, schema: &Value, value: &Value, place: &str, found: &mut Vec<String>) -> Result<()> {
    let words = schema.as_object().with_context(|| format!("{place}: {schema} is no schema"))?;
    for (word, rule) in words {
        let holds = match word.as_str() {
            "$ref" => {
                let pointer = rule.as_str().and_then(|rule| rule.strip_prefix('#')).unwrap_or_default();
                let target =
                    root.pointer(pointer).with_context(|| format!("{place}: {rule} leads nowhere"))?;
                visit(root, target, value, place, found)?;
                true
            }
            "type" => is_of(rule, value)?,
            "enum" => rule.as_array().is_some_and(|allowed| allowed.contains(value)),
            "const" => rule == value,
            "pattern" => {
                let pattern = Regex::new(rule.as_str().unwrap_or_default())?;
                value.as_str().is_none_or(|text| pattern.is_match(text))
            }
            "minimum" => value.as_i64().is_none_or(|number| rule.as_i64() <= Some(number)),
            "maximum" => value.as_i64().is_none_or(|number| rule.as_i64() >= Some(number)),
            "minLength" => {
                value.as_str().is_none_or(|text| rule.as_u64() <= Some(text.chars().count() as u64))
            }
            "minItems" => value.as_array().is_none_or(|items| rule.as_u64() <= Some(items.len() as u64)),
            "maxItems" => value.as_array().is_none_or(|items| rule.as_u64() >= Some(items.len() as u64)),
            "required" => rule.as_array().into_iter().flatten().all(|name| {
                value.as_object().is_none_or(|fields| fields.contains_key(name.as_str().unwrap_or_default()))
            }),
            "items" => {
                for (at, item) in value.as_array().into_iter().flatten().enumerate() {
                    visit(root, rule, item, &format!("{place}[{at}]"), found)?;
                }
                true
            }
            "contains" => {
                let mut any = !value.is_array();
                for item in value.as_array().into_iter().flatten() {
                    any |= is_valid(root, rule, item)?;
                }
                any
            }
            "anyOf" => {
                let mut any = false;
                for choice in rule.as_array().into_iter().flatten() {
                    any |= is_valid(root, choice, value)?;
                }
                any
            }
            "properties" => {
                for (name, rule) in rule.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        visit(root, rule, value, &format!("{place}.{name}"), found)?;
                    }
                }
                true
            }
            "additionalProperties" => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    if schema["properties"].get(name).is_some() {
                        continue;
                    }
                    if *rule == Value::Bool(false) {
                        found.push(format!("{place}.{name}: there is no such value"));
                    } else {
                        visit(root, rule, value, &format!("{place}.{name}"), found)?;
                    }
                }
                true
            }
            word if SILENT.contains(&word) => true,
            _ => bail!("{place}: the schema says {word}, which is not checked here"),
        };
        if !holds {
            found.push(format!("{place}: {value} is against {word} {rule}"));
        }
    }
    Ok(())
}

fn is_valid(root: &Value, schema: &Value, value: &Value) -> Result<bool> {
    let mut found = Vec::new();
    visit(root, schema, value, "", &mut found)?;
    Ok(found.is_empty())
}

fn is_of(kind: &Value, value: &Value) -> Result<bool> {
    Ok(match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        _ => bail!("the schema names a type {kind}, which is not known here"),
    })
}
