//! Pods and destinations outside the cluster: masquerade, its exceptions, and returning ICMP
//! errors.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, Family, Place, Pod, Routing, Spec, outside},
    traffic::{ECHO, HTTP},
};
use serde_json::json;

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
            checks.that(what("bulk"), || bulk(pod, web, 2, 500_000));
            checks.that(what("ping"), || pod.place().ping(outside(family), 5, 500)?.check());
            checks.that(what("a closed port is reported"), || closed_port(pod, family));
        }
        checks.that(format!("the host itself ({family})"), || {
            node.place().get_as(web, 5, Some("external"), node.address(family))
        });
    }
    checks.that("packets were counted as masqueraded", || {
        ensure!(node.count("from_pod", "to_outside")? > 0, "from_pod counted no packet to the outside");
        Ok(())
    });
    checks.finish(&cluster)
}

/// The external host's "port unreachable" contains the translated packet.
/// Every request for so many bytes is answered.
fn bulk(pod: &Pod, web: SocketAddr, count: u32, bytes: usize) -> Result<()> {
    let requests = pod.place().get_bytes(web, count, bytes)?;
    ensure!(requests.iter().all(|request| request.answer().is_some()), "{requests:?}");
    Ok(())
}

/// Packets from outside to the first node's pods need a route.
fn route_to_pods(cluster: &Cluster) -> Result<()> {
    let (gateway, node) = (cluster.fabric().gateway(), &cluster.nodes()[0]);
    for (cidr, address) in node.pod_cidrs().iter().zip(node.addresses()) {
        gateway.ip(&format!("route add {cidr} via {address}"))?;
    }
    Ok(())
}

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
    route_to_pods(&cluster)?;
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

/// Rules that drop what connection tracking calls invalid: kube-proxy's own chain of iptables (its
/// nftables mode has no such rule in Kubernetes 1.36), and firewalls as distributions have them.
const FIREWALLS: [(&str, &str, &[&str]); 3] = [
    (
        "kube-proxy's chain of iptables",
        "iptables-restore",
        &[
            "*filter",
            ":FORWARD ACCEPT [0:0]",
            ":KUBE-FORWARD - [0:0]",
            ":KUBE-PROXY-FIREWALL - [0:0]",
            ":KUBE-SERVICES - [0:0]",
            "-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
            "-A FORWARD -j KUBE-FORWARD",
            "-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES",
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
            "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "COMMIT",
        ],
    ),
    (
        "invalid packets dropped where kube-proxy hooks its nftables chains",
        "nft",
        &[
            "table ip invalid {",
            "  chain new { }",
            "  chain forward { type filter hook forward priority -110; policy accept;",
            "    ct state invalid counter drop",
            "    ct state new jump new",
            "  }",
            "}",
        ],
    ),
    (
        "a firewall of established connections",
        "nft",
        &[
            "table ip firewall {",
            "  chain forward { type filter hook forward priority 0; policy drop;",
            "    ct state established,related counter accept",
            "    ct state invalid drop",
            "    ct state new counter accept",
            "  }",
            "}",
        ],
    ),
];

/// A pod reaches the outside beside other firewalls, on either way; of a connection they see both
/// directions or none.
#[test]
fn pods_reach_the_outside_beside_other_firewalls() -> Result<()> {
    for egress in ["direct", "stack"] {
        let spec = Spec { config: json!({"egress": egress}), ..Spec::new(1) };
        let cluster = Cluster::create(&spec)?;
        let pod = cluster.explain(cluster.pod(0, "pod"))?;
        let host = cluster.nodes()[0].place();
        let outside_host = cluster.outside()?;
        let _server = outside_host.serve("external")?;
        let _own = pod.serve()?;
        route_to_pods(&cluster)?;
        let web = SocketAddr::new(outside(Family::V4), HTTP);
        let echo = SocketAddr::new(outside(Family::V4), ECHO);

        let mut checks = Checks::of(format!("egress {egress}"));
        for (name, program, rules) in FIREWALLS {
            let rules = rules.join("\n") + "\n";
            let file = tempfile::NamedTempFile::new()?;
            std::fs::write(file.path(), rules)?;
            let path = file.path().to_str().context("a path that is not UTF-8")?;
            let arguments: &[&str] = if program == "nft" { &["-f", path] } else { &[path] };
            checks.that(format!("{name}: the rules are loaded"), || host.run(program, arguments).map(|_| ()));
            checks.that(format!("{name}: TCP to the outside"), || bulk(&pod, web, 3, 100_000));
            checks.that(format!("{name}: UDP to the outside"), || pod.place().send(echo, 20, &[])?.check());
            checks.that(format!("{name}: ping to the outside"), || {
                pod.place().ping(outside(Family::V4), 5, 500)?.check()
            });
            checks.that(format!("{name}: from the outside to the pod itself"), || {
                outside_host.get_as(pod.web(Family::V4), 3, Some("pod"), outside(Family::V4))
            });
        }
        checks.that("the firewall sees both directions or none", || {
            let seen = host.run("nft", &["list", "table", "ip", "firewall"])?;
            let sees_none = seen.matches("counter packets 0 bytes 0").count() == 2;
            ensure!(sees_none == (egress == "direct"), "{seen}");
            Ok(())
        });
        checks.finish(&cluster)?;
    }
    Ok(())
}
