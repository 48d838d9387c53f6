//! The endpoints of a service, from EndpointSlices.

use anyhow::Result;
use dataplane_testkit::{
    lab::Family,
    traffic::{HTTP, report::Transport},
};
use serde_json::json;

use super::{
    service_fixture::{self, ServiceFixture, endpoint},
    testbed::{Mode, Testbed, expect_answers, expect_answers_over, expect_refused, on},
};

/// Ports of a second server in a pod.
const OTHER_HTTP: u16 = 9_090;
const OTHER_ECHO: u16 = 9_007;

#[test]
fn should_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_true()
-> Result<()> {
    unready(24, |endpoint| {
        endpoint["conditions"] = json!({"ready": true, "serving": false, "terminating": true});
    })
}

#[test]
fn should_create_endpoints_for_unready_pods() -> Result<()> {
    unready(25, |endpoint| {
        endpoint["conditions"] = json!({"ready": true, "serving": false, "terminating": false});
    })
}

/// With `publishNotReadyAddresses` an unready pod has `ready: true` in its slice; the other
/// conditions do not matter.
fn unready(number: u16, conditions: fn(&mut serde_json::Value)) -> Result<()> {
    on(Mode::AtConnect, |testbed| {
        let mut fixture =
            ServiceFixture::of("svc-tolerate-unready", number, &[&testbed.webs[0]]).with_node_ports();
        fixture.service["spec"]["publishNotReadyAddresses"] = json!(true);
        fixture.for_each_endpoint(conditions);
        testbed.apply_service(&fixture)?;
        at_all_frontends(testbed, &fixture, |testbed, servers| {
            expect_answers(testbed.clients[1].place(), servers[0], &testbed.names(&[0]))
        })?;
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_not_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_false()
-> Result<()> {
    on(Mode::AtConnect, |testbed| {
        let mut fixture =
            ServiceFixture::of("svc-not-tolerate-unready", 26, &[&testbed.webs[0]]).with_node_ports();
        fixture.for_each_endpoint(service_fixture::terminating_not_serving);
        testbed.apply_service(&fixture)?;
        at_all_frontends(testbed, &fixture, |testbed, servers| {
            expect_refused(testbed.clients[1].place(), servers)
        })?;
        testbed.withdraw(&fixture)
    })
}

/// Checks the cluster IP, and the node ports of the node with the endpoint and of one without.
fn at_all_frontends(
    testbed: &Testbed,
    fixture: &ServiceFixture,
    check: impl Fn(&Testbed, [std::net::SocketAddr; 2]) -> Result<()>,
) -> Result<()> {
    for family in Family::BOTH {
        check(testbed, fixture.cluster_ip_ports(family))?;
        for node in [0, 1] {
            check(testbed, fixture.node_ports_of(testbed.cluster.nodes()[node].address(family)))?;
        }
    }
    Ok(())
}

#[test]
fn should_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpointslices() -> Result<()> {
    on(Mode::PerPacket, |testbed| {
        let mut fixture = ServiceFixture::of("multiple-ips", 27, &[]);
        fixture.slices.clear();
        for family in Family::BOTH {
            let of = |node: usize| endpoint(testbed.webs[node].node(), testbed.webs[node].address(family));
            // one address is in both slices, as while the slice controller moves it
            for (part, nodes) in [("a", [0, 1]), ("b", [1, 2])] {
                let part = format!("{part}-{family}");
                fixture.slices.push(service_fixture::slice(fixture.name(), &part, family, &nodes.map(of)));
            }
        }
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for (transport, at) in
                [Transport::Tcp, Transport::Udp].into_iter().zip(fixture.cluster_ip_ports(family))
            {
                expect_answers_over(transport, testbed.clients[0].place(), at, &testbed.names(&[0, 1, 2]))?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_support_a_service_with_multiple_ports_specified_in_multiple_endpointslices() -> Result<()> {
    on(Mode::PerPacket, |testbed| {
        let mut fixture = ServiceFixture::of("multiple-ports", 28, &[]);
        fixture.slices.clear();
        for family in Family::BOTH {
            for (node, port) in [(0, 0), (1, 1)] {
                let web = endpoint(testbed.webs[node].node(), testbed.webs[node].address(family));
                let mut slice =
                    service_fixture::slice(fixture.name(), &format!("{port}-{family}"), family, &[web]);
                slice["ports"] = json!([slice["ports"][port]]);
                fixture.slices.push(slice);
            }
        }
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let [web, echo] = fixture.cluster_ip_ports(family);
            expect_answers_over(Transport::Tcp, testbed.clients[2].place(), web, &testbed.names(&[0]))?;
            expect_answers_over(Transport::Udp, testbed.clients[2].place(), echo, &testbed.names(&[1]))?;
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_support_named_target_ports_that_resolve_to_different_ports_on_different_endpoints() -> Result<()> {
    on(Mode::AtConnect, |testbed| {
        let _other = other_server(testbed)?;
        let mut fixture = ServiceFixture::of("named-ports", 29, &[&testbed.webs[0]]);
        for family in Family::BOTH {
            let web = endpoint(testbed.webs[2].node(), testbed.webs[2].address(family));
            let mut slice =
                service_fixture::slice(fixture.name(), &format!("other-{family}"), family, &[web]);
            slice["ports"][0]["port"] = json!(OTHER_HTTP);
            slice["ports"][1]["port"] = json!(OTHER_ECHO);
            fixture.slices.push(slice);
        }
        testbed.apply_service(&fixture)?;
        let both = [testbed.names(&[0]), vec!["other".to_owned()]].concat();
        for family in Family::BOTH {
            for (transport, at) in
                [Transport::Tcp, Transport::Udp].into_iter().zip(fixture.cluster_ip_ports(family))
            {
                expect_answers_over(transport, testbed.clients[1].place(), at, &both)?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

/// For the network, a restartable init container is one more process of the pod.
#[test]
fn should_connect_to_the_named_ports_exposed_by_restartable_init_containers() -> Result<()> {
    on(Mode::AtConnect, |testbed| {
        let _other = other_server(testbed)?;
        let mut fixture = ServiceFixture::of("sidecar", 30, &[&testbed.webs[2]]);
        fixture.service["spec"]["ports"] = json!([
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": HTTP},
            {"name": "init", "port": 81, "protocol": "TCP", "targetPort": "init-port"},
        ]);
        for slice in &mut fixture.slices {
            slice["ports"][1] = json!({"name": "init", "port": OTHER_HTTP, "protocol": "TCP"});
        }
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            expect_answers(testbed.clients[0].place(), fixture.at(family, 80), &testbed.names(&[2]))?;
            expect_answers(testbed.clients[0].place(), fixture.at(family, 81), &["other".to_owned()])?;
        }
        testbed.withdraw(&fixture)
    })
}

/// Starts a second server in the pod of the third node.
fn other_server(testbed: &Testbed) -> Result<dataplane_testkit::lab::Process> {
    let (http, echo) = (OTHER_HTTP.to_string(), OTHER_ECHO.to_string());
    testbed.webs[2].place().start_traffic(&["serve", "--name", "other", "--http", &http, "--echo", &echo])
}
