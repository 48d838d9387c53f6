//! The endpoints of a Service port, and those eligible on a node (`endpointslicecache.go`,
//! `topology.go`).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice};

use super::{
    ports::{HEADLESS, ServicePort},
    topology::Node,
};

/// The label with the name of the Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// An endpoint: an address and port with its conditions and hints.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) at: SocketAddr,
    pub(super) node: Option<String>,
    is_ready: bool,
    is_serving: bool,
    is_terminating: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

/// The endpoints of a port that are eligible on a node.
#[derive(Debug, Default)]
pub(super) struct EligibleEndpoints<'a> {
    pub(super) cluster: Vec<&'a Endpoint>,
    pub(super) local: Vec<&'a Endpoint>,
    /// Whether any node has an eligible endpoint.
    pub(super) has_any: bool,
}

/// Returns the endpoints of `port` in all slices of its Service, each address once.
pub(super) fn of_port(
    port: &ServicePort,
    namespace: Option<&str>,
    service: &str,
    slices: &[EndpointSlice],
) -> Vec<Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    let family = if port.cluster.is_ipv4() { "IPv4" } else { "IPv6" };
    let is_of_service = |slice: &&EndpointSlice| {
        let label = |name: &str| slice.metadata.labels.as_ref().and_then(|labels| labels.get(name));
        label(SERVICE_NAME).is_some_and(|name| name == service)
            && label(HEADLESS).is_none()
            && slice.metadata.namespace.as_deref() == namespace
            && slice.address_type == family
    };
    for slice in slices.iter().filter(is_of_service) {
        for target in slice.ports.iter().flatten() {
            let is_port = target.name.as_deref().unwrap_or_default() == port.name
                && port.protocol.is_named(target.protocol.as_ref());
            let number =
                target.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0);
            let Some(number) = number.filter(|_| is_port) else { continue };
            for endpoint in slice.endpoints.iter().flatten() {
                let Some(endpoint) = Endpoint::read(endpoint, number) else { continue };
                // an address may appear twice, of an old terminating pod and of its new owner: keep
                // the owner
                if !found.contains_key(&endpoint.at) || !endpoint.is_terminating {
                    found.insert(endpoint.at, endpoint);
                }
            }
        }
    }
    found.into_values().collect()
}

impl Endpoint {
    fn read(endpoint: &ApiEndpoint, port: u16) -> Option<Self> {
        // Kubernetes ignores further addresses of an endpoint
        let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let hints = endpoint.hints.clone().unwrap_or_default();
        Some(Self {
            at: SocketAddr::new(address, port),
            node: endpoint.node_name.clone(),
            is_ready: conditions.ready.unwrap_or(true),
            is_serving: conditions.serving.unwrap_or(true),
            is_terminating: conditions.terminating.unwrap_or(false),
            zones: hints.for_zones.into_iter().flatten().map(|zone| zone.name).collect(),
            nodes: hints.for_nodes.into_iter().flatten().map(|node| node.name).collect(),
        })
    }

    fn is_on(&self, node: &Node) -> bool {
        self.node.as_ref() == Some(&node.name)
    }

    /// Terminating but serving: eligible if no endpoint is ready.
    const fn is_terminating_fallback(&self) -> bool {
        self.is_serving && self.is_terminating
    }
}

/// Returns the endpoints that are eligible on `node`.
pub(super) fn eligible<'a>(
    port: &ServicePort,
    endpoints: &'a [Endpoint],
    node: &Node,
) -> EligibleEndpoints<'a> {
    let mut eligible = EligibleEndpoints::default();
    if port.uses_cluster() {
        let ready: Vec<&Endpoint> = endpoints.iter().filter(|endpoint| endpoint.is_ready).collect();
        let by_topology_hints = by_topology_hints(&ready, node);
        eligible.cluster = if by_topology_hints.is_empty() {
            endpoints.iter().filter(|endpoint| endpoint.is_terminating_fallback()).collect()
        } else {
            by_topology_hints
        };
        eligible.has_any = !eligible.cluster.is_empty();
    }
    if port.uses_local() {
        eligible.has_any |=
            endpoints.iter().any(|endpoint| endpoint.is_ready || endpoint.is_terminating_fallback());
        let local = || endpoints.iter().filter(|endpoint| endpoint.is_on(node));
        eligible.local = local().filter(|endpoint| endpoint.is_ready).collect();
        if eligible.local.is_empty() {
            eligible.local = local().filter(|endpoint| endpoint.is_terminating_fallback()).collect();
        }
    }
    eligible
}

/// Returns the endpoints hinted for the node, else those hinted for its zone, else all. A kind of
/// hint counts only if all endpoints have one and at least one matches.
fn by_topology_hints<'a>(ready: &[&'a Endpoint], node: &Node) -> Vec<&'a Endpoint> {
    let matching = |hints: fn(&Endpoint) -> &[String], wanted: &String| -> Vec<&'a Endpoint> {
        if ready.iter().any(|endpoint| hints(endpoint).is_empty()) {
            return Vec::new();
        }
        ready.iter().copied().filter(|endpoint| hints(endpoint).contains(wanted)).collect()
    };
    let on_node = matching(|endpoint| &endpoint.nodes, &node.name);
    if !on_node.is_empty() {
        return on_node;
    }
    let in_zone =
        node.zone.as_ref().map(|zone| matching(|endpoint| &endpoint.zones, zone)).unwrap_or_default();
    if in_zone.is_empty() { ready.to_vec() } else { in_zone }
}
