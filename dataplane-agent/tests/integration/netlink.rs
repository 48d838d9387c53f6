//! Tests of links, routes, neighbours, addresses and sysctls on the kernel, in network namespaces.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use dataplane_agent::netlink::{KernelRoute, Neighbour, Netlink, OverlayDevice, ReservedPorts, sysctl};
use dataplane_common::abi::MacAddr;
use tokio::time::timeout;

use crate::netns::{in_fresh_netns, ip};

const MAC: MacAddr = MacAddr::new([0x0e, 0xda, 0x7a, 0, 0, 2]);

fn overlay() -> OverlayDevice {
    OverlayDevice { name: "dataplane0".to_owned(), port: 8_472, mtu: 1_450, mac: MAC }
}

pub(crate) fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn device(name: &str, address: &str) {
    // a veth pair with both ends in this namespace: not every kernel has dummy devices
    ip(&format!("link add {name} type veth peer name {name}-peer"));
    ip(&format!("addr add {address} dev {name}"));
    ip(&format!("link set {name}-peer up"));
    ip(&format!("link set {name} up"));
}

#[test]
fn overlay_device_is_created_once() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let made = netlink.ensure_overlay(&overlay()).await.unwrap();
        assert!(made.up && made.noarp);
        assert_eq!((made.mtu, made.mac), (1_450, Some(MAC)));
        let shown = ip("-d link show dataplane0");
        for expected in ["vxlan external", "dstport 8472", "nolearning", "udp6zerocsumrx", "NOARP"] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        assert_eq!(netlink.ensure_overlay(&overlay()).await.unwrap(), made);
    });
}

#[test]
fn overlay_device_has_no_address() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let made = netlink.ensure_overlay(&overlay()).await.unwrap();
        let addresses = netlink.addresses().await.unwrap();
        assert!(addresses.iter().all(|address| address.ifindex != made.ifindex), "{addresses:?}");
    });
}

#[test]
fn changed_overlay_device_is_repaired_in_place() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let made = netlink.ensure_overlay(&overlay()).await.unwrap();
        ip("link set dataplane0 down mtu 1280 arp on address 02:00:00:00:00:01");
        assert_eq!(netlink.ensure_overlay(&overlay()).await.unwrap(), made);
    });
}

#[test]
fn overlay_device_with_another_port_is_recreated() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let before = netlink.ensure_overlay(&overlay()).await.unwrap();
        let device = OverlayDevice { port: 4_789, ..overlay() };
        let after = netlink.ensure_overlay(&device).await.unwrap();
        assert_ne!(after.ifindex, before.ifindex);
        assert!(ip("-d link show dataplane0").contains("dstport 4789"));
    });
}

#[test]
fn foreign_device_with_the_name_of_the_overlay_is_not_touched() {
    in_fresh_netns(|| async {
        device("dataplane0", "10.9.9.9/24");
        let error = Netlink::connect().unwrap().ensure_overlay(&overlay()).await.unwrap_err();
        assert!(error.to_string().contains("not a VXLAN device"), "{error}");
        assert!(ip("-d link show dataplane0").contains("veth"));
    });
}

#[test]
fn routes_are_replaced_listed_and_removed() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        ip("addr add fd00::5/64 dev eth0 nodad");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let route = |destination: &str, gateway: Option<&str>| KernelRoute {
            gateway: gateway.map(addr),
            ..KernelRoute::on_link(destination.parse().unwrap(), ifindex)
        };
        let mut wanted = vec![
            route("10.244.1.0/24", Some("10.0.0.9")),
            KernelRoute { mtu: Some(1_450), source: Some(addr("10.0.0.5")), ..route("10.244.2.0/24", None) },
            route("10.244.3.0/24", Some("fd00::9")),
            route("10.244.0.7/32", None),
            route("fd01:1::/64", Some("fd00::9")),
            KernelRoute { source: Some(addr("fd00::5")), ..route("fd01:2::7/128", None) },
        ];
        for route in &wanted {
            netlink.ensure_route(route).await.unwrap();
            netlink.ensure_route(route).await.unwrap();
        }
        wanted.sort_unstable();
        let mut routes = netlink.agent_routes().await.unwrap();
        routes.sort_unstable();
        assert_eq!(routes, wanted);

        // another next hop replaces the route
        for destination in ["10.244.1.0/24", "fd01:1::/64"] {
            let hop = if destination.contains(':') { "fd00::8" } else { "10.0.0.8" };
            netlink.ensure_route(&route(destination, Some(hop))).await.unwrap();
        }
        let routes = netlink.agent_routes().await.unwrap();
        assert_eq!(routes.len(), wanted.len(), "{routes:?}");
        assert!(routes.contains(&route("10.244.1.0/24", Some("10.0.0.8"))));
        assert!(routes.contains(&route("fd01:1::/64", Some("fd00::8"))));

        for route in &wanted {
            netlink.remove_route(route.destination).await.unwrap();
            netlink.remove_route(route.destination).await.unwrap();
        }
        assert_eq!(netlink.agent_routes().await.unwrap(), []);
    });
}

#[test]
fn foreign_route_to_the_same_prefix_is_kept() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        ip("route add 10.244.1.0/24 via 10.0.0.77");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let route = KernelRoute::on_link("10.244.1.0/24".parse().unwrap(), ifindex);
        netlink.ensure_route(&route).await.unwrap();
        assert_eq!(netlink.agent_routes().await.unwrap(), [route]);
        netlink.remove_route(route.destination).await.unwrap();
        assert!(ip("route show 10.244.1.0/24").contains("via 10.0.0.77"));
    });
}

#[test]
fn neighbours_are_permanent_and_replaced() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        for address in ["10.244.0.7", "fd01::7"] {
            let neighbour = Neighbour { ifindex, address: addr(address), mac: MAC };
            let moved = Neighbour { mac: MacAddr::new([2, 0, 0, 0, 0, 9]), ..neighbour };
            netlink.ensure_neighbour(&neighbour).await.unwrap();
            netlink.ensure_neighbour(&moved).await.unwrap();
            assert_eq!(netlink.permanent_neighbours(ifindex).await.unwrap(), [moved]);
            netlink.remove_neighbour(ifindex, addr(address)).await.unwrap();
            netlink.remove_neighbour(ifindex, addr(address)).await.unwrap();
            assert_eq!(netlink.permanent_neighbours(ifindex).await.unwrap(), []);
        }
    });
}

#[test]
fn monitor_reports_addresses_but_not_routes_of_the_agent() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let mut monitor = Netlink::monitor().unwrap();
        let route = KernelRoute::on_link("10.244.1.0/24".parse().unwrap(), ifindex);
        netlink.ensure_route(&route).await.unwrap();
        ip("addr add 10.0.0.6/24 dev eth0");
        let mut seen = false;
        while !seen {
            let change = timeout(Duration::from_secs(10), monitor.changed())
                .await
                .expect("a change is reported")
                .unwrap();
            seen = change.addresses;
        }
        let addresses = netlink.host_addresses().await.unwrap();
        assert!(addresses.iter().any(|address| address.ip() == addr("10.0.0.6")), "{addresses:?}");
        assert!(addresses.iter().all(|address| !address.ip().is_loopback()));
    });
}

#[test]
fn sysctls_are_set_once_and_reported() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        sysctl::set("net/ipv4/ip_forward", "0").unwrap();
        sysctl::set("net/ipv6/conf/eth0/accept_ra", "1").unwrap();
        let changes = sysctl::prepare_node(&["eth0", "not-there"], "dataplane0").unwrap();
        let keys: Vec<_> = changes.iter().map(|change| change.key.as_str()).collect();
        assert!(keys.contains(&"net/ipv4/ip_forward"), "{keys:?}");
        assert!(keys.contains(&"net/ipv6/conf/eth0/accept_ra"), "{keys:?}");
        assert_eq!(sysctl::get("net/ipv4/ip_forward").unwrap().as_deref(), Some("1"));
        assert_eq!(sysctl::prepare_node(&["eth0"], "dataplane0").unwrap(), []);
    });
}

#[test]
fn only_ports_of_the_agent_are_released() {
    in_fresh_netns(|| async {
        // longer than the kernel returns in small reads, or accepts in one write
        let others: Vec<String> = (0..2_000).map(|number| (10_000 + 2 * number).to_string()).collect();
        let others = others.join(",");
        sysctl::set("net/ipv4/ip_local_reserved_ports", &others).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let masquerade: BTreeSet<u16> = (61_000..=65_535).collect();
        let with_port: BTreeSet<u16> = masquerade.iter().copied().chain([10_000, 40_000]).collect();

        let mut ports = ReservedPorts::open(run_dir.path());
        let change = ports.add(&with_port).unwrap().unwrap();
        assert_eq!((change.from, change.to), (others.clone(), format!("{others},40000,61000-65535")));
        assert_eq!(ports.set(&with_port).unwrap(), None, "the same list in the kernel's format");

        let mut ports = ReservedPorts::open(run_dir.path());
        assert_eq!(ports.add(&masquerade).unwrap(), None, "ports that are reserved already stay");
        let change = ports.set(&masquerade).unwrap().unwrap();
        assert_eq!(change.to, format!("{others},61000-65535"));
        assert_eq!(ReservedPorts::open(run_dir.path()).set(&BTreeSet::new()).unwrap().unwrap().to, others);

        sysctl::set("net/ipv4/ip_local_reserved_ports", "\n").unwrap();
        ports.set(&masquerade).unwrap();
        assert_eq!(ports.set(&BTreeSet::new()).unwrap().unwrap().to, "", "the last port is released");
        assert_eq!(ports.set(&BTreeSet::new()).unwrap(), None);
    });
}

/// Ubuntu sets it to 2 for all devices.
#[test]
fn reverse_path_filter_moves_from_all_to_the_devices() {
    in_fresh_netns(|| async {
        let value = |device: &str| sysctl::get(&format!("net/ipv4/conf/{device}/rp_filter")).unwrap();
        for (device, own) in [("all", "2"), ("default", "0"), ("lo", "1")] {
            sysctl::set(&format!("net/ipv4/conf/{device}/rp_filter"), own).unwrap();
        }
        sysctl::prepare_node(&[], "dataplane0").unwrap();
        let after = ["all", "default", "lo"].map(|device| value(device).unwrap());
        assert_eq!(after, ["0", "2", "2"], "nothing changes for the devices");
        let again = sysctl::prepare_node(&[], "dataplane0").unwrap();
        assert!(again.iter().all(|change| !change.key.ends_with("rp_filter")), "{again:?}");
    });
}

#[test]
fn concurrent_and_cancelled_dumps_do_not_disturb_others() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        // the response needs several messages, so that the dump takes a while
        for number in 0..120 {
            ip(&format!("link add many{number} type veth peer name many{number}-peer"));
        }
        let lists = (0..16).map(|_| async { netlink.links().await.map(|links| links.len()) });
        let counts = futures::future::try_join_all(lists).await.unwrap();
        assert!(counts.iter().all(|count| *count == 241), "{counts:?}");
        for _ in 0..16 {
            // dropped after the request has been sent
            let _given_up = timeout(Duration::from_micros(50), netlink.links()).await;
            assert_eq!(netlink.links().await.unwrap().len(), 241);
        }
    });
}
