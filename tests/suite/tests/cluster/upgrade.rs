//! Agents are replaced while pods are created and deleted: every created pod works, and deleted
//! ones leave nothing.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dataplane_agent::api::{request::View, views::EndpointView};
use dataplane_testkit::lab::{Checks, Cluster, Family, Pod, Service, Source, Spec, WEB_PORT, wait};

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
