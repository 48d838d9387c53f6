//! Traffic policies: rejections, drops, and the fallback to terminating endpoints.

use serde_json::{Value, json};

use super::{
    super::Verdict, HOST, Location, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, delivered, endpoint,
    kube_proxy, service, slice, terminating, unready,
};

const CLUSTER: &str = "172.30.0.41:80";
const NODE_PORT: &str = "192.168.0.2:3001";
const LOAD_BALANCER: &str = "1.2.3.4:80";
const ALL: [&str; 4] = [CLUSTER, NODE_PORT, LOAD_BALANCER, "50.60.70.81:80"];

fn local() -> Value {
    service(&json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}))
}

/// `TestNoEndpointsReject`; "should be rejected when no endpoints exist", "… for evicted pods".
#[test]
fn no_endpoints_reject() {
    let none: [&[Value]; 3] = [&[], &[slice(&[])], &[slice(&[unready("10.180.0.1", NODE)])]];
    for slices in none {
        for service in [service(&json!({})), local()] {
            for client in [POD, HOST, OUTSIDE] {
                for to in ALL {
                    assert_eq!(
                        kube_proxy(&service, slices, client, to),
                        Verdict::Rejected,
                        "{client:?} to {to}"
                    );
                }
            }
        }
    }
}

/// `TestInternalTrafficPolicy`; "should respect internalTrafficPolicy=Local Pod to Pod", "… Pod
/// (hostNetwork: true) to Pod".
#[test]
fn internal_traffic_policy() {
    let service = local();
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    for client in [POD, HOST, OUTSIDE] {
        assert_eq!(kube_proxy(&service, &slices, client, CLUSTER), Verdict::Dropped, "{client:?}");
    }
    let there = (Location::Pod(OTHER), "10.0.1.2");
    assert_eq!(kube_proxy(&service, &slices, there, CLUSTER), delivered(&["10.180.1.1:80"], there.1));
}

/// `TestExternalTrafficPolicyLocal`: only outside clients are dropped; clients on a node reach all
/// endpoints.
#[test]
fn external_traffic_policy_local() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    for to in [NODE_PORT, LOAD_BALANCER, "50.60.70.81:80"] {
        assert_eq!(kube_proxy(&service, &slices, OUTSIDE, to), Verdict::Dropped);
        assert_eq!(kube_proxy(&service, &slices, POD, to), delivered(&["10.180.1.1:80"], POD.1));
        assert_eq!(kube_proxy(&service, &slices, HOST, to), delivered(&["10.180.1.1:80"], NODE_IP));
    }
    assert_eq!(kube_proxy(&service, &slices, OUTSIDE, CLUSTER), delivered(&["10.180.1.1:80"], NODE_IP));
    assert_eq!(
        kube_proxy(&service, &slices, OUTSIDE, "192.168.0.3:3001"),
        delivered(&["10.180.1.1:80"], OUTSIDE.1)
    );
}

/// "should fallback to local terminating endpoints when there are no ready endpoints with
/// externalTrafficPolicy=Local": its last connection, from a pod to another node's node port, must
/// fail.
#[test]
fn pod_is_an_outside_client_at_another_nodes_node_port() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let slices = [slice(&[terminating("10.180.0.1", NODE)])];
    for (client, own) in [(POD, POD.1), (HOST, NODE_IP)] {
        assert_eq!(kube_proxy(&service, &slices, client, "192.168.0.3:3001"), Verdict::Dropped);
        assert_eq!(kube_proxy(&service, &slices, client, NODE_PORT), delivered(&["10.180.0.1:80"], own));
    }
    let slices = [slice(&[terminating("10.180.1.1", OTHER)])];
    assert_eq!(kube_proxy(&service, &slices, POD, "192.168.0.3:3001"), delivered(&["10.180.1.1:80"], POD.1));
    assert_eq!(
        kube_proxy(&service, &slices, HOST, "192.168.0.3:3001"),
        delivered(&["10.180.1.1:80"], NODE_IP)
    );
}

/// `TestTerminatingEndpointsTrafficPolicyCluster`.
#[test]
fn terminating_endpoints_traffic_policy_cluster() {
    let service = service(&json!({}));
    let ready = [slice(&[
        endpoint("10.180.0.1", NODE),
        terminating("10.180.0.2", NODE),
        unready("10.180.1.1", OTHER),
    ])];
    let terminating = [slice(&[
        terminating("10.180.0.2", NODE),
        terminating("10.180.1.2", OTHER),
        unready("10.180.1.1", OTHER),
    ])];
    let not_serving = json!({"ready": false, "serving": false, "terminating": true});
    let mut ended = slice(&[endpoint("10.180.0.1", NODE)]);
    ended["endpoints"][0]["conditions"] = not_serving;
    for to in ALL {
        let source = if to == CLUSTER { POD.1 } else { NODE_IP };
        assert_eq!(kube_proxy(&service, &ready, POD, to), delivered(&["10.180.0.1:80"], source));
        assert_eq!(
            kube_proxy(&service, &terminating, POD, to),
            delivered(&["10.180.0.2:80", "10.180.1.2:80"], source)
        );
        assert_eq!(kube_proxy(&service, &[ended.clone()], POD, to), Verdict::Rejected);
    }
}

/// `TestTerminatingEndpointsTrafficPolicyLocal`: each policy has its own fallback.
#[test]
fn terminating_endpoints_traffic_policy_local() {
    let slices = [slice(&[endpoint("10.180.1.1", OTHER), terminating("10.180.0.2", NODE)])];
    let service = local();
    // policy Local ignores ready endpoints of other nodes; policy Cluster ignores terminating local
    // ones
    assert_eq!(
        kube_proxy(&service, &slices, OUTSIDE, LOAD_BALANCER),
        delivered(&["10.180.0.2:80"], OUTSIDE.1)
    );
    assert_eq!(kube_proxy(&service, &slices, POD, CLUSTER), delivered(&["10.180.0.2:80"], POD.1));
    assert_eq!(kube_proxy(&service, &slices, POD, LOAD_BALANCER), delivered(&["10.180.1.1:80"], POD.1));
    let slices = [slice(&[endpoint("10.180.1.1", OTHER), unready("10.180.0.2", NODE)])];
    assert_eq!(kube_proxy(&service, &slices, OUTSIDE, LOAD_BALANCER), Verdict::Dropped);
    assert_eq!(kube_proxy(&service, &slices, POD, CLUSTER), Verdict::Dropped);
}

/// "should be able to connect to terminating and unready endpoints if `PublishNotReadyAddresses` is
/// true": only the conditions in the slices count.
#[test]
fn publish_not_ready_addresses_takes_effect_through_slices() {
    let mut published = endpoint("10.180.0.1", NODE);
    published["conditions"] = json!({"ready": true, "serving": false, "terminating": true});
    let plain = service(&json!({}));
    assert_eq!(
        kube_proxy(&plain, &[slice(&[published])], POD, CLUSTER),
        delivered(&["10.180.0.1:80"], POD.1)
    );
    let published_service = service(&json!({"publishNotReadyAddresses": true}));
    let slices = [slice(&[unready("10.180.0.1", NODE)])];
    assert_eq!(kube_proxy(&published_service, &slices, POD, CLUSTER), Verdict::Rejected);
}

/// `TestServiceToServiceMap`: a policy left from an earlier type is ignored.
#[test]
fn external_policy_of_a_cluster_ip_service_is_ignored() {
    let mut service =
        service(&json!({"type": "ClusterIP", "externalTrafficPolicy": "Local", "externalIPs": []}));
    service["status"] = json!({});
    let slices = [slice(&[endpoint("10.180.1.1", OTHER)])];
    assert_eq!(kube_proxy(&service, &slices, OUTSIDE, CLUSTER), delivered(&["10.180.1.1:80"], NODE_IP));
    assert_eq!(
        kube_proxy(&service, &slices, OUTSIDE, "192.168.0.3:3001"),
        delivered(&["10.180.1.1:80"], OTHER_IP)
    );
}
