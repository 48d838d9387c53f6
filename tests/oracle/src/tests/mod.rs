//! Upstream's own cases, put to the oracle. Each test is named after the one it was read from, where there is one.

mod categorize;
mod differences;
mod frontends;
mod host_ports;
mod masquerade;
mod policies;
mod slices;

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{At, Client, Node, Protocol, Question, Rules, Verdict, World, answer};

/// The node of upstream's tests, and another.
const NODE: &str = "node";
const OTHER: &str = "other";
const NODE_IP: &str = "192.168.0.2";
const OTHER_IP: &str = "192.168.0.3";

const POD: (At<'_>, &str) = (At::Pod(NODE), "10.0.0.2");
const HOST: (At<'_>, &str) = (At::Host(NODE), NODE_IP);
const OUTSIDE: (At<'_>, &str) = (At::Outside { via: NODE }, "203.0.113.2");

fn world() -> World {
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
    World { nodes, localhost_node_ports: true }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A service of a balancer: 172.30.0.41:80, `NodePort` 3001, 1.2.3.4; with `more` merged into its spec.
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

/// A slice of it with these endpoints.
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

/// As [`endpoint`], in its last hours.
fn leaving(address: &str, node: &str) -> Value {
    json!({
        "addresses": [address], "nodeName": node,
        "conditions": {"ready": false, "serving": true, "terminating": true},
    })
}

fn unready(address: &str, node: &str) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": {"ready": false, "serving": false}})
}

/// One here and one on the other node.
fn both() -> Vec<Value> {
    vec![slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.1.1", OTHER)])]
}

/// `ADDRESS:PORT` over TCP, of `rules`.
fn ask_as(rules: Rules, service: &Value, slices: &[Value], who: (At<'_>, &str), to: &str) -> Verdict {
    ask_over(Protocol::Tcp, rules, service, slices, who, to)
}

fn ask_over(
    protocol: Protocol,
    rules: Rules,
    service: &Value,
    slices: &[Value],
    who: (At<'_>, &str),
    to: &str,
) -> Verdict {
    let to: std::net::SocketAddr = to.parse().expect("an address and port");
    let question = Question { address: to.ip(), port: to.port(), protocol };
    let client = Client { at: who.0, address: ip(who.1) };
    answer(rules, &world(), service, slices, &client, &question).expect("sound objects")
}

/// By kube-proxy's rules.
fn ask(service: &Value, slices: &[Value], who: (At<'_>, &str), to: &str) -> Verdict {
    ask_as(Rules::KUBE_PROXY, service, slices, who, to)
}

/// These answer, and all see this source.
fn answered(endpoints: &[&str], source: &str) -> Verdict {
    let pair = |endpoint: &&str| (endpoint.parse().expect("an address and port"), ip(source));
    Verdict::Answered(endpoints.iter().map(pair).collect())
}
