//! A service and its slices in the form of the API, which tests change and apply.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use dataplane_testkit::{
    lab::{Family, Node, Pod, service_addresses},
    traffic::{ECHO, HTTP},
};
use serde_json::{Value, json};

/// Ports of every service: HTTP over TCP, an echo over UDP.
pub(crate) const WEB: u16 = 80;
pub(crate) const ECHO_PORT: u16 = 7;

/// The objects of a service.
#[derive(Clone, Debug)]
pub(crate) struct ServiceFixture {
    number: u16,
    pub(crate) service: Value,
    /// IPv4, IPv6.
    pub(crate) slices: Vec<Value>,
}

impl ServiceFixture {
    /// A dual-stack service of type `ClusterIP` with an endpoint for each pod. `number` must be
    /// unique.
    pub(crate) fn of(name: &str, number: u16, pods: &[&Pod]) -> Self {
        let endpoints =
            |family: Family| pods.iter().map(|pod| endpoint(pod.node(), pod.address(family))).collect();
        Self::with(name, number, endpoints)
    }

    /// As [`Self::of`], with endpoints in the host network of nodes.
    pub(crate) fn of_hosts(name: &str, number: u16, nodes: &[&Node]) -> Self {
        let endpoints =
            |family: Family| nodes.iter().map(|node| endpoint(node.name(), node.address(family))).collect();
        Self::with(name, number, endpoints)
    }

    fn with(name: &str, number: u16, endpoints: impl Fn(Family) -> Vec<Value>) -> Self {
        let addresses = service_addresses(number);
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": metadata(name, &json!({})),
            "spec": {
                "type": "ClusterIP",
                "clusterIP": addresses[0], "clusterIPs": addresses,
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "internalTrafficPolicy": "Cluster",
                "sessionAffinity": "None",
                "ports": [
                    {"name": "http", "port": WEB, "protocol": "TCP", "targetPort": HTTP},
                    {"name": "echo", "port": ECHO_PORT, "protocol": "UDP", "targetPort": ECHO},
                ],
            },
            "status": {"loadBalancer": {}},
        });
        let slice = |family: Family| slice(name, &family.to_string(), family, &endpoints(family));
        Self { number, service, slices: Family::BOTH.map(slice).into() }
    }

    /// Changes the type to `NodePort`; the node ports are derived from the service's number.
    pub(crate) fn with_node_ports(mut self) -> Self {
        self.set_type("NodePort");
        self
    }

    /// Changes the type. As in an API server, the type's fields are added and removed with it.
    pub(crate) fn set_type(&mut self, kind: &str) {
        let (name, number) = (self.name().to_owned(), self.number);
        if kind == "ExternalName" {
            self.service["spec"] = json!({"type": kind, "externalName": "web.example.com"});
            return;
        }
        if self.service["spec"]["type"] == "ExternalName" {
            self.service = Self::of(&name, number, &[]).service;
        }
        let ports = [self.node_port(0), self.node_port(1)];
        let spec = &mut self.service["spec"];
        spec["type"] = json!(kind);
        for (port, node_port) in ports.into_iter().enumerate() {
            if kind == "ClusterIP" {
                spec["ports"][port].as_object_mut().map(|port| port.remove("nodePort"));
            } else {
                spec["ports"][port]["nodePort"] = json!(node_port);
                spec["externalTrafficPolicy"] = json!("Cluster");
            }
        }
    }

    /// The node port of HTTP (0), of the echo port (1), and further ones of this service.
    pub(crate) const fn node_port(&self, port: u16) -> u16 {
        30_000 + self.number * 10 + port
    }

    /// The HTTP and the echo port at the cluster IP.
    pub(crate) fn cluster_ip_ports(&self, family: Family) -> [SocketAddr; 2] {
        [self.at(family, WEB), self.at(family, ECHO_PORT)]
    }

    /// The HTTP and the echo node port at this node address.
    pub(crate) fn node_ports_of(&self, node: IpAddr) -> [SocketAddr; 2] {
        [0, 1].map(|port| SocketAddr::new(node, self.node_port(port)))
    }

    pub(crate) fn at(&self, family: Family, port: u16) -> SocketAddr {
        let address = service_addresses(self.number).into_iter().find(|address| family.is_of(address));
        SocketAddr::new(address.expect("a service of both families"), port)
    }

    pub(crate) fn name(&self) -> &str {
        self.service["metadata"]["name"].as_str().expect("a service with a name")
    }

    /// Changes every endpoint.
    pub(crate) fn for_each_endpoint(&mut self, change: impl Fn(&mut Value)) {
        let slices = self.slices.iter_mut().filter_map(|slice| slice["endpoints"].as_array_mut());
        slices.flatten().for_each(change);
    }

    /// Changes the endpoints on a node.
    pub(crate) fn for_each_endpoint_on(&mut self, node: &str, change: impl Fn(&mut Value)) {
        self.for_each_endpoint(|endpoint| {
            if endpoint["nodeName"] == node {
                change(endpoint);
            }
        });
    }

    /// Replaces all endpoints.
    pub(crate) fn replace_endpoints(&mut self, pods: &[&Pod]) {
        self.slices = Self::of(self.name(), self.number, pods).slices;
    }

    /// All objects, each with a new resource version.
    pub(crate) fn objects(&self) -> Vec<Value> {
        static VERSION: AtomicU64 = AtomicU64::new(1_000);
        let mut objects: Vec<Value> = [&self.service].into_iter().chain(&self.slices).cloned().collect();
        for object in &mut objects {
            let version = VERSION.fetch_add(1, Ordering::Relaxed);
            object["metadata"]["resourceVersion"] = json!(version.to_string());
        }
        objects
    }
}

fn metadata(name: &str, labels: &Value) -> Value {
    json!({"namespace": "default", "name": name, "uid": format!("uid-{name}"), "labels": labels})
}

/// A slice of a service; `part` makes its name unique.
pub(crate) fn slice(service: &str, part: &str, family: Family, endpoints: &[Value]) -> Value {
    let name = format!("{service}-{part}").to_lowercase();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": metadata(&name, &json!({"kubernetes.io/service-name": service})),
        "addressType": family.to_string(),
        "ports": [
            {"name": "http", "port": HTTP, "protocol": "TCP"},
            {"name": "echo", "port": ECHO, "protocol": "UDP"},
        ],
        "endpoints": endpoints,
    })
}

/// An endpoint that is ready.
pub(crate) fn endpoint(node: &str, address: IpAddr) -> Value {
    let mut endpoint = json!({"addresses": [address], "nodeName": node});
    ready(&mut endpoint);
    endpoint
}

pub(crate) fn ready(endpoint: &mut Value) {
    endpoint["conditions"] = json!({"ready": true, "serving": true, "terminating": false});
}

/// Makes an endpoint terminating and serving.
pub(crate) fn terminating_and_serving(endpoint: &mut Value) {
    endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
}

/// Makes an endpoint terminating and no longer serving.
pub(crate) fn terminating_not_serving(endpoint: &mut Value) {
    endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": true});
}

/// Makes an endpoint neither ready nor terminating.
pub(crate) fn unready(endpoint: &mut Value) {
    endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": false});
}
