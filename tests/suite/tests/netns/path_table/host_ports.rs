//! The table's ports of nodes that are pods' (`hostPort`): who has which, and how a runtime asks for them. Knows no traffic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_oracle::{HostPort, Protocol};
use dataplane_testkit::lab::{Family, Node};
use serde_json::{Value, json};

use super::{
    bed::Server,
    cells::{Backing, Cell, Frontend, Mapping},
    services::target,
};

/// Port of the first pod's first mapping; the others follow. The same for every protocol.
const HOST_PORT: u16 = 8_100;
/// Pods that have ports: who asks, and one on each of the first two nodes.
const PODS: usize = 3;

/// What the runtime asks for, for the pod with this index on this node.
pub(crate) fn asked_for(pod: usize, node: &Node) -> Value {
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

/// The same as the oracle wants to know it; `nodes`: name and addresses of each.
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

/// Where a cell asks; `node` is its door's address.
pub(crate) fn frontend(cell: Cell, mapping: Mapping, node: IpAddr) -> SocketAddr {
    let loopback: IpAddr = match cell.family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    let is_at_loopback = matches!(cell.frontend, Frontend::HostPortAtLoopback(_));
    let pod = match cell.backing {
        Backing::Asker => 0,
        Backing::SameNode => 1,
        Backing::OtherNode => 2,
        backing => panic!("no port of the host is backed by {backing:?}"),
    };
    SocketAddr::new(if is_at_loopback { loopback } else { node }, number(pod, mapping))
}

fn mapped(pod: usize) -> impl Iterator<Item = (Mapping, Protocol, u16)> {
    Mapping::ALL
        .into_iter()
        .flat_map(move |mapping| Protocol::ALL.map(move |protocol| (mapping, protocol, number(pod, mapping))))
}

const fn number(pod: usize, mapping: Mapping) -> u16 {
    let place = match mapping {
        Mapping::Everywhere => 0,
        Mapping::OneAddress => 1,
        Mapping::Loopback => 2,
    };
    HOST_PORT + 10 * pod as u16 + place
}

/// Of the first node's pods the IPv4 address, of the second's the IPv6 address.
const fn host_ip(mapping: Mapping, pod: usize, [v4, v6]: [IpAddr; 2]) -> Option<IpAddr> {
    match mapping {
        Mapping::Everywhere => None,
        Mapping::OneAddress => Some(if pod + 1 < PODS { v4 } else { v6 }),
        Mapping::Loopback => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    }
}
