//! Agents are replaced while pods are created and deleted: every created pod works, and deleted
//! ones leave nothing.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dataplane_agent::api::{request::View, views::EndpointView};
use dataplane_common::{ABI_VERSION, abi::names::map};
use dataplane_testkit::{
    lab::{self, Checks, Cluster, ECHO_PORT, Family, Pod, Service, Source, Spec, WEB_PORT, wait},
    traffic::ECHO,
};

const ROUNDS: usize = 6;
const TIMEOUT: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_millis(10);

#[test]
fn pods_are_created_and_deleted_while_agents_are_replaced() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "stays")?, cluster.pod(1, "far")?)))();
    let (client, stays, far) = cluster.explain(made)?;
    let mut servers = vec![stays.serve()?, far.serve()?];
    let permanent = [&stays, &far];
    cluster.apply(&Service::of(&permanent))?;
    let background: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| {
            let requests = client.place().keep_getting(Service::of(&[]).at(family, WEB_PORT), INTERVAL)?;
            let datagrams = client.place().keep_sending(far.echo(family), INTERVAL, &[])?;
            Ok((family, requests, datagrams))
        })
        .collect::<Result<_>>()?;

    let mut checks = Checks::of(spec.describe());
    let mut pods: Vec<Pod> = Vec::new();
    for round in 0..ROUNDS {
        // alternately killed, and terminated as in a DaemonSet update; the previous agent may still
        // be starting
        let agent = cluster.nodes_mut()[0].agent_mut();
        if round % 2 == 0 {
            agent.kill()?;
        } else {
            agent.terminate()?;
        }
        // deleted while no agent runs
        if pods.len() > 1 {
            pods.remove(0).delete()?;
        }
        cluster.nodes_mut()[0].agent_mut().start()?;
        let began = Instant::now();
        let name = format!("pod-{round}");
        let pod = wait::until("a pod", TIMEOUT, || cluster.pod(0, &name).map(Some));
        let pod = cluster.explain(pod)?;
        eprintln!("round {round}: a pod is connected {:.1?} after its agent started", began.elapsed());
        servers.push(pod.serve()?);
        // the new pod is a backend while the agent restarts
        let backends = [&stays, &far, &pod];
        cluster.apply(&Service::of(&backends))?;
        for family in Family::BOTH {
            checks.that(format!("{name} is reachable, and reaches others ({family})"), || {
                far.place().get_as(pod.web(family), 3, Some(&name), far.address(family))?;
                pod.place().get_as(far.web(family), 3, Some("far"), pod.address(family))
            });
        }
        cluster.apply(&Service::of(&permanent))?;
        pods.push(pod);
    }
    let node = &mut cluster.nodes_mut()[0];
    checks.that("the last agent has exactly the existing pods", || {
        let all = pods.iter().chain([&client, &stays]);
        let wanted: BTreeSet<_> = all.flat_map(Pod::addresses).collect();
        node.agent_mut().until("pods of the node", |agent| {
            let views: Vec<EndpointView> = agent.ask(&View::Endpoints)?;
            let found: BTreeSet<_> =
                views.iter().filter(|view| view.pod.is_some()).map(|view| view.address).collect();
            ensure!(found == wanted, "{found:?}, expected {wanted:?}");
            Ok(Some(()))
        })
    });
    for (family, requests, datagrams) in background {
        checks.nothing_lost(family, requests, datagrams);
    }
    checks.finish(&cluster)
}

/// The agent takes over what an agent of an earlier table version has left: every connection goes
/// on, and every datagram arrives.
#[test]
fn connections_survive_another_table_version() -> Result<()> {
    const CONNECTIONS: u32 = 250;
    let (earlier, new) = map::TAKEN_OVER[0];
    let spec = Spec { connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let made = (|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "far")?)))();
    let (client, far) = cluster.explain(made)?;
    let outside = cluster.outside()?;
    let _servers = [far.serve()?, outside.serve("external")?];
    cluster.apply(&Service::of(&[&far]))?;
    let (mut held, mut meanwhile) = (Vec::new(), Vec::new());
    for family in Family::BOTH {
        let service = Service::of(&[]).at(family, ECHO_PORT);
        let external = SocketAddr::new(lab::outside(family), ECHO);
        for (what, server) in [("to a Service", service), ("masqueraded", external)] {
            held.push((what, family, client.place().hold(server, CONNECTIONS, INTERVAL)?));
        }
        let datagrams = client.place().keep_sending(service, INTERVAL, &[])?;
        let requests = client.place().keep_getting(Service::of(&[]).at(family, WEB_PORT), INTERVAL)?;
        requests.wait_answers(10, 0, TIMEOUT)?;
        meanwhile.push((family, requests, datagrams));
    }

    let node = &mut cluster.nodes_mut()[0];
    let directory = node.bpffs().join("dataplane");
    let own = directory.join(format!("v{ABI_VERSION}"));
    node.agent_mut().terminate()?;
    for name in new {
        fs::remove_file(own.join("maps").join(name))?;
    }
    fs::rename(&own, directory.join(format!("v{earlier}")))?;
    node.agent_mut().start()?;
    node.agent_mut().await_ready()?;
    ensure!(!directory.join(format!("v{earlier}")).exists(), "pins of the earlier version are left");
    let adopted = node.agent().status()?.status.pins_adopted;
    let expected = map::PINNED.len() - new.len();
    ensure!(adopted as usize == expected, "{adopted} tables, expected {expected}");

    let mut checks = Checks::of(spec.describe());
    for (what, family, held) in held {
        checks.that(format!("{CONNECTIONS} connections {what} ({family})"), || {
            let held = held.finish()?;
            ensure!(held.broken.is_empty() && held.received == held.sent, "{held:?}");
            Ok(())
        });
    }
    for (family, requests, datagrams) in meanwhile {
        checks.nothing_lost(family, requests, datagrams);
    }
    checks.finish(&cluster)
}
