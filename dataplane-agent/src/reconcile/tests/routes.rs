//! Ways to other nodes.

use std::net::IpAddr;

use super::*;

fn listed(world: &World) -> Vec<String> {
    let show = |view: crate::api::views::RouteView| {
        let hop = view.next_hop.map(|hop| format!(" via {hop}")).unwrap_or_default();
        let device = view.device.map(|device| format!(" dev {device}")).unwrap_or_default();
        format!("{} {:?}{hop}{device}", view.prefix, view.kind)
    };
    world.agent.routes().into_iter().map(show).collect()
}

/// This node `a`, a neighbour `b`, and `c` behind a router.
fn three_nodes() -> World {
    let mut world = World::new(PLENTY);
    world.agent.set_network(network(), &world.store);
    world.apply([
        upsert(node("b", &["192.168.1.2"], &["10.1.1.0/24"])),
        upsert(node("a", &["192.168.1.1"], &["10.1.0.0/24"])),
        upsert(node("c", &["192.168.2.2"], &["10.1.2.0/24"])),
        SourceEvent::Synced,
    ]);
    world.settle();
    world
}

#[test]
fn every_node_is_reached_its_own_way() {
    let world = three_nodes();
    assert_eq!(
        listed(&world),
        [
            "10.1.0.0/24 Local",
            "10.1.1.0/24 Native via 192.168.1.2 dev eth0",
            "10.1.2.0/24 Overlay via 192.168.2.2 dev dataplane0",
            "172.16.0.0/12 NoMasquerade",
            "192.168.1.2/32 Native via 192.168.1.2 dev eth0",
            "192.168.2.2/32 Overlay via 192.168.2.2 dev dataplane0",
        ]
    );
    let kernel: Vec<_> = world.kernel_routes.values().map(ToString::to_string).collect();
    assert_eq!(kernel, ["10.1.1.0/24 via 192.168.1.2 dev 2", "10.1.2.0/24 dev 9"]);
    let nodes = world.agent.nodes(&world.store);
    let routing: Vec<_> = nodes.iter().map(|node| (node.name.as_str(), node.routing.as_str())).collect();
    assert_eq!(routing, [("b", "native"), ("c", "vxlan")]);
}

#[test]
fn a_node_that_goes_takes_its_routes_along() {
    let mut world = three_nodes();
    world.apply([gone(ObjectKey::Node("b".to_owned()))]);
    world.settle();
    assert!(listed(&world).iter().all(|route| !route.contains("192.168.1.2")), "{:?}", listed(&world));
    assert_eq!(world.kernel_routes.len(), 1);
}

#[test]
fn one_node_costs_its_own_routes_and_no_others() {
    let mut world = three_nodes();
    let writes = world.writes();
    world.apply([upsert(node("b", &["192.168.1.3"], &["10.1.1.0/24"]))]);
    world.settle();
    // its range is written over, its new address comes, its old one goes
    assert_eq!(world.writes() - writes, 3);
}

#[test]
fn another_mode_moves_every_route() {
    let mut world = three_nodes();
    let vxlan = NodeNetwork { mode: RoutingMode::Vxlan, ..network() };
    world.agent.set_network(vxlan, &world.store);
    world.settle();
    assert!(listed(&world).iter().all(|route| !route.contains("Native")), "{:?}", listed(&world));
}

#[test]
fn without_its_own_object_the_node_says_why_there_are_no_routes() {
    let mut world = World::new(PLENTY);
    world.agent.set_network(network(), &world.store);
    world.apply([upsert(node("b", &["192.168.1.2"], &["10.1.1.0/24"]))]);
    world.settle();
    assert_eq!(listed(&world), ["172.16.0.0/12 NoMasquerade"]);
    assert!(world.problems()[0].starts_with("Node a: "), "{:?}", world.problems());
}

#[test]
fn a_node_that_cannot_be_reached_is_a_problem() {
    let mut world = three_nodes();
    world.agent.set_network(NodeNetwork { mode: RoutingMode::Native, ..network() }, &world.store);
    world.settle();
    let problems = world.problems();
    assert!(problems[0].starts_with("Node c: status.addresses: pods of 10.1.2.0/24"), "{problems:?}");
    let nodes = world.agent.nodes(&world.store);
    assert!(nodes[1].routing.starts_with("none: pods of 10.1.2.0/24"), "{:?}", nodes[1].routing);
}

#[test]
fn a_restart_writes_nothing_and_removes_what_went_after_the_sync() {
    let mut world = three_nodes();
    world.store.apply(gone(ObjectKey::Node("c".to_owned())));
    world.restart();
    world.agent.set_network(network(), &world.store);
    let b = Changes { nodes: ["a", "b"].map(str::to_owned).into(), ..Changes::default() };
    world.take(&b);
    world.settle();
    assert_eq!(world.agent.changes(), 0);
    assert_eq!(listed(&world).len(), 6);
    world.replay();
    world.settle();
    assert_eq!(listed(&world).len(), 4);
}

#[test]
fn ranges_of_cluster_ips_are_rows_as_long_as_one_says_so() {
    let mut world = three_nodes();
    let range = |name: &str, cidrs: &[&str]| {
        let cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        SourceEvent::Upsert(Object::ServiceCidr(ServiceCidr {
            name: name.to_owned(),
            cidrs,
            ..Default::default()
        }))
    };
    let ranges = |world: &World| -> Vec<String> {
        listed(world).into_iter().filter(|route| route.contains("Services")).collect()
    };
    let before = world.writes();
    world.apply([range("kubernetes", &["10.96.0.0/16", "fd96::/108"]), range("more", &["10.96.0.0/16"])]);
    world.settle();
    assert_eq!(ranges(&world), ["10.96.0.0/16 Services", "fd96::/108 Services"]);
    assert_eq!(world.writes() - before, 2);
    world.apply([range("more", &["10.97.0.0/16"]), gone(ObjectKey::ServiceCidr("kubernetes".to_owned()))]);
    world.settle();
    assert_eq!(ranges(&world), ["10.97.0.0/16 Services"]);
    // pods go before: a range that cannot be right takes nobody's pods away
    world.apply([range("wrong", &["10.1.1.0/24"])]);
    world.settle();
    assert!(listed(&world).contains(&"10.1.1.0/24 Native via 192.168.1.2 dev eth0".to_owned()));
}

#[test]
fn the_host_has_a_route_to_each_of_its_pods() {
    let mut world = World::new(PLENTY);
    world.agent.upsert_pod("c1", &pod("web", "10.1.0.2", 7), world.now).unwrap();
    world.work();
    assert_eq!(
        world.kernel_routes.values().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.1.0.2/32 dev 7"]
    );
    world.agent.remove_pod("c1", world.now).unwrap();
    world.work();
    assert!(world.kernel_routes.is_empty());
}

#[test]
fn the_host_speaks_to_its_pods_with_one_address_and_the_route_an_add_made_is_the_one_wanted() {
    let mut world = World::new(PLENTY);
    let pods: [IpAddr; 2] = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
    let mut pod = pod("web", "10.1.0.2", 7);
    pod.device.addresses = pods.to_vec();
    world.agent.upsert_pod("c1", &pod, world.now).unwrap();
    for sources in [["192.168.1.1", "fd99::1"], ["192.168.1.9", "fd99::1"]] {
        let sources: Vec<IpAddr> = sources.iter().map(|source| source.parse().unwrap()).collect();
        world.agent.set_network(NodeNetwork { sources: sources.clone(), ..network() }, &world.store);
        world.work();
        for (pod, source) in pods.iter().zip(&sources) {
            // what ADD writes is made by the same function
            let made = KernelRoute::to_pod(*pod, 7, &sources);
            assert_eq!(made.source, Some(*source));
            assert_eq!(world.kernel_routes[&IpNet::from(*pod)], made);
        }
    }
}
