//! Pods and hosts reach each other, with their own source addresses and without flows.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{
    request::{FlowFilter, FlowList, View},
    views::EndpointView,
};
use dataplane_testkit::lab::{Checks, Cluster, Family, Node, Pod, Routing, Segment, Source, Spec};

/// Overhead of VXLAN over IPv4, in bytes.
const VXLAN: u32 = 50;
/// An HTTP body of many segments.
const BULK: usize = 1_000_000;

#[test]
fn pods_and_hosts_reach_each_other_with_native_routing() -> Result<()> {
    pods_and_hosts_reach_each_other(&Spec { routing: Routing::Native, ..Spec::new(2) })
}

#[test]
fn pods_and_hosts_reach_each_other_through_the_overlay() -> Result<()> {
    pods_and_hosts_reach_each_other(&Spec { routing: Routing::Vxlan, ..Spec::new(2) })
}

#[test]
fn pods_and_hosts_reach_each_other_with_objects_from_an_api_server() -> Result<()> {
    pods_and_hosts_reach_each_other(&Spec { source: Source::kubernetes(), ..Spec::new(2) })
}

fn pods_and_hosts_reach_each_other(spec: &Spec) -> Result<()> {
    let cluster = Cluster::create(spec)?;
    let (a, b, c) =
        cluster.explain((|| Ok((cluster.pod(0, "a")?, cluster.pod(0, "b")?, cluster.pod(1, "c")?)))())?;
    let (near, far) = (&cluster.nodes()[0], &cluster.nodes()[1]);
    let _servers = [a.serve()?, b.serve()?, c.serve()?, near.serve()?, far.serve()?];
    let mtu = spec.mtu - if spec.routing == Routing::Vxlan { VXLAN } else { 0 };

    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        for (from, to) in [(&a, &b), (&a, &c), (&c, &a)] {
            pod_to_pod(&mut checks, from, to, family, mtu);
        }
        pod_to_host(&mut checks, &a, near, family);
        pod_to_host(&mut checks, &a, far, family);
        for (host, pod) in [(near, &a), (far, &a), (near, &c)] {
            host_to_pod(&mut checks, host, pod, family);
        }
    }
    checks.that("packets took the fast path", || {
        let sent = if spec.routing == Routing::Vxlan { "to_overlay" } else { "to_wire" };
        for (hook, outcome) in [("from_pod", "to_pod"), ("from_pod", sent)] {
            ensure!(near.count(hook, outcome)? > 0, "{hook} counted no {outcome}");
        }
        Ok(())
    });
    for node in cluster.nodes() {
        checks.that(format!("{} has no flows", node.name()), || {
            let flows: FlowList = node.agent().ask(&View::Flows(FlowFilter::default()))?;
            ensure!(flows.total == 0, "flows: {:?}", flows.flows);
            Ok(())
        });
        checks.that(format!("{} dropped nothing", node.name()), || nothing_dropped(node));
    }
    checks.finish(&cluster)
}

fn pod_to_pod(checks: &mut Checks, from: &Pod, to: &Pod, family: Family, mtu: u32) {
    let what = |what: &str| format!("{} → {} ({family}): {what}", from.name(), to.name());
    let full = mtu as usize - family.echo_overhead();
    checks.that(what("ping"), || from.place().ping(to.address(family), 3, 56)?.check());
    checks.that(what("ping that fills the MTU"), || from.place().ping(to.address(family), 3, full)?.check());
    checks.that(what("a ping larger than the MTU fails"), || {
        let ping = from.place().ping(to.address(family), 2, full + 1)?;
        ensure!(
            ping.received == 0,
            "{} of {} were answered: the MTU is larger than {mtu}",
            ping.received,
            ping.sent
        );
        Ok(())
    });
    checks.that(what("TCP with the pod's source address"), || {
        from.place().get_as(to.web(family), 3, Some(to.name()), from.address(family))
    });
    checks.that(what("TCP, bulk"), || {
        let requests = from.place().get_bytes(to.web(family), 2, BULK)?;
        ensure!(
            requests.iter().all(|request| request.answer().is_some_and(|got| got.bytes == BULK)),
            "{requests:?}"
        );
        Ok(())
    });
    checks.that(what("UDP"), || from.place().send(to.echo(family), 20, &[])?.check());
    checks.that(what("UDP in fragments"), || {
        from.place().send(to.echo(family), 10, &["--size", "8000"])?.check()
    });
}

fn pod_to_host(checks: &mut Checks, from: &Pod, to: &Node, family: Family) {
    let what = |what: &str| format!("{} → host {} ({family}): {what}", from.name(), to.name());
    checks.that(what("ping"), || from.place().ping(to.address(family), 3, 56)?.check());
    checks
        .that(what("TCP"), || from.place().get_as(to.web(family), 3, Some(to.name()), from.address(family)));
    checks.that(what("UDP"), || {
        from.place().send(SocketAddr::new(to.address(family), 7000), 20, &["--size", "3000"])?.check()
    });
}

fn host_to_pod(checks: &mut Checks, from: &Node, to: &Pod, family: Family) {
    let what = |what: &str| format!("host {} → {} ({family}): {what}", from.name(), to.name());
    checks.that(what("ping"), || from.place().ping(to.address(family), 3, 56)?.check());
    checks
        .that(what("TCP"), || from.place().get_as(to.web(family), 3, Some(to.name()), from.address(family)));
    checks.that(what("UDP"), || from.place().send(to.echo(family), 20, &["--size", "3000"])?.check());
}

#[test]
fn auto_routing_uses_the_overlay_only_across_a_router() -> Result<()> {
    let nodes = vec![Segment::FIRST, Segment::FIRST, Segment::SECOND];
    let spec = Spec { nodes, routing: Routing::Auto, ..Spec::new(3) };
    let cluster = Cluster::create(&spec)?;
    let pods = cluster.explain((0..3).map(|node| cluster.pod(node, &format!("pod-{node}"))).collect());
    let pods: Vec<Pod> = pods?;
    let _servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;

    let mut checks = Checks::of(spec.describe());
    for (node, other, routing) in [(0, 1, "native"), (0, 2, "vxlan"), (1, 2, "vxlan"), (2, 0, "vxlan")] {
        checks.that(format!("node {node} reaches node {other} by {routing}"), || {
            let name = cluster.nodes()[other].name();
            let status = cluster.nodes()[node].agent().status()?.status;
            let view = status.nodes.iter().find(|view| view.name == name);
            ensure!(view.is_some_and(|view| view.routing == routing), "{view:?}");
            Ok(())
        });
        for family in Family::BOTH {
            let (from, to) = (&pods[node], &pods[other]);
            let what = |what: &str| format!("{} → {} ({family}): {what}", from.name(), to.name());
            checks.that(what("ping"), || from.place().ping(to.address(family), 3, 1_300)?.check());
            checks.that(what("TCP, bulk"), || {
                let requests = to.place().get_bytes(from.web(family), 2, BULK)?;
                let complete = |got: &dataplane_testkit::traffic::report::Answer| got.bytes == BULK;
                ensure!(
                    requests.iter().all(|request| request.answer().is_some_and(complete)),
                    "{requests:?}"
                );
                Ok(())
            });
            checks.that(what("UDP in fragments"), || {
                from.place().send(to.echo(family), 10, &["--size", "4000"])?.check()
            });
        }
    }
    checks.finish(&cluster)
}

fn nothing_dropped(node: &Node) -> Result<()> {
    let outcomes = node.agent().status()?.outcomes;
    let drops: Vec<_> = outcomes.iter().filter(|count| count.dropped && count.packets > 0).collect();
    ensure!(drops.is_empty(), "{drops:?}");
    Ok(())
}

#[test]
fn pod_device_that_goes_down_is_flagged() -> Result<()> {
    let mut cluster = Cluster::create(&Spec::new(1))?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let device = pod.host_device()?.to_owned();
    let host = cluster.nodes()[0].place().clone();
    // at the host's end, and in the pod
    host.namespace().ip(&format!("link set {device} down"))?;
    await_down(&mut cluster, &pod, true)?;
    host.namespace().ip(&format!("link set {device} up"))?;
    await_down(&mut cluster, &pod, false)?;
    pod.place().namespace().ip("link set eth0 down")?;
    await_down(&mut cluster, &pod, true)?;
    let agent = cluster.nodes_mut()[0].agent_mut();
    agent.terminate()?;
    agent.start()?;
    agent.await_ready()?;
    await_down(&mut cluster, &pod, true)?;
    pod.place().namespace().ip("link set eth0 up")?;
    await_down(&mut cluster, &pod, false)
}

fn await_down(cluster: &mut Cluster, pod: &Pod, is_down: bool) -> Result<()> {
    let address = pod.address(Family::V4);
    cluster.nodes_mut()[0].agent_mut().until("the state of the pod's device", |agent| {
        let endpoints: Vec<EndpointView> = agent.ask(&View::Endpoints)?;
        let endpoint = endpoints.iter().find(|endpoint| endpoint.address == address);
        let endpoint = endpoint.with_context(|| format!("no endpoint {address}"))?;
        Ok((endpoint.device_down == is_down).then_some(()))
    })
}
