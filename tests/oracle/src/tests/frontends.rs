//! Which addresses and ports are a service's at all.

use serde_json::{Value, json};

use super::{
    super::{Client, Protocol, Question, Rules, Verdict, answer},
    At, HOST, NODE, NODE_IP, OTHER, OUTSIDE, POD, answered, ask, both, endpoint, ip, service, slice, world,
};

/// "Reject traffic to invalid ports of `ClusterIP`s"; of other addresses kube-proxy knows nothing.
#[test]
fn unknown_port_of_a_cluster_ip_is_rejected() {
    let service = service(&json!({}));
    for who in [POD, HOST, OUTSIDE] {
        assert_eq!(ask(&service, &both(), who, "172.30.0.41:81"), Verdict::Rejected);
        for to in ["1.2.3.4:81", "50.60.70.81:81", "192.168.0.2:81", "172.30.0.99:80"] {
            assert_eq!(ask(&service, &both(), who, to), Verdict::NotOurs, "{who:?} to {to}");
        }
    }
}

/// `TestNodePorts`: at addresses of nodes, and nowhere else.
#[test]
fn node_ports() {
    let service = service(&json!({}));
    let all = ["10.180.0.1:80", "10.180.1.1:80"];
    assert_eq!(ask(&service, &both(), OUTSIDE, "192.168.0.3:3001"), answered(&all, "192.168.0.3"));
    assert_eq!(ask(&service, &both(), POD, "127.0.0.1:3001"), Verdict::NotOurs);
    assert_eq!(ask(&service, &both(), POD, "172.30.0.41:3001"), Verdict::Rejected);
    assert_eq!(ask(&service, &both(), POD, "1.2.3.4:3001"), Verdict::NotOurs);
}

/// `TestNodePorts`, "IPv6, route-localnet": there is no such thing there.
#[test]
fn node_ports_on_localhost() {
    let service = service(&json!({
        "clusterIP": "fd00::41", "clusterIPs": ["fd00::41"], "ipFamilies": ["IPv6"],
    }));
    let who = (At::Host(NODE), "::1");
    assert_eq!(ask(&service, &[], who, "[::1]:3001"), Verdict::NotOurs);
    let question = Question { address: ip("127.0.0.1"), port: 3001, protocol: Protocol::Tcp };
    let client = Client { at: At::Host(NODE), address: ip("127.0.0.1") };
    let mut world = world();
    world.localhost_node_ports = false;
    let service = super::service(&json!({}));
    let verdict = answer(Rules::KUBE_PROXY, &world, &service, &both(), &client, &question);
    assert_eq!(verdict.expect("sound objects"), Verdict::NotOurs);
}

/// `TestBuildServiceMapServiceHeadless`, `TestBuildServiceMapServiceTypeExternalName`, and the two labels: "should implement
/// service.kubernetes.io/service-proxy-name", "… headless".
#[test]
fn services_that_are_not_proxied() {
    let headless = service(&json!({"clusterIP": "None", "clusterIPs": ["None"]}));
    let name = service(&json!({"type": "ExternalName", "externalName": "example.org"}));
    let mut all = vec![headless, name];
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let mut labelled = service(&json!({}));
        labelled["metadata"]["labels"] = json!({label: "somebody"});
        all.push(labelled);
    }
    for service in all {
        for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80", "172.30.0.41:81"] {
            assert_eq!(ask(&service, &both(), POD, to), Verdict::NotOurs, "{service} at {to}");
        }
    }
}

/// `TestLoadBalancerIngressRouteTypeProxy`.
#[test]
fn load_balancer_ingress_route_type_proxy() {
    let mut service = service(&json!({}));
    let all = answered(&["10.180.0.1:80", "10.180.1.1:80"], NODE_IP);
    for (mode, expected) in [("Proxy", Verdict::NotOurs), ("VIP", all)] {
        service["status"]["loadBalancer"]["ingress"] = json!([{"ip": "1.2.3.4", "ipMode": mode}]);
        assert_eq!(ask(&service, &both(), OUTSIDE, "1.2.3.4:80"), expected, "{mode}");
    }
    service["status"]["loadBalancer"]["ingress"] = json!([{"hostname": "balancer.example.org"}]);
    assert_eq!(ask(&service, &both(), OUTSIDE, "1.2.3.4:80"), Verdict::NotOurs);
}

/// `TestLoadBalancer`: ranges with blanks, for balancers alone, for everybody.
#[test]
fn load_balancer_source_ranges() {
    let mut service = service(&json!({"loadBalancerSourceRanges": [" 192.168.0.0/24", "203.0.113.0/25 "]}));
    service["status"]["loadBalancer"]["ingress"] = json!([{"ip": "1.2.3.4"}, {"ip": "5.6.7.8"}]);
    let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
    let here = |source| answered(&["10.180.0.1:80"], source);
    let blocked = (At::Outside { via: NODE }, "203.0.113.130");
    assert_eq!(ask(&service, &slices, POD, "172.30.0.41:80"), here(POD.1));
    assert_eq!(ask(&service, &slices, blocked, "192.168.0.2:3001"), here(NODE_IP));
    assert_eq!(ask(&service, &slices, blocked, "50.60.70.81:80"), here(NODE_IP));
    for vip in ["1.2.3.4", "5.6.7.8"] {
        let to = format!("{vip}:80");
        assert_eq!(ask(&service, &slices, OUTSIDE, &to), here(NODE_IP));
        assert_eq!(ask(&service, &slices, blocked, &to), Verdict::Dropped);
        // "should only allow access from service loadbalancer source ranges": its clients are pods
        assert_eq!(ask(&service, &slices, POD, &to), Verdict::Dropped);
        assert_eq!(ask(&service, &slices, HOST, &to), here(NODE_IP));
        // the balancer's address on the node itself
        assert_eq!(ask(&service, &slices, (At::Host(NODE), vip), &to), here(NODE_IP));
    }
}

/// `TestServiceToServiceMap`, "LoadBalancerSourceRanges": each family has its own, and none of a family is all of it.
#[test]
fn source_ranges_of_another_family_close_nothing() {
    for range in ["0.0.0.0/0", "2001:db8::/32"] {
        let service = service(&json!({"loadBalancerSourceRanges": [range]}));
        let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
        assert_eq!(ask(&service, &slices, OUTSIDE, "1.2.3.4:80"), answered(&["10.180.0.1:80"], NODE_IP));
    }
}

/// "should serve endpoints on same port and different protocols"; "should allow creating a basic SCTP service".
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
    let ask = |protocol| {
        let question = Question { address: ip("172.30.0.41"), port: 80, protocol };
        let client = Client { at: POD.0, address: ip(POD.1) };
        let slices = std::slice::from_ref(&slice);
        answer(Rules::KUBE_PROXY, &world(), &service, slices, &client, &question).expect("sound objects")
    };
    assert_eq!(ask(Protocol::Tcp), answered(&["10.180.0.1:8080"], POD.1));
    assert_eq!(ask(Protocol::Sctp), answered(&["10.180.0.1:9090"], POD.1));
    assert_eq!(ask(Protocol::Udp), Verdict::Rejected);
}

/// `TestServiceToServiceMap`, its cases of two families: a service is of those it has addresses of, in their order.
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
    let pod = (At::Pod(NODE), "fd01::2");
    let dual = six(json!({}));
    assert_eq!(ask(&dual, &slices, pod, "[fd00::41]:80"), answered(&["[fd01::1]:80"], pod.1));
    assert_eq!(
        ask(&dual, &slices, POD, "172.30.0.41:80"),
        answered(&["10.180.0.1:80", "10.180.1.1:80"], POD.1)
    );
    assert_eq!(ask(&dual, &slices, pod, "[2001:db8::2]:3001"), answered(&["[fd01::1]:80"], "2001:db8::2"));
    // of one family alone: also its NodePort is
    let single = six(json!({"clusterIPs": ["fd00::41"], "ipFamilies": ["IPv6"]}));
    assert_eq!(ask(&single, &slices, POD, "192.168.0.2:3001"), Verdict::NotOurs);
    assert_eq!(ask(&single, &slices, POD, "1.2.3.4:80"), Verdict::NotOurs);
}
