//! `internalTrafficPolicy: Local`, and the source address that a server sees.

use anyhow::{Result, ensure};
use dataplane_testkit::{lab::Family, only_in_full, traffic::report::Transport};
use serde_json::json;

use super::{
    service_fixture::ServiceFixture,
    testbed::{Mode, Testbed, expect_answers, expect_answers_over, expect_timeout, on, on_both},
};

/// Clients are pods (`false` in `hosts`) or processes of the host (`true`). The server is on the
/// first node.
fn internal_local(
    fixture: &mut ServiceFixture,
    testbed: &mut Testbed,
    name: &str,
    hosts: &[bool],
) -> Result<()> {
    fixture.service["spec"]["internalTrafficPolicy"] = json!("Local");
    testbed.apply_service(fixture)?;
    for family in Family::BOTH {
        for is_host in hosts {
            let place =
                |node: usize| if *is_host { testbed.host(node) } else { testbed.clients[node].place() };
            for (transport, at) in
                [Transport::Tcp, Transport::Udp].into_iter().zip(fixture.cluster_ip_ports(family))
            {
                expect_answers_over(transport, place(0), at, &[name.to_owned()])?;
            }
            expect_timeout(place(1), fixture.cluster_ip_ports(family))?;
        }
    }
    testbed.withdraw(fixture)
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_to_pod() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("svc-itp", 34, &[&testbed.webs[0]]);
        internal_local(&mut fixture, testbed, "web-0", &[false])
    })
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_host_network_to_pod() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("svc-itp", 35, &[&testbed.webs[0]]);
        internal_local(&mut fixture, testbed, "web-0", &[true])
    })
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_and_node_to_pod_host_network() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let mut fixture = ServiceFixture::of_hosts("svc-itp", 36, &[&testbed.cluster.nodes()[0]]);
        internal_local(&mut fixture, testbed, "node1", &[false, true])
    })?;
    on(Mode::PerPacket, |testbed| {
        let mut fixture = ServiceFixture::of_hosts("svc-itp", 36, &[&testbed.cluster.nodes()[0]]);
        internal_local(&mut fixture, testbed, "node1", &[false])
    })
}

#[test]
fn should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = ServiceFixture::of("sourceip-test", 37, &[&testbed.webs[1]]);
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            // on the server's node, and on another
            for client in [&testbed.clients[0], &testbed.clients[1]] {
                let [web, echo] = fixture.cluster_ip_ports(family);
                client.place().get_as(web, 5, Some("web-1"), client.address(family))?;
                let report = expect_answers_over(Transport::Udp, client.place(), echo, &testbed.names(&[1]))?;
                let seen: Vec<_> = report.answers["web-1"].keys().copied().collect();
                ensure!(seen == [client.address(family)], "{report:?}");
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_allow_pods_to_hairpin_back_to_themselves_through_services() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = ServiceFixture::of("hairpin-test", 38, &[&testbed.webs[0]]).with_node_ports();
        testbed.apply_service(&fixture)?;
        let itself = testbed.webs[0].place();
        for family in Family::BOTH {
            for (transport, at) in
                [Transport::Tcp, Transport::Udp].into_iter().zip(fixture.cluster_ip_ports(family))
            {
                expect_answers_over(transport, itself, at, &testbed.names(&[0]))?;
            }
            for node in [0, 1] {
                expect_answers(
                    itself,
                    testbed.at_node(node, family, fixture.node_port(0)),
                    &testbed.names(&[0]),
                )?;
            }
        }
        testbed.withdraw(&fixture)
    })
}
