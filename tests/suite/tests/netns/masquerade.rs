//! Pods and destinations outside the cluster: masquerade, its exceptions, and returning ICMP
//! errors.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, Family, Place, Pod, Routing, Spec, outside},
    traffic::{ECHO, HTTP},
};

/// MTU of the last link.
const NARROW_MTU: u32 = 1_400;

#[test]
fn pods_are_masqueraded_with_native_routing() -> Result<()> {
    pods_are_masqueraded(Routing::Native)
}

#[test]
fn pods_are_masqueraded_beside_an_overlay() -> Result<()> {
    pods_are_masqueraded(Routing::Vxlan)
}

fn pods_are_masqueraded(routing: Routing) -> Result<()> {
    let spec = Spec { routing, outside_mtu: NARROW_MTU, ..Spec::new(2) };
    let cluster = Cluster::create(&spec)?;
    let (pod, other) = cluster.explain((|| Ok((cluster.pod(0, "pod")?, cluster.pod(0, "other")?)))())?;
    let place = cluster.outside()?;
    let _server = place.serve("external")?;
    let node = &cluster.nodes()[0];

    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        let web = SocketAddr::new(outside(family), HTTP);
        let echo = SocketAddr::new(outside(family), ECHO);
        for pod in [&pod, &other] {
            let what = |what: &str| format!("{} ({family}): {what}", pod.name());
            checks.that(what("TCP with the node's source address"), || {
                pod.place().get_as(web, 5, Some("external"), node.address(family))
            });
            checks.that(what("UDP"), || pod.place().send(echo, 20, &[])?.check());
            // first: path MTU discovery costs the first full packet
            checks.that(what("the MTU of a narrow link is learned"), || {
                narrow_link(pod.place(), family, spec.mtu, routing)
            });
            checks.that(what("UDP in fragments"), || pod.place().send(echo, 5, &["--size", "3000"])?.check());
            checks.that(what("bulk"), || {
                let requests = pod.place().get_bytes(web, 2, 500_000)?;
                ensure!(requests.iter().all(|request| request.answer().is_some()), "{requests:?}");
                Ok(())
            });
            checks.that(what("ping"), || pod.place().ping(outside(family), 5, 500)?.check());
            checks.that(what("a closed port is reported"), || closed_port(pod, family));
        }
        checks.that(format!("the host itself ({family})"), || {
            node.place().get_as(web, 5, Some("external"), node.address(family))
        });
    }
    checks.that("packets were counted as masqueraded", || {
        ensure!(node.count("to_wire", "masqueraded")? > 0, "to_wire counted no masqueraded packet");
        Ok(())
    });
    checks.finish(&cluster)
}

/// The external host's "port unreachable" contains the translated packet.
fn closed_port(pod: &Pod, family: Family) -> Result<()> {
    let closed = SocketAddr::new(outside(family), 9);
    let datagrams = pod.place().send(closed, 3, &["--connected", "--timeout-ms", "300"])?;
    let refused = datagrams.errors.iter().filter(|(what, _)| what.ends_with("refused"));
    ensure!(refused.count() > 0, "{datagrams:?}");
    Ok(())
}

/// The gateway's "packet too big" reaches the pod, whose kernel caches the path MTU.
fn narrow_link(pod: &Place, family: Family, mtu: u32, routing: Routing) -> Result<()> {
    let largest = mtu - if routing == Routing::Vxlan { 50 } else { 0 };
    let fits_the_pod_only = largest as usize - family.echo_overhead();
    let lost = pod.ping(outside(family), 2, fits_the_pod_only)?;
    ensure!(lost.received == 0, "{lost:?}: the link is not narrow");
    let route = pod.namespace().ip(&format!("route get {}", outside(family)))?;
    ensure!(route.contains(&format!("mtu {NARROW_MTU}")), "the pod's route: {}", route.trim());
    let fitting = NARROW_MTU as usize - family.echo_overhead();
    pod.ping(outside(family), 2, fitting)?.check()
}

#[test]
fn excepted_destinations_see_the_pod_address() -> Result<()> {
    let except = vec!["192.0.2.0/24".parse()?, "2001:db8:ffff::/64".parse()?];
    let spec = Spec { masquerade_except: except, ..Spec::new(1) };
    let cluster = Cluster::create(&spec)?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let node = &cluster.nodes()[0];
    // replies to the pods' own addresses need a route
    let gateway = cluster.fabric().gateway();
    for (cidr, address) in node.pod_cidrs().iter().zip(node.addresses()) {
        gateway.ip(&format!("route add {cidr} via {address}"))?;
    }
    let place = cluster.outside()?;
    let _server = place.serve("external")?;

    let mut checks = Checks::of("masquerade exceptions");
    for family in Family::BOTH {
        let web = SocketAddr::new(outside(family), HTTP);
        checks.that(format!("TCP with the pod's source address ({family})"), || {
            pod.place().get_as(web, 5, Some("external"), pod.address(family))
        });
        checks.that(format!("from outside the cluster to the pod ({family})"), || {
            let _server = pod.serve()?;
            place.get_as(pod.web(family), 3, Some("pod"), outside(family))
        });
    }
    checks.that("nothing was masqueraded", || {
        let count = node.count("to_wire", "masqueraded").context("count")?;
        ensure!(count == 0, "{count} packets");
        Ok(())
    });
    checks.finish(&cluster)
}
