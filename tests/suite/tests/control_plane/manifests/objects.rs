//! Kubernetes objects as JSON: read from YAML, checked against the types of the API, and compared
//! without regard to order.

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ConfigMap, Namespace, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use serde::{Deserialize as _, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Parses all documents that are not empty.
pub(crate) fn parse(yaml: &str) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for document in serde_norway::Deserializer::from_str(yaml) {
        let value = Value::deserialize(document).with_context(|| format!("read YAML:\n{yaml}"))?;
        if !value.is_null() {
            objects.push(value);
        }
    }
    Ok(objects)
}

/// Checks that the API keeps the whole object: an unknown field is lost in a round trip through the
/// type.
pub(crate) fn check(object: &Value) -> Result<()> {
    let kind = format!("{} {}", text(&object["apiVersion"]), text(&object["kind"]));
    match kind.as_str() {
        "v1 Namespace" => keeps::<Namespace>(object),
        "v1 ServiceAccount" => keeps::<ServiceAccount>(object),
        "v1 ConfigMap" => keeps::<ConfigMap>(object),
        "apps/v1 DaemonSet" => keeps::<DaemonSet>(object),
        "apps/v1 Deployment" => keeps::<Deployment>(object),
        "rbac.authorization.k8s.io/v1 ClusterRole" => keeps::<ClusterRole>(object),
        "rbac.authorization.k8s.io/v1 ClusterRoleBinding" => keeps::<ClusterRoleBinding>(object),
        "rbac.authorization.k8s.io/v1 Role" => keeps::<Role>(object),
        "rbac.authorization.k8s.io/v1 RoleBinding" => keeps::<RoleBinding>(object),
        _ => bail!("{kind}: unknown kind, add it to objects.rs"),
    }
    .with_context(|| format!("{kind} {}", text(&object["metadata"]["name"])))
}

fn keeps<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
    let typed: T = serde_json::from_value(object.clone())?;
    let kept = serde_json::to_value(typed)?;
    let mut lost = Vec::new();
    differences(object, &kept, "", &mut lost);
    ensure!(lost.is_empty(), "not kept by the API:\n  {}", lost.join("\n  "));
    Ok(())
}

/// Kind, namespace and name, by which objects of two lists are matched.
pub(crate) fn key(object: &Value) -> [String; 3] {
    let metadata = &object["metadata"];
    [&object["kind"], &metadata["namespace"], &metadata["name"]].map(|value| text(value).to_owned())
}

/// The differences between two lists of objects, each with its path.
pub(crate) fn compare(left: &[Value], right: &[Value]) -> Vec<String> {
    let mut found = Vec::new();
    for (one, other, side) in [(left, right, "first"), (right, left, "second")] {
        for object in one.iter().filter(|object| !other.iter().any(|candidate| key(candidate) == key(object)))
        {
            found.push(format!("only in the {side}: {:?}", key(object)));
        }
    }
    for object in left {
        if let Some(same) = right.iter().find(|candidate| key(candidate) == key(object)) {
            differences(object, same, &key(object).join("/"), &mut found);
        }
    }
    found
}

fn differences(left: &Value, right: &Value, path: &str, found: &mut Vec<String>) {
    match (left, right) {
        (Value::Object(left_fields), Value::Object(right_fields)) => {
            let names =
                left_fields.keys().chain(right_fields.keys().filter(|name| !left_fields.contains_key(*name)));
            for name in names {
                differences(&left[name], &right[name], &format!("{path}.{name}"), found);
            }
        }
        (Value::Array(left_items), Value::Array(right_items)) if left_items.len() == right_items.len() => {
            for (at, (left, right)) in sorted(left_items).into_iter().zip(sorted(right_items)).enumerate() {
                differences(left, right, &format!("{path}[{at}]"), found);
            }
        }
        _ if left == right => {}
        _ => found.push(format!("{path}: {left} and {right}")),
    }
}

/// A Kustomize patch moves changed items to the front; items are identified by their names.
fn sorted(items: &[Value]) -> Vec<&Value> {
    let mut sorted: Vec<&Value> = items.iter().collect();
    sorted.sort_by_key(|item| text(&item["name"]));
    sorted
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use serde_json::json;

    use super::*;

    #[test]
    fn an_unknown_field_is_named() {
        let good = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "a" } });
        check(&good).unwrap();
        let bad =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "a", "lables": {} } });
        let error = format!("{:#}", check(&bad).unwrap_err());
        assert!(error.contains("Namespace a") && error.contains(".metadata.lables"), "{error}");
    }

    #[test]
    fn objects_are_matched_by_name_and_differences_have_a_path() {
        let one = json!({ "kind": "A", "metadata": { "name": "x" }, "list": [1, 2] });
        let other = json!({ "kind": "A", "metadata": { "name": "x" }, "list": [1, 3] });
        assert!(compare(from_ref(&one), from_ref(&one)).is_empty());
        assert_eq!(compare(from_ref(&one), &[other]), ["A//x.list[1]: 2 and 3"]);
        assert_eq!(compare(&[one], &[]).len(), 1);
        let volumes =
            |names: [&str; 2]| json!({ "kind": "A", "volumes": names.map(|name| json!({ "name": name })) });
        assert!(compare(&[volumes(["a", "b"])], &[volumes(["b", "a"])]).is_empty());
        assert_eq!(compare(&[volumes(["a", "b"])], &[volumes(["a", "c"])]).len(), 1);
    }
}
