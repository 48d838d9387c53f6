//! What the table stands on: a cluster, its pods and servers, a service for each policy and backing, and the same world as
//! the oracle knows it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use dataplane_tests::{
    lab::{Cluster, Node, Place, Pod, Process, Spec, outside},
    oracle::{self, At, Client, Protocol, Question, Rules, Verdict, World},
};
use ipnet::IpNet;
use serde_json::Value;

use super::{
    cells::{Asker, Backing, Cell, Door, Frontend, Policy},
    known::Mode,
    services::{self, Laid},
};

/// A running cluster with everything a cell needs.
pub(crate) struct Bed {
    // ends before what it runs on
    _servers: Vec<Process>,
    pods: Vec<Pod>,
    outside: Place,
    cluster: Cluster,
    world: World,
    rules: Rules,
    /// Who listens where.
    names: BTreeMap<IpAddr, String>,
    services: Vec<Laid>,
}

impl Bed {
    pub(crate) fn create(mode: Mode, frontends: &[Frontend], policies: &[Policy]) -> Result<Self> {
        let spec = Spec {
            routing: mode.routing,
            connect_tcp: mode.connect_time,
            connect_udp: mode.connect_time,
            ..Spec::new(3)
        };
        let cluster = Cluster::create(&spec)?;
        let made =
            [("asker", 0), ("near", 0), ("far", 1), ("third", 2)].map(|(name, node)| cluster.pod(node, name));
        let pods: Vec<Pod> = cluster.explain(made.into_iter().collect())?;
        let host = &cluster.nodes()[0];
        let mut servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
        servers.push(host.serve()?);
        let mut names: BTreeMap<IpAddr, String> = pods
            .iter()
            .flat_map(|pod| pod.addresses().map(|address| (address, pod.name().to_owned())))
            .collect();
        names.extend(host.addresses().map(|address| (address, host.name().to_owned())));
        let world = world(&cluster, &pods);
        let rules = if mode.connect_time { Rules::OURS_AT_CONNECT } else { Rules::OURS };
        let outside = cluster.outside()?;
        let makers = policies.iter().flat_map(|policy| Backing::ALL.map(|backing| (*policy, backing)));
        let services = makers
            .enumerate()
            .map(|(number, (policy, backing))| {
                Laid::new(number as u16, backing, policy, frontends, &pods, host)
            })
            .collect();
        let bed = Self { _servers: servers, pods, outside, cluster, world, rules, names, services };
        bed.route_addresses(frontends)?;
        Ok(bed)
    }

    pub(crate) const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(crate) fn place(&self, asker: Asker) -> &Place {
        match asker {
            Asker::Pod => self.pods[0].place(),
            Asker::Host => self.cluster.nodes()[0].place(),
            Asker::Outside => &self.outside,
        }
    }

    /// Who listens at an address.
    pub(crate) fn name(&self, address: IpAddr) -> String {
        self.names.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }

    /// Tells of all services, and waits until every agent has them.
    pub(crate) fn lay_services(&mut self) -> Result<()> {
        let objects: Vec<Value> = self
            .services
            .iter()
            .flat_map(|laid| [&laid.service].into_iter().chain(&laid.slices))
            .cloned()
            .collect();
        let names: Vec<String> = self
            .services
            .iter()
            .filter_map(|laid| Some(laid.service["metadata"]["name"].as_str()?.to_owned()))
            .collect();
        self.cluster.apply_objects("path-table", &objects)?;
        for node in self.cluster.nodes_mut() {
            let name = node.name().to_owned();
            node.await_names(&names).with_context(|| format!("on {name}"))?;
        }
        Ok(())
    }

    /// Where a cell's question goes.
    pub(crate) fn frontend(&self, cell: &Cell) -> SocketAddr {
        let node = self.cluster.nodes()[cell.door.node()].address(cell.family);
        services::frontend(cell, self.number(cell) as u16, node)
    }

    /// What the oracle says of it.
    pub(crate) fn expected(&self, cell: &Cell) -> Result<Verdict> {
        let Laid { service, slices, .. } = &self.services[self.number(cell)];
        let nodes = self.cluster.nodes();
        let client = match cell.asker {
            Asker::Pod => Client { at: At::Pod(nodes[0].name()), address: self.pods[0].address(cell.family) },
            Asker::Host => Client { at: At::Host(nodes[0].name()), address: nodes[0].address(cell.family) },
            Asker::Outside => Client {
                at: At::Outside { via: nodes[cell.door.node()].name() },
                address: outside(cell.family),
            },
        };
        let to = self.frontend(cell);
        let protocol = if cell.is_udp { Protocol::Udp } else { Protocol::Tcp };
        let question = Question { address: to.ip(), port: to.port(), protocol };
        oracle::answer(self.rules, &self.world, service, slices, &client, &question)
    }

    fn number(&self, cell: &Cell) -> usize {
        let is_it = |laid: &Laid| laid.backing == cell.backing && laid.policy == cell.policy;
        self.services.iter().position(is_it).expect("a service for every policy and backing")
    }

    /// The gateway knows a way to every frontend: through the node that is its door.
    fn route_addresses(&self, frontends: &[Frontend]) -> Result<()> {
        let gateway = self.cluster.fabric().gateway();
        for door in Door::BOTH {
            let node = &self.cluster.nodes()[door.node()];
            let via = |prefix: &IpNet| {
                if prefix.addr().is_ipv4() { IpAddr::V4(node.v4()) } else { node.v6().into() }
            };
            for prefix in services::prefixes(door, frontends) {
                gateway.ip(&format!("route add {prefix} via {}", via(&prefix)))?;
            }
        }
        Ok(())
    }
}

/// Nodes and pods, as the oracle wants to know them.
fn world(cluster: &Cluster, pods: &[Pod]) -> World {
    let node = |node: &Node| oracle::Node {
        name: node.name().to_owned(),
        addresses: node.addresses().to_vec(),
        zone: None,
        pods: pods.iter().filter(|pod| pod.node() == node.name()).flat_map(Pod::addresses).collect(),
    };
    World { nodes: cluster.nodes().iter().map(node).collect(), localhost_node_ports: false }
}
