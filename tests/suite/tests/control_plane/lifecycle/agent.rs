//! The lifecycle in a real agent. Needs root.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Cluster, Source, Spec, wait},
    only_as_root,
};
use serde_json::json;

use super::{TIMEOUT, get};

/// The Node condition, the CNI files and kube-proxy's health endpoints, by one real agent.
#[test]
fn an_agent_sets_up_its_node_completely() -> Result<()> {
    only_as_root!();
    let cluster = Cluster::create(&Spec { source: Source::kubernetes(), ..Spec::new(1) })?;
    let (node, objects) = (&cluster.nodes()[0], cluster.control()?.objects());
    let find = || objects.get("v1", "Node", "", node.name())?.context("the Node object is missing");
    wait::until("NetworkUnavailable=False", TIMEOUT, || {
        let conditions = find()?["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.iter().find(|found| found["type"] == "NetworkUnavailable");
        Ok(found.is_some_and(|found| found["status"] == "False").then_some(()))
    })?;
    let directory = node.agent().socket().ancestors().nth(2).context("the node has no directory")?;
    wait::until("the CNI files", TIMEOUT, || {
        let exist = directory.join("etc/cni/net.d/05-dataplane.conflist").exists()
            && directory.join("opt/cni/bin/dataplane-cni").exists();
        Ok(exist.then_some(()))
    })?;

    let ask = |port: u16, path: &str| -> Result<String> {
        node.place().namespace().enter(|| get(SocketAddr::from(([127, 0, 0, 1], port)), path))?
    };
    ensure!(ask(10_249, "/proxyMode")?.ends_with("ebpf"));
    ensure!(ask(10_256, "/healthz")?.starts_with("HTTP/1.1 200"));
    let taint =
        json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule", "value": "1700000000"}]);
    objects.patch(&find()?, &json!({"spec": {"taints": taint}}))?;
    wait::until("health checks of load balancers fail", TIMEOUT, || {
        Ok(ask(10_256, "/healthz")?.starts_with("HTTP/1.1 503").then_some(()))
    })?;
    ensure!(ask(10_256, "/livez")?.starts_with("HTTP/1.1 200"));
    Ok(())
}
