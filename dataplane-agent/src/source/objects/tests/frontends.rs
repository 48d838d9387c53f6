//! Addresses and client restrictions of a Service, by type.

use serde_json::json;

use super::*;
use crate::state::{Hints, Name, TrafficPolicy};

/// A Service of type `LoadBalancer` with every field set, and these changes.
fn service(changes: &[(&str, Value)]) -> PlainService {
    let mut object = changed(Kind::Service, "/metadata/name", json!("a"));
    for (pointer, value) in changes {
        *object.pointer_mut(pointer).unwrap() = value.clone();
    }
    let converted = Kind::Service.convert(object).unwrap();
    assert_eq!(converted.problems, []);
    let Some(Object::Service(service)) = converted.object else { panic!("no service") };
    service
}

fn shown<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn node_ports(service: &PlainService) -> Vec<Option<u16>> {
    service.ports.iter().map(|port| port.node_port).collect()
}

#[test]
fn load_balancer_service_has_all_frontend_kinds() {
    let service = service(&[]);
    assert_eq!(shown(&service.cluster_ips), ["10.96.0.1", "fd96::1"]);
    assert_eq!(shown(&service.external_ips), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(shown(&service.load_balancer_ips), ["192.0.2.9", "2001:db8::9"]);
    assert_eq!(shown(&service.source_ranges), ["198.51.100.0/24"]);
    assert_eq!(node_ports(&service), [Some(30_080), Some(30_080)]);
    let policies = (service.internal_policy, service.external_policy);
    assert_eq!(policies, (TrafficPolicy::Cluster, TrafficPolicy::Local));
    assert_eq!(service.health_check_port, Some(32_000));
    assert_eq!(service.affinity_timeout, Some(10));
}

#[test]
fn node_port_service_has_no_load_balancer_address() {
    let service = service(&[("/spec/type", json!("NodePort"))]);
    assert_eq!(node_ports(&service), [Some(30_080), Some(30_080)]);
    assert_eq!(service.external_ips.len(), 2);
    assert_eq!((service.load_balancer_ips, service.source_ranges), (vec![], vec![]));
    assert_eq!(service.health_check_port, None);
}

#[test]
fn fields_of_former_type_are_ignored() {
    // a former LoadBalancer keeps its status, and may keep numbers, even invalid ones
    let service = service(&[
        ("/spec/type", json!("ClusterIP")),
        ("/spec/ports/1/nodePort", json!(99_999)),
        ("/spec/healthCheckNodePort", json!(-1)),
        ("/spec/loadBalancerSourceRanges", json!(["everyone"])),
        ("/status/loadBalancer/ingress/0/ip", json!("gone")),
    ]);
    assert_eq!(node_ports(&service), [None, None]);
    assert_eq!(shown(&service.external_ips), ["192.0.2.1", "2001:db8::1"], "allowed for every type");
    assert_eq!((service.load_balancer_ips, service.source_ranges), (vec![], vec![]));
    assert_eq!(service.health_check_port, None);
}

#[test]
fn port_without_node_port_has_none() {
    let service = service(&[("/spec/ports/0/nodePort", json!(0)), ("/spec/ports/1/nodePort", json!(null))]);
    assert_eq!(node_ports(&service), [None, None]);
}

#[test]
fn ingress_with_ip_mode_proxy_is_ignored() {
    let ingress = json!([
        {"ip": "192.0.2.9", "ipMode": "Proxy"},
        {"ip": "192.0.2.10", "ipMode": "VIP"},
        {"hostname": "lb.example.com"},
        {"ip": "", "hostname": "lb.example.com"},
        {"ip": "192.0.2.11"},
    ]);
    let service = service(&[("/status/loadBalancer/ingress", ingress)]);
    assert_eq!(shown(&service.load_balancer_ips), ["192.0.2.10", "192.0.2.11"]);
}

#[test]
fn addresses_in_families_without_cluster_ip_are_ignored() {
    let service = service(&[("/spec/clusterIPs", json!(["10.96.0.1"]))]);
    assert_eq!(shown(&service.external_ips), ["192.0.2.1"]);
    assert_eq!(shown(&service.load_balancer_ips), ["192.0.2.9"]);
}

#[test]
fn source_ranges_are_trimmed_and_masked() {
    let ranges = json!([" 198.51.100.0/24", "203.0.113.7/24\t", "\n2001:db8::/32 ", "0.0.0.0/0"]);
    let service = service(&[("/spec/loadBalancerSourceRanges", ranges)]);
    assert_eq!(
        shown(&service.source_ranges),
        ["198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "0.0.0.0/0"]
    );
}

#[test]
fn policies_default_to_cluster() {
    for nothing in [json!(null), json!(""), json!("Cluster")] {
        let service = service(&[
            ("/spec/internalTrafficPolicy", nothing.clone()),
            ("/spec/externalTrafficPolicy", nothing),
        ]);
        let policies = (service.internal_policy, service.external_policy);
        assert_eq!(policies, (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
        assert_eq!(service.health_check_port, None, "health checks exist only for policy Local");
    }
    let service = service(&[("/spec/internalTrafficPolicy", json!("Local"))]);
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
}

#[test]
fn topology_hints_are_converted() {
    let hints = |given: Value| {
        let endpoints = json!([{"addresses": ["10.1.0.1"], "hints": given}]);
        let slice = changed(Kind::EndpointSlice, "/endpoints", endpoints);
        let Some(Object::EndpointSlice(mut slice)) = Kind::EndpointSlice.convert(slice).unwrap().object
        else {
            panic!("no slice")
        };
        slice.endpoints.remove(0).hints.map(|hints| *hints)
    };
    let names = |texts: &[&str]| texts.iter().map(|text| Name::from(*text)).collect();
    let both = json!({"forNodes": [{"name": "n1"}], "forZones": [{"name": "west"}, {"name": "east"}]});
    assert_eq!(hints(both), Some(Hints { nodes: names(&["n1"]), zones: names(&["west", "east"]) }));
    let zone = json!({"forZones": [{"name": "west"}]});
    assert_eq!(hints(zone), Some(Hints { nodes: names(&[]), zones: names(&["west"]) }));
    for nothing in [json!(null), json!({}), json!({"forNodes": [], "forZones": null})] {
        assert_eq!(hints(nothing), None);
    }
}
