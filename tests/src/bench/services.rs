//! The services a benchmark runs with: the same set for our agent (as manifests) and for kube-proxy's rules.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use serde_json::{Value, json};

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

    /// As `kubectl get service,endpointslice -o json` writes them.
    pub fn manifest(&self) -> Value {
        let items: Vec<Value> =
            self.iter().flat_map(|service| [service.object(), service.endpoint_slice()]).collect();
        json!({ "apiVersion": "v1", "kind": "List", "items": items })
    }
}

impl Service {
    /// As kube-proxy names a port of a service in comments.
    pub fn port_name(&self) -> String {
        format!("{NAMESPACE}/{}:{PORT_NAME}", self.name)
    }

    fn object(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name, "namespace": NAMESPACE },
            "spec": {
                "type": "ClusterIP",
                "clusterIP": self.cluster_ip,
                "clusterIPs": [self.cluster_ip],
                "ipFamilies": ["IPv4"],
                "ports": [{ "name": PORT_NAME, "port": SERVICE_PORT, "protocol": "TCP" }],
            },
        })
    }

    fn endpoint_slice(&self) -> Value {
        let endpoints: Vec<Value> = self
            .backends
            .iter()
            .map(|backend| json!({ "addresses": [backend.ip()], "conditions": { "ready": true } }))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-1", self.name),
                "namespace": NAMESPACE,
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{ "name": PORT_NAME, "port": self.backends.first().map(SocketAddrV4::port), "protocol": "TCP" }],
        })
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

    #[test]
    fn manifest_holds_a_service_and_a_slice_each() {
        let manifest = set().manifest();
        let items = manifest["items"].as_array().expect("items");
        assert_eq!(items.len(), 2_000);
        assert_eq!(items[1_001]["endpoints"][0]["addresses"][0], "10.244.1.10");
        assert_eq!(items[1_001]["ports"][0]["port"], 7000);
    }
}
