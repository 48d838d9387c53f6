//! The services a benchmark runs with: the same set for our agent (as objects) and for kube-proxy's rules.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use dataplane_testkit::lab::Protocol;

/// Cluster addresses come from here.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Pods of all nodes: traffic from elsewhere to a service is masqueraded.
pub const POD_CIDR: &str = "10.240.0.0/12";
/// Port of every service.
pub const SERVICE_PORT: u16 = 80;
/// Where they live.
pub const NAMESPACE: &str = "bench";
/// Name of their port.
pub const PORT_NAME: &str = "load";

/// Port of the nodes at which a service is asked from outside.
pub const NODE_PORT: u16 = 30_080;

/// Backends of the services nobody asks.
const IDLE_BACKENDS: u32 = 4;
/// The first of them; in [`POD_CIDR`], and behind whatever is there.
const IDLE: Ipv4Addr = Ipv4Addr::new(10, 248, 0, 0);

/// A service with a cluster address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub cluster_ip: Ipv4Addr,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
    pub backends: Vec<SocketAddrV4>,
}

/// All services of a cluster; one of them is asked, the others are there.
#[derive(Clone, Debug)]
pub struct ServiceSet {
    services: Vec<Service>,
    measured: usize,
}

impl ServiceSet {
    /// `count` services. The measured one leads to `backend`, and is the middle one: kube-proxy's iptables rules are
    /// searched in order, and it writes them in random order, so the middle is what a client meets on average.
    pub fn new(count: u16, backend: SocketAddrV4) -> Self {
        let measured = count / 2;
        let services = (0..count)
            .map(|number| Service {
                name: format!("service-{number}"),
                // from .1.0 on: the first addresses of a cluster belong to its own services
                cluster_ip: Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + u32::from(number)),
                protocol: Protocol::Tcp,
                node_port: None,
                backends: if number == measured { vec![backend] } else { idle_backends(number) },
            })
            .collect();
        Self { services, measured: measured.into() }
    }

    /// The same, the measured one over UDP and also at [`NODE_PORT`] of the nodes.
    pub fn asked_from_outside(count: u16, backend: SocketAddrV4) -> Self {
        let mut set = Self::new(count, backend);
        let measured = &mut set.services[set.measured];
        measured.protocol = Protocol::Udp;
        measured.node_port = Some(NODE_PORT);
        set
    }

    pub fn iter(&self) -> impl Iterator<Item = &Service> {
        self.services.iter()
    }

    /// Cluster address and port of the service that is asked.
    pub fn target(&self) -> SocketAddr {
        (self.services[self.measured].cluster_ip, SERVICE_PORT).into()
    }

    pub fn backends(&self) -> usize {
        self.iter().map(|service| service.backends.len()).sum()
    }
}

impl Service {
    /// As kube-proxy names a port of a service in comments.
    pub fn port_name(&self) -> String {
        format!("{NAMESPACE}/{}:{PORT_NAME}", self.name)
    }

    /// Its protocol, as rules spell it.
    pub fn protocol_in_rules(&self) -> String {
        self.protocol.name().to_lowercase()
    }

    /// Port of every backend of it.
    pub fn target_port(&self) -> u16 {
        self.backends.first().map_or(0, SocketAddrV4::port)
    }
}

/// Addresses nobody has, spread over pods that could be.
fn idle_backends(service: u16) -> Vec<SocketAddrV4> {
    let first = IDLE.to_bits() + u32::from(service) * IDLE_BACKENDS;
    (first..first + IDLE_BACKENDS).map(|bits| SocketAddrV4::new(Ipv4Addr::from_bits(bits), 8080)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ipnet::Ipv4Net;

    use super::*;

    fn set() -> ServiceSet {
        ServiceSet::new(30_000, "10.244.1.10:7000".parse().expect("an address"))
    }

    #[test]
    fn the_middle_service_leads_to_the_backend_and_no_other_does() {
        let set = set();
        let leading: Vec<usize> = set
            .iter()
            .enumerate()
            .filter(|(_, service)| service.backends.iter().any(|backend| backend.port() == 7000))
            .map(|(index, _)| index)
            .collect();
        assert_eq!(leading, [15_000]);
        assert_eq!(set.target(), "10.96.59.152:80".parse().expect("an address"));
    }

    #[test]
    fn no_two_services_share_an_address_or_a_backend() {
        let set = set();
        let addresses: BTreeSet<Ipv4Addr> = set.iter().map(|service| service.cluster_ip).collect();
        let backends: BTreeSet<SocketAddrV4> =
            set.iter().flat_map(|service| service.backends.iter().copied()).collect();
        assert_eq!((addresses.len(), backends.len()), (30_000, set.backends()));
        assert_eq!(set.backends(), 29_999 * 4 + 1);
    }

    #[test]
    fn everybody_is_where_rules_and_routes_expect_him() {
        let set = set();
        let [services, pods] = [SERVICE_CIDR, POD_CIDR].map(|cidr| cidr.parse::<Ipv4Net>().expect("a range"));
        for service in set.iter() {
            assert!(services.contains(&service.cluster_ip), "{service:?}");
            assert!(service.backends.iter().all(|backend| pods.contains(backend.ip())), "{service:?}");
        }
    }
}
