//! Test cases of kube-proxy; a test that has a counterpart there has its name.

mod categorize;
mod differences;
mod frontends;
mod host_ports;
mod masquerade;
mod policies;
mod slices;

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Client, Destination, Location, Node, Protocol, Rules, Topology, Verdict, verdict};

/// The node of the kube-proxy tests, and another one.
const NODE: &str = "node";
const OTHER: &str = "other";
const NODE_IP: &str = "192.168.0.2";
const OTHER_IP: &str = "192.168.0.3";

const POD: (Location<'_>, &str) = (Location::Pod(NODE), "10.0.0.2");
const HOST: (Location<'_>, &str) = (Location::Host(NODE), NODE_IP);
const OUTSIDE: (Location<'_>, &str) = (Location::Outside { via: NODE }, "203.0.113.2");

fn topology() -> Topology {
    let node = |name: &str, address: &str, pods: &[&str]| Node {
        name: name.to_owned(),
        addresses: vec![ip(address), ip(if name == NODE { "2001:db8::2" } else { "2001:db8::3" })],
        zone: Some(format!("zone-of-{name}")),
        pods: pods.iter().map(|pod| ip(pod)).collect(),
    };
    let nodes = vec![
        node(NODE, NODE_IP, &["10.0.0.2", "10.180.0.1"]),
        node(OTHER, OTHER_IP, &["10.0.1.2", "10.180.1.1"]),
    ];
    Topology { nodes, localhost_node_ports: true }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A `LoadBalancer` Service: 172.30.0.41:80, node port 3001, 1.2.3.4; `more` is merged into its
/// spec.
fn service(more: &Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "ns1", "name": "svc1"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "172.30.0.41", "clusterIPs": ["172.30.0.41"], "ipFamilies": ["IPv4"],
            "externalIPs": ["50.60.70.81"],
            "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster",
            "ports": [{"name": "p80", "port": 80, "protocol": "TCP", "nodePort": 3001}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}},
    });
    merge(&mut service["spec"], more);
    service
}

fn merge(into: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}

/// A slice of the Service with these endpoints.
fn slice(endpoints: &[Value]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "ns1", "name": "svc1-1", "labels": {"kubernetes.io/service-name": "svc1"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "p80", "port": 80, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

fn endpoint(address: &str, node: &str) -> Value {
    json!({"addresses": [address], "nodeName": node})
}

/// A terminating endpoint that is still serving.
fn terminating(address: &str, node: &str) -> Value {
    json!({
        "addresses": [address], "nodeName": node,
        "conditions": {"ready": false, "serving": true, "terminating": true},
    })
}

fn unready(address: &str, node: &str) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": {"ready": false, "serving": false}})
}

/// A slice with one endpoint on each node.
fn both() -> Vec<Value> {
    vec![slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.1.1", OTHER)])]
}

/// The verdict of `rules` for a TCP connection to `to` (`ADDRESS:PORT`).
fn verdict_of(
    rules: Rules,
    service: &Value,
    slices: &[Value],
    client: (Location<'_>, &str),
    to: &str,
) -> Verdict {
    verdict_over(Protocol::Tcp, rules, service, slices, client, to)
}

fn verdict_over(
    protocol: Protocol,
    rules: Rules,
    service: &Value,
    slices: &[Value],
    client: (Location<'_>, &str),
    to: &str,
) -> Verdict {
    let to: std::net::SocketAddr = to.parse().expect("an address and port");
    let destination = Destination { address: to.ip(), port: to.port(), protocol };
    let client = Client { location: client.0, address: ip(client.1) };
    verdict(rules, &topology(), service, slices, &client, &destination).expect("valid objects")
}

/// The verdict of kube-proxy's rules.
fn kube_proxy(service: &Value, slices: &[Value], client: (Location<'_>, &str), to: &str) -> Verdict {
    verdict_of(Rules::KUBE_PROXY, service, slices, client, to)
}

/// The verdict that any of these endpoints gets the connection and sees this source.
fn delivered(endpoints: &[&str], source: &str) -> Verdict {
    let pair = |endpoint: &&str| (endpoint.parse().expect("an address and port"), ip(source));
    Verdict::Delivered(endpoints.iter().map(pair).collect())
}
