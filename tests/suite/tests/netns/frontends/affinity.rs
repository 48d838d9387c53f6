//! `sessionAffinity: ClientIP`: a client keeps one backend, through every frontend of the service.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Place, Spec};
use serde_json::{Value, json};

use super::{ECHO_PORT, MANY, TIMES, Testbed, expect_answers};

#[test]
fn session_affinity_with_connect_time_translation() -> Result<()> {
    affinity(&Spec { connect_tcp: true, connect_udp: true, ..Spec::new(2) })
}

#[test]
fn session_affinity_per_packet() -> Result<()> {
    affinity(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

fn affinity(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec, &[0, 1, 1])?;
    let mut checks = Checks::of(spec.describe());
    testbed.apply_service(|service| client_ip(service, 10_800))?;
    for family in Family::BOTH {
        expect_one_backend(&mut checks, &testbed, family, "should have session affinity work");
    }
    testbed.apply_service(|_| {})?;
    for family in Family::BOTH {
        for (from, place, kind, server) in clients(&testbed, family) {
            checks.that(format!("should be able to switch session affinity: off: {from}, {kind}"), || {
                let names = expect_answers(place, server, MANY)?;
                ensure!(names.len() == testbed.webs.len(), "{names:?}");
                Ok(())
            });
        }
    }
    testbed.apply_service(|service| client_ip(service, 10_800))?;
    for family in Family::BOTH {
        expect_one_backend(&mut checks, &testbed, family, "should be able to switch session affinity: on");
    }
    testbed.apply_service(|service| client_ip(service, 2))?;
    checks.that("should have session affinity timeout work for service with type clusterIP", || {
        expect_affinity_timeout(testbed.client.place(), testbed.cluster_ip(Family::V4))
    });
    checks.that("should have session affinity timeout work for NodePort service", || {
        expect_affinity_timeout(&testbed.external, testbed.node_port(0, Family::V4))
    });
    checks.finish(&testbed.cluster)
}

fn client_ip(service: &mut Value, seconds: u32) {
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
}

/// Each client with the frontends it uses.
fn clients(testbed: &Testbed, family: Family) -> [(&'static str, &Place, &'static str, SocketAddr); 5] {
    let (cluster_ip, node_port) = (testbed.cluster_ip(family), testbed.node_port(0, family));
    [
        ("pod", testbed.client.place(), "service with type clusterIP", cluster_ip),
        ("host", testbed.host(), "service with type clusterIP", cluster_ip),
        ("pod", testbed.client.place(), "NodePort service", node_port),
        ("host", testbed.host(), "NodePort service", node_port),
        ("external", &testbed.external, "NodePort service", node_port),
    ]
}

fn expect_one_backend(checks: &mut Checks, testbed: &Testbed, family: Family, what: &str) {
    let mut first: Vec<(&str, String)> = Vec::new();
    for (from, place, kind, server) in clients(testbed, family) {
        checks.that(format!("{what} for {kind}: {from} ({family})"), || {
            let names = expect_answers(place, server, TIMES)?;
            let [name] = names.as_slice() else { return Err(anyhow::anyhow!("{names:?}")) };
            let before = first.iter().find(|(client, _)| *client == from);
            ensure!(
                before.is_none_or(|(_, before)| before == name),
                "{name}, but {before:?} through another frontend"
            );
            first.push((from, name.clone()));
            Ok(())
        });
    }
    for (from, place) in [("pod", testbed.client.place()), ("host", testbed.host())] {
        checks.that(format!("{what}: {from}, a socket for each datagram ({family})"), || {
            let datagrams = place.send(testbed.service.at(family, ECHO_PORT), TIMES, &["--fresh"])?;
            datagrams.check()?;
            ensure!(datagrams.servers.len() == 1, "{datagrams:?}");
            Ok(())
        });
    }
}

/// A client that sends nothing for longer than the timeout may get another backend.
fn expect_affinity_timeout(place: &Place, server: SocketAddr) -> Result<()> {
    let kept = expect_answers(place, server, TIMES)?;
    ensure!(kept.len() == 1, "{kept:?}");
    let requests = place.keep_getting(server, Duration::from_millis(3_100))?;
    let other = requests.wait(Duration::from_secs(60), |request| {
        request.answer().is_some_and(|answer| answer.name != kept[0])
    });
    other.with_context(|| format!("every answer came from {}", kept[0]))?;
    let requests = requests.stop()?;
    ensure!(requests.iter().all(|request| request.answer().is_some()), "{requests:?}");
    Ok(())
}
