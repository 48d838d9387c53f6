//! Patches: JSON merge patch (RFC 7386), JSON patch (RFC 6902), and the strategic merge patch of
//! Kubernetes, which merges some lists by key.

use serde_json::{Map, Value};

use super::failure::Failure;

/// Lists that a strategic merge patch merges: kind, path, and the merge key (empty: the element
/// itself). Source: the `patchMergeKey` tags of the Kubernetes types. Other lists are replaced, for
/// example `spec.taints` of a Node.
const MERGED_LISTS: [(&str, &str, &str); 16] = [
    ("*", "metadata.finalizers", ""),
    ("*", "metadata.ownerReferences", "uid"),
    ("Node", "spec.podCIDRs", ""),
    ("Node", "status.addresses", "type"),
    ("Node", "status.conditions", "type"),
    ("Namespace", "status.conditions", "type"),
    ("Service", "spec.ports", "port"),
    ("Service", "status.conditions", "type"),
    ("Pod", "spec.containers", "name"),
    ("Pod", "spec.initContainers", "name"),
    ("Pod", "spec.imagePullSecrets", "name"),
    ("Pod", "spec.volumes", "name"),
    ("Pod", "spec.hostAliases", "ip"),
    ("Pod", "status.conditions", "type"),
    ("Pod", "status.podIPs", "ip"),
    ("ServiceAccount", "secrets", "name"),
];

/// Returns the object after a patch of this `Content-Type`.
pub(super) fn apply(content_type: &str, kind: &str, object: &Value, patch: &Value) -> Result<Value, Failure> {
    let mut patched = object.clone();
    match content_type.split(';').next().unwrap_or_default().trim() {
        "application/json-patch+json" => json_patch(&mut patched, patch)?,
        "application/merge-patch+json" => merge(&mut patched, patch),
        "application/strategic-merge-patch+json" => strategic(kind, "", &mut patched, patch)?,
        other => {
            return Err(Failure::new(
                415,
                "UnsupportedMediaType",
                format!("the body of the request was in an unknown format: {other}"),
            ));
        }
    }
    Ok(patched)
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let fields = fields_of(target);
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

fn strategic(kind: &str, path: &str, target: &mut Value, patch: &Value) -> Result<(), Failure> {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        _ => {}
    }
    let fields = fields_of(target);
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let deleted = value.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(Value::Array(elements)) = fields.get_mut(list) {
                elements.retain(|element| !deleted.contains(element));
            }
            continue;
        }
        if key.starts_with('$') {
            // $setElementOrder and $retainKeys do not matter for these lists
            continue;
        }
        let field_path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        if value.is_null() {
            fields.remove(key);
        } else if let (Some(merge_key), Value::Array(elements)) = (merge_key(kind, &field_path), value) {
            let old = fields.entry(key.clone()).or_insert_with(|| Value::Array(Vec::new()));
            merge_list(kind, &field_path, merge_key, old, elements)?;
        } else {
            strategic(kind, &field_path, fields.entry(key.clone()).or_insert(Value::Null), value)?;
        }
    }
    Ok(())
}

fn merge_list(
    kind: &str,
    path: &str,
    merge_key: &str,
    target: &mut Value,
    patch: &[Value],
) -> Result<(), Failure> {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Value::Array(elements) = target else { return Ok(()) };
    if patch.iter().any(|element| element.get("$patch").is_some_and(|what| what == "replace")) {
        elements.clear();
    }
    for wanted in patch {
        if merge_key.is_empty() {
            if !elements.contains(wanted) {
                elements.push(wanted.clone());
            }
            continue;
        }
        let Some(identity) = wanted.get(merge_key) else {
            if wanted.get("$patch").is_some() {
                continue;
            }
            let problem = format!("map: {wanted} does not contain declared merge key: {merge_key}");
            return Err(Failure::new(500, "InternalError", problem));
        };
        let at = elements.iter().position(|element| element.get(merge_key) == Some(identity));
        match (at, wanted.get("$patch").and_then(Value::as_str)) {
            (Some(at), Some("delete")) => {
                elements.remove(at);
            }
            (None, Some("delete")) => {}
            (Some(at), _) => {
                if let Some(element) = elements.get_mut(at) {
                    strategic(kind, &format!("{path}[]"), element, wanted)?;
                }
            }
            (None, _) => elements.push(wanted.clone()),
        }
    }
    Ok(())
}

fn merge_key(kind: &str, path: &str) -> Option<&'static str> {
    let found = MERGED_LISTS.iter().find(|(of, at, _)| (*of == kind || *of == "*") && *at == path);
    found.map(|(_, _, key)| *key)
}

fn without_directives(fields: &Map<String, Value>) -> Value {
    let kept = fields.iter().filter(|(key, _)| !key.starts_with('$'));
    Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// Returns the value's fields; replaces a value that is not an object by an empty object.
fn fields_of(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("the value was replaced by an object")
}

fn json_patch(target: &mut Value, patch: &Value) -> Result<(), Failure> {
    let operations = patch.as_array().ok_or_else(|| Failure::bad_request("a JSON patch must be a list"))?;
    for operation in operations {
        let text = |field: &str| {
            let value = operation.get(field).and_then(Value::as_str);
            value.ok_or_else(|| Failure::bad_request(format!("JSON patch: {operation} has no {field}")))
        };
        let invalid = |reason: &str| {
            let problem = format!("the server rejected our request due to an error in our request: {reason}");
            Failure::new(422, "Invalid", problem)
        };
        let path = text("path")?;
        let value = || operation.get("value").cloned().unwrap_or(Value::Null);
        match text("op")? {
            "test" => {
                if target.pointer(path).unwrap_or(&Value::Null) != &value() {
                    return Err(invalid(&format!("testing value {path} failed: test failed")));
                }
            }
            "add" => insert(target, path, value(), InsertMode::Add).map_err(|why| invalid(&why))?,
            "replace" => insert(target, path, value(), InsertMode::Replace).map_err(|why| invalid(&why))?,
            "remove" => remove(target, path).map(drop).map_err(|why| invalid(&why))?,
            "copy" => {
                let copied = target.pointer(text("from")?).cloned();
                let copied = copied.ok_or_else(|| invalid("copy of a missing value"))?;
                insert(target, path, copied, InsertMode::Add).map_err(|why| invalid(&why))?;
            }
            "move" => {
                let moved = remove(target, text("from")?).map_err(|why| invalid(&why))?;
                insert(target, path, moved, InsertMode::Add).map_err(|why| invalid(&why))?;
            }
            other => return Err(invalid(&format!("unexpected kind: {other}"))),
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum InsertMode {
    Add,
    Replace,
}

fn insert(target: &mut Value, path: &str, value: Value, how: InsertMode) -> Result<(), String> {
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (parent, last) = parent(target, path)?;
    match parent {
        Value::Object(fields) => {
            if how == InsertMode::Replace && !fields.contains_key(&last) {
                return Err(format!("replace operation does not apply: doc is missing key: {path}"));
            }
            fields.insert(last, value);
        }
        Value::Array(elements) if last == "-" && how == InsertMode::Add => elements.push(value),
        Value::Array(elements) => {
            let index: usize = last.parse().map_err(|_no_number| format!("{path}: not an index"))?;
            let end = if how == InsertMode::Add { elements.len() + 1 } else { elements.len() };
            if index >= end {
                return Err(format!("{path}: unable to access invalid index: {index}"));
            }
            if how == InsertMode::Replace {
                elements.remove(index);
            }
            elements.insert(index, value);
        }
        _ => return Err(format!("{path}: the parent is not an object or list")),
    }
    Ok(())
}

fn remove(target: &mut Value, path: &str) -> Result<Value, String> {
    let (parent, last) = parent(target, path)?;
    let missing = || format!("remove operation does not apply: doc is missing path: {path}");
    match parent {
        Value::Object(fields) => fields.remove(&last).ok_or_else(missing),
        Value::Array(elements) => {
            let index = last.parse().ok().filter(|index: &usize| *index < elements.len());
            index.map(|index| elements.remove(index)).ok_or_else(missing)
        }
        _ => Err(missing()),
    }
}

fn parent<'a>(target: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), String> {
    let (parent, last) = path.rsplit_once('/').ok_or_else(|| format!("{path} is not a path"))?;
    let found = target.pointer_mut(parent).ok_or_else(|| format!("doc is missing path: {parent}"))?;
    Ok((found, last.replace("~1", "/").replace("~0", "~")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MERGE: &str = "application/merge-patch+json";
    const STRATEGIC: &str = "application/strategic-merge-patch+json";
    const JSON: &str = "application/json-patch+json";

    fn node() -> Value {
        json!({
            "metadata": {"labels": {"a": "1", "b": "2"}},
            "spec": {"taints": [{"key": "x", "effect": "NoSchedule"}]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"}]},
        })
    }

    #[test]
    fn merge_patch_replaces_lists_and_removes_nulls() {
        let patch = json!({"metadata": {"labels": {"a": null}}, "status": {"conditions": []}});
        let patched = apply(MERGE, "Node", &node(), &patch).expect("a patch");
        assert_eq!(patched["metadata"]["labels"], json!({"b": "2"}));
        assert_eq!(patched["status"]["conditions"], json!([]));
    }

    #[test]
    fn strategic_merge_patch_merges_conditions_by_type_and_replaces_taints() {
        let patch = json!({
            "spec": {"taints": [{"key": "y", "effect": "NoExecute"}]},
            "status": {"conditions": [
                {"type": "Ready", "reason": "Because"},
                {"type": "Other", "$patch": "delete"},
                {"type": "NetworkUnavailable", "status": "False"},
            ]},
        });
        let patched = apply(STRATEGIC, "Node", &node(), &patch).expect("a patch");
        assert_eq!(patched["spec"]["taints"], json!([{"key": "y", "effect": "NoExecute"}]));
        assert_eq!(
            patched["status"]["conditions"],
            json!([
                {"type": "Ready", "status": "True", "reason": "Because"},
                {"type": "NetworkUnavailable", "status": "False"},
            ])
        );
    }

    #[test]
    fn json_patch_fails_on_a_failed_test_operation() {
        let remove = json!({"op": "remove", "path": "/spec/taints/0"});
        let test = |key: &str| json!([{"op": "test", "path": "/spec/taints/0/key", "value": key}, remove]);
        let patched = apply(JSON, "Node", &node(), &test("x")).expect("a patch");
        assert_eq!(patched["spec"]["taints"], json!([]));
        assert_eq!(
            apply(JSON, "Node", &node(), &test("y")).expect_err("the test operation must fail").code,
            422
        );
    }

    #[test]
    fn json_patch_replaces_only_existing_fields() {
        let patch = json!([{"op": "replace", "path": "/spec/podCIDR", "value": "10.0.0.0/24"}]);
        assert!(apply(JSON, "Node", &node(), &patch).is_err());
        let patch = json!([{"op": "add", "path": "/metadata/labels/c~1d", "value": "3"}]);
        let patched = apply(JSON, "Node", &node(), &patch).expect("a patch");
        assert_eq!(patched["metadata"]["labels"]["c/d"], "3");
    }
}
