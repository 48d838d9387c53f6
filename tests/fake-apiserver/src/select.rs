//! Label and field selectors of lists and watches.

use serde_json::Value;

use super::failure::Failure;

/// The selectors of a request; empty: all objects match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

/// Supported fields of field selectors.
const FIELDS: [&str; 4] = ["metadata.name", "metadata.namespace", "spec.nodeName", "status.phase"];

impl Selector {
    /// Parses the query parameters `labelSelector` and `fieldSelector`.
    pub(super) fn parse(labels: &str, fields: &str) -> Result<Self, Failure> {
        let labels = split_requirements(labels).into_iter().map(parse_label).collect::<Result<_, _>>()?;
        let fields = split_requirements(fields).into_iter().map(parse_field).collect::<Result<_, _>>()?;
        Ok(Self { labels, fields })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str);
        let field = |key: &str| {
            let value = key.split('.').try_fold(object, |value, part| value.get(part));
            // a missing field equals the empty string
            Some(value.and_then(Value::as_str).unwrap_or_default())
        };
        self.labels.iter().all(|requirement| requirement.matches_value(label(&requirement.key)))
            && self.fields.iter().all(|requirement| requirement.matches_value(field(&requirement.key)))
    }

    /// Returns the name in a `metadata.name` field selector, for authorization by `resourceNames`.
    pub(super) fn name(&self) -> Option<&str> {
        self.fields.iter().find_map(|requirement| match &requirement.operator {
            Operator::In(values) if requirement.key == "metadata.name" => values.first().map(String::as_str),
            _ => None,
        })
    }
}

impl Requirement {
    fn matches_value(&self, value: Option<&str>) -> bool {
        match (&self.operator, value) {
            (Operator::In(values), Some(value)) => values.iter().any(|wanted| wanted == value),
            (Operator::NotIn(values), Some(value)) => values.iter().all(|unwanted| unwanted != value),
            (Operator::NotIn(_) | Operator::DoesNotExist, None) | (Operator::Exists, Some(_)) => true,
            (Operator::In(_) | Operator::Exists, None) | (Operator::DoesNotExist, Some(_)) => false,
        }
    }
}

/// Splits at commas outside of parentheses.
fn split_requirements(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let parts = text.split(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn parse_label(text: &str) -> Result<Requirement, Failure> {
    let requirement = |key: &str, operator| Ok(Requirement { key: key.trim().to_owned(), operator });
    for (word, is_in) in [(" notin ", false), (" in ", true)] {
        let Some((key, values)) = text.split_once(word) else { continue };
        let values = values.trim().strip_prefix('(').and_then(|values| values.strip_suffix(')'));
        let values = values.ok_or_else(|| parse_error("label", text))?;
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        return requirement(key, if is_in { Operator::In(values) } else { Operator::NotIn(values) });
    }
    match parse_equality(text) {
        Some((key, operator)) => requirement(key, operator),
        None => match text.strip_prefix('!') {
            Some(key) => requirement(key, Operator::DoesNotExist),
            None if text.contains(char::is_whitespace) => Err(parse_error("label", text)),
            None => requirement(text, Operator::Exists),
        },
    }
}

fn parse_field(text: &str) -> Result<Requirement, Failure> {
    let (key, operator) = parse_equality(text).ok_or_else(|| parse_error("field", text))?;
    if !FIELDS.contains(&key) {
        return Err(Failure::bad_request(format!("field label not supported: {key}")));
    }
    Ok(Requirement { key: key.to_owned(), operator })
}

fn parse_equality(text: &str) -> Option<(&str, Operator)> {
    for (sign, is_equal) in [("!=", false), ("==", true), ("=", true)] {
        if let Some((key, value)) = text.split_once(sign) {
            let values = vec![value.trim().to_owned()];
            let operator = if is_equal { Operator::In(values) } else { Operator::NotIn(values) };
            return Some((key.trim(), operator));
        }
    }
    None
}

fn parse_error(what: &str, text: &str) -> Failure {
    Failure::bad_request(format!("unable to parse requirement: {what} selector {text:?}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(labels: &str, fields: &str) -> bool {
        let object = json!({
            "metadata": {"name": "a", "labels": {"app": "web", "tier": "front"}},
            "spec": {"nodeName": "node1"},
        });
        Selector::parse(labels, fields).expect("a selector").matches(&object)
    }

    #[test]
    fn label_selectors_match_by_equality_and_by_set() {
        for yes in [
            "",
            "app=web",
            "app==web,tier!=back",
            "app in (db, web),tier",
            "!zone",
            "zone notin (x)",
            "zone!=x",
        ] {
            assert!(matches(yes, ""), "{yes}");
        }
        for no in ["app=db", "app!=web", "app notin (web)", "!app", "zone", "zone in (x)", "app=web,zone"] {
            assert!(!matches(no, ""), "{no}");
        }
    }

    #[test]
    fn field_selectors_match_by_equality_only() {
        assert!(matches("", "spec.nodeName=node1,metadata.name!=b"));
        assert!(!matches("", "spec.nodeName=node2"));
        assert!(Selector::parse("", "spec.podCIDR=x").is_err());
        assert!(Selector::parse("", "metadata.name").is_err());
    }
}
