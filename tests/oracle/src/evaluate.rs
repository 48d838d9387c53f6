//! A node's rules in order (`nftables/proxier.go`): frontend, source ranges, traffic policy,
//! source.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use super::{
    Client, Destination, Protocol, Rules, Topology, Verdict,
    differences::HairpinSource,
    endpoints::{self, EligibleEndpoints, Endpoint},
    ports::{self, ServicePort},
    topology::{Entry, Origin},
};

/// The kind of frontend address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The cluster IP.
    Internal,
    /// A node port, load balancer IP or external IP.
    External,
}

pub(super) fn verdict(
    rules: Rules,
    topology: &Topology,
    service: &Service,
    slices: &[EndpointSlice],
    client: &Client<'_>,
    destination: &Destination,
) -> Result<Verdict> {
    let ports = ports::of(service, destination.address);
    let first = topology.first_entry(client)?;
    let Some((port, kind, entry)) = frontend(topology, &ports, first, destination) else {
        // other ports of a cluster IP are rejected
        let is_cluster = ports.iter().any(|port| port.cluster == destination.address);
        return Ok(if is_cluster { Verdict::Rejected } else { Verdict::NoFrontend });
    };
    let is_sctp_from_host = destination.protocol == Protocol::Sctp && entry.origin == Origin::Host;
    let is_excluded = is_sctp_from_host && !rules.sctp_from_host_to_own_node;
    if is_excluded && entry.node.addresses.contains(&destination.address) {
        return Ok(Verdict::NotTranslated);
    }
    if !is_allowed(port, entry, client, destination) {
        return Ok(Verdict::Dropped);
    }
    let name = service.metadata.name.as_deref().context("a Service without a name")?;
    let endpoints = endpoints::of_port(port, service.metadata.namespace.as_deref(), name, slices);
    let eligible = endpoints::eligible(port, &endpoints, entry.node);
    let rule_set = RuleSet { rules, topology, client, entry, kind, port };
    let verdict = rule_set.verdict(&eligible)?;
    Ok(match &verdict {
        Verdict::Delivered(endpoints)
            if is_excluded && endpoints.keys().all(|at| entry.node.addresses.contains(&at.ip())) =>
        {
            Verdict::Dropped
        }
        _ => verdict,
    })
}

/// Returns the Service port, and the node that translates. Service addresses exist on every node,
/// so the client's first node translates; a node port exists on the node that has the address.
fn frontend<'a>(
    topology: &'a Topology,
    ports: &'a [ServicePort],
    first: Entry<'a>,
    destination: &Destination,
) -> Option<(&'a ServicePort, Kind, Entry<'a>)> {
    let Destination { address, port: number, protocol } = destination;
    let mut of_protocol = ports.iter().filter(|port| port.protocol == *protocol);
    let service = of_protocol.clone().filter(|port| port.number == *number).find_map(|port| {
        let is_external = port.external.contains(address) || port.load_balancer_ips.contains(address);
        match (port.cluster == *address, is_external) {
            (true, _) => Some((port, Kind::Internal, first)),
            (_, true) => Some((port, Kind::External, first)),
            _ => None,
        }
    });
    service.or_else(|| {
        let port = of_protocol.find(|port| port.node_port == *number && *number != 0)?;
        Some((port, Kind::External, topology.node_port_entry(first, *address)?))
    })
}

/// Whether the source ranges admit the client. They apply only to load balancer IPs, and also to
/// pods and hosts. Checked first (the iptables rules first reject a port without endpoints).
fn is_allowed(port: &ServicePort, entry: Entry<'_>, client: &Client<'_>, destination: &Destination) -> bool {
    if port.source_ranges.is_empty() || !port.load_balancer_ips.contains(&destination.address) {
        return true;
    }
    let allows = |address: &IpAddr| port.source_ranges.iter().any(|range| range.contains(address));
    // a node that owns the load balancer IP uses it as source; it is allowed if its own address is
    let is_node = entry.node.addresses.iter().any(allows) && port.load_balancer_ips.contains(&client.address);
    allows(&client.address) || is_node
}

/// The rules of one node for one connection.
struct RuleSet<'a> {
    rules: Rules,
    topology: &'a Topology,
    client: &'a Client<'a>,
    entry: Entry<'a>,
    kind: Kind,
    port: &'a ServicePort,
}

impl RuleSet<'_> {
    fn verdict(&self, eligible: &EligibleEndpoints<'_>) -> Result<Verdict> {
        let candidates = if self.is_local_only() { &eligible.local } else { &eligible.cluster };
        if !eligible.has_any {
            return Ok(Verdict::Rejected);
        }
        if candidates.is_empty() {
            return Ok(Verdict::Dropped);
        }
        let pairs = candidates.iter().map(|endpoint| Ok((endpoint.at, self.source(endpoint)?)));
        Ok(Verdict::Delivered(pairs.collect::<Result<Vec<(SocketAddr, IpAddr)>>>()?.into_iter().collect()))
    }

    /// Whether only endpoints of the node are eligible. The external policy applies only to clients
    /// outside; pods and processes of the node reach all endpoints.
    fn is_local_only(&self) -> bool {
        match self.kind {
            Kind::Internal => self.port.is_internal_local,
            Kind::External => self.port.is_external_local && self.entry.origin == Origin::Outside,
        }
    }

    /// Returns the source address that this endpoint sees.
    fn source(&self, endpoint: &Endpoint) -> Result<IpAddr> {
        let address = self.client.address;
        if endpoint.at.ip() == address {
            return match self.rules.hairpin_source(self.port.protocol) {
                HairpinSource::Pod if self.entry.origin == Origin::Pod => Ok(address),
                _ => self.entry.node.address(address),
            };
        }
        let is_kept = (self.entry.origin == Origin::Pod && self.rules.keeps_pod_source)
            || (self.entry.origin == Origin::Outside
                && self.rules.keeps_outside_source_on_node
                && self.is_on_entry(endpoint))
            || !self.is_masqueraded(endpoint);
        if is_kept { Ok(address) } else { self.entry.node.address(address) }
    }

    /// Whether kube-proxy masquerades the connection.
    fn is_masqueraded(&self, endpoint: &Endpoint) -> bool {
        // marked packets are masqueraded in postrouting, which a packet to the node itself does not
        // pass
        let stays =
            self.entry.origin != Origin::Host && self.entry.node.addresses.contains(&endpoint.at.ip());
        let is_marked = match self.kind {
            Kind::Internal => self.entry.origin != Origin::Pod,
            Kind::External => !self.port.is_external_local || self.entry.origin == Origin::Host,
        };
        is_marked && !stays
    }

    fn is_on_entry(&self, endpoint: &Endpoint) -> bool {
        let node = endpoint.node.as_deref().or_else(|| self.topology.node_of(endpoint.at.ip()));
        node == Some(self.entry.node.name.as_str())
    }
}
