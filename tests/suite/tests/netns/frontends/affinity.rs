//! `sessionAffinity: ClientIP`: a client has one backend, whatever way it takes, until the service wants it otherwise.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Place, Spec};
use serde_json::{Value, json};

use super::{Bed, ECHO_PORT, MANY, TIMES, answered};

#[test]
fn session_affinity_with_connect_time() -> Result<()> {
    affinity(&Spec { connect_tcp: true, connect_udp: true, ..Spec::new(2) })
}

#[test]
fn session_affinity_by_packets_alone() -> Result<()> {
    affinity(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

fn affinity(spec: &Spec) -> Result<()> {
    let mut bed = Bed::create(spec, &[0, 1, 1])?;
    let mut checks = Checks::of(spec.describe());
    bed.tell(|service| client_ip(service, 10_800))?;
    for family in Family::BOTH {
        one_answer(&mut checks, &bed, family, "should have session affinity work");
    }
    bed.tell(|_| {})?;
    for family in Family::BOTH {
        for (who, place, kind, server) in clients(&bed, family) {
            checks.that(format!("should be able to switch session affinity: off: {who}, {kind}"), || {
                let names = answered(place, server, MANY)?;
                ensure!(names.len() == bed.webs.len(), "{names:?}");
                Ok(())
            });
        }
    }
    bed.tell(|service| client_ip(service, 10_800))?;
    for family in Family::BOTH {
        one_answer(&mut checks, &bed, family, "should be able to switch session affinity: on");
    }
    bed.tell(|service| client_ip(service, 2))?;
    checks.that("should have session affinity timeout work for service with type clusterIP", || {
        timeout(bed.client.place(), bed.cluster_ip(Family::V4))
    });
    checks.that("should have session affinity timeout work for NodePort service", || {
        timeout(&bed.outside, bed.node_port(0, Family::V4))
    });
    checks.finish(&bed.cluster)
}

fn client_ip(service: &mut Value, seconds: u32) {
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
}

/// Who asks, and where.
fn clients(bed: &Bed, family: Family) -> [(&'static str, &Place, &'static str, SocketAddr); 5] {
    let (cluster_ip, node_port) = (bed.cluster_ip(family), bed.node_port(0, family));
    [
        ("pod", bed.client.place(), "service with type clusterIP", cluster_ip),
        ("host", bed.host(), "service with type clusterIP", cluster_ip),
        ("pod", bed.client.place(), "NodePort service", node_port),
        ("host", bed.host(), "NodePort service", node_port),
        ("outside", &bed.outside, "NodePort service", node_port),
    ]
}

fn one_answer(checks: &mut Checks, bed: &Bed, family: Family, what: &str) {
    let mut first: Vec<(&str, String)> = Vec::new();
    for (who, place, kind, server) in clients(bed, family) {
        checks.that(format!("{what} for {kind}: {who} ({family})"), || {
            let names = answered(place, server, TIMES)?;
            let [name] = names.as_slice() else { return Err(anyhow::anyhow!("{names:?}")) };
            let before = first.iter().find(|(client, _)| *client == who);
            ensure!(before.is_none_or(|(_, before)| before == name), "{name} here, elsewhere {before:?}");
            first.push((who, name.clone()));
            Ok(())
        });
    }
    for (who, place) in [("pod", bed.client.place()), ("host", bed.host())] {
        checks.that(format!("{what}: {who}, a socket for each datagram ({family})"), || {
            let datagrams = place.send(bed.service.at(family, ECHO_PORT), TIMES, &["--fresh"])?;
            datagrams.check()?;
            ensure!(datagrams.servers.len() == 1, "{datagrams:?}");
            Ok(())
        });
    }
}

/// Whoever was away for longer than the timeout may get another backend.
fn timeout(place: &Place, server: SocketAddr) -> Result<()> {
    let kept = answered(place, server, TIMES)?;
    ensure!(kept.len() == 1, "{kept:?}");
    let asking = place.keep_getting(server, Duration::from_millis(3_100))?;
    let other = asking.wait(Duration::from_secs(60), |request| {
        request.answer().is_some_and(|answer| answer.name != kept[0])
    });
    other.with_context(|| format!("always {}", kept[0]))?;
    let requests = asking.stop()?;
    ensure!(requests.iter().all(|request| request.answer().is_some()), "{requests:?}");
    Ok(())
}
