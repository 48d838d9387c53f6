//! Path MTU and fragments: a narrow hop on the path, a tunnel with a smaller MTU than the uplink,
//! datagrams of many fragments. ICMP errors reach the sender through every translation.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Backend, Checks, Family, Namespace, Place, Routing, Segment, Spec, outside},
    traffic::report::Request,
};
use serde_json::Value;

use super::{ECHO_PORT, NODE_ECHO, Testbed};

/// MTU of the gateway's routes. The devices of its neighbours have 1,500 bytes.
const NARROW: u32 = 1_400;
/// MTU of a pod with the overlay.
const TUNNEL: u32 = 1_450;
/// A datagram that fits the uplink's MTU, but neither the hop's nor the tunnel's.
const FULL: [&str; 2] = ["--size", "1440"];
/// A datagram of more than 40 fragments, one at a time: the socket buffer has room for two.
const LARGE: [&str; 3] = ["--size", "60000", "--fresh"];
const BULK: usize = 500_000;

fn expect_path_mtu(namespace: &Namespace, of: SocketAddr, mtu: u32) -> Result<()> {
    let route = namespace.ip(&format!("route get {}", of.ip()))?;
    ensure!(route.contains(&format!("mtu {mtu}")), "expected a path MTU of {mtu}: {}", route.trim());
    Ok(())
}

/// The first datagrams may be lost; then the sender's kernel fragments to the learned MTU.
fn expect_delivery(place: &Place, server: SocketAddr, size: &[&str]) -> Result<()> {
    // 20: at least one reaches a backend on another node (none in 10⁶ runs)
    let _lost = place.send(server, 20, &[size, &["--timeout-ms", "300"]].concat())?;
    place.send(server, 10, size)?.check()
}

/// Two large responses arrive completely.
fn expect_bulk(place: &Place, server: SocketAddr) -> Result<()> {
    let requests = place.get_bytes(server, 2, BULK)?;
    let is_whole = |request: &Request| request.answer().is_some_and(|answer| answer.bytes == BULK);
    ensure!(requests.iter().all(is_whole), "{requests:?}");
    Ok(())
}

fn echo(testbed: &Testbed, family: Family) -> SocketAddr {
    SocketAddr::new(testbed.node_port(0, family).ip(), NODE_ECHO)
}

/// Lowers the MTU of all routes of the gateway, to external clients and between the segments.
fn set_narrow_hop(testbed: &Testbed) -> Result<()> {
    let gateway = testbed.cluster.fabric().gateway();
    for (prefix, device) in
        [("192.0.2.0/24", "outside"), ("172.18.0.0/24", "seg1"), ("172.19.0.0/24", "seg2")]
    {
        gateway.ip(&format!("route replace {prefix} dev {device} proto kernel scope link mtu {NARROW}"))?;
    }
    for (prefix, device) in
        [("2001:db8:ffff::/64", "outside"), ("fd00:18::/64", "seg1"), ("fd00:19::/64", "seg2")]
    {
        gateway.ip(&format!("route replace {prefix} dev {device} proto kernel metric 256 mtu {NARROW}"))?;
    }
    Ok(())
}

#[test]
fn client_and_backend_learn_the_mtu_of_a_narrow_hop() -> Result<()> {
    // the backend is on the entry node, then on the other node
    for backend in [0, 1] {
        let spec = Spec::new(2);
        let mut testbed = Testbed::create(&spec, &[backend])?;
        set_narrow_hop(&testbed)?;
        testbed.apply_service(|_| {})?;
        let mut checks = Checks::of(format!("{}, backend on node {backend}", spec.describe()));
        for family in Family::BOTH {
            checks.that(format!("datagrams ({family})"), || {
                expect_delivery(&testbed.external, echo(&testbed, family), &FULL)
            });
            checks.that(format!("the client has learned the MTU ({family})"), || {
                expect_path_mtu(testbed.external.namespace(), testbed.node_port(0, family), NARROW)
            });
            checks.that(format!("the backend has learned the MTU through the service ({family})"), || {
                let client =
                    if backend == 0 { outside(family) } else { testbed.cluster.nodes()[0].address(family) };
                expect_path_mtu(testbed.webs[0].place().namespace(), SocketAddr::new(client, 0), NARROW)
            });
            checks.that(format!("a large response ({family})"), || {
                expect_bulk(&testbed.external, testbed.node_port(0, family))
            });
            checks.that(format!("datagrams of many fragments ({family})"), || {
                expect_delivery(&testbed.external, echo(&testbed, family), &LARGE)
            });
        }
        checks.finish(&testbed.cluster)?;
    }
    Ok(())
}

/// With native routing nodes are neighbours: a backend behind a hop is outside the cluster.
#[test]
fn pod_learns_the_mtu_of_a_narrow_hop_before_a_cluster_ip_backend() -> Result<()> {
    for connect_tcp in [true, false] {
        let spec = Spec { connect_tcp, ..Spec::new(1) };
        let mut testbed = Testbed::create(&spec, &[0])?;
        set_narrow_hop(&testbed)?;
        let _server = testbed.external.serve("external")?;
        testbed.service.backends = vec![Backend {
            pod: "external".to_owned(),
            node: "elsewhere".to_owned(),
            addresses: Family::BOTH.map(outside).to_vec(),
        }];
        testbed.apply_endpoints(|endpoint| endpoint["targetRef"] = Value::Null)?;
        testbed.apply_service(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = testbed.cluster_ip(family);
            let echo = SocketAddr::new(cluster_ip.ip(), ECHO_PORT);
            checks.that(format!("datagrams ({family})"), || {
                expect_delivery(testbed.client.place(), echo, &FULL)?;
                expect_path_mtu(testbed.client.place().namespace(), cluster_ip, NARROW)
            });
            checks.that(format!("datagrams of many fragments ({family})"), || {
                expect_delivery(testbed.client.place(), echo, &LARGE)
            });
            checks.that(format!("a large response ({family})"), || {
                expect_bulk(testbed.client.place(), cluster_ip)
            });
        }
        checks.finish(&testbed.cluster)?;
    }
    Ok(())
}

/// The tunnel's outer packets are too big for a hop. The outer IPv4 packets may be fragmented.
#[test]
fn tunnel_packets_are_fragmented_at_a_narrow_hop() -> Result<()> {
    for connect_tcp in [true, false] {
        let nodes = vec![Segment::FIRST, Segment::SECOND];
        let spec = Spec { nodes, routing: Routing::Vxlan, connect_tcp, ..Spec::new(2) };
        let mut testbed = Testbed::create(&spec, &[1])?;
        set_narrow_hop(&testbed)?;
        testbed.apply_service(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = testbed.cluster_ip(family);
            let echo = SocketAddr::new(cluster_ip.ip(), ECHO_PORT);
            // 1,400 bytes fit the pod's MTU
            for size in [&["--size", "1400"][..], &LARGE] {
                checks.that(format!("datagrams of a pod, {size:?} ({family})"), || {
                    testbed.client.place().send(echo, 10, size)?.check()
                });
            }
            checks.that(format!("a large response to a pod ({family})"), || {
                expect_bulk(testbed.client.place(), cluster_ip)
            });
            checks.that(format!("a large response to an external client ({family})"), || {
                expect_bulk(&testbed.external, testbed.node_port(0, family))
            });
        }
        checks.that("the hop has fragmented packets", || {
            let made = testbed.cluster.fabric().gateway().snmp("Ip", "FragCreates")?;
            ensure!(made > 0, "the gateway fragmented no packet");
            Ok(())
        });
        checks.finish(&testbed.cluster)?;
    }
    Ok(())
}

/// The packets have the node's address, so its stack neither forwards them nor sends ICMP errors:
/// the datapath must.
#[test]
fn external_client_learns_the_mtu_of_the_tunnel() -> Result<()> {
    let spec = Spec { routing: Routing::Vxlan, ..Spec::new(2) };
    let mut testbed = Testbed::create(&spec, &[1])?;
    testbed.apply_service(|_| {})?;
    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        checks.that(format!("datagrams ({family})"), || {
            expect_delivery(&testbed.external, echo(&testbed, family), &FULL)
        });
        checks.that(format!("the client has learned the MTU ({family})"), || {
            expect_path_mtu(testbed.external.namespace(), testbed.node_port(0, family), TUNNEL)
        });
        checks.that(format!("datagrams of many fragments ({family})"), || {
            expect_delivery(&testbed.external, echo(&testbed, family), &LARGE)
        });
        checks.that(format!("a large response ({family})"), || {
            expect_bulk(&testbed.external, testbed.node_port(0, family))
        });
    }
    checks.that("packets were counted as too_big", || {
        let count = testbed.cluster.nodes()[0].count("from_wire", "too_big")?;
        ensure!(count > 0, "from_wire counted no too_big");
        Ok(())
    });
    checks.finish(&testbed.cluster)
}

#[test]
fn large_datagrams_pass_every_frontend() -> Result<()> {
    for routing in [Routing::Native, Routing::Vxlan] {
        let spec = Spec { routing, ..Spec::new(2) };
        let mut testbed = Testbed::create(&spec, &[0, 1])?;
        testbed.apply_service(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = SocketAddr::new(testbed.cluster_ip(family).ip(), ECHO_PORT);
            checks.that(format!("a pod at the cluster IP ({family})"), || {
                testbed.client.place().send(cluster_ip, 10, &LARGE)?.check()
            });
            checks.that(format!("a pod at a node port ({family})"), || {
                testbed.client.place().send(echo(&testbed, family), 10, &LARGE)?.check()
            });
            checks.that(format!("an external client at a node port ({family})"), || {
                expect_delivery(&testbed.external, echo(&testbed, family), &LARGE)
            });
            if routing == Routing::Native {
                checks.that(format!("the host at the cluster IP ({family})"), || {
                    testbed.host().send(cluster_ip, 10, &LARGE)?.check()
                });
            }
        }
        checks.finish(&testbed.cluster)?;
    }
    Ok(())
}

/// Only the first fragment has ports, and the network may reorder fragments.
fn fragments_pass_in_any_order(routing: Routing) -> Result<()> {
    let spec = Spec { routing, ..Spec::new(2) };
    let mut testbed = Testbed::create(&spec, &[0, 1])?;
    testbed.apply_service(|_| {})?;
    let mut checks = Checks::of(spec.describe());
    for node in [0, 1] {
        testbed.service.backends = vec![testbed.webs[node].backend()];
        testbed.apply_endpoints(|_| {})?;
        for (family, order) in
            Family::BOTH.into_iter().flat_map(|family| ["forwards", "backwards"].map(|order| (family, order)))
        {
            let cluster_ip = SocketAddr::new(testbed.cluster_ip(family).ip(), ECHO_PORT);
            for (from, place, server) in [
                ("external client at a node port", &testbed.external, echo(&testbed, family)),
                ("a pod at the cluster IP", testbed.client.place(), cluster_ip),
                ("a pod at the backend itself", testbed.client.place(), testbed.webs[node].echo(family)),
            ] {
                checks.that(format!("{from} ({order}, backend on node {node}, {family})"), || {
                    // three fragments
                    place.send(server, 10, &["--size", "3500", "--fragments", order])?.check()
                });
            }
        }
    }
    checks.finish(&testbed.cluster)
}

#[test]
fn fragments_pass_in_any_order_with_native_routing() -> Result<()> {
    fragments_pass_in_any_order(Routing::Native)
}

#[test]
fn fragments_pass_in_any_order_through_the_overlay() -> Result<()> {
    fragments_pass_in_any_order(Routing::Vxlan)
}
