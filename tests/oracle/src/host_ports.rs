//! Who answers at a port of a node that a pod has (`hostPort`): kubelet's words, as the `portmap` plugin means them
//! (`plugins/meta/portmap` of containernetworking). kube-proxy has no part in it, and no policy of a Service.
//!
//! The rules: what is asked at an address of the node, by whomever, goes to the pod; with `hostIP`, at that address alone.
//! Who asks keeps his address, but for the pod itself and for who asks at loopback: these are seen as the node.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};

use super::{
    At, Client, Protocol, Question, Rules, Verdict, World,
    differences::Itself,
    world::{From, Node},
};

/// A port of a node that is a pod's.
#[derive(Clone, Debug)]
pub struct HostPort<'a> {
    pub node: &'a str,
    /// `hostIP`; none, or an unspecified one: every address of the node.
    pub host_ip: Option<IpAddr>,
    /// `hostPort`.
    pub number: u16,
    pub protocol: Protocol,
    /// `containerPort`.
    pub target: u16,
    /// Addresses of the pod.
    pub pod: &'a [IpAddr],
}

/// The verdict of `rules` on a question to an address of a node, or of loopback, where these ports are pods'.
///
/// # Errors
/// A client at a node the world does not have; an address of nobody's.
pub fn at_host_ports(
    rules: Rules,
    world: &World,
    ports: &[HostPort<'_>],
    client: &Client<'_>,
    question: &Question,
) -> Result<Verdict> {
    let entry = world.first_entry(client)?;
    let node = match (question.address.is_loopback(), client.at) {
        (true, At::Host(_)) => entry.node,
        // what a pod has of its own is its own
        (true, At::Pod(_)) => return Ok(Verdict::LeftAlone),
        (true, At::Outside { .. }) => bail!("the outside has no way to {}", question.address),
        (false, _) => match world.nodes.iter().find(|node| node.addresses.contains(&question.address)) {
            Some(node) => node,
            None => bail!("{} is no node's", question.address),
        },
    };
    let is_own = entry.from == From::Host && entry.node.name == node.name;
    if is_own && question.protocol == Protocol::Sctp && !rules.sctp_leads_back_to_its_own_host {
        return Ok(Verdict::LeftAlone);
    }
    let family = |address: &&IpAddr| address.is_ipv4() == question.address.is_ipv4();
    let found = ports.iter().find(|port| {
        port.node == node.name
            && (port.number, port.protocol) == (question.port, question.protocol)
            && port.is_at(rules, question.address)
    });
    let Some((port, pod)) = found.and_then(|port| Some((port, *port.pod.iter().find(family)?))) else {
        return Ok(Verdict::LeftAlone);
    };
    let source = source(rules, node, client, question, pod)?;
    Ok(Verdict::Answered([(SocketAddr::new(pod, port.target), source)].into()))
}

impl HostPort<'_> {
    fn is_at(&self, rules: Rules, address: IpAddr) -> bool {
        match self.host_ip {
            Some(only) if !only.is_unspecified() => only == address,
            // there is no such thing as `route_localnet` for IPv6
            _ => address.is_ipv4() || !address.is_loopback() || rules.host_ports_are_at_ipv6_loopback,
        }
    }
}

/// The address the pod sees.
fn source(
    rules: Rules,
    node: &Node,
    client: &Client<'_>,
    question: &Question,
    pod: IpAddr,
) -> Result<IpAddr> {
    let leaves = client.address == pod && rules.itself(question.protocol) == Itself::Node;
    if question.address.is_loopback() || leaves { node.address(pod) } else { Ok(client.address) }
}
