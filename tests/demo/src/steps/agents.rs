//! Kills all agents under traffic and starts new ones. No packet is lost: the datapath works
//! without an agent, and a new agent adopts the pinned tables and programs.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::super::{
    show::Show,
    testbed::{ECHO_PORT, FAMILIES, Testbed, WEB_PORT},
};
use dataplane_testkit::{
    lab::{Client, failures, wait},
    traffic::{
        now_us,
        report::{Datagrams, HeldConnections, Request},
    },
};

/// Open connections per family.
const CONNECTIONS: u32 = 100;
/// Requests that must be answered without agents, and again with the new ones.
const REQUESTS: usize = 100;
const TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn all(testbed: &mut Testbed, show: &mut Show) {
    show.check(testbed, "all agents killed (SIGKILL) and restarted under traffic", killed_and_replaced);
}

/// Traffic of one family while agents are replaced.
struct Traffic {
    held: Client<HeldConnections>,
    datagrams: Client<Datagrams>,
    requests: Client<Vec<Request>>,
}

fn killed_and_replaced(testbed: &mut Testbed) -> Result<String> {
    let mut traffic = Vec::new();
    for family in FAMILIES {
        let client = testbed.clients[0].place();
        let interval = Duration::from_millis(5);
        traffic.push(Traffic {
            held: client.hold(testbed.web.at(family, ECHO_PORT), CONNECTIONS, Duration::from_millis(100))?,
            datagrams: client.keep_sending(testbed.web.at(family, ECHO_PORT), interval, &[])?,
            requests: client.keep_getting(testbed.web.at(family, WEB_PORT), interval)?,
        });
    }

    let nodes = testbed.cluster.nodes().len();
    for node in testbed.cluster.nodes_mut() {
        node.agent_mut().kill()?;
    }
    wait_for_requests(&traffic)?;
    let restart = Instant::now();
    for node in testbed.cluster.nodes_mut() {
        node.agent_mut().start()?;
    }
    let mut adopted = 0;
    for node in testbed.cluster.nodes_mut() {
        adopted += node.agent_mut().await_ready()?.status.pins_adopted;
    }
    let ready = restart.elapsed();
    wait_for_requests(&traffic)?;

    let (mut echoes, mut requests) = (0, 0);
    for traffic in traffic {
        let held = traffic.held.finish()?;
        ensure!(
            held.broken.is_empty() && held.received == held.sent,
            "connections broke or lost data: {held:?}"
        );
        let datagrams = traffic.datagrams.finish()?;
        ensure!(datagrams.is_complete(), "datagrams were lost: {datagrams:?}");
        let all = traffic.requests.stop()?;
        ensure!(failures(&all).is_empty(), "requests failed: {:?}", failures(&all));
        echoes += held.received + datagrams.received;
        requests += all.len();
    }
    ensure!(adopted > 0, "the new agents adopted no pinned object");
    Ok(format!(
        "{nodes} agents; {} connections, {echoes} echoes, {requests} requests: 0 lost; ready after {ready:.1?}",
        CONNECTIONS * 2
    ))
}

/// Waits until enough requests that began after this call have ended.
fn wait_for_requests(traffic: &[Traffic]) -> Result<()> {
    let moment = now_us()?;
    for traffic in traffic {
        wait::until("requests", TIMEOUT, || {
            let requests = traffic.requests.so_far()?;
            Ok((requests.iter().filter(|request| request.began_us > moment).count() >= REQUESTS)
                .then_some(()))
        })?;
    }
    Ok(())
}
