//! Describes errors of API server requests in one sentence for operators.

use kube::core::Status;

use super::failover::{Unreachable, innermost};

/// Describes the error: the missing permission, or which server is unreachable and why.
pub fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => explain_status(status),
        kube::Error::Service(error) => match error.downcast_ref::<Unreachable>() {
            Some(unreachable) => unreachable.to_string(),
            None => format!("cannot send request to API server: {}", innermost(error.as_ref())),
        },
        kube::Error::ReadEvents(error) => format!("watch connection failed: {}", innermost(error)),
        kube::Error::HyperError(error) => {
            format!("connection failed while reading the response: {}", innermost(error))
        }
        kube::Error::SerdeError(error) => format!("cannot decode response of API server: {error}"),
        kube::Error::Auth(error) => format!("cannot use credentials: {}", innermost(error)),
        other => format!("request to API server failed: {other}"),
    }
}

fn explain_status(status: &Status) -> String {
    let message = if status.message.is_empty() { &status.reason } else { &status.message };
    match status.code {
        401 => format!(
            "API server rejected the credentials (401 {message}): check that the token or client certificate is \
             present, not expired, and of this cluster"
        ),
        403 => match DeniedRequest::parse(message) {
            Some(denied) => denied.to_string(),
            None => format!("API server denied the request (403): {message}"),
        },
        429 => format!("API server is overloaded (429): {message}"),
        code => format!("API server responded with status {code}: {message}"),
    }
}

/// A denied request (RBAC). Only the message contains the verb: `Status` has no field for it.
#[derive(Debug, PartialEq, Eq)]
struct DeniedRequest<'a> {
    user: &'a str,
    verb: &'a str,
    resource: &'a str,
    group: &'a str,
    /// "at the cluster scope" or the namespace, and what the authorizer appends.
    scope: &'a str,
}

impl<'a> DeniedRequest<'a> {
    /// Parses `… User "u" cannot list resource "r" in API group "g" at the cluster scope`, the
    /// format of k8s.io/apiserver's `responsewriters.Forbidden`.
    fn parse(message: &'a str) -> Option<Self> {
        let (user, rest) = message.split_once("User \"")?.1.split_once("\" cannot ")?;
        let (verb, rest) = rest.split_once(" resource \"")?;
        let (resource, rest) = rest.split_once("\" in API group \"")?;
        let (group, scope) = rest.split_once('"')?;
        Some(Self { user, verb, resource, group, scope: scope.trim() })
    }
}

impl std::fmt::Display for DeniedRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { user, verb, resource, group, scope } = self;
        let (main, sub) = resource.split_once('/').map_or((*resource, ""), |(main, sub)| (main, sub));
        let dot = if group.is_empty() { "" } else { "." };
        let slash = if sub.is_empty() { "" } else { "/" };
        write!(f, "API server denied {verb} of {main}{dot}{group}{slash}{sub} to {user} {scope}: ")?;
        write!(f, "grant verb {verb:?} on resource {resource:?} in API group {group:?} to its role")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Status::failure(message, "Reason").with_code(code).boxed())
    }

    #[test]
    fn missing_permission_is_named() {
        let cases = [
            (
                "endpointslices.discovery.k8s.io is forbidden: User \
                 \"system:serviceaccount:kube-system:dataplane\" cannot list resource \"endpointslices\" in API \
                 group \"discovery.k8s.io\" at the cluster scope",
                "API server denied list of endpointslices.discovery.k8s.io to \
                 system:serviceaccount:kube-system:dataplane at the cluster scope: grant verb \
                 \"list\" on resource \"endpointslices\" in API group \"discovery.k8s.io\" to its role",
            ),
            (
                "nodes \"n1\" is forbidden: User \"u\" cannot patch resource \"nodes/status\" in API group \"\" at \
                 the cluster scope: RBAC: clusterrole.rbac.authorization.k8s.io \"x\" not found",
                "API server denied patch of nodes/status to u at the cluster scope: RBAC: \
                 clusterrole.rbac.authorization.k8s.io \"x\" not found: grant verb \"patch\" on \
                 resource \"nodes/status\" in API group \"\" to its role",
            ),
            ("no", "API server denied the request (403): no"),
        ];
        for (message, sentence) in cases {
            assert_eq!(explain(&status(403, message)), sentence);
        }
    }

    #[test]
    fn other_errors_contain_status_code() {
        let unknown = explain(&status(401, "Unauthorized"));
        assert!(unknown.starts_with("API server rejected the credentials (401 Unauthorized)"), "{unknown}");
        assert_eq!(explain(&status(410, "too old")), "API server responded with status 410: too old");
        assert_eq!(explain(&status(500, "")), "API server responded with status 500: Reason");
    }
}
