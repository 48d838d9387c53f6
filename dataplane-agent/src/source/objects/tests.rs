//! Conversion of objects from `kubectl get -o yaml`, and every invalid field.

mod frontends;

use serde_json::json;

use super::*;
use crate::state::{
    Endpoint, EndpointPort, EndpointSlice as Slice, LoadBalancing, Node as PlainNode,
    Service as PlainService, ServicePort, TransportProtocol,
};

fn fixture(text: &str) -> Value {
    serde_json::to_value(serde_norway::from_str::<serde_norway::Value>(text).unwrap()).unwrap()
}

fn shop(name: &str) -> NamespacedName {
    NamespacedName::new("shop", name)
}

#[test]
fn node_from_kubectl_is_converted() {
    let converted = Kind::Node.convert(fixture(include_str!("../../../tests/fixtures/node.yaml"))).unwrap();
    assert_eq!(converted.problems, []);
    let node = PlainNode {
        name: "worker-1".to_owned(),
        owner: Owner { uid: "6f1f3b0a-7a0e-4bb0-b7c7-4f1a2a0d2f10".into() },
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()],
        internal_ips: vec!["172.18.0.3".parse().unwrap(), "fc00:f853:ccd:e793::3".parse().unwrap()],
        labels: [
            ("beta.kubernetes.io/arch", "amd64"),
            ("beta.kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
            ("kubernetes.io/hostname", "worker-1"),
            ("kubernetes.io/os", "linux"),
            ("node-role.kubernetes.io/control-plane", ""),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        taints: vec!["node-role.kubernetes.io/control-plane".to_owned()],
        deleting: false,
    };
    assert_eq!(converted.object, Some(Object::Node(node)));
}

#[test]
fn service_from_kubectl_is_converted() {
    let converted =
        Kind::Service.convert(fixture(include_str!("../../../tests/fixtures/service.yaml"))).unwrap();
    assert_eq!(converted.problems, []);
    let port =
        |name: &str, port, protocol| ServicePort { name: name.into(), port, protocol, node_port: None };
    let service = PlainService {
        name: shop("web"),
        owner: Owner { uid: "0c8d5b3e-6f3a-4c05-9dd9-1fd2b8f8b8c4".into() },
        cluster_ips: vec!["10.96.17.204".parse().unwrap(), "fd00:10:96::a1c".parse().unwrap()],
        ports: vec![port("http", 80, TransportProtocol::Tcp), port("dns", 53, TransportProtocol::Udp)],
        affinity_timeout: Some(10_800),
        load_balancing: Some(LoadBalancing::Maglev),
        forwarding: None,
        ..crate::state::Service::default()
    };
    assert_eq!(converted.object, Some(Object::Service(service)));
}

#[test]
fn endpoint_slice_from_kubectl_is_converted() {
    let list = fixture(include_str!("../../../tests/fixtures/endpointslices.yaml"));
    let converted = Kind::EndpointSlice.convert(list["items"][0].clone()).unwrap();
    assert_eq!(converted.problems, []);
    let endpoint = |address: &str, node: &str, ready, terminating| Endpoint {
        address: address.parse().unwrap(),
        ready,
        serving: true,
        terminating,
        node_name: Some(node.into()),
        hints: None,
    };
    let slice = Slice {
        name: shop("web-h5wqz"),
        owner: Owner { uid: "1b1f8f2a-98f4-4a59-8b51-2f2d2f8f4f05".into() },
        service: shop("web"),
        ports: vec![EndpointPort { name: "http".into(), port: 8080, protocol: TransportProtocol::Tcp }],
        endpoints: vec![
            endpoint("10.244.1.7", "worker-1", true, false),
            endpoint("10.244.2.9", "worker-2", false, true),
        ],
        trigger_time: None,
    };
    assert_eq!(converted.object, Some(Object::EndpointSlice(slice)));
    let empty = Kind::EndpointSlice.convert(list["items"][1].clone()).unwrap();
    assert!(matches!(empty.object, Some(Object::EndpointSlice(slice)) if slice.endpoints.is_empty()));
}

#[test]
fn only_first_address_of_endpoint_is_used() {
    let addresses = json!(["10.244.1.7", "10.244.1.8", "elsewhere"]);
    let slice = changed(Kind::EndpointSlice, "/endpoints/0/addresses", addresses);
    let Some(Object::EndpointSlice(slice)) = Kind::EndpointSlice.convert(slice).unwrap().object else {
        panic!("no slice")
    };
    assert_eq!(slice.endpoints[0].address.to_string(), "10.244.1.7");
}

#[test]
fn service_without_cluster_ip_is_unused() {
    for spec in [
        json!({"clusterIP": "None", "ports": [{"port": 80}]}),
        json!({"clusterIPs": ["None"]}),
        json!({"type": "ExternalName", "externalName": "example.com"}),
    ] {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": spec});
        assert_eq!(Kind::Service.convert(service.clone()), Ok(Converted::default()), "{service}");
    }
}

#[test]
fn objects_of_other_service_proxies_are_unused() {
    for kind in [Kind::Service, Kind::EndpointSlice] {
        for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
            let labels = json!({label: "", "kubernetes.io/service-name": "a"});
            assert_eq!(kind.convert(changed(kind, "/metadata/labels", labels)), Ok(Converted::default()));
        }
    }
}

#[test]
fn trigger_time_is_parsed() {
    let at = |text: &str| {
        let mut slice = changed(Kind::EndpointSlice, "/metadata/name", json!("a"));
        slice["metadata"]["annotations"]["endpoints.kubernetes.io/last-change-trigger-time"] = json!(text);
        let Some(Object::EndpointSlice(slice)) = Kind::EndpointSlice.convert(slice).unwrap().object else {
            panic!("no slice");
        };
        slice.trigger_time.map(|time| time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs())
    };
    assert_eq!(at("2026-03-02T10:01:12Z"), Some(1_772_445_672));
    assert_eq!(at("2026-03-02T10:01:12.5+01:00"), Some(1_772_442_072));
    assert_eq!(at("yesterday"), None);
}

#[test]
fn pod_is_converted_once_scheduled() {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "web", "namespace": "shop", "uid": "u", "deletionTimestamp": "2026-03-02T10:01:12Z",
            "labels": {"app": "web"},
            "annotations": {
                "dataplane.local/ipv4": "10.1.0.9", "kubernetes.io/egress-bandwidth": "1M", "other.io/x": "y",
            },
        },
        "spec": {"nodeName": "n1", "hostNetwork": true, "containers": [{"name": "c"}]},
        "status": {"phase": "Failed", "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd01::2"}]},
    });
    let Some(Object::Pod(read)) = Kind::Pod.convert(pod.clone()).unwrap().object else { panic!("no pod") };
    assert_eq!((read.name, read.node.as_str()), (shop("web"), "n1"));
    assert!(read.host_network && read.ended && read.deleting);
    assert_eq!(read.ips.len(), 2);
    assert_eq!(
        read.annotations.keys().collect::<Vec<_>>(),
        ["dataplane.local/ipv4", "kubernetes.io/egress-bandwidth"]
    );
    let mut pending = pod;
    pending["spec"]["nodeName"] = json!(null);
    assert_eq!(Kind::Pod.convert(pending), Ok(Converted::default()));
}

/// A valid object with one field changed.
fn changed(kind: Kind, pointer: &str, value: Value) -> Value {
    let metadata = json!({
        "name": "a", "annotations": {"dataplane.local/load-balancing": "random"},
        "labels": {"kubernetes.io/service-name": "a"},
    });
    let mut object = match kind {
        Kind::Node => json!({
            "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd01::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.16.0.1"}]},
        }),
        Kind::Service => json!({"spec": {
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd96::1"], "type": "LoadBalancer",
            "ports": [
                {"name": "a", "port": 80, "protocol": "TCP", "nodePort": 30080},
                {"name": "b", "port": 80, "protocol": "UDP", "nodePort": 30080},
            ],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}},
            "externalIPs": ["192.0.2.1", "2001:db8::1"], "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32_000,
        }, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}, {"ip": "2001:db8::9"}]}}}),
        Kind::EndpointSlice => json!({
            "addressType": "IPv4", "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}],
            "endpoints": [{"addresses": ["10.1.0.1"]}],
        }),
        Kind::Namespace => json!({}),
        Kind::ServiceCidr => json!({"spec": {"cidrs": ["10.96.0.0/16", "fd96::/108"]}}),
        Kind::Pod => json!({
            "spec": {"nodeName": "n1", "containers": []}, "status": {"podIPs": [{"ip": "10.1.0.2"}]},
        }),
    };
    object["apiVersion"] = json!(kind.api_version());
    object["kind"] = json!(kind.name());
    object["metadata"] = metadata;
    *object.pointer_mut(pointer).unwrap() = value;
    object
}

#[test]
fn invalid_field_is_named() {
    use Kind::{EndpointSlice, Node, Pod, Service, ServiceCidr};
    let name = json!("a");
    for kind in Kind::ALL {
        let valid = kind.convert(changed(kind, "/metadata/name", name.clone())).unwrap();
        assert!(valid.object.is_some() && valid.problems.is_empty(), "{valid:?}");
    }
    let cases = [
        (Node, "/metadata/name", json!("A b"), "metadata.name: \"A b\" is not a valid object name"),
        (Node, "/spec/podCIDRs/0", json!("10.1.0.1/24"), "spec.podCIDRs[0]: \"10.1.0.1/24\" has bits set"),
        (Node, "/spec/podCIDRs/0", json!("10.1.0.0/33"), "spec.podCIDRs[0]: \"10.1.0.0/33\" is not a CIDR"),
        (
            Node,
            "/spec/podCIDRs/0",
            json!("0.0.0.0/0"),
            "spec.podCIDRs[0]: \"0.0.0.0/0\" covers all addresses",
        ),
        (Node, "/spec/podCIDRs/0", json!("127.0.0.0/8"), "spec.podCIDRs[0]: \"127.0.0.0/8\" is a loopback"),
        (Node, "/spec/podCIDRs/1", json!("10.2.0.0/24"), "spec.podCIDRs: 2 of IPv4"),
        (
            Node,
            "/spec/podCIDRs/1",
            json!("::ffff:10.0.0.0/104"),
            "is an IPv4-mapped IPv6 address: did you mean 10.0.0.0?",
        ),
        (Node, "/spec/podCIDR", json!("10.9.0.0/24"), "spec.podCIDR: 10.9.0.0/24 is not spec.podCIDRs[0]"),
        (Node, "/status/addresses/0/address", json!("172.16.0"), "status.addresses[0].address: \"172.16.0\""),
        (Node, "/status/addresses/0/address", json!("169.254.0.1"), "is a link-local address"),
        (ServiceCidr, "/spec/cidrs/0", json!("10.96.0.0"), "spec.cidrs[0]: \"10.96.0.0\" is not a CIDR"),
        (ServiceCidr, "/spec/cidrs/1", json!("10.97.0.0/16"), "spec.cidrs: 2 of IPv4"),
        (Node, "/status/addresses", json!("x"), "status.addresses: invalid type: string"),
        (Service, "/spec/clusterIPs/0", json!("10.96.0.256"), "spec.clusterIP: \"10.96.0.1\" is not"),
        (
            Service,
            "/spec/clusterIPs/1",
            json!("fd96::g"),
            "spec.clusterIPs[1]: \"fd96::g\" is not an IP address",
        ),
        (Service, "/spec/clusterIPs/1", json!("::ffff:10.0.0.1"), "did you mean 10.0.0.1?"),
        (Service, "/spec/clusterIPs/1", json!("10.96.0.2"), "spec.clusterIPs: 2 of IPv4"),
        (Service, "/spec/clusterIPs/1", json!("ff02::1"), "spec.clusterIPs[1]: \"ff02::1\" is a multicast"),
        (Service, "/spec/type", json!("Cluster"), "spec.type: \"Cluster\" is not one of"),
        (Service, "/spec/ports", json!([]), "spec.ports: missing"),
        (Service, "/spec/ports/0/port", json!(0), "spec.ports[0].port: 0 is not a port"),
        (Service, "/spec/ports/1/port", json!(65_536), "spec.ports[1].port: 65536 is not a port"),
        (Service, "/spec/ports/1/port", json!("http"), "spec.ports[1].port: invalid type: string"),
        (Service, "/spec/ports/1/port", json!(99_999_999_999_u64), "spec.ports[1].port: invalid value"),
        (
            Service,
            "/spec/ports/1/name",
            json!("a"),
            "spec.ports[1].name: \"a\" is the name of an earlier port",
        ),
        (Service, "/spec/ports/1/name", json!(null), "spec.ports[1].name: missing"),
        (
            Service,
            "/spec/ports/1/protocol",
            json!("TCP"),
            "spec.ports[1].port: 80 is also an earlier port with the same",
        ),
        (Service, "/spec/ports/1/protocol", json!("tcp"), "spec.ports[1].protocol: \"tcp\" is not one of"),
        (Service, "/spec/sessionAffinity", json!("Cookie"), "spec.sessionAffinity: \"Cookie\" is not one of"),
        (
            Service,
            "/spec/sessionAffinityConfig/clientIP/timeoutSeconds",
            json!(0),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is not within 1 to 86400",
        ),
        (Service, "/spec/ports/0/nodePort", json!(65_536), "spec.ports[0].nodePort: 65536 is not a port"),
        (Service, "/spec/ports/1/nodePort", json!(-1), "spec.ports[1].nodePort: -1 is not a port"),
        (Service, "/spec/ports/1/nodePort", json!("a"), "spec.ports[1].nodePort: invalid type: string"),
        (Service, "/spec/externalIPs/1", json!("192.0.2"), "spec.externalIPs[1]: \"192.0.2\" is not an IP"),
        (
            Service,
            "/spec/externalIPs/0",
            json!("127.0.0.1"),
            "spec.externalIPs[0]: \"127.0.0.1\" is a loopback",
        ),
        (Service, "/spec/externalIPs/0", json!("0.0.0.0"), "spec.externalIPs[0]: \"0.0.0.0\" is the unspec"),
        (
            Service,
            "/status/loadBalancer/ingress/1/ip",
            json!("lb.example.com"),
            "status.loadBalancer.ingress[1].ip: \"lb.example.com\" is not an IP address",
        ),
        (
            Service,
            "/spec/loadBalancerSourceRanges/0",
            json!("198.51.100.0/33"),
            "spec.loadBalancerSourceRanges[0]: \"198.51.100.0/33\" is not a CIDR",
        ),
        (
            Service,
            "/spec/internalTrafficPolicy",
            json!("Node"),
            "spec.internalTrafficPolicy: \"Node\" is not one of Cluster, Local",
        ),
        (
            Service,
            "/spec/externalTrafficPolicy",
            json!("local"),
            "spec.externalTrafficPolicy: \"local\" is not one of Cluster, Local",
        ),
        (
            Service,
            "/spec/healthCheckNodePort",
            json!(70_000),
            "spec.healthCheckNodePort: 70000 is not a port",
        ),
        (Service, "/spec", json!(null), "spec: missing"),
        (Service, "/spec", json!({"ports": [{"port": 80}]}), "spec.clusterIP: missing"),
        (
            Service,
            "/metadata/annotations",
            json!({"dataplane.local/load-balancing": "best"}),
            "metadata.annotations[dataplane.local/load-balancing]: \"best\" is not one of random, maglev",
        ),
        (
            Service,
            "/metadata/annotations",
            json!({"dataplane.local/forwarding-mode": "hybrid"}),
            "metadata.annotations[dataplane.local/forwarding-mode]: \"hybrid\" is not one of snat, dsr",
        ),
        (
            Service,
            "/metadata/annotations",
            json!({"dataplane.local/forwarding-mode": "dsr", "dataplane.local/load-balancing": "random"}),
            "metadata.annotations[dataplane.local/forwarding-mode]: \"dsr\" cannot be combined with \
             dataplane.local/load-balancing: random",
        ),
        (Pod, "/status/podIPs/0/ip", json!("10.1"), "status.podIPs[0].ip: \"10.1\" is not an IP address"),
        (EndpointSlice, "/addressType", json!("IPX"), "addressType: \"IPX\" is not one of"),
        (EndpointSlice, "/addressType", json!("IPv6"), "endpoints[0].addresses[0]: \"10.1.0.1\" is not IPv6"),
        (EndpointSlice, "/endpoints/0/addresses", json!([]), "endpoints[0].addresses: missing"),
        (EndpointSlice, "/endpoints/0/addresses/0", json!("10.1.0.1.1"), "endpoints[0].addresses[0]: \"10"),
        (EndpointSlice, "/ports/1/port", json!(-1), "ports[1].port: -1 is not a port"),
        (EndpointSlice, "/ports/1/name", json!("a"), "ports[1].name: \"a\" is the name of an earlier port"),
        (
            EndpointSlice,
            "/metadata/labels",
            json!({}),
            "metadata.labels[kubernetes.io/service-name]: missing",
        ),
    ];
    for (kind, pointer, value, message) in cases {
        let error = kind.convert(changed(kind, pointer, value.clone())).unwrap_err().to_string();
        assert!(error.contains(message), "{pointer} = {value}: {error}");
    }
}

#[test]
fn sctp_ports_are_supported() {
    let service = changed(Kind::Service, "/spec/ports/1/protocol", json!("SCTP"));
    let Some(Object::Service(service)) = Kind::Service.convert(service).unwrap().object else {
        panic!("a Service")
    };
    assert_eq!(service.ports[1].protocol, TransportProtocol::Sctp);
    assert_eq!(
        service.ports[0].port, service.ports[1].port,
        "ports of different protocols may share a number"
    );

    let slice = changed(Kind::EndpointSlice, "/ports/1", json!({"name": "b", "protocol": "SCTP", "port": 9}));
    let Some(Object::EndpointSlice(slice)) = Kind::EndpointSlice.convert(slice).unwrap().object else {
        panic!("a slice")
    };
    assert_eq!((slice.ports[1].port, slice.ports[1].protocol), (9, TransportProtocol::Sctp));
}

#[test]
fn unsupported_parts_are_ignored_and_the_rest_applies() {
    let slice = changed(Kind::EndpointSlice, "/ports/1", json!({"name": "b", "protocol": "UDP"}));
    let converted = Kind::EndpointSlice.convert(slice).unwrap();
    assert!(matches!(&converted.object, Some(Object::EndpointSlice(slice)) if slice.ports.len() == 1));
    assert_eq!(converted.problems.len(), 1);

    let node = changed(Kind::Node, "/status/addresses", json!(null));
    let converted = Kind::Node.convert(node).unwrap();
    assert!(converted.object.is_some());
    assert!(converted.problems[0].to_string().starts_with("status.addresses: no InternalIP"));
}
