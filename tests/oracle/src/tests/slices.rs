//! The endpoints of a port.

use serde_json::{Value, json};

use super::{super::Verdict, NODE, OTHER, POD, delivered, endpoint, kube_proxy, service, slice, terminating};

const CLUSTER: &str = "172.30.0.41:80";

fn verdict(slices: &[Value]) -> Verdict {
    kube_proxy(&service(&json!({})), slices, POD, CLUSTER)
}

/// `TestEndpointInfoByServicePort`, `TestEndpointsMapFromESC`: "should support a Service with
/// multiple endpoint IPs specified in multiple EndpointSlices".
#[test]
fn slices_are_merged_and_addresses_counted_once() {
    let first = slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.0.1", NODE)]);
    let second = slice(&[endpoint("10.180.0.1", NODE), endpoint("10.180.1.1", OTHER)]);
    assert_eq!(verdict(&[first, second]), delivered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1));
}

/// "should support named targetPorts that resolve to different ports on different endpoints".
#[test]
fn each_slice_has_its_own_ports() {
    let (mut first, mut second) =
        (slice(&[endpoint("10.180.0.1", NODE)]), slice(&[endpoint("10.180.1.1", OTHER)]));
    first["ports"] = json!([{"name": "p80", "port": 8080, "protocol": "TCP"}, {"name": "other", "port": 9, "protocol": "TCP"}]);
    second["ports"] = json!([{"name": "p80", "port": 8081, "protocol": "TCP"}, {"name": "p80", "port": 7, "protocol": "UDP"}]);
    assert_eq!(verdict(&[first, second]), delivered(&["10.180.0.1:8080", "10.180.1.1:8081"], POD.1));
}

/// `TestEndpointInfoByServicePort`: an address of a terminating and of a new pod belongs to the new
/// pod.
#[test]
fn running_pod_has_precedence_over_a_terminating_pod_with_its_address() {
    let (old, new) = (terminating("10.180.0.1", NODE), endpoint("10.180.0.1", NODE));
    for order in [[old.clone(), new.clone()], [new, old]] {
        let ready = order.iter().chain([&endpoint("10.180.1.1", OTHER)]).cloned().collect::<Vec<_>>();
        assert_eq!(verdict(&[slice(&ready)]), delivered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1));
    }
}

/// Absent conditions default to ready; only the first address counts.
#[test]
fn absent_conditions_default_to_ready() {
    let mut bare = endpoint("10.180.0.1", NODE);
    bare["conditions"] = json!({});
    bare["addresses"] = json!(["10.180.0.1", "10.180.0.9"]);
    assert_eq!(verdict(&[slice(&[bare])]), delivered(&["10.180.0.1:80"], POD.1));
    let mut terminating = endpoint("10.180.0.1", NODE);
    terminating["conditions"] = json!({"ready": false, "terminating": true});
    assert_eq!(verdict(&[slice(&[terminating])]), delivered(&["10.180.0.1:80"], POD.1));
}

/// Slices of another Service, namespace or family, of host names, and of headless Services.
#[test]
fn other_slices_are_ignored() {
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
    assert_eq!(verdict(&others), Verdict::Rejected);
}
