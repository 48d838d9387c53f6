//! What went wrong with the API server, in one sentence for people.

use kube::core::Status;

use super::failover::{Unreachable, innermost};

/// One sentence: what the server refuses to whom, or which server cannot be reached and why.
pub fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => refusal(status),
        kube::Error::Service(error) => match error.downcast_ref::<Unreachable>() {
            Some(unreachable) => unreachable.to_string(),
            None => format!("the API server cannot be asked: {}", innermost(error.as_ref())),
        },
        kube::Error::ReadEvents(error) => format!("the watch broke off: {}", innermost(error)),
        kube::Error::HyperError(error) => format!("the answer broke off: {}", innermost(error)),
        kube::Error::SerdeError(error) => format!("the API server's answer cannot be read: {error}"),
        kube::Error::Auth(error) => format!("the credentials cannot be used: {}", innermost(error)),
        other => format!("the API server cannot be asked: {other}"),
    }
}

fn refusal(status: &Status) -> String {
    let said = if status.message.is_empty() { &status.reason } else { &status.message };
    match status.code {
        401 => format!(
            "the API server does not know us (401 {said}): the token or the client certificate is missing, expired \
             or of another cluster"
        ),
        403 => match Denied::parse(said) {
            Some(denied) => denied.to_string(),
            None => format!("the API server refuses this (403): {said}"),
        },
        429 => format!("the API server has too much to do (429): {said}"),
        code => format!("the API server answers {code}: {said}"),
    }
}

/// What is refused to whom. Only the message says the verb: `Status` has no field for it.
#[derive(Debug, PartialEq, Eq)]
struct Denied<'a> {
    user: &'a str,
    verb: &'a str,
    resource: &'a str,
    group: &'a str,
    /// "at the cluster scope", or in which namespace; and what the authorizer adds.
    place: &'a str,
}

impl<'a> Denied<'a> {
    /// Of `… User "u" cannot list resource "r" in API group "g" at the cluster scope`, as k8s.io/apiserver's
    /// `responsewriters.Forbidden` writes it.
    fn parse(message: &'a str) -> Option<Self> {
        let (user, rest) = message.split_once("User \"")?.1.split_once("\" cannot ")?;
        let (verb, rest) = rest.split_once(" resource \"")?;
        let (resource, rest) = rest.split_once("\" in API group \"")?;
        let (group, place) = rest.split_once('"')?;
        Some(Self { user, verb, resource, group, place: place.trim() })
    }
}

impl std::fmt::Display for Denied<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { user, verb, resource, group, place } = self;
        let (main, sub) = resource.split_once('/').map_or((*resource, ""), |(main, sub)| (main, sub));
        let dot = if group.is_empty() { "" } else { "." };
        let slash = if sub.is_empty() { "" } else { "/" };
        write!(f, "the API server refuses {verb} of {main}{dot}{group}{slash}{sub} to {user} {place}: ")?;
        write!(f, "its role has to allow verb {verb:?} on resource {resource:?} in API group {group:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Status::failure(message, "Reason").with_code(code).boxed())
    }

    #[test]
    fn a_missing_permission_is_named() {
        let cases = [
            (
                "endpointslices.discovery.k8s.io is forbidden: User \
                 \"system:serviceaccount:kube-system:dataplane\" cannot list resource \"endpointslices\" in API \
                 group \"discovery.k8s.io\" at the cluster scope",
                "the API server refuses list of endpointslices.discovery.k8s.io to \
                 system:serviceaccount:kube-system:dataplane at the cluster scope: its role has to allow verb \
                 \"list\" on resource \"endpointslices\" in API group \"discovery.k8s.io\"",
            ),
            (
                "nodes \"n1\" is forbidden: User \"u\" cannot patch resource \"nodes/status\" in API group \"\" at \
                 the cluster scope: RBAC: clusterrole.rbac.authorization.k8s.io \"x\" not found",
                "the API server refuses patch of nodes/status to u at the cluster scope: RBAC: \
                 clusterrole.rbac.authorization.k8s.io \"x\" not found: its role has to allow verb \"patch\" on \
                 resource \"nodes/status\" in API group \"\"",
            ),
            ("no", "the API server refuses this (403): no"),
        ];
        for (message, sentence) in cases {
            assert_eq!(explain(&status(403, message)), sentence);
        }
    }

    #[test]
    fn other_refusals_say_their_code() {
        let unknown = explain(&status(401, "Unauthorized"));
        assert!(unknown.starts_with("the API server does not know us (401 Unauthorized)"), "{unknown}");
        assert_eq!(explain(&status(410, "too old")), "the API server answers 410: too old");
        assert_eq!(explain(&status(500, "")), "the API server answers 500: Reason");
    }
}
