//! Nodes, and who asks. Knows no Service.

use std::net::IpAddr;

use anyhow::{Context as _, Result};

/// A node as its Node object and its runtime tell of it.
#[derive(Clone, Debug, Default)]
pub struct Node {
    pub name: String,
    /// Its `InternalIP`s: where its `NodePort`s are, and what it masquerades behind.
    pub addresses: Vec<IpAddr>,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// Addresses of the pods that run there.
    pub pods: Vec<IpAddr>,
}

/// All nodes.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub nodes: Vec<Node>,
    /// `NodePort`s are on 127.0.0.1 too, for processes of the host: kube-proxy's `localhostNodePorts`. Of `::1` it knows nothing.
    pub localhost_node_ports: bool,
}

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At<'a> {
    /// A pod with a network of its own, on this node.
    Pod(&'a str),
    /// A process of this node, or a pod in the node's network.
    Host(&'a str),
    /// No node at all. Its packets to addresses that no node has come to this one.
    Outside { via: &'a str },
}

/// Who asks, under which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client<'a> {
    pub at: At<'a>,
    pub address: IpAddr,
}

/// The node whose rules a question meets, and how it comes there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) node: &'a Node,
    pub(super) from: From,
}

/// What a client is to the node its question meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// One of its pods.
    Pod,
    /// Itself.
    Host,
    /// Neither, whatever it is elsewhere.
    Outside,
}

impl World {
    /// The first node a client's packets meet.
    pub(super) fn first_entry(&self, client: &Client<'_>) -> Result<Entry<'_>> {
        let (name, from) = match client.at {
            At::Pod(node) => (node, From::Pod),
            At::Host(node) => (node, From::Host),
            At::Outside { via } => (via, From::Outside),
        };
        let node = self.nodes.iter().find(|node| node.name == name);
        Ok(Entry { node: node.with_context(|| format!("there is no node {name}"))?, from })
    }

    /// The node a question to an address of a node meets; `None`: it is no node's.
    pub(super) fn node_port_entry<'a>(&'a self, first: Entry<'a>, address: IpAddr) -> Option<Entry<'a>> {
        if address.is_loopback() {
            let is_there = self.localhost_node_ports && first.from == From::Host && address.is_ipv4();
            return is_there.then_some(first);
        }
        let node = self.nodes.iter().find(|node| node.addresses.contains(&address))?;
        if node.name == first.node.name {
            return Some(first);
        }
        // the node it comes from has nothing to say about another's ports, and the other knows it as a stranger
        Some(Entry { node, from: From::Outside })
    }

    /// The node an address is on, a pod's or its own.
    pub(super) fn node_of(&self, address: IpAddr) -> Option<&str> {
        let has = |node: &&Node| node.pods.contains(&address) || node.addresses.contains(&address);
        self.nodes.iter().find(has).map(|node| node.name.as_str())
    }
}

impl Node {
    /// What it masquerades behind.
    pub(super) fn address(&self, like: IpAddr) -> Result<IpAddr> {
        let found = self.addresses.iter().find(|address| address.is_ipv4() == like.is_ipv4());
        found.copied().with_context(|| format!("node {} has no address of the family of {like}", self.name))
    }
}
