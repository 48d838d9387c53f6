//! Who stands behind a service, as slices say it.

use anyhow::Result;
use dataplane_testkit::{
    lab::Family,
    traffic::{HTTP, report::Transport},
};
use serde_json::json;

use super::{
    bed::{Bed, Mode, answers, answers_over, on, refuses},
    told::{self, Told, endpoint},
};

/// Of a second server in a pod.
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

/// A pod that is not ready counts as ready, because the service says so: which only the conditions tell.
fn unready(number: u16, conditions: fn(&mut serde_json::Value)) -> Result<()> {
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of("svc-tolerate-unready", number, &[&bed.webs[0]]).on_nodes();
        told.service["spec"]["publishNotReadyAddresses"] = json!(true);
        told.each(conditions);
        bed.tell(&told)?;
        everywhere(bed, &told, |bed, servers| answers(bed.clients[1].place(), servers[0], &bed.names(&[0])))?;
        bed.withdraw(&told)
    })
}

#[test]
fn should_not_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_false()
-> Result<()> {
    on(Mode::AtConnect, |bed| {
        let mut told = Told::of("svc-not-tolerate-unready", 26, &[&bed.webs[0]]).on_nodes();
        told.each(told::ended);
        bed.tell(&told)?;
        everywhere(bed, &told, |bed, servers| refuses(bed.clients[1].place(), servers))?;
        bed.withdraw(&told)
    })
}

/// At the cluster IP, and at ports of the node that has the endpoint and of one that has not.
fn everywhere(
    bed: &Bed,
    told: &Told,
    look: impl Fn(&Bed, [std::net::SocketAddr; 2]) -> Result<()>,
) -> Result<()> {
    for family in Family::BOTH {
        look(bed, told.cluster(family))?;
        for node in [0, 1] {
            look(bed, told.on_node(bed.cluster.nodes()[node].address(family)))?;
        }
    }
    Ok(())
}

#[test]
fn should_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpointslices() -> Result<()> {
    on(Mode::ByPackets, |bed| {
        let mut told = Told::of("multiple-ips", 27, &[]);
        told.slices.clear();
        for family in Family::BOTH {
            let of = |node: usize| endpoint(bed.webs[node].node(), bed.webs[node].address(family));
            // one address is in both: it has moved from one to the other, or somebody writes slices by hand
            for (part, nodes) in [("a", [0, 1]), ("b", [1, 2])] {
                let part = format!("{part}-{family}");
                told.slices.push(told::slice(told.name(), &part, family, &nodes.map(of)));
            }
        }
        bed.tell(&told)?;
        for family in Family::BOTH {
            for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(told.cluster(family)) {
                answers_over(transport, bed.clients[0].place(), at, &bed.names(&[0, 1, 2]))?;
            }
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_support_a_service_with_multiple_ports_specified_in_multiple_endpointslices() -> Result<()> {
    on(Mode::ByPackets, |bed| {
        let mut told = Told::of("multiple-ports", 28, &[]);
        told.slices.clear();
        for family in Family::BOTH {
            for (node, port) in [(0, 0), (1, 1)] {
                let web = endpoint(bed.webs[node].node(), bed.webs[node].address(family));
                let mut slice = told::slice(told.name(), &format!("{port}-{family}"), family, &[web]);
                slice["ports"] = json!([slice["ports"][port]]);
                told.slices.push(slice);
            }
        }
        bed.tell(&told)?;
        for family in Family::BOTH {
            let [web, echo] = told.cluster(family);
            answers_over(Transport::Tcp, bed.clients[2].place(), web, &bed.names(&[0]))?;
            answers_over(Transport::Udp, bed.clients[2].place(), echo, &bed.names(&[1]))?;
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_support_named_target_ports_that_resolve_to_different_ports_on_different_endpoints() -> Result<()> {
    on(Mode::AtConnect, |bed| {
        let _other = other_server(bed)?;
        let mut told = Told::of("named-ports", 29, &[&bed.webs[0]]);
        for family in Family::BOTH {
            let web = endpoint(bed.webs[2].node(), bed.webs[2].address(family));
            let mut slice = told::slice(told.name(), &format!("other-{family}"), family, &[web]);
            slice["ports"][0]["port"] = json!(OTHER_HTTP);
            slice["ports"][1]["port"] = json!(OTHER_ECHO);
            told.slices.push(slice);
        }
        bed.tell(&told)?;
        let both = [bed.names(&[0]), vec!["other".to_owned()]].concat();
        for family in Family::BOTH {
            for (transport, at) in [Transport::Tcp, Transport::Udp].into_iter().zip(told.cluster(family)) {
                answers_over(transport, bed.clients[1].place(), at, &both)?;
            }
        }
        bed.withdraw(&told)
    })
}

/// To the network an init container that goes on is one more process of the pod: its ports are the pod's.
#[test]
fn should_connect_to_the_named_ports_exposed_by_restartable_init_containers() -> Result<()> {
    on(Mode::AtConnect, |bed| {
        let _other = other_server(bed)?;
        let mut told = Told::of("sidecar", 30, &[&bed.webs[2]]);
        told.service["spec"]["ports"] = json!([
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": HTTP},
            {"name": "init", "port": 81, "protocol": "TCP", "targetPort": "init-port"},
        ]);
        for slice in &mut told.slices {
            slice["ports"][1] = json!({"name": "init", "port": OTHER_HTTP, "protocol": "TCP"});
        }
        bed.tell(&told)?;
        for family in Family::BOTH {
            answers(bed.clients[0].place(), told.at(family, 80), &bed.names(&[2]))?;
            answers(bed.clients[0].place(), told.at(family, 81), &["other".to_owned()])?;
        }
        bed.withdraw(&told)
    })
}

/// In the pod of the third node.
fn other_server(bed: &Bed) -> Result<dataplane_testkit::lab::Process> {
    let (http, echo) = (OTHER_HTTP.to_string(), OTHER_ECHO.to_string());
    bed.webs[2].place().start_traffic(&["serve", "--name", "other", "--http", &http, "--echo", &echo])
}
