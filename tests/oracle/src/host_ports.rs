//! Host ports, written from the `portmap` plugin (`plugins/meta/portmap` of containernetworking).
//! kube-proxy and Service policies have no part in them.
//!
//! A connection from any client to the port at an address of the node goes to the pod; with
//! `hostIP`, only at that address. The client keeps its source address, except in a hairpin
//! connection and at loopback, where the pod sees the node.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};

use super::{
    Client, Destination, Location, Protocol, Rules, Topology, Verdict,
    differences::HairpinSource,
    topology::{Node, Origin},
};

/// A host port.
#[derive(Clone, Debug)]
pub struct HostPort<'a> {
    pub node: &'a str,
    /// `hostIP`; `None` or unspecified: every address of the node.
    pub host_ip: Option<IpAddr>,
    /// `hostPort`.
    pub number: u16,
    pub protocol: Protocol,
    /// `containerPort`.
    pub target: u16,
    /// Addresses of the pod.
    pub pod: &'a [IpAddr],
}

/// Returns the verdict of `rules` for a connection to an address of a node or of loopback, where
/// `ports` are the host ports.
///
/// # Errors
/// The client's node is not in the topology, or no node has the address.
pub fn at_host_ports(
    rules: Rules,
    topology: &Topology,
    ports: &[HostPort<'_>],
    client: &Client<'_>,
    destination: &Destination,
) -> Result<Verdict> {
    let entry = topology.first_entry(client)?;
    let node = match (destination.address.is_loopback(), client.location) {
        (true, Location::Host(_)) => entry.node,
        // loopback of the pod's own namespace
        (true, Location::Pod(_)) => return Ok(Verdict::NotTranslated),
        (true, Location::Outside { .. }) => bail!("an outside client cannot reach {}", destination.address),
        (false, _) => {
            match topology.nodes.iter().find(|node| node.addresses.contains(&destination.address)) {
                Some(node) => node,
                None => bail!("no node has address {}", destination.address),
            }
        }
    };
    let is_own = entry.origin == Origin::Host && entry.node.name == node.name;
    if is_own && destination.protocol == Protocol::Sctp && !rules.sctp_from_host_to_own_node {
        return Ok(Verdict::NotTranslated);
    }
    let family = |address: &&IpAddr| address.is_ipv4() == destination.address.is_ipv4();
    let found = ports.iter().find(|port| {
        port.node == node.name
            && (port.number, port.protocol) == (destination.port, destination.protocol)
            && port.is_at(rules, destination.address)
    });
    let Some((port, pod)) = found.and_then(|port| Some((port, *port.pod.iter().find(family)?))) else {
        return Ok(Verdict::NotTranslated);
    };
    let source = source(rules, node, client, destination, pod)?;
    Ok(Verdict::Delivered([(SocketAddr::new(pod, port.target), source)].into()))
}

impl HostPort<'_> {
    fn is_at(&self, rules: Rules, address: IpAddr) -> bool {
        match self.host_ip {
            Some(only) if !only.is_unspecified() => only == address,
            // IPv6 has no `route_localnet`
            _ => address.is_ipv4() || !address.is_loopback() || rules.host_ports_at_ipv6_loopback,
        }
    }
}

/// Returns the source address that the pod sees.
fn source(
    rules: Rules,
    node: &Node,
    client: &Client<'_>,
    destination: &Destination,
    pod: IpAddr,
) -> Result<IpAddr> {
    let is_hairpin =
        client.address == pod && rules.hairpin_source(destination.protocol) == HairpinSource::Node;
    if destination.address.is_loopback() || is_hairpin { node.address(pod) } else { Ok(client.address) }
}
