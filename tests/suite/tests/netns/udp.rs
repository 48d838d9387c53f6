//! UDP backends are removed while client sockets stay open: the clients move to another backend.
//!
//! Datagrams are translated in three ways: at `connect()`, at `sendmsg()`, and per packet.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{
        Checks, Client, Cluster, ECHO_PORT, Family, Place, Pod, Process, Service, Spec, service_addresses,
    },
    traffic::{
        now_us,
        report::{Datagrams, Request},
    },
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);
/// Number of sequential requests that serve as a measure of time.
const REQUESTS: usize = 50;
/// Connected sockets of a removed backend are ended within this time after the table update.
const SOCKETS_ENDED_US: u64 = 500_000;
/// Datagrams that may be in flight when a socket is ended.
const IN_FLIGHT: u64 = 3;

/// A client that sends every 5 ms over one socket.
struct Sender {
    name: String,
    /// The socket is connected to the backend itself.
    is_translated_at_connect: bool,
    client: Client<Datagrams>,
}

/// Pods on two nodes: a client on the first, two servers on the second.
struct Testbed {
    client: Pod,
    stays: Pod,
    leaves: Pod,
    cluster: Cluster,
    _servers: [Process; 2],
}

impl Testbed {
    fn create(spec: &Spec) -> Result<Self> {
        let cluster = Cluster::create(spec)?;
        let made =
            (|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "stays")?, cluster.pod(1, "leaves")?)))();
        let (client, stays, leaves) = cluster.explain(made)?;
        let servers = [stays.serve()?, leaves.serve()?];
        Ok(Self { client, stays, leaves, cluster, _servers: servers })
    }

    /// Starts connected and unconnected sockets of a pod and of its host, to the service.
    fn start_senders(&self, at_connect: bool) -> Result<Vec<Sender>> {
        let web = Service::of(&[]);
        let mut senders = Vec::new();
        for family in Family::BOTH {
            for (from, place) in self.clients() {
                for (how, more) in [("connected", &["--connected"][..]), ("unconnected", &[])] {
                    senders.push(Sender {
                        name: format!("{how} socket of a {from}, {family}"),
                        is_translated_at_connect: at_connect && how == "connected",
                        client: place.keep_sending(web.at(family, ECHO_PORT), INTERVAL, more)?,
                    });
                }
            }
        }
        Ok(senders)
    }

    fn clients(&self) -> [(&'static str, &Place); 2] {
        [("pod", self.client.place()), ("host", self.cluster.nodes()[0].place())]
    }

    /// Makes the endpoint `leaves` terminating, serving or not; returns when all agents have it.
    fn set_terminating(&mut self, serves: bool) -> Result<()> {
        let mut objects = Service::of(&[&self.leaves, &self.stays]).objects();
        let slices = objects.iter_mut().filter_map(|object| object["endpoints"].as_array_mut());
        for endpoint in slices.flatten().filter(|endpoint| endpoint["targetRef"]["name"] == "leaves") {
            endpoint["conditions"] = json!({"ready": false, "serving": serves, "terminating": true});
        }
        // at least one slice differs from the previous one
        self.cluster.change(1, |cluster| cluster.apply_objects("service-web", &objects))
    }

    /// Requests to a pod, as a clock.
    fn clock(&self) -> Result<Client<Vec<Request>>> {
        self.client.place().keep_getting(self.stays.web(Family::V4), INTERVAL)
    }
}

/// A testbed with senders that were translated at `connect()`, all to `leaves`; and a clock.
fn with_connected_senders(spec: &Spec) -> Result<(Testbed, Vec<Sender>, Client<Vec<Request>>)> {
    let mut testbed = Testbed::create(spec)?;
    testbed.cluster.apply(&Service::of(&[&testbed.leaves]))?;
    let senders = testbed.start_senders(true)?;
    let clock = testbed.clock()?;
    clock.wait_answers(REQUESTS, 0, TIMEOUT)?;
    Ok((testbed, senders, clock))
}

/// After `gone`, no datagram reached `leaves`, and later ones reached `stays`.
fn expect_moved(sender: Sender, gone: u64) -> Result<Datagrams> {
    let Sender { is_translated_at_connect, client, .. } = sender;
    let report = client.finish()?;
    let latest = |name: &str| report.latest_us.get(name).copied().unwrap_or(0);
    let (until, may_be_lost) =
        if is_translated_at_connect { (gone + SOCKETS_ENDED_US, IN_FLIGHT) } else { (gone, 0) };
    ensure!(latest("leaves") > 0 && latest("stays") > until, "the sender did not move: {report:?}");
    ensure!(
        latest("leaves") <= until,
        "sent to the backend {} ms after it was gone: {report:?}",
        latest("leaves").saturating_sub(gone) / 1_000
    );
    ensure!(report.ended == u64::from(is_translated_at_connect), "{report:?}");
    ensure!(report.lost <= may_be_lost && report.errors.is_empty() && report.misdirected == 0, "{report:?}");
    Ok(report)
}

#[test]
fn sockets_leave_a_removed_backend_with_connect_time_translation() -> Result<()> {
    sockets_leave_a_removed_backend(&Spec {
        connect_udp: true,
        config: serde_json::json!({"log": "dataplane_agent=debug"}),
        ..Spec::new(2)
    })
}

#[test]
fn sockets_leave_a_removed_backend_per_packet() -> Result<()> {
    sockets_leave_a_removed_backend(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

/// Flows to the service move; flows to the pod's own address stay, and those to another service
/// that keeps the backend.
fn sockets_leave_a_removed_backend(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec)?;
    testbed.cluster.apply(&Service::of(&[&testbed.leaves]))?;
    let keeps = Service {
        name: "keeps".to_owned(),
        addresses: service_addresses(2).to_vec(),
        ..Service::of(&[&testbed.leaves])
    };
    testbed.cluster.apply(&keeps)?;
    let senders = testbed.start_senders(spec.connect_udp)?;
    let mut direct = Vec::new();
    for family in Family::BOTH {
        for (from, place) in testbed.clients() {
            let client = place.keep_sending(testbed.leaves.echo(family), INTERVAL, &["--connected"])?;
            direct.push((format!("connected to the pod itself: {from}, {family}"), client));
            let client = place.keep_sending(keeps.at(family, ECHO_PORT), INTERVAL, &["--connected"])?;
            direct.push((format!("connected to another service: {from}, {family}"), client));
        }
    }
    let clock = testbed.clock()?;
    clock.wait_answers(REQUESTS, 0, TIMEOUT)?;

    testbed.cluster.apply(&Service::of(&[&testbed.stays]))?;
    let gone = now_us()?;
    clock.wait_answers(REQUESTS, gone + SOCKETS_ENDED_US, TIMEOUT)?;

    let mut checks = Checks::of(spec.describe());
    for sender in senders {
        checks.that(sender.name.clone(), || expect_moved(sender, gone).map(drop));
    }
    for (what, client) in direct {
        checks.that(what, || {
            let report = client.finish()?;
            ensure!(report.is_complete() && report.ended == 0, "{report:?}");
            Ok(())
        });
    }
    checks.finish(&testbed.cluster)
}

#[test]
fn sockets_stay_with_a_terminating_backend_while_it_serves_with_connect_time_translation() -> Result<()> {
    sockets_stay_with_a_terminating_backend_while_it_serves(&Spec { connect_udp: true, ..Spec::new(2) })
}

#[test]
fn sockets_stay_with_a_terminating_backend_while_it_serves_per_packet() -> Result<()> {
    sockets_stay_with_a_terminating_backend_while_it_serves(&Spec { connect_udp: false, ..Spec::new(2) })
}

/// As with kube-proxy: new flows go to another backend, existing flows stay while it serves.
fn sockets_stay_with_a_terminating_backend_while_it_serves(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec)?;
    testbed.cluster.apply(&Service::of(&[&testbed.leaves]))?;
    let mut senders = testbed.start_senders(spec.connect_udp)?;
    // `sendmsg()` translation has no state: each datagram selects a backend
    senders.retain(|sender| sender.is_translated_at_connect || !spec.connect_udp);
    let clock = testbed.clock()?;
    clock.wait_answers(REQUESTS, 0, TIMEOUT)?;

    testbed.set_terminating(true)?;
    let terminating = now_us()?;
    let web = Service::of(&[]);
    for (_, place) in testbed.clients() {
        for family in Family::BOTH {
            let new = place.send(web.at(family, ECHO_PORT), 5, &["--connected"])?;
            ensure!(new.is_complete() && new.servers == [("stays".to_owned(), 5)].into(), "{new:?}");
        }
    }
    clock.wait_answers(REQUESTS, terminating + SOCKETS_ENDED_US, TIMEOUT)?;
    let still_serving = now_us()?;
    testbed.set_terminating(false)?;
    let gone = now_us()?;
    clock.wait_answers(REQUESTS, gone + SOCKETS_ENDED_US, TIMEOUT)?;

    let mut checks = Checks::of(spec.describe());
    for sender in senders {
        checks.that(sender.name.clone(), || {
            let report = expect_moved(sender, gone)?;
            let close = report.latest_us["leaves"] + 10 * INTERVAL.as_micros() as u64 > still_serving;
            ensure!(close, "the sender moved while the backend served: {report:?}");
            Ok(())
        });
    }
    checks.finish(&testbed.cluster)
}

#[test]
fn sockets_end_without_backends_and_reach_the_next_one() -> Result<()> {
    let spec = Spec { connect_udp: true, ..Spec::new(2) };
    let (mut testbed, senders, clock) = with_connected_senders(&spec)?;

    testbed.cluster.apply(&Service::of(&[]))?;
    let gone = now_us()?;
    clock.wait_answers(REQUESTS, gone + SOCKETS_ENDED_US, TIMEOUT)?;
    testbed.cluster.apply(&Service::of(&[&testbed.stays]))?;
    let back = now_us()?;
    clock.wait_answers(REQUESTS, back, TIMEOUT)?;

    let mut checks = Checks::of(spec.describe());
    for Sender { name, is_translated_at_connect, client } in senders {
        checks.that(name, || {
            let report = client.finish()?;
            let latest = |name: &str| report.latest_us.get(name).copied().unwrap_or(0);
            let until = if is_translated_at_connect { gone + SOCKETS_ENDED_US } else { gone };
            ensure!(latest("leaves") > 0 && latest("leaves") <= until, "{report:?}");
            ensure!(latest("stays") > back, "no datagram reached the new backend: {report:?}");
            ensure!(report.ended == u64::from(is_translated_at_connect), "{report:?}");
            Ok(())
        });
    }
    checks.finish(&testbed.cluster)
}

#[test]
fn sockets_leave_a_backend_removed_while_no_agent_ran() -> Result<()> {
    let spec = Spec { connect_udp: true, ..Spec::new(2) };
    let (mut testbed, senders, clock) = with_connected_senders(&spec)?;

    let left = Service::of(&[&testbed.stays]);
    testbed.cluster.nodes_mut()[0].agent_mut().kill()?;
    testbed.cluster.apply_objects("service-web", &left.objects())?;
    let node = &mut testbed.cluster.nodes_mut()[0];
    node.agent_mut().start()?;
    node.agent_mut().await_ready()?;
    node.await_service(&left)?;
    let gone = now_us()?;
    clock.wait_answers(REQUESTS, gone + SOCKETS_ENDED_US, TIMEOUT)?;

    let mut checks = Checks::of(spec.describe());
    for sender in senders {
        checks.that(sender.name.clone(), || expect_moved(sender, gone).map(drop));
    }
    checks.finish(&testbed.cluster)
}

const NODE_PORT: u16 = 30_007;

#[test]
fn socket_gets_each_answer_by_the_name_it_used_with_connect_time_translation() -> Result<()> {
    socket_gets_each_answer_by_the_name_it_used(&Spec { connect_udp: true, ..Spec::new(2) })
}

#[test]
fn socket_gets_each_answer_by_the_name_it_used_per_packet() -> Result<()> {
    socket_gets_each_answer_by_the_name_it_used(&Spec { connect_udp: false, ..Spec::new(2) })
}

/// One socket sends to several frontends of one backend before it reads any answer.
fn socket_gets_each_answer_by_the_name_it_used(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec)?;
    let web = Service::of(&[&testbed.leaves]);
    let other = Service {
        name: "other".to_owned(),
        addresses: service_addresses(2).to_vec(),
        ..Service::of(&[&testbed.leaves])
    };
    let mut objects = web.objects();
    objects[0]["spec"]["type"] = json!("NodePort");
    for port in objects[0]["spec"]["ports"].as_array_mut().into_iter().flatten() {
        if port["protocol"] == "UDP" {
            port["nodePort"] = json!(NODE_PORT);
        }
    }
    testbed.cluster.change(1, |cluster| cluster.apply_objects("service-web", &objects))?;
    testbed.cluster.apply(&other)?;

    let mut checks = Checks::of(spec.describe());
    let node = &testbed.cluster.nodes()[0];
    for family in Family::BOTH {
        let cluster_ip = web.at(family, ECHO_PORT);
        let other_ip = other.at(family, ECHO_PORT);
        let node_port = SocketAddr::new(node.address(family), NODE_PORT);
        let pod = testbed.leaves.echo(family);
        for asked in [
            vec![cluster_ip, node_port],
            vec![node_port, cluster_ip],
            vec![cluster_ip, other_ip, node_port, cluster_ip],
            vec![node_port, other_ip, cluster_ip, node_port, other_ip],
        ] {
            for (from, place) in testbed.clients() {
                checks.that(format!("{from}: {asked:?}"), || {
                    let sources = place.ask(&asked)?;
                    let expected: Vec<_> = asked.iter().copied().map(Some).collect();
                    ensure!(sources == expected, "{sources:?}");
                    Ok(())
                });
            }
        }
        checks.that(format!("a pod's own address ({family})"), || {
            let sources = testbed.client.place().ask(&[pod])?;
            ensure!(sources == [Some(pod)], "{sources:?}");
            Ok(())
        });
    }
    checks.finish(&testbed.cluster)
}
