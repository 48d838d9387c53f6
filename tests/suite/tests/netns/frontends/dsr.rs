//! Direct server return: a backend sees the client, and its node answers, past the node that was asked.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    bins,
    lab::{Checks, Family, Node, Place, Routing, Spec, names, outside},
};
use serde_json::{Value, json};

use super::{Bed, ECHO_PORT, MANY, NODE_ECHO, WEB};

const BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)),
];

#[test]
fn direct_server_return_natively() -> Result<()> {
    direct(&Spec::new(3))
}

#[test]
fn direct_server_return_in_the_driver() -> Result<()> {
    direct(&Spec { xdp: true, ..Spec::new(3) })
}

#[test]
fn direct_server_return_through_the_overlay() -> Result<()> {
    direct(&Spec { routing: Routing::Vxlan, ..Spec::new(3) })
}

/// The first node is asked and has no backend.
fn direct(spec: &Spec) -> Result<()> {
    let mut bed = Bed::create(spec, &[1, 1, 2])?;
    for (address, via) in BALANCER.iter().zip(bed.cluster.nodes()[0].addresses()) {
        bed.cluster.fabric().gateway().ip(&format!("route add {address} via {via}"))?;
    }
    let mut checks = Checks::of(spec.describe());
    checks.that("every node says where services are handled", || {
        bed.cluster.nodes().iter().try_for_each(|node| says(node, if spec.xdp { "xdp" } else { "tc" }))
    });
    bed.tell(|service| mode(service, "dsr"))?;
    for family in Family::BOTH {
        let balancer = BALANCER[usize::from(family == Family::V6)];
        for (what, server) in
            [("a node port", bed.node_port(0, family)), ("a load balancer", SocketAddr::new(balancer, WEB))]
        {
            checks.that(format!("every backend sees who asks {what} ({family})"), || {
                all_see(&bed.outside, server, outside(family), 3)
            });
        }
        let echo = SocketAddr::new(bed.node_port(0, family).ip(), NODE_ECHO);
        checks.that(format!("datagrams ({family})"), || bed.outside.send(echo, 50, &[])?.check());
        checks.that(format!("a host of the cluster at another's port ({family})"), || {
            let host = &bed.cluster.nodes()[2];
            all_see(host.place(), bed.node_port(0, family), host.address(family), 3)
        });
        checks.that(format!("a pod at its own node's port ({family})"), || {
            all_see(bed.client.place(), bed.node_port(0, family), bed.client.address(family), 3)
        });
        checks.that(format!("a cluster IP ({family})"), || {
            let server = SocketAddr::new(bed.cluster_ip(family).ip(), ECHO_PORT);
            bed.client.place().send(server, 10, &[])?.check()
        });
    }
    checks.that("no answer passes the node that was asked", || {
        for (hook, outcome) in
            [("from_wire", "to_outside"), ("from_overlay", "to_outside"), ("xdp_wire", "to_outside")]
        {
            let count = bed.cluster.nodes()[0].count(hook, outcome)?;
            ensure!(count == 0, "{count} {outcome} in {hook}");
        }
        let turned = bed.cluster.nodes()[0].count("xdp_wire", "to_wire")?;
        ensure!((turned > 0) == spec.xdp, "{turned} packets turned round in the driver");
        Ok(())
    });

    let echo = SocketAddr::new(bed.node_port(0, Family::V4).ip(), NODE_ECHO);
    let held = bed.outside.hold(echo, 20, Duration::from_millis(20))?;
    bed.tell(|service| mode(service, "snat"))?;
    checks.that("switched off while it is used: new connections come under the node's address", || {
        let node = bed.cluster.nodes()[0].address(Family::V4);
        all_see(&bed.outside, bed.node_port(0, Family::V4), node, 3)
    });
    bed.tell(|service| mode(service, "dsr"))?;
    checks
        .that("and on again", || all_see(&bed.outside, bed.node_port(0, Family::V4), outside(Family::V4), 3));
    checks.that("connections of before go on", || {
        let held = held.finish()?;
        ensure!(held.broken.is_empty() && held.misdirected == 0, "{held:?}");
        Ok(())
    });
    checks.finish(&bed.cluster)
}

/// What `dataplane-agent status` shows of a node's uplink, to programs and to people.
fn says(node: &Node, service_hook: &str) -> Result<()> {
    let uplinks = node.agent().status()?.status.uplinks;
    let said: Vec<_> =
        uplinks.iter().map(|uplink| (uplink.device.as_str(), uplink.service_hook.as_str())).collect();
    ensure!(said == [("eth0", service_hook)], "{}: {said:?}", node.name());
    let socket = node.agent().socket().to_str().context("a path that is not UTF-8")?;
    let shown = node.place().run(bins::agent()?, &["status", "--socket", socket])?;
    let row: Vec<&str> = shown
        .lines()
        .skip_while(|line| !line.starts_with("UPLINK"))
        .nth(1)
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    ensure!(row.first() == Some(&"eth0") && row.get(2) == Some(&service_hook), "{}: {shown}", node.name());
    Ok(())
}

fn mode(service: &mut Value, mode: &str) {
    service["metadata"]["annotations"] = json!({"dataplane.local/forwarding-mode": mode});
    service["spec"]["type"] = json!("LoadBalancer");
    service["status"]["loadBalancer"]["ingress"] = json!(BALANCER.map(|ip| json!({"ip": ip.to_string()})));
}

/// Everybody answers, and has seen this client.
fn all_see(place: &Place, server: SocketAddr, seen_as: IpAddr, backends: usize) -> Result<()> {
    place.get_as(server, MANY, None, seen_as)?;
    let names = names(&place.get(server, MANY)?);
    ensure!(names.len() == backends, "{names:?}");
    Ok(())
}
