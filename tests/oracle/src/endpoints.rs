//! Who stands behind a port, and which of them a node may use (`endpointslicecache.go`, `topology.go`).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice};

use super::{
    ports::{HEADLESS, Port},
    world::Node,
};

/// Says whose slice it is.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// One address and port.
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

/// What a node may use of a port's endpoints.
#[derive(Debug, Default)]
pub(super) struct Usable<'a> {
    pub(super) cluster: Vec<&'a Endpoint>,
    pub(super) local: Vec<&'a Endpoint>,
    /// There is one somewhere, for whom it may concern.
    pub(super) has_any: bool,
}

/// Of all slices of a service, those behind `port`: each address once.
pub(super) fn behind(
    port: &Port,
    namespace: Option<&str>,
    service: &str,
    slices: &[EndpointSlice],
) -> Vec<Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    let family = if port.cluster.is_ipv4() { "IPv4" } else { "IPv6" };
    let is_its_own = |slice: &&EndpointSlice| {
        let label = |name: &str| slice.metadata.labels.as_ref().and_then(|labels| labels.get(name));
        label(SERVICE_NAME).is_some_and(|name| name == service)
            && label(HEADLESS).is_none()
            && slice.metadata.namespace.as_deref() == namespace
            && slice.address_type == family
    };
    for slice in slices.iter().filter(is_its_own) {
        for target in slice.ports.iter().flatten() {
            let is_it = target.name.as_deref().unwrap_or_default() == port.name
                && port.protocol.is_named(target.protocol.as_ref());
            let number =
                target.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0);
            let Some(number) = number.filter(|_| is_it) else { continue };
            for endpoint in slice.endpoints.iter().flatten() {
                let Some(endpoint) = Endpoint::read(endpoint, number) else { continue };
                // of two with one address the one that stays is meant: the other is the pod that had it before
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
        // further addresses of an endpoint have never had a meaning
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

    /// Better than nobody: it ends, and still serves.
    const fn is_leaving(&self) -> bool {
        self.is_serving && self.is_terminating
    }
}

/// What `node` may use of them.
pub(super) fn usable<'a>(port: &Port, endpoints: &'a [Endpoint], node: &Node) -> Usable<'a> {
    let mut usable = Usable::default();
    if port.uses_cluster() {
        let ready: Vec<&Endpoint> = endpoints.iter().filter(|endpoint| endpoint.is_ready).collect();
        let nearest = nearest(&ready, node);
        usable.cluster = if nearest.is_empty() {
            endpoints.iter().filter(|endpoint| endpoint.is_leaving()).collect()
        } else {
            nearest
        };
        usable.has_any = !usable.cluster.is_empty();
    }
    if port.uses_local() {
        usable.has_any |= endpoints.iter().any(|endpoint| endpoint.is_ready || endpoint.is_leaving());
        let local = || endpoints.iter().filter(|endpoint| endpoint.is_on(node));
        usable.local = local().filter(|endpoint| endpoint.is_ready).collect();
        if usable.local.is_empty() {
            usable.local = local().filter(|endpoint| endpoint.is_leaving()).collect();
        }
    }
    usable
}

/// Those meant for the node, else those meant for its zone, else all. A hint counts if everyone has one of its kind and one of
/// them fits.
fn nearest<'a>(ready: &[&'a Endpoint], node: &Node) -> Vec<&'a Endpoint> {
    let fitting = |hints: fn(&Endpoint) -> &[String], wanted: &String| -> Vec<&'a Endpoint> {
        if ready.iter().any(|endpoint| hints(endpoint).is_empty()) {
            return Vec::new();
        }
        ready.iter().copied().filter(|endpoint| hints(endpoint).contains(wanted)).collect()
    };
    let on_node = fitting(|endpoint| &endpoint.nodes, &node.name);
    if !on_node.is_empty() {
        return on_node;
    }
    let in_zone =
        node.zone.as_ref().map(|zone| fitting(|endpoint| &endpoint.zones, zone)).unwrap_or_default();
    if in_zone.is_empty() { ready.to_vec() } else { in_zone }
}
