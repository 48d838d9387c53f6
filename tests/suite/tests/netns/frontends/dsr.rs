//! Direct server return: the backend sees the client's address, and its node replies directly.

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

use super::{ECHO_PORT, MANY, NODE_ECHO, Testbed, WEB};

const LOAD_BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)),
];

#[test]
fn direct_server_return_with_native_routing() -> Result<()> {
    direct_server_return(&Spec::new(3))
}

#[test]
fn direct_server_return_by_xdp() -> Result<()> {
    direct_server_return(&Spec { xdp: true, ..Spec::new(3) })
}

#[test]
fn direct_server_return_through_the_overlay() -> Result<()> {
    direct_server_return(&Spec { routing: Routing::Vxlan, ..Spec::new(3) })
}

/// Clients connect through the first node, which has no backend.
fn direct_server_return(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec, &[1, 1, 2])?;
    for (address, via) in LOAD_BALANCER.iter().zip(testbed.cluster.nodes()[0].addresses()) {
        testbed.cluster.fabric().gateway().ip(&format!("route add {address} via {via}"))?;
    }
    let mut checks = Checks::of(spec.describe());
    checks.that("every node reports where services are translated", || {
        testbed
            .cluster
            .nodes()
            .iter()
            .try_for_each(|node| expect_service_hook(node, if spec.xdp { "xdp" } else { "tc" }))
    });
    testbed.apply_service(|service| set_forwarding_mode(service, "dsr"))?;
    for family in Family::BOTH {
        let balancer = LOAD_BALANCER[usize::from(family == Family::V6)];
        for (what, server) in [
            ("a node port", testbed.node_port(0, family)),
            ("a load balancer", SocketAddr::new(balancer, WEB)),
        ] {
            checks.that(format!("every backend sees the client of {what} ({family})"), || {
                expect_all_backends_see(&testbed.external, server, outside(family), 3)
            });
        }
        let echo = SocketAddr::new(testbed.node_port(0, family).ip(), NODE_ECHO);
        checks.that(format!("datagrams ({family})"), || testbed.external.send(echo, 50, &[])?.check());
        checks.that(format!("a host at the node port of another node ({family})"), || {
            // direct server return is for clients outside of the cluster
            let [entry, .., host] = testbed.cluster.nodes() else {
                anyhow::bail!("the testbed has fewer than two nodes")
            };
            let seen_as = entry.address(family);
            expect_all_backends_see(host.place(), testbed.node_port(0, family), seen_as, 3)
        });
        checks.that(format!("a pod at a node port of its own node ({family})"), || {
            expect_all_backends_see(
                testbed.client.place(),
                testbed.node_port(0, family),
                testbed.client.address(family),
                3,
            )
        });
        checks.that(format!("a cluster IP ({family})"), || {
            let server = SocketAddr::new(testbed.cluster_ip(family).ip(), ECHO_PORT);
            testbed.client.place().send(server, 10, &[])?.check()
        });
    }
    checks.that("no reply passes the entry node", || {
        for (hook, outcome) in
            [("from_wire", "to_outside"), ("from_overlay", "to_outside"), ("xdp_wire", "to_outside")]
        {
            let count = testbed.cluster.nodes()[0].count(hook, outcome)?;
            ensure!(count == 0, "{count} {outcome} in {hook}");
        }
        let forwarded = testbed.cluster.nodes()[0].count("xdp_wire", "to_wire")?;
        ensure!((forwarded > 0) == spec.xdp, "{forwarded} packets were forwarded by XDP");
        Ok(())
    });

    let echo = SocketAddr::new(testbed.node_port(0, Family::V4).ip(), NODE_ECHO);
    let held = testbed.external.hold(echo, 20, Duration::from_millis(20))?;
    testbed.apply_service(|service| set_forwarding_mode(service, "snat"))?;
    checks.that("switched off while in use: new connections have the node's source address", || {
        let node = testbed.cluster.nodes()[0].address(Family::V4);
        expect_all_backends_see(&testbed.external, testbed.node_port(0, Family::V4), node, 3)
    });
    testbed.apply_service(|service| set_forwarding_mode(service, "dsr"))?;
    checks.that("switched on again", || {
        expect_all_backends_see(&testbed.external, testbed.node_port(0, Family::V4), outside(Family::V4), 3)
    });
    checks.that("open connections continue", || {
        let held = held.finish()?;
        ensure!(held.broken.is_empty() && held.misdirected == 0, "{held:?}");
        Ok(())
    });
    checks.finish(&testbed.cluster)
}

/// `dataplane-agent status` shows this service hook for the uplink, in its JSON and its table.
fn expect_service_hook(node: &Node, service_hook: &str) -> Result<()> {
    let uplinks = node.agent().status()?.status.uplinks;
    let hooks: Vec<_> =
        uplinks.iter().map(|uplink| (uplink.device.as_str(), uplink.service_hook.as_str())).collect();
    ensure!(hooks == [("eth0", service_hook)], "{}: {hooks:?}", node.name());
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

fn set_forwarding_mode(service: &mut Value, mode: &str) {
    service["metadata"]["annotations"] = json!({"dataplane.local/forwarding-mode": mode});
    service["spec"]["type"] = json!("LoadBalancer");
    service["status"]["loadBalancer"]["ingress"] =
        json!(LOAD_BALANCER.map(|ip| json!({"ip": ip.to_string()})));
}

/// Every backend answers, and sees this source address.
fn expect_all_backends_see(
    place: &Place,
    server: SocketAddr,
    seen_as: IpAddr,
    backends: usize,
) -> Result<()> {
    place.get_as(server, MANY, None, seen_as)?;
    let names = names(&place.get(server, MANY)?);
    ensure!(names.len() == backends, "{names:?}");
    Ok(())
}
