//! SCTP with real sockets, which the development machine's kernel may not have: a service with
//! different port and target port, at its cluster IP and a node port, so that ports and checksum of
//! every packet are rewritten.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::json;

use super::traffic::{REQUESTS, answered_by};
use dataplane_testkit::{
    lab::{Cluster, Family, Place, Pod, Protocol, Service, ServicePort, service_addresses},
    traffic::HTTP,
};

const NAME: &str = "sctp";
const PORT: u16 = 80;
const NODE_PORT: u16 = 30_412;
/// Bytes of a response: several packets.
const BYTES: usize = 20_000;

/// Reports the result of associations from `client` and from outside to these servers, one on each
/// of the cluster's nodes.
pub(super) fn check(
    cluster: &mut Cluster,
    client: &Pod,
    [near, far]: [&Pod; 2],
    report: &mut impl FnMut(&str, Result<()>) -> Result<()>,
) -> Result<()> {
    let mut servers = Vec::new();
    for family in Family::BOTH {
        for pod in [near, far] {
            servers.push(pod.serve_sctp(family)?);
        }
    }
    let service = Service {
        name: NAME.to_owned(),
        addresses: service_addresses(2).to_vec(),
        ports: vec![ServicePort { name: "http", port: PORT, protocol: Protocol::Sctp, target: HTTP }],
        backends: vec![near.backend(), far.backend()],
    };
    let mut objects = service.objects();
    objects[0]["spec"]["type"] = json!("NodePort");
    objects[0]["spec"]["ports"][0]["nodePort"] = json!(NODE_PORT);
    cluster.apply_objects(NAME, &objects)?;
    for node in cluster.nodes_mut() {
        node.await_service(&service)?;
    }

    let (outside, both) = (cluster.outside()?, [near.name(), far.name()]);
    let [node, other] = [&cluster.nodes()[0], &cluster.nodes()[1]];
    for family in Family::BOTH {
        let mut report = |what: &str, result| report(&format!("{what}, {family}"), result);
        let pod = |pod: &Pod| SocketAddr::new(pod.address(family), HTTP);
        let node_port = |address| SocketAddr::new(address, NODE_PORT);
        report("to near", associations(client.place(), pod(near), &both[..1]))?;
        report("to far", associations(client.place(), pod(far), &both[1..]))?;
        let at = service.at(family, PORT);
        report("pod to service", associations(client.place(), at, &both))?;
        report("pod to service, with hairpin", associations(near.place(), at, &both))?;
        report("host to service", associations(node.place(), at, &both))?;
        let here = node_port(node.address(family));
        report("pod to node port", associations(client.place(), here, &both))?;
        report("outside to node port", associations(&outside, here, &both))?;
        let there = node_port(other.address(family));
        report("pod to another node's port", associations(client.place(), there, &both))?;
    }
    for server in &mut servers {
        server.check_running()?;
    }
    Ok(())
}

/// Fails unless every association gets a response and every one of `servers` answered some.
fn associations(from: &Place, to: SocketAddr, servers: &[&str]) -> Result<()> {
    let requests = from.get_over_sctp(to, REQUESTS, BYTES)?;
    answered_by(&requests, servers)?;
    ensure!(requests.len() == REQUESTS as usize, "{} of {REQUESTS} requests were sent", requests.len());
    Ok(())
}
