//! The resources that the server knows, and how their behaviour differs.

use serde_json::{Value, json};

/// A resource type of the API.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(clippy::struct_excessive_bools, reason = "a table of properties of each resource")]
pub struct Resource {
    /// Empty: the core group.
    pub group: &'static str,
    pub version: &'static str,
    /// The name in URLs.
    pub plural: &'static str,
    pub kind: &'static str,
    pub namespaced: bool,
    /// Has a `/status` subresource; only it writes the status.
    pub status: bool,
    /// An update needs no `resourceVersion`.
    pub unconditional: bool,
    /// An update creates a missing object.
    pub create_on_update: bool,
}

const RBAC: &str = "rbac.authorization.k8s.io";

const fn resource(group: &'static str, plural: &'static str, kind: &'static str) -> Resource {
    Resource {
        group,
        version: "v1",
        plural,
        kind,
        namespaced: true,
        status: false,
        unconditional: true,
        create_on_update: false,
    }
}

/// All resources.
pub static RESOURCES: [Resource; 15] = [
    Resource { namespaced: false, status: true, ..resource("", "nodes", "Node") },
    Resource { namespaced: false, status: true, ..resource("", "namespaces", "Namespace") },
    Resource { status: true, ..resource("", "services", "Service") },
    Resource { status: true, ..resource("", "pods", "Pod") },
    Resource { create_on_update: true, ..resource("", "events", "Event") },
    resource("", "configmaps", "ConfigMap"),
    resource("", "serviceaccounts", "ServiceAccount"),
    Resource { create_on_update: true, ..resource("events.k8s.io", "events", "Event") },
    resource("discovery.k8s.io", "endpointslices", "EndpointSlice"),
    Resource {
        namespaced: false,
        status: true,
        ..resource("networking.k8s.io", "servicecidrs", "ServiceCIDR")
    },
    Resource {
        unconditional: false,
        create_on_update: true,
        ..resource("coordination.k8s.io", "leases", "Lease")
    },
    Resource { namespaced: false, create_on_update: true, ..resource(RBAC, "clusterroles", "ClusterRole") },
    Resource {
        namespaced: false,
        create_on_update: true,
        ..resource(RBAC, "clusterrolebindings", "ClusterRoleBinding")
    },
    Resource { create_on_update: true, ..resource(RBAC, "roles", "Role") },
    Resource { create_on_update: true, ..resource(RBAC, "rolebindings", "RoleBinding") },
];

impl Resource {
    /// Finds a resource by the parts of its URL.
    pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|resource| {
            resource.group == group && resource.version == version && resource.plural == plural
        })
    }

    /// Finds the resource of an object by its `apiVersion` and `kind`.
    pub fn of(object: &Value) -> Option<&'static Self> {
        let api_version = object.get("apiVersion")?.as_str()?;
        let kind = object.get("kind")?.as_str()?;
        Self::named(api_version, kind)
    }

    /// Finds a resource by `apiVersion` and `kind`.
    pub fn named(api_version: &str, kind: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|resource| resource.api_version() == api_version && resource.kind == kind)
    }

    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// The name in error messages: `nodes`, `leases.coordination.k8s.io`.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }
}

/// Returns the discovery document at this path.
pub(super) fn discovery(path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts.as_slice() {
        ["version"] => Some(json!({
            "major": "1", "minor": "34", "gitVersion": "v1.34.0-dataplane-tests", "platform": "linux/amd64",
        })),
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        ["apis"] => Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups()})),
        ["api", version] => resource_list("", version),
        ["apis", group, version] => resource_list(group, version),
        _ => None,
    }
}

fn groups() -> Vec<Value> {
    let mut names: Vec<&str> = RESOURCES.iter().map(|resource| resource.group).collect();
    names.sort_unstable();
    names.dedup();
    let named = names.into_iter().filter(|name| !name.is_empty());
    named
        .map(|name| {
            let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
            json!({"name": name, "versions": [version], "preferredVersion": version})
        })
        .collect()
}

fn resource_list(group: &str, version: &str) -> Option<Value> {
    let all = RESOURCES.iter().filter(|resource| resource.group == group && resource.version == version);
    let mut entries = Vec::new();
    let mut api_version = None;
    for resource in all {
        api_version = Some(resource.api_version());
        entries.push(json!({
            "name": resource.plural,
            "singularName": resource.kind.to_lowercase(),
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
        }));
        if resource.status {
            entries.push(json!({
                "name": format!("{}/status", resource.plural),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": resource.kind,
                "verbs": ["get", "patch", "update"],
            }));
        }
    }
    let api_version = api_version?;
    Some(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": entries}),
    )
}
