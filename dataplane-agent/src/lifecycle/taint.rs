//! The startup taint: nodes are born with it, and lose it when pods can be connected.
//!
//! Pure: what to write. Taints are one list that everybody writes: the patch holds the version of the Node it was made
//! from, so that a taint somebody adds meanwhile is not lost.

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

/// What keeps pods away until we are there, with whatever effect.
pub(super) const KEY: &str = "dataplane.local/agent-not-ready";

/// What to patch into the Node; `None`: it has no such taint.
pub(super) fn patch(node: &Node) -> Option<Value> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let others: Vec<_> = taints.iter().filter(|taint| taint.key != KEY).collect();
    if others.len() == taints.len() {
        return None;
    }
    let others = if others.is_empty() { Value::Null } else { json!(others) };
    Some(json!({
        "metadata": { "resourceVersion": node.metadata.resource_version },
        "spec": { "taints": others },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(taints: &Value) -> Node {
        let node = json!({"metadata": {"name": "n1", "resourceVersion": "7"}, "spec": {"taints": taints}});
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn only_ours_goes_whatever_its_effect() {
        let other = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"});
        let taints =
            json!([{"key": KEY, "effect": "NoSchedule"}, other, {"key": KEY, "effect": "NoExecute"}]);
        let patch = patch(&node(&taints)).unwrap();
        assert_eq!(patch["spec"]["taints"], json!([other]));
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn the_last_one_leaves_no_list_and_none_is_no_write() {
        assert_eq!(
            patch(&node(&json!([{"key": KEY, "effect": "NoSchedule"}]))).unwrap()["spec"]["taints"],
            Value::Null
        );
        assert_eq!(patch(&node(&json!([{"key": "other", "effect": "NoSchedule"}]))), None);
        assert_eq!(patch(&Node::default()), None);
    }
}
