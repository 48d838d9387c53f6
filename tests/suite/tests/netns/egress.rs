//! The way of packets between pods and machines outside of the cluster changes while they flow: by
//! the configuration file, and by IPsec policies.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, Family, Pod, Spec, failures, outside},
    traffic::{ECHO, HTTP},
};
use serde_json::json;

const INTERVAL: Duration = Duration::from_millis(10);

/// Waits until the first node's agent reports this way.
fn await_way(cluster: &mut Cluster, way: &str) -> Result<String> {
    let node = &mut cluster.nodes_mut()[0];
    node.agent_mut().until(&format!("egress by {way}"), |agent| {
        let egress = agent.status()?.status.egress;
        Ok((egress.way == way).then_some(egress.reason))
    })
}

/// Waits for a problem in the first node's status whose message contains `text`.
fn await_problem(cluster: &mut Cluster, text: &str) -> Result<String> {
    let node = &mut cluster.nodes_mut()[0];
    node.agent_mut().until(&format!("problem {text:?}"), |agent| {
        let problems = agent.status()?.status.problems;
        Ok(problems.into_iter().map(|problem| problem.message).find(|message| message.contains(text)))
    })
}

#[test]
fn configuration_file_changes_the_way_under_connections() -> Result<()> {
    let mut cluster = Cluster::create(&Spec::new(1))?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let outside_host = cluster.outside()?;
    let _server = outside_host.serve("external")?;
    let mut held = Vec::new();
    for family in Family::BOTH {
        held.push(pod.place().hold(SocketAddr::new(outside(family), ECHO), 10, INTERVAL)?);
    }
    let stack_packets = |cluster: &Cluster| cluster.nodes()[0].count("from_pod", "stack_outside");

    ensure!(await_way(&mut cluster, "direct")?.is_empty());
    for way in ["stack", "direct"] {
        cluster.nodes()[0].agent().change_config(|config| config["egress"] = json!(way))?;
        await_way(&mut cluster, way)?;
        let before = stack_packets(&cluster)?;
        for family in Family::BOTH {
            let web = SocketAddr::new(outside(family), HTTP);
            cluster.explain(pod.place().get_as(
                web,
                5,
                Some("external"),
                cluster.nodes()[0].address(family),
            ))?;
        }
        let through_stack = stack_packets(&cluster)? - before;
        ensure!((through_stack > 0) == (way == "stack"), "{way}: {through_stack} packets by the stack");
    }

    // an invalid file changes nothing, and is named
    cluster.nodes()[0].agent().change_config(|config| config["egress"] = json!("sideways"))?;
    let problem = await_problem(&mut cluster, "sideways")?;
    ensure!(problem.contains("egress"), "{problem}");
    ensure!(await_way(&mut cluster, "direct")?.is_empty());
    // other keys wait for a restart
    cluster.nodes()[0].agent().change_config(|config| {
        config["egress"] = json!("stack");
        config["mtu"] = json!(1_400);
    })?;
    await_way(&mut cluster, "stack")?;
    await_problem(&mut cluster, "mtu has changed")?;

    let mut checks = Checks::of("connections held meanwhile");
    for held in held {
        checks.that("no echo is lost", || {
            let held = held.finish()?;
            ensure!(held.broken.is_empty() && held.received == held.sent, "{held:?}");
            Ok(())
        });
    }
    checks.finish(&cluster)
}

/// A policy that the kernel cannot keep, as no key is negotiated: it drops what it covers.
const POLICIES: [&str; 2] = ["action block", "tmpl src SOURCE dst PEER proto esp mode tunnel"];

#[test]
fn ipsec_policies_of_pods_are_kept() -> Result<()> {
    let mut cluster = Cluster::create(&Spec::new(2))?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let outside_host = cluster.outside()?;
    let _server = outside_host.serve("external")?;
    let namespace = cluster.nodes()[0].place().namespace().clone();
    for family in Family::BOTH {
        let (node, peer) = (cluster.nodes()[0].address(family), outside(family));
        let pods = family.of(cluster.nodes()[0].pod_cidrs());
        let selector = format!("src {pods} dst {peer} dir out");
        answers(&pod, family, true)?;
        for policy in POLICIES {
            let policy = policy.replace("SOURCE", &node.to_string()).replace("PEER", &peer.to_string());
            namespace.ip(&format!("xfrm policy add {selector} {policy}"))?;
            let reason = await_way(&mut cluster, "stack")?;
            ensure!(reason.contains(&format!("dst {peer}")), "{reason}");
            answers(&pod, family, false)?;

            namespace.ip(&format!("xfrm policy delete {selector}"))?;
            await_way(&mut cluster, "direct")?;
            answers(&pod, family, true)?;
        }
    }

    // packets to pods of other nodes never take the stack
    let (own, other) = (cluster.nodes()[0].pod_cidrs()[0], cluster.nodes()[1].pod_cidrs()[0]);
    namespace.ip(&format!("xfrm policy add src {own} dst {other} dir out action block"))?;
    let problem = await_problem(&mut cluster, "packets to pods of other nodes")?;
    ensure!(problem.contains(&other.to_string()), "{problem}");
    ensure!(await_way(&mut cluster, "direct")?.is_empty());
    Ok(())
}

/// Whether the machine outside answers the pod.
fn answers(pod: &Pod, family: Family, expected: bool) -> Result<()> {
    let echo = SocketAddr::new(outside(family), ECHO);
    let datagrams = pod.place().send(echo, 5, &["--timeout-ms", "200"])?;
    let answered = if expected { 5 } else { 0 };
    ensure!(datagrams.received == answered, "{family}: {answered} answers expected: {datagrams:?}");
    let requests = pod.place().get(SocketAddr::new(outside(family), HTTP), 1)?;
    ensure!(failures(&requests).is_empty() == expected, "{family}: {requests:?}");
    Ok(())
}
