//! Which devices are uplinks, and their source addresses, on the kernel, in network namespaces.

use std::collections::BTreeSet;

use dataplane_agent::netlink::{DevicePatterns, Netlink, NodeDevices};

use crate::{
    netlink::{addr, device},
    netns::{in_fresh_netns, ip},
};

/// The uplinks found automatically, and the reasons why the other devices are none.
async fn devices(internal_ip: &str, before: &BTreeSet<u32>) -> NodeDevices {
    let netlink = Netlink::connect().unwrap();
    netlink.devices(&DevicePatterns::default(), &[addr(internal_ip)], "dataplane0", before).await.unwrap()
}

fn names(devices: &NodeDevices) -> Vec<&str> {
    devices.uplinks.iter().map(|uplink| uplink.name.as_str()).collect()
}

fn reason<'a>(devices: &'a NodeDevices, name: &str) -> &'a str {
    &devices.choices.iter().find(|choice| choice.name == name).unwrap().reason
}

#[test]
fn uplinks_are_the_devices_with_addresses_that_of_the_internal_ip_first() {
    in_fresh_netns(|| async {
        device("eth0", "192.168.1.5/24");
        device("eth1", "10.0.0.5/16");
        ip("addr add fd00::5/64 dev eth1 nodad");
        ip("addr add 10.0.0.4/16 dev eth1");
        ip("route add default via 192.168.1.1");
        let devices = devices("10.0.0.4", &BTreeSet::new()).await;
        assert_eq!(names(&devices), ["eth1", "eth0"]);
        let [eth1, eth0] = devices.uplinks.as_slice() else { panic!("{devices:?}") };
        assert_eq!((eth1.mtu, eth1.mac.is_some(), eth1.bridge), (1_500, true, false));
        assert_eq!(eth1.reaches(addr("10.0.9.9")), Some(16));
        assert_eq!(eth1.reaches(addr("fd00::9")), Some(64));
        assert_eq!(eth1.reaches(addr("192.168.1.1")), None);
        // the InternalIP, although the kernel would choose the first address
        assert_eq!(eth1.sources, [addr("10.0.0.4"), addr("fd00::5")]);
        assert_eq!(eth0.sources, [addr("192.168.1.5")]);
        assert_eq!(reason(&devices, "lo"), "loopback device");
        assert_eq!(devices.warnings, [] as [&str; 0]);
    });
}

#[test]
fn source_is_the_one_that_the_route_prefers() {
    in_fresh_netns(|| async {
        ip("addr add 10.9.9.9/32 dev lo");
        device("eth0", "192.168.1.5/24");
        ip("route add default via 192.168.1.1 src 10.9.9.9");
        device("eth1", "10.0.0.5/16");
        let devices = devices("203.0.113.1", &BTreeSet::new()).await;
        let sources: Vec<_> = devices.uplinks.iter().map(|uplink| uplink.sources.as_slice()).collect();
        assert_eq!(sources, [[addr("10.9.9.9")], [addr("10.0.0.5")]]);
    });
}

#[test]
fn device_with_a_route_but_no_address_is_an_uplink() {
    in_fresh_netns(|| async {
        ip("link add br0 type bridge");
        ip("link add br1 type bridge");
        ip("link set br0 up");
        ip("link set br1 up");
        ip("addr add 10.9.9.9/32 dev lo");
        ip("route add 192.0.2.0/24 dev br0");
        let devices = devices("10.9.9.9", &BTreeSet::new()).await;
        assert_eq!(names(&devices), ["br0"]);
        assert_eq!(reason(&devices, "br0"), "routes lead to it");
        assert_eq!(reason(&devices, "br1"), "has no address, and no route leads to it");
        // without an own address, its packets have the InternalIP
        assert_eq!(devices.uplinks[0].sources, [addr("10.9.9.9")]);
    });
}

#[test]
fn uplink_that_goes_down_stays_one() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/16");
        ip("link add br0 type bridge");
        ip("link set br0 up");
        ip("addr add fd00::5/64 dev br0 nodad");
        let up = devices("10.0.0.5", &BTreeSet::new()).await;
        assert_eq!(names(&up), ["eth0", "br0"]);
        let before: BTreeSet<u32> = up.uplinks.iter().map(|uplink| uplink.ifindex).collect();
        // removes its IPv6 addresses
        ip("link set br0 down");
        let down = devices("10.0.0.5", &before).await;
        assert_eq!(names(&down), ["eth0", "br0"]);
        assert_eq!(reason(&down, "br0"), "was an uplink before it went down");
        assert_eq!(names(&devices("10.0.0.5", &BTreeSet::new()).await), ["eth0"]);
    });
}

#[test]
fn device_without_ethernet_header_is_an_uplink() {
    in_fresh_netns(|| async {
        ip("tuntap add mode tun name tun0");
        ip("addr add 10.8.0.5/24 dev tun0");
        ip("link set tun0 up");
        let devices = devices("10.0.0.5", &BTreeSet::new()).await;
        assert_eq!(names(&devices), ["tun0"]);
        assert_eq!(devices.uplinks[0].mac, None);
    });
}

#[test]
fn missing_uplink_is_a_warning() {
    in_fresh_netns(|| async {
        device("eth0", "10.0.0.5/16");
        let netlink = Netlink::connect().unwrap();
        let patterns: DevicePatterns = "eth0,eth7,wlan*".parse().unwrap();
        let devices = netlink.devices(&patterns, &[], "", &BTreeSet::new()).await.unwrap();
        assert_eq!(names(&devices), ["eth0"]);
        assert_eq!(devices.warnings, ["`uplinks` names eth7, which this node does not have"]);
        let patterns: DevicePatterns = "eth7".parse().unwrap();
        let devices = netlink.devices(&patterns, &[], "", &BTreeSet::new()).await.unwrap();
        assert_eq!(names(&devices), [] as [&str; 0]);
        assert_eq!(devices.warnings.len(), 2, "{:?}", devices.warnings);
    });
}

#[test]
fn mtu_is_that_of_the_devices_that_lead_to_other_nodes() {
    in_fresh_netns(|| async {
        device("eth0", "192.168.1.5/24");
        device("eth1", "10.0.0.5/16");
        ip("link set eth0 mtu 1400");
        ip("link set eth1 mtu 1450");
        ip("link add docker0 mtu 1300 type bridge");
        ip("addr add 172.17.0.1/16 dev docker0");
        ip("link set docker0 up");
        ip("route add default via 192.168.1.1");
        let netlink = Netlink::connect().unwrap();
        let devices = devices("10.0.0.5", &BTreeSet::new()).await;
        let mtu = async |others: &[&str]| {
            let others: Vec<_> = others.iter().map(|ip| addr(ip)).collect();
            netlink.node_mtu(&devices.uplinks, &[addr("10.0.0.5")], &others).await.unwrap()
        };
        assert_eq!(mtu(&[]).await, Some(1_450));
        assert_eq!(mtu(&["10.0.0.6", "10.0.0.7"]).await, Some(1_450));
        // by the default route
        assert_eq!(mtu(&["10.0.0.6", "203.0.113.7"]).await, Some(1_400));
        assert_eq!(netlink.node_mtu(&[], &[], &[]).await.unwrap(), None);
    });
}
