//! Agents are killed under load and started again: no traffic is lost, and correct rows are not
//! written again.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, ECHO_PORT, Family, Routing, Service, Spec, WEB_PORT, failures},
    traffic::now_us,
};

/// Connections per family: 1,000 in all.
const CONNECTIONS: u32 = 500;
const TIMEOUT: Duration = Duration::from_secs(60);
const MIN_ANSWERS: usize = 100;

#[test]
fn killed_agents_lose_no_traffic_and_restarted_ones_write_nothing_with_connect_time() -> Result<()> {
    agents_are_killed_under_load(&Spec { connect_tcp: true, ..Spec::new(2) })
}

#[test]
fn killed_agents_lose_no_traffic_and_restarted_ones_write_nothing_per_packet() -> Result<()> {
    agents_are_killed_under_load(&Spec { connect_tcp: false, ..Spec::new(2) })
}

#[test]
fn killed_agents_lose_no_traffic_and_restarted_ones_write_nothing_over_the_overlay() -> Result<()> {
    agents_are_killed_under_load(&Spec { routing: Routing::Vxlan, connect_tcp: false, ..Spec::new(2) })
}

fn agents_are_killed_under_load(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (client, near, far) = cluster.explain(made)?;
    let _servers = [near.serve()?, far.serve()?];
    let web = Service::of(&[&near, &far]);
    cluster.apply(&web)?;

    let mut traffic = Vec::new();
    for family in Family::BOTH {
        let connections =
            client.place().hold(web.at(family, ECHO_PORT), CONNECTIONS, Duration::from_secs(1))?;
        let via_service =
            client.place().keep_sending(web.at(family, ECHO_PORT), Duration::from_millis(5), &[])?;
        let direct = client.place().keep_sending(far.echo(family), Duration::from_millis(5), &[])?;
        let requests = client.place().keep_getting(web.at(family, WEB_PORT), Duration::from_millis(5))?;
        traffic.push((family, connections, via_service, direct, requests));
    }
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(MIN_ANSWERS, 0, TIMEOUT)?;
    }

    for node in cluster.nodes_mut() {
        node.agent_mut().kill()?;
    }
    let killed = now_us()?;
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(MIN_ANSWERS, killed, TIMEOUT)?;
    }
    let mut checks = Checks::of(spec.describe());
    for node in cluster.nodes_mut() {
        node.agent_mut().start()?;
    }
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        let status = node.agent_mut().await_ready()?.status;
        checks.that(format!("{name} adopted the pinned rows and wrote nothing"), || {
            ensure!(status.pins_adopted > 0, "no pins were adopted");
            ensure!(!status.tables.is_empty(), "status has no tables");
            let written: Vec<_> =
                status.tables.iter().filter(|table| table.writes + table.removals > 0).collect();
            ensure!(written.is_empty(), "{written:?}");
            let services = status.tables.iter().find(|table| table.name == "SERVICES");
            // six ports, and one address row per family
            ensure!(services.is_some_and(|table| table.used == 8), "{services:?}");
            Ok(())
        });
    }
    let ready = now_us()?;
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(MIN_ANSWERS, ready, TIMEOUT)?;
    }

    for (family, connections, via_service, direct, requests) in traffic {
        checks.that(format!("{CONNECTIONS} connections ({family})"), || {
            let connections = connections.finish()?;
            ensure!(
                connections.connections == CONNECTIONS && connections.broken.is_empty(),
                "{connections:?}"
            );
            ensure!(
                connections.received == connections.sent && connections.misdirected == 0,
                "{connections:?}"
            );
            Ok(())
        });
        checks.that(format!("UDP through the service ({family})"), || via_service.finish()?.check());
        checks.that(format!("UDP to the pod ({family})"), || direct.finish()?.check());
        checks.that(format!("requests ({family})"), || {
            let requests = requests.stop()?;
            ensure!(failures(&requests).is_empty(), "{:?} of {} failed", failures(&requests), requests.len());
            Ok(())
        });
    }
    checks.that("the restarted agents add a pod, remove a backend and delete a pod", || {
        let late = cluster.pod(1, "late")?;
        let _server = late.serve()?;
        cluster.apply(&Service::of(&[&late]))?;
        for family in Family::BOTH {
            client.place().get_as(web.at(family, WEB_PORT), 5, Some("late"), client.address(family))?;
        }
        near.check()?;
        late.delete()
    });
    checks.finish(&cluster)
}
