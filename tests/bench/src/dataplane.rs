//! The datapath's cluster: two nodes and three pods, with the real agent and CNI plugin.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result, bail};

use super::{
    network::recycle_ports,
    outside::OutsideServer,
    path::{Location, PORT, TrafficPath},
    services::{PORT_NAME, SERVICE_PORT, ServiceSet},
};
use dataplane_testkit::lab::{self, Backend, Pod, Routing, Service, ServicePort, Spec};

/// Services per manifest file; the agent reads a changed file completely.
const PER_FILE: usize = 500;

/// Where Services are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// At connect time.
    Connect,
    /// Per packet.
    Packet,
}

/// A cluster with the datapath, a client pod and two server pods.
#[derive(Debug)]
pub struct DataplaneCluster {
    client: Pod,
    local: Pod,
    remote: Pod,
    service: SocketAddr,
    // dropped after its pods
    cluster: lab::Cluster,
}

impl DataplaneCluster {
    /// Creates the cluster; returns when all Services are in the first node's tables.
    pub fn create(routing: Routing, services: u16, translation: Translation) -> Result<Self> {
        let spec = Spec { routing, connect_tcp: translation == Translation::Connect, ..Spec::new(2) };
        let mut cluster = lab::Cluster::create(&spec).context("cannot create the datapath's cluster")?;
        let client = cluster.pod(0, "client")?;
        let local = cluster.pod(0, "local")?;
        let remote = cluster.pod(1, "remote")?;
        recycle_ports(client.place().namespace())?;
        let services = ServiceSet::new(services, SocketAddrV4::new(local.v4(), PORT));
        let wanted: Vec<Service> = services.iter().map(as_applied).collect();
        // only the client's node: the other needs no Services
        let [first, ..] = cluster.nodes_mut() else { bail!("the cluster has no node") };
        for (number, some) in wanted.chunks(PER_FILE).enumerate() {
            let objects: Vec<_> = some.iter().flat_map(Service::objects).collect();
            first.apply(&format!("services-{number}"), &objects)?;
        }
        first.await_services(&wanted)?;
        Ok(Self { client, local, remote, service: services.target(), cluster })
    }

    /// Returns the path between two pods of the first node.
    pub fn same_node(&self) -> TrafficPath {
        self.path(&self.local)
    }

    /// Returns the path from a pod of the first node to a pod of the second.
    pub fn two_nodes(&self) -> TrafficPath {
        self.path(&self.remote)
    }

    /// Returns the path from a pod to a Service with a backend on the same node.
    pub fn service(&self) -> TrafficPath {
        self.same_node().through(self.service)
    }

    /// Connects a server to the nodes' network; returns also the client pod and its node's address.
    pub fn outside(&self) -> Result<(Location, Ipv4Addr, OutsideServer)> {
        let [node, ..] = self.cluster.nodes() else { bail!("the cluster has no node") };
        let server = OutsideServer::attach(
            "out-ours-server",
            (self.cluster.fabric().bridges(), "br1"),
            (node.place().namespace(), node.v4()),
        )?;
        Ok((location(&self.client), node.v4(), server))
    }

    fn path(&self, server: &Pod) -> TrafficPath {
        let listen = SocketAddrV4::new(server.v4(), PORT);
        TrafficPath {
            client: location(&self.client),
            server: location(server),
            listen,
            target: listen.into(),
        }
    }
}

fn location(pod: &Pod) -> Location {
    let place = pod.place();
    Location { namespace: place.namespace().path(), cgroup: Some(place.cgroup().to_owned()) }
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
