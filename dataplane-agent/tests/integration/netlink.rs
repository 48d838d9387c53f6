//! Devices, routes, neighbours, addresses and sysctls, against the kernel, in network namespaces.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use dataplane_agent::netlink::{
    KernelRoute, Neighbour, Netlink, OverlayDevice, ReservedPorts, UplinkError, Uplinks, sysctl,
};
use dataplane_common::abi::MacAddr;
use tokio::time::timeout;

use crate::netns::{in_fresh_netns, ip};

const MAC: MacAddr = MacAddr::new([0x0e, 0xda, 0x7a, 0, 0, 2]);

fn overlay() -> OverlayDevice {
    OverlayDevice { name: "dataplane0".to_owned(), port: 8_472, mtu: 1_450, mac: MAC }
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn device(name: &str, address: &str) {
    // a cable with both ends here: not every kernel has dummy devices
    ip(&format!("link add {name} type veth peer name {name}-peer"));
    ip(&format!("addr add {address} dev {name}"));
    ip(&format!("link set {name}-peer up"));
    ip(&format!("link set {name} up"));
}

#[test]
fn the_overlay_device_is_made_once() {
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
fn the_overlay_device_has_no_address_of_its_own() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let made = netlink.ensure_overlay(&overlay()).await.unwrap();
        let addresses = netlink.addresses().await.unwrap();
        assert!(addresses.iter().all(|address| address.ifindex != made.ifindex), "{addresses:?}");
    });
}

#[test]
fn a_spoiled_overlay_device_is_mended_in_place() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let made = netlink.ensure_overlay(&overlay()).await.unwrap();
        ip("link set dataplane0 down mtu 1280 arp on address 02:00:00:00:00:01");
        assert_eq!(netlink.ensure_overlay(&overlay()).await.unwrap(), made);
    });
}

#[test]
fn an_overlay_device_on_another_port_is_made_anew() {
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
fn a_foreign_device_with_the_overlays_name_is_left_alone() {
    in_fresh_netns(|| async {
        device("dataplane0", "10.9.9.9/24");
        let error = Netlink::connect().unwrap().ensure_overlay(&overlay()).await.unwrap_err();
        assert!(error.to_string().contains("no VXLAN"), "{error}");
        assert!(ip("-d link show dataplane0").contains("veth"));
    });
}

#[test]
fn the_uplink_is_where_the_nodes_address_is() {
    in_fresh_netns(|| async {
        device("eth0", "192.168.1.5/24");
        device("eth1", "10.0.0.5/16");
        ip("addr add fd00::5/64 dev eth1 nodad");
        ip("route add default via 192.168.1.1");
        let netlink = Netlink::connect().unwrap();
        let uplinks =
            netlink.uplinks(&Uplinks::Auto, &[addr("10.0.0.5"), addr("fd00::5")], "").await.unwrap();
        let [uplink] = uplinks.as_slice() else { panic!("{uplinks:?}") };
        assert_eq!(uplink.name, "eth1");
        assert_eq!(uplink.mtu, 1_500);
        assert!(uplink.mac.is_some());
        assert!(uplink.reaches(addr("10.0.9.9")) && uplink.reaches(addr("fd00::9")));
        assert!(!uplink.reaches(addr("192.168.1.1")));
    });
}

#[test]
fn without_the_nodes_address_the_default_route_tells_the_uplink() {
    in_fresh_netns(|| async {
        device("eth0", "192.168.1.5/24");
        device("eth1", "10.0.0.5/16");
        ip("route add default via 10.0.0.1 metric 50");
        ip("route add default via 192.168.1.1 metric 100");
        let netlink = Netlink::connect().unwrap();
        let uplinks = netlink.uplinks(&Uplinks::Auto, &[addr("203.0.113.1")], "").await.unwrap();
        assert_eq!(uplinks.iter().map(|uplink| uplink.name.as_str()).collect::<Vec<_>>(), ["eth1"]);
    });
}

#[test]
fn a_missing_uplink_is_named() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        let named = Uplinks::Named(vec!["eth7".to_owned()]);
        let error = netlink.uplinks(&named, &[], "").await.unwrap_err();
        assert!(matches!(&error, UplinkError::NoDevice(name) if name == "eth7"), "{error}");
        let error = netlink.uplinks(&Uplinks::Auto, &[addr("10.0.0.5")], "").await.unwrap_err();
        assert!(error.to_string().contains("10.0.0.5"), "{error}");
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
        let mut ours = netlink.our_routes().await.unwrap();
        ours.sort_unstable();
        assert_eq!(ours, wanted);

        // the next hop moves: replaced, not added
        for destination in ["10.244.1.0/24", "fd01:1::/64"] {
            let hop = if destination.contains(':') { "fd00::8" } else { "10.0.0.8" };
            netlink.ensure_route(&route(destination, Some(hop))).await.unwrap();
        }
        let ours = netlink.our_routes().await.unwrap();
        assert_eq!(ours.len(), wanted.len(), "{ours:?}");
        assert!(ours.contains(&route("10.244.1.0/24", Some("10.0.0.8"))));
        assert!(ours.contains(&route("fd01:1::/64", Some("fd00::8"))));

        for route in &wanted {
            netlink.remove_route(route.destination).await.unwrap();
            netlink.remove_route(route.destination).await.unwrap();
        }
        assert_eq!(netlink.our_routes().await.unwrap(), []);
    });
}

#[test]
fn a_foreign_route_to_the_same_prefix_survives() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        ip("route add 10.244.1.0/24 via 10.0.0.77");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let ours = KernelRoute::on_link("10.244.1.0/24".parse().unwrap(), ifindex);
        netlink.ensure_route(&ours).await.unwrap();
        assert_eq!(netlink.our_routes().await.unwrap(), [ours]);
        netlink.remove_route(ours.destination).await.unwrap();
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
fn the_monitor_tells_of_addresses_and_not_of_our_routes() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        let netlink = Netlink::connect().unwrap();
        let ifindex = netlink.link("eth0").await.unwrap().unwrap().ifindex;
        let mut monitor = Netlink::monitor().unwrap();
        let ours = KernelRoute::on_link("10.244.1.0/24".parse().unwrap(), ifindex);
        netlink.ensure_route(&ours).await.unwrap();
        ip("addr add 10.0.0.6/24 dev eth0");
        let mut seen = false;
        while !seen {
            let change =
                timeout(Duration::from_secs(10), monitor.changed()).await.expect("news comes").unwrap();
            seen = change.addresses;
        }
        let addresses = netlink.host_addresses().await.unwrap();
        assert!(addresses.iter().any(|address| address.ip() == addr("10.0.0.6")), "{addresses:?}");
        assert!(addresses.iter().all(|address| !address.ip().is_loopback()));
    });
}

#[test]
fn sysctls_are_set_once_and_told() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/24");
        sysctl::set("net/ipv4/ip_forward", "0").unwrap();
        sysctl::set("net/ipv6/conf/eth0/accept_ra", "1").unwrap();
        let changes = sysctl::prepare_node(&["eth0", "not-there"]).unwrap();
        let keys: Vec<_> = changes.iter().map(|change| change.key.as_str()).collect();
        assert!(keys.contains(&"net/ipv4/ip_forward"), "{keys:?}");
        assert!(keys.contains(&"net/ipv6/conf/eth0/accept_ra"), "{keys:?}");
        assert_eq!(sysctl::get("net/ipv4/ip_forward").unwrap().as_deref(), Some("1"));
        assert_eq!(sysctl::prepare_node(&["eth0"]).unwrap(), []);
    });
}

#[test]
fn reserved_ports_are_released_by_whom_they_were_reserved_for_and_those_of_others_stay() {
    in_fresh_netns(|| async {
        // longer than the kernel says in small reads, or takes in one write
        let others: Vec<String> = (0..2_000).map(|number| (10_000 + 2 * number).to_string()).collect();
        let others = others.join(",");
        sysctl::set("net/ipv4/ip_local_reserved_ports", &others).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let masquerade: BTreeSet<u16> = (61_000..=65_535).collect();
        let with_port: BTreeSet<u16> = masquerade.iter().copied().chain([10_000, 40_000]).collect();

        let mut ports = ReservedPorts::open(run_dir.path());
        let change = ports.add(&with_port).unwrap().unwrap();
        assert_eq!((change.from, change.to), (others.clone(), format!("{others},40000,61000-65535")));
        assert_eq!(ports.set(&with_port).unwrap(), None, "as the kernel writes it");

        let mut ports = ReservedPorts::open(run_dir.path());
        assert_eq!(ports.add(&masquerade).unwrap(), None, "not everything is known yet");
        let change = ports.set(&masquerade).unwrap().unwrap();
        assert_eq!(change.to, format!("{others},61000-65535"));
        assert_eq!(ReservedPorts::open(run_dir.path()).set(&BTreeSet::new()).unwrap().unwrap().to, others);

        sysctl::set("net/ipv4/ip_local_reserved_ports", "\n").unwrap();
        ports.set(&masquerade).unwrap();
        assert_eq!(ports.set(&BTreeSet::new()).unwrap().unwrap().to, "", "the last one goes too");
        assert_eq!(ports.set(&BTreeSet::new()).unwrap(), None);
    });
}

#[test]
fn a_strict_reverse_path_filter_is_reported_and_left_alone() {
    in_fresh_netns(|| async {
        sysctl::set("net/ipv4/conf/all/rp_filter", "1").unwrap();
        assert!(sysctl::problems().unwrap().iter().any(|problem| problem.contains("rp_filter")));
        assert_eq!(sysctl::get("net/ipv4/conf/all/rp_filter").unwrap().as_deref(), Some("1"));
    });
}

#[test]
fn lists_asked_for_at_once_and_lists_given_up_are_no_trouble_to_others() {
    in_fresh_netns(|| async {
        let netlink = Netlink::connect().unwrap();
        // more than one message of answers, so that a dump is under way for a while
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
