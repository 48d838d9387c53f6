//! Who may do what: tokens, and the (cluster) roles and bindings that are in the store like other objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde_json::Value;

use super::{failure::Failure, paths::Target, resources::Resource, store::Store};

/// Members may do everything.
const MASTERS: &str = "system:masters";

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
}

impl User {
    /// Of the group that may do everything.
    pub fn admin() -> Self {
        Self { name: "admin".to_owned(), groups: vec![MASTERS.to_owned()] }
    }

    /// Whether the real server needs no role for this one.
    pub fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }

    /// As the API server knows the owner of a service account's token.
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

    /// Without groups but the one of all.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), groups: vec!["system:authenticated".to_owned()] }
    }

    fn anonymous() -> Self {
        Self { name: "system:anonymous".to_owned(), groups: vec!["system:unauthenticated".to_owned()] }
    }

    fn is(&self, subject: &Value) -> bool {
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

/// A permission that was used: as a rule of a role would grant it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    pub verb: String,
    pub group: String,
    /// With its subresource: `nodes/status`.
    pub resource: String,
    /// Empty: at the cluster scope.
    pub namespace: String,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = if self.group.is_empty() { "core" } else { &self.group };
        write!(f, "{} {} ({group})", self.verb, self.resource)?;
        if !self.namespace.is_empty() {
            write!(f, " in {}", self.namespace)?;
        }
        Ok(())
    }
}

/// Tokens, and what their owners have done.
#[derive(Debug, Default)]
pub(super) struct Access {
    users: BTreeMap<String, User>,
    uses: BTreeMap<String, BTreeSet<Use>>,
}

impl Access {
    /// The user's token; the same for the same name.
    pub(super) fn admit(&mut self, user: &User) -> String {
        let token = format!("token-of-{}", user.name.replace(':', "."));
        self.users.insert(token.clone(), user.clone());
        token
    }

    /// From the value of the header `Authorization`.
    pub(super) fn authenticate(&self, authorization: Option<&str>) -> Result<User, Failure> {
        let Some(authorization) = authorization else { return Ok(User::anonymous()) };
        let token = authorization.strip_prefix("Bearer ").ok_or_else(Failure::unauthorized)?;
        self.users.get(token).cloned().ok_or_else(Failure::unauthorized)
    }

    /// Checks a request against the roles there are now, and remembers it if it is granted.
    pub(super) fn authorize(&mut self, store: &Store, user: &User, target: &Target) -> Result<(), Failure> {
        if !user.groups.iter().any(|group| group == MASTERS) && !is_granted(store, user, target) {
            return Err(denial(user, target));
        }
        self.uses.entry(user.name.clone()).or_default().insert(Use {
            verb: target.verb.to_owned(),
            group: target.resource.group.to_owned(),
            resource: target.resource_name(),
            namespace: target.namespace.clone(),
        });
        Ok(())
    }

    pub(super) fn uses(&self, user: &str) -> BTreeSet<Use> {
        self.uses.get(user).cloned().unwrap_or_default()
    }
}

fn denial(user: &User, target: &Target) -> Failure {
    let scope = match target.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace \"{namespace}\""),
    };
    let why = format!(
        "User \"{}\" cannot {} resource \"{}\" in API group \"{}\" {scope}",
        user.name,
        target.verb,
        target.resource_name(),
        target.resource.group
    );
    Failure::forbidden(target.resource, target.name.as_deref(), &why)
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
    let found = rbac(plural).map(|resource| store.current(resource));
    let subject_is = |binding: &&Value| {
        let subjects = binding.get("subjects").and_then(Value::as_array);
        subjects.is_some_and(|subjects| subjects.iter().any(|subject| user.is(subject)))
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
    store.current(rbac(plural)?).find(|role| {
        role["metadata"]["name"] == name
            && role["metadata"]["namespace"].as_str().unwrap_or_default() == namespace
    })
}

fn rbac(plural: &str) -> Option<&'static Resource> {
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
        let resource = rbac(plural).expect("a kind of RBAC");
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
    fn denied_in_the_words_of_the_real_server() {
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
    fn granted_by_a_cluster_role_for_all_and_by_a_role_for_its_namespace() {
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
        assert_eq!(access.uses("u").len(), 1);

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
