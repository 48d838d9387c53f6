//! `internalTrafficPolicy: Local`, and whose address a server sees.

use anyhow::{Result, ensure};
use dataplane_testkit::{lab::Family, only_in_full, traffic::report::Transport};
use serde_json::json;

use super::{
    bed::{Bed, Mode, answers, answers_over, is_silent, on, on_both},
    told::Told,
};

/// Asked by pods, or by processes of the host: each of `hosts` says by whom. The server is on the first node.
fn internal_local(told: &mut Told, bed: &mut Bed, name: &str, hosts: &[bool]) -> Result<()> {
    told.service["spec"]["internalTrafficPolicy"] = json!("Local");
    bed.tell(told)?;
    for family in Family::BOTH {
        for is_host in hosts {
            let place = |node: usize| if *is_host { bed.host(node) } else { bed.clients[node].place() };
            for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(told.cluster(family)) {
                answers_over(transport, place(0), at, &[name.to_owned()])?;
            }
            is_silent(place(1), told.cluster(family))?;
        }
    }
    bed.withdraw(told)
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_to_pod() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("svc-itp", 34, &[&bed.webs[0]]);
        internal_local(&mut told, bed, "web-0", &[false])
    })
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_host_network_to_pod() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("svc-itp", 35, &[&bed.webs[0]]);
        internal_local(&mut told, bed, "web-0", &[true])
    })
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_and_node_to_pod_host_network() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of_hosts("svc-itp", 36, &[&bed.cluster.nodes()[0]]);
        internal_local(&mut told, bed, "node1", &[false, true])
    })?;
    on(Mode::ByPackets, |bed| {
        let mut told = Told::of_hosts("svc-itp", 36, &[&bed.cluster.nodes()[0]]);
        internal_local(&mut told, bed, "node1", &[false])
    })
}

#[test]
fn should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = Told::of("sourceip-test", 37, &[&bed.webs[1]]);
        bed.tell(&told)?;
        for family in Family::BOTH {
            // beside the server, and elsewhere
            for client in [&bed.clients[0], &bed.clients[1]] {
                let [web, echo] = told.cluster(family);
                client.place().get_as(web, 5, Some("web-1"), client.address(family))?;
                let heard = answers_over(Transport::Udp, client.place(), echo, &bed.names(&[1]))?;
                let seen: Vec<_> = heard.answers["web-1"].keys().copied().collect();
                ensure!(seen == [client.address(family)], "{heard:?}");
            }
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_allow_pods_to_hairpin_back_to_themselves_through_services() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = Told::of("hairpin-test", 38, &[&bed.webs[0]]).on_nodes();
        bed.tell(&told)?;
        let itself = bed.webs[0].place();
        for family in Family::BOTH {
            for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(told.cluster(family)) {
                answers_over(transport, itself, at, &bed.names(&[0]))?;
            }
            for node in [0, 1] {
                answers(itself, bed.at_node(node, family, told.node_port(0)), &bed.names(&[0]))?;
            }
        }
        bed.withdraw(&told)
    })
}
