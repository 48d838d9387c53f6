//! Node ports, external IPs, and cluster IPs outside the first service CIDR.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, Place},
    only_in_full,
    traffic::report::Transport,
};
use serde_json::{Value, json};

use super::{
    service_fixture::{ECHO_PORT, ServiceFixture, WEB},
    testbed::{Testbed, expect_answers, expect_answers_over, expect_refused, expect_timeout, on_both},
};

/// External IPs that belong to no node and no subnet.
const EXTERNAL: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 250)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x250, 0, 0, 0, 0, 0x250)),
];

/// Pods, hosts and an external client.
fn all_clients(testbed: &Testbed) -> Vec<&Place> {
    vec![
        testbed.clients[0].place(),
        testbed.clients[2].place(),
        testbed.host(0),
        testbed.host(2),
        &testbed.external,
    ]
}

#[test]
fn should_be_able_to_create_a_functioning_node_port_service() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture =
            ServiceFixture::of("nodeport-test", 49, &[&testbed.webs[0], &testbed.webs[1]]).with_node_ports();
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for node in testbed.cluster.nodes() {
                for place in all_clients(testbed) {
                    let ports = fixture.node_ports_of(node.address(family));
                    for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(ports) {
                        expect_answers_over(transport, place, at, &testbed.names(&[0, 1]))?;
                    }
                }
            }
        }
        testbed.withdraw(&fixture)?;
        // the ports are released
        for family in Family::BOTH {
            expect_refused(
                &testbed.external,
                fixture.node_ports_of(testbed.cluster.nodes()[0].address(family)),
            )?;
        }
        Ok(())
    })
}

#[test]
fn should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node()
-> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("externalip-test", 50, &[&testbed.webs[0], &testbed.webs[1]]);
        fixture.service["spec"]["externalIPs"] = json!(EXTERNAL);
        testbed.apply_service(&fixture)?;
        for address in EXTERNAL {
            testbed.route(address, 2)?;
            for place in all_clients(testbed) {
                expect_answers(place, SocketAddr::new(address, WEB), &testbed.names(&[0, 1]))?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

/// Unused addresses of the second service CIDR.
const UNUSED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 196, 7, 99)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x196, 0, 0, 0, 0, 0, 0x99)),
];

fn second_range() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "second"},
        "spec": {"cidrs": ["10.196.0.0/16", "fd00:196::/112"]},
    })
}

/// A second service CIDR that is not adjacent to the first.
#[test]
fn should_create_services_and_serve_on_different_service_cidrs() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let first = ServiceFixture::of("cidr-first", 51, &[&testbed.webs[1]]);
        let mut second = ServiceFixture::of("cidr-second", 52, &[&testbed.webs[1]]);
        let addresses = ["10.196.7.10", "fd00:196::10"];
        second.service["spec"]["clusterIP"] = json!(addresses[0]);
        second.service["spec"]["clusterIPs"] = json!(addresses);
        testbed.apply_service(&first)?;
        testbed.apply_service(&second)?;
        testbed.apply("second-range", &[second_range()])?;
        for (family, address) in Family::BOTH.into_iter().zip(addresses) {
            let address: IpAddr = address.parse()?;
            for place in [testbed.clients[0].place(), testbed.host(0)] {
                expect_answers(place, SocketAddr::new(address, WEB), &testbed.names(&[1]))?;
                expect_answers(place, first.at(family, WEB), &testbed.names(&[1]))?;
                // other ports of the cluster IP are refused
                expect_refused(place, [9, 9].map(|port| SocketAddr::new(address, port)))?;
            }
        }
        for address in UNUSED {
            let before = testbed.cluster.nodes()[0].count("from_pod", "no_service")?;
            expect_timeout(
                testbed.clients[0].place(),
                [WEB, ECHO_PORT].map(|port| SocketAddr::new(address, port)),
            )?;
            let dropped = testbed.cluster.nodes()[0].count("from_pod", "no_service")? - before;
            ensure!(dropped > 0, "{address}: no packet was dropped as no_service");
        }
        testbed.withdraw(&second)?;
        testbed.withdraw(&first)?;
        testbed.cluster.change(1, |cluster| cluster.withdraw("second-range"))
    })
}
