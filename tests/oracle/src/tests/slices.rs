//! Which endpoints are a port's.

use serde_json::{Value, json};

use super::{super::Verdict, NODE, OTHER, POD, answered, ask, endpoint, leaving, service, slice};

const CLUSTER: &str = "172.30.0.41:80";

fn asked(slices: &[Value]) -> Verdict {
    ask(&service(&json!({})), slices, POD, CLUSTER)
}

/// `TestEndpointInfoByServicePort`, `TestEndpointsMapFromESC`: "should support a Service with multiple endpoint IPs specified
/// in multiple EndpointSlices".
#[test]
fn slices_are_merged_and_addresses_counted_once() {
    let first = slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.0.1", NODE)]);
    let second = slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.1.1", OTHER)]);
    assert_eq!(asked(&[first, second]), answered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1));
}

/// "should support named targetPorts that resolve to different ports on different endpoints".
#[test]
fn each_slice_has_its_own_ports() {
    let (mut first, mut second) =
        (slice(&[endpoint("10.180.0.1", NODE)]), slice(&[endpoint("10.180.1.1", OTHER)]));
    first["ports"] = json!([{"name": "p80", "port": 8080, "protocol": "TCP"}, {"name": "other", "port": 9, "protocol": "TCP"}]);
    second["ports"] = json!([{"name": "p80", "port": 8081, "protocol": "TCP"}, {"name": "p80", "port": 7, "protocol": "UDP"}]);
    assert_eq!(asked(&[first, second]), answered(&["10.180.0.1:8080", "10.180.1.1:8081"], POD.1));
}

/// `TestEndpointInfoByServicePort`: an address that a new pod has while the old one still ends is the new pod's.
#[test]
fn of_one_address_the_running_pod_is_meant() {
    let (old, new) = (leaving("10.180.0.1", NODE), endpoint("10.180.0.1", NODE));
    for order in [[old.clone(), new.clone()], [new, old]] {
        let ready = order.iter().chain([&endpoint("10.180.1.1", OTHER)]).cloned().collect::<Vec<_>>();
        assert_eq!(asked(&[slice(&ready)]), answered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1));
    }
}

/// Conditions that are not told are good ones; of several addresses the first counts.
#[test]
fn what_is_not_told_is_well() {
    let mut told = endpoint("10.180.0.1", NODE);
    told["conditions"] = json!({});
    told["addresses"] = json!(["10.180.0.1", "10.180.0.9"]);
    assert_eq!(asked(&[slice(&[told])]), answered(&["10.180.0.1:80"], POD.1));
    let mut leaving = endpoint("10.180.0.1", NODE);
    leaving["conditions"] = json!({"ready": false, "terminating": true});
    assert_eq!(asked(&[slice(&[leaving])]), answered(&["10.180.0.1:80"], POD.1));
}

/// Slices of another service, another namespace, another family, of names, of headless services.
#[test]
fn other_slices_are_passed_over() {
    let other = |change: fn(&mut Value)| {
        let mut slice = slice(&[endpoint("10.180.0.1", NODE)]);
        change(&mut slice);
        slice
    };
    let others = [
        other(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!("svc2")),
        other(|slice| slice["metadata"]["namespace"] = json!("ns2")),
        other(|slice| slice["addressType"] = json!("IPv6")),
        other(|slice| slice["addressType"] = json!("FQDN")),
        other(|slice| slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("")),
        other(|slice| slice["ports"] = json!([{"name": "p80", "protocol": "TCP"}])),
    ];
    assert_eq!(asked(&others), Verdict::Rejected);
}
