//! No endpoint is ready, and a terminating one still serves: for each policy separately.

use anyhow::Result;
use dataplane_testkit::{lab::Family, only_in_full};
use serde_json::{Value, json};

use super::{
    service_fixture::{ServiceFixture, terminating_and_serving},
    testbed::{Testbed, expect_answers, expect_timeout, on_both},
};

/// A service whose only endpoint, on the first node, is terminating and serving.
fn terminating(testbed: &Testbed, number: u16, change: impl FnOnce(&mut Value)) -> ServiceFixture {
    let mut fixture =
        ServiceFixture::of("svc-proxy-terminating", number, &[&testbed.webs[0]]).with_node_ports();
    fixture.for_each_endpoint(terminating_and_serving);
    change(&mut fixture.service["spec"]);
    fixture
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_cluster()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = terminating(testbed, 20, |_| {});
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                let [web, _] = fixture.cluster_ip_ports(family);
                expect_answers(testbed.clients[node].place(), web, &testbed.names(&[0]))?;
                expect_answers(testbed.host(node), web, &testbed.names(&[0]))?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_local()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = terminating(testbed, 21, |spec| spec["internalTrafficPolicy"] = json!("Local"));
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let [web, _] = fixture.cluster_ip_ports(family);
            expect_answers(testbed.clients[0].place(), web, &testbed.names(&[0]))?;
            expect_answers(testbed.host(0), web, &testbed.names(&[0]))?;
            expect_timeout(testbed.clients[1].place(), fixture.cluster_ip_ports(family))?;
            expect_timeout(testbed.host(1), fixture.cluster_ip_ports(family))?;
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_cluster()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = terminating(testbed, 22, |_| {});
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                let web = testbed.at_node(node, family, fixture.node_port(0));
                for place in [
                    testbed.clients[0].place(),
                    testbed.clients[1].place(),
                    &testbed.external,
                    testbed.host(1),
                ] {
                    expect_answers(place, web, &testbed.names(&[0]))?;
                }
            }
        }
        testbed.withdraw(&fixture)
    })
}

/// Only the addressed node's endpoints count: clients of the second node's port do not reach the
/// server on the first node.
#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_local()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture = terminating(testbed, 23, |spec| spec["externalTrafficPolicy"] = json!("Local"));
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let nodes = testbed.cluster.nodes();
            let ports = |node: usize| fixture.node_ports_of(nodes[node].address(family));
            for place in [
                testbed.clients[0].place(),
                testbed.clients[1].place(),
                &testbed.external,
                testbed.host(0),
                testbed.host(1),
            ] {
                expect_answers(place, ports(0)[0], &testbed.names(&[0]))?;
            }
            for place in [testbed.clients[0].place(), &testbed.external, testbed.host(0)] {
                expect_timeout(place, ports(1))?;
            }
            // from the node itself the node port follows the internal traffic policy
            expect_answers(testbed.clients[1].place(), ports(1)[0], &testbed.names(&[0]))?;
        }
        testbed.withdraw(&fixture)
    })
}
