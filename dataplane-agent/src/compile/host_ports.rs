//! Host ports of pods (`hostPort`) → frontends at the node's addresses.
//!
//! A host port is a frontend with one backend, under a name that no Service can have.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_cni::protocol::{PortMapping, PortProtocol};
use dataplane_common::abi::{Addr, Port, Scope, ServiceFlags, ServiceKey};

use super::services::{Backend, Frontend, PortEntries, ServiceEntries, ServicePortKey};
use crate::state::{Forwarding, LoadBalancing, Name, NamespacedName, TransportProtocol};

/// Loopback addresses, for clients on the host itself.
const LOOPBACK: [IpAddr; 2] =
    [IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)];

/// Object names cannot contain a colon.
const PREFIX: &str = "hostport:";

/// The name of a pod's host ports in the tables.
pub fn name(namespace: &str, pod: &str) -> NamespacedName {
    NamespacedName::new(namespace, format!("{PREFIX}{pod}"))
}

/// Whether the name is one of a pod's host ports.
pub fn is_host_ports_name(name: &NamespacedName) -> bool {
    name.name.starts_with(PREFIX)
}

/// The entries of a pod's host ports, on a host with these addresses. `None`: there are none.
pub fn compile(
    name: &NamespacedName,
    ports: &[PortMapping],
    pod: &[IpAddr],
    host: impl IntoIterator<Item = IpAddr>,
) -> Option<ServiceEntries> {
    let all_addresses: BTreeSet<IpAddr> = host.into_iter().chain(LOOPBACK).collect();
    let entries = |mapping: &PortMapping| {
        let host_addresses: BTreeSet<IpAddr> =
            mapping.host_ip.map_or_else(|| all_addresses.clone(), |address| BTreeSet::from([address]));
        let protocol = match mapping.protocol {
            PortProtocol::Tcp => TransportProtocol::Tcp,
            PortProtocol::Udp => TransportProtocol::Udp,
            PortProtocol::Sctp => TransportProtocol::Sctp,
        };
        let mut entries = PortEntries {
            key: ServicePortKey { service: name.clone(), port: mapping.host_port, protocol },
            name: Name::default(),
            affinity_timeout: 0,
            load_balancing: LoadBalancing::Random,
            forwarding: Forwarding::Snat,
            source_ranges: Vec::new(),
            groups: Vec::new(),
            // the pod is the only backend
            serving_udp: Vec::new(),
        };
        // no frontend in a family the pod does not have
        for address in host_addresses {
            let backends: Vec<Backend> = pod
                .iter()
                .filter(|pod_address| pod_address.is_ipv4() == address.is_ipv4())
                .map(|pod_address| Backend {
                    addr: Addr::from(*pod_address),
                    port: Port::new(mapping.container_port),
                })
                .collect();
            if backends.is_empty() {
                continue;
            }
            let key = ServiceKey {
                addr: address.into(),
                port: Port::new(mapping.host_port),
                protocol: protocol.number(),
                scope: Scope::Any as u8,
            };
            entries.add(Frontend { key, flags: ServiceFlags::HOST_PORT }, &backends);
        }
        entries
    };
    let mut compiled: Vec<PortEntries> = Vec::with_capacity(ports.len());
    for port in ports.iter().map(entries) {
        // the same host port on two addresses is one port with the frontends of both
        match compiled.iter_mut().find(|earlier| earlier.key == port.key) {
            Some(earlier) if targets(earlier) == targets(&port) => {
                for group in &port.groups {
                    for frontend in &group.frontends {
                        earlier.add(*frontend, &group.backends);
                    }
                }
            }
            // two container ports for one host port: the first applies, as in the portmap plugin
            Some(_) => {}
            None => compiled.push(port),
        }
    }
    compiled.sort_by(|one, other| one.key.cmp(&other.key));
    (!compiled.is_empty()).then_some(ServiceEntries { ports: compiled })
}

/// The container ports behind a host port.
fn targets(port: &PortEntries) -> BTreeSet<Port> {
    port.groups.iter().flat_map(|group| &group.backends).map(|backend| backend.port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn mapping(host_ip: Option<&str>, host_port: u16) -> PortMapping {
        PortMapping { host_ip: host_ip.map(ip), host_port, protocol: PortProtocol::Tcp, container_port: 80 }
    }

    fn listed(ports: &[PortMapping], pod: &[&str]) -> Vec<String> {
        let pod: Vec<_> = pod.iter().map(|text| ip(text)).collect();
        let host = [ip("192.168.1.1"), ip("fd00::1")];
        let entries = compile(&name("default", "web"), ports, &pod, host).unwrap();
        let ports = entries.ports.iter();
        ports.flat_map(PortEntries::frontends).map(|key| format!("{} {}", key.addr, key.port)).collect()
    }

    #[test]
    fn host_port_is_on_all_host_addresses_in_pod_families() {
        let both = ["10.1.0.2", "fd01::2"];
        let mut all = listed(&[mapping(None, 8080)], &both);
        all.sort();
        assert_eq!(all, ["127.0.0.1 8080", "192.168.1.1 8080", "::1 8080", "fd00::1 8080"]);
        assert_eq!(listed(&[mapping(None, 8080)], &both[..1]).len(), 2);
        assert_eq!(listed(&[mapping(Some("127.0.0.1"), 8080)], &both), ["127.0.0.1 8080"]);
    }

    #[test]
    fn host_port_on_two_addresses_is_one_port() {
        let ports = [mapping(Some("192.168.1.1"), 8080), mapping(Some("127.0.0.1"), 8080)];
        let mut both = listed(&ports, &["10.1.0.2"]);
        both.sort();
        assert_eq!(both, ["127.0.0.1 8080", "192.168.1.1 8080"]);
    }

    #[test]
    fn host_ports_of_different_protocols_are_distinct() {
        let ports = [PortProtocol::Tcp, PortProtocol::Udp, PortProtocol::Sctp]
            .map(|protocol| PortMapping { protocol, ..mapping(Some("192.168.1.1"), 8080) });
        let entries = compile(&name("default", "web"), &ports, &[ip("10.1.0.2")], []).unwrap();
        let frontends = entries.ports.iter().flat_map(PortEntries::frontends);
        assert_eq!(frontends.map(|key| key.protocol).collect::<Vec<_>>(), [6, 17, 132]);
    }

    #[test]
    fn pod_without_host_ports_has_no_entries() {
        assert_eq!(compile(&name("default", "web"), &[], &[ip("10.1.0.2")], []), None);
    }
}
