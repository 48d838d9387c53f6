//! Requests to the API server (paths, selectors, parameters), and the outer structure of its
//! responses.
//!
//! Objects stay text ([`RawValue`]) until each is converted: an invalid one does not affect its
//! list, and no list is in memory twice.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write as _};

use http::{Request, header};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::source::objects::Kind;

/// Excludes Services of another service proxy and headless ones, as kube-proxy does.
const MANAGED_SELECTOR: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Objects per page.
const PAGE_LIMIT: u32 = 500;
/// Annotation of the bookmark that ends the initial events of a watch.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// The requests of one kind.
#[derive(Clone, Debug)]
pub(super) struct Requests {
    path: &'static str,
    /// Plural name and group, as in RBAC rules.
    pub(super) resource: &'static str,
    selector: Option<(&'static str, String)>,
}

/// Where a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchStart<'a> {
    /// With a streaming list of all objects.
    InitialEvents,
    /// After this resourceVersion.
    After(&'a str),
}

impl Requests {
    pub(super) fn new(kind: Kind, node: &str) -> Self {
        let (path, resource) = match kind {
            Kind::Node => ("/api/v1/nodes", "nodes"),
            Kind::Namespace => ("/api/v1/namespaces", "namespaces"),
            Kind::Service => ("/api/v1/services", "services"),
            Kind::EndpointSlice => {
                ("/apis/discovery.k8s.io/v1/endpointslices", "endpointslices.discovery.k8s.io")
            }
            Kind::Pod => ("/api/v1/pods", "pods"),
            Kind::ServiceCidr => {
                ("/apis/networking.k8s.io/v1/servicecidrs", "servicecidrs.networking.k8s.io")
            }
        };
        let selector = match kind {
            Kind::Service | Kind::EndpointSlice => Some(("labelSelector", MANAGED_SELECTOR.to_owned())),
            Kind::Pod => Some(("fieldSelector", format!("spec.nodeName={node}"))),
            Kind::Node | Kind::Namespace | Kind::ServiceCidr => None,
        };
        Self { path, resource, selector }
    }

    /// Requests a page of the list. `next` is the `continue` token of the previous page; without
    /// `paged`, requests everything at once.
    pub(super) fn list(&self, next: Option<&str>, paged: bool) -> Result<Request<Vec<u8>>, http::Error> {
        let limit = PAGE_LIMIT.to_string();
        let mut parameters = Vec::new();
        if paged {
            parameters.push(("limit", limit.as_str()));
        }
        parameters.extend(next.map(|next| ("continue", next)));
        self.get(&parameters)
    }

    /// Requests a watch that the server ends after `seconds`.
    pub(super) fn watch(&self, start: WatchStart<'_>, seconds: u64) -> Result<Request<Vec<u8>>, http::Error> {
        let seconds = seconds.to_string();
        let mut parameters =
            vec![("watch", "true"), ("allowWatchBookmarks", "true"), ("timeoutSeconds", seconds.as_str())];
        match start {
            WatchStart::InitialEvents => {
                parameters.extend([("sendInitialEvents", "true"), ("resourceVersionMatch", "NotOlderThan")]);
            }
            WatchStart::After(version) => parameters.push(("resourceVersion", version)),
        }
        self.get(&parameters)
    }

    fn get(&self, parameters: &[(&str, &str)]) -> Result<Request<Vec<u8>>, http::Error> {
        let mut uri = self.path.to_owned();
        let selector = self.selector.iter().map(|(name, value)| (*name, value.as_str()));
        for (index, (name, value)) in selector.chain(parameters.iter().copied()).enumerate() {
            let separator = if index == 0 { '?' } else { '&' };
            uri += &format!("{separator}{name}=");
            encode(&mut uri, value);
        }
        Request::get(uri)
            .header(header::ACCEPT, "application/json")
            // API servers from 1.37 on compress watches event by event
            .header(header::ACCEPT_ENCODING, "identity")
            .body(Vec::new())
    }
}

/// Percent-encodes a query value (RFC 3986 §2.3).
fn encode(uri: &mut String, value: &str) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            // writing to a string cannot fail
            let _written = write!(uri, "%{byte:02X}");
        }
    }
}

/// A page of a list.
#[derive(Deserialize)]
pub(super) struct Page<'a> {
    #[serde(default)]
    pub(super) metadata: PageMeta,
    #[serde(borrow, default)]
    pub(super) items: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMeta {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default)]
    pub(super) r#continue: Option<String>,
}

/// A watch event.
#[derive(Deserialize)]
pub(super) struct WatchLine<'a> {
    #[serde(borrow)]
    pub(super) r#type: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) object: &'a RawValue,
}

/// The part of any object that identifies it.
#[derive(Debug, Deserialize)]
pub(super) struct ObjectHead {
    pub(super) metadata: ObjectHeadMeta,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ObjectHeadMeta {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) resource_version: String,
}

/// A bookmark.
#[derive(Deserialize)]
pub(super) struct Bookmark {
    pub(super) metadata: BookmarkMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BookmarkMeta {
    pub(super) resource_version: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl BookmarkMeta {
    /// Whether all initial events were sent.
    pub(super) fn ends_initial_events(&self) -> bool {
        self.annotations.as_ref().is_some_and(|all| all.contains_key(INITIAL_EVENTS_END))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(request: Result<Request<Vec<u8>>, http::Error>) -> String {
        request.unwrap().uri().to_string()
    }

    #[test]
    fn services_and_slices_are_selected_as_in_kube_proxy() {
        let selected = "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name%2C%21service.kubernetes.io%2Fheadless";
        for (kind, path) in [
            (Kind::Service, "/api/v1/services"),
            (Kind::EndpointSlice, "/apis/discovery.k8s.io/v1/endpointslices"),
        ] {
            let first = uri(Requests::new(kind, "n1").list(None, true));
            assert_eq!(first, format!("{path}?{selected}&limit=500"));
        }
        assert_eq!(uri(Requests::new(Kind::Node, "n1").list(None, false)), "/api/v1/nodes");
        let next = uri(Requests::new(Kind::Node, "n1").list(Some("a=/b"), true));
        assert_eq!(next, "/api/v1/nodes?limit=500&continue=a%3D%2Fb");
    }

    #[test]
    fn only_pods_of_this_node_are_requested() {
        let watch = uri(Requests::new(Kind::Pod, "n1").watch(WatchStart::After("7"), 300));
        let parameters = "watch=true&allowWatchBookmarks=true&timeoutSeconds=300&resourceVersion=7";
        assert_eq!(watch, format!("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&{parameters}"));
        let everything = uri(Requests::new(Kind::Pod, "n1").watch(WatchStart::InitialEvents, 300));
        assert!(
            everything.ends_with("&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"),
            "{everything}"
        );
    }

    #[test]
    fn bookmark_that_ends_initial_events_is_recognized() {
        let bookmark =
            |text: &str| serde_json::from_str::<Bookmark>(text).unwrap().metadata.ends_initial_events();
        let end =
            r#"{"metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}"#;
        assert!(bookmark(end));
        assert!(!bookmark(r#"{"kind":"Node","metadata":{"resourceVersion":"1","annotations":null}}"#));
    }
}
