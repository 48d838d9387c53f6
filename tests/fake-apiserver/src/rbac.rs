//! Authentication by token, and authorization by the RBAC roles and bindings in the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde_json::Value;

use super::{failure::Failure, paths::Target, resources::Resource, store::Store};

/// The group whose members may do everything.
const MASTERS: &str = "system:masters";

/// An authenticated user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
}

impl User {
    /// A member of `system:masters`.
    pub fn admin() -> Self {
        Self { name: "admin".to_owned(), groups: vec![MASTERS.to_owned()] }
    }

    /// Whether the user is a member of `system:masters`, which needs no role.
    pub fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }

    /// The user of a service account's token.
    pub fn service_account(namespace: &str, name: &str) -> Self {
        Self {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            groups: vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".to_owned(),
            ],
        }
    }

    /// A user with no group but `system:authenticated`.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), groups: vec!["system:authenticated".to_owned()] }
    }

    fn anonymous() -> Self {
        Self { name: "system:anonymous".to_owned(), groups: vec!["system:unauthenticated".to_owned()] }
    }

    fn matches(&self, subject: &Value) -> bool {
        let text = |field: &str| subject.get(field).and_then(Value::as_str).unwrap_or_default();
        match text("kind") {
            "User" => self.name == text("name"),
            "Group" => self.groups.iter().any(|group| group == text("name")),
            "ServiceAccount" => {
                self.name == format!("system:serviceaccount:{}:{}", text("namespace"), text("name"))
            }
            _ => false,
        }
    }
}

/// A permission, as a rule of a role grants it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Permission {
    pub verb: String,
    pub group: String,
    /// With the subresource: `nodes/status`.
    pub resource: String,
    /// Empty: cluster scope.
    pub namespace: String,
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = if self.group.is_empty() { "core" } else { &self.group };
        write!(f, "{} {} ({group})", self.verb, self.resource)?;
        if !self.namespace.is_empty() {
            write!(f, " in {}", self.namespace)?;
        }
        Ok(())
    }
}

/// Tokens, and the permissions that their users have used.
#[derive(Debug, Default)]
pub(super) struct Access {
    users: BTreeMap<String, User>,
    used_permissions: BTreeMap<String, BTreeSet<Permission>>,
}

impl Access {
    /// Registers a user. Returns the token, which depends only on the name.
    pub(super) fn register(&mut self, user: &User) -> String {
        let token = format!("token-of-{}", user.name.replace(':', "."));
        self.users.insert(token.clone(), user.clone());
        token
    }

    /// Returns the user of an `Authorization` header.
    pub(super) fn authenticate(&self, authorization: Option<&str>) -> Result<User, Failure> {
        let Some(authorization) = authorization else { return Ok(User::anonymous()) };
        let token = authorization.strip_prefix("Bearer ").ok_or_else(Failure::unauthorized)?;
        self.users.get(token).cloned().ok_or_else(Failure::unauthorized)
    }

    /// Checks a request against the current roles, and records the permission if granted.
    pub(super) fn authorize(&mut self, store: &Store, user: &User, target: &Target) -> Result<(), Failure> {
        if !user.groups.iter().any(|group| group == MASTERS) && !is_granted(store, user, target) {
            return Err(forbidden(user, target));
        }
        self.used_permissions.entry(user.name.clone()).or_default().insert(Permission {
            verb: target.verb.to_owned(),
            group: target.resource.group.to_owned(),
            resource: target.resource_name(),
            namespace: target.namespace.clone(),
        });
        Ok(())
    }

    pub(super) fn used_permissions(&self, user: &str) -> BTreeSet<Permission> {
        self.used_permissions.get(user).cloned().unwrap_or_default()
    }
}

fn forbidden(user: &User, target: &Target) -> Failure {
    let scope = match target.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace \"{namespace}\""),
    };
    let reason = format!(
        "User \"{}\" cannot {} resource \"{}\" in API group \"{}\" {scope}",
        user.name,
        target.verb,
        target.resource_name(),
        target.resource.group
    );
    Failure::forbidden(target.resource, target.name.as_deref(), &reason)
}

fn is_granted(store: &Store, user: &User, target: &Target) -> bool {
    let cluster_wide = bindings(store, "clusterrolebindings", user).any(|binding| {
        let role = role(store, "", binding);
        role.is_some_and(|role| allows(role, target))
    });
    if cluster_wide || target.namespace.is_empty() {
        return cluster_wide;
    }
    bindings(store, "rolebindings", user).any(|binding| {
        binding["metadata"]["namespace"] == target.namespace.as_str()
            && role(store, &target.namespace, binding).is_some_and(|role| allows(role, target))
    })
}

fn bindings<'a>(store: &'a Store, plural: &str, user: &'a User) -> impl Iterator<Item = &'a Value> {
    let found = rbac_resource(plural).map(|resource| store.current(resource));
    let subject_is = |binding: &&Value| {
        let subjects = binding.get("subjects").and_then(Value::as_array);
        subjects.is_some_and(|subjects| subjects.iter().any(|subject| user.matches(subject)))
    };
    found.into_iter().flatten().filter(subject_is)
}

fn role<'a>(store: &'a Store, namespace: &str, binding: &Value) -> Option<&'a Value> {
    let reference = binding.get("roleRef")?;
    let (plural, namespace) = match reference.get("kind")?.as_str()? {
        "ClusterRole" => ("clusterroles", ""),
        _ => ("roles", namespace),
    };
    let name = reference.get("name")?.as_str()?;
    store.current(rbac_resource(plural)?).find(|role| {
        role["metadata"]["name"] == name
            && role["metadata"]["namespace"].as_str().unwrap_or_default() == namespace
    })
}

fn rbac_resource(plural: &str) -> Option<&'static Resource> {
    Resource::find("rbac.authorization.k8s.io", "v1", plural)
}

fn allows(role: &Value, target: &Target) -> bool {
    let rules = role.get("rules").and_then(Value::as_array);
    rules.is_some_and(|rules| rules.iter().any(|rule| rule_allows(rule, target)))
}

fn rule_allows(rule: &Value, target: &Target) -> bool {
    let has = |field: &str, wanted: &[&str]| {
        let values = rule.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        values.iter().filter_map(Value::as_str).any(|value| value == "*" || wanted.contains(&value))
    };
    let resource = target.resource_name();
    let any_with_subresource = target.subresource.map(|sub| format!("*/{sub}")).unwrap_or_default();
    let names = rule.get("resourceNames").and_then(Value::as_array).filter(|names| !names.is_empty());
    let is_named = names.is_none_or(|names| {
        target.name.as_deref().is_some_and(|name| names.iter().any(|allowed| allowed == name))
    });
    has("verbs", &[target.verb])
        && has("apiGroups", &[target.resource.group])
        && has("resources", &[&resource, &any_with_subresource])
        && is_named
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::Key;

    fn put(store: &mut Store, plural: &str, namespace: &str, object: Value) {
        let resource = rbac_resource(plural).expect("a kind of RBAC");
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        store.put(&Key { resource, namespace: namespace.to_owned(), name }, object);
    }

    fn target(verb: &'static str, plural: &str, namespace: &str, name: Option<&str>) -> Target {
        let resource = Resource::find("", "v1", plural).expect("a kind");
        Target {
            verb,
            resource,
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
            subresource: None,
        }
    }

    #[test]
    fn denied_request_gets_the_message_of_the_real_server() {
        let denied = Access::default().authorize(
            &Store::new(),
            &User::service_account("kube-system", "dataplane"),
            &target("list", "nodes", "", None),
        );
        let denied = denied.expect_err("nothing is granted");
        assert_eq!(denied.code, 403);
        assert_eq!(
            denied.message,
            "nodes is forbidden: User \"system:serviceaccount:kube-system:dataplane\" cannot list resource \
             \"nodes\" in API group \"\" at the cluster scope"
        );
    }

    #[test]
    fn cluster_role_grants_everywhere_and_role_in_its_namespace() {
        let mut store = Store::new();
        let rules = json!([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]);
        put(
            &mut store,
            "roles",
            "here",
            json!({"metadata": {"name": "reader", "namespace": "here"}, "rules": rules}),
        );
        let binding = json!({
            "metadata": {"name": "b", "namespace": "here"},
            "subjects": [{"kind": "User", "name": "u"}],
            "roleRef": {"kind": "Role", "name": "reader"},
        });
        put(&mut store, "rolebindings", "here", binding);
        let user = User::named("u");
        let mut access = Access::default();
        access.authorize(&store, &user, &target("get", "configmaps", "here", Some("x"))).expect("granted");
        access
            .authorize(&store, &user, &target("get", "configmaps", "there", Some("x")))
            .expect_err("elsewhere");
        access
            .authorize(&store, &user, &target("list", "configmaps", "here", None))
            .expect_err("another verb");
        assert_eq!(access.used_permissions("u").len(), 1);

        let named =
            json!([{"apiGroups": ["*"], "resources": ["nodes"], "resourceNames": ["n1"], "verbs": ["*"]}]);
        put(&mut store, "clusterroles", "", json!({"metadata": {"name": "own"}, "rules": named}));
        let binding = json!({
            "metadata": {"name": "b"},
            "subjects": [{"kind": "Group", "name": "system:authenticated"}],
            "roleRef": {"kind": "ClusterRole", "name": "own"},
        });
        put(&mut store, "clusterrolebindings", "", binding);
        access.authorize(&store, &user, &target("get", "nodes", "", Some("n1"))).expect("by name");
        access.authorize(&store, &user, &target("get", "nodes", "", Some("n2"))).expect_err("another name");
    }
}
