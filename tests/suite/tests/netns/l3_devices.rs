//! Uplinks other than Ethernet devices of a machine: tun devices, as VPNs have them, whose packets
//! have no Ethernet header; and tap devices with virtio headers, whose large frames have not been
//! counted in segments.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{
        Backend, Checks, Cluster, ECHO_PORT, Family, Layer, Namespace, Place, Routing, Segment, Service,
        Spec, TunTap, WEB_PORT, failures, names, outside,
    },
    traffic::{ECHO, HTTP},
};

use super::devices::{NODE_ECHO, NODE_WEB, apply, node_port_service};

/// Bytes of a response that takes many packets.
const LARGE: usize = 1 << 20;

/// Addresses of a machine in the network of the tun or tap devices.
const fn tunnel_addresses(host: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(172, 20, 0, host)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, host as u16)),
    ]
}

/// Addresses of a machine in the second segment.
const fn second_segment(host: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(172, 19, 0, host)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, host as u16)),
    ]
}

fn remove_backends(cluster: &mut Cluster, service: Service) -> Result<()> {
    let objects = node_port_service(&Service { backends: Vec::new(), ..service });
    // the Service object stays the same
    cluster.change(objects.len() - 1, |cluster| cluster.apply_objects("web", &objects))
}

/// Without backends, the service refuses at once: the ICMP error finds its way.
fn expect_refused(client: &Place, address: IpAddr, port: u16) -> Result<()> {
    let requests = client.get(SocketAddr::new(address, port), 1)?;
    let found = failures(&requests);
    ensure!(found.keys().eq(["refused"]), "{address}: {found:?}, not refused");
    Ok(())
}

/// The service answers requests with small and large responses, and datagrams, at `address`: with
/// every one of these servers.
fn expect_service(client: &Place, address: IpAddr, ports: [u16; 2], servers: &[&str]) -> Result<()> {
    let web = SocketAddr::new(address, ports[0]);
    let mut requests = client.get(web, 20 * servers.len() as u32)?;
    let seen: Vec<_> = names(&requests).into_keys().collect();
    ensure!(seen == servers, "{address}: answers of {seen:?}, not {servers:?}");
    requests.extend(client.get_bytes(web, 4, LARGE)?);
    ensure!(failures(&requests).is_empty(), "{address}: {:?}", failures(&requests));
    let echo = SocketAddr::new(address, ports[1]);
    client.send(echo, 10, &[])?.check()
}

/// Datagrams in fragments are answered. The first may tell its sender the MTU of the path
/// (RFC 8201).
fn expect_fragments(client: &Place, echo: SocketAddr) -> Result<()> {
    client.send(echo, 1, &["--size", "4000"])?;
    client.send(echo, 4, &["--size", "4000"])?.check()
}

const NODE_PORTS: [u16; 2] = [NODE_WEB, NODE_ECHO];
const SERVICE_PORTS: [u16; 2] = [WEB_PORT, ECHO_PORT];

fn expect_uplink(cluster: &Cluster, node: usize, device: &str) -> Result<()> {
    let status = cluster.nodes()[node].agent().status()?.status;
    let found = status.uplinks.iter().find(|uplink| uplink.device == device);
    ensure!(found.is_some(), "{device} is no uplink: {:?}", status.other_devices);
    Ok(())
}

fn expect_no_drops(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let outcomes = node.agent().status()?.outcomes;
        let drops: Vec<_> = outcomes.iter().filter(|count| count.dropped && count.packets > 0).collect();
        ensure!(drops.is_empty(), "{}: {drops:?}", node.name());
    }
    Ok(())
}

/// A node whose default route leads into a VPN.
#[test]
fn default_route_by_a_tun_device() -> Result<()> {
    let spec = Spec { connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    let gateway = cluster.fabric().gateway().clone();
    let host = cluster.nodes()[0].place().namespace().clone();
    let _link = TunTap::create(Layer::Tun, (&host, "tun0"), (&gateway, "tun0"))?;
    let (address, router) = (tunnel_addresses(11), tunnel_addresses(254));
    host.add_addresses("tun0", address)?;
    gateway.add_addresses("tun0", router)?;
    for via in router {
        host.ip(&format!("route replace default via {via} dev tun0"))?;
    }
    cluster.start()?;
    let made = (|| Ok((cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (near, far) = cluster.explain(made)?;
    let external = cluster.outside()?;
    let _servers = [near.serve()?, far.serve()?, external.serve("external")?];
    let service = Service::of(&[&far, &near]);
    apply(&mut cluster, &service)?;

    let mut checks = Checks::of("a node whose default route leads out of a tun device");
    checks.that("the tun device is an uplink", || expect_uplink(&cluster, 0, "tun0"));
    for family in Family::BOTH {
        let web = SocketAddr::new(outside(family), HTTP);
        checks.that(format!("pod to outside, TCP ({family})"), || {
            near.place().get_as(web, 5, Some("external"), family.of(address))?;
            let large = near.place().get_bytes(web, 4, LARGE)?;
            ensure!(failures(&large).is_empty(), "{:?}", failures(&large));
            Ok(())
        });
        checks.that(format!("pod to outside, UDP ({family})"), || {
            let echo = SocketAddr::new(outside(family), ECHO);
            near.place().send(echo, 5, &[])?.check()?;
            near.place().send(echo, 4, &["--size", "4000"])?.check()
        });
        checks.that(format!("pod to outside, ping ({family})"), || {
            near.place().ping(outside(family), 3, 100)?.check()?;
            near.place().ping(outside(family), 3, 1_400)?.check()
        });
        checks.that(format!("host to outside ({family})"), || {
            let place = cluster.nodes()[0].place();
            place.get_as(web, 5, Some("external"), family.of(address))
        });
        checks.that(format!("node port at the address of the tun device ({family})"), || {
            let address = family.of(address);
            expect_service(&external, address, NODE_PORTS, &["far", "near"])?;
            expect_fragments(&external, SocketAddr::new(address, NODE_ECHO))
        });
        checks.that(format!("node port at the address of the other device ({family})"), || {
            expect_service(&external, cluster.nodes()[0].address(family), NODE_PORTS, &["far", "near"])
        });
    }
    checks.that("nothing was dropped", || expect_no_drops(&cluster));
    remove_backends(&mut cluster, service)?;
    for family in Family::BOTH {
        checks.that(format!("refusal to a client outside ({family})"), || {
            expect_refused(&external, family.of(address), NODE_WEB)
        });
    }
    checks.finish(&cluster)
}

#[test]
fn nodes_connected_by_tun_devices_with_native_routing() -> Result<()> {
    nodes_connected_by_tun_devices(Routing::Native)
}

#[test]
fn nodes_connected_by_tun_devices_with_an_overlay() -> Result<()> {
    nodes_connected_by_tun_devices(Routing::Vxlan)
}

/// A mesh VPN: the nodes' InternalIPs are in it.
fn nodes_connected_by_tun_devices(routing: Routing) -> Result<()> {
    let spec = Spec { routing, connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    let hosts: Vec<Namespace> = cluster.nodes().iter().map(|node| node.place().namespace().clone()).collect();
    let _link = TunTap::create(Layer::Tun, (&hosts[0], "tun0"), (&hosts[1], "tun0"))?;
    for (index, host) in hosts.iter().enumerate() {
        let [v4, v6] = cluster.nodes()[index].addresses();
        host.ip(&format!("addr del {v4}/24 dev eth0\naddr del {v6}/64 dev eth0"))?;
        host.add_addresses("tun0", [v4, v6])?;
        // and a default route by another device
        cluster.add_device(index, "eth1", Segment::SECOND)?;
        host.add_addresses("eth1", second_segment(11 + index as u8))?;
        for via in second_segment(254) {
            host.ip(&format!("route replace default via {via} dev eth1"))?;
        }
    }
    cluster.start()?;
    let made = (|| Ok((cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (near, far) = cluster.explain(made)?;
    let _servers = [near.serve()?, far.serve()?];
    let service = Service::of(&[&far, &near]);
    apply(&mut cluster, &service)?;
    let cluster_ips = Family::BOTH.map(|family| service.at(family, 0).ip());
    let nodes = cluster.nodes();

    let mut checks = Checks::of(format!("nodes connected by tun devices, {}", spec.describe()));
    checks.that("the tun devices are uplinks", || {
        expect_uplink(&cluster, 0, "tun0")?;
        expect_uplink(&cluster, 1, "tun0")
    });
    for family in Family::BOTH {
        checks.that(format!("pod to a pod of the other node ({family})"), || {
            near.place().get_as(far.web(family), 5, Some("far"), near.address(family))?;
            let large = near.place().get_bytes(far.web(family), 4, LARGE)?;
            ensure!(failures(&large).is_empty(), "{:?}", failures(&large));
            near.place().ping(far.address(family), 3, 1_300)?.check()
        });
        checks.that(format!("host to a pod of the other node ({family})"), || {
            let requests = nodes[0].place().get(far.web(family), 5)?;
            ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
            Ok(())
        });
        checks.that(format!("pod to a service with backends on both nodes ({family})"), || {
            expect_service(near.place(), service.at(family, 0).ip(), SERVICE_PORTS, &["far", "near"])?;
            expect_fragments(near.place(), service.at(family, ECHO_PORT))
        });
        checks.that(format!("host to a service with backends on both nodes ({family})"), || {
            expect_service(nodes[0].place(), service.at(family, 0).ip(), SERVICE_PORTS, &["far", "near"])?;
            // the host does not know the smaller MTU behind the tunnel
            let is_native = routing == Routing::Native;
            if is_native { expect_fragments(nodes[0].place(), service.at(family, ECHO_PORT)) } else { Ok(()) }
        });
        for (index, node) in nodes.iter().enumerate() {
            checks.that(format!("node port of node {index}, for the host of node 0 ({family})"), || {
                expect_service(nodes[0].place(), node.address(family), NODE_PORTS, &["far", "near"])
            });
        }
    }
    remove_backends(&mut cluster, service)?;
    for family in Family::BOTH {
        let [host, other] = [0, 1].map(|index| &cluster.nodes()[index]);
        checks.that(format!("refusal by the other node ({family})"), || {
            expect_refused(host.place(), other.address(family), NODE_WEB)
        });
        // the host's own packet leaves by the tun device
        host.place().namespace().ip(&format!("route replace {} dev tun0", cluster_ips[family as usize]))?;
        checks.that(format!("refusal to a process of the node ({family})"), || {
            expect_refused(host.place(), cluster_ips[family as usize], WEB_PORT)
        });
    }
    checks.finish(&cluster)
}

/// What a virtual machine behind a tap device sends in one frame is as large as its TCP likes, and
/// nobody has counted its segments.
#[test]
fn container_behind_a_tap_device_with_virtio_header() -> Result<()> {
    let spec = Spec { connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    let host = cluster.nodes()[0].place().namespace().clone();
    host.ip("link add br0 type bridge\nlink set br0 up")?;
    let (bridge, guest_addresses) = (tunnel_addresses(1), tunnel_addresses(2));
    host.add_addresses("br0", bridge)?;
    let guest = cluster.container(0, "unused", "br0")?;
    let _link = TunTap::create(Layer::Tap, (&host, "tap0"), (guest.namespace(), "tap0"))?;
    host.ip("link set tap0 master br0")?;
    guest.namespace().add_addresses("tap0", guest_addresses)?;
    for via in bridge {
        guest.namespace().ip(&format!("route add default via {via}"))?;
    }
    cluster.start()?;
    let made = (|| Ok((cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (near, far) = cluster.explain(made)?;
    let external = cluster.outside()?;
    let _servers = [near.serve()?, far.serve()?, guest.serve("guest")?];
    let backend = Backend {
        addresses: guest_addresses.to_vec(),
        node: cluster.nodes()[0].name().to_owned(),
        ..near.backend()
    };
    let service = Service { backends: vec![backend], ..Service::of(&[&near]) };
    apply(&mut cluster, &service)?;
    let nodes = cluster.nodes();

    let mut checks = Checks::of("a guest behind a tap device");
    for family in Family::BOTH {
        let at = service.at(family, 0).ip();
        checks.that(format!("node port for a client outside ({family})"), || {
            expect_service(&external, nodes[0].address(family), NODE_PORTS, &["guest"])?;
            expect_fragments(&external, SocketAddr::new(nodes[0].address(family), NODE_ECHO))
        });
        checks.that(format!("service for a pod ({family})"), || {
            expect_service(near.place(), at, SERVICE_PORTS, &["guest"])
        });
        checks.that(format!("pod to the guest ({family})"), || {
            let web = SocketAddr::new(family.of(guest_addresses), HTTP);
            near.place().get_as(web, 5, Some("guest"), family.of(bridge))?;
            let large = near.place().get_bytes(web, 4, LARGE)?;
            ensure!(failures(&large).is_empty(), "{:?}", failures(&large));
            Ok(())
        });
    }
    checks.that("nothing was dropped", || expect_no_drops(&cluster));
    checks.finish(&cluster)
}
