//! What is refused, what is silence, and who is left when nobody is ready.

use serde_json::{Value, json};

use super::{
    super::Verdict, At, HOST, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, answered, ask, endpoint, leaving,
    service, slice, unready,
};

const CLUSTER: &str = "172.30.0.41:80";
const NODE_PORT: &str = "192.168.0.2:3001";
const BALANCER: &str = "1.2.3.4:80";
const ALL: [&str; 4] = [CLUSTER, NODE_PORT, BALANCER, "50.60.70.81:80"];

fn local() -> Value {
    service(&json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}))
}

/// `TestNoEndpointsReject`; "should be rejected when no endpoints exist", "… for evicted pods".
#[test]
fn no_endpoints_reject() {
    let none: [&[Value]; 3] = [&[], &[slice(&[])], &[slice(&[unready("10.180.0.1", NODE)])]];
    for slices in none {
        for service in [service(&json!({})), local()] {
            for who in [POD, HOST, OUTSIDE] {
                for to in ALL {
                    assert_eq!(ask(&service, slices, who, to), Verdict::Rejected, "{who:?} to {to}");
                }
            }
        }
    }
}

/// `TestInternalTrafficPolicy`; "should respect internalTrafficPolicy=Local Pod to Pod", "… Pod (hostNetwork: true) to Pod".
#[test]
fn internal_traffic_policy() {
    let service = local();
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    for who in [POD, HOST, OUTSIDE] {
        assert_eq!(ask(&service, &slices, who, CLUSTER), Verdict::Dropped, "{who:?}");
    }
    let there = (At::Pod(OTHER), "10.0.1.2");
    assert_eq!(ask(&service, &slices, there, CLUSTER), answered(&["10.180.1.1:80"], there.1));
}

/// `TestExternalTrafficPolicyLocal`: silence for the outside alone; whoever is on a node reaches all.
#[test]
fn external_traffic_policy_local() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    for to in [NODE_PORT, BALANCER, "50.60.70.81:80"] {
        assert_eq!(ask(&service, &slices, OUTSIDE, to), Verdict::Dropped);
        assert_eq!(ask(&service, &slices, POD, to), answered(&["10.180.1.1:80"], POD.1));
        assert_eq!(ask(&service, &slices, HOST, to), answered(&["10.180.1.1:80"], NODE_IP));
    }
    assert_eq!(ask(&service, &slices, OUTSIDE, CLUSTER), answered(&["10.180.1.1:80"], NODE_IP));
    assert_eq!(ask(&service, &slices, OUTSIDE, "192.168.0.3:3001"), answered(&["10.180.1.1:80"], OUTSIDE.1));
}

/// "should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local": its
/// last question, of a pod to another node's `NodePort`, must fail.
#[test]
fn a_pod_at_another_nodes_node_port_is_outside() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let slices = [slice(&[leaving("10.180.0.1", NODE)])];
    for (client, own) in [(POD, POD.1), (HOST, NODE_IP)] {
        assert_eq!(ask(&service, &slices, client, "192.168.0.3:3001"), Verdict::Dropped);
        assert_eq!(ask(&service, &slices, client, NODE_PORT), answered(&["10.180.0.1:80"], own));
    }
    let slices = [slice(&[leaving("10.180.1.1", OTHER)])];
    assert_eq!(ask(&service, &slices, POD, "192.168.0.3:3001"), answered(&["10.180.1.1:80"], POD.1));
    assert_eq!(ask(&service, &slices, HOST, "192.168.0.3:3001"), answered(&["10.180.1.1:80"], NODE_IP));
}

/// `TestTerminatingEndpointsTrafficPolicyCluster`.
#[test]
fn terminating_endpoints_traffic_policy_cluster() {
    let service = service(&json!({}));
    let ready =
        [slice(&[endpoint("10.180.0.1", NODE), leaving("10.180.0.2", NODE), unready("10.180.1.1", OTHER)])];
    let leaving =
        [slice(&[leaving("10.180.0.2", NODE), leaving("10.180.1.2", OTHER), unready("10.180.1.1", OTHER)])];
    let gone = json!({"ready": false, "serving": false, "terminating": true});
    let mut over = slice(&[endpoint("10.180.0.1", NODE)]);
    over["endpoints"][0]["conditions"] = gone;
    for to in ALL {
        let source = if to == CLUSTER { POD.1 } else { NODE_IP };
        assert_eq!(ask(&service, &ready, POD, to), answered(&["10.180.0.1:80"], source));
        assert_eq!(ask(&service, &leaving, POD, to), answered(&["10.180.0.2:80", "10.180.1.2:80"], source));
        assert_eq!(ask(&service, &[over.clone()], POD, to), Verdict::Rejected);
    }
}

/// `TestTerminatingEndpointsTrafficPolicyLocal`: the two policies find their last resort apart.
#[test]
fn terminating_endpoints_traffic_policy_local() {
    let slices = [slice(&[endpoint("10.180.1.1", OTHER), leaving("10.180.0.2", NODE)])];
    let service = local();
    // ready ones elsewhere do not count for Local, and those of here not for Cluster
    assert_eq!(ask(&service, &slices, OUTSIDE, BALANCER), answered(&["10.180.0.2:80"], OUTSIDE.1));
    assert_eq!(ask(&service, &slices, POD, CLUSTER), answered(&["10.180.0.2:80"], POD.1));
    assert_eq!(ask(&service, &slices, POD, BALANCER), answered(&["10.180.1.1:80"], POD.1));
    let slices = [slice(&[endpoint("10.180.1.1", OTHER), unready("10.180.0.2", NODE)])];
    assert_eq!(ask(&service, &slices, OUTSIDE, BALANCER), Verdict::Dropped);
    assert_eq!(ask(&service, &slices, POD, CLUSTER), Verdict::Dropped);
}

/// "should be able to connect to terminating and unready endpoints if `PublishNotReadyAddresses` is true": the slices say
/// ready, whatever the pod is, and nothing else is looked at.
#[test]
fn publish_not_ready_addresses_shows_in_slices_alone() {
    let mut published = endpoint("10.180.0.1", NODE);
    published["conditions"] = json!({"ready": true, "serving": false, "terminating": true});
    let plain = service(&json!({}));
    assert_eq!(ask(&plain, &[slice(&[published])], POD, CLUSTER), answered(&["10.180.0.1:80"], POD.1));
    let asked_for = service(&json!({"publishNotReadyAddresses": true}));
    let slices = [slice(&[unready("10.180.0.1", NODE)])];
    assert_eq!(ask(&asked_for, &slices, POD, CLUSTER), Verdict::Rejected);
}

/// `TestServiceToServiceMap`: the policy of an earlier type means nothing.
#[test]
fn external_policy_of_a_cluster_ip_service_means_nothing() {
    let mut service =
        service(&json!({"type": "ClusterIP", "externalTrafficPolicy": "Local", "externalIPs": []}));
    service["status"] = json!({});
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    assert_eq!(ask(&service, &slices, OUTSIDE, CLUSTER), answered(&["10.180.1.1:80"], NODE_IP));
    assert_eq!(ask(&service, &slices, OUTSIDE, "192.168.0.3:3001"), answered(&["10.180.1.1:80"], OTHER_IP));
}
