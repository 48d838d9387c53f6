//! XDP on veth uplinks. A veth drops what XDP sends back out of it unless its peer takes such
//! frames: the agent notices, and handles services at tc.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Node, Spec, wait};
use serde_json::json;

use super::{NODE_ECHO, Testbed, expect_answers};

/// Connections per family: 240 in all.
const CONNECTIONS: u32 = 120;
const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn veth_whose_peer_takes_no_xdp_frames_is_handled_at_tc() -> Result<()> {
    // unlike `xdp` of the cluster, without programs on the bridge ports
    let spec = Spec { config: json!({"xdp": "native"}), ..Spec::new(2) };
    let mut testbed = Testbed::create(&spec, &[1])?;
    testbed.apply_service(|_| {})?;
    let mut checks = Checks::of(spec.describe());
    checks.that("status shows tc, and why", || expect_fallback(&testbed.cluster.nodes()[0]));
    checks.that("every connection to a node port succeeds", || expect_connections(&testbed));
    checks.finish(&testbed.cluster)
}

#[test]
fn veth_whose_peer_stops_taking_xdp_frames_falls_back_to_tc() -> Result<()> {
    let spec = Spec { xdp: true, ..Spec::new(2) };
    let mut testbed = Testbed::create(&spec, &[1])?;
    testbed.apply_service(|_| {})?;
    let node = &testbed.cluster.nodes()[0];
    let mut checks = Checks::of(spec.describe());
    checks.that("XDP handles connections", || {
        expect_connections(&testbed)?;
        ensure!(node.count("xdp_wire", "to_wire")? > 0, "XDP sent nothing");
        ensure!(service_hook(node)? == "xdp", "{}", service_hook(node)?);
        Ok(())
    });
    let mut echo = testbed.node_port(0, Family::V4);
    echo.set_port(NODE_ECHO);
    let datagrams = testbed.external.keep_sending(echo, Duration::from_millis(1), &[])?;
    testbed.cluster.fabric().release_port(node.name())?;
    wait::until("service hook tc", TIMEOUT, || Ok((service_hook(node)? == "tc").then_some(())))?;
    checks.that("status shows why", || expect_fallback(node));
    checks.that("every connection to a node port succeeds", || expect_connections(&testbed));
    checks.that("only packets until the next check are lost", || {
        let datagrams = datagrams.finish()?;
        eprintln!("lost {} of {} datagrams", datagrams.lost, datagrams.sent);
        // one check a second, one datagram a millisecond
        ensure!(datagrams.lost < 3_000 && datagrams.received > 0, "{datagrams:?}");
        Ok(())
    });
    checks.finish(&testbed.cluster)
}

fn expect_connections(testbed: &Testbed) -> Result<()> {
    for family in Family::BOTH {
        expect_answers(&testbed.external, testbed.node_port(0, family), CONNECTIONS)?;
    }
    Ok(())
}

fn service_hook(node: &Node) -> Result<String> {
    let uplinks = node.agent().status()?.status.uplinks;
    let uplink = uplinks.into_iter().find(|uplink| uplink.device == "eth0").context("no uplink eth0")?;
    Ok(uplink.service_hook)
}

fn expect_fallback(node: &Node) -> Result<()> {
    let status = node.agent().status()?.status;
    ensure!(service_hook(node)? == "tc", "{:?}", status.uplinks);
    let why = status.problems.iter().find(|problem| problem.subject == "eth0");
    let why = &why.with_context(|| format!("no problem of eth0: {:?}", status.problems))?.message;
    ensure!(why.contains("veth whose peer has neither an XDP program nor GRO"), "{why}");
    Ok(())
}
