//! The services of the model's node, and how packets reach their backends.

use std::net::{IpAddr, SocketAddr};

use dataplane_testkit::prog::{Family, World, at};

use super::{
    connection::{SCTP, TCP, Tuple, UDP},
    node::{Node, Place, world},
    table::Destination,
};

pub(crate) const NODE_PORT: u16 = 30_080;
pub(crate) const LOCAL_PORT: u16 = 30_081;

/// A frontend of one protocol.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) frontend: SocketAddr,
    pub(crate) protocol: u8,
    pub(crate) is_node_port: bool,
    /// Only backends on this node.
    pub(crate) is_local: bool,
    pub(crate) direct_return: bool,
    /// All backends, and which of them are ready.
    pub(crate) backends: Vec<(SocketAddr, bool)>,
}

/// Address of a load balancer with direct server return.
pub(crate) fn direct_ip(family: Family) -> IpAddr {
    if family == Family::V4 { "203.0.113.11" } else { "2001:db8:200::b" }.parse().expect("an address")
}

/// The services of a node, of both families.
pub(crate) fn services() -> Vec<Service> {
    let mut services = Vec::new();
    for world in Family::BOTH.map(World::new) {
        let family = if world.pod.is_ipv4() { Family::V4 } else { Family::V6 };
        let [remote, pod, other] = [world.wire_pod, world.pod, world.other_pod].map(|ip| at(ip, 8_080));
        for protocol in [TCP, UDP, SCTP] {
            let service = |frontend, backends: &[SocketAddr]| Service {
                frontend,
                protocol,
                is_node_port: false,
                is_local: false,
                direct_return: false,
                backends: backends.iter().map(|backend| (*backend, true)).collect(),
            };
            let cluster = |port| at(world.service.ip(), port);
            services.extend([
                service(cluster(80), &[remote]),
                service(cluster(81), &[pod]),
                service(cluster(83), &[remote, other]),
                service(cluster(99), &[at(world.outside, 443)]),
                Service { is_node_port: true, ..service(at(world.host, NODE_PORT), &[remote, pod]) },
                Service { is_node_port: true, is_local: true, ..service(at(world.host, LOCAL_PORT), &[pod]) },
                Service { direct_return: true, ..service(at(direct_ip(family), 80), &[remote]) },
            ]);
        }
    }
    services
}

impl Service {
    /// The ready backends, for a packet to the frontend.
    pub(crate) fn destinations(&self, tuple: Tuple, from_outside: bool) -> Vec<Destination> {
        let ready = self.backends.iter().filter(|(_, is_ready)| *is_ready);
        ready.map(|(backend, _)| self.destination(*backend, tuple, from_outside)).collect()
    }

    /// How a packet reaches a backend.
    fn destination(&self, backend: SocketAddr, tuple: Tuple, from_outside: bool) -> Destination {
        let client = tuple.src.ip();
        let is_remote = !Node::is_here(backend.ip());
        let is_direct = self.direct_return
            && from_outside
            && Node::place(backend.ip()) == Place::OtherNode
            && Node::place(client) == Place::Outside;
        let is_hairpin = backend.ip() == client;
        let needs_snat = is_hairpin || from_outside && !self.is_local && is_remote;
        let snat = (needs_snat && !is_direct).then(|| world(client).host);
        Destination { addr: backend, snat, is_direct }
    }
}
