//! The Services of a benchmark, the same for the agent (as objects) and for kube-proxy's rules.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use dataplane_testkit::lab::Protocol;

/// The range of cluster IPs.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Pods of all nodes: traffic from other sources to a Service is masqueraded.
pub const POD_CIDR: &str = "10.240.0.0/12";
/// The port of all Services.
pub const SERVICE_PORT: u16 = 80;
/// The Kubernetes namespace of the Services.
pub const NAMESPACE: &str = "bench";
/// The name of the Services' port.
pub const PORT_NAME: &str = "load";

/// The node port of the measured Service.
pub const NODE_PORT: u16 = 30_080;

/// Number of backends of the other Services.
const IDLE_BACKENDS: u32 = 4;
/// The first address of those backends: in [`POD_CIDR`], above all real pods.
const IDLE: Ipv4Addr = Ipv4Addr::new(10, 248, 0, 0);

/// A Service with a cluster IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub cluster_ip: Ipv4Addr,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
    pub backends: Vec<SocketAddrV4>,
}

/// All Services of a cluster; only one of them is measured.
#[derive(Clone, Debug)]
pub struct ServiceSet {
    services: Vec<Service>,
    measured: usize,
}

impl ServiceSet {
    /// Creates `count` Services. The measured one has `backend` and is the middle one: iptables
    /// rules are searched in order, and kube-proxy writes them in random order, so the middle is
    /// the average.
    pub fn new(count: u16, backend: SocketAddrV4) -> Self {
        let measured = count / 2;
        let services = (0..count)
            .map(|number| Service {
                name: format!("service-{number}"),
                // from .1.0 on: the first addresses are those of the cluster's own Services
                cluster_ip: Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + u32::from(number)),
                protocol: Protocol::Tcp,
                node_port: None,
                backends: if number == measured { vec![backend] } else { idle_backends(number) },
            })
            .collect();
        Self { services, measured: measured.into() }
    }

    /// Like [`Self::new`]; the measured Service uses UDP and has the node port [`NODE_PORT`].
    pub fn with_node_port(count: u16, backend: SocketAddrV4) -> Self {
        let mut set = Self::new(count, backend);
        let measured = &mut set.services[set.measured];
        measured.protocol = Protocol::Udp;
        measured.node_port = Some(NODE_PORT);
        set
    }

    pub fn iter(&self) -> impl Iterator<Item = &Service> {
        self.services.iter()
    }

    /// Returns the cluster IP and port of the measured Service.
    pub fn target(&self) -> SocketAddr {
        (self.services[self.measured].cluster_ip, SERVICE_PORT).into()
    }

    pub fn backends(&self) -> usize {
        self.iter().map(|service| service.backends.len()).sum()
    }
}

impl Service {
    /// Returns the port's name as in kube-proxy's comments.
    pub fn port_name(&self) -> String {
        format!("{NAMESPACE}/{}:{PORT_NAME}", self.name)
    }

    /// Returns the protocol as in rules.
    pub fn protocol_in_rules(&self) -> String {
        self.protocol.name().to_lowercase()
    }

    /// Returns the port of the backends.
    pub fn target_port(&self) -> u16 {
        self.backends.first().map_or(0, SocketAddrV4::port)
    }
}

/// Returns addresses without pods, different for each Service.
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
    fn only_the_middle_service_has_the_backend() {
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
    fn services_share_no_address_and_no_backend() {
        let set = set();
        let addresses: BTreeSet<Ipv4Addr> = set.iter().map(|service| service.cluster_ip).collect();
        let backends: BTreeSet<SocketAddrV4> =
            set.iter().flat_map(|service| service.backends.iter().copied()).collect();
        assert_eq!((addresses.len(), backends.len()), (30_000, set.backends()));
        assert_eq!(set.backends(), 29_999 * 4 + 1);
    }

    #[test]
    fn addresses_are_in_the_configured_ranges() {
        let set = set();
        let [services, pods] = [SERVICE_CIDR, POD_CIDR].map(|cidr| cidr.parse::<Ipv4Net>().expect("a range"));
        for service in set.iter() {
            assert!(services.contains(&service.cluster_ip), "{service:?}");
            assert!(service.backends.iter().all(|backend| pods.contains(backend.ip())), "{service:?}");
        }
    }
}
