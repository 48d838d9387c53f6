//! Masquerading.

use std::net::SocketAddr;

use serde_json::json;

use super::{
    super::Verdict, HOST, Location, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, both, delivered, endpoint,
    ip, kube_proxy, service, slice,
};

const CLUSTER: &str = "172.30.0.41:80";
const NODE_PORT: &str = "192.168.0.2:3001";
const LOAD_BALANCER: &str = "1.2.3.4:80";
const EXTERNAL: &str = "50.60.70.81:80";
const HERE: &str = "10.180.0.1:80";
const THERE: &str = "10.180.1.1:80";

/// `TestInternalExternalMasquerade`, base case: policy, client, destination, endpoints,
/// masqueraded.
#[test]
fn internal_external_masquerade() {
    let (all, local): (&[&str], &[&str]) = (&[HERE, THERE], &[HERE]);
    let loopback = (Location::Host(NODE), "127.0.0.1");
    let cases = [
        ("", POD, CLUSTER, all, false),
        ("", POD, NODE_PORT, all, true),
        ("", POD, LOAD_BALANCER, all, true),
        ("", HOST, CLUSTER, all, true),
        ("", HOST, NODE_PORT, all, true),
        ("", loopback, "127.0.0.1:3001", all, true),
        ("", HOST, LOAD_BALANCER, all, true),
        ("", OUTSIDE, CLUSTER, all, true),
        ("", OUTSIDE, NODE_PORT, all, true),
        ("", OUTSIDE, LOAD_BALANCER, all, true),
        ("externalTrafficPolicy", POD, CLUSTER, all, false),
        ("externalTrafficPolicy", POD, NODE_PORT, all, false),
        ("externalTrafficPolicy", POD, LOAD_BALANCER, all, false),
        ("externalTrafficPolicy", HOST, CLUSTER, all, true),
        ("externalTrafficPolicy", HOST, NODE_PORT, all, true),
        ("externalTrafficPolicy", loopback, "127.0.0.1:3001", all, true),
        ("externalTrafficPolicy", HOST, LOAD_BALANCER, all, true),
        ("externalTrafficPolicy", OUTSIDE, CLUSTER, all, true),
        ("externalTrafficPolicy", OUTSIDE, NODE_PORT, local, false),
        ("externalTrafficPolicy", OUTSIDE, LOAD_BALANCER, local, false),
        ("internalTrafficPolicy", POD, CLUSTER, local, false),
        ("internalTrafficPolicy", POD, NODE_PORT, all, true),
        ("internalTrafficPolicy", POD, LOAD_BALANCER, all, true),
        ("internalTrafficPolicy", HOST, CLUSTER, local, true),
        ("internalTrafficPolicy", HOST, NODE_PORT, all, true),
        ("internalTrafficPolicy", loopback, "127.0.0.1:3001", all, true),
        ("internalTrafficPolicy", HOST, LOAD_BALANCER, all, true),
        ("internalTrafficPolicy", OUTSIDE, CLUSTER, local, true),
        ("internalTrafficPolicy", OUTSIDE, NODE_PORT, all, true),
        ("internalTrafficPolicy", OUTSIDE, LOAD_BALANCER, all, true),
    ];
    for (policy, client, to, endpoints, masquerade) in cases {
        let service = service(&if policy.is_empty() { json!({}) } else { json!({policy: "Local"}) });
        let source = if masquerade { NODE_IP } else { client.1 };
        let verdict = kube_proxy(&service, &both(), client, to);
        assert_eq!(verdict, delivered(endpoints, source), "{policy} {client:?} to {to}");
    }
}

/// External IPs act like load balancer IPs (`TestExternalTrafficPolicyLocal`,
/// `TestExternalTrafficPolicyCluster`).
#[test]
fn external_ips_are_external() {
    let cluster = service(&json!({}));
    let local = service(&json!({"externalTrafficPolicy": "Local"}));
    assert_eq!(kube_proxy(&cluster, &both(), OUTSIDE, EXTERNAL), delivered(&[HERE, THERE], NODE_IP));
    assert_eq!(kube_proxy(&local, &both(), OUTSIDE, EXTERNAL), delivered(&[HERE], OUTSIDE.1));
    assert_eq!(kube_proxy(&local, &both(), POD, EXTERNAL), delivered(&[HERE, THERE], POD.1));
}

/// "should allow pods to hairpin back to themselves through services".
#[test]
fn hairpin_connection_has_the_node_as_source() {
    let itself = (Location::Pod(NODE), "10.180.0.1");
    let service = service(&json!({"internalTrafficPolicy": "Local"}));
    assert_eq!(kube_proxy(&service, &both(), itself, CLUSTER), delivered(&[HERE], NODE_IP));
}

/// Kubernetes has no test for it: observed with kube-proxy 1.36.
#[test]
fn connection_to_the_node_itself_is_not_masqueraded() {
    let service = service(&json!({}));
    let slices = [slice(&[endpoint(NODE_IP, NODE), endpoint(OTHER_IP, OTHER)])];
    for (client, to) in [(POD, NODE_PORT), (OUTSIDE, CLUSTER), (OUTSIDE, NODE_PORT), (OUTSIDE, LOAD_BALANCER)]
    {
        let seen = [(NODE_IP, client.1), (OTHER_IP, NODE_IP)]
            .map(|(at, source)| (SocketAddr::new(ip(at), 80), ip(source)));
        assert_eq!(
            kube_proxy(&service, &slices, client, to),
            Verdict::Delivered(seen.into()),
            "{client:?} to {to}"
        );
    }
    assert_eq!(kube_proxy(&service, &slices[..1], (Location::Host(NODE), "127.0.0.1"), "127.0.0.1:3001"), {
        let seen = [NODE_IP, OTHER_IP].map(|at| (SocketAddr::new(ip(at), 80), ip(NODE_IP)));
        Verdict::Delivered(seen.into())
    });
}
