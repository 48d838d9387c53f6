//! Servers with `hostNetwork`.

use anyhow::Result;
use dataplane_testkit::{
    lab::{Family, Node, Place},
    traffic::report::Transport,
};

use super::{
    service_fixture::ServiceFixture,
    testbed::{Mode, Testbed, expect_answers_over, on},
};

#[test]
fn should_function_for_service_endpoints_using_host_network_with_connect_time_translation() -> Result<()> {
    on(Mode::AtConnect, |testbed| {
        host_network(testbed, |testbed| vec![testbed.clients[0].place(), testbed.host(0), &testbed.external])
    })
}

#[test]
fn should_function_for_service_endpoints_using_host_network_per_packet() -> Result<()> {
    on(Mode::PerPacket, |testbed| {
        host_network(testbed, |testbed| vec![testbed.clients[0].place(), &testbed.external])
    })
}

/// The last client is external: it has no route to the cluster IP.
fn host_network(
    testbed: &mut Testbed,
    clients: impl for<'a> Fn(&'a Testbed) -> Vec<&'a Place>,
) -> Result<()> {
    let nodes: Vec<&Node> = testbed.cluster.nodes().iter().collect();
    let names: Vec<String> = nodes.iter().map(|node| node.name().to_owned()).collect();
    let fixture = ServiceFixture::of_hosts("host-network", 39, &nodes).with_node_ports();
    testbed.apply_service(&fixture)?;
    for family in Family::BOTH {
        for (number, place) in clients(testbed).into_iter().enumerate() {
            let is_external = number + 1 == clients(testbed).len();
            let nodes =
                testbed.cluster.nodes().iter().map(|node| fixture.node_ports_of(node.address(family)));
            let cluster = (!is_external).then(|| fixture.cluster_ip_ports(family));
            for servers in nodes.chain(cluster) {
                for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(servers) {
                    expect_answers_over(transport, place, at, &names)?;
                }
            }
        }
    }
    testbed.withdraw(&fixture)
}
