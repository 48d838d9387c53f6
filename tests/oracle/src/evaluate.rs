//! The way of a question through a node's rules (`nftables/proxier.go`): firewall, frontend, policy, source.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use super::{
    Client, Protocol, Question, Rules, Verdict, World,
    differences::Itself,
    endpoints::{self, Endpoint, Usable},
    ports::{self, Port},
    world::{Entry, From},
};

/// Which kind of address was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The service's own.
    Internal,
    /// Meant for the outside.
    External,
}

pub(super) fn verdict(
    rules: Rules,
    world: &World,
    service: &Service,
    slices: &[EndpointSlice],
    client: &Client<'_>,
    question: &Question,
) -> Result<Verdict> {
    let ports = ports::of(service, question.address);
    let first = world.first_entry(client)?;
    let Some((port, kind, entry)) = frontend(world, &ports, first, question) else {
        // an address that is the service's alone has nothing at other ports
        let is_cluster = ports.iter().any(|port| port.cluster == question.address);
        return Ok(if is_cluster { Verdict::Rejected } else { Verdict::NotOurs });
    };
    let is_sctp_of_host = question.protocol == Protocol::Sctp && entry.from == From::Host;
    let goes_back = is_sctp_of_host && !rules.sctp_leads_back_to_its_own_host;
    if goes_back && entry.node.addresses.contains(&question.address) {
        return Ok(Verdict::LeftAlone);
    }
    if !may_pass(port, entry, client, question) {
        return Ok(Verdict::Dropped);
    }
    let name = service.metadata.name.as_deref().context("a Service without a name")?;
    let endpoints = endpoints::behind(port, service.metadata.namespace.as_deref(), name, slices);
    let usable = endpoints::usable(port, &endpoints, entry.node);
    let way = Way { rules, world, client, entry, kind, port };
    let verdict = way.verdict(&usable)?;
    Ok(match &verdict {
        Verdict::Answered(who)
            if goes_back && who.keys().all(|at| entry.node.addresses.contains(&at.ip())) =>
        {
            Verdict::Dropped
        }
        _ => verdict,
    })
}

/// The port asked for, and the node that says so. A service's addresses hold on every node, so the first one translates; a
/// `NodePort` holds where the address is.
fn frontend<'a>(
    world: &'a World,
    ports: &'a [Port],
    first: Entry<'a>,
    question: &Question,
) -> Option<(&'a Port, Kind, Entry<'a>)> {
    let Question { address, port: number, protocol } = question;
    let mut of_protocol = ports.iter().filter(|port| port.protocol == *protocol);
    let service = of_protocol.clone().filter(|port| port.number == *number).find_map(|port| {
        let is_external = port.external.contains(address) || port.balancers.contains(address);
        match (port.cluster == *address, is_external) {
            (true, _) => Some((port, Kind::Internal, first)),
            (_, true) => Some((port, Kind::External, first)),
            _ => None,
        }
    });
    service.or_else(|| {
        let port = of_protocol.find(|port| port.on_nodes == *number && *number != 0)?;
        Some((port, Kind::External, world.node_port_entry(first, *address)?))
    })
}

/// Source ranges close a balancer's addresses to all others, pods and hosts included, and nothing else. Looked at before
/// anything else (the rules for iptables refuse first where nobody could answer).
fn may_pass(port: &Port, entry: Entry<'_>, client: &Client<'_>, question: &Question) -> bool {
    if port.allowed.is_empty() || !port.balancers.contains(&question.address) {
        return true;
    }
    let allows = |address: &IpAddr| port.allowed.iter().any(|range| range.contains(address));
    // a node that has the balancer's address asks under it; if it may, so it may under that
    let is_node = entry.node.addresses.iter().any(allows) && port.balancers.contains(&client.address);
    allows(&client.address) || is_node
}

/// A question on its way through a node.
struct Way<'a> {
    rules: Rules,
    world: &'a World,
    client: &'a Client<'a>,
    entry: Entry<'a>,
    kind: Kind,
    port: &'a Port,
}

impl Way<'_> {
    fn verdict(&self, usable: &Usable<'_>) -> Result<Verdict> {
        let candidates = if self.is_local() { &usable.local } else { &usable.cluster };
        if !usable.has_any {
            return Ok(Verdict::Rejected);
        }
        if candidates.is_empty() {
            return Ok(Verdict::Dropped);
        }
        let pairs = candidates.iter().map(|endpoint| Ok((endpoint.at, self.source(endpoint)?)));
        Ok(Verdict::Answered(pairs.collect::<Result<Vec<(SocketAddr, IpAddr)>>>()?.into_iter().collect()))
    }

    /// Endpoints of the node alone may answer. External policy is for the outside: whoever is on the node goes the short way,
    /// as if through a balancer out and back.
    fn is_local(&self) -> bool {
        match self.kind {
            Kind::Internal => self.port.is_internal_local,
            Kind::External => self.port.is_external_local && self.entry.from == From::Outside,
        }
    }

    /// The address this endpoint sees.
    fn source(&self, endpoint: &Endpoint) -> Result<IpAddr> {
        let address = self.client.address;
        if endpoint.at.ip() == address {
            return match self.rules.itself(self.port.protocol) {
                Itself::Pod if self.entry.from == From::Pod => Ok(address),
                _ => self.entry.node.address(address),
            };
        }
        let is_kept = (self.entry.from == From::Pod && self.rules.pods_keep_their_source)
            || (self.entry.from == From::Outside
                && self.rules.outside_keeps_its_source_on_the_node
                && self.is_on_entry(endpoint))
            || !self.is_masqueraded(endpoint);
        if is_kept { Ok(address) } else { self.entry.node.address(address) }
    }

    /// By kube-proxy.
    fn is_masqueraded(&self, endpoint: &Endpoint) -> bool {
        // it marks packets, and masquerades what leaves the node: what comes in and is for the node itself never does
        let stays = self.entry.from != From::Host && self.entry.node.addresses.contains(&endpoint.at.ip());
        let is_marked = match self.kind {
            Kind::Internal => self.entry.from != From::Pod,
            Kind::External => !self.port.is_external_local || self.entry.from == From::Host,
        };
        is_marked && !stays
    }

    fn is_on_entry(&self, endpoint: &Endpoint) -> bool {
        let node = endpoint.node.as_deref().or_else(|| self.world.node_of(endpoint.at.ip()));
        node == Some(self.entry.node.name.as_str())
    }
}
