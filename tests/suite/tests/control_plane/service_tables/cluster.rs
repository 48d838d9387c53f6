//! Three nodes in two zones with two pods each, in the forms of the oracle and of the agents. Has
//! no services.

use std::net::IpAddr;

use dataplane_agent::{
    compile::{endpoints::PodDevice, routes::RoutingMode},
    netlink::Uplink,
    reconcile::{LocalPod, NodeNetwork},
    state::{self, Forwarding, LoadBalancing},
};
use dataplane_common::abi::MacAddr;
use dataplane_oracle::{Node, Protocol, Topology};

/// Name and zone.
pub(crate) const NODES: [(&str, &str); 3] = [("here", "west"), ("there", "west"), ("far", "east")];
/// Number of pods of each node.
pub(crate) const PODS: usize = 2;

/// An IPv4 and an IPv6 address.
fn both(v4: [u8; 4], v6: [u16; 8]) -> [IpAddr; 2] {
    [IpAddr::from(v4), IpAddr::from(v6)]
}

/// IPv4 and IPv6 of a node.
pub(crate) fn node_addresses(node: usize) -> [IpAddr; 2] {
    let last = node as u8 + 2;
    both([172, 18, 0, last], [0xfd00, 0x18, 0, 0, 0, 0, 0, last.into()])
}

/// IPv4 and IPv6 of a pod.
pub(crate) fn pod_addresses(node: usize, pod: usize) -> [IpAddr; 2] {
    let (range, last) = (node as u8 + 1, pod as u8 + 2);
    both([10, 1, range, last], [0xfd00, 0x10, range.into(), 0, 0, 0, 0, last.into()])
}

/// IPv4 and IPv6 of a machine outside the cluster.
pub(crate) fn external_addresses() -> [IpAddr; 2] {
    both([192, 0, 2, 1], [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1])
}

/// IP protocol number.
pub(crate) const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// All nodes and pods, in the form of the oracle.
pub(crate) fn topology() -> Topology {
    let node = |(index, (name, zone)): (usize, &(&str, &str))| Node {
        name: (*name).to_owned(),
        addresses: node_addresses(index).to_vec(),
        zone: Some((*zone).to_owned()),
        pods: (0..PODS).flat_map(|pod| pod_addresses(index, pod)).collect(),
    };
    Topology { nodes: NODES.iter().enumerate().map(node).collect(), localhost_node_ports: true }
}

/// The Node object of a node, as a source delivers it.
pub(crate) fn node_object(index: usize) -> state::Node {
    let (name, zone) = NODES[index];
    let range = index as u8 + 1;
    state::Node {
        name: name.to_owned(),
        pod_cidrs: [format!("10.1.{range}.0/24"), format!("fd00:10:{range}::/64")]
            .map(|cidr| cidr.parse().expect("a CIDR"))
            .into(),
        internal_ips: node_addresses(index).into(),
        labels: [("topology.kubernetes.io/zone".to_owned(), zone.to_owned())].into(),
        ..state::Node::default()
    }
}

/// The network of a node, as its agent finds it.
pub(crate) fn network(index: usize) -> NodeNetwork {
    let subnet = |address: IpAddr| format!("{address}/{}", if address.is_ipv4() { 24 } else { 64 });
    NodeNetwork {
        own: NODES[index].0.to_owned(),
        uplinks: vec![Uplink {
            name: "eth0".to_owned(),
            ifindex: 2,
            mtu: 1_500,
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, index as u8])),
            addresses: node_addresses(index).map(|it| subnet(it).parse().expect("an address")).into(),
            sources: Vec::new(),
            bridge: false,
        }],
        mode: RoutingMode::Auto,
        overlay: None,
        overlay_device: "dataplane0".to_owned(),
        exceptions: Vec::new(),
        sources: Vec::new(),
        load_balancing: LoadBalancing::Random,
        forwarding: Forwarding::Snat,
    }
}

/// A pod, as the CNI server of its node stores it.
pub(crate) fn local_pod(node: usize, pod: usize) -> LocalPod {
    let ifindex = 10 + pod as u32;
    LocalPod {
        namespace: "default".to_owned(),
        name: format!("pod-{node}-{pod}"),
        device_name: format!("dp{ifindex}"),
        device: PodDevice {
            addresses: pod_addresses(node, pod).into(),
            ifindex,
            mac: MacAddr::new([2, 0, 0, 1, node as u8, pod as u8]),
            shaped: false,
            down: false,
        },
        port_mappings: Vec::new(),
    }
}
