//! Names of services, pods and devices for the addresses, IDs and interface indices of events and
//! flows.
//!
//! Built from the views `services`, `endpoints` and `status` and the kernel's list of devices;
//! refreshed when an address or a device has no name.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use dataplane_common::reason::HookId;

use super::views::{EndpointView, EventView, FlowView, FrontendKind, PeerView, ServiceView, Status};

/// A snapshot of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    frontends: HashMap<(IpAddr, u16, String), String>,
    /// By family (is IPv4), port and protocol.
    node_ports: HashMap<(bool, u16, String), String>,
    node_addresses: HashSet<IpAddr>,
    services: HashMap<u32, String>,
    pods: HashMap<IpAddr, String>,
    devices: HashMap<u32, String>,
    /// Pods by the index of their host-side device.
    device_pods: HashMap<u32, String>,
}

impl Names {
    /// `devices`: name of each device of the node, by its index.
    pub(super) fn new(
        services: &[ServiceView],
        endpoints: &[EndpointView],
        status: &Status,
        devices: HashMap<u32, String>,
    ) -> Self {
        let mut names = Self { devices, ..Self::default() };
        for service in services {
            let name = format!("{}/{}", service.namespace, service.name);
            for frontend in &service.frontends {
                let (address, port, protocol) = (frontend.address, frontend.port, service.protocol.clone());
                if frontend.kind == FrontendKind::NodePort {
                    names.node_ports.insert((address.is_ipv4(), port, protocol), name.clone());
                } else {
                    names.frontends.insert((address, port, protocol), name.clone());
                }
            }
            names.services.insert(service.id, name);
        }
        for endpoint in endpoints {
            if let Some(pod) = &endpoint.pod {
                let name = format!("{}/{}", pod.namespace, pod.name);
                names.device_pods.insert(endpoint.ifindex, name.clone());
                names.pods.insert(endpoint.address, name);
            }
            if endpoint.accepts_node_ports {
                names.node_addresses.insert(endpoint.address);
            }
            if let Some(device) = &endpoint.device {
                names.devices.insert(endpoint.ifindex, device.clone());
            }
        }
        for uplink in &status.uplinks {
            names.devices.insert(uplink.ifindex, uplink.device.clone());
        }
        for other in &status.other_devices {
            names.devices.insert(other.ifindex, other.device.clone());
        }
        names
    }

    /// Adds names to an event. Returns true if its device, the pod of a pod device and both ends
    /// have one.
    pub(super) fn name_event(&self, event: &mut EventView) -> bool {
        event.device = self.devices.get(&event.ifindex).cloned();
        event.device_pod = self.device_pods.get(&event.ifindex).cloned();
        event.source_name = event.source.and_then(|peer| self.name_of(peer, &event.protocol));
        event.destination_name = event.destination.and_then(|peer| self.name_of(peer, &event.protocol));
        let is_pod_hook = [HookId::FromPod, HookId::ToPod].map(HookId::name).contains(&event.hook.as_str());
        let device_known =
            event.ifindex == 0 || event.device.is_some() && (event.device_pod.is_some() || !is_pod_hook);
        device_known && event.source_name.is_some() && event.destination_name.is_some()
    }

    pub(super) fn name_flow(&self, flow: &mut FlowView) {
        flow.service = flow.service_id.and_then(|id| self.services.get(&id).cloned());
    }

    /// The service of a frontend, else the pod of an address.
    fn name_of(&self, peer: PeerView, protocol: &str) -> Option<String> {
        let PeerView { address, port } = peer;
        // a frontend with this address takes precedence over a node port, as in the datapath
        let at_address = self.frontends.get(&(address, port, protocol.to_owned()));
        let accepts_node_ports = address.is_loopback() || self.node_addresses.contains(&address);
        let service = at_address.or_else(|| {
            let node_port = self.node_ports.get(&(address.is_ipv4(), port, protocol.to_owned()));
            node_port.filter(|_| accepts_node_ports)
        });
        if let Some(service) = service {
            return Some(format!("Service {service}"));
        }
        self.pods.get(&address).map(|pod| format!("Pod {pod}"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::api::views::{ClientsView, FrontendView, PodView};

    fn names() -> Names {
        let frontend = |kind, end: &str| {
            let end: SocketAddr = end.parse().unwrap();
            FrontendView {
                kind,
                address: end.ip(),
                port: end.port(),
                clients: ClientsView::All,
                local_only: false,
                has_source_ranges: false,
                backends: 1,
            }
        };
        let service = |name: &str, frontends: &[(FrontendKind, &str)]| ServiceView {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            port_name: String::new(),
            cluster_ips: Vec::new(),
            frontends: frontends.iter().map(|(kind, end)| frontend(*kind, end)).collect(),
            port: 80,
            protocol: "TCP".to_owned(),
            id: 7,
            generation: 1,
            load_balancing: "random".to_owned(),
            forwarding: "snat".to_owned(),
            affinity_timeout: None,
            backends: Vec::new(),
        };
        let endpoint = |address: &str, accepts_node_ports| EndpointView {
            address: address.parse().unwrap(),
            pod: None,
            device: None,
            ifindex: 0,
            mac: None,
            flow_hints: Vec::new(),
            accepts_node_ports,
            device_down: false,
        };
        let web = service(
            "web",
            &[
                (FrontendKind::ClusterIp, "10.96.0.1:80"),
                (FrontendKind::ExternalIp, "203.0.113.1:80"),
                (FrontendKind::LoadBalancer, "[2001:db8::9]:80"),
                (FrontendKind::NodePort, "0.0.0.0:30080"),
            ],
        );
        let host_port = service("hostport:pod", &[(FrontendKind::HostPort, "192.0.2.7:30080")]);
        let endpoints = [("192.0.2.5", true), ("192.0.2.6", false), ("192.0.2.7", true), ("fd00::5", true)];
        let endpoints = endpoints.map(|(address, accepts_node_ports)| endpoint(address, accepts_node_ports));
        Names::new(&[web, host_port], &endpoints, &Status::starting("n1"), HashMap::new())
    }

    /// A pod that sends with another pod's address is named by its device.
    #[test]
    fn device_of_a_pod_names_the_pod_whatever_the_source_address() {
        let pod = |name: &str, address: &str, ifindex| EndpointView {
            device_down: false,
            address: address.parse().unwrap(),
            pod: Some(PodView { namespace: "shop".to_owned(), name: name.to_owned() }),
            device: Some(format!("dp{ifindex}")),
            ifindex,
            mac: None,
            flow_hints: Vec::new(),
            accepts_node_ports: false,
        };
        let endpoints = [pod("client", "10.1.0.5", 7), pod("intruder", "10.1.0.6", 8)];
        let devices = HashMap::from([(3, "dataplane0".to_owned()), (9, "dp9".to_owned())]);
        let names = Names::new(&[], &endpoints, &Status::starting("n1"), devices);
        let event = |hook: HookId, ifindex| {
            let peer = |address: &str| Some(PeerView { address: address.parse().unwrap(), port: 1 });
            let mut event = EventView {
                timestamp_ns: 0,
                hook: hook.name().to_owned(),
                outcome: "no_endpoint".to_owned(),
                dropped: true,
                text: String::new(),
                protocol: "UDP".to_owned(),
                source: peer("10.1.0.5"),
                destination: peer("10.1.0.6"),
                source_name: None,
                destination_name: None,
                ifindex,
                device: None,
                device_pod: None,
                length: 0,
            };
            let complete = names.name_event(&mut event);
            let source = event.source_name.unwrap();
            (event.device.unwrap_or_default(), event.device_pod.unwrap_or_default(), source, complete)
        };
        let named = |device: &str, pod: &str, complete| {
            (device.to_owned(), pod.to_owned(), "Pod shop/client".to_owned(), complete)
        };
        assert_eq!(event(HookId::FromPod, 8), named("dp8", "shop/intruder", true));
        assert_eq!(event(HookId::FromOverlay, 3), named("dataplane0", "", true));
        // a pod that was added since: the names are out of date
        assert_eq!(event(HookId::FromPod, 9), named("dp9", "", false));
    }

    fn name(end: &str, protocol: &str) -> Option<String> {
        let end: SocketAddr = end.parse().unwrap();
        names().name_of(PeerView { address: end.ip(), port: end.port() }, protocol)
    }

    #[test]
    fn service_is_named_at_every_frontend() {
        for end in
            ["10.96.0.1:80", "203.0.113.1:80", "[2001:db8::9]:80", "192.0.2.5:30080", "127.0.0.1:30080"]
        {
            assert_eq!(name(end, "TCP").as_deref(), Some("Service shop/web"), "{end}");
        }
    }

    #[test]
    fn node_port_is_named_only_at_addresses_that_accept_node_ports() {
        // an address left out by `node_ports.addresses`, another node, a family the service does
        // not have
        for end in ["192.0.2.6:30080", "192.0.2.99:30080", "[fd00::5]:30080", "192.0.2.5:80"] {
            assert_eq!(name(end, "TCP"), None, "{end}");
        }
        assert_eq!(name("192.0.2.5:30080", "UDP"), None, "another protocol");
        assert_eq!(name("192.0.2.7:30080", "TCP").as_deref(), Some("Service shop/hostport:pod"));
    }
}
