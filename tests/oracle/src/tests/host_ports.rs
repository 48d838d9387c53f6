//! Host ports, as the `portmap` plugin implements them.

use std::net::IpAddr;

use super::{
    super::{Destination, HostPort, Protocol, Rules, Verdict, at_host_ports},
    Client, HOST, Location, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, delivered, ip, topology,
};

const SERVER: &str = "10.180.0.1";

/// `SERVER` has, for all protocols: 8080 at all addresses, 8081 at the node's IPv4 address, 8082 at
/// 127.0.0.1.
fn verdict_of(rules: Rules, protocol: Protocol, client: (Location<'_>, &str), to: &str) -> Verdict {
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
    let destination = Destination { address: to.ip(), port: to.port(), protocol };
    let client = Client { location: client.0, address: ip(client.1) };
    at_host_ports(rules, &topology(), ports.as_flattened(), &client, &destination)
        .expect("a valid destination")
}

fn datapath(client: (Location<'_>, &str), to: &str) -> Verdict {
    verdict_of(Rules::DATAPATH, Protocol::Tcp, client, to)
}

/// "should validate that there is no conflict between pods with same hostPort but different hostIP
/// and protocol": a connection to the node reaches the pod, which sees the client's address.
#[test]
fn every_client_reaches_the_pod_and_keeps_its_source() {
    let there = (Location::Pod(OTHER), "10.0.1.2");
    let other = (Location::Host(OTHER), OTHER_IP);
    for client in [POD, HOST, OUTSIDE, there, other] {
        for to in ["192.168.0.2:8080", "192.168.0.2:8081"] {
            assert_eq!(datapath(client, to), delivered(&["10.180.0.1:80"], client.1), "{client:?} to {to}");
        }
    }
    let six = delivered(&["[fd00::1]:80"], "2001:db8::9");
    assert_eq!(datapath((Location::Outside { via: NODE }, "2001:db8::9"), "[2001:db8::2]:8080"), six);
}

#[test]
fn host_port_exists_only_at_its_address_and_node() {
    for client in [POD, HOST, OUTSIDE] {
        for to in ["192.168.0.3:8080", "192.168.0.2:8082", "192.168.0.2:80", "[2001:db8::2]:8081"] {
            assert_eq!(datapath(client, to), Verdict::NotTranslated, "{client:?} to {to}");
        }
    }
}

#[test]
fn loopback_is_for_host_processes_and_the_pod_sees_the_node() {
    for to in ["127.0.0.1:8080", "127.0.0.1:8082"] {
        assert_eq!(datapath((HOST.0, "127.0.0.1"), to), delivered(&["10.180.0.1:80"], NODE_IP), "{to}");
        assert_eq!(datapath(POD, to), Verdict::NotTranslated, "loopback of a pod: {to}");
        assert_eq!(
            datapath((Location::Host(OTHER), OTHER_IP), to),
            Verdict::NotTranslated,
            "loopback of another node: {to}"
        );
    }
    assert_eq!(datapath(HOST, "127.0.0.1:8081"), Verdict::NotTranslated);
    assert_eq!(datapath(HOST, "[::1]:8080"), delivered(&["[fd00::1]:80"], "2001:db8::2"));
    assert_eq!(datapath(HOST, "[::1]:8082"), Verdict::NotTranslated);
    assert_eq!(verdict_of(Rules::KUBE_PROXY, Protocol::Tcp, HOST, "[::1]:8080"), Verdict::NotTranslated);
}

#[test]
fn hairpin_has_the_node_as_source_without_connect_time_translation() {
    let (itself, to) = ((Location::Pod(NODE), SERVER), "192.168.0.2:8080");
    let (node, pod) = (delivered(&["10.180.0.1:80"], NODE_IP), delivered(&["10.180.0.1:80"], SERVER));
    for protocol in Protocol::ALL {
        assert_eq!(verdict_of(Rules::DATAPATH, protocol, itself, to), node);
        assert_eq!(verdict_of(Rules::KUBE_PROXY, protocol, itself, to), node);
        let at_connect = verdict_of(Rules::DATAPATH_AT_CONNECT, protocol, itself, to);
        assert_eq!(at_connect, if protocol == Protocol::Sctp { node.clone() } else { pod.clone() });
    }
}

/// Only from the host itself: packets of other clients arrive at a device.
#[test]
fn sctp_from_the_host_itself_is_not_translated() {
    for to in ["192.168.0.2:8080", "127.0.0.1:8080", "127.0.0.1:8082"] {
        assert_eq!(verdict_of(Rules::DATAPATH, Protocol::Sctp, HOST, to), Verdict::NotTranslated, "{to}");
    }
    for client in [POD, OUTSIDE, (Location::Host(OTHER), OTHER_IP)] {
        let seen = delivered(&["10.180.0.1:80"], client.1);
        assert_eq!(verdict_of(Rules::DATAPATH, Protocol::Sctp, client, "192.168.0.2:8080"), seen);
    }
    let portmaps = verdict_of(Rules::KUBE_PROXY, Protocol::Sctp, HOST, "192.168.0.2:8080");
    assert_eq!(portmaps, delivered(&["10.180.0.1:80"], NODE_IP));
}
