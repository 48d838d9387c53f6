//! Who is masqueraded, and who goes the short way.

use std::net::SocketAddr;

use serde_json::json;

use super::{
    super::Verdict, At, HOST, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, answered, ask, both, endpoint,
    ip, service, slice,
};

const CLUSTER: &str = "172.30.0.41:80";
const NODE_PORT: &str = "192.168.0.2:3001";
const BALANCER: &str = "1.2.3.4:80";
const EXTERNAL: &str = "50.60.70.81:80";
const HERE: &str = "10.180.0.1:80";
const THERE: &str = "10.180.1.1:80";

/// `TestInternalExternalMasquerade`, its base case: policy; who; where to; who answers; masqueraded.
#[test]
fn internal_external_masquerade() {
    let (all, local): (&[&str], &[&str]) = (&[HERE, THERE], &[HERE]);
    let loopback = (At::Host(NODE), "127.0.0.1");
    let cases = [
        ("", POD, CLUSTER, all, false),
        ("", POD, NODE_PORT, all, true),
        ("", POD, BALANCER, all, true),
        ("", HOST, CLUSTER, all, true),
        ("", HOST, NODE_PORT, all, true),
        ("", loopback, "127.0.0.1:3001", all, true),
        ("", HOST, BALANCER, all, true),
        ("", OUTSIDE, CLUSTER, all, true),
        ("", OUTSIDE, NODE_PORT, all, true),
        ("", OUTSIDE, BALANCER, all, true),
        ("externalTrafficPolicy", POD, CLUSTER, all, false),
        ("externalTrafficPolicy", POD, NODE_PORT, all, false),
        ("externalTrafficPolicy", POD, BALANCER, all, false),
        ("externalTrafficPolicy", HOST, CLUSTER, all, true),
        ("externalTrafficPolicy", HOST, NODE_PORT, all, true),
        ("externalTrafficPolicy", loopback, "127.0.0.1:3001", all, true),
        ("externalTrafficPolicy", HOST, BALANCER, all, true),
        ("externalTrafficPolicy", OUTSIDE, CLUSTER, all, true),
        ("externalTrafficPolicy", OUTSIDE, NODE_PORT, local, false),
        ("externalTrafficPolicy", OUTSIDE, BALANCER, local, false),
        ("internalTrafficPolicy", POD, CLUSTER, local, false),
        ("internalTrafficPolicy", POD, NODE_PORT, all, true),
        ("internalTrafficPolicy", POD, BALANCER, all, true),
        ("internalTrafficPolicy", HOST, CLUSTER, local, true),
        ("internalTrafficPolicy", HOST, NODE_PORT, all, true),
        ("internalTrafficPolicy", loopback, "127.0.0.1:3001", all, true),
        ("internalTrafficPolicy", HOST, BALANCER, all, true),
        ("internalTrafficPolicy", OUTSIDE, CLUSTER, local, true),
        ("internalTrafficPolicy", OUTSIDE, NODE_PORT, all, true),
        ("internalTrafficPolicy", OUTSIDE, BALANCER, all, true),
    ];
    for (policy, who, to, endpoints, masquerade) in cases {
        let service = service(&if policy.is_empty() { json!({}) } else { json!({policy: "Local"}) });
        let source = if masquerade { NODE_IP } else { who.1 };
        let verdict = ask(&service, &both(), who, to);
        assert_eq!(verdict, answered(endpoints, source), "{policy} {who:?} to {to}");
    }
}

/// External IPs are as a balancer's (`TestExternalTrafficPolicyLocal`, `TestExternalTrafficPolicyCluster`).
#[test]
fn external_ips_are_external() {
    let cluster = service(&json!({}));
    let local = service(&json!({"externalTrafficPolicy": "Local"}));
    assert_eq!(ask(&cluster, &both(), OUTSIDE, EXTERNAL), answered(&[HERE, THERE], NODE_IP));
    assert_eq!(ask(&local, &both(), OUTSIDE, EXTERNAL), answered(&[HERE], OUTSIDE.1));
    assert_eq!(ask(&local, &both(), POD, EXTERNAL), answered(&[HERE, THERE], POD.1));
}

/// "should allow pods to hairpin back to themselves through services".
#[test]
fn a_pod_that_reaches_itself_sees_its_node() {
    let itself = (At::Pod(NODE), "10.180.0.1");
    let service = service(&json!({"internalTrafficPolicy": "Local"}));
    assert_eq!(ask(&service, &both(), itself, CLUSTER), answered(&[HERE], NODE_IP));
}

/// No test of upstream's looks at it: seen with kube-proxy 1.36.
#[test]
fn what_is_for_the_node_itself_is_not_masqueraded() {
    let service = service(&json!({}));
    let slices = [slice(&[endpoint(NODE_IP, NODE), endpoint(OTHER_IP, OTHER)])];
    for (who, to) in [(POD, NODE_PORT), (OUTSIDE, CLUSTER), (OUTSIDE, NODE_PORT), (OUTSIDE, BALANCER)] {
        let seen = [(NODE_IP, who.1), (OTHER_IP, NODE_IP)]
            .map(|(at, source)| (SocketAddr::new(ip(at), 80), ip(source)));
        assert_eq!(ask(&service, &slices, who, to), Verdict::Answered(seen.into()), "{who:?} to {to}");
    }
    assert_eq!(ask(&service, &slices[..1], (At::Host(NODE), "127.0.0.1"), "127.0.0.1:3001"), {
        let seen = [NODE_IP, OTHER_IP].map(|at| (SocketAddr::new(ip(at), 80), ip(NODE_IP)));
        Verdict::Answered(seen.into())
    });
}
