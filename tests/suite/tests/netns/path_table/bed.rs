//! What the table stands on: a cluster, its pods and servers, a service for each policy and backing, and the same world as
//! the oracle knows it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_oracle::{
    self as oracle, Client, Destination, HostPort, Location, Protocol, Topology, Verdict, at_host_ports,
};
use dataplane_testkit::{
    apiserver::Needs,
    lab::{
        Cluster, Family, Node, Place, Process, Routing, Source, Spec, await_rules, kube_proxy_user, outside,
    },
};
use ipnet::IpNet;
use serde_json::Value;

use super::{
    cells::{Asker, Backing, Cell, Door, Frontend, Policy},
    host_ports,
    known::Mode,
    services::{self, Laid},
};

/// A running cluster with everything a cell needs.
pub(crate) struct Bed {
    // end before what they run on
    _processes: Vec<Process>,
    pods: Vec<Server>,
    outside: Place,
    cluster: Cluster,
    mode: Mode,
    world: Topology,
    /// Who listens where.
    names: BTreeMap<IpAddr, String>,
    services: Vec<Laid>,
}

/// A pod that serves: one of ours, or one of Linux alone.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) node: String,
    place: Place,
    addresses: [IpAddr; 2],
}

/// Who asks, then one on each node.
const PODS: [(&str, usize); 4] = [("asker", 0), ("near", 0), ("far", 1), ("third", 2)];

impl Server {
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        let found = self.addresses.iter().find(|address| family.is_of(address));
        *found.expect("a pod of both families")
    }

    /// IPv4, IPv6.
    pub(crate) const fn addresses(&self) -> &[IpAddr; 2] {
        &self.addresses
    }
}

impl Bed {
    /// Of a cluster whose services are ours.
    pub(crate) fn ours(
        (routing, connect_time, xdp): (Routing, bool, bool),
        frontends: &[Frontend],
        policies: &[Policy],
    ) -> Result<Self> {
        let mode = Mode::Ours { routing, connect_time, xdp };
        let spec =
            Spec { routing, connect_tcp: connect_time, connect_udp: connect_time, xdp, ..Spec::new(3) };
        let cluster = Cluster::create(&spec)?;
        let made = PODS.iter().enumerate().map(|(index, &(name, node))| {
            let ports = host_ports::asked_for(index, &cluster.nodes()[node]);
            let pod = cluster.pod_with(node, name, ports)?;
            let (node, addresses) = (pod.node().to_owned(), pod.addresses());
            Ok(Server { name, node, place: pod.place().clone(), addresses })
        });
        let pods = cluster.explain(made.collect())?;
        let mut bed = Self::on(cluster, mode, pods, Vec::new(), frontends, policies)?;
        bed.tell()?;
        let names = bed.service_names();
        for node in bed.cluster.nodes_mut() {
            let name = node.name().to_owned();
            node.await_names(&names).with_context(|| format!("on {name}"))?;
        }
        Ok(bed)
    }

    /// Of a cluster whose services are kube-proxy's.
    pub(crate) fn peer(program: &Path, frontends: &[Frontend], policies: &[Policy]) -> Result<Self> {
        let needs = Needs { users: vec![kube_proxy_user()], ..Needs::default() };
        let cluster = Cluster::lay_out(&Spec { source: Source::Kubernetes(needs), ..Spec::new(3) })?;
        cluster.route_plainly()?;
        let made = PODS.iter().zip(1..).map(|(&(name, node), number)| {
            let node = &cluster.nodes()[node];
            let pod = cluster.plain_pod(node, name, number)?;
            Ok(Server { name, node: node.name().to_owned(), place: pod.place, addresses: pod.addresses })
        });
        let pods = made.collect::<Result<_>>()?;
        let proxies: Result<_> =
            cluster.nodes().iter().map(|node| cluster.kube_proxy(program, node)).collect();
        let mut bed = Self::on(cluster, Mode::KubeProxy, pods, proxies?, frontends, policies)?;
        bed.tell()?;
        let names = bed.service_names();
        bed.cluster.nodes().iter().try_for_each(|node| await_rules(node, &names))?;
        Ok(bed)
    }

    fn on(
        cluster: Cluster,
        mode: Mode,
        pods: Vec<Server>,
        mut processes: Vec<Process>,
        frontends: &[Frontend],
        policies: &[Policy],
    ) -> Result<Self> {
        let host = &cluster.nodes()[0];
        for pod in &pods {
            processes.push(pod.place.serve_raw_sctp(pod.name)?);
        }
        // on all: what nobody translates is somebody's to hear
        for node in cluster.nodes() {
            processes.push(node.place().serve_raw_sctp(node.name())?);
        }
        let mut names: BTreeMap<IpAddr, String> =
            pods.iter().flat_map(|pod| pod.addresses.map(|address| (address, pod.name.to_owned()))).collect();
        for node in cluster.nodes() {
            names.extend(node.addresses().map(|address| (address, node.name().to_owned())));
        }
        let world = world(&cluster, &pods);
        let outside = cluster.outside()?;
        let makers = policies.iter().flat_map(|policy| Backing::ALL.map(|backing| (*policy, backing)));
        let services = makers
            .enumerate()
            .map(|(number, (policy, backing))| {
                Laid::new(number as u16, backing, policy, frontends, &pods, host)
            })
            .collect();
        let bed = Self { _processes: processes, pods, outside, cluster, mode, world, names, services };
        bed.route_addresses(frontends)?;
        bed.cluster.nodes().iter().try_for_each(answer_everybody)?;
        Ok(bed)
    }

    /// Tells of all services.
    fn tell(&mut self) -> Result<()> {
        let objects: Vec<Value> = self
            .services
            .iter()
            .flat_map(|laid| [&laid.service].into_iter().chain(&laid.slices))
            .cloned()
            .collect();
        self.cluster.apply_objects("path-table", &objects)
    }

    fn service_names(&self) -> Vec<String> {
        let name = |laid: &Laid| laid.service["metadata"]["name"].as_str().map(str::to_owned);
        self.services.iter().filter_map(name).collect()
    }

    pub(crate) const fn mode(&self) -> Mode {
        self.mode
    }

    /// Every node that leads to others has done so in its driver, and heard their answers there.
    pub(crate) fn expect_turned_round(&self) -> Result<()> {
        for outcome in ["to_wire", "to_outside"] {
            let counts = self.cluster.nodes().iter().map(|node| node.count("xdp_wire", outcome));
            let turned: u64 = counts.sum::<Result<u64>>()?;
            ensure!(turned > 0, "xdp_wire {outcome}: no packet");
        }
        Ok(())
    }

    /// What of SCTP leads back to the host it came from was dropped by that name, where any of these cells asked for it.
    ///
    /// Where sockets are translated when they connect, it is the only protocol that is.
    pub(crate) fn expect_loops(&self, cells: &[Cell]) -> Result<()> {
        let is_loop = |cell: &Cell| {
            let Cell { asker, backing, protocol, frontend, .. } = *cell;
            (asker, backing, protocol, frontend)
                == (Asker::Host, Backing::Host, Protocol::Sctp, Frontend::ClusterIp)
        };
        if cells.iter().any(is_loop) {
            let dropped = self.cluster.nodes()[0].count("to_wire", "host_loop")?;
            ensure!(dropped > 0, "to_wire host_loop: no packet");
        }
        Ok(())
    }

    /// What the agents know of a failure.
    pub(crate) fn evidence(&self) -> String {
        if self.mode == Mode::KubeProxy { String::new() } else { self.cluster.evidence() }
    }

    pub(crate) fn place(&self, asker: Asker) -> &Place {
        match asker {
            Asker::Pod => &self.pods[0].place,
            Asker::Host => self.cluster.nodes()[0].place(),
            Asker::Outside => &self.outside,
        }
    }

    /// Who listens at an address.
    pub(crate) fn name(&self, address: IpAddr) -> String {
        self.names.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }

    /// Where a cell's question goes.
    pub(crate) fn frontend(&self, cell: Cell) -> SocketAddr {
        let node = self.cluster.nodes()[cell.door.node()].address(cell.family);
        services::frontend(cell, self.number(cell) as u16, node)
    }

    /// What the oracle says of it.
    pub(crate) fn expected(&self, cell: Cell) -> Result<Verdict> {
        let nodes = self.cluster.nodes();
        let client = match cell.asker {
            Asker::Pod => Client {
                location: Location::Pod(nodes[0].name()),
                address: self.pods[0].address(cell.family),
            },
            Asker::Host => {
                Client { location: Location::Host(nodes[0].name()), address: nodes[0].address(cell.family) }
            }
            Asker::Outside => Client {
                location: Location::Outside { via: nodes[cell.door.node()].name() },
                address: outside(cell.family),
            },
        };
        let to = self.frontend(cell);
        let question = Destination { address: to.ip(), port: to.port(), protocol: cell.protocol };
        let rules = self.mode.rules();
        if let Frontend::HostPort(_) | Frontend::HostPortAtLoopback(_) = cell.frontend {
            let ports: Vec<HostPort<'_>> = host_ports::all(&self.pods, nodes);
            return at_host_ports(rules, &self.world, &ports, &client, &question);
        }
        let Laid { service, slices, .. } = &self.services[self.number(cell)];
        oracle::verdict(rules, &self.world, service, slices, &client, &question)
    }

    fn number(&self, cell: Cell) -> usize {
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

/// A node's kernel is sparing with refusals, of all there are together and to each who asks. Here everyone wants his own.
fn answer_everybody(node: &Node) -> Result<()> {
    let namespace = node.place().namespace();
    namespace.sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
    // the machine's before 6.11, and then not shown to a namespace
    let _is_the_machines = namespace
        .sysctls(&[("net/ipv4/icmp_msgs_per_sec", "100000"), ("net/ipv4/icmp_msgs_burst", "100000")]);
    Ok(())
}

/// Nodes and pods, as the oracle wants to know them.
fn world(cluster: &Cluster, pods: &[Server]) -> Topology {
    let node = |node: &Node| oracle::Node {
        name: node.name().to_owned(),
        addresses: node.addresses().to_vec(),
        zone: None,
        pods: pods.iter().filter(|pod| pod.node == node.name()).flat_map(|pod| pod.addresses).collect(),
    };
    Topology { nodes: cluster.nodes().iter().map(node).collect(), localhost_node_ports: false }
}
