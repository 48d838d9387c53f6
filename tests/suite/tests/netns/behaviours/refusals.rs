//! Requests to a service without endpoints are refused at once; requests that another node could
//! answer are dropped.

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, failures},
    only_in_full,
};
use serde_json::json;

use super::{
    service_fixture::{self, ServiceFixture},
    testbed::{expect_refused, expect_timeout, on_both},
};

/// Kubernetes' own limit for a refusal.
const REFUSAL_TIMEOUT_US: u64 = 3_000_000;

#[test]
fn should_be_rejected_when_no_endpoints_exist() -> Result<()> {
    rejected("no-pods", 31, |_| {})
}

/// After an eviction the pod exists, has failed, and has no endpoint, in spite of
/// `publishNotReadyAddresses`.
#[test]
fn should_be_rejected_for_evicted_pods_no_endpoints_exist() -> Result<()> {
    rejected("evicted-pods", 32, |fixture| {
        fixture.service["spec"]["publishNotReadyAddresses"] = json!(true);
        fixture.slices.iter_mut().for_each(|slice| slice["endpoints"] = json!([]));
    })
}

fn rejected(name: &str, number: u16, change: impl Fn(&mut ServiceFixture)) -> Result<()> {
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of(name, number, &[&testbed.webs[0]]).with_node_ports();
        fixture.for_each_endpoint(service_fixture::unready);
        change(&mut fixture);
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for place in [testbed.clients[0].place(), testbed.host(0)] {
                expect_refused(place, fixture.cluster_ip_ports(family))?;
                let requests = place.get(fixture.cluster_ip_ports(family)[0], 1)?;
                ensure!(failures(&requests).keys().eq(["refused"]), "{requests:?}");
                ensure!(requests[0].ended_us - requests[0].began_us < REFUSAL_TIMEOUT_US, "{requests:?}");
            }
            for place in [testbed.clients[0].place(), &testbed.external, testbed.host(1)] {
                expect_refused(place, fixture.node_ports_of(testbed.cluster.nodes()[0].address(family)))?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

/// With a `Local` policy a node without endpoints drops; without any endpoint it refuses.
#[test]
fn local_policy_drops_with_remote_endpoints_and_rejects_without_any() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("elsewhere", 33, &[&testbed.webs[2]]).with_node_ports();
        fixture.service["spec"]["internalTrafficPolicy"] = json!("Local");
        fixture.service["spec"]["externalTrafficPolicy"] = json!("Local");
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            expect_timeout(testbed.clients[0].place(), fixture.cluster_ip_ports(family))?;
            expect_timeout(testbed.host(0), fixture.cluster_ip_ports(family))?;
            expect_timeout(
                &testbed.external,
                fixture.node_ports_of(testbed.cluster.nodes()[0].address(family)),
            )?;
        }
        fixture.for_each_endpoint(service_fixture::unready);
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            expect_refused(testbed.clients[0].place(), fixture.cluster_ip_ports(family))?;
            expect_refused(testbed.host(0), fixture.cluster_ip_ports(family))?;
            expect_refused(
                &testbed.external,
                fixture.node_ports_of(testbed.cluster.nodes()[0].address(family)),
            )?;
        }
        testbed.withdraw(&fixture)
    })
}
