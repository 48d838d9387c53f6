//! SCTP with real sockets, which the kernel of this machine may not have: a service whose port is another than its pods',
//! behind a cluster address and a node port, so that every packet's ports and checksum are rewritten.

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
/// Bytes of an answer: several packets.
const BYTES: usize = 20_000;

/// Tells what becomes of associations between `client`, the outside and these servers, one on each of the cluster's nodes.
pub(super) fn try_out(
    cluster: &mut Cluster,
    client: &Pod,
    [near, far]: [&Pod; 2],
    tell: &mut impl FnMut(&str, Result<()>) -> Result<()>,
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
        let mut tell = |what: &str, result| tell(&format!("{what}, {family}"), result);
        let pod = |pod: &Pod| SocketAddr::new(pod.address(family), HTTP);
        let node_port = |address| SocketAddr::new(address, NODE_PORT);
        tell("to near", associations(client.place(), pod(near), &both[..1]))?;
        tell("to far", associations(client.place(), pod(far), &both[1..]))?;
        let at = service.at(family, PORT);
        tell("pod to service", associations(client.place(), at, &both))?;
        tell("pod to service, back to itself", associations(near.place(), at, &both))?;
        tell("host to service", associations(node.place(), at, &both))?;
        let here = node_port(node.address(family));
        tell("pod to node port", associations(client.place(), here, &both))?;
        tell("outside to node port", associations(&outside, here, &both))?;
        let there = node_port(other.address(family));
        tell("pod to another node's port", associations(client.place(), there, &both))?;
    }
    for server in &mut servers {
        server.check_running()?;
    }
    Ok(())
}

/// Every association brings an answer, and each of `servers` is asked.
fn associations(from: &Place, to: SocketAddr, servers: &[&str]) -> Result<()> {
    let requests = from.get_by_sctp(to, REQUESTS, BYTES)?;
    answered_by(&requests, servers)?;
    ensure!(requests.len() == REQUESTS as usize, "{} of {REQUESTS} were asked", requests.len());
    Ok(())
}
