//! The checks, in their order.

mod agents;
mod backends;
mod throughput;

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Result, bail, ensure};

use super::{
    show::Show,
    world::{DNS_PORT, FAMILIES, WEB_NAME, WEB_PORT, World},
};
use dataplane_testkit::{
    lab::{Place, Pod, failures, names, outside},
    traffic::HTTP,
};

/// Requests per check of a Service: with three backends, the probability that one is never selected
/// is 10⁻¹⁰.
const REQUESTS: u32 = 60;

pub(super) fn all(world: &mut World, show: &mut Show) {
    pods(world, show);
    nodes_and_outside(world, show);
    services(world, show);
    dns(world, show);
    throughput::all(world, show);
    backends::all(world, show);
    agents::all(world, show);
}

fn pods(world: &mut World, show: &mut Show) {
    let far = world.far().is_some();
    for family in FAMILIES {
        show.check(world, &format!("ping, same node, {family}"), |world| {
            ping(world.clients[0].place(), world.near().address(family))
        });
        if far {
            show.check(world, &format!("ping, other node, {family}"), |world| {
                let far = world.far().expect("there is one");
                ping(world.clients[0].place(), far.address(family))
            });
        }
    }
    for family in FAMILIES {
        show.check(world, &format!("HTTP, same node, {family}"), |world| {
            get(world.clients[0].place(), world.near().web(family), 5).map(|answers| distribution(&answers))
        });
        if far {
            show.check(world, &format!("HTTP, other node, {family}"), |world| {
                let far = world.far().expect("there is one");
                get(world.clients[0].place(), far.web(family), 5).map(|answers| distribution(&answers))
            });
        }
    }
}

fn nodes_and_outside(world: &mut World, show: &mut Show) {
    for family in FAMILIES {
        show.check(world, &format!("HTTP from a node to its own pod, {family}"), |world| {
            let host = world.cluster.nodes()[0].place();
            get(host, world.near().web(family), 5).map(|answers| distribution(&answers))
        });
        show.check(
            world,
            &format!("HTTP from a pod to a host outside the cluster, masqueraded, {family}"),
            |world| {
                let place = world.cluster.outside()?;
                let _server = place.serve("outside")?;
                let requests = world.clients[0].place().get(SocketAddr::new(outside(family), HTTP), 5)?;
                ensure!(failures(&requests).is_empty(), "requests failed: {:?}", failures(&requests));
                let node = world.cluster.nodes()[0].address(family);
                let clients: Vec<_> = requests
                    .iter()
                    .filter_map(|request| request.answer())
                    .map(|answer| answer.client.ip())
                    .collect();
                ensure!(
                    clients.iter().all(|client| *client == node),
                    "the server outside saw clients {clients:?}, not {node}"
                );
                Ok(format!("5 of 5 answered; the server saw {node}"))
            },
        );
    }
}

fn services(world: &mut World, show: &mut Show) {
    for family in FAMILIES {
        show.check(world, &format!("ClusterIP from a pod, {family}"), |world| {
            distributed(world, world.clients[0].place(), world.web.at(family, WEB_PORT))
        });
        show.check(world, &format!("ClusterIP from a node, {family}"), |world| {
            distributed(world, world.cluster.nodes()[0].place(), world.web.at(family, WEB_PORT))
        });
        show.check(world, &format!("ClusterIP from its own backend (hairpin), {family}"), |world| {
            distributed(world, world.near().place(), world.web.at(family, WEB_PORT))
        });
    }
    if let Some(filler) = world.filler.clone() {
        show.check(world, &format!("ClusterIP of the last Service ({})", filler.name), |world| {
            distributed(world, world.clients[0].place(), filler.at(FAMILIES[0], WEB_PORT))
        });
    }
}

fn dns(world: &mut World, show: &mut Show) {
    for family in FAMILIES {
        for (transport, more) in [("UDP", &[][..]), ("TCP", &["--tcp"])] {
            show.check(world, &format!("DNS over {transport} through a ClusterIP, {family}"), |world| {
                let server = world.dns.at(family, DNS_PORT);
                let client = world.clients[0].place();
                let mut found = Vec::new();
                for record in ["a", "aaaa"] {
                    found.extend(client.resolve(server, WEB_NAME, &[&["--type", record], more].concat())?);
                }
                ensure!(
                    found == world.web.addresses,
                    "{WEB_NAME} resolves to {found:?}, not to {:?}",
                    world.web.addresses
                );
                Ok(format!("{WEB_NAME} resolves to {} and {}", found[0], found[1]))
            });
        }
    }
}

fn ping(from: &Place, to: std::net::IpAddr) -> Result<String> {
    let ping = from.ping(to, 5, 1_000)?;
    ping.check()?;
    Ok(format!("{} of {} answered", ping.received, ping.sent))
}

/// Sends requests that must all be answered. Returns the number of answers of each backend.
fn get(from: &Place, server: SocketAddr, count: u32) -> Result<BTreeMap<String, u64>> {
    let requests = from.get(server, count)?;
    let failures = failures(&requests);
    if !failures.is_empty() {
        bail!("requests to {server} failed: {failures:?}");
    }
    Ok(names(&requests))
}

/// Sends requests to the web Service. Fails if a backend answered none.
fn distributed(world: &World, from: &Place, server: SocketAddr) -> Result<String> {
    let answers = get(from, server, REQUESTS)?;
    let missing: Vec<_> =
        world.webs.iter().map(Pod::name).filter(|name| !answers.contains_key(*name)).collect();
    ensure!(missing.is_empty(), "no answer of {}; {}", missing.join(", "), distribution(&answers));
    Ok(distribution(&answers))
}

fn distribution(answers: &BTreeMap<String, u64>) -> String {
    answers.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}
