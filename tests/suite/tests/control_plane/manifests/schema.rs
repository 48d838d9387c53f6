//! The part of JSON Schema that the chart's schema uses. An unknown keyword is an error, so that
//! the schema has no keyword that is not checked. `helm` itself implements the whole standard.

use anyhow::{Context as _, Result, bail};
use regex::Regex;
use serde_json::Value;

/// Keywords without a constraint.
const ANNOTATIONS: [&str; 3] = ["$schema", "title", "definitions"];

/// The violations of a value, each with its path.
pub(crate) fn violations(schema: &Value, value: &Value) -> Result<Vec<String>> {
    let mut found = Vec::new();
    visit(schema, schema, value, "values", &mut found)?;
    Ok(found)
}

fn visit(root: &Value, schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) -> Result<()> {
    let keywords = schema.as_object().with_context(|| format!("{path}: {schema} is not a schema"))?;
    for (keyword, rule) in keywords {
        let holds = match keyword.as_str() {
            "$ref" => {
                let pointer = rule.as_str().and_then(|rule| rule.strip_prefix('#')).unwrap_or_default();
                let target =
                    root.pointer(pointer).with_context(|| format!("{path}: {rule} does not exist"))?;
                visit(root, target, value, path, found)?;
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
                    visit(root, rule, item, &format!("{path}[{at}]"), found)?;
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
                        visit(root, rule, value, &format!("{path}.{name}"), found)?;
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
                        found.push(format!("{path}.{name}: unknown value"));
                    } else {
                        visit(root, rule, value, &format!("{path}.{name}"), found)?;
                    }
                }
                true
            }
            keyword if ANNOTATIONS.contains(&keyword) => true,
            _ => bail!("{path}: keyword {keyword} is not implemented in schema.rs"),
        };
        if !holds {
            found.push(format!("{path}: {value} violates {keyword} {rule}"));
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
        _ => bail!("type {kind} is not implemented in schema.rs"),
    })
}
