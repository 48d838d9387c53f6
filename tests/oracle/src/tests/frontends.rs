//! The frontends of a Service.

use serde_json::{Value, json};

use super::{
    super::{Client, Destination, Protocol, Rules, Verdict, verdict},
    HOST, Location, NODE, NODE_IP, OTHER, OUTSIDE, POD, both, delivered, endpoint, ip, kube_proxy, service,
    slice, topology,
};

/// "Reject traffic to invalid ports of `ClusterIP`s"; kube-proxy ignores other addresses.
#[test]
fn unknown_port_of_a_cluster_ip_is_rejected() {
    let service = service(&json!({}));
    for client in [POD, HOST, OUTSIDE] {
        assert_eq!(kube_proxy(&service, &both(), client, "172.30.0.41:81"), Verdict::Rejected);
        for to in ["1.2.3.4:81", "50.60.70.81:81", "192.168.0.2:81", "172.30.0.99:80"] {
            assert_eq!(kube_proxy(&service, &both(), client, to), Verdict::NoFrontend, "{client:?} to {to}");
        }
    }
}

/// `TestNodePorts`: only at addresses of nodes.
#[test]
fn node_ports() {
    let service = service(&json!({}));
    let all = ["10.180.0.1:80", "10.180.1.1:80"];
    assert_eq!(kube_proxy(&service, &both(), OUTSIDE, "192.168.0.3:3001"), delivered(&all, "192.168.0.3"));
    assert_eq!(kube_proxy(&service, &both(), POD, "127.0.0.1:3001"), Verdict::NoFrontend);
    assert_eq!(kube_proxy(&service, &both(), POD, "172.30.0.41:3001"), Verdict::Rejected);
    assert_eq!(kube_proxy(&service, &both(), POD, "1.2.3.4:3001"), Verdict::NoFrontend);
}

/// `TestNodePorts`, "IPv6, route-localnet": IPv6 has none.
#[test]
fn node_ports_on_localhost() {
    let service = service(&json!({
        "clusterIP": "fd00::41", "clusterIPs": ["fd00::41"], "ipFamilies": ["IPv6"],
    }));
    let client = (Location::Host(NODE), "::1");
    assert_eq!(kube_proxy(&service, &[], client, "[::1]:3001"), Verdict::NoFrontend);
    let destination = Destination { address: ip("127.0.0.1"), port: 3001, protocol: Protocol::Tcp };
    let client = Client { location: Location::Host(NODE), address: ip("127.0.0.1") };
    let mut topology = topology();
    topology.localhost_node_ports = false;
    let service = super::service(&json!({}));
    let verdict = verdict(Rules::KUBE_PROXY, &topology, &service, &both(), &client, &destination);
    assert_eq!(verdict.expect("valid objects"), Verdict::NoFrontend);
}

/// `TestBuildServiceMapServiceHeadless`, `TestBuildServiceMapServiceTypeExternalName`, and the two
/// labels: "should implement service.kubernetes.io/service-proxy-name", "… headless".
#[test]
fn services_that_are_not_proxied() {
    let headless = service(&json!({"clusterIP": "None", "clusterIPs": ["None"]}));
    let name = service(&json!({"type": "ExternalName", "externalName": "example.org"}));
    let mut all = vec![headless, name];
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let mut labelled = service(&json!({}));
        labelled["metadata"]["labels"] = json!({label: "other"});
        all.push(labelled);
    }
    for service in all {
        for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80", "172.30.0.41:81"] {
            assert_eq!(kube_proxy(&service, &both(), POD, to), Verdict::NoFrontend, "{service} at {to}");
        }
    }
}

/// `TestLoadBalancerIngressRouteTypeProxy`.
#[test]
fn load_balancer_ingress_route_type_proxy() {
    let mut service = service(&json!({}));
    let all = delivered(&["10.180.0.1:80", "10.180.1.1:80"], NODE_IP);
    for (mode, expected) in [("Proxy", Verdict::NoFrontend), ("VIP", all)] {
        service["status"]["loadBalancer"]["ingress"] = json!([{"ip": "1.2.3.4", "ipMode": mode}]);
        assert_eq!(kube_proxy(&service, &both(), OUTSIDE, "1.2.3.4:80"), expected, "{mode}");
    }
    service["status"]["loadBalancer"]["ingress"] = json!([{"hostname": "balancer.example.org"}]);
    assert_eq!(kube_proxy(&service, &both(), OUTSIDE, "1.2.3.4:80"), Verdict::NoFrontend);
}

/// `TestLoadBalancer`: ranges with blanks; they apply only to load balancer IPs, and to all
/// clients.
#[test]
fn load_balancer_source_ranges() {
    let mut service = service(&json!({"loadBalancerSourceRanges": [" 192.168.0.0/24", "203.0.113.0/25 "]}));
    service["status"]["loadBalancer"]["ingress"] = json!([{"ip": "1.2.3.4"}, {"ip": "5.6.7.8"}]);
    let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
    let here = |source| delivered(&["10.180.0.1:80"], source);
    let blocked = (Location::Outside { via: NODE }, "203.0.113.130");
    assert_eq!(kube_proxy(&service, &slices, POD, "172.30.0.41:80"), here(POD.1));
    assert_eq!(kube_proxy(&service, &slices, blocked, "192.168.0.2:3001"), here(NODE_IP));
    assert_eq!(kube_proxy(&service, &slices, blocked, "50.60.70.81:80"), here(NODE_IP));
    for vip in ["1.2.3.4", "5.6.7.8"] {
        let to = format!("{vip}:80");
        assert_eq!(kube_proxy(&service, &slices, OUTSIDE, &to), here(NODE_IP));
        assert_eq!(kube_proxy(&service, &slices, blocked, &to), Verdict::Dropped);
        // "should only allow access from service loadbalancer source ranges": its clients are pods
        assert_eq!(kube_proxy(&service, &slices, POD, &to), Verdict::Dropped);
        assert_eq!(kube_proxy(&service, &slices, HOST, &to), here(NODE_IP));
        // the load balancer IP on the node itself
        assert_eq!(kube_proxy(&service, &slices, (Location::Host(NODE), vip), &to), here(NODE_IP));
    }
}

/// `TestServiceToServiceMap`, "LoadBalancerSourceRanges": a family without ranges admits all
/// clients.
#[test]
fn source_ranges_of_another_family_do_not_apply() {
    for range in ["0.0.0.0/0", "2001:db8::/32"] {
        let service = service(&json!({"loadBalancerSourceRanges": [range]}));
        let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
        assert_eq!(
            kube_proxy(&service, &slices, OUTSIDE, "1.2.3.4:80"),
            delivered(&["10.180.0.1:80"], NODE_IP)
        );
    }
}

/// "should serve endpoints on same port and different protocols"; "should allow creating a basic
/// SCTP service".
#[test]
fn same_port_and_different_protocols() {
    let port = |protocol: Protocol| json!({"name": protocol.name(), "port": 80, "protocol": protocol.name()});
    let service = service(&json!({"ports": [port(Protocol::Tcp), port(Protocol::Sctp)]}));
    let mut slice = slice(&[endpoint("10.180.0.1", NODE)]);
    slice["ports"] = json!([
        {"name": "TCP", "port": 8080, "protocol": "TCP"},
        {"name": "SCTP", "port": 9090, "protocol": "SCTP"},
        {"name": "SCTP", "port": 7070, "protocol": "UDP"},
    ]);
    let kube_proxy = |protocol| {
        let destination = Destination { address: ip("172.30.0.41"), port: 80, protocol };
        let client = Client { location: POD.0, address: ip(POD.1) };
        let slices = std::slice::from_ref(&slice);
        verdict(Rules::KUBE_PROXY, &topology(), &service, slices, &client, &destination)
            .expect("valid objects")
    };
    assert_eq!(kube_proxy(Protocol::Tcp), delivered(&["10.180.0.1:8080"], POD.1));
    assert_eq!(kube_proxy(Protocol::Sctp), delivered(&["10.180.0.1:9090"], POD.1));
    assert_eq!(kube_proxy(Protocol::Udp), Verdict::Rejected);
}

/// `TestServiceToServiceMap`, cases of two families: families follow the order of the addresses.
#[test]
fn families_are_filtered() {
    let six = |more: Value| {
        let mut spec = json!({
            "clusterIPs": ["fd00::41", "172.30.0.41"], "clusterIP": "fd00::41", "ipFamilies": ["IPv6", "IPv4"],
        });
        super::merge(&mut spec, &more);
        service(&spec)
    };
    let mut slices = both();
    slices.push(slice(&[endpoint("fd01::1", OTHER)]));
    slices[1]["addressType"] = json!("IPv6");
    let pod = (Location::Pod(NODE), "fd01::2");
    let dual = six(json!({}));
    assert_eq!(kube_proxy(&dual, &slices, pod, "[fd00::41]:80"), delivered(&["[fd01::1]:80"], pod.1));
    assert_eq!(
        kube_proxy(&dual, &slices, POD, "172.30.0.41:80"),
        delivered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1)
    );
    assert_eq!(
        kube_proxy(&dual, &slices, pod, "[2001:db8::2]:3001"),
        delivered(&["[fd01::1]:80"], "2001:db8::2")
    );
    // a single-stack Service has a node port of its family only
    let single = six(json!({"clusterIPs": ["fd00::41"], "ipFamilies": ["IPv6"]}));
    assert_eq!(kube_proxy(&single, &slices, POD, "192.168.0.2:3001"), Verdict::NoFrontend);
    assert_eq!(kube_proxy(&single, &slices, POD, "1.2.3.4:80"), Verdict::NoFrontend);
}
