//! The addresses of a Service port, and the rows of each: flags, scope and backends.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::abi::{Port, Scope, ServiceFlags, ServiceKey};

use super::{EligibleEndpoints, Frontend, NodeContext, PortEntries, ServicePortKey};
use crate::state::{Forwarding, Service, ServicePort, TrafficPolicy};

/// An address at which clients reach a port.
#[derive(Clone, Copy, Debug)]
pub(super) enum FrontendAddress {
    ClusterIp(IpAddr),
    ExternalIp(IpAddr),
    LoadBalancerIp(IpAddr),
    /// A node port, at all node addresses of this address's family.
    NodePort(IpAddr, u16),
}

pub(super) fn frontends(
    service: &Service,
    port: &ServicePort,
    family: fn(&IpAddr) -> bool,
) -> Vec<FrontendAddress> {
    let of_family = |ips: &'_ [IpAddr]| ips.iter().copied().filter(family).collect::<BTreeSet<_>>();
    let cluster = of_family(&service.cluster_ips);
    // an address named by several fields counts as the first of them, in kube-proxy's order
    let external = &of_family(&service.external_ips) - &cluster;
    let balancer = &(&of_family(&service.load_balancer_ips) - &cluster) - &external;
    let node = port.node_port.zip(cluster.first()).map(|(number, ip)| FrontendAddress::NodePort(*ip, number));
    cluster
        .iter()
        .copied()
        .map(FrontendAddress::ClusterIp)
        .chain(external.iter().copied().map(FrontendAddress::ExternalIp))
        .chain(balancer.iter().copied().map(FrontendAddress::LoadBalancerIp))
        .chain(node)
        .collect()
}

impl FrontendAddress {
    /// Adds the rows of the address: one for all clients, or one for local clients and one for
    /// external ones.
    pub(super) fn add_to(
        self,
        entries: &mut PortEntries,
        service: &Service,
        eligible: &EligibleEndpoints,
        node_context: &NodeContext,
    ) {
        let ServicePortKey { port, protocol, .. } = entries.key;
        let key = |ip: IpAddr, port: u16, scope: Scope| ServiceKey {
            addr: ip.into(),
            port: Port::new(port),
            protocol: protocol.number(),
            scope: scope as u8,
        };
        let key_for = |scope| match self {
            Self::ClusterIp(ip) | Self::ExternalIp(ip) | Self::LoadBalancerIp(ip) => key(ip, port, scope),
            Self::NodePort(ip, number) => key(ip, number, scope).at_node(),
        };
        let has_source_ranges = match self {
            // also where it is another kind of address too: kube-proxy checks source ranges first.
            // Ranges of only the other family do not count
            Self::ClusterIp(ip) | Self::ExternalIp(ip) | Self::LoadBalancerIp(ip) => {
                service.load_balancer_ips.contains(&ip)
                    && entries.source_ranges.iter().any(|range| range.addr().is_ipv4() == ip.is_ipv4())
            }
            Self::NodePort(..) => false,
        };
        let source_ranges_flag = if has_source_ranges { ServiceFlags::SOURCE_RANGES } else { 0 };
        let policy = match self {
            Self::ClusterIp(_) => service.internal_policy,
            _ => service.external_policy,
        };
        let local = source_ranges_flag | eligible.local_flags();
        // for processes of this node, which are never external
        let any_local = local | node_context.host_flags(&eligible.local);
        let any = source_ranges_flag | node_context.host_flags(&eligible.cluster);
        match (self, policy) {
            (_, TrafficPolicy::Cluster) => {
                let dsr = if entries.forwarding == Forwarding::Dsr { ServiceFlags::DSR } else { 0 };
                entries.add(Frontend { key: key_for(Scope::Any), flags: any | dsr }, &eligible.cluster);
            }
            (Self::ClusterIp(_), TrafficPolicy::Local) => {
                entries.add(Frontend { key: key_for(Scope::Any), flags: any_local }, &eligible.local);
            }
            // local clients reach all endpoints (kube-proxy's short circuit); the row for external
            // clients is written first
            (_, TrafficPolicy::Local) => {
                entries.add(Frontend { key: key_for(Scope::Outside), flags: local }, &eligible.local);
                let both = any | ServiceFlags::OUTSIDE;
                entries.add(Frontend { key: key_for(Scope::Any), flags: both }, &eligible.cluster);
            }
        }
    }
}
