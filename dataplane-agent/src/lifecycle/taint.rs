//! The startup taint: kubelet registers nodes with it, and the agent removes it once it is ready.
//!
//! Pure: computes the patch. It contains the Node's `resourceVersion`, because taints are one list
//! with several writers: a concurrent change leads to a conflict, not to a lost taint.

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

/// Key of the taint; its effect does not matter.
pub(super) const KEY: &str = "dataplane.local/agent-not-ready";

/// The patch that removes the taint; `None`: the Node does not have it.
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
    fn startup_taint_is_removed_with_any_effect_and_others_stay() {
        let other = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"});
        let taints =
            json!([{"key": KEY, "effect": "NoSchedule"}, other, {"key": KEY, "effect": "NoExecute"}]);
        let patch = patch(&node(&taints)).unwrap();
        assert_eq!(patch["spec"]["taints"], json!([other]));
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn removing_the_last_taint_removes_the_list() {
        assert_eq!(
            patch(&node(&json!([{"key": KEY, "effect": "NoSchedule"}]))).unwrap()["spec"]["taints"],
            Value::Null
        );
        assert_eq!(patch(&node(&json!([{"key": "other", "effect": "NoSchedule"}]))), None);
        assert_eq!(patch(&Node::default()), None);
    }
}
