//! Node ports at loopback, and services that change their type, their ports or their proxy while they are asked.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Spec, names};
use serde_json::json;

use super::{Bed, End, NODE_ECHO, NODE_WEB, answered, fails, loopback};

#[test]
fn node_ports_at_loopback_and_changes_of_type() -> Result<()> {
    let spec = Spec::new(1);
    let mut bed = Bed::create(&spec, &[0])?;
    let mut checks = Checks::of("changes");
    bed.tell(|_| {})?;
    for family in Family::BOTH {
        at_loopback(&mut checks, &bed, family, "random");
    }
    bed.tell(|service| {
        service["metadata"]["annotations"] = json!({"dataplane.local/load-balancing": "maglev"});
    })?;
    for family in Family::BOTH {
        at_loopback(&mut checks, &bed, family, "maglev");
    }
    types(&mut checks, &mut bed)?;
    proxy_name(&mut checks, &mut bed)?;
    checks.finish(&bed.cluster)
}

/// As kube-proxy of iptables has it, for both families.
fn at_loopback(checks: &mut Checks, bed: &Bed, family: Family, selection: &str) {
    let at = |port| SocketAddr::new(loopback(family), port);
    checks
        .that(format!("a process of the node finds a node port at loopback ({selection}, {family})"), || {
            answered(bed.host(), at(NODE_WEB), 5).map(drop)
        });
    checks.that(format!("over UDP too ({selection}, {family})"), || {
        bed.host().send(at(NODE_ECHO), 5, &["--connected"])?.check()
    });
    checks.that(format!("and at the node's own address ({selection}, {family})"), || {
        answered(bed.host(), bed.node_port(0, family), 5).map(drop)
    });
    checks.that(format!("a pod's loopback is its own ({selection}, {family})"), || {
        fails(bed.client.place(), at(NODE_WEB), End::Refused)
    });
}

fn types(checks: &mut Checks, bed: &mut Bed) -> Result<()> {
    bed.tell(|_| {})?;
    let echo = SocketAddr::new(bed.cluster.nodes()[0].address(Family::V4), NODE_ECHO);
    let held = bed.outside.hold(echo, 5, Duration::from_millis(20))?;
    bed.tell(|service| service["spec"]["type"] = json!("ClusterIP"))?;
    for family in Family::BOTH {
        let what = "should be able to change the type from NodePort to ClusterIP";
        checks.that(format!("{what}: the port is closed ({family})"), || {
            fails(&bed.outside, bed.node_port(0, family), End::Refused)?;
            fails(bed.host(), SocketAddr::new(loopback(family), NODE_WEB), End::Refused)
        });
        checks.that(format!("{what}: the cluster IP is not ({family})"), || {
            answered(bed.client.place(), bed.cluster_ip(family), 5).map(drop)
        });
    }
    checks.that("connections through a port that is closed go on", || {
        let held = held.finish()?;
        ensure!(held.broken.is_empty() && held.received == held.sent && held.sent > 0, "{held:?}");
        Ok(())
    });

    bed.tell(|service| {
        service["spec"] = json!({"type": "ExternalName", "externalName": "web.example.com"});
    })?;
    checks.that("should be able to change the type from ClusterIP to ExternalName", || nobody(bed));
    bed.tell(|service| service["spec"]["ports"][0]["nodePort"] = json!(NODE_WEB + 1))?;
    for family in Family::BOTH {
        let what = "should be able to change the type from ExternalName to NodePort";
        let node = bed.node_port(0, family);
        checks.that(format!("{what}, with another port ({family})"), || {
            answered(&bed.outside, SocketAddr::new(node.ip(), NODE_WEB + 1), 5)?;
            answered(bed.client.place(), bed.cluster_ip(family), 5)?;
            fails(&bed.outside, node, End::Refused)
        });
    }
    Ok(())
}

fn proxy_name(checks: &mut Checks, bed: &mut Bed) -> Result<()> {
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        bed.tell(|service| service["metadata"]["labels"][label] = json!("other"))?;
        checks.that(format!("should implement {label}: it is somebody else's"), || {
            nobody(bed)?;
            fails(&bed.outside, bed.node_port(0, Family::V4), End::Refused)
        });
        bed.tell(|_| {})?;
        for family in Family::BOTH {
            checks.that(format!("should implement {label}: ours again ({family})"), || {
                answered(bed.client.place(), bed.cluster_ip(family), 5)?;
                answered(&bed.outside, bed.node_port(0, family), 5).map(drop)
            });
        }
    }
    Ok(())
}

/// Nobody answers at the cluster IP.
fn nobody(bed: &Bed) -> Result<()> {
    let requests = bed.client.place().get(bed.cluster_ip(Family::V4), 1)?;
    ensure!(names(&requests).is_empty(), "{requests:?}");
    Ok(())
}

#[test]
fn node_ports_are_not_at_loopback_if_not_wanted() -> Result<()> {
    let spec = Spec { config: json!({"node_ports": {"loopback": false}}), ..Spec::new(1) };
    let mut bed = Bed::create(&spec, &[0])?;
    bed.tell(|_| {})?;
    let mut checks = Checks::of("node_ports.loopback: false");
    for family in Family::BOTH {
        checks.that(format!("nothing at loopback ({family})"), || {
            fails(bed.host(), SocketAddr::new(loopback(family), NODE_WEB), End::Refused)
        });
        checks.that(format!("the node's own address has it ({family})"), || {
            answered(bed.host(), bed.node_port(0, family), 5)?;
            answered(&bed.outside, bed.node_port(0, family), 5).map(drop)
        });
    }
    checks.finish(&bed.cluster)
}
