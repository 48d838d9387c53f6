//! An agent dies under load and another takes over: traffic does not notice, and nothing is written that is right already.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, ECHO_PORT, Family, Routing, Service, Spec, WEB_PORT, failures},
    traffic::now_us,
};

/// Of each family: 1,000 in all.
const CONNECTIONS: u32 = 500;
const PATIENCE: Duration = Duration::from_secs(60);
const ENOUGH: usize = 100;

#[test]
fn nothing_is_lost_when_agents_are_killed_and_the_next_write_nothing_with_connect_time() -> Result<()> {
    killed_under_load(&Spec { connect_tcp: true, ..Spec::new(2) })
}

#[test]
fn nothing_is_lost_when_agents_are_killed_and_the_next_write_nothing_by_packets_alone() -> Result<()> {
    killed_under_load(&Spec { connect_tcp: false, ..Spec::new(2) })
}

#[test]
fn nothing_is_lost_when_agents_are_killed_and_the_next_write_nothing_over_the_overlay() -> Result<()> {
    killed_under_load(&Spec { routing: Routing::Vxlan, connect_tcp: false, ..Spec::new(2) })
}

fn killed_under_load(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (client, near, far) = cluster.explain(made)?;
    let _servers = [near.serve()?, far.serve()?];
    let web = Service::of(&[&near, &far]);
    cluster.apply(&web)?;

    let mut traffic = Vec::new();
    for family in Family::BOTH {
        let held = client.place().hold(web.at(family, ECHO_PORT), CONNECTIONS, Duration::from_secs(1))?;
        let via_service =
            client.place().keep_sending(web.at(family, ECHO_PORT), Duration::from_millis(5), &[])?;
        let direct = client.place().keep_sending(far.echo(family), Duration::from_millis(5), &[])?;
        let requests = client.place().keep_getting(web.at(family, WEB_PORT), Duration::from_millis(5))?;
        traffic.push((family, held, via_service, direct, requests));
    }
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(ENOUGH, 0, PATIENCE)?;
    }

    for node in cluster.nodes_mut() {
        node.agent_mut().kill()?;
    }
    let killed = now_us()?;
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(ENOUGH, killed, PATIENCE)?;
    }
    let mut checks = Checks::of(spec.describe());
    for node in cluster.nodes_mut() {
        node.agent_mut().start()?;
    }
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        let status = node.agent_mut().await_ready()?.status;
        checks.that(format!("{name} adopted what it found and wrote nothing"), || {
            ensure!(status.pins_adopted > 0, "no pins were adopted");
            ensure!(!status.tables.is_empty(), "no tables are shown");
            let written: Vec<_> =
                status.tables.iter().filter(|table| table.writes + table.removals > 0).collect();
            ensure!(written.is_empty(), "{written:?}");
            let services = status.tables.iter().find(|table| table.name == "SERVICES");
            // six ports, and the addresses of both families
            ensure!(services.is_some_and(|table| table.used == 8), "{services:?}");
            Ok(())
        });
    }
    let ready = now_us()?;
    for (_, _, _, _, requests) in &traffic {
        requests.wait_answers(ENOUGH, ready, PATIENCE)?;
    }

    for (family, held, via_service, direct, requests) in traffic {
        checks.that(format!("{CONNECTIONS} connections ({family})"), || {
            let held = held.finish()?;
            ensure!(held.connections == CONNECTIONS && held.broken.is_empty(), "{held:?}");
            ensure!(held.received == held.sent && held.misdirected == 0, "{held:?}");
            Ok(())
        });
        checks.that(format!("UDP through the service ({family})"), || via_service.finish()?.check());
        checks.that(format!("UDP to the pod ({family})"), || direct.finish()?.check());
        checks.that(format!("requests ({family})"), || {
            let requests = requests.stop()?;
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            Ok(())
        });
    }
    checks.that("the next agents work: a pod comes, a backend goes, a pod goes", || {
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
