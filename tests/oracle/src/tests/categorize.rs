//! `TestCategorizeEndpoints`, with the endpoints of its cases.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::{
    super::{Node, Protocol, endpoints, ports::ServicePort},
    NODE, OTHER, endpoint, ip, slice, terminating, unready,
};

/// A port: internal policy Local, external policy Local, has a node port.
#[derive(Clone, Copy)]
struct Policies(bool, bool, bool);

const CLUSTER: Policies = Policies(false, false, false);
const INTERNAL_LOCAL: Policies = Policies(true, false, false);

fn port(policies: Policies) -> ServicePort {
    ServicePort {
        name: "p80".to_owned(),
        protocol: Protocol::Tcp,
        number: 80,
        cluster: ip("172.30.0.41"),
        node_port: if policies.2 { 8080 } else { 0 },
        external: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        is_internal_local: policies.0,
        is_external_local: policies.1,
    }
}

/// Returns the last bytes of the eligible addresses (cluster, local) on a node in `zone`, and
/// `has_any`.
fn eligible(policies: Policies, zone: Option<&str>, all: &[Value]) -> (Vec<u8>, Vec<u8>, bool) {
    let slice: EndpointSlice = serde_json::from_value(slice(all)).expect("a slice");
    let port = port(policies);
    let endpoints = endpoints::of_port(&port, Some("ns1"), "svc1", &[slice]);
    let node = Node { name: NODE.to_owned(), zone: zone.map(str::to_owned), ..Node::default() };
    let eligible = endpoints::eligible(&port, &endpoints, &node);
    let numbers = |found: &[&endpoints::Endpoint]| -> Vec<u8> {
        found
            .iter()
            .map(|endpoint| endpoint.at.ip().to_string().rsplit('.').next().map(str::parse))
            .map(|number| number.expect("parts").expect("a number"))
            .collect()
    };
    (numbers(&eligible.cluster), numbers(&eligible.local), eligible.has_any)
}

fn zoned(number: u8, node: &str, zones: &[&str]) -> Value {
    let mut endpoint = endpoint(&format!("10.0.0.{number}"), node);
    let zones: Vec<Value> = zones.iter().map(|zone| json!({"name": zone})).collect();
    endpoint["hints"] = json!({"forZones": zones});
    endpoint
}

/// An endpoint with a node hint; its zone is `a` for numbers 1 and 4.
fn for_node(number: u8, node: &str) -> Value {
    let mut endpoint = zoned(number, "elsewhere", &[["a", "b", "c", "a"][usize::from(number) - 1]]);
    endpoint["hints"]["forNodes"] = json!([{"name": node}]);
    endpoint
}

fn not_ready(mut endpoint: Value) -> Value {
    endpoint["conditions"] = json!({"ready": false});
    endpoint
}

#[test]
fn should_use_topology_since_all_endpoints_have_hints() {
    let all: Vec<Value> =
        [(3, "a"), (4, "b"), (5, "c"), (6, "a")].map(|(n, zone)| zoned(n, OTHER, &[zone])).into();
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![3, 6], vec![], true));
}

#[test]
fn topology_ignored_for_local_endpoints() {
    let all =
        [zoned(3, NODE, &["a"]), zoned(4, NODE, &["b"]), zoned(5, OTHER, &["c"]), zoned(6, OTHER, &["a"])];
    for policies in [Policies(false, true, true), Policies(true, false, true)] {
        assert_eq!(eligible(policies, Some("a"), &all), (vec![3, 6], vec![3, 4], true));
    }
}

#[test]
fn empty_node_labels_and_node_in_different_zone_no_endpoint_filtering() {
    for zone in [None, Some(""), Some("b")] {
        assert_eq!(eligible(CLUSTER, zone, &[zoned(3, OTHER, &["a"])]), (vec![3], vec![], true));
    }
}

#[test]
fn unready_endpoint() {
    let hinted = |six: Value| vec![zoned(3, OTHER, &["a"]), zoned(4, OTHER, &["b"]), six];
    let all = hinted(not_ready(zoned(6, OTHER, &["a"])));
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![3], vec![], true));
    // hints of endpoints that are not ready do not matter
    let all = hinted(unready("10.0.0.6", OTHER));
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![3], vec![], true));
}

#[test]
fn only_unready_endpoints_in_same_zone_should_not_filter() {
    let all = [not_ready(zoned(3, OTHER, &["a"])), zoned(4, OTHER, &["b"]), zoned(5, OTHER, &["c"])];
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![4, 5], vec![], true));
}

#[test]
fn missing_hints_no_filtering_applied() {
    let all = [zoned(3, OTHER, &["a"]), endpoint("10.0.0.4", OTHER), zoned(5, OTHER, &["b"])];
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![3, 4, 5], vec![], true));
}

#[test]
fn multiple_hints_per_endpoint_filtering_includes_any_endpoint_with_zone_included() {
    let all = [zoned(3, OTHER, &["a", "b", "c"]), zoned(4, OTHER, &["b", "c"]), zoned(5, OTHER, &["b", "d"])];
    assert_eq!(eligible(CLUSTER, Some("c"), &all), (vec![3, 4], vec![], true));
}

#[test]
fn prefer_same_node_available() {
    let all = [for_node(1, NODE), for_node(2, "node-2"), for_node(4, "node-4")];
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![1], vec![], true));
}

#[test]
fn prefer_same_node_ignored_if_some_endpoints_unhinted() {
    let all = [for_node(1, NODE), endpoint("10.0.0.2", OTHER), for_node(4, "node-4")];
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![1, 2, 4], vec![], true));
}

#[test]
fn prefer_same_node_falls_back_to_prefer_same_zone_if_no_endpoint_for_node() {
    let all = [for_node(1, "node-1"), for_node(2, "node-2"), for_node(4, "node-4")];
    assert_eq!(eligible(CLUSTER, Some("a"), &all), (vec![1, 4], vec![], true));
}

#[test]
fn internal_traffic_policy_local() {
    assert_eq!(eligible(INTERNAL_LOCAL, None, &[]), (vec![], vec![], false));
    let (near, far) = (endpoint("10.0.0.0", NODE), endpoint("10.0.0.1", OTHER));
    assert_eq!(eligible(INTERNAL_LOCAL, None, std::slice::from_ref(&far)), (vec![], vec![], true));
    assert_eq!(eligible(INTERNAL_LOCAL, None, &[near, far]), (vec![], vec![0], true));
}

#[test]
fn cluster_traffic_policy_readiness() {
    let (ready, not) = (endpoint("10.0.0.1", OTHER), unready("10.0.0.0", OTHER));
    assert_eq!(eligible(CLUSTER, None, std::slice::from_ref(&not)), (vec![], vec![], false));
    assert_eq!(eligible(CLUSTER, None, &[not, ready]), (vec![1], vec![], true));
    let all = [terminating("10.0.0.0", NODE), terminating("10.0.0.1", OTHER)];
    assert_eq!(eligible(CLUSTER, None, &all), (vec![0, 1], vec![], true));
}

#[test]
fn some_endpoints_local() {
    let all = [endpoint("10.0.0.0", NODE), endpoint("10.0.0.1", OTHER)];
    for policies in [Policies(true, false, true), Policies(false, true, true), Policies(true, true, true)] {
        assert_eq!(eligible(policies, None, &all), (vec![0, 1], vec![0], true));
    }
}

#[test]
fn all_endpoints_remote() {
    let all = [endpoint("10.0.0.0", OTHER), endpoint("10.0.0.1", OTHER)];
    assert_eq!(eligible(Policies(true, true, true), None, &all), (vec![0, 1], vec![], true));
    let all = [terminating("10.0.0.0", OTHER), terminating("10.0.0.1", OTHER)];
    assert_eq!(eligible(Policies(true, true, true), None, &all), (vec![0, 1], vec![], true));
}

#[test]
fn external_local_with_terminating_endpoints() {
    let all = [
        endpoint("10.0.0.0", OTHER),
        unready("10.0.0.1", NODE),
        terminating("10.0.0.2", NODE),
        terminating("10.0.0.3", OTHER),
    ];
    assert_eq!(eligible(Policies(false, true, true), None, &all), (vec![0], vec![2], true));
}

#[test]
fn external_traffic_policy_ignored_if_not_externally_accessible() {
    let all = [endpoint("10.0.0.0", OTHER), endpoint("10.0.0.1", NODE)];
    assert_eq!(eligible(Policies(false, true, false), None, &all), (vec![0, 1], vec![], true));
}
