//! Backends are added and removed while clients use them.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, ECHO_PORT, Family, Service, Source, Spec, WEB_PORT, failures, wait},
    traffic::now_us,
};

const TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);
const REQUESTS: usize = 50;

#[test]
fn removing_a_backend_fails_no_request_with_connect_time_translation() -> Result<()> {
    removing_a_backend_fails_no_request(&Spec { connect_tcp: true, ..Spec::new(2) })
}

#[test]
fn removing_a_backend_fails_no_request_per_packet() -> Result<()> {
    removing_a_backend_fails_no_request(&Spec { connect_tcp: false, ..Spec::new(2) })
}

#[test]
fn removing_a_backend_fails_no_request_from_an_api_server() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(2) };
    removing_a_backend_fails_no_request(&spec)
}

/// New connections go to another backend, open connections stay, and UDP flows move.
fn removing_a_backend_fails_no_request(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "stays")?, cluster.pod(1, "leaves")?)))();
    let (client, stays, leaves) = cluster.explain(made)?;
    let _servers = [stays.serve()?, leaves.serve()?];
    // all flows begin at `leaves`, which is the only backend
    cluster.apply(&Service::of(&[&leaves]))?;
    let web = Service::of(&[&stays]);
    let mut traffic = Vec::new();
    for family in Family::BOTH {
        let held = client.place().hold(web.at(family, ECHO_PORT), 20, Duration::from_millis(20))?;
        let datagrams = client.place().keep_sending(web.at(family, ECHO_PORT), INTERVAL, &[])?;
        let requests = client.place().keep_getting(web.at(family, WEB_PORT), INTERVAL)?;
        requests.wait_answers(REQUESTS, 0, TIMEOUT)?;
        traffic.push((family, held, datagrams, requests));
    }

    cluster.apply(&Service::of(&[&leaves, &stays]))?;
    cluster.apply(&web)?;
    let gone = now_us()?;
    for (_, _, _, requests) in &traffic {
        requests.wait_answers(REQUESTS, gone, TIMEOUT)?;
    }

    let mut checks = Checks::of(spec.describe());
    for (family, held, datagrams, requests) in traffic {
        checks.that(format!("requests ({family})"), || {
            let requests = requests.stop()?;
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            let strays =
                requests.iter().filter(|request| request.began_us > gone && request.is_from("leaves"));
            let strays = strays.count();
            ensure!(strays == 0, "{strays} requests reached the removed backend");
            Ok(())
        });
        checks.that(format!("open connections stay with their backend ({family})"), || {
            let held = held.finish()?;
            ensure!(held.broken.is_empty() && held.received == held.sent, "{held:?}");
            ensure!(held.servers == [("leaves".to_owned(), 20)].into(), "{held:?}");
            Ok(())
        });
        checks.that(format!("a UDP flow moves without a loss ({family})"), || {
            let datagrams = datagrams.finish()?;
            datagrams.check()?;
            let names: Vec<_> = datagrams.servers.keys().map(String::as_str).collect();
            ensure!(names == ["leaves", "stays"], "{datagrams:?}");
            Ok(())
        });
    }
    checks.finish(&cluster)
}

#[test]
fn the_last_backend_is_removed_and_another_added_by_manifests() -> Result<()> {
    the_last_backend_is_removed_and_another_added(&Spec { connect_tcp: false, ..Spec::new(1) })
}

#[test]
fn the_last_backend_is_removed_and_another_added_from_an_api_server() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(1) };
    the_last_backend_is_removed_and_another_added(&spec)
}

fn the_last_backend_is_removed_and_another_added(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let (client, web) = cluster.explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "web")?)))())?;
    let _server = web.serve()?;
    cluster.apply(&Service::of(&[&web]))?;
    let at = Service::of(&[]).at(Family::V4, WEB_PORT);
    cluster.explain(client.place().get_as(at, 3, Some("web"), client.address(Family::V4)))?;

    cluster.apply(&Service::of(&[]))?;
    let node = &cluster.nodes()[0];
    let before = node.count("from_pod", "no_backend")?;
    let requests = client.place().get(at, 1)?;
    ensure!(failures(&requests).len() == 1, "{requests:?}");
    ensure!(node.count("from_pod", "no_backend")? > before, "no packet was dropped as no_backend");

    cluster.apply(&Service::of(&[&web]))?;
    cluster.explain(client.place().get_as(at, 3, Some("web"), client.address(Family::V4)))?;
    // without the service its address is like any other outside the cluster
    cluster.withdraw("service-web")?;
    let node = &cluster.nodes()[0];
    wait::until("the service to be removed", TIMEOUT, || {
        let before = node.count("from_pod", "to_outside")?;
        let _unanswered = client.place().get(at, 1)?;
        Ok((node.count("from_pod", "to_outside")? > before).then_some(()))
    })
}
