//! The host ports of the path table: which pod has which, and the port mappings that a runtime
//! passes to the CNI plugin. Sends no traffic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_oracle::{HostPort, Protocol};
use dataplane_testkit::lab::{Family, Node};
use serde_json::{Value, json};

use super::{
    cells::{Backing, Cell, Frontend, Mapping},
    services::target,
    testbed::Server,
};

/// The host port of the first pod's first mapping, for every protocol; the others follow.
const HOST_PORT: u16 = 8_100;
/// Number of pods with host ports: the client, and one on each of the first two nodes.
const PODS: usize = 3;

/// The port mappings of the pod with this index on this node.
pub(crate) fn requested(pod: usize, node: &Node) -> Value {
    if pod >= PODS {
        return json!({});
    }
    let mappings = mapped(pod).map(|(mapping, protocol, number)| {
        let mut port = json!({
            "hostPort": number, "containerPort": target(protocol), "protocol": protocol.name().to_lowercase(),
        });
        if let Some(address) = host_ip(mapping, pod, node.addresses()) {
            port["hostIP"] = json!(address);
        }
        port
    });
    json!({"portMappings": mappings.collect::<Vec<_>>()})
}

/// All host ports, in the form of the oracle.
pub(crate) fn all<'a>(pods: &'a [Server], nodes: &'a [Node]) -> Vec<HostPort<'a>> {
    let of_pod = |(index, pod): (usize, &'a Server)| {
        let node = nodes.iter().find(|node| node.name() == pod.node).expect("a node for every pod");
        mapped(index).map(move |(mapping, protocol, number)| HostPort {
            node: &pod.node,
            host_ip: host_ip(mapping, index, node.addresses()),
            number,
            protocol,
            target: target(protocol),
            pod: pod.addresses(),
        })
    };
    pods.iter().take(PODS).enumerate().flat_map(of_pod).collect()
}

/// The frontend of a cell; `node` is the address of the entry node.
pub(crate) fn frontend(cell: Cell, mapping: Mapping, node: IpAddr) -> SocketAddr {
    let loopback: IpAddr = match cell.family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    let is_at_loopback = matches!(cell.frontend, Frontend::HostPortAtLoopback(_));
    let pod = match cell.backing {
        Backing::Client => 0,
        Backing::SameNode => 1,
        Backing::OtherNode => 2,
        backing => panic!("no host port is backed by {backing:?}"),
    };
    SocketAddr::new(if is_at_loopback { loopback } else { node }, number(pod, mapping))
}

fn mapped(pod: usize) -> impl Iterator<Item = (Mapping, Protocol, u16)> {
    Mapping::ALL
        .into_iter()
        .flat_map(move |mapping| Protocol::ALL.map(move |protocol| (mapping, protocol, number(pod, mapping))))
}

const fn number(pod: usize, mapping: Mapping) -> u16 {
    let offset = match mapping {
        Mapping::AllAddresses => 0,
        Mapping::OneAddress => 1,
        Mapping::Loopback => 2,
    };
    HOST_PORT + 10 * pod as u16 + offset
}

/// `hostIP`; with `OneAddress` the IPv4 address of the first node, the IPv6 address of the second.
const fn host_ip(mapping: Mapping, pod: usize, [v4, v6]: [IpAddr; 2]) -> Option<IpAddr> {
    match mapping {
        Mapping::AllAddresses => None,
        Mapping::OneAddress => Some(if pod + 1 < PODS { v4 } else { v6 }),
        Mapping::Loopback => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}
