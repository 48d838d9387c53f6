//! Load balancer addresses. The gateway routes them to a node, as a cloud's load balancer would.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Client, Family, failures, names, outside},
    only_in_full,
    traffic::{now_us, report::Request},
};
use serde_json::json;

use super::{
    conntrack::{ClientKind, Cycle},
    service_fixture::{ECHO_PORT, ServiceFixture, WEB, terminating_and_serving, terminating_not_serving},
    testbed::{Mode, Testbed, expect_answers, expect_timeout, on, on_both},
};

const TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(20);
/// Requests of each client between two steps of an update.
const REQUESTS: usize = 10;

/// The load balancer addresses of the service with this number.
fn addresses(number: u16) -> [IpAddr; 2] {
    let last = number as u8;
    [
        Ipv4Addr::new(198, 51, 100, last).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, last.into()).into(),
    ]
}

fn set_load_balancer(fixture: &mut ServiceFixture, number: u16, policy: &str) {
    fixture.set_type("LoadBalancer");
    fixture.service["spec"]["externalTrafficPolicy"] = json!(policy);
    let ingress = addresses(number).map(|address| json!({"ip": address, "ipMode": "VIP"}));
    fixture.service["status"]["loadBalancer"]["ingress"] = json!(ingress);
}

fn at(number: u16, family: Family, port: u16) -> SocketAddr {
    let address = addresses(number).into_iter().find(|address| family.is_of(address));
    SocketAddr::new(address.expect("an address of both families"), port)
}

fn route(testbed: &Testbed, number: u16, node: usize) -> Result<()> {
    addresses(number).into_iter().try_for_each(|address| testbed.route(address, node))
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_load_balancer_service_on_different_nodes()
-> Result<()> {
    only_in_full!();
    udp_cycles(75, [0, 1])
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_load_balancer_service_on_the_same_nodes()
-> Result<()> {
    only_in_full!();
    udp_cycles(76, [1, 1])
}

fn udp_cycles(number: u16, nodes: [usize; 2]) -> Result<()> {
    Mode::BOTH.into_iter().try_for_each(|mode| {
        on(mode, |testbed| route(testbed, number, 0))?;
        for client in [ClientKind::External, ClientKind::Pod(2)] {
            let cycle = Cycle { number, client, nodes };
            cycle.preserves_udp(
                mode,
                |fixture| set_load_balancer(fixture, number, "Cluster"),
                |_, _, family| at(number, family, ECHO_PORT),
            )?;
        }
        Ok(())
    })
}

#[test]
fn should_not_have_connectivity_disruption_during_rolling_update_with_external_traffic_policy_cluster()
-> Result<()> {
    only_in_full!();
    rolling_update(77, "Cluster")
}

#[test]
fn should_not_have_connectivity_disruption_during_rolling_update_with_external_traffic_policy_local()
-> Result<()> {
    only_in_full!();
    rolling_update(78, "Local")
}

/// On the node that the load balancer sends to, each pod is replaced by the next: the new one
/// becomes ready; the old one terminates, still serves, and is deleted. Every request from outside
/// and from inside the cluster is answered.
fn rolling_update(number: u16, policy: &str) -> Result<()> {
    on_both(|testbed| {
        route(testbed, number, 0)?;
        let create = |testbed: &Testbed, generation: usize| {
            let pod = testbed.cluster.pod(0, &format!("roll-{number}-{generation}"))?;
            let server = pod.serve()?;
            anyhow::Ok((pod, server))
        };
        let mut current = create(testbed, 0)?;
        let mut fixture = ServiceFixture::of("rolling", number, &[&current.0]);
        set_load_balancer(&mut fixture, number, policy);
        testbed.apply_service(&fixture)?;
        let mut clients = Vec::new();
        for family in Family::BOTH {
            for place in
                [&testbed.external, testbed.clients[0].place(), testbed.clients[1].place(), testbed.host(2)]
            {
                clients.push(place.keep_getting(at(number, family, WEB), INTERVAL)?);
            }
        }
        wait_answers_from_all(&clients)?;
        for generation in 1..4 {
            let next = create(testbed, generation)?;
            let old = current.0.address(Family::V4).to_string();
            let old_v6 = current.0.address(Family::V6).to_string();
            let is_old = |endpoint: &serde_json::Value| {
                endpoint["addresses"][0] == old.as_str() || endpoint["addresses"][0] == old_v6.as_str()
            };
            fixture.replace_endpoints(&[&current.0, &next.0]);
            testbed.apply_service(&fixture)?;
            wait_answers_from_all(&clients)?;
            for condition in [terminating_and_serving, terminating_not_serving] {
                fixture.for_each_endpoint(|endpoint| {
                    if is_old(endpoint) {
                        condition(endpoint);
                    }
                });
                testbed.apply_service(&fixture)?;
                wait_answers_from_all(&clients)?;
            }
            fixture.replace_endpoints(&[&next.0]);
            testbed.apply_service(&fixture)?;
            wait_answers_from_all(&clients)?;
            let (pod, server) = std::mem::replace(&mut current, next);
            drop(server);
            pod.delete()?;
        }
        for client in clients {
            let requests = client.stop()?;
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            ensure!(names(&requests).len() == 4, "expected answers of all four pods: {:?}", names(&requests));
        }
        testbed.withdraw(&fixture)?;
        current.0.delete()
    })
}

/// Waits until every client has received [`REQUESTS`] further answers.
fn wait_answers_from_all(clients: &[Client<Vec<Request>>]) -> Result<()> {
    let now = now_us()?;
    clients.iter().try_for_each(|client| client.wait_answers(REQUESTS, now, TIMEOUT))
}

/// Pods and hosts on every node reach the load balancer address, also without a local endpoint.
#[test]
fn should_work_from_pods() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("reachability-test", 79, &[&testbed.webs[0]]);
        set_load_balancer(&mut fixture, 79, "Local");
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let web = at(79, family, WEB);
            for node in [0, 1, 2] {
                expect_answers(testbed.clients[node].place(), web, &testbed.names(&[0]))?;
                expect_answers(testbed.host(node), web, &testbed.names(&[0]))?;
            }
            testbed.clients[1].place().get_as(web, 3, Some("web-0"), testbed.clients[1].address(family))?;
        }
        testbed.withdraw(&fixture)
    })
}

/// A node answers only with its own endpoints, and these see the client's address.
#[test]
fn should_only_target_nodes_with_endpoints() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("target-nodes", 80, &[&testbed.webs[0], &testbed.webs[1]]);
        set_load_balancer(&mut fixture, 80, "Local");
        testbed.apply_service(&fixture)?;
        for (node, has) in [(0, true), (1, true), (2, false)] {
            route(testbed, 80, node)?;
            for family in Family::BOTH {
                let [web, echo] = [WEB, ECHO_PORT].map(|port| at(80, family, port));
                if has {
                    expect_answers(&testbed.external, web, &testbed.names(&[node]))?;
                    let name = testbed.webs[node].name();
                    testbed.external.get_as(web, 3, Some(name), outside(family))?;
                } else {
                    expect_timeout(&testbed.external, [web, echo])?;
                }
            }
        }
        testbed.withdraw(&fixture)
    })
}
