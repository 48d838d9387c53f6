//! Services that are edited, deleted and recreated, and an agent that restarts.

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, failures},
    only_in_full,
    traffic::{ECHO, HTTP, report::Transport},
};
use serde_json::json;

use super::{
    service_fixture::ServiceFixture,
    testbed::{Mode, expect_answers, expect_answers_over, expect_no_answer, expect_refused, on, on_both},
};

#[test]
fn should_be_updated_after_adding_or_deleting_ports() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let mut fixture = ServiceFixture::of("edit-port-test", 57, &[&testbed.webs[0]]);
        let ports = |numbers: &[u16]| {
            let port = |number: &u16| json!({"name": format!("p{number}"), "port": number, "protocol": "TCP", "targetPort": HTTP});
            numbers.iter().map(port).collect::<Vec<_>>()
        };
        let targets = [80, 81, 82]
            .map(|port: u16| json!({"name": format!("p{port}"), "port": HTTP, "protocol": "TCP"}));
        fixture.slices.iter_mut().for_each(|slice| slice["ports"] = json!(targets));
        for current in [&[80][..], &[80, 81, 82], &[81], &[80, 82]] {
            fixture.service["spec"]["ports"] = json!(ports(current));
            testbed.apply_service(&fixture)?;
            for family in Family::BOTH {
                for port in [80, 81, 82] {
                    for place in [testbed.clients[1].place(), testbed.host(1)] {
                        let at = fixture.at(family, port);
                        if current.contains(&port) {
                            expect_answers(place, at, &testbed.names(&[0]))?;
                        } else {
                            expect_no_answer(place, at)?;
                        }
                    }
                }
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_be_able_to_up_and_down_services() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let services = [(58, 0), (59, 1), (60, 2)].map(|(number, web)| {
            (ServiceFixture::of(&format!("up-down-{number}"), number, &[&testbed.webs[web]]), web)
        });
        let [first, second, third] = &services;
        testbed.apply_service(&first.0)?;
        testbed.apply_service(&second.0)?;
        let up = |testbed: &super::testbed::Testbed, (fixture, web): &(ServiceFixture, usize)| {
            Family::BOTH.into_iter().try_for_each(|family| {
                let [at, _] = fixture.cluster_ip_ports(family);
                expect_answers(testbed.clients[0].place(), at, &testbed.names(&[*web]))?;
                expect_answers(testbed.host(0), at, &testbed.names(&[*web]))
            })
        };
        let down = |testbed: &super::testbed::Testbed, (fixture, _): &(ServiceFixture, usize)| {
            Family::BOTH.into_iter().try_for_each(|family| {
                expect_no_answer(testbed.clients[0].place(), fixture.cluster_ip_ports(family)[0])
            })
        };
        up(testbed, first)?;
        up(testbed, second)?;
        testbed.withdraw(&first.0)?;
        down(testbed, first)?;
        up(testbed, second)?;
        testbed.apply_service(&third.0)?;
        up(testbed, second)?;
        up(testbed, third)?;
        testbed.withdraw(&second.0)?;
        testbed.withdraw(&third.0)
    })
}

/// The new object has the same name and another address.
#[test]
fn should_work_after_the_service_has_been_recreated() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let mut fixture = ServiceFixture::of("recreated", 61, &[&testbed.webs[0], &testbed.webs[1]]);
        testbed.apply_service(&fixture)?;
        let before = Family::BOTH.map(|family| fixture.cluster_ip_ports(family)[0]);
        for at in before {
            expect_answers(testbed.clients[0].place(), at, &testbed.names(&[0, 1]))?;
        }
        testbed.withdraw(&fixture)?;
        for at in before {
            expect_no_answer(testbed.clients[0].place(), at)?;
        }
        let again = ServiceFixture::of("recreated", 62, &[&testbed.webs[0], &testbed.webs[1]]);
        fixture.service = again.service.clone();
        fixture.service["metadata"]["uid"] = json!("another");
        testbed.apply_service(&fixture)?;
        for (family, before) in Family::BOTH.into_iter().zip(before) {
            expect_answers(
                testbed.clients[0].place(),
                again.cluster_ip_ports(family)[0],
                &testbed.names(&[0, 1]),
            )?;
            expect_no_answer(testbed.clients[0].place(), before)?;
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols()
-> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let mut fixture = ServiceFixture::of("nodeport-update-service", 63, &[&testbed.webs[0]]);
        testbed.apply_service(&fixture)?;
        let port = fixture.node_port(0);
        fixture.service["spec"]["type"] = json!("NodePort");
        fixture.service["spec"]["ports"] = json!([
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": HTTP, "nodePort": port},
            {"name": "echo", "port": 80, "protocol": "UDP", "targetPort": ECHO, "nodePort": port},
        ]);
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for transport in [Transport::Tcp, Transport::Udp] {
                for node in [0, 1] {
                    for place in [testbed.clients[1].place(), testbed.host(1), &testbed.external] {
                        let at = testbed.at_node(node, family, port);
                        expect_answers_over(transport, place, at, &testbed.names(&[0]))?;
                    }
                }
                expect_answers_over(
                    transport,
                    testbed.clients[1].place(),
                    fixture.at(family, 80),
                    &testbed.names(&[0]),
                )?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_update_endpoints_http() -> Result<()> {
    only_in_full!();
    update_endpoints(Transport::Tcp, 64)
}

#[test]
fn should_update_endpoints_udp() -> Result<()> {
    only_in_full!();
    update_endpoints(Transport::Udp, 65)
}

/// At both kinds of frontend: a deleted pod receives no more requests.
fn update_endpoints(transport: Transport, number: u16) -> Result<()> {
    on_both(|testbed| {
        let mut fixture =
            ServiceFixture::of("updates", number, &[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]])
                .with_node_ports();
        let of = |at: [std::net::SocketAddr; 2]| if transport == Transport::Tcp { at[0] } else { at[1] };
        for current in [&[0, 1, 2][..], &[0, 2], &[1]] {
            let webs: Vec<_> = current.iter().map(|web| &testbed.webs[*web]).collect();
            fixture.replace_endpoints(&webs);
            testbed.apply_service(&fixture)?;
            for family in Family::BOTH {
                let node = fixture.node_ports_of(testbed.cluster.nodes()[1].address(family));
                for at in [of(fixture.cluster_ip_ports(family)), of(node)] {
                    expect_answers_over(transport, testbed.clients[0].place(), at, &testbed.names(current))?;
                    expect_answers_over(transport, testbed.host(0), at, &testbed.names(current))?;
                }
                expect_answers_over(transport, &testbed.external, of(node), &testbed.names(current))?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_update_node_port_http() -> Result<()> {
    only_in_full!();
    update_node_port(Transport::Tcp, 66)
}

#[test]
fn should_update_node_port_udp() -> Result<()> {
    only_in_full!();
    update_node_port(Transport::Udp, 67)
}

/// The service loses its node port with its type.
fn update_node_port(transport: Transport, number: u16) -> Result<()> {
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("updates-port", number, &[&testbed.webs[0], &testbed.webs[1]])
            .with_node_ports();
        let of = |at: [std::net::SocketAddr; 2]| if transport == Transport::Tcp { at[0] } else { at[1] };
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let at = of(fixture.node_ports_of(testbed.cluster.nodes()[1].address(family)));
            expect_answers_over(transport, testbed.clients[0].place(), at, &testbed.names(&[0, 1]))?;
            expect_answers_over(transport, &testbed.external, at, &testbed.names(&[0, 1]))?;
        }
        fixture.set_type("ClusterIP");
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            expect_refused(
                testbed.clients[0].place(),
                fixture.node_ports_of(testbed.cluster.nodes()[1].address(family)),
            )?;
            expect_refused(
                &testbed.external,
                fixture.node_ports_of(testbed.cluster.nodes()[1].address(family)),
            )?;
            expect_answers_over(
                transport,
                testbed.clients[0].place(),
                of(fixture.cluster_ip_ports(family)),
                &testbed.names(&[0, 1]),
            )?;
        }
        testbed.withdraw(&fixture)
    })
}

/// A service works before, while and after all agents restart, and a later service works, too.
#[test]
fn should_work_after_restarting_kube_proxy() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let before = ServiceFixture::of("restart-before", 68, &[&testbed.webs[1]]).with_node_ports();
        testbed.apply_service(&before)?;
        let requests = testbed.clients[0]
            .place()
            .keep_getting(before.cluster_ip_ports(Family::V4)[0], std::time::Duration::from_millis(5))?;
        for node in testbed.cluster.nodes_mut() {
            node.agent_mut().kill()?;
        }
        for family in Family::BOTH {
            expect_answers(
                testbed.clients[0].place(),
                before.cluster_ip_ports(family)[0],
                &testbed.names(&[1]),
            )?;
            expect_answers(
                &testbed.external,
                testbed.at_node(0, family, before.node_port(0)),
                &testbed.names(&[1]),
            )?;
        }
        for node in testbed.cluster.nodes_mut() {
            node.agent_mut().start()?;
        }
        for node in testbed.cluster.nodes_mut() {
            node.agent_mut().await_ready()?;
        }
        let after = ServiceFixture::of("restart-after", 69, &[&testbed.webs[2]]).with_node_ports();
        testbed.apply_service(&after)?;
        for (fixture, web) in [(&before, 1), (&after, 2)] {
            for family in Family::BOTH {
                expect_answers(
                    testbed.clients[0].place(),
                    fixture.cluster_ip_ports(family)[0],
                    &testbed.names(&[web]),
                )?;
                expect_answers(
                    &testbed.external,
                    testbed.at_node(0, family, fixture.node_port(0)),
                    &testbed.names(&[web]),
                )?;
            }
        }
        let requests = requests.stop()?;
        ensure!(requests.len() > 10 && failures(&requests).is_empty(), "{:?}", failures(&requests));
        testbed.withdraw(&after)?;
        testbed.withdraw(&before)
    })
}
