//! One UDP socket keeps sending while its backend is replaced: the tests of Kubernetes about stale
//! conntrack entries. The dataplane uses flows in place of conntrack.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Client, Family, Place, wait},
    only_in_full,
    traffic::{now_us, report::Datagrams},
};
use serde_json::json;

use super::{
    service_fixture::{self, ServiceFixture, ready, terminating_not_serving},
    testbed::{Mode, Testbed, on, on_both},
};

const TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);
/// Datagrams that are lost before an endpoint is ready.
const UNANSWERED: u64 = 20;
/// Dropped datagrams of all senders of a node: each has lost at least half of [`UNANSWERED`].
const DROPPED: u64 = 4 * UNANSWERED;
/// The echo port of a second server in a pod.
const OTHER_ECHO: u16 = 9_107;

/// The client that keeps sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientKind {
    Pod(usize),
    Host(usize),
    External,
}

impl ClientKind {
    fn place(self, testbed: &Testbed) -> &Place {
        match self {
            Self::Pod(node) => testbed.clients[node].place(),
            Self::Host(node) => testbed.host(node),
            Self::External => &testbed.external,
        }
    }
}

/// A server that is replaced by another.
pub(crate) struct Cycle {
    pub(crate) number: u16,
    pub(crate) client: ClientKind,
    /// The nodes of the first and the second server.
    pub(crate) nodes: [usize; 2],
}

/// Starts a sender of each family.
fn start_senders(
    testbed: &Testbed,
    client: ClientKind,
    at: impl Fn(Family) -> SocketAddr,
) -> Result<Vec<Client<Datagrams>>> {
    let sender = |family| client.place(testbed).keep_sending(at(family), INTERVAL, &["--each"]);
    Family::BOTH.into_iter().map(sender).collect()
}

impl Cycle {
    /// Runs the test for a service after `change`, with datagrams to the address that `at` returns.
    pub(crate) fn preserves_udp(
        &self,
        mode: Mode,
        change: impl Fn(&mut ServiceFixture),
        at: impl Fn(&Testbed, &ServiceFixture, Family) -> SocketAddr,
    ) -> Result<()> {
        on(mode, |testbed| self.run(testbed, &change, &at))
    }

    fn run(
        &self,
        testbed: &mut Testbed,
        change: &dyn Fn(&mut ServiceFixture),
        at: &dyn Fn(&Testbed, &ServiceFixture, Family) -> SocketAddr,
    ) -> Result<()> {
        let names = [1, 2].map(|which| format!("server-{}-{which}", self.number));
        let first = testbed.cluster.pod(self.nodes[0], &names[0])?;
        let mut server = first.serve()?;
        let mut fixture = ServiceFixture::of("udp-cycles", self.number, &[&first]);
        change(&mut fixture);
        testbed.apply_service(&fixture)?;
        let senders = start_senders(testbed, self.client, |family| at(testbed, &fixture, family))?;
        for sender in &senders {
            sender.wait_echo(&names[0], 0, TIMEOUT)?;
        }

        // a pod without a grace period: for some time there is no ready endpoint
        fixture.for_each_endpoint(terminating_not_serving);
        testbed.apply_service(&fixture)?;
        let removed = now_us()?;
        server.kill()?;
        first.delete()?;
        let second = testbed.cluster.pod(self.nodes[1], &names[1])?;
        let successor = second.serve()?;
        fixture.replace_endpoints(&[&second]);
        testbed.apply_service(&fixture)?;
        let ready_again = now_us()?;
        for sender in &senders {
            sender.wait_echo(&names[1], ready_again, TIMEOUT)?;
        }
        for sender in senders {
            let report = sender.finish()?;
            ensure!(report.servers.keys().eq(&names), "{report:?}");
            ensure!(
                report.latest_us[&names[0]] <= removed,
                "the first server received datagrams after its removal: {report:?}"
            );
            ensure!(report.misdirected + report.duplicated == 0, "{report:?}");
        }
        testbed.withdraw(&fixture)?;
        drop(successor);
        second.delete()
    }
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_node_port_service() -> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 42, client: ClientKind::Pod(1), nodes: [0, 0] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(
            mode,
            |fixture| fixture.set_type("NodePort"),
            |testbed, fixture, family| testbed.at_node(0, family, fixture.node_port(1)),
        )
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service() -> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 43, client: ClientKind::Pod(0), nodes: [1, 1] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(mode, |_| {}, |_, fixture, family| fixture.cluster_ip_ports(family)[1])
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service_with_internal_traffic_policy_set_to_local()
-> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 44, client: ClientKind::Pod(0), nodes: [0, 0] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(
            mode,
            |fixture| fixture.service["spec"]["internalTrafficPolicy"] = json!("Local"),
            |_, fixture, family| fixture.cluster_ip_ports(family)[1],
        )
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service_and_client_is_host_network()
-> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 45, client: ClientKind::Host(0), nodes: [1, 1] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(mode, |_| {}, |_, fixture, family| fixture.cluster_ip_ports(family)[1])
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("udp-unready", 46, &[&testbed.webs[1]]).with_node_ports();
        fixture.for_each_endpoint(service_fixture::unready);
        testbed.apply_service(&fixture)?;
        let dropped = |testbed: &Testbed| -> Result<[u64; 2]> {
            let nodes = testbed.cluster.nodes();
            Ok([nodes[0].count("from_pod", "no_backend")?, nodes[1].count("from_wire", "no_backend")?])
        };
        let before = dropped(testbed)?;
        let mut senders =
            start_senders(testbed, ClientKind::Pod(0), |family| fixture.cluster_ip_ports(family)[1])?;
        senders.extend(start_senders(testbed, ClientKind::External, |family| {
            testbed.at_node(1, family, fixture.node_port(1))
        })?);
        wait::until("dropped datagrams", TIMEOUT, || {
            let is_enough = dropped(testbed)?.iter().zip(before).all(|(now, before)| *now > before + DROPPED);
            Ok(is_enough.then_some(()))
        })?;
        fixture.for_each_endpoint(ready);
        testbed.apply_service(&fixture)?;
        let ready_again = now_us()?;
        for sender in senders {
            sender.wait_echo("web-1", ready_again, TIMEOUT)?;
            let report = sender.finish()?;
            ensure!(report.lost >= UNANSWERED / 2 && report.misdirected == 0, "{report:?}");
        }
        testbed.withdraw(&fixture)
    })
}

/// The pod stays, but the service's target port changes: an existing socket reaches the new port.
#[test]
fn should_be_able_to_cleanup_conntrack_entries_when_udp_service_target_port_changes_for_a_node_port_service()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let (http, echo) = ("9108", OTHER_ECHO.to_string());
        let _other = testbed.webs[0]
            .place()
            .start_traffic(&["serve", "--name", "other", "--http", http, "--echo", &echo])?;
        let mut fixture = ServiceFixture::of("udp-target", 47, &[&testbed.webs[0]]).with_node_ports();
        testbed.apply_service(&fixture)?;
        let mut senders = start_senders(testbed, ClientKind::Pod(1), |family| {
            testbed.at_node(0, family, fixture.node_port(1))
        })?;
        senders.extend(start_senders(testbed, ClientKind::Pod(1), |family| {
            fixture.cluster_ip_ports(family)[1]
        })?);
        senders.extend(start_senders(testbed, ClientKind::External, |family| {
            testbed.at_node(1, family, fixture.node_port(1))
        })?);
        for sender in &senders {
            sender.wait_echo("web-0", 0, TIMEOUT)?;
        }
        fixture.service["spec"]["ports"][1]["targetPort"] = json!(OTHER_ECHO);
        fixture.slices.iter_mut().for_each(|slice| slice["ports"][1]["port"] = json!(OTHER_ECHO));
        testbed.apply_service(&fixture)?;
        let moved = now_us()?;
        for sender in senders {
            sender.wait_echo("other", moved, TIMEOUT)?;
            let report = sender.finish()?;
            ensure!(
                report.latest_us["web-0"] <= moved && report.lost + report.misdirected == 0,
                "{report:?}"
            );
        }
        testbed.withdraw(&fixture)
    })
}
