//! Addresses of this node, and their gates.

use dataplane_cni::protocol::{PortMapping, PortProtocol};
use dataplane_common::abi::FlowHints;

use super::*;
use crate::reconcile::EndpointError;

fn entry(world: &World, ip: &str) -> Option<Endpoint> {
    let addr: std::net::IpAddr = ip.parse().unwrap();
    world.endpoints.get(&addr.into()).unwrap()
}

fn host(world: &mut World, ips: &[&str]) {
    world.agent.set_host_addresses(ips.iter().map(|ip| ip.parse().unwrap()), &world.store, world.now);
    world.settle();
}

#[test]
fn a_pod_is_there_when_the_call_returns() {
    let mut world = World::new(PLENTY);
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    let endpoint = entry(&world, "10.1.0.2").unwrap();
    assert_eq!((endpoint.ifindex, endpoint.flow_hints), (7, FlowHints::NONE));
    world.agent.remove_pod("c1", world.now).unwrap();
    assert_eq!(entry(&world, "10.1.0.2"), None);
}

#[test]
fn an_entry_written_over_another_opens_every_gate() {
    let mut world = World::new(PLENTY);
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 8), world.now).unwrap();
    let endpoint = entry(&world, "10.1.0.2").unwrap();
    assert_eq!((endpoint.ifindex, endpoint.flow_hints), (8, FlowHints::ALL));
}

#[test]
fn gates_the_datapath_opened_are_no_difference() {
    let mut world = World::new(PLENTY);
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    let mut endpoint = entry(&world, "10.1.0.2").unwrap();
    endpoint.flow_hints.tcp = 1;
    let addr: std::net::IpAddr = "10.1.0.2".parse().unwrap();
    world.endpoints.insert(&addr.into(), &endpoint).unwrap();
    world.restart();
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    world.agent.pods_loaded();
    world.settle();
    assert_eq!(entry(&world, "10.1.0.2"), Some(endpoint));
    assert_eq!(world.agent.changes(), 0);
    assert_eq!(world.agent.endpoints().unwrap()[0].flow_hints, ["tcp"]);
}

#[test]
fn an_address_the_host_gets_back_has_flows_from_before() {
    let mut world = World::new(PLENTY);
    host(&mut world, &["192.168.1.1"]);
    assert_eq!(entry(&world, "192.168.1.1").unwrap().flow_hints, FlowHints::NONE);
    host(&mut world, &[]);
    assert_eq!(entry(&world, "192.168.1.1"), None);
    host(&mut world, &["192.168.1.1"]);
    assert_eq!(entry(&world, "192.168.1.1").unwrap().flow_hints, FlowHints::ALL);
}

#[test]
fn the_late_removal_of_a_pod_does_not_take_the_address_from_its_heir() {
    let mut world = World::new(PLENTY);
    world.agent.upsert_pod("old", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    world.agent.upsert_pod("new", &pod("web", "10.1.0.2", 8), world.now).unwrap();
    world.agent.remove_pod("old", world.now).unwrap();
    assert_eq!(entry(&world, "10.1.0.2").unwrap().ifindex, 8);
}

#[test]
fn a_pod_cannot_have_an_address_of_the_host() {
    let mut world = World::new(PLENTY);
    host(&mut world, &["192.168.1.1"]);
    let refused = world.agent.upsert_pod("c1", &pod("web", "192.168.1.1", 7), world.now);
    assert!(matches!(refused, Err(EndpointError::HostAddress(_))), "{refused:?}");
    assert!(entry(&world, "192.168.1.1").unwrap().is_host());
}

#[test]
fn the_cni_hears_of_a_failure_and_it_is_tried_again() {
    let mut world = World::new(PLENTY);
    world.faults.fail([0]);
    let failed = world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now);
    assert!(matches!(failed, Err(EndpointError::Table { .. })), "{failed:?}");
    assert_eq!(world.agent.problems()[0].subject, "endpoint 10.1.0.2");
    world.settle();
    assert!(entry(&world, "10.1.0.2").is_some());
    assert_eq!(world.agent.statistics().retries, 1);
}

#[test]
fn pods_that_went_while_the_agent_was_away_go_when_the_cni_has_listed_the_others() {
    let mut world = World::new(PLENTY);
    for (id, ip) in [("c1", "10.1.0.2"), ("c2", "10.1.0.3")] {
        world.agent.upsert_pod(id, &pod(id, ip, 7), world.now).unwrap();
    }
    host(&mut world, &["192.168.1.1"]);
    world.restart();
    world.agent.upsert_pod("c2", &pod("c2", "10.1.0.3", 7), world.now).unwrap();
    host(&mut world, &[]);
    world.apply([SourceEvent::Synced]);
    world.settle();
    assert!(entry(&world, "10.1.0.2").is_some(), "the CNI has not said that it is gone");
    assert_eq!(entry(&world, "192.168.1.1"), None);
    world.agent.pods_loaded();
    world.settle();
    assert_eq!(entry(&world, "10.1.0.2"), None);
    assert!(entry(&world, "10.1.0.3").is_some());
}

#[test]
fn a_port_of_the_host_is_there_as_long_as_its_pod_and_outlives_the_agent() {
    let mut world = World::new(PLENTY);
    world.agent.set_network(network(), &world.store);
    host(&mut world, &["192.168.1.1"]);
    world.agent.pods_loaded();
    let mapping =
        PortMapping { host_ip: None, host_port: 8080, protocol: PortProtocol::Tcp, container_port: 80 };
    let web = LocalPod { port_mappings: vec![mapping], ..pod("web", "10.1.0.2", 7) };
    let frontends = |world: &World| -> Vec<String> {
        let mut all: Vec<_> =
            world.services.entries().unwrap().iter().map(|(key, _)| key.addr.to_string()).collect();
        all.sort();
        all
    };
    world.agent.upsert_pod("c1", &web, world.now).unwrap();
    // without any work: the CNI says next that the pod is there
    assert_eq!(frontends(&world), ["127.0.0.1", "192.168.1.1"]);
    let entry_of_host = entry(&world, "192.168.1.1").unwrap();
    assert!(entry_of_host.has_frontends());
    assert_eq!(entry_of_host.flow_hints, FlowHints::ALL);

    // the source is in step before the pods are known, as it is when a new agent starts
    world.restart();
    world.agent.set_network(network(), &world.store);
    host(&mut world, &["192.168.1.1"]);
    world.replay();
    world.agent.upsert_pod("c1", &web, world.now).unwrap();
    world.agent.pods_loaded();
    world.settle();
    assert_eq!((frontends(&world).len(), world.agent.changes()), (2, 0));

    // no socket of the host is to get it by chance
    assert_eq!(world.agent.host_ports().ports, [8_080].into());
    host(&mut world, &["192.168.1.1", "192.168.1.2"]);
    assert_eq!(frontends(&world), ["127.0.0.1", "192.168.1.1", "192.168.1.2"]);
    world.agent.remove_pod("c1", world.now).unwrap();
    assert!(frontends(&world).is_empty());
    assert!(world.agent.take_host_ports_changed() && world.agent.host_ports().ports.is_empty());
    assert!(!entry(&world, "192.168.1.1").unwrap().has_frontends());
}

#[test]
fn node_ports_are_at_the_addresses_that_take_them_as_these_come_and_go() {
    let mut world = World::new(PLENTY);
    world.agent.set_network(network(), &world.store);
    world.agent.pods_loaded();
    let marked = |world: &World| -> Vec<String> {
        let entries = world.endpoints.entries().unwrap();
        let marked = entries.iter().filter(|(_, endpoint)| endpoint.has_node_ports());
        let mut marked: Vec<_> = marked.map(|(addr, _)| addr.to_string()).collect();
        marked.sort();
        marked
    };
    let taken_at = |world: &mut World, ips: &[&str]| {
        let addresses = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        world.agent.set_node_port_addresses(Some(addresses));
        world.settle();
    };
    host(&mut world, &["192.168.1.1", "192.168.1.2", "fd00::1"]);
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    world.apply([SourceEvent::Synced]);
    world.settle();
    assert!(marked(&world).is_empty(), "there is no node port");

    let mut ported = service("web", &["10.96.0.1"]);
    ported.ports[0].node_port = Some(30_053);
    world.apply([upsert(ported)]);
    world.settle();
    assert_eq!(marked(&world), ["192.168.1.1", "192.168.1.2", "fd00::1"]);
    taken_at(&mut world, &["192.168.1.1", "fd00::1", "192.168.1.3"]);
    assert_eq!(marked(&world), ["192.168.1.1", "fd00::1"]);

    host(&mut world, &["192.168.1.1", "192.168.1.2", "192.168.1.3", "192.168.1.4", "fd00::1"]);
    assert_eq!(marked(&world), ["192.168.1.1", "192.168.1.3", "fd00::1"]);
    host(&mut world, &["192.168.1.2", "192.168.1.3", "fd00::1"]);
    assert_eq!(marked(&world), ["192.168.1.3", "fd00::1"]);
    host(&mut world, &["192.168.1.1", "192.168.1.2", "192.168.1.3", "fd00::1"]);
    assert_eq!(marked(&world), ["192.168.1.1", "192.168.1.3", "fd00::1"], "it is back");
    taken_at(&mut world, &["192.168.1.2"]);
    assert_eq!(marked(&world), ["192.168.1.2"]);

    world.apply([service_gone("web")]);
    world.settle();
    assert!(marked(&world).is_empty());
}
