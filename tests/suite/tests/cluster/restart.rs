//! Agents are killed under load and started again: no traffic is lost, and correct rows are not
//! written again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{
        Checks, Client, Cluster, ECHO_PORT, Family, Node, Pod, Routing, Service, Spec, WEB_PORT, failures,
    },
    traffic::{
        now_us,
        report::{Datagrams, HeldConnections, Request},
    },
};
use serde_json::json;

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
    let load = Load::start(&client, &far, &web)?;

    for node in cluster.nodes_mut() {
        node.agent_mut().kill()?;
    }
    load.wait()?;
    let mut checks = Checks::of(spec.describe());
    let programs = attached_programs(&cluster)?;
    let began = Instant::now();
    for node in cluster.nodes_mut() {
        node.agent_mut().start()?;
    }
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        let status = node.agent_mut().await_ready()?.status;
        eprintln!("{name} is ready {:.0?} after the start", began.elapsed());
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
    checks.that("the restarted agents loaded no program", || {
        let after = attached_programs(&cluster)?;
        ensure!(after == programs, "{after:?}, before: {programs:?}");
        Ok(())
    });
    load.wait()?;
    load.finish(&mut checks);
    works_after_restart(&mut cluster, &mut checks, &client, &near, &web);
    checks.finish(&cluster)
}

/// With another configuration, the agents load other programs, and put them into the links of the
/// old ones.
#[test]
fn changed_programs_replace_the_attached_ones_under_load() -> Result<()> {
    let spec = Spec { connect_tcp: true, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (client, near, far) = cluster.explain(made)?;
    let _servers = [near.serve()?, far.serve()?];
    let web = Service::of(&[&near, &far]);
    cluster.apply(&web)?;
    let load = Load::start(&client, &far, &web)?;

    let programs = attached_programs(&cluster)?;
    for node in cluster.nodes_mut() {
        node.agent_mut().terminate()?;
        node.agent().change_config(|config| config["services"]["ping"] = json!(false))?;
        node.agent_mut().start()?;
        node.agent_mut().await_ready()?;
    }
    let mut checks = Checks::of(spec.describe());
    checks.that("every link has a new program", || {
        let after = attached_programs(&cluster)?;
        for (after, before) in after.iter().zip(&programs) {
            ensure!(after.keys().eq(before.keys()), "{after:?}, before: {before:?}");
            ensure!(after.iter().all(|(link, id)| before[link] != *id), "{after:?}, before: {before:?}");
        }
        Ok(())
    });
    load.wait()?;
    load.finish(&mut checks);
    works_after_restart(&mut cluster, &mut checks, &client, &near, &web);
    checks.finish(&cluster)
}

/// IDs of the programs in the pinned links of each node.
fn attached_programs(cluster: &Cluster) -> Result<Vec<BTreeMap<String, u32>>> {
    cluster.nodes().iter().map(Node::attached_programs).collect()
}

fn works_after_restart(cluster: &mut Cluster, checks: &mut Checks, client: &Pod, near: &Pod, web: &Service) {
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
}

/// Traffic of both families, of which nothing may be lost.
struct Load {
    families: Vec<FamilyLoad>,
}

struct FamilyLoad {
    family: Family,
    connections: Client<HeldConnections>,
    via_service: Client<Datagrams>,
    direct: Client<Datagrams>,
    requests: Client<Vec<Request>>,
}

impl Load {
    fn start(client: &Pod, far: &Pod, web: &Service) -> Result<Self> {
        let interval = Duration::from_millis(5);
        let of_family = |family| {
            let echo = web.at(family, ECHO_PORT);
            Ok(FamilyLoad {
                family,
                connections: client.place().hold(echo, CONNECTIONS, Duration::from_secs(1))?,
                via_service: client.place().keep_sending(echo, interval, &[])?,
                direct: client.place().keep_sending(far.echo(family), interval, &[])?,
                requests: client.place().keep_getting(web.at(family, WEB_PORT), interval)?,
            })
        };
        let load = Self { families: Family::BOTH.into_iter().map(of_family).collect::<Result<_>>()? };
        load.wait()?;
        Ok(load)
    }

    /// Waits for answers to requests that are sent from now on.
    fn wait(&self) -> Result<()> {
        let now = now_us()?;
        self.families.iter().try_for_each(|load| load.requests.wait_answers(MIN_ANSWERS, now, TIMEOUT))
    }

    fn finish(self, checks: &mut Checks) {
        for FamilyLoad { family, connections, via_service, direct, requests } in self.families {
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
                let failed = failures(&requests);
                ensure!(failed.is_empty(), "{failed:?} of {} failed", requests.len());
                Ok(())
            });
        }
    }
}
