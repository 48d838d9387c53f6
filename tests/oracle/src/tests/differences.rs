//! What we mean to do otherwise.

use serde_json::json;

use super::{
    super::{Protocol, Rules, Verdict},
    At, HOST, NODE, NODE_IP, OTHER, OTHER_IP, OUTSIDE, POD, answered, ask_as, ask_over, both, endpoint, ip,
    service, slice,
};

const OURS: Rules = Rules::OURS;
const ALL: [&str; 2] = ["10.180.0.1:80", "10.180.1.1:80"];

#[test]
fn a_pod_is_seen_as_itself_wherever_it_asks_on_its_node() {
    let service = service(&json!({}));
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80"] {
        assert_eq!(ask_as(OURS, &service, &both(), POD, to), answered(&ALL, POD.1), "{to}");
    }
}

/// Backends of that node answer through it in any case; others must see it.
#[test]
fn at_another_nodes_node_port_a_pod_is_from_outside() {
    let service = service(&json!({}));
    let seen = [(ALL[0], OTHER_IP), (ALL[1], POD.1)].map(|(at, by)| (at.parse().expect("a socket"), ip(by)));
    assert_eq!(ask_as(OURS, &service, &both(), POD, "192.168.0.3:3001"), Verdict::Answered(seen.into()));
}

#[test]
fn a_pod_that_reaches_itself_sees_the_node_that_translates() {
    let service = service(&json!({}));
    let slices = [slice(&[endpoint("10.180.0.1", NODE)])];
    let itself = (At::Pod(NODE), "10.180.0.1");
    let seen = |rules, to| ask_as(rules, &service, &slices, itself, to);
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "1.2.3.4:80"] {
        assert_eq!(seen(OURS, to), answered(&["10.180.0.1:80"], NODE_IP), "{to}");
        // nothing leaves the pod
        assert_eq!(seen(Rules::OURS_AT_CONNECT, to), answered(&["10.180.0.1:80"], itself.1), "{to}");
    }
    for rules in [OURS, Rules::OURS_AT_CONNECT, Rules::KUBE_PROXY] {
        assert_eq!(seen(rules, "192.168.0.3:3001"), answered(&["10.180.0.1:80"], OTHER_IP));
    }
}

#[test]
fn the_outside_is_seen_as_itself_on_the_node_it_comes_through() {
    let service = service(&json!({}));
    let seen = |node: &str, near: &str| {
        let pairs =
            ALL.map(|at| (at.parse().expect("a socket"), ip(if at == near { OUTSIDE.1 } else { node })));
        Verdict::Answered(pairs.into())
    };
    for to in ["192.168.0.2:3001", "1.2.3.4:80", "50.60.70.81:80", "172.30.0.41:80"] {
        assert_eq!(ask_as(OURS, &service, &both(), OUTSIDE, to), seen(NODE_IP, ALL[0]), "{to}");
    }
    assert_eq!(ask_as(OURS, &service, &both(), OUTSIDE, "192.168.0.3:3001"), seen(OTHER_IP, ALL[1]));
    let there = (At::Outside { via: OTHER }, OUTSIDE.1);
    assert_eq!(ask_as(OURS, &service, &both(), there, "1.2.3.4:80"), seen(OTHER_IP, ALL[1]));
}

#[test]
fn a_host_process_is_seen_as_its_node() {
    let service = service(&json!({}));
    for to in ["172.30.0.41:80", "192.168.0.2:3001", "127.0.0.1:3001", "1.2.3.4:80"] {
        assert_eq!(ask_as(OURS, &service, &both(), HOST, to), answered(&ALL, NODE_IP), "{to}");
    }
}

/// Where we differ in sources we do not in verdicts.
#[test]
fn refusals_are_kube_proxys() {
    let service = service(&json!({"externalTrafficPolicy": "Local"}));
    let far = [slice(&[endpoint("10.180.1.1", OTHER)])];
    assert_eq!(ask_as(OURS, &service, &far, OUTSIDE, "1.2.3.4:80"), Verdict::Dropped);
    assert_eq!(ask_as(OURS, &service, &far, POD, "192.168.0.2:3001"), answered(&["10.180.1.1:80"], POD.1));
    let near = [slice(&[endpoint("10.180.0.1", NODE)])];
    assert_eq!(ask_as(OURS, &service, &near, POD, "192.168.0.3:3001"), Verdict::Dropped);
    assert_eq!(ask_as(OURS, &service, &[], POD, "192.168.0.3:3001"), Verdict::Rejected);
}

/// Its sockets cannot be translated: a pod sees its node in itself, and a host process does not come back to its own node.
#[test]
fn sctp_is_translated_packet_by_packet() {
    let (mut service, host) = (service(&json!({})), [slice(&[endpoint(NODE_IP, NODE)])]);
    service["spec"]["ports"][0]["protocol"] = json!("SCTP");
    let ask = |rules, slices: &[serde_json::Value], who, to| {
        let mut slices = slices.to_vec();
        for slice in &mut slices {
            slice["ports"][0]["protocol"] = json!("SCTP");
        }
        ask_over(Protocol::Sctp, rules, &service, &slices, who, to)
    };
    let own = [slice(&[endpoint("10.180.0.1", NODE)])];
    let itself = (At::Pod(NODE), "10.180.0.1");
    let at_node = answered(&["10.180.0.1:80"], NODE_IP);
    assert_eq!(ask(Rules::OURS_AT_CONNECT, &own, itself, "172.30.0.41:80"), at_node);
    for rules in [OURS, Rules::OURS_AT_CONNECT] {
        assert_eq!(ask(rules, &both(), HOST, "172.30.0.41:80"), answered(&ALL, NODE_IP));
        assert_eq!(ask(rules, &host, HOST, "172.30.0.41:80"), Verdict::Dropped);
        assert_eq!(ask(rules, &[], HOST, "172.30.0.41:80"), Verdict::Rejected);
        for slices in [&both()[..], &host, &[]] {
            assert_eq!(ask(rules, slices, HOST, "192.168.0.2:3001"), Verdict::LeftAlone);
        }
        // the other node translates, and sends it back
        assert_eq!(
            ask(rules, &host, HOST, "192.168.0.3:3001"),
            answered(&[&format!("{NODE_IP}:80")], OTHER_IP)
        );
        assert_eq!(ask(rules, &both(), POD, "192.168.0.2:3001"), answered(&ALL, POD.1));
    }
    let seen = answered(&[&format!("{NODE_IP}:80")], NODE_IP);
    for to in ["172.30.0.41:80", "192.168.0.2:3001"] {
        assert_eq!(ask(Rules::KUBE_PROXY, &host, HOST, to), seen);
    }
}
