//! Ours: the same two nodes and three pods, made by the real agent and the real CNI plugin.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, bail};

use super::{
    network::recycle_ports,
    services::{PORT_NAME, SERVICE_PORT, ServiceSet},
    site::{PORT, Place, Site},
};
use dataplane_testkit::lab::{self, Backend, Pod, Routing, Service, ServicePort, Spec};

/// Services in a file for the agent to read: one that it reads anew takes it milliseconds.
const PER_FILE: usize = 500;

/// Where services are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// When a socket connects.
    Connect,
    /// In every packet.
    Packet,
}

/// A cluster of ours with traffic's ends in it.
#[derive(Debug)]
pub struct Ours {
    client: Pod,
    local: Pod,
    remote: Pod,
    service: SocketAddr,
    // ends after the pods that are in it
    _cluster: lab::Cluster,
}

impl Ours {
    /// Returns when the first node's agent has every service in its datapath.
    pub fn create(routing: Routing, services: u16, translation: Translation) -> Result<Self> {
        let spec = Spec { routing, connect_tcp: translation == Translation::Connect, ..Spec::new(2) };
        let mut cluster = lab::Cluster::create(&spec).context("make a cluster of ours")?;
        let client = cluster.pod(0, "client")?;
        let local = cluster.pod(0, "local")?;
        let remote = cluster.pod(1, "remote")?;
        recycle_ports(client.place().namespace())?;
        let services = ServiceSet::new(services, SocketAddrV4::new(local.v4(), PORT));
        let wanted: Vec<Service> = services.iter().map(as_applied).collect();
        // the node of who asks: the others do the same work, and take their time for it
        let [asked, ..] = cluster.nodes_mut() else { bail!("there is no node") };
        for (number, some) in wanted.chunks(PER_FILE).enumerate() {
            let objects: Vec<_> = some.iter().flat_map(Service::objects).collect();
            asked.apply(&format!("services-{number}"), &objects)?;
        }
        asked.await_services(&wanted)?;
        Ok(Self { client, local, remote, service: services.target(), _cluster: cluster })
    }

    /// Pod to pod on the first node.
    pub fn same_node(&self) -> Site {
        self.site(&self.local)
    }

    /// Pod to pod from the first node to the second.
    pub fn two_nodes(&self) -> Site {
        self.site(&self.remote)
    }

    /// Pod to service, its backend on the same node.
    pub fn service(&self) -> Site {
        self.same_node().through(self.service)
    }

    fn site(&self, server: &Pod) -> Site {
        let listen = SocketAddrV4::new(server.v4(), PORT);
        Site { client: place(&self.client), server: place(server), listen, target: listen.into() }
    }
}

fn place(pod: &Pod) -> Place {
    let place = pod.place();
    Place { namespace: place.namespace().path(), cgroup: Some(place.cgroup().to_owned()) }
}

fn as_applied(service: &super::services::Service) -> Service {
    let backend = |(number, address): (usize, &SocketAddrV4)| Backend {
        pod: format!("{}-{number}", service.name),
        node: "node2".to_owned(),
        addresses: vec![IpAddr::V4(*address.ip())],
    };
    Service {
        name: service.name.clone(),
        addresses: vec![service.cluster_ip.into()],
        ports: vec![ServicePort {
            name: PORT_NAME,
            port: SERVICE_PORT,
            protocol: service.protocol,
            target: service.target_port(),
        }],
        backends: service.backends.iter().enumerate().map(backend).collect(),
    }
}
