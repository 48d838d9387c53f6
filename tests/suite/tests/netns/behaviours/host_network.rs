//! Servers in the networks of their nodes.

use anyhow::Result;
use dataplane_testkit::{
    lab::{Family, Node, Place},
    traffic::report::Transport,
};

use super::{
    bed::{Bed, Mode, answers_over, on},
    told::Told,
};

#[test]
fn should_function_for_service_endpoints_using_host_network_with_connect_time() -> Result<()> {
    on(Mode::AtConnect, |bed| {
        host_network(bed, |bed| vec![bed.clients[0].place(), bed.host(0), &bed.outside])
    })
}

#[test]
fn should_function_for_service_endpoints_using_host_network_by_packets_alone() -> Result<()> {
    on(Mode::ByPackets, |bed| host_network(bed, |bed| vec![bed.clients[0].place(), &bed.outside]))
}

/// The outside has no way to the cluster IP.
fn host_network(bed: &mut Bed, askers: impl for<'a> Fn(&'a Bed) -> Vec<&'a Place>) -> Result<()> {
    let nodes: Vec<&Node> = bed.cluster.nodes().iter().collect();
    let names: Vec<String> = nodes.iter().map(|node| node.name().to_owned()).collect();
    let told = Told::of_hosts("host-network", 39, &nodes).on_nodes();
    bed.tell(&told)?;
    for family in Family::BOTH {
        for (number, place) in askers(bed).into_iter().enumerate() {
            let is_outside = number + 1 == askers(bed).len();
            let nodes = bed.cluster.nodes().iter().map(|node| told.on_node(node.address(family)));
            let cluster = (!is_outside).then(|| told.cluster(family));
            for servers in nodes.chain(cluster) {
                for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(servers) {
                    answers_over(transport, place, at, &names)?;
                }
            }
        }
    }
    bed.withdraw(&told)
}
