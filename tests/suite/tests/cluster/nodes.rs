//! Nodes join and leave a cluster: three start without Node objects, a fourth joins, one leaves,
//! one is registered again with another pod CIDR and another address.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{request::View, views::RouteView};
use dataplane_testkit::lab::{
    Checks, Cluster, Family, Node, Pod, Routing, Segment, Source, Spec, failures, wait,
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_millis(10);
/// Timeout of an echo request to a pod that may not be reachable yet.
const PING_TIMEOUT: Duration = Duration::from_millis(50);

#[test]
fn nodes_join_and_leave_from_manifests() -> Result<()> {
    nodes_join_and_leave(&Spec { nodes: Vec::new(), ..Spec::new(0) })
}

#[test]
fn nodes_join_and_leave_from_an_api_server() -> Result<()> {
    nodes_join_and_leave(&Spec { nodes: Vec::new(), source: Source::kubernetes(), ..Spec::new(0) })
}

#[test]
fn nodes_join_and_leave_from_an_api_server_over_the_overlay() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), routing: Routing::Vxlan, ..Spec::new(0) };
    nodes_join_and_leave(&spec)
}

fn nodes_join_and_leave(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    // agents start before any Node object exists
    for _ in 0..3 {
        let index = cluster.add_node(Segment::FIRST)?;
        cluster.nodes_mut()[index].agent_mut().start()?;
    }
    for index in 0..3 {
        cluster.register(index)?;
    }
    for node in cluster.nodes_mut() {
        node.agent_mut().await_ready()?;
    }
    let pods: Result<Vec<Pod>> = (0..3).map(|node| cluster.pod(node, &format!("pod-{node}"))).collect();
    let mut pods = cluster.explain(pods)?;
    let mut servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
    let mut checks = Checks::of(spec.describe());
    checks.that("three nodes registered", || all_pods_reach_each_other(&pods));
    // this traffic must not be affected by what follows
    let background = Family::BOTH.map(|family| pods[0].place().keep_getting(pods[2].web(family), INTERVAL));

    let joined = join_fourth_node(&mut cluster, &pods[0]);
    let joined = cluster.explain(joined)?;
    servers.push(joined.serve()?);
    pods.push(joined);
    checks.that("four nodes, after one joined", || all_pods_reach_each_other(&pods));

    pods.remove(1).delete()?;
    drop(servers.remove(1));
    let left = cluster.nodes()[1].pod_cidrs().map(|range| range.to_string());
    cluster.unregister(1)?;
    cluster.remove_node(1)?;
    for node in cluster.nodes() {
        checks.that(format!("{} has removed the routes of the node that left", node.name()), || {
            await_no_route(node, &left)
        });
    }
    checks.that("three nodes, after one left", || all_pods_reach_each_other(&pods));

    for (family, requests) in Family::BOTH.into_iter().zip(background) {
        checks.that(format!("traffic of other nodes is not affected ({family})"), || {
            let requests = requests?.stop()?;
            ensure!(!requests.is_empty(), "no request was sent");
            ensure!(failures(&requests).is_empty(), "{:?} of {} failed", failures(&requests), requests.len());
            Ok(())
        });
    }
    checks.finish(&cluster)
}

/// Prints the time from the creation of the Node object to the first packet from another node.
fn join_fourth_node(cluster: &mut Cluster, from: &Pod) -> Result<Pod> {
    let index = cluster.add_node(Segment::FIRST)?;
    let node = &mut cluster.nodes_mut()[index];
    node.agent_mut().start()?;
    // it runs, and lacks only its Node object
    node.agent_mut().until("an agent that waits for its Node", |agent| {
        let status = agent.status()?.status;
        Ok(matches!(status.not_ready.as_slice(), [only] if only.check == "node").then_some(()))
    })?;
    let began = Instant::now();
    cluster.register(index)?;
    let written = began.elapsed();
    let bound = cluster.nodes()[index].pod_object("joined", &json!({}));
    cluster.apply_objects("joined", &[bound])?;
    // retried, as the kubelet does
    let pod = wait::until("a pod on the new node", TIMEOUT, || cluster.pod(index, "joined").map(Some))?;
    let connected = began.elapsed();
    wait::until("the first packet", TIMEOUT, || {
        let is_answered = from.place().is_answered(pod.address(Family::V4), PING_TIMEOUT)?;
        Ok(is_answered.then_some(()))
    })?;
    let reached = began.elapsed();
    eprintln!(
        "join ({}): Node written in {written:.1?}, its first pod connected after {connected:.1?}, first packet from \
         another node after {reached:.1?}",
        cluster.describe_source()
    );
    Ok(pod)
}

#[test]
fn node_gets_another_pod_cidr_and_address_from_an_api_server() -> Result<()> {
    node_gets_another_pod_cidr_and_address(&Spec { source: Source::kubernetes(), ..Spec::new(3) })
}

#[test]
fn node_gets_another_pod_cidr_and_address_from_an_api_server_over_the_overlay() -> Result<()> {
    node_gets_another_pod_cidr_and_address(&Spec {
        source: Source::kubernetes(),
        routing: Routing::Vxlan,
        ..Spec::new(3)
    })
}

fn node_gets_another_pod_cidr_and_address(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let pods: Result<Vec<Pod>> = (0..3).map(|node| cluster.pod(node, &format!("pod-{node}"))).collect();
    let mut pods = cluster.explain(pods)?;
    let _servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
    let mut checks = Checks::of(spec.describe());
    checks.that("before", || all_pods_reach_each_other(&pods));

    // drained, deleted, registered again with another pod CIDR
    pods.remove(1).delete()?;
    let old = cluster.nodes()[1].pod_cidrs().map(|range| range.to_string());
    cluster.unregister(1)?;
    cluster.nodes_mut()[1].set_range(77);
    cluster.register(1)?;
    let new = cluster.nodes()[1].pod_cidrs();
    let again = wait::until("a pod in the new range", TIMEOUT, || {
        let pod = cluster.pod(1, "again")?;
        if new[0].contains(&pod.address(Family::V4)) && new[1].contains(&pod.address(Family::V6)) {
            return Ok(Some(pod));
        }
        let found = pod.addresses();
        pod.delete()?;
        Err(anyhow::anyhow!("the pod has {found:?}"))
    });
    let again = cluster.explain(again)?;
    let _server = again.serve()?;
    pods.push(again);
    for node in [&cluster.nodes()[0], &cluster.nodes()[2]] {
        checks.that(format!("{} has removed the routes of the old pod CIDR", node.name()), || {
            await_no_route(node, &old)
        });
    }
    checks.that("with another pod CIDR", || await_all_pods_reach_each_other(&pods));

    // another address, as of a machine that was moved
    cluster.unregister(1)?;
    let old = cluster.nodes()[1].addresses().map(|address| address.to_string());
    cluster.nodes_mut()[1].set_host(99)?;
    cluster.register(1)?;
    checks.that("with another address", || await_all_pods_reach_each_other(&pods));
    for node in [&cluster.nodes()[0], &cluster.nodes()[2]] {
        checks.that(format!("{} has removed routes of the old address", node.name()), || {
            await_no_route(node, &old)
        });
    }
    checks.finish(&cluster)
}

/// Waits until neither the agent nor the kernel of a node has a route with any of these prefixes or
/// next hops.
fn await_no_route(node: &Node, removed: &[String]) -> Result<()> {
    wait::until("removal of a route", TIMEOUT, || {
        let routes: Vec<RouteView> = node.agent().ask(&View::Routes)?;
        let [v4, v6] =
            ["-4", "-6"].map(|family| node.place().run("ip", &[family, "route", "show", "table", "all"]));
        let shown = format!("{routes:?}\n{}\n{}", v4?, v6?);
        match removed.iter().find(|text| shown.split([' ', '\n', '"']).any(|word| word == text.as_str())) {
            Some(stale) => Err(anyhow::anyhow!("{} still has a route with {stale}: {shown}", node.name())),
            None => Ok(Some(())),
        }
    })
}

fn all_pods_reach_each_other(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods {
            for family in Family::BOTH {
                let reached = from.place().get_as(to.web(family), 2, Some(to.name()), from.address(family));
                reached.with_context(|| format!("{} → {} ({family})", from.name(), to.name()))?;
            }
        }
    }
    Ok(())
}

fn await_all_pods_reach_each_other(pods: &[Pod]) -> Result<()> {
    wait::until("connectivity between all pods", TIMEOUT, || all_pods_reach_each_other(pods).map(Some))
}
