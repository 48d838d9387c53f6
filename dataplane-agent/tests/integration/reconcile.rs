//! Tests of the reconciler with real tables and real routes.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use dataplane_agent::{
    datapath::{Capacity, Datapath, DatapathConfig, EbpfLog, TcHooks, XdpUse, cleanup, table::Table as _},
    netlink::{KernelRoute, Netlink},
    reconcile::{KernelRoutes, KernelUpdate, Reconciler, kernel_routes::KernelSweep},
    state::{
        Changes, Endpoint, EndpointPort, EndpointSlice, Name, NamespacedName, Object, Owner, Service,
        ServicePort, SourceEvent, Store, TransportProtocol,
    },
};
use dataplane_common::abi::NodeConfig;
use tokio::sync::mpsc;

use crate::netns::{in_fresh_netns, ip};

/// Number of services of the large test, and backends of each.
const SERVICES: u16 = 1_000;
const BACKENDS: u8 = 10;

fn service(number: u16) -> [Object; 2] {
    let name = NamespacedName::new("default", format!("service-{number}"));
    let [high, low] = number.to_be_bytes();
    let endpoint = |last: u8| Endpoint {
        address: IpAddr::from([10, 1 + high, low, last]),
        ready: true,
        serving: true,
        terminating: false,
        node_name: None,
        hints: None,
    };
    let service = Service {
        name: name.clone(),
        owner: Owner::default(),
        cluster_ips: vec![IpAddr::from([10, 96, high, low])],
        ports: vec![ServicePort {
            name: Name::default(),
            port: 80,
            protocol: TransportProtocol::Tcp,
            node_port: None,
        }],
        affinity_timeout: None,
        load_balancing: None,
        forwarding: None,
        ..Service::default()
    };
    let slice = EndpointSlice {
        name: name.clone(),
        owner: Owner::default(),
        service: name,
        ports: vec![EndpointPort { name: Name::default(), port: 8_080, protocol: TransportProtocol::Tcp }],
        endpoints: (1..=BACKENDS).map(endpoint).collect(),
        trigger_time: None,
    };
    [Object::Service(service), Object::EndpointSlice(slice)]
}

fn store(services: u16) -> (Store, Changes) {
    let (mut store, mut changes) = (Store::default(), Changes::default());
    for object in (0..services).flat_map(service) {
        changes.merge(store.apply(SourceEvent::Upsert(object)));
    }
    changes.merge(store.apply(SourceEvent::Synced));
    (store, changes)
}

/// A reconciler that has adopted the pinned tables and applied `changes`.
fn agent(datapath: &Datapath, store: &Store, changes: &Changes) -> Reconciler {
    let (sender, _kernel) = mpsc::unbounded_channel();
    let mut agent = Reconciler::new(datapath.tables().unwrap(), sender);
    let started = Instant::now();
    let adopted = agent.adopt().unwrap();
    let adoption = started.elapsed();
    agent.apply_changes(store, changes);
    run_until_idle(&mut agent);
    println!("{adopted:?} in {adoption:?}, {} writes, {:?} in all", agent.changes(), started.elapsed());
    agent
}

fn run_until_idle(agent: &mut Reconciler) {
    let mut now = Instant::now();
    while let Some(due) = agent.work(now) {
        assert!(due <= now + Duration::from_secs(60), "{:?}", agent.problems());
        now = now.max(due);
    }
}

#[test]
fn a_thousand_services_are_adopted_without_a_write() {
    in_fresh_netns(|| async {
        let directory = tempfile::tempdir().unwrap();
        let config = DatapathConfig {
            bpffs: directory.path().join("bpf"),
            node: NodeConfig::default(),
            capacity: Capacity { flows: 512, ..Capacity::default() },
            log: EbpfLog::Off,
            tc: TcHooks::Auto,
            xdp: XdpUse::Off,
        };
        let (mut store, changes) = store(SERVICES);
        let first = agent(&Datapath::load(&config).unwrap(), &store, &changes);
        // a row for the port, one for the address, and for each backend a slot and a generation
        assert_eq!(first.changes(), u64::from(SERVICES) * (2 + 2 * u64::from(BACKENDS)));
        let before = first.services(&store);
        drop(first);

        let datapath = Datapath::load(&config).unwrap();
        let mut second = agent(&datapath, &store, &changes);
        assert_eq!(second.changes(), 0);
        assert_eq!(second.services(&store), before);
        while !second.audit().unwrap() {}
        assert_eq!(second.statistics().drift, 0);

        let [_, slice] = service(7);
        let Object::EndpointSlice(mut slice) = slice else { unreachable!("it is a slice") };
        slice.endpoints.pop();
        let changes = store.apply(SourceEvent::Upsert(Object::EndpointSlice(slice)));
        second.apply_changes(&store, &changes);
        run_until_idle(&mut second);
        // the slots, the frontend, and the generation of the removed backend
        assert_eq!(second.changes(), u64::from(BACKENDS) - 1 + 1 + 1);
        let rows = datapath.tables().unwrap().services.entries().unwrap();
        assert_eq!(rows.iter().filter(|(_, row)| row.count == u32::from(BACKENDS) - 1).count(), 1);
        cleanup(&config.bpffs).unwrap();
    });
}

#[test]
fn full_table_is_reported_and_other_services_are_applied() {
    in_fresh_netns(|| async {
        let directory = tempfile::tempdir().unwrap();
        let config = DatapathConfig {
            bpffs: directory.path().join("bpf"),
            node: NodeConfig::default(),
            capacity: Capacity { flows: 512, services: 8, ..Capacity::default() },
            log: EbpfLog::Off,
            tc: TcHooks::Auto,
            xdp: XdpUse::Off,
        };
        let datapath = Datapath::load(&config).unwrap();
        let (store, changes) = store(5);
        let (sender, _kernel) = mpsc::unbounded_channel();
        let mut agent = Reconciler::new(datapath.tables().unwrap(), sender);
        agent.adopt().unwrap();
        agent.apply_changes(&store, &changes);
        let now = Instant::now();
        while agent.work(now).is_some_and(|due| due <= now) {}
        let problems = agent.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].subject, "Service default/service-4");
        assert_eq!(problems[0].message, "table SERVICES is full (8 entries)");
        assert_eq!(agent.services(&store).len(), 4);
        cleanup(&config.bpffs).unwrap();
    });
}

#[test]
fn agent_routes_are_updated_and_foreign_routes_are_kept() {
    in_fresh_netns(|| async {
        ip("link add eth0 type veth peer name eth0-peer");
        ip("addr add 192.168.1.1/24 dev eth0");
        ip("link set eth0-peer up");
        ip("link set eth0 up");
        ip("route add 10.1.9.0/24 via 192.168.1.9");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let route = |destination: &str, hop: &str| KernelRoute {
            gateway: Some(hop.parse().unwrap()),
            ..KernelRoute::on_link(destination.parse().unwrap(), ifindex)
        };
        // left by an earlier agent: a current route, one with another next hop, one of a removed
        // node
        for (destination, hop) in
            [("10.1.1.0/24", "192.168.1.2"), ("10.1.2.0/24", "192.168.1.2"), ("10.1.3.0/24", "192.168.1.3")]
        {
            netlink.ensure_route(&route(destination, hop)).await.unwrap();
        }
        let (sender, updates) = mpsc::unbounded_channel();
        let (routes, problems) = KernelRoutes::new(netlink.clone(), updates);
        let wanted =
            [("10.1.1.0/24", "192.168.1.2"), ("10.1.2.0/24", "192.168.1.4"), ("10.1.4.0/24", "10.99.0.1")];
        for (destination, hop) in wanted {
            sender.send(KernelUpdate::Ensure(route(destination, hop))).unwrap();
        }
        sender.send(KernelUpdate::Sweep(KernelSweep::Nodes)).unwrap();
        let mut published = problems.clone();
        let running = tokio::spawn(routes.run());
        published.wait_for(|problems| !problems.is_empty()).await.unwrap();
        drop(sender);
        running.await.unwrap();

        let shown = ip("route show proto 218");
        let lines: Vec<_> = shown.lines().map(|line| line.split(" metric").next().unwrap().trim()).collect();
        assert_eq!(lines, ["10.1.1.0/24 via 192.168.1.2 dev eth0", "10.1.2.0/24 via 192.168.1.4 dev eth0"]);
        assert!(ip("route show").contains("10.1.9.0/24 via 192.168.1.9"), "a foreign route is kept");
        let problems = problems.borrow();
        assert_eq!(problems[0].subject, "route 10.1.4.0/24");
    });
}
