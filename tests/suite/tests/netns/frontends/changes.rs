//! Node ports at loopback, and services whose type, ports or proxy label change while in use.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Spec, names};
use serde_json::json;

use super::{End, NODE_ECHO, NODE_WEB, Testbed, expect_answers, expect_no_answer, loopback};

#[test]
fn node_ports_at_loopback_and_changes_of_type() -> Result<()> {
    let spec = Spec::new(1);
    let mut testbed = Testbed::create(&spec, &[0])?;
    let mut checks = Checks::of("changes");
    testbed.apply_service(|_| {})?;
    for family in Family::BOTH {
        at_loopback(&mut checks, &testbed, family, "random");
    }
    testbed.apply_service(|service| {
        service["metadata"]["annotations"] = json!({"dataplane.local/load-balancing": "maglev"});
    })?;
    for family in Family::BOTH {
        at_loopback(&mut checks, &testbed, family, "maglev");
    }
    types(&mut checks, &mut testbed)?;
    proxy_name(&mut checks, &mut testbed)?;
    checks.finish(&testbed.cluster)
}

/// As kube-proxy with iptables, but for both families.
fn at_loopback(checks: &mut Checks, testbed: &Testbed, family: Family, selection: &str) {
    let at = |port| SocketAddr::new(loopback(family), port);
    checks.that(
        format!("a process of the node reaches a node port at loopback ({selection}, {family})"),
        || expect_answers(testbed.host(), at(NODE_WEB), 5).map(drop),
    );
    checks.that(format!("a node port at loopback over UDP ({selection}, {family})"), || {
        testbed.host().send(at(NODE_ECHO), 5, &["--connected"])?.check()
    });
    checks.that(format!("a node port at the node's own address ({selection}, {family})"), || {
        expect_answers(testbed.host(), testbed.node_port(0, family), 5).map(drop)
    });
    checks.that(format!("a pod's loopback is its own ({selection}, {family})"), || {
        expect_no_answer(testbed.client.place(), at(NODE_WEB), End::Refused)
    });
}

fn types(checks: &mut Checks, testbed: &mut Testbed) -> Result<()> {
    testbed.apply_service(|_| {})?;
    let echo = SocketAddr::new(testbed.cluster.nodes()[0].address(Family::V4), NODE_ECHO);
    let held = testbed.external.hold(echo, 5, Duration::from_millis(20))?;
    testbed.apply_service(|service| service["spec"]["type"] = json!("ClusterIP"))?;
    for family in Family::BOTH {
        let what = "should be able to change the type from NodePort to ClusterIP";
        checks.that(format!("{what}: the port is closed ({family})"), || {
            expect_no_answer(&testbed.external, testbed.node_port(0, family), End::Refused)?;
            expect_no_answer(testbed.host(), SocketAddr::new(loopback(family), NODE_WEB), End::Refused)
        });
        checks.that(format!("{what}: the cluster IP stays open ({family})"), || {
            expect_answers(testbed.client.place(), testbed.cluster_ip(family), 5).map(drop)
        });
    }
    checks.that("open connections through the closed port continue", || {
        let held = held.finish()?;
        ensure!(held.broken.is_empty() && held.received == held.sent && held.sent > 0, "{held:?}");
        Ok(())
    });

    testbed.apply_service(|service| {
        service["spec"] = json!({"type": "ExternalName", "externalName": "web.example.com"});
    })?;
    checks.that("should be able to change the type from ClusterIP to ExternalName", || {
        expect_no_cluster_ip_answer(testbed)
    });
    testbed.apply_service(|service| service["spec"]["ports"][0]["nodePort"] = json!(NODE_WEB + 1))?;
    for family in Family::BOTH {
        let what = "should be able to change the type from ExternalName to NodePort";
        let node = testbed.node_port(0, family);
        checks.that(format!("{what}, with another port ({family})"), || {
            expect_answers(&testbed.external, SocketAddr::new(node.ip(), NODE_WEB + 1), 5)?;
            expect_answers(testbed.client.place(), testbed.cluster_ip(family), 5)?;
            expect_no_answer(&testbed.external, node, End::Refused)
        });
    }
    Ok(())
}

fn proxy_name(checks: &mut Checks, testbed: &mut Testbed) -> Result<()> {
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        testbed.apply_service(|service| service["metadata"]["labels"][label] = json!("other"))?;
        checks.that(format!("should implement {label}: the service belongs to another proxy"), || {
            expect_no_cluster_ip_answer(testbed)?;
            expect_no_answer(&testbed.external, testbed.node_port(0, Family::V4), End::Refused)
        });
        testbed.apply_service(|_| {})?;
        for family in Family::BOTH {
            checks.that(format!("should implement {label}: the label is removed ({family})"), || {
                expect_answers(testbed.client.place(), testbed.cluster_ip(family), 5)?;
                expect_answers(&testbed.external, testbed.node_port(0, family), 5).map(drop)
            });
        }
    }
    Ok(())
}

/// No request to the cluster IP is answered.
fn expect_no_cluster_ip_answer(testbed: &Testbed) -> Result<()> {
    let requests = testbed.client.place().get(testbed.cluster_ip(Family::V4), 1)?;
    ensure!(names(&requests).is_empty(), "{requests:?}");
    Ok(())
}

#[test]
fn node_ports_at_loopback_can_be_disabled() -> Result<()> {
    let spec = Spec { config: json!({"node_ports": {"loopback": false}}), ..Spec::new(1) };
    let mut testbed = Testbed::create(&spec, &[0])?;
    testbed.apply_service(|_| {})?;
    let mut checks = Checks::of("node_ports.loopback: false");
    for family in Family::BOTH {
        checks.that(format!("no node port at loopback ({family})"), || {
            expect_no_answer(testbed.host(), SocketAddr::new(loopback(family), NODE_WEB), End::Refused)
        });
        checks.that(format!("node ports at the node's own address ({family})"), || {
            expect_answers(testbed.host(), testbed.node_port(0, family), 5)?;
            expect_answers(&testbed.external, testbed.node_port(0, family), 5).map(drop)
        });
    }
    checks.finish(&testbed.cluster)
}
