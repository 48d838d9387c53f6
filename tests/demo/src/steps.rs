//! The checks, in their order.

mod agents;
mod backends;
mod throughput;

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Result, bail, ensure};

use super::{
    show::Show,
    testbed::{DNS_PORT, FAMILIES, Testbed, WEB_NAME, WEB_PORT},
};
use dataplane_testkit::{
    lab::{Place, Pod, failures, names, outside},
    traffic::HTTP,
};

/// Requests per check of a Service: with three backends, the probability that one is never selected
/// is 10⁻¹⁰.
const REQUESTS: u32 = 60;

pub(super) fn all(testbed: &mut Testbed, show: &mut Show) {
    pods(testbed, show);
    nodes_and_outside(testbed, show);
    services(testbed, show);
    dns(testbed, show);
    throughput::all(testbed, show);
    backends::all(testbed, show);
    agents::all(testbed, show);
}

fn pods(testbed: &mut Testbed, show: &mut Show) {
    let far = testbed.far().is_some();
    for family in FAMILIES {
        show.check(testbed, &format!("ping, same node, {family}"), |testbed| {
            ping(testbed.clients[0].place(), testbed.near().address(family))
        });
        if far {
            show.check(testbed, &format!("ping, other node, {family}"), |testbed| {
                let far = testbed.far().expect("there is one");
                ping(testbed.clients[0].place(), far.address(family))
            });
        }
    }
    for family in FAMILIES {
        show.check(testbed, &format!("HTTP, same node, {family}"), |testbed| {
            get(testbed.clients[0].place(), testbed.near().web(family), 5)
                .map(|answers| distribution(&answers))
        });
        if far {
            show.check(testbed, &format!("HTTP, other node, {family}"), |testbed| {
                let far = testbed.far().expect("there is one");
                get(testbed.clients[0].place(), far.web(family), 5).map(|answers| distribution(&answers))
            });
        }
    }
}

fn nodes_and_outside(testbed: &mut Testbed, show: &mut Show) {
    for family in FAMILIES {
        show.check(testbed, &format!("HTTP from a node to its own pod, {family}"), |testbed| {
            let host = testbed.cluster.nodes()[0].place();
            get(host, testbed.near().web(family), 5).map(|answers| distribution(&answers))
        });
        show.check(
            testbed,
            &format!("HTTP from a pod to a host outside the cluster, masqueraded, {family}"),
            |testbed| {
                let place = testbed.cluster.outside()?;
                let _server = place.serve("outside")?;
                let requests = testbed.clients[0].place().get(SocketAddr::new(outside(family), HTTP), 5)?;
                ensure!(failures(&requests).is_empty(), "requests failed: {:?}", failures(&requests));
                let node = testbed.cluster.nodes()[0].address(family);
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

fn services(testbed: &mut Testbed, show: &mut Show) {
    for family in FAMILIES {
        show.check(testbed, &format!("ClusterIP from a pod, {family}"), |testbed| {
            distributed(testbed, testbed.clients[0].place(), testbed.web.at(family, WEB_PORT))
        });
        show.check(testbed, &format!("ClusterIP from a node, {family}"), |testbed| {
            distributed(testbed, testbed.cluster.nodes()[0].place(), testbed.web.at(family, WEB_PORT))
        });
        show.check(testbed, &format!("ClusterIP from its own backend (hairpin), {family}"), |testbed| {
            distributed(testbed, testbed.near().place(), testbed.web.at(family, WEB_PORT))
        });
    }
    if let Some(filler) = testbed.filler.clone() {
        show.check(testbed, &format!("ClusterIP of the last Service ({})", filler.name), |testbed| {
            distributed(testbed, testbed.clients[0].place(), filler.at(FAMILIES[0], WEB_PORT))
        });
    }
}

fn dns(testbed: &mut Testbed, show: &mut Show) {
    for family in FAMILIES {
        for (transport, more) in [("UDP", &[][..]), ("TCP", &["--tcp"])] {
            show.check(testbed, &format!("DNS over {transport} through a ClusterIP, {family}"), |testbed| {
                let server = testbed.dns.at(family, DNS_PORT);
                let client = testbed.clients[0].place();
                let mut found = Vec::new();
                for record in ["a", "aaaa"] {
                    found.extend(client.resolve(server, WEB_NAME, &[&["--type", record], more].concat())?);
                }
                ensure!(
                    found == testbed.web.addresses,
                    "{WEB_NAME} resolves to {found:?}, not to {:?}",
                    testbed.web.addresses
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
fn distributed(testbed: &Testbed, from: &Place, server: SocketAddr) -> Result<String> {
    let answers = get(from, server, REQUESTS)?;
    let missing: Vec<_> =
        testbed.webs.iter().map(Pod::name).filter(|name| !answers.contains_key(*name)).collect();
    ensure!(missing.is_empty(), "no answer of {}; {}", missing.join(", "), distribution(&answers));
    Ok(distribution(&answers))
}

fn distribution(answers: &BTreeMap<String, u64>) -> String {
    answers.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}
