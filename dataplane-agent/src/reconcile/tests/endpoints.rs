//! Entries of `ENDPOINTS`, and their flow hints.

use dataplane_cni::protocol::{PortMapping, PortProtocol};
use dataplane_common::abi::FlowHints;

use super::*;
use crate::reconcile::EndpointError;

fn entry(fixture: &Fixture, ip: &str) -> Option<Endpoint> {
    let addr: std::net::IpAddr = ip.parse().unwrap();
    fixture.endpoints.get(&addr.into()).unwrap()
}

fn host(fixture: &mut Fixture, ips: &[&str]) {
    fixture.reconciler.set_host_addresses(
        ips.iter().map(|ip| ip.parse().unwrap()),
        &fixture.store,
        fixture.now,
    );
    fixture.settle();
}

#[test]
fn pod_entry_is_written_before_call_returns() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    let endpoint = entry(&fixture, "10.1.0.2").unwrap();
    assert_eq!((endpoint.ifindex, endpoint.flow_hints), (7, FlowHints::NONE));
    fixture.reconciler.remove_pod("c1", fixture.now).unwrap();
    assert_eq!(entry(&fixture, "10.1.0.2"), None);
}

#[test]
fn overwritten_entry_gets_all_flow_hints() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 8), fixture.now).unwrap();
    let endpoint = entry(&fixture, "10.1.0.2").unwrap();
    assert_eq!((endpoint.ifindex, endpoint.flow_hints), (8, FlowHints::ALL));
}

#[test]
fn flow_hints_set_by_datapath_are_kept() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    let mut endpoint = entry(&fixture, "10.1.0.2").unwrap();
    endpoint.flow_hints.tcp = 1;
    let addr: std::net::IpAddr = "10.1.0.2".parse().unwrap();
    fixture.endpoints.insert(&addr.into(), &endpoint).unwrap();
    fixture.restart();
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    fixture.reconciler.pods_loaded();
    fixture.settle();
    assert_eq!(entry(&fixture, "10.1.0.2"), Some(endpoint));
    assert_eq!(fixture.reconciler.changes(), 0);
    assert_eq!(fixture.reconciler.endpoints().unwrap()[0].flow_hints, ["tcp"]);
}

#[test]
fn device_that_is_down_is_flagged_and_keeps_its_flow_hints() {
    let mut fixture = Fixture::new(LARGE);
    for (id, ip, ifindex) in [("c1", "10.1.0.2", 7), ("c2", "10.1.0.3", 8)] {
        fixture.reconciler.upsert_pod(id, &pod(id, ip, ifindex), fixture.now).unwrap();
    }
    let up = entry(&fixture, "10.1.0.3");
    fixture.reconciler.set_down_pods(&[7].into(), fixture.now);
    let down = entry(&fixture, "10.1.0.2").unwrap();
    assert_eq!((down.is_down(), down.flow_hints), (true, FlowHints::ALL));
    assert_eq!(entry(&fixture, "10.1.0.3"), up);
    fixture.reconciler.check_pod("c1").unwrap();

    let writes = fixture.reconciler.changes();
    fixture.reconciler.set_down_pods(&[7].into(), fixture.now);
    assert_eq!(fixture.reconciler.changes(), writes);
    fixture.reconciler.set_down_pods(&[].into(), fixture.now);
    let up_again = entry(&fixture, "10.1.0.2").unwrap();
    assert_eq!((up_again.is_down(), up_again.flow_hints), (false, FlowHints::ALL));
}

#[test]
fn readded_host_address_gets_all_flow_hints() {
    let mut fixture = Fixture::new(LARGE);
    host(&mut fixture, &["192.168.1.1"]);
    assert_eq!(entry(&fixture, "192.168.1.1").unwrap().flow_hints, FlowHints::NONE);
    host(&mut fixture, &[]);
    assert_eq!(entry(&fixture, "192.168.1.1"), None);
    host(&mut fixture, &["192.168.1.1"]);
    assert_eq!(entry(&fixture, "192.168.1.1").unwrap().flow_hints, FlowHints::ALL);
}

#[test]
fn late_removal_of_pod_keeps_entry_of_its_successor() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.upsert_pod("old", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    fixture.reconciler.upsert_pod("new", &pod("web", "10.1.0.2", 8), fixture.now).unwrap();
    fixture.reconciler.remove_pod("old", fixture.now).unwrap();
    assert_eq!(entry(&fixture, "10.1.0.2").unwrap().ifindex, 8);
}

#[test]
fn pod_with_host_address_is_rejected() {
    let mut fixture = Fixture::new(LARGE);
    host(&mut fixture, &["192.168.1.1"]);
    let refused = fixture.reconciler.upsert_pod("c1", &pod("web", "192.168.1.1", 7), fixture.now);
    assert!(matches!(refused, Err(EndpointError::HostAddress(_))), "{refused:?}");
    assert!(entry(&fixture, "192.168.1.1").unwrap().is_host());
}

#[test]
fn failed_write_is_returned_to_cni_and_retried() {
    let mut fixture = Fixture::new(LARGE);
    fixture.faults.fail([0]);
    let failed = fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now);
    assert!(matches!(failed, Err(EndpointError::Table { .. })), "{failed:?}");
    assert_eq!(fixture.reconciler.problems()[0].subject, "endpoint 10.1.0.2");
    fixture.settle();
    assert!(entry(&fixture, "10.1.0.2").is_some());
    assert_eq!(fixture.reconciler.statistics().retries, 1);
}

#[test]
fn stale_pod_entries_are_removed_after_pods_are_loaded() {
    let mut fixture = Fixture::new(LARGE);
    for (id, ip) in [("c1", "10.1.0.2"), ("c2", "10.1.0.3")] {
        fixture.reconciler.upsert_pod(id, &pod(id, ip, 7), fixture.now).unwrap();
    }
    host(&mut fixture, &["192.168.1.1"]);
    fixture.restart();
    fixture.reconciler.upsert_pod("c2", &pod("c2", "10.1.0.3", 7), fixture.now).unwrap();
    host(&mut fixture, &[]);
    fixture.apply([SourceEvent::Synced]);
    fixture.settle();
    assert!(entry(&fixture, "10.1.0.2").is_some(), "the CNI has not listed its pods yet");
    assert_eq!(entry(&fixture, "192.168.1.1"), None);
    fixture.reconciler.pods_loaded();
    fixture.settle();
    assert_eq!(entry(&fixture, "10.1.0.2"), None);
    assert!(entry(&fixture, "10.1.0.3").is_some());
}

#[test]
fn host_port_exists_while_its_pod_does_and_survives_restart() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.set_network(network(), &fixture.store);
    host(&mut fixture, &["192.168.1.1"]);
    fixture.reconciler.pods_loaded();
    let mapping =
        PortMapping { host_ip: None, host_port: 8080, protocol: PortProtocol::Tcp, container_port: 80 };
    let web = LocalPod { port_mappings: vec![mapping], ..pod("web", "10.1.0.2", 7) };
    let frontends = |fixture: &Fixture| -> Vec<String> {
        let mut all: Vec<_> =
            fixture.services.entries().unwrap().iter().map(|(key, _)| key.addr.to_string()).collect();
        all.sort();
        all
    };
    fixture.reconciler.upsert_pod("c1", &web, fixture.now).unwrap();
    // without a call to `work`: the CNI reports success next
    assert_eq!(frontends(&fixture), ["127.0.0.1", "192.168.1.1"]);
    let entry_of_host = entry(&fixture, "192.168.1.1").unwrap();
    assert!(entry_of_host.has_frontends());
    assert_eq!(entry_of_host.flow_hints, FlowHints::ALL);

    // a new agent's source is synced before its pods are known
    fixture.restart();
    fixture.reconciler.set_network(network(), &fixture.store);
    host(&mut fixture, &["192.168.1.1"]);
    fixture.replay();
    fixture.reconciler.upsert_pod("c1", &web, fixture.now).unwrap();
    fixture.reconciler.pods_loaded();
    fixture.settle();
    assert_eq!((frontends(&fixture).len(), fixture.reconciler.changes()), (2, 0));

    // sockets of the host must not be assigned this port
    assert_eq!(fixture.reconciler.host_ports().ports, [8_080].into());
    host(&mut fixture, &["192.168.1.1", "192.168.1.2"]);
    assert_eq!(frontends(&fixture), ["127.0.0.1", "192.168.1.1", "192.168.1.2"]);
    fixture.reconciler.remove_pod("c1", fixture.now).unwrap();
    assert!(frontends(&fixture).is_empty());
    assert!(fixture.reconciler.take_host_ports_changed() && fixture.reconciler.host_ports().ports.is_empty());
    assert!(!entry(&fixture, "192.168.1.1").unwrap().has_frontends());
}

#[test]
fn node_ports_follow_node_port_addresses() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.set_network(network(), &fixture.store);
    fixture.reconciler.pods_loaded();
    let with_node_ports = |fixture: &Fixture| -> Vec<String> {
        let entries = fixture.endpoints.entries().unwrap();
        let with_node_ports = entries.iter().filter(|(_, endpoint)| endpoint.has_node_ports());
        let mut with_node_ports: Vec<_> = with_node_ports.map(|(addr, _)| addr.to_string()).collect();
        with_node_ports.sort();
        with_node_ports
    };
    let set_node_port_addresses = |fixture: &mut Fixture, ips: &[&str]| {
        let addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        fixture.reconciler.set_node_port_addresses(Some(addresses));
        fixture.settle();
    };
    host(&mut fixture, &["192.168.1.1", "192.168.1.2", "fd00::1"]);
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    fixture.apply([SourceEvent::Synced]);
    fixture.settle();
    assert!(with_node_ports(&fixture).is_empty(), "there is no node port");

    let mut ported = service("web", &["10.96.0.1"]);
    ported.ports[0].node_port = Some(30_053);
    fixture.apply([upsert(ported)]);
    fixture.settle();
    assert_eq!(with_node_ports(&fixture), ["192.168.1.1", "192.168.1.2", "fd00::1"]);
    set_node_port_addresses(&mut fixture, &["192.168.1.1", "fd00::1", "192.168.1.3"]);
    assert_eq!(with_node_ports(&fixture), ["192.168.1.1", "fd00::1"]);

    host(&mut fixture, &["192.168.1.1", "192.168.1.2", "192.168.1.3", "192.168.1.4", "fd00::1"]);
    assert_eq!(with_node_ports(&fixture), ["192.168.1.1", "192.168.1.3", "fd00::1"]);
    host(&mut fixture, &["192.168.1.2", "192.168.1.3", "fd00::1"]);
    assert_eq!(with_node_ports(&fixture), ["192.168.1.3", "fd00::1"]);
    host(&mut fixture, &["192.168.1.1", "192.168.1.2", "192.168.1.3", "fd00::1"]);
    assert_eq!(with_node_ports(&fixture), ["192.168.1.1", "192.168.1.3", "fd00::1"], "the address is back");
    set_node_port_addresses(&mut fixture, &["192.168.1.2"]);
    assert_eq!(with_node_ports(&fixture), ["192.168.1.2"]);

    fixture.apply([service_removed("web")]);
    fixture.settle();
    assert!(with_node_ports(&fixture).is_empty());
}
