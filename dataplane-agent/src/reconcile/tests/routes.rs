//! Routes to other nodes, ServiceCIDRs and local pods.

use std::net::IpAddr;

use super::*;
use crate::reconcile::kernel_routes::KernelSweep;

fn listed(fixture: &Fixture) -> Vec<String> {
    let show = |view: crate::api::views::RouteView| {
        let hop = view.next_hop.map(|hop| format!(" via {hop}")).unwrap_or_default();
        let device = view.device.map(|device| format!(" dev {device}")).unwrap_or_default();
        format!("{} {:?}{hop}{device}", view.prefix, view.kind)
    };
    fixture.reconciler.routes().into_iter().map(show).collect()
}

/// This node `a`, a neighbour `b`, and `c` behind a router.
fn three_nodes() -> Fixture {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.set_network(network(), &fixture.store);
    fixture.apply([
        upsert(node("b", &["192.168.1.2"], &["10.1.1.0/24"])),
        upsert(node("a", &["192.168.1.1"], &["10.1.0.0/24"])),
        upsert(node("c", &["192.168.2.2"], &["10.1.2.0/24"])),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    fixture
}

#[test]
fn nodes_are_routed_natively_or_by_overlay() {
    let fixture = three_nodes();
    assert_eq!(
        listed(&fixture),
        [
            "10.1.0.0/24 Local",
            "10.1.1.0/24 Native via 192.168.1.2 dev eth0",
            "10.1.2.0/24 Overlay via 192.168.2.2 dev dataplane0",
            "172.16.0.0/12 NoMasquerade",
            "192.168.1.2/32 Native via 192.168.1.2 dev eth0",
            "192.168.2.2/32 Overlay via 192.168.2.2 dev dataplane0",
        ]
    );
    let kernel: Vec<_> = fixture.kernel_routes.values().map(ToString::to_string).collect();
    assert_eq!(kernel, ["10.1.1.0/24 via 192.168.1.2 dev 2", "10.1.2.0/24 dev 9"]);
    let nodes = fixture.reconciler.nodes(&fixture.store);
    let routing: Vec<_> = nodes.iter().map(|node| (node.name.as_str(), node.routing.as_str())).collect();
    assert_eq!(routing, [("b", "native"), ("c", "vxlan")]);
}

#[test]
fn routes_of_deleted_node_are_removed() {
    let mut fixture = three_nodes();
    fixture.apply([removed(ObjectKey::Node("b".to_owned()))]);
    fixture.settle();
    assert!(listed(&fixture).iter().all(|route| !route.contains("192.168.1.2")), "{:?}", listed(&fixture));
    assert_eq!(fixture.kernel_routes.len(), 1);
}

#[test]
fn changed_node_writes_only_its_own_routes() {
    let mut fixture = three_nodes();
    let writes = fixture.writes();
    fixture.apply([upsert(node("b", &["192.168.1.3"], &["10.1.1.0/24"]))]);
    fixture.settle();
    // one pod CIDR rewritten, one address added, one removed
    assert_eq!(fixture.writes() - writes, 3);
}

#[test]
fn changed_routing_mode_rewrites_routes() {
    let mut fixture = three_nodes();
    let vxlan = NodeNetwork { mode: RoutingMode::Vxlan, ..network() };
    fixture.reconciler.set_network(vxlan, &fixture.store);
    fixture.settle();
    assert!(listed(&fixture).iter().all(|route| !route.contains("Native")), "{:?}", listed(&fixture));
}

/// The kernel's route and the row of node `b`, which `three_nodes` routes natively.
fn route_and_row(fixture: &Fixture) -> [String; 2] {
    let destination: IpNet = "10.1.1.0/24".parse().unwrap();
    let row = listed(fixture).into_iter().find(|row| row.starts_with("10.1.1.0/24")).unwrap();
    [fixture.kernel_routes[&destination].to_string(), row]
}

#[test]
fn kernel_route_follows_row_that_changes_to_overlay() {
    let native = ["10.1.1.0/24 via 192.168.1.2 dev 2", "10.1.1.0/24 Native via 192.168.1.2 dev eth0"];
    let overlay = ["10.1.1.0/24 dev 9", "10.1.1.0/24 Overlay via 192.168.1.2 dev dataplane0"];
    let mut fixture = three_nodes();
    assert_eq!(route_and_row(&fixture), native);
    fixture.reconciler.set_network(NodeNetwork { mode: RoutingMode::Vxlan, ..network() }, &fixture.store);
    assert!(fixture.kernel.is_empty(), "the row is not written yet");
    fixture.settle();
    assert_eq!(route_and_row(&fixture), overlay);
}

/// A sweep removes kernel routes that were not sent.
#[test]
fn sweep_follows_kernel_routes_that_are_held_back() {
    let mut fixture = three_nodes();
    fixture.restart();
    fixture.reconciler.set_network(NodeNetwork { mode: RoutingMode::Vxlan, ..network() }, &fixture.store);
    let everything = fixture.store.everything();
    fixture.apply_changes(&everything);
    while fixture.reconciler.work(fixture.now).is_some_and(|due| due <= fixture.now) {}
    let updates: Vec<_> = std::iter::from_fn(|| fixture.kernel.try_recv().ok()).collect();
    let is_route = |it: &KernelUpdate| matches!(it, KernelUpdate::Ensure(route) if route.to_string() == "10.1.1.0/24 dev 9");
    let route = updates.iter().position(is_route).expect("the kernel route is sent");
    let sweep = updates.iter().position(|it| *it == KernelUpdate::Sweep(KernelSweep::Nodes));
    assert!(route < sweep.expect("the sweep is sent"), "{updates:?}");
}

#[test]
fn row_that_changes_to_native_follows_kernel_route() {
    let mut fixture = three_nodes();
    fixture.reconciler.set_network(NodeNetwork { mode: RoutingMode::Vxlan, ..network() }, &fixture.store);
    fixture.settle();
    let installed = InstalledRoutes::default();
    fixture.reconciler.set_installed_routes(installed.clone());
    fixture.reconciler.set_network(network(), &fixture.store);
    let half = ["10.1.1.0/24 via 192.168.1.2 dev 2", "10.1.1.0/24 Overlay via 192.168.1.2 dev dataplane0"];
    for _ in 0..10 {
        let due = fixture.work().expect("the row waits");
        fixture.advance(due.saturating_duration_since(fixture.now));
        assert_eq!(route_and_row(&fixture), half);
    }
    assert_eq!(fixture.problems(), [] as [&str; 0]);
    installed.insert(fixture.kernel_routes[&"10.1.1.0/24".parse().unwrap()]);
    fixture.settle();
    assert!(route_and_row(&fixture)[1].contains("Native"));
}

/// Packets of pods do not need the kernel's route.
#[test]
fn row_does_not_wait_for_ever_for_kernel_route() {
    let mut fixture = three_nodes();
    fixture.reconciler.set_network(NodeNetwork { mode: RoutingMode::Vxlan, ..network() }, &fixture.store);
    fixture.settle();
    fixture.reconciler.set_installed_routes(InstalledRoutes::default());
    fixture.reconciler.set_network(network(), &fixture.store);
    fixture.work();
    fixture.advance(Duration::from_secs(3));
    fixture.settle();
    assert!(route_and_row(&fixture)[1].contains("Native"));
}

#[test]
fn missing_own_node_object_is_a_problem() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.set_network(network(), &fixture.store);
    fixture.apply([upsert(node("b", &["192.168.1.2"], &["10.1.1.0/24"]))]);
    fixture.settle();
    assert_eq!(listed(&fixture), ["172.16.0.0/12 NoMasquerade"]);
    assert!(fixture.problems()[0].starts_with("Node a: "), "{:?}", fixture.problems());
}

#[test]
fn unreachable_node_is_a_problem() {
    let mut fixture = three_nodes();
    fixture.reconciler.set_network(NodeNetwork { mode: RoutingMode::Native, ..network() }, &fixture.store);
    fixture.settle();
    let problems = fixture.problems();
    assert!(problems[0].starts_with("Node c: status.addresses: pods in 10.1.2.0/24"), "{problems:?}");
    let nodes = fixture.reconciler.nodes(&fixture.store);
    assert!(nodes[1].routing.starts_with("none: pods in 10.1.2.0/24"), "{:?}", nodes[1].routing);
}

#[test]
fn restart_writes_nothing_and_removes_stale_routes_after_sync() {
    let mut fixture = three_nodes();
    fixture.store.apply(removed(ObjectKey::Node("c".to_owned())));
    fixture.restart();
    fixture.reconciler.set_network(network(), &fixture.store);
    let b = Changes { nodes: ["a", "b"].map(str::to_owned).into(), ..Changes::default() };
    fixture.apply_changes(&b);
    fixture.settle();
    assert_eq!(fixture.reconciler.changes(), 0);
    assert_eq!(listed(&fixture).len(), 6);
    fixture.replay();
    fixture.settle();
    assert_eq!(listed(&fixture).len(), 4);
}

#[test]
fn service_cidr_routes_exist_while_an_object_has_them() {
    let mut fixture = three_nodes();
    let range = |name: &str, cidrs: &[&str]| {
        let cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        SourceEvent::Upsert(Object::ServiceCidr(ServiceCidr {
            name: name.to_owned(),
            cidrs,
            ..Default::default()
        }))
    };
    let ranges = |fixture: &Fixture| -> Vec<String> {
        listed(fixture).into_iter().filter(|route| route.contains("Services")).collect()
    };
    let before = fixture.writes();
    fixture.apply([range("kubernetes", &["10.96.0.0/16", "fd96::/108"]), range("more", &["10.96.0.0/16"])]);
    fixture.settle();
    assert_eq!(ranges(&fixture), ["10.96.0.0/16 Services", "fd96::/108 Services"]);
    assert_eq!(fixture.writes() - before, 2);
    fixture
        .apply([range("more", &["10.97.0.0/16"]), removed(ObjectKey::ServiceCidr("kubernetes".to_owned()))]);
    fixture.settle();
    assert_eq!(ranges(&fixture), ["10.97.0.0/16 Services"]);
    // pod CIDRs take precedence: a wrong ServiceCIDR does not break pods
    fixture.apply([range("wrong", &["10.1.1.0/24"])]);
    fixture.settle();
    assert!(listed(&fixture).contains(&"10.1.1.0/24 Native via 192.168.1.2 dev eth0".to_owned()));
}

#[test]
fn host_reaches_cluster_ips_by_the_uplink_with_its_address() {
    let mut fixture = three_nodes();
    let range = ServiceCidr {
        name: "kubernetes".to_owned(),
        cidrs: ["10.96.0.0/16", "fd96::/108"].map(|cidr| cidr.parse().unwrap()).into(),
        ..Default::default()
    };
    let other = Uplink {
        name: "eth1".to_owned(),
        ifindex: 3,
        addresses: vec!["192.0.2.1/24".parse().unwrap()],
        ..network().uplinks.remove(0)
    };
    let sources: [IpAddr; 2] = ["192.168.1.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    let uplinks = [vec![other], network().uplinks].concat();
    fixture.apply([SourceEvent::Upsert(Object::ServiceCidr(range.clone()))]);
    fixture
        .reconciler
        .set_network(NodeNetwork { uplinks, sources: sources.to_vec(), ..network() }, &fixture.store);
    fixture.settle();
    for (cidr, source) in range.cidrs.iter().zip(sources) {
        assert_eq!(fixture.kernel_routes[cidr], KernelRoute::to_services(*cidr, 2, source));
    }
    fixture.apply([removed(ObjectKey::ServiceCidr("kubernetes".to_owned()))]);
    fixture.settle();
    assert!(range.cidrs.iter().all(|cidr| !fixture.kernel_routes.contains_key(cidr)));
}

#[test]
fn host_has_kernel_route_to_each_local_pod() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.upsert_pod("c1", &pod("web", "10.1.0.2", 7), fixture.now).unwrap();
    fixture.work();
    assert_eq!(
        fixture.kernel_routes.values().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.1.0.2/32 dev 7"]
    );
    fixture.reconciler.remove_pod("c1", fixture.now).unwrap();
    fixture.work();
    assert!(fixture.kernel_routes.is_empty());
}

#[test]
fn kernel_route_to_pod_has_configured_source_and_matches_cni_add() {
    let mut fixture = Fixture::new(LARGE);
    let pods: [IpAddr; 2] = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
    let mut pod = pod("web", "10.1.0.2", 7);
    pod.device.addresses = pods.to_vec();
    fixture.reconciler.upsert_pod("c1", &pod, fixture.now).unwrap();
    for sources in [["192.168.1.1", "fd99::1"], ["192.168.1.9", "fd99::1"]] {
        let sources: Vec<IpAddr> = sources.iter().map(|source| source.parse().unwrap()).collect();
        fixture.reconciler.set_network(NodeNetwork { sources: sources.clone(), ..network() }, &fixture.store);
        fixture.work();
        for (pod, source) in pods.iter().zip(&sources) {
            // a CNI ADD uses the same function
            let made = KernelRoute::to_pod(*pod, 7, &sources);
            assert_eq!(made.source, Some(*source));
            assert_eq!(fixture.kernel_routes[&IpNet::from(*pod)], made);
        }
    }
}
