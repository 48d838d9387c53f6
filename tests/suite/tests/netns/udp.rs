//! UDP backends that go while sockets live on: whoever was sent to one of them is sent elsewhere.
//!
//! Three ways lead to a backend: a socket that was translated when it connected, one whose datagrams are translated as
//! they are sent, and packets that are translated on their way.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Client, Cluster, ECHO_PORT, Family, Place, Pod, Process, Service, Spec},
    traffic::{
        now_us,
        report::{Datagrams, Request},
    },
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);
/// Requests, one after the other, that are waited for as a measure of time that things are let go on.
const A_WHILE: usize = 50;
/// A connected socket is found and ended after the tables say that its backend is gone.
const FOUND_US: u64 = 500_000;
/// What was on its way to a socket as it ended.
const ON_THE_WAY: u64 = 3;

/// A conversation at 5 ms over one socket.
struct Talk {
    who: String,
    /// Its socket has one peer, which is a backend.
    is_bound: bool,
    client: Client<Datagrams>,
}

/// Pods on two nodes: a client on the first, two servers on the second.
struct World {
    client: Pod,
    stays: Pod,
    leaves: Pod,
    cluster: Cluster,
    _servers: [Process; 2],
}

impl World {
    fn create(spec: &Spec) -> Result<Self> {
        let cluster = Cluster::create(spec)?;
        let made =
            (|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "stays")?, cluster.pod(1, "leaves")?)))();
        let (client, stays, leaves) = cluster.explain(made)?;
        let servers = [stays.serve()?, leaves.serve()?];
        Ok(Self { client, stays, leaves, cluster, _servers: servers })
    }

    /// Sockets of a pod and of its host, connected and not, to the service.
    fn talk(&self, at_connect: bool) -> Result<Vec<Talk>> {
        let web = Service::of(&[]);
        let mut talks = Vec::new();
        for family in Family::BOTH {
            for (who, place) in self.askers() {
                for (how, more) in [("connected", &["--connected"][..]), ("unconnected", &[])] {
                    talks.push(Talk {
                        who: format!("{how} socket of a {who}, {family}"),
                        is_bound: at_connect && how == "connected",
                        client: place.keep_sending(web.at(family, ECHO_PORT), INTERVAL, more)?,
                    });
                }
            }
        }
        Ok(talks)
    }

    fn askers(&self) -> [(&'static str, &Place); 2] {
        [("pod", self.client.place()), ("host", self.cluster.nodes()[0].place())]
    }

    /// `leaves` terminates, and may serve while it does; returns when every agent has it so.
    fn ending(&mut self, serves: bool) -> Result<()> {
        let mut objects = Service::of(&[&self.leaves, &self.stays]).objects();
        let slices = objects.iter_mut().filter_map(|object| object["endpoints"].as_array_mut());
        for endpoint in slices.flatten().filter(|endpoint| endpoint["targetRef"]["name"] == "leaves") {
            endpoint["conditions"] = json!({"ready": false, "serving": serves, "terminating": true});
        }
        // at least one of the slices is another than before
        self.cluster.change(1, |cluster| cluster.apply_objects("service-web", &objects))
    }

    /// Requests to a pod as a clock.
    fn clock(&self) -> Result<Client<Vec<Request>>> {
        self.client.place().keep_getting(self.stays.web(Family::V4), INTERVAL)
    }
}

/// A world whose sockets were translated when they connected, all to the pod that leaves; and a clock.
fn talking(spec: &Spec) -> Result<(World, Vec<Talk>, Client<Vec<Request>>)> {
    let mut world = World::create(spec)?;
    world.cluster.apply(&Service::of(&[&world.leaves]))?;
    let talks = world.talk(true)?;
    let clock = world.clock()?;
    clock.wait_answers(A_WHILE, 0, PATIENCE)?;
    Ok((world, talks, clock))
}

/// After `gone`, nothing reached `leaves`; what was sent later reached `stays`.
fn has_moved(talk: Talk, gone: u64) -> Result<Datagrams> {
    let Talk { is_bound, client, .. } = talk;
    let heard = client.finish()?;
    let latest = |name: &str| heard.latest_us.get(name).copied().unwrap_or(0);
    let (until, may_be_lost) = if is_bound { (gone + FOUND_US, ON_THE_WAY) } else { (gone, 0) };
    ensure!(latest("leaves") > 0 && latest("stays") > until, "it has not moved: {heard:?}");
    ensure!(
        latest("leaves") <= until,
        "sent to the backend {} ms after it was gone: {heard:?}",
        latest("leaves").saturating_sub(gone) / 1_000
    );
    ensure!(heard.ended == u64::from(is_bound), "{heard:?}");
    ensure!(heard.lost <= may_be_lost && heard.errors.is_empty() && heard.misdirected == 0, "{heard:?}");
    Ok(heard)
}

#[test]
fn a_backend_leaves_its_sockets_behind_with_connect_time() -> Result<()> {
    a_backend_leaves(&Spec {
        connect_udp: true,
        config: serde_json::json!({"log": "dataplane_agent=debug"}),
        ..Spec::new(2)
    })
}

#[test]
fn a_backend_leaves_its_sockets_behind_by_packets_alone() -> Result<()> {
    a_backend_leaves(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

/// Conversations with the service move; those with the pod itself are nobody's business.
fn a_backend_leaves(spec: &Spec) -> Result<()> {
    let mut world = World::create(spec)?;
    world.cluster.apply(&Service::of(&[&world.leaves]))?;
    let talks = world.talk(spec.connect_udp)?;
    let mut direct = Vec::new();
    for family in Family::BOTH {
        for (who, place) in world.askers() {
            let client = place.keep_sending(world.leaves.echo(family), INTERVAL, &["--connected"])?;
            direct.push((format!("{who}, {family}"), client));
        }
    }
    let clock = world.clock()?;
    clock.wait_answers(A_WHILE, 0, PATIENCE)?;

    world.cluster.apply(&Service::of(&[&world.stays]))?;
    let gone = now_us()?;
    clock.wait_answers(A_WHILE, gone + FOUND_US, PATIENCE)?;

    let mut checks = Checks::of(spec.describe());
    for talk in talks {
        checks.that(talk.who.clone(), || has_moved(talk, gone).map(drop));
    }
    for (who, client) in direct {
        checks.that(format!("connected to the pod itself: {who}"), || {
            let heard = client.finish()?;
            ensure!(heard.is_complete() && heard.ended == 0, "{heard:?}");
            Ok(())
        });
    }
    checks.finish(&world.cluster)
}

#[test]
fn a_backend_that_ends_is_talked_to_while_it_serves_with_connect_time() -> Result<()> {
    a_backend_that_ends_is_talked_to_while_it_serves(&Spec { connect_udp: true, ..Spec::new(2) })
}

#[test]
fn a_backend_that_ends_is_talked_to_while_it_serves_by_packets_alone() -> Result<()> {
    a_backend_that_ends_is_talked_to_while_it_serves(&Spec { connect_udp: false, ..Spec::new(2) })
}

/// As kube-proxy has it: who is new goes elsewhere, who is there stays until it serves no more.
fn a_backend_that_ends_is_talked_to_while_it_serves(spec: &Spec) -> Result<()> {
    let mut world = World::create(spec)?;
    world.cluster.apply(&Service::of(&[&world.leaves]))?;
    let mut talks = world.talk(spec.connect_udp)?;
    // a datagram that is translated as it is sent knows nothing of those before it
    talks.retain(|talk| talk.is_bound || !spec.connect_udp);
    let clock = world.clock()?;
    clock.wait_answers(A_WHILE, 0, PATIENCE)?;

    world.ending(true)?;
    let ending = now_us()?;
    let web = Service::of(&[]);
    for (_, place) in world.askers() {
        for family in Family::BOTH {
            let new = place.send(web.at(family, ECHO_PORT), 5, &["--connected"])?;
            ensure!(new.is_complete() && new.servers == [("stays".to_owned(), 5)].into(), "{new:?}");
        }
    }
    clock.wait_answers(A_WHILE, ending + FOUND_US, PATIENCE)?;
    let still = now_us()?;
    world.ending(false)?;
    let gone = now_us()?;
    clock.wait_answers(A_WHILE, gone + FOUND_US, PATIENCE)?;

    let mut checks = Checks::of(spec.describe());
    for talk in talks {
        checks.that(talk.who.clone(), || {
            let heard = has_moved(talk, gone)?;
            let close = heard.latest_us["leaves"] + 10 * INTERVAL.as_micros() as u64 > still;
            ensure!(close, "it moved before it had to: {heard:?}");
            Ok(())
        });
    }
    checks.finish(&world.cluster)
}

#[test]
fn when_all_backends_leave_no_socket_stays_and_all_come_back() -> Result<()> {
    let spec = Spec { connect_udp: true, ..Spec::new(2) };
    let (mut world, talks, clock) = talking(&spec)?;

    world.cluster.apply(&Service::of(&[]))?;
    let gone = now_us()?;
    clock.wait_answers(A_WHILE, gone + FOUND_US, PATIENCE)?;
    world.cluster.apply(&Service::of(&[&world.stays]))?;
    let back = now_us()?;
    clock.wait_answers(A_WHILE, back, PATIENCE)?;

    let mut checks = Checks::of(spec.describe());
    for Talk { who, is_bound, client } in talks {
        checks.that(who, || {
            let heard = client.finish()?;
            let latest = |name: &str| heard.latest_us.get(name).copied().unwrap_or(0);
            let until = if is_bound { gone + FOUND_US } else { gone };
            ensure!(latest("leaves") > 0 && latest("leaves") <= until, "{heard:?}");
            ensure!(latest("stays") > back, "nobody came back: {heard:?}");
            ensure!(heard.ended == u64::from(is_bound), "{heard:?}");
            Ok(())
        });
    }
    checks.finish(&world.cluster)
}

#[test]
fn a_backend_that_left_while_no_agent_ran_leaves_no_socket_behind() -> Result<()> {
    let spec = Spec { connect_udp: true, ..Spec::new(2) };
    let (mut world, talks, clock) = talking(&spec)?;

    let left = Service::of(&[&world.stays]);
    world.cluster.nodes_mut()[0].agent_mut().kill()?;
    world.cluster.apply_objects("service-web", &left.objects())?;
    let node = &mut world.cluster.nodes_mut()[0];
    node.agent_mut().start()?;
    node.agent_mut().await_ready()?;
    node.await_service(&left)?;
    let gone = now_us()?;
    clock.wait_answers(A_WHILE, gone + FOUND_US, PATIENCE)?;

    let mut checks = Checks::of(spec.describe());
    for talk in talks {
        checks.that(talk.who.clone(), || has_moved(talk, gone).map(drop));
    }
    checks.finish(&world.cluster)
}
