//! A cluster's nodes come and go: three from nothing, a fourth joins, one leaves, one is made again with another range and
//! another address.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{request::View, views::RouteView};
use dataplane_testkit::lab::{
    Checks, Cluster, Family, Node, Pod, Routing, Segment, Source, Spec, failures, wait,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_millis(10);
/// Of an echo request to somebody who may not be there yet.
const SHORT: Duration = Duration::from_millis(50);

#[test]
fn nodes_come_and_go_by_manifests() -> Result<()> {
    nodes_come_and_go(&Spec { nodes: Vec::new(), ..Spec::new(0) })
}

#[test]
fn nodes_come_and_go_from_an_api_server() -> Result<()> {
    nodes_come_and_go(&Spec { nodes: Vec::new(), source: Source::kubernetes(), ..Spec::new(0) })
}

#[test]
fn nodes_come_and_go_from_an_api_server_over_the_overlay() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), routing: Routing::Vxlan, ..Spec::new(0) };
    nodes_come_and_go(&spec)
}

fn nodes_come_and_go(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    // agents first: nobody knows of any node yet
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
    checks.that("three nodes, from nothing", || everybody_reaches_everybody(&pods));
    // those who stay notice nothing of what follows
    let steady = Family::BOTH.map(|family| pods[0].place().keep_getting(pods[2].web(family), INTERVAL));

    let joined = a_fourth_joins(&mut cluster, &pods[0]);
    let joined = cluster.explain(joined)?;
    servers.push(joined.serve()?);
    pods.push(joined);
    checks.that("a fourth node, joined", || everybody_reaches_everybody(&pods));

    let gone = pods.remove(1);
    gone.delete()?;
    drop(servers.remove(1));
    let left = cluster.nodes()[1].pod_cidrs().map(|range| range.to_string());
    cluster.unregister(1)?;
    cluster.remove_node(1)?;
    for node in cluster.nodes() {
        checks.that(format!("{} has forgotten who left", node.name()), || await_no_route(node, &left));
    }
    checks.that("three nodes, after one left", || everybody_reaches_everybody(&pods));

    for (family, requests) in Family::BOTH.into_iter().zip(steady) {
        checks.that(format!("who stays notices nothing ({family})"), || {
            let requests = requests?.stop()?;
            ensure!(!requests.is_empty(), "nothing was asked");
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            Ok(())
        });
    }
    checks.finish(&cluster)
}

/// Prints how long it takes from the Node's address and range to the first packet from another node.
fn a_fourth_joins(cluster: &mut Cluster, from: &Pod) -> Result<Pod> {
    let index = cluster.add_node(Segment::FIRST)?;
    let node = &mut cluster.nodes_mut()[index];
    node.agent_mut().start()?;
    // it runs, and has been told everything but who it is
    node.agent_mut().until("an agent that waits for its Node", |agent| {
        let status = agent.status()?.status;
        Ok(matches!(status.not_ready.as_slice(), [only] if only.check == "node").then_some(()))
    })?;
    let began = Instant::now();
    cluster.register(index)?;
    let told = began.elapsed();
    let bound = cluster.nodes()[index].pod_object("joined", &json!({}));
    cluster.apply_objects("joined", &[bound])?;
    // as kubelet: again until it works
    let pod = wait::until("a pod on the new node", PATIENCE, || cluster.pod(index, "joined").map(Some))?;
    let connected = began.elapsed();
    wait::until("the first packet", PATIENCE, || {
        let is_answered = from.place().is_answered(pod.address(Family::V4), SHORT)?;
        Ok(is_answered.then_some(()))
    })?;
    let reached = began.elapsed();
    eprintln!(
        "join ({}): Node written in {told:.1?}, its first pod connected after {connected:.1?}, first packet from \
         another node after {reached:.1?}",
        cluster.describe_source()
    );
    Ok(pod)
}

#[test]
fn a_node_is_made_again_from_an_api_server() -> Result<()> {
    a_node_is_made_again(&Spec { source: Source::kubernetes(), ..Spec::new(3) })
}

#[test]
fn a_node_is_made_again_from_an_api_server_over_the_overlay() -> Result<()> {
    a_node_is_made_again(&Spec { source: Source::kubernetes(), routing: Routing::Vxlan, ..Spec::new(3) })
}

fn a_node_is_made_again(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let pods: Result<Vec<Pod>> = (0..3).map(|node| cluster.pod(node, &format!("pod-{node}"))).collect();
    let mut pods = cluster.explain(pods)?;
    let _servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
    let mut checks = Checks::of(spec.describe());
    checks.that("before", || everybody_reaches_everybody(&pods));

    // drained, deleted, registered again with what the allocator had next
    pods.remove(1).delete()?;
    let old = cluster.nodes()[1].pod_cidrs().map(|range| range.to_string());
    cluster.unregister(1)?;
    cluster.nodes_mut()[1].set_range(77);
    cluster.register(1)?;
    let new = cluster.nodes()[1].pod_cidrs();
    let again = wait::until("a pod in the new range", PATIENCE, || {
        let pod = cluster.pod(1, "again")?;
        if new[0].contains(&pod.address(Family::V4)) && new[1].contains(&pod.address(Family::V6)) {
            return Ok(Some(pod));
        }
        let found = pod.addresses();
        pod.delete()?;
        Err(anyhow::anyhow!("it has {found:?}"))
    });
    let again = cluster.explain(again)?;
    let _serves = again.serve()?;
    pods.push(again);
    for node in [&cluster.nodes()[0], &cluster.nodes()[2]] {
        checks.that(format!("{} has forgotten the old range", node.name()), || await_no_route(node, &old));
    }
    checks.that("with another range", || await_everybody(&pods));

    // and with another address, as a machine that was moved
    cluster.unregister(1)?;
    let old = cluster.nodes()[1].addresses().map(|address| address.to_string());
    cluster.nodes_mut()[1].set_host(99)?;
    cluster.register(1)?;
    checks.that("with another address", || await_everybody(&pods));
    for node in [&cluster.nodes()[0], &cluster.nodes()[2]] {
        checks.that(format!("{} has forgotten the old address", node.name()), || await_no_route(node, &old));
    }
    checks.finish(&cluster)
}

/// Waits until an agent and its kernel know no way to, or by, any of these.
fn await_no_route(node: &Node, gone: &[String]) -> Result<()> {
    wait::until("end of a route", PATIENCE, || {
        let routes: Vec<RouteView> = node.agent().ask(&View::Routes)?;
        let [v4, v6] =
            ["-4", "-6"].map(|family| node.place().run("ip", &[family, "route", "show", "table", "all"]));
        let shown = format!("{routes:?}\n{}\n{}", v4?, v6?);
        match gone.iter().find(|gone| shown.split([' ', '\n', '"']).any(|word| word == gone.as_str())) {
            Some(stale) => Err(anyhow::anyhow!("{} still knows {stale}: {shown}", node.name())),
            None => Ok(Some(())),
        }
    })
}

fn everybody_reaches_everybody(pods: &[Pod]) -> Result<()> {
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

fn await_everybody(pods: &[Pod]) -> Result<()> {
    wait::until("a way between all pods", PATIENCE, || everybody_reaches_everybody(pods).map(Some))
}
