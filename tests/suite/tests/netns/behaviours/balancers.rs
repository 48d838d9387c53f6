//! Addresses of load balancers, which the gateway leads to a node: as a cloud's balancer would.

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
    bed::{Bed, Mode, answers, is_silent, on, on_both},
    conntrack::{Asker, Cycle},
    told::{ECHO_PORT, Told, WEB, ended, ending},
};

const PATIENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(20);
/// Requests that are let go on between two steps of an update.
const A_WHILE: usize = 10;

/// Of the service with this number.
fn addresses(number: u16) -> [IpAddr; 2] {
    let last = number as u8;
    [
        Ipv4Addr::new(198, 51, 100, last).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, last.into()).into(),
    ]
}

fn balanced(told: &mut Told, number: u16, policy: &str) {
    told.set_type("LoadBalancer");
    told.service["spec"]["externalTrafficPolicy"] = json!(policy);
    let ingress = addresses(number).map(|address| json!({"ip": address, "ipMode": "VIP"}));
    told.service["status"]["loadBalancer"]["ingress"] = json!(ingress);
}

fn at(number: u16, family: Family, port: u16) -> SocketAddr {
    let address = addresses(number).into_iter().find(|address| family.is_of(address));
    SocketAddr::new(address.expect("an address of both families"), port)
}

fn route(bed: &Bed, number: u16, node: usize) -> Result<()> {
    addresses(number).into_iter().try_for_each(|address| bed.route(address, node))
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
        on(mode, |bed| route(bed, number, 0))?;
        for asker in [Asker::Outside, Asker::Pod(2)] {
            let cycle = Cycle { number, asker, nodes };
            cycle.preserves_udp(
                mode,
                |told| balanced(told, number, "Cluster"),
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

/// On the node that the balancer sends to, one pod follows another: the new one becomes ready, the old one ends, serves on,
/// and is gone. Nobody who asks from outside, nor from within, is without an answer.
fn rolling_update(number: u16, policy: &str) -> Result<()> {
    on_both(|bed| {
        route(bed, number, 0)?;
        let make = |bed: &Bed, generation: usize| {
            let pod = bed.cluster.pod(0, &format!("roll-{number}-{generation}"))?;
            let server = pod.serve()?;
            anyhow::Ok((pod, server))
        };
        let mut current = make(bed, 0)?;
        let mut told = Told::of("rolling", number, &[&current.0]);
        balanced(&mut told, number, policy);
        bed.tell(&told)?;
        let mut asking = Vec::new();
        for family in Family::BOTH {
            for place in [&bed.outside, bed.clients[0].place(), bed.clients[1].place(), bed.host(2)] {
                asking.push(place.keep_getting(at(number, family, WEB), INTERVAL)?);
            }
        }
        go_on(&asking)?;
        for generation in 1..4 {
            let next = make(bed, generation)?;
            let old = current.0.address(Family::V4).to_string();
            let old_v6 = current.0.address(Family::V6).to_string();
            let is_old = |endpoint: &serde_json::Value| {
                endpoint["addresses"][0] == old.as_str() || endpoint["addresses"][0] == old_v6.as_str()
            };
            told.replace(&[&current.0, &next.0]);
            bed.tell(&told)?;
            go_on(&asking)?;
            for condition in [ending, ended] {
                told.each(|endpoint| {
                    if is_old(endpoint) {
                        condition(endpoint);
                    }
                });
                bed.tell(&told)?;
                go_on(&asking)?;
            }
            told.replace(&[&next.0]);
            bed.tell(&told)?;
            go_on(&asking)?;
            let (pod, server) = std::mem::replace(&mut current, next);
            drop(server);
            pod.delete()?;
        }
        for client in asking {
            let requests = client.stop()?;
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            ensure!(names(&requests).len() == 4, "each of them had its turn: {:?}", names(&requests));
        }
        bed.withdraw(&told)?;
        current.0.delete()
    })
}

/// Until every client has had so many answers more.
fn go_on(asking: &[Client<Vec<Request>>]) -> Result<()> {
    let now = now_us()?;
    asking.iter().try_for_each(|client| client.wait_answers(A_WHILE, now, PATIENCE))
}

/// Pods ask the service, wherever they are; the outside asks the node.
#[test]
fn should_work_from_pods() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("reachability-test", 79, &[&bed.webs[0]]);
        balanced(&mut told, 79, "Local");
        bed.tell(&told)?;
        for family in Family::BOTH {
            let web = at(79, family, WEB);
            for node in [0, 1, 2] {
                answers(bed.clients[node].place(), web, &bed.names(&[0]))?;
                answers(bed.host(node), web, &bed.names(&[0]))?;
            }
            bed.clients[1].place().get_as(web, 3, Some("web-0"), bed.clients[1].address(family))?;
        }
        bed.withdraw(&told)
    })
}

/// The balancer sends to a node; there the endpoints are those of the node, and see who asks.
#[test]
fn should_only_target_nodes_with_endpoints() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("target-nodes", 80, &[&bed.webs[0], &bed.webs[1]]);
        balanced(&mut told, 80, "Local");
        bed.tell(&told)?;
        for (node, has) in [(0, true), (1, true), (2, false)] {
            route(bed, 80, node)?;
            for family in Family::BOTH {
                let [web, echo] = [WEB, ECHO_PORT].map(|port| at(80, family, port));
                if has {
                    answers(&bed.outside, web, &bed.names(&[node]))?;
                    let name = bed.webs[node].name();
                    bed.outside.get_as(web, 3, Some(name), outside(family))?;
                } else {
                    is_silent(&bed.outside, [web, echo])?;
                }
            }
        }
        bed.withdraw(&told)
    })
}
