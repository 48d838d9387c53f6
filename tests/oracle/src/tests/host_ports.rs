//! Ports of a node that are a pod's, by the words of the `portmap` plugin.

use std::net::IpAddr;

use super::{
    super::{HostPort, Protocol, Question, Rules, Verdict, at_host_ports},
    At, Client, HOST, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, answered, ip, world,
};

const SERVER: &str = "10.180.0.1";

/// Of the pod `SERVER`, over all protocols: 8080 everywhere, 8081 at the node's IPv4 address, 8082 at 127.0.0.1.
fn ask_as(rules: Rules, protocol: Protocol, who: (At<'_>, &str), to: &str) -> Verdict {
    let pod: [IpAddr; 2] = [ip(SERVER), ip("fd00::1")];
    let of = |number, host_ip: Option<&str>, protocol| HostPort {
        node: NODE,
        host_ip: host_ip.map(ip),
        number,
        protocol,
        target: 80,
        pod: &pod,
    };
    let ports = Protocol::ALL.map(|protocol| {
        [of(8080, None, protocol), of(8081, Some(NODE_IP), protocol), of(8082, Some("127.0.0.1"), protocol)]
    });
    let to: std::net::SocketAddr = to.parse().expect("an address and port");
    let question = Question { address: to.ip(), port: to.port(), protocol };
    let client = Client { at: who.0, address: ip(who.1) };
    at_host_ports(rules, &world(), ports.as_flattened(), &client, &question).expect("a sound question")
}

fn ask(who: (At<'_>, &str), to: &str) -> Verdict {
    ask_as(Rules::OURS, Protocol::Tcp, who, to)
}

/// "should validate that there is no conflict between pods with same hostPort but different hostIP and protocol": what is
/// asked at the node reaches the pod, which sees who asks.
#[test]
fn everybody_is_led_to_the_pod_and_seen_as_who_he_is() {
    let there = (At::Pod(OTHER), "10.0.1.2");
    let other = (At::Host(OTHER), OTHER_IP);
    for who in [POD, HOST, OUTSIDE, there, other] {
        for to in ["192.168.0.2:8080", "192.168.0.2:8081"] {
            assert_eq!(ask(who, to), answered(&["10.180.0.1:80"], who.1), "{who:?} to {to}");
        }
    }
    let six = answered(&["[fd00::1]:80"], "2001:db8::9");
    assert_eq!(ask((At::Outside { via: NODE }, "2001:db8::9"), "[2001:db8::2]:8080"), six);
}

#[test]
fn a_port_is_where_its_address_and_its_pod_are() {
    for who in [POD, HOST, OUTSIDE] {
        for to in ["192.168.0.3:8080", "192.168.0.2:8082", "192.168.0.2:80", "[2001:db8::2]:8081"] {
            assert_eq!(ask(who, to), Verdict::LeftAlone, "{who:?} to {to}");
        }
    }
}

#[test]
fn loopback_is_the_hosts_and_seen_as_the_node() {
    for to in ["127.0.0.1:8080", "127.0.0.1:8082"] {
        assert_eq!(ask((HOST.0, "127.0.0.1"), to), answered(&["10.180.0.1:80"], NODE_IP), "{to}");
        assert_eq!(ask(POD, to), Verdict::LeftAlone, "a pod's own: {to}");
        assert_eq!(ask((At::Host(OTHER), OTHER_IP), to), Verdict::LeftAlone, "another node's: {to}");
    }
    assert_eq!(ask(HOST, "127.0.0.1:8081"), Verdict::LeftAlone);
    assert_eq!(ask(HOST, "[::1]:8080"), answered(&["[fd00::1]:80"], "2001:db8::2"));
    assert_eq!(ask(HOST, "[::1]:8082"), Verdict::LeftAlone);
    assert_eq!(ask_as(Rules::KUBE_PROXY, Protocol::Tcp, HOST, "[::1]:8080"), Verdict::LeftAlone);
}

#[test]
fn the_pod_itself_sees_its_node_unless_nothing_leaves_it() {
    let (itself, to) = ((At::Pod(NODE), SERVER), "192.168.0.2:8080");
    let (node, pod) = (answered(&["10.180.0.1:80"], NODE_IP), answered(&["10.180.0.1:80"], SERVER));
    for protocol in Protocol::ALL {
        assert_eq!(ask_as(Rules::OURS, protocol, itself, to), node);
        assert_eq!(ask_as(Rules::KUBE_PROXY, protocol, itself, to), node);
        let at_connect = ask_as(Rules::OURS_AT_CONNECT, protocol, itself, to);
        assert_eq!(at_connect, if protocol == Protocol::Sctp { node.clone() } else { pod.clone() });
    }
}

/// By the host itself alone: whoever else asks has packets that come by a device.
#[test]
fn sctp_of_the_host_itself_is_left_alone() {
    for to in ["192.168.0.2:8080", "127.0.0.1:8080", "127.0.0.1:8082"] {
        assert_eq!(ask_as(Rules::OURS, Protocol::Sctp, HOST, to), Verdict::LeftAlone, "{to}");
    }
    for who in [POD, OUTSIDE, (At::Host(OTHER), OTHER_IP)] {
        let seen = answered(&["10.180.0.1:80"], who.1);
        assert_eq!(ask_as(Rules::OURS, Protocol::Sctp, who, "192.168.0.2:8080"), seen);
    }
    let portmaps = ask_as(Rules::KUBE_PROXY, Protocol::Sctp, HOST, "192.168.0.2:8080");
    assert_eq!(portmaps, answered(&["10.180.0.1:80"], NODE_IP));
}
