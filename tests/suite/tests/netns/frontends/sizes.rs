//! Sizes: a narrow hop in the middle of the way, a tunnel that takes less than the wire, datagrams of many fragments. Who sends
//! too much hears of it through every translation.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Backend, Checks, Family, Namespace, Place, Routing, Segment, Spec, outside},
    traffic::report::Request,
};
use serde_json::Value;

use super::{Bed, ECHO_PORT, NODE_ECHO};

/// Of the hop between nodes and outside. Its neighbours know of 1,500 bytes and nothing else.
const NARROW: u32 = 1_400;
/// Of a pod behind the tunnel.
const TUNNEL: u32 = 1_450;
/// Bytes of a datagram that fills the wire, and neither the hop nor the tunnel.
const FULL: [&str; 2] = ["--size", "1440"];
/// More than 40 fragments. One after the other: a socket has room for two of them.
const LARGE: [&str; 3] = ["--size", "60000", "--fresh"];
const BULK: usize = 500_000;

fn has_learnt(namespace: &Namespace, of: SocketAddr, mtu: u32) -> Result<()> {
    let route = namespace.ip(&format!("route get {}", of.ip()))?;
    ensure!(route.contains(&format!("mtu {mtu}")), "{mtu} bytes are the most there: {}", route.trim());
    Ok(())
}

/// What is too big at first is lost; the sender's kernel makes smaller ones from then on.
fn gets_through(place: &Place, server: SocketAddr, size: &[&str]) -> Result<()> {
    // so many that one goes to a backend that is far away (none in 10⁶ runs)
    let _lost = place.send(server, 20, &[size, &["--timeout-ms", "300"]].concat())?;
    place.send(server, 10, size)?.check()
}

/// Two answers of this size come whole.
fn bulk(place: &Place, server: SocketAddr) -> Result<()> {
    let requests = place.get_bytes(server, 2, BULK)?;
    let is_whole = |request: &Request| request.answer().is_some_and(|answer| answer.bytes == BULK);
    ensure!(requests.iter().all(is_whole), "{requests:?}");
    Ok(())
}

fn echo(bed: &Bed, family: Family) -> SocketAddr {
    SocketAddr::new(bed.node_port(0, family).ip(), NODE_ECHO)
}

/// What the gateway sends anywhere is narrow: between the nodes and outside, and between nodes of two segments.
fn narrow_hop(bed: &Bed) -> Result<()> {
    let gateway = bed.cluster.fabric().gateway();
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
fn a_narrow_hop_is_heard_of_by_client_and_backend() -> Result<()> {
    // the backend is where the client asks; then elsewhere
    for backend in [0, 1] {
        let spec = Spec::new(2);
        let mut bed = Bed::create(&spec, &[backend])?;
        narrow_hop(&bed)?;
        bed.tell(|_| {})?;
        let mut checks = Checks::of(format!("{}, backend on node {backend}", spec.describe()));
        for family in Family::BOTH {
            checks.that(format!("datagrams ({family})"), || {
                gets_through(&bed.outside, echo(&bed, family), &FULL)
            });
            checks.that(format!("the client has learnt ({family})"), || {
                has_learnt(bed.outside.namespace(), bed.node_port(0, family), NARROW)
            });
            checks.that(format!("the backend has learnt, through the service ({family})"), || {
                let client =
                    if backend == 0 { outside(family) } else { bed.cluster.nodes()[0].address(family) };
                has_learnt(bed.webs[0].place().namespace(), SocketAddr::new(client, 0), NARROW)
            });
            checks
                .that(format!("a large answer ({family})"), || bulk(&bed.outside, bed.node_port(0, family)));
            checks.that(format!("datagrams of many fragments ({family})"), || {
                gets_through(&bed.outside, echo(&bed, family), &LARGE)
            });
        }
        checks.finish(&bed.cluster)?;
    }
    Ok(())
}

/// Natively a node is a neighbour: what lies beyond a hop is a backend that is no pod.
#[test]
fn a_pod_hears_of_a_narrow_hop_before_the_backend_of_a_cluster_ip() -> Result<()> {
    for connect_tcp in [true, false] {
        let spec = Spec { connect_tcp, ..Spec::new(1) };
        let mut bed = Bed::create(&spec, &[0])?;
        narrow_hop(&bed)?;
        let _server = bed.outside.serve("outside")?;
        bed.service.backends = vec![Backend {
            pod: "outside".to_owned(),
            node: "elsewhere".to_owned(),
            addresses: Family::BOTH.map(outside).to_vec(),
        }];
        bed.tell_endpoints(|endpoint| endpoint["targetRef"] = Value::Null)?;
        bed.tell(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = bed.cluster_ip(family);
            let echo = SocketAddr::new(cluster_ip.ip(), ECHO_PORT);
            checks.that(format!("datagrams ({family})"), || {
                gets_through(bed.client.place(), echo, &FULL)?;
                has_learnt(bed.client.place().namespace(), cluster_ip, NARROW)
            });
            checks.that(format!("datagrams of many fragments ({family})"), || {
                gets_through(bed.client.place(), echo, &LARGE)
            });
            checks.that(format!("a large answer ({family})"), || bulk(bed.client.place(), cluster_ip));
        }
        checks.finish(&bed.cluster)?;
    }
    Ok(())
}

/// The tunnel's own packets are too big for a hop on their way. Between IPv4 ends they may be sent in fragments, and are.
#[test]
fn a_narrow_hop_before_the_other_end_of_the_tunnel_loses_nothing() -> Result<()> {
    for connect_tcp in [true, false] {
        let nodes = vec![Segment::FIRST, Segment::SECOND];
        let spec = Spec { nodes, routing: Routing::Vxlan, connect_tcp, ..Spec::new(2) };
        let mut bed = Bed::create(&spec, &[1])?;
        narrow_hop(&bed)?;
        bed.tell(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = bed.cluster_ip(family);
            let echo = SocketAddr::new(cluster_ip.ip(), ECHO_PORT);
            // as much as a pod sends at once
            for size in [&["--size", "1400"][..], &LARGE] {
                checks.that(format!("a pod's datagrams, {size:?} ({family})"), || {
                    bed.client.place().send(echo, 10, size)?.check()
                });
            }
            checks
                .that(format!("a large answer to a pod ({family})"), || bulk(bed.client.place(), cluster_ip));
            checks.that(format!("a large answer to the outside ({family})"), || {
                bulk(&bed.outside, bed.node_port(0, family))
            });
        }
        checks.that("the hop has made fragments", || {
            let made = bed.cluster.fabric().gateway().snmp("Ip", "FragCreates")?;
            ensure!(made > 0, "no packet was too big");
            Ok(())
        });
        checks.finish(&bed.cluster)?;
    }
    Ok(())
}

/// What comes under the node's own address its stack does not forward, nor say anything about.
#[test]
fn a_client_outside_hears_what_the_tunnel_takes() -> Result<()> {
    let spec = Spec { routing: Routing::Vxlan, ..Spec::new(2) };
    let mut bed = Bed::create(&spec, &[1])?;
    bed.tell(|_| {})?;
    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        checks
            .that(format!("datagrams ({family})"), || gets_through(&bed.outside, echo(&bed, family), &FULL));
        checks.that(format!("the client has learnt ({family})"), || {
            has_learnt(bed.outside.namespace(), bed.node_port(0, family), TUNNEL)
        });
        checks.that(format!("datagrams of many fragments ({family})"), || {
            gets_through(&bed.outside, echo(&bed, family), &LARGE)
        });
        checks.that(format!("a large answer ({family})"), || bulk(&bed.outside, bed.node_port(0, family)));
    }
    checks.that("it was said by name", || {
        let count = bed.cluster.nodes()[0].count("from_wire", "too_big")?;
        ensure!(count > 0, "no packet was too big");
        Ok(())
    });
    checks.finish(&bed.cluster)
}

#[test]
fn large_datagrams_pass_every_frontend() -> Result<()> {
    for routing in [Routing::Native, Routing::Vxlan] {
        let spec = Spec { routing, ..Spec::new(2) };
        let mut bed = Bed::create(&spec, &[0, 1])?;
        bed.tell(|_| {})?;
        let mut checks = Checks::of(spec.describe());
        for family in Family::BOTH {
            let cluster_ip = SocketAddr::new(bed.cluster_ip(family).ip(), ECHO_PORT);
            checks.that(format!("a pod at the cluster IP ({family})"), || {
                bed.client.place().send(cluster_ip, 10, &LARGE)?.check()
            });
            checks.that(format!("a pod at a node port ({family})"), || {
                bed.client.place().send(echo(&bed, family), 10, &LARGE)?.check()
            });
            checks.that(format!("outside at a node port ({family})"), || {
                gets_through(&bed.outside, echo(&bed, family), &LARGE)
            });
            if routing == Routing::Native {
                checks.that(format!("the host at the cluster IP ({family})"), || {
                    bed.host().send(cluster_ip, 10, &LARGE)?.check()
                });
            }
        }
        checks.finish(&bed.cluster)?;
    }
    Ok(())
}

/// In which order they come is the network's business, and only the first has ports.
fn fragments_pass_in_any_order(routing: Routing) -> Result<()> {
    let spec = Spec { routing, ..Spec::new(2) };
    let mut bed = Bed::create(&spec, &[0, 1])?;
    bed.tell(|_| {})?;
    let mut checks = Checks::of(spec.describe());
    for node in [0, 1] {
        bed.service.backends = vec![bed.webs[node].backend()];
        bed.tell_endpoints(|_| {})?;
        for (family, order) in
            Family::BOTH.into_iter().flat_map(|family| ["forwards", "backwards"].map(|order| (family, order)))
        {
            let cluster_ip = SocketAddr::new(bed.cluster_ip(family).ip(), ECHO_PORT);
            for (who, place, server) in [
                ("outside at a node port", &bed.outside, echo(&bed, family)),
                ("a pod at the cluster IP", bed.client.place(), cluster_ip),
                ("a pod at the backend itself", bed.client.place(), bed.webs[node].echo(family)),
            ] {
                checks.that(format!("{who} ({order}, backend on node {node}, {family})"), || {
                    // three of them
                    place.send(server, 10, &["--size", "3500", "--fragments", order])?.check()
                });
            }
        }
    }
    checks.finish(&bed.cluster)
}

#[test]
fn fragments_pass_in_any_order_natively() -> Result<()> {
    fragments_pass_in_any_order(Routing::Native)
}

#[test]
fn fragments_pass_in_any_order_through_the_overlay() -> Result<()> {
    fragments_pass_in_any_order(Routing::Vxlan)
}
