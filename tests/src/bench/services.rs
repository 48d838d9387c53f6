//! The services a benchmark runs with: the same set for our agent (as objects) and for kube-proxy's rules.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// Cluster addresses come from here.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Pods of all nodes: traffic from elsewhere to a service is masqueraded.
pub const POD_CIDR: &str = "10.244.0.0/16";
/// Port of every service.
pub const SERVICE_PORT: u16 = 80;
/// Where they live.
pub const NAMESPACE: &str = "bench";
/// Name of their port.
pub const PORT_NAME: &str = "load";

/// Backends of the services nobody asks.
const IDLE_BACKENDS: u8 = 3;

/// A TCP service with a cluster address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub cluster_ip: Ipv4Addr,
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
                backends: if number == measured { vec![backend] } else { idle_backends(number) },
            })
            .collect();
        Self { services, measured: measured.into() }
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

    /// Port of every backend of it.
    pub fn target_port(&self) -> u16 {
        self.backends.first().map_or(0, SocketAddrV4::port)
    }
}

/// Addresses nobody has, spread over pods that could be.
fn idle_backends(service: u16) -> Vec<SocketAddrV4> {
    let [high, low] = service.to_be_bytes();
    (0..IDLE_BACKENDS)
        .map(|backend| {
            SocketAddrV4::new(Ipv4Addr::new(10, 244, 128 + high * IDLE_BACKENDS + backend, low), 8080)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn set() -> ServiceSet {
        ServiceSet::new(1_000, "10.244.1.10:7000".parse().expect("an address"))
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
        assert_eq!(leading, [500]);
        assert_eq!(set.target(), "10.96.2.244:80".parse().expect("an address"));
    }

    #[test]
    fn no_two_services_share_an_address_or_a_backend() {
        let set = set();
        let addresses: BTreeSet<Ipv4Addr> = set.iter().map(|service| service.cluster_ip).collect();
        let backends: BTreeSet<SocketAddrV4> =
            set.iter().flat_map(|service| service.backends.iter().copied()).collect();
        assert_eq!((addresses.len(), backends.len()), (1_000, set.backends()));
    }
}
