//! Parses method and URL into an RBAC verb and a resource.

use axum::http::Method;

use super::{failure::Failure, resources::Resource};

/// The verb and the resource of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// A verb of RBAC.
    pub(super) verb: &'static str,
    pub(super) resource: &'static Resource,
    /// Empty: cluster scope, or all namespaces.
    pub(super) namespace: String,
    pub(super) name: Option<String>,
    /// `status` or none.
    pub(super) subresource: Option<&'static str>,
}

impl Target {
    /// `watch`: the value of the query parameter.
    pub(super) fn parse(method: &Method, path: &str, watch: bool) -> Result<Self, Failure> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(Failure::no_such_path()),
        };
        let (namespace, rest) = match rest {
            // `namespaces/<name>` is the Namespace object itself
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() && rest != ["status"] => {
                (*namespace, rest)
            }
            rest => ("", rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, None, None),
            [plural, name] => (*plural, Some((*name).to_owned()), None),
            [plural, name, "status"] => (*plural, Some((*name).to_owned()), Some("status")),
            _ => return Err(Failure::no_such_path()),
        };
        let resource = Resource::find(group, version, plural).ok_or_else(Failure::no_such_path)?;
        let has_status = subresource.is_none() || resource.status;
        let is_namespace_valid = namespace.is_empty() || resource.namespaced;
        let has_namespace = !resource.namespaced || name.is_none() || !namespace.is_empty();
        if !has_status || !is_namespace_valid || !has_namespace {
            return Err(Failure::no_such_path());
        }
        let verb = match (method, name.is_some()) {
            (&Method::GET, true) => "get",
            (&Method::GET, false) if watch => "watch",
            (&Method::GET, false) => "list",
            (&Method::POST, false) => "create",
            (&Method::PUT, true) => "update",
            (&Method::PATCH, true) => "patch",
            (&Method::DELETE, true) => "delete",
            (&Method::DELETE, false) => "deletecollection",
            _ => {
                let problem = "the server does not allow this method on the requested resource";
                return Err(Failure::new(405, "MethodNotAllowed", problem));
            }
        };
        Ok(Self { verb, resource, namespace: namespace.to_owned(), name, subresource })
    }

    /// The resource as in an RBAC rule: `nodes/status`.
    pub(super) fn resource_name(&self) -> String {
        match self.subresource {
            Some(subresource) => format!("{}/{subresource}", self.resource.plural),
            None => self.resource.plural.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &Method, path: &str) -> Option<(&'static str, String, String, Option<String>)> {
        let target = Target::parse(method, path, false).ok()?;
        Some((target.verb, target.resource_name(), target.namespace, target.name))
    }

    #[test]
    fn paths_are_parsed_into_verb_resource_namespace_and_name() {
        let cases = [
            ("/api/v1/nodes", "list", "nodes", "", None),
            ("/api/v1/nodes/n1/status", "get", "nodes/status", "", Some("n1")),
            ("/api/v1/namespaces/kube-system", "get", "namespaces", "", Some("kube-system")),
            ("/api/v1/namespaces/x/status", "get", "namespaces/status", "", Some("x")),
            ("/api/v1/namespaces/x/pods/p", "get", "pods", "x", Some("p")),
            ("/api/v1/pods", "list", "pods", "", None),
            ("/apis/coordination.k8s.io/v1/namespaces/x/leases", "list", "leases", "x", None),
        ];
        for (path, verb, resource, namespace, name) in cases {
            let expected = (verb, resource.to_owned(), namespace.to_owned(), name.map(str::to_owned));
            assert_eq!(parse(&Method::GET, path), Some(expected), "{path}");
        }
    }

    #[test]
    fn unknown_paths_are_rejected() {
        for path in [
            "/api/v1/things",
            "/api/v2/nodes",
            "/api/v1/pods/p",
            "/api/v1/namespaces/x/nodes/n",
            "/apis/coordination.k8s.io/v1/namespaces/x/leases/l/status",
            "/metrics",
        ] {
            assert_eq!(parse(&Method::GET, path), None, "{path}");
        }
        assert_eq!(parse(&Method::POST, "/api/v1/nodes/n1"), None);
    }
}
