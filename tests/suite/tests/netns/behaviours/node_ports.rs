//! Ports of nodes, external addresses, and addresses outside of the first range of cluster IPs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, Place},
    only_in_full,
    traffic::report::Transport,
};
use serde_json::{Value, json};

use super::{
    bed::{Bed, answers, answers_over, is_silent, on_both, refuses},
    told::{ECHO_PORT, Told, WEB},
};

/// Of no node, nor of anybody's network here.
const EXTERNAL: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 250)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x250, 0, 0, 0, 0, 0x250)),
];

/// Pods, hosts and the outside.
fn everybody(bed: &Bed) -> Vec<&Place> {
    vec![bed.clients[0].place(), bed.clients[2].place(), bed.host(0), bed.host(2), &bed.outside]
}

#[test]
fn should_be_able_to_create_a_functioning_node_port_service() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = Told::of("nodeport-test", 49, &[&bed.webs[0], &bed.webs[1]]).on_nodes();
        bed.tell(&told)?;
        for family in Family::BOTH {
            for node in bed.cluster.nodes() {
                for place in everybody(bed) {
                    let ports = told.on_node(node.address(family));
                    for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(ports) {
                        answers_over(transport, place, at, &bed.names(&[0, 1]))?;
                    }
                }
            }
        }
        bed.withdraw(&told)?;
        // the ports are released
        for family in Family::BOTH {
            refuses(&bed.outside, told.on_node(bed.cluster.nodes()[0].address(family)))?;
        }
        Ok(())
    })
}

#[test]
fn should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("externalip-test", 50, &[&bed.webs[0], &bed.webs[1]]);
        told.service["spec"]["externalIPs"] = json!(EXTERNAL);
        bed.tell(&told)?;
        for address in EXTERNAL {
            bed.route(address, 2)?;
            for place in everybody(bed) {
                answers(place, SocketAddr::new(address, WEB), &bed.names(&[0, 1]))?;
            }
        }
        bed.withdraw(&told)
    })
}

/// Addresses of the second range that no service has.
const NOBODYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 196, 7, 99)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x196, 0, 0, 0, 0, 0, 0x99)),
];

fn second_range() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "second"},
        "spec": {"cidrs": ["10.196.0.0/16", "fd00:196::/112"]},
    })
}

/// A second range of cluster IPs, far from the first.
#[test]
fn should_create_services_and_serve_on_different_service_cidrs() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let first = Told::of("cidr-first", 51, &[&bed.webs[1]]);
        let mut second = Told::of("cidr-second", 52, &[&bed.webs[1]]);
        let addresses = ["10.196.7.10", "fd00:196::10"];
        second.service["spec"]["clusterIP"] = json!(addresses[0]);
        second.service["spec"]["clusterIPs"] = json!(addresses);
        bed.tell(&first)?;
        bed.tell(&second)?;
        bed.apply("second-range", &[second_range()])?;
        for (family, address) in Family::BOTH.into_iter().zip(addresses) {
            let address: IpAddr = address.parse()?;
            for place in [bed.clients[0].place(), bed.host(0)] {
                answers(place, SocketAddr::new(address, WEB), &bed.names(&[1]))?;
                answers(place, first.at(family, WEB), &bed.names(&[1]))?;
                // its other ports are nobody's
                refuses(place, [9, 9].map(|port| SocketAddr::new(address, port)))?;
            }
        }
        for address in NOBODYS {
            let before = bed.cluster.nodes()[0].count("from_pod", "no_service")?;
            is_silent(bed.clients[0].place(), [WEB, ECHO_PORT].map(|port| SocketAddr::new(address, port)))?;
            let dropped = bed.cluster.nodes()[0].count("from_pod", "no_service")? - before;
            ensure!(dropped > 0, "{address}: nothing was dropped by name");
        }
        bed.withdraw(&second)?;
        bed.withdraw(&first)?;
        bed.cluster.change(1, |cluster| cluster.withdraw("second-range"))
    })
}
