//! Where a Service is and who may ask there: the fields beside its cluster IPs, by type.

use serde_json::json;

use super::*;
use crate::state::{Hints, Name, TrafficPolicy};

/// A Service of type `LoadBalancer` with every field set, these changed.
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
fn a_load_balancer_has_every_frontend() {
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
fn a_node_port_service_has_no_address_of_a_load_balancer() {
    let service = service(&[("/spec/type", json!("NodePort"))]);
    assert_eq!(node_ports(&service), [Some(30_080), Some(30_080)]);
    assert_eq!(service.external_ips.len(), 2);
    assert_eq!((service.load_balancer_ips, service.source_ranges), (vec![], vec![]));
    assert_eq!(service.health_check_port, None);
}

#[test]
fn what_is_left_of_an_earlier_type_is_ignored() {
    // a Service that was a LoadBalancer keeps its status, and may keep numbers, even impossible ones
    let service = service(&[
        ("/spec/type", json!("ClusterIP")),
        ("/spec/ports/1/nodePort", json!(99_999)),
        ("/spec/healthCheckNodePort", json!(-1)),
        ("/spec/loadBalancerSourceRanges", json!(["everyone"])),
        ("/status/loadBalancer/ingress/0/ip", json!("gone")),
    ]);
    assert_eq!(node_ports(&service), [None, None]);
    assert_eq!(shown(&service.external_ips), ["192.0.2.1", "2001:db8::1"], "every type can have them");
    assert_eq!((service.load_balancer_ips, service.source_ranges), (vec![], vec![]));
    assert_eq!(service.health_check_port, None);
}

#[test]
fn a_port_that_was_not_given_a_node_port_has_none() {
    let service = service(&[("/spec/ports/0/nodePort", json!(0)), ("/spec/ports/1/nodePort", json!(null))]);
    assert_eq!(node_ports(&service), [None, None]);
}

#[test]
fn an_ingress_that_wants_to_see_the_packets_is_left_to_the_balancer() {
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
fn addresses_of_a_family_the_service_does_not_have_are_left_out() {
    let service = service(&[("/spec/clusterIPs", json!(["10.96.0.1"]))]);
    assert_eq!(shown(&service.external_ips), ["192.0.2.1"]);
    assert_eq!(shown(&service.load_balancer_ips), ["192.0.2.9"]);
}

#[test]
fn source_ranges_are_networks_whatever_surrounds_them() {
    let ranges = json!([" 198.51.100.0/24", "203.0.113.7/24\t", "\n2001:db8::/32 ", "0.0.0.0/0"]);
    let service = service(&[("/spec/loadBalancerSourceRanges", ranges)]);
    assert_eq!(
        shown(&service.source_ranges),
        ["198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "0.0.0.0/0"]
    );
}

#[test]
fn policies_are_cluster_where_nobody_says_local() {
    for nothing in [json!(null), json!(""), json!("Cluster")] {
        let service = service(&[
            ("/spec/internalTrafficPolicy", nothing.clone()),
            ("/spec/externalTrafficPolicy", nothing),
        ]);
        let policies = (service.internal_policy, service.external_policy);
        assert_eq!(policies, (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
        assert_eq!(service.health_check_port, None, "only who prefers local endpoints is asked for them");
    }
    let service = service(&[("/spec/internalTrafficPolicy", json!("Local"))]);
    assert_eq!(service.internal_policy, TrafficPolicy::Local);
}

#[test]
fn an_endpoint_says_for_whom_it_is() {
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
