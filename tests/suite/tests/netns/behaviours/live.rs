//! Services that are edited, and come and go, while they are there; and an agent that does.

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, failures},
    only_in_full,
    traffic::{ECHO, HTTP, report::Transport},
};
use serde_json::json;

use super::{
    bed::{Mode, answers, answers_over, nobody, on, on_both, refuses},
    told::Told,
};

#[test]
fn should_be_updated_after_adding_or_deleting_ports() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of("edit-port-test", 57, &[&bed.webs[0]]);
        let ports = |numbers: &[u16]| {
            let port = |number: &u16| json!({"name": format!("p{number}"), "port": number, "protocol": "TCP", "targetPort": HTTP});
            numbers.iter().map(port).collect::<Vec<_>>()
        };
        let targets = [80, 81, 82]
            .map(|port: u16| json!({"name": format!("p{port}"), "port": HTTP, "protocol": "TCP"}));
        told.slices.iter_mut().for_each(|slice| slice["ports"] = json!(targets));
        for there in [&[80][..], &[80, 81, 82], &[81], &[80, 82]] {
            told.service["spec"]["ports"] = json!(ports(there));
            bed.tell(&told)?;
            for family in Family::BOTH {
                for port in [80, 81, 82] {
                    for place in [bed.clients[1].place(), bed.host(1)] {
                        let at = told.at(family, port);
                        if there.contains(&port) {
                            answers(place, at, &bed.names(&[0]))?;
                        } else {
                            nobody(place, at)?;
                        }
                    }
                }
            }
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_be_able_to_up_and_down_services() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let services = [(58, 0), (59, 1), (60, 2)]
            .map(|(number, web)| (Told::of(&format!("up-down-{number}"), number, &[&bed.webs[web]]), web));
        let [first, second, third] = &services;
        bed.tell(&first.0)?;
        bed.tell(&second.0)?;
        let up = |bed: &super::bed::Bed, (told, web): &(Told, usize)| {
            Family::BOTH.into_iter().try_for_each(|family| {
                let [at, _] = told.cluster(family);
                answers(bed.clients[0].place(), at, &bed.names(&[*web]))?;
                answers(bed.host(0), at, &bed.names(&[*web]))
            })
        };
        let down = |bed: &super::bed::Bed, (told, _): &(Told, usize)| {
            Family::BOTH
                .into_iter()
                .try_for_each(|family| nobody(bed.clients[0].place(), told.cluster(family)[0]))
        };
        up(bed, first)?;
        up(bed, second)?;
        bed.withdraw(&first.0)?;
        down(bed, first)?;
        up(bed, second)?;
        bed.tell(&third.0)?;
        up(bed, second)?;
        up(bed, third)?;
        bed.withdraw(&second.0)?;
        bed.withdraw(&third.0)
    })
}

/// Another object of the same name, with another address.
#[test]
fn should_work_after_the_service_has_been_recreated() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of("recreated", 61, &[&bed.webs[0], &bed.webs[1]]);
        bed.tell(&told)?;
        let before = Family::BOTH.map(|family| told.cluster(family)[0]);
        for at in before {
            answers(bed.clients[0].place(), at, &bed.names(&[0, 1]))?;
        }
        bed.withdraw(&told)?;
        for at in before {
            nobody(bed.clients[0].place(), at)?;
        }
        let again = Told::of("recreated", 62, &[&bed.webs[0], &bed.webs[1]]);
        told.service = again.service.clone();
        told.service["metadata"]["uid"] = json!("another");
        bed.tell(&told)?;
        for (family, before) in Family::BOTH.into_iter().zip(before) {
            answers(bed.clients[0].place(), again.cluster(family)[0], &bed.names(&[0, 1]))?;
            nobody(bed.clients[0].place(), before)?;
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols()
-> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of("nodeport-update-service", 63, &[&bed.webs[0]]);
        bed.tell(&told)?;
        let port = told.node_port(0);
        told.service["spec"]["type"] = json!("NodePort");
        told.service["spec"]["ports"] = json!([
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": HTTP, "nodePort": port},
            {"name": "echo", "port": 80, "protocol": "UDP", "targetPort": ECHO, "nodePort": port},
        ]);
        bed.tell(&told)?;
        for family in Family::BOTH {
            for transport in [Transport::Tcp, Transport::Udp] {
                for node in [0, 1] {
                    for place in [bed.clients[1].place(), bed.host(1), &bed.outside] {
                        let at = bed.at_node(node, family, port);
                        answers_over(transport, place, at, &bed.names(&[0]))?;
                    }
                }
                answers_over(transport, bed.clients[1].place(), told.at(family, 80), &bed.names(&[0]))?;
            }
        }
        bed.withdraw(&told)
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

/// Of both kinds of frontends: a pod that is deleted is asked no more.
fn update_endpoints(transport: Transport, number: u16) -> Result<()> {
    on_both(|bed| {
        let mut told = Told::of("updates", number, &[&bed.webs[0], &bed.webs[1], &bed.webs[2]]).on_nodes();
        let of = |at: [std::net::SocketAddr; 2]| if transport == Transport::Tcp { at[0] } else { at[1] };
        for there in [&[0, 1, 2][..], &[0, 2], &[1]] {
            let webs: Vec<_> = there.iter().map(|web| &bed.webs[*web]).collect();
            told.replace(&webs);
            bed.tell(&told)?;
            for family in Family::BOTH {
                let node = told.on_node(bed.cluster.nodes()[1].address(family));
                for at in [of(told.cluster(family)), of(node)] {
                    answers_over(transport, bed.clients[0].place(), at, &bed.names(there))?;
                    answers_over(transport, bed.host(0), at, &bed.names(there))?;
                }
                answers_over(transport, &bed.outside, of(node), &bed.names(there))?;
            }
        }
        bed.withdraw(&told)
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

/// The service takes its node port back.
fn update_node_port(transport: Transport, number: u16) -> Result<()> {
    on_both(|bed| {
        let mut told = Told::of("updates-port", number, &[&bed.webs[0], &bed.webs[1]]).on_nodes();
        let of = |at: [std::net::SocketAddr; 2]| if transport == Transport::Tcp { at[0] } else { at[1] };
        bed.tell(&told)?;
        for family in Family::BOTH {
            let at = of(told.on_node(bed.cluster.nodes()[1].address(family)));
            answers_over(transport, bed.clients[0].place(), at, &bed.names(&[0, 1]))?;
            answers_over(transport, &bed.outside, at, &bed.names(&[0, 1]))?;
        }
        told.set_type("ClusterIP");
        bed.tell(&told)?;
        for family in Family::BOTH {
            refuses(bed.clients[0].place(), told.on_node(bed.cluster.nodes()[1].address(family)))?;
            refuses(&bed.outside, told.on_node(bed.cluster.nodes()[1].address(family)))?;
            answers_over(transport, bed.clients[0].place(), of(told.cluster(family)), &bed.names(&[0, 1]))?;
        }
        bed.withdraw(&told)
    })
}

/// What was there before works all the while, and what comes after works too.
#[test]
fn should_work_after_restarting_kube_proxy() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let before = Told::of("restart-before", 68, &[&bed.webs[1]]).on_nodes();
        bed.tell(&before)?;
        let asking = bed.clients[0]
            .place()
            .keep_getting(before.cluster(Family::V4)[0], std::time::Duration::from_millis(5))?;
        for node in bed.cluster.nodes_mut() {
            node.agent_mut().kill()?;
        }
        for family in Family::BOTH {
            answers(bed.clients[0].place(), before.cluster(family)[0], &bed.names(&[1]))?;
            answers(&bed.outside, bed.at_node(0, family, before.node_port(0)), &bed.names(&[1]))?;
        }
        for node in bed.cluster.nodes_mut() {
            node.agent_mut().start()?;
        }
        for node in bed.cluster.nodes_mut() {
            node.agent_mut().await_ready()?;
        }
        let after = Told::of("restart-after", 69, &[&bed.webs[2]]).on_nodes();
        bed.tell(&after)?;
        for (told, web) in [(&before, 1), (&after, 2)] {
            for family in Family::BOTH {
                answers(bed.clients[0].place(), told.cluster(family)[0], &bed.names(&[web]))?;
                answers(&bed.outside, bed.at_node(0, family, told.node_port(0)), &bed.names(&[web]))?;
            }
        }
        let requests = asking.stop()?;
        ensure!(requests.len() > 10 && failures(&requests).is_empty(), "{:?}", failures(&requests));
        bed.withdraw(&after)?;
        bed.withdraw(&before)
    })
}
