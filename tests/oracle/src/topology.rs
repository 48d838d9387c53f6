//! Nodes and clients.

use std::net::IpAddr;

use anyhow::{Context as _, Result};

/// A node with its addresses and pods.
#[derive(Clone, Debug, Default)]
pub struct Node {
    pub name: String,
    /// `InternalIP`s: the addresses of node ports and of masqueraded traffic.
    pub addresses: Vec<IpAddr>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// Addresses of the node's pods.
    pub pods: Vec<IpAddr>,
}

/// All nodes of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    pub nodes: Vec<Node>,
    /// Host processes reach node ports at 127.0.0.1 (kube-proxy's `localhostNodePorts`), not at
    /// `::1`.
    pub localhost_node_ports: bool,
}

/// The location of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location<'a> {
    /// A pod on this node, not in the host network.
    Pod(&'a str),
    /// A process of this node, or a pod in its host network.
    Host(&'a str),
    /// A machine that is not a node; its packets to Service addresses are routed through this node.
    Outside { via: &'a str },
}

/// A client and its source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client<'a> {
    pub location: Location<'a>,
    pub address: IpAddr,
}

/// The node that translates a connection, and the origin of the client as seen there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) node: &'a Node,
    pub(super) origin: Origin,
}

/// The client, relative to the node that translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A pod of the node.
    Pod,
    /// The node itself.
    Host,
    /// Anything else, also a pod or process of another node.
    Outside,
}

impl Topology {
    /// Returns the first node on the path of a client's packets.
    pub(super) fn first_entry(&self, client: &Client<'_>) -> Result<Entry<'_>> {
        let (name, origin) = match client.location {
            Location::Pod(node) => (node, Origin::Pod),
            Location::Host(node) => (node, Origin::Host),
            Location::Outside { via } => (via, Origin::Outside),
        };
        let node = self.nodes.iter().find(|node| node.name == name);
        Ok(Entry { node: node.with_context(|| format!("the topology has no node {name}"))?, origin })
    }

    /// Returns the node that has the address of a node port; `None`: no node has it.
    pub(super) fn node_port_entry<'a>(&'a self, first: Entry<'a>, address: IpAddr) -> Option<Entry<'a>> {
        if address.is_loopback() {
            let is_there = self.localhost_node_ports && first.origin == Origin::Host && address.is_ipv4();
            return is_there.then_some(first);
        }
        let node = self.nodes.iter().find(|node| node.addresses.contains(&address))?;
        if node.name == first.node.name {
            return Some(first);
        }
        // the client's node does not translate another node's ports, and there the client is
        // outside
        Some(Entry { node, origin: Origin::Outside })
    }

    /// Returns the node that has an address as its own or as a pod's.
    pub(super) fn node_of(&self, address: IpAddr) -> Option<&str> {
        let has = |node: &&Node| node.pods.contains(&address) || node.addresses.contains(&address);
        self.nodes.iter().find(has).map(|node| node.name.as_str())
    }
}

impl Node {
    /// Returns the address that replaces a masqueraded source.
    pub(super) fn address(&self, like: IpAddr) -> Result<IpAddr> {
        let found = self.addresses.iter().find(|address| address.is_ipv4() == like.is_ipv4());
        found.copied().with_context(|| format!("node {} has no address of the family of {like}", self.name))
    }
}
