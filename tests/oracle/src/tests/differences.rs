//! Intended differences from kube-proxy.

use serde_json::json;

use super::{
    super::{Protocol, Rules, Verdict},
    HOST, Location, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, both, delivered, endpoint, ip, service,
    slice, verdict_of, verdict_over,
};

const DATAPATH: Rules = Rules::DATAPATH;
const ALL: [&str; 2] = ["10.180.0.1:80", "10.180.1.1:80"];

#[test]
fn pod_keeps_its_source_at_frontends_of_its_node() {
    let service = service(&json!({}));
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80"] {
        assert_eq!(verdict_of(DATAPATH, &service, &both(), POD, to), delivered(&ALL, POD.1), "{to}");
    }
}

/// Replies of that node's backends pass it in any case; other backends must see it.
#[test]
fn pod_is_an_outside_client_at_another_nodes_node_port() {
    let service = service(&json!({}));
    let seen = [(ALL[0], OTHER_IP), (ALL[1], POD.1)].map(|(at, by)| (at.parse().expect("a socket"), ip(by)));
    assert_eq!(
        verdict_of(DATAPATH, &service, &both(), POD, "192.168.0.3:3001"),
        Verdict::Delivered(seen.into())
    );
}

#[test]
fn hairpin_connection_has_the_translating_node_as_source() {
    let service = service(&json!({}));
    let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
    let itself = (Location::Pod(NODE), "10.180.0.1");
    let seen = |rules, to| verdict_of(rules, &service, &slices, itself, to);
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80"] {
        assert_eq!(seen(DATAPATH, to), delivered(&["10.180.0.1:80"], NODE_IP), "{to}");
        // no packet leaves the pod
        assert_eq!(seen(Rules::DATAPATH_AT_CONNECT, to), delivered(&["10.180.0.1:80"], itself.1), "{to}");
    }
    for rules in [DATAPATH, Rules::DATAPATH_AT_CONNECT, Rules::KUBE_PROXY] {
        assert_eq!(seen(rules, "192.168.0.3:3001"), delivered(&["10.180.0.1:80"], OTHER_IP));
    }
}

#[test]
fn outside_client_keeps_its_source_on_the_node_it_comes_through() {
    let service = service(&json!({}));
    let seen = |node: &str, near: &str| {
        let pairs =
            ALL.map(|at| (at.parse().expect("a socket"), ip(if at == near { OUTSIDE.1 } else { node })));
        Verdict::Delivered(pairs.into())
    };
    for to in ["192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80", "172.30.0.41:80"] {
        assert_eq!(verdict_of(DATAPATH, &service, &both(), OUTSIDE, to), seen(NODE_IP, ALL[0]), "{to}");
    }
    assert_eq!(verdict_of(DATAPATH, &service, &both(), OUTSIDE, "192.168.0.3:3001"), seen(OTHER_IP, ALL[1]));
    let there = (Location::Outside { via: OTHER }, OUTSIDE.1);
    assert_eq!(verdict_of(DATAPATH, &service, &both(), there, "1.2.3.4:80"), seen(OTHER_IP, ALL[1]));
}

#[test]
fn host_process_has_its_node_address_as_source() {
    let service = service(&json!({}));
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "127.0.0.1:3001", "1.2.3.4:80"] {
        assert_eq!(verdict_of(DATAPATH, &service, &both(), HOST, to), delivered(&ALL, NODE_IP), "{to}");
    }
}

/// The rules differ in sources, not in verdicts.
#[test]
fn rejections_and_drops_are_those_of_kube_proxy() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let far = [slice(&[endpoint("10.180.1.1", OTHER)])];
    assert_eq!(verdict_of(DATAPATH, &service, &far, OUTSIDE, "1.2.3.4:80"), Verdict::Dropped);
    assert_eq!(
        verdict_of(DATAPATH, &service, &far, POD, "192.168.0.2:3001"),
        delivered(&["10.180.1.1:80"], POD.1)
    );
    let near = [slice(&[endpoint("10.180.0.1", NODE)])];
    assert_eq!(verdict_of(DATAPATH, &service, &near, POD, "192.168.0.3:3001"), Verdict::Dropped);
    assert_eq!(verdict_of(DATAPATH, &service, &[], POD, "192.168.0.3:3001"), Verdict::Rejected);
}

/// SCTP has no connect-time translation: a hairpin has the node as source, and host processes
/// cannot reach their node.
#[test]
fn sctp_is_translated_packet_by_packet() {
    let (mut service, host) = (service(&json!({})), [slice(&[endpoint(NODE_IP, NODE)])]);
    service["spec"]["ports"][0]["protocol"] = json!("SCTP");
    let verdict_for = |rules, slices: &[serde_json::Value], client, to| {
        let mut slices = slices.to_vec();
        for slice in &mut slices {
            slice["ports"][0]["protocol"] = json!("SCTP");
        }
        verdict_over(Protocol::Sctp, rules, &service, &slices, client, to)
    };
    let own = [slice(&[endpoint("10.180.0.1", NODE)])];
    let itself = (Location::Pod(NODE), "10.180.0.1");
    let at_node = delivered(&["10.180.0.1:80"], NODE_IP);
    assert_eq!(verdict_for(Rules::DATAPATH_AT_CONNECT, &own, itself, "172.30.0.41:80"), at_node);
    for rules in [DATAPATH, Rules::DATAPATH_AT_CONNECT] {
        assert_eq!(verdict_for(rules, &both(), HOST, "172.30.0.41:80"), delivered(&ALL, NODE_IP));
        assert_eq!(verdict_for(rules, &host, HOST, "172.30.0.41:80"), Verdict::Dropped);
        assert_eq!(verdict_for(rules, &[], HOST, "172.30.0.41:80"), Verdict::Rejected);
        for slices in [&both()[..], &host, &[]] {
            assert_eq!(verdict_for(rules, slices, HOST, "192.168.0.2:3001"), Verdict::NotTranslated);
        }
        // the other node translates and sends the packet back
        assert_eq!(
            verdict_for(rules, &host, HOST, "192.168.0.3:3001"),
            delivered(&[&format!("{NODE_IP}:80")], OTHER_IP)
        );
        assert_eq!(verdict_for(rules, &both(), POD, "192.168.0.2:3001"), delivered(&ALL, POD.1));
    }
    let seen = delivered(&[&format!("{NODE_IP}:80")], NODE_IP);
    for to in ["172.30.0.41:80", "192.168.0.2:3001"] {
        assert_eq!(verdict_for(Rules::KUBE_PROXY, &host, HOST, to), seen);
    }
}
