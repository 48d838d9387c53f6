//! Which endpoints of a port receive new connections: readiness, traffic policy and topology hints.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::abi::{Port, ServiceFlags};

use super::{Backend, NodeContext};
use crate::state::{Endpoint, EndpointSlice, Forwarding, Hints, ServicePort};

/// The endpoints of a port that receive new connections, by traffic policy.
#[derive(Debug)]
pub(super) struct EligibleEndpoints {
    pub(super) cluster: Vec<Backend>,
    pub(super) local: Vec<Backend>,
}

impl EligibleEndpoints {
    /// Selects ready endpoints, or else serving terminating ones (KEP-1669): during a rolling
    /// update of a single replica, the old pod is better than a rejection. Decided per policy and
    /// family (`CategorizeEndpoints` of k8s.io/kubernetes/pkg/proxy).
    pub(super) fn of(
        port: &ServicePort,
        slices: &[&EndpointSlice],
        family: fn(&IpAddr) -> bool,
        node_context: &NodeContext,
        forwarding: Forwarding,
    ) -> Self {
        let all = endpoints_of_port(port, slices, family);
        let topology_scope = match forwarding {
            Forwarding::Snat => TopologyScope::of(&all, node_context),
            // both nodes of a DSR connection must select from the same backends
            Forwarding::Dsr => TopologyScope::Any,
        };
        let ready = |in_scope: &dyn Fn(&Endpoint) -> bool| {
            let ready = all.iter().filter(|(endpoint, _)| endpoint.ready && in_scope(endpoint));
            ready.map(|(_, backend)| *backend).collect::<BTreeSet<_>>()
        };
        let terminating = |in_scope: &dyn Fn(&Endpoint) -> bool| {
            let terminating = all
                .iter()
                .filter(|(endpoint, _)| endpoint.serving && endpoint.terminating && in_scope(endpoint));
            terminating.map(|(_, backend)| *backend).collect::<BTreeSet<_>>()
        };
        let first = |one: BTreeSet<Backend>, other: BTreeSet<Backend>| -> Vec<Backend> {
            if one.is_empty() { other } else { one }.into_iter().collect()
        };
        let here = |endpoint: &Endpoint| node_context.is_local(endpoint);
        Self {
            cluster: first(
                ready(&|endpoint| topology_scope.includes(endpoint, node_context)),
                terminating(&|_| true),
            ),
            local: first(ready(&here), terminating(&here)),
        }
    }

    /// Flags of a frontend with local endpoints only. Without one, packets are dropped if other
    /// nodes have endpoints, and rejected if no node has.
    pub(super) const fn local_flags(&self) -> u32 {
        if self.local.is_empty() && self.cluster.is_empty() { 0 } else { ServiceFlags::LOCAL }
    }
}

/// Number of ready endpoints on this node, for the health check of the Service. A dual-stack
/// endpoint is in a slice of each family and counts once, as in kube-proxy.
pub fn count_local_ready<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node_context: &NodeContext,
) -> usize {
    let endpoints = slices.into_iter().flat_map(|slice| &slice.endpoints);
    let ready = endpoints.filter(|endpoint| endpoint.ready && node_context.is_local(endpoint));
    let ready: BTreeSet<IpAddr> = ready.map(|endpoint| endpoint.address).collect();
    let ipv4 = ready.iter().filter(|address| address.is_ipv4()).count();
    ipv4.max(ready.len() - ipv4)
}

/// All endpoints of a port in a family, each address once. If two endpoints share an address, the
/// terminating one is the former pod.
pub(super) fn endpoints_of_port<'a>(
    port: &ServicePort,
    slices: &[&'a EndpointSlice],
    family: fn(&IpAddr) -> bool,
) -> Vec<(&'a Endpoint, Backend)> {
    let mut found: BTreeMap<Backend, &Endpoint> = BTreeMap::new();
    for slice in slices {
        // a named target port may differ between slices
        let targets = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in targets {
            for endpoint in slice.endpoints.iter().filter(|endpoint| family(&endpoint.address)) {
                let backend = Backend { addr: endpoint.address.into(), port: Port::new(target.port) };
                if !endpoint.terminating || !found.contains_key(&backend) {
                    found.insert(backend, endpoint);
                }
            }
        }
    }
    found.into_iter().map(|(backend, endpoint)| (endpoint, backend)).collect()
}

/// Which ready endpoints are near enough (`trafficDistribution`, by EndpointSlice hints).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TopologyScope {
    Node,
    Zone,
    /// Some endpoints have no hints, or none has hints for this node.
    Any,
}

impl TopologyScope {
    fn of(all: &[(&Endpoint, Backend)], node_context: &NodeContext) -> Self {
        let ready = || all.iter().map(|(endpoint, _)| *endpoint).filter(|endpoint| endpoint.ready);
        let all_hinted =
            |is: fn(&Hints) -> bool| ready().all(|endpoint| endpoint.hints.as_deref().is_some_and(is));
        let some = |in_scope: Self| ready().any(|endpoint| in_scope.includes(endpoint, node_context));
        if all_hinted(|hints| !hints.nodes.is_empty()) && some(Self::Node) {
            Self::Node
        } else if all_hinted(|hints| !hints.zones.is_empty()) && some(Self::Zone) {
            Self::Zone
        } else {
            Self::Any
        }
    }

    fn includes(self, endpoint: &Endpoint, node_context: &NodeContext) -> bool {
        let hints = endpoint.hints.as_deref();
        match self {
            Self::Node => {
                hints.is_some_and(|hints| hints.nodes.iter().any(|node| *node == node_context.node))
            }
            Self::Zone => hints
                .is_some_and(|hints| hints.zones.iter().any(|zone| Some(zone) == node_context.zone.as_ref())),
            Self::Any => true,
        }
    }
}
