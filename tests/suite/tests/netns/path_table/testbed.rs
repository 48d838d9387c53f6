//! The testbed of the path table: a cluster, its pods and servers, a service for each policy and
//! backing, and the same topology for the oracle.

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
    cells::{Backing, Cell, ClientKind, EntryNode, Frontend, Policy},
    host_ports,
    known_failures::Mode,
    services::{self, TableService},
};

/// A running cluster with all pods, servers and services of the path table.
pub(crate) struct Testbed {
    // dropped before the namespaces in which they run
    _processes: Vec<Process>,
    pods: Vec<Server>,
    external: Place,
    cluster: Cluster,
    mode: Mode,
    topology: Topology,
    /// The name of the server at each address.
    names: BTreeMap<IpAddr, String>,
    services: Vec<TableService>,
}

/// A pod with a server: connected by the CNI plugin or, for kube-proxy, by plain Linux routes.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) node: String,
    place: Place,
    addresses: [IpAddr; 2],
}

/// The client, then a server on each node.
const PODS: [(&str, usize); 4] = [("client", 0), ("near", 0), ("far", 1), ("third", 2)];

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

impl Testbed {
    /// Creates a cluster whose services are translated by the dataplane.
    pub(crate) fn dataplane(
        (routing, connect_time, xdp): (Routing, bool, bool),
        frontends: &[Frontend],
        policies: &[Policy],
    ) -> Result<Self> {
        let mode = Mode::Dataplane { routing, connect_time, xdp };
        let spec =
            Spec { routing, connect_tcp: connect_time, connect_udp: connect_time, xdp, ..Spec::new(3) };
        let cluster = Cluster::create(&spec)?;
        let made = PODS.iter().enumerate().map(|(index, &(name, node))| {
            let ports = host_ports::requested(index, &cluster.nodes()[node]);
            let pod = cluster.pod_with(node, name, ports)?;
            let (node, addresses) = (pod.node().to_owned(), pod.addresses());
            Ok(Server { name, node, place: pod.place().clone(), addresses })
        });
        let pods = cluster.explain(made.collect())?;
        let mut testbed = Self::assemble(cluster, mode, pods, Vec::new(), frontends, policies)?;
        testbed.apply_services()?;
        let names = testbed.service_names();
        for node in testbed.cluster.nodes_mut() {
            let name = node.name().to_owned();
            node.await_names(&names).with_context(|| format!("on {name}"))?;
        }
        Ok(testbed)
    }

    /// Creates a cluster whose services are translated by kube-proxy.
    pub(crate) fn kube_proxy(program: &Path, frontends: &[Frontend], policies: &[Policy]) -> Result<Self> {
        let needs = Needs { users: vec![kube_proxy_user()], ..Needs::default() };
        let cluster = Cluster::create_stopped(&Spec { source: Source::Kubernetes(needs), ..Spec::new(3) })?;
        cluster.add_static_routes()?;
        let made = PODS.iter().zip(1..).map(|(&(name, node), number)| {
            let node = &cluster.nodes()[node];
            let pod = cluster.plain_pod(node, name, number)?;
            Ok(Server { name, node: node.name().to_owned(), place: pod.place, addresses: pod.addresses })
        });
        let pods = made.collect::<Result<_>>()?;
        let proxies: Result<_> =
            cluster.nodes().iter().map(|node| cluster.kube_proxy(program, node)).collect();
        let mut testbed = Self::assemble(cluster, Mode::KubeProxy, pods, proxies?, frontends, policies)?;
        testbed.apply_services()?;
        let names = testbed.service_names();
        testbed.cluster.nodes().iter().try_for_each(|node| await_rules(node, &names))?;
        Ok(testbed)
    }

    fn assemble(
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
        // on every node: packets that are not translated must reach a server, too
        for node in cluster.nodes() {
            processes.push(node.place().serve_raw_sctp(node.name())?);
        }
        let mut names: BTreeMap<IpAddr, String> =
            pods.iter().flat_map(|pod| pod.addresses.map(|address| (address, pod.name.to_owned()))).collect();
        for node in cluster.nodes() {
            names.extend(node.addresses().map(|address| (address, node.name().to_owned())));
        }
        let topology = topology(&cluster, &pods);
        let external = cluster.outside()?;
        let kinds = policies.iter().flat_map(|policy| Backing::ALL.map(|backing| (*policy, backing)));
        let services = kinds
            .enumerate()
            .map(|(number, (policy, backing))| {
                TableService::new(number as u16, backing, policy, frontends, &pods, host)
            })
            .collect();
        let testbed =
            Self { _processes: processes, pods, external, cluster, mode, topology, names, services };
        testbed.route_addresses(frontends)?;
        testbed.cluster.nodes().iter().try_for_each(disable_icmp_rate_limits)?;
        Ok(testbed)
    }

    /// Applies all services and their slices.
    fn apply_services(&mut self) -> Result<()> {
        let objects: Vec<Value> = self
            .services
            .iter()
            .flat_map(|entry| [&entry.service].into_iter().chain(&entry.slices))
            .cloned()
            .collect();
        self.cluster.apply_objects("path-table", &objects)
    }

    fn service_names(&self) -> Vec<String> {
        let name = |entry: &TableService| entry.service["metadata"]["name"].as_str().map(str::to_owned);
        self.services.iter().filter_map(name).collect()
    }

    pub(crate) const fn mode(&self) -> Mode {
        self.mode
    }

    /// Checks that the XDP program has forwarded requests to other nodes and replies to clients.
    pub(crate) fn expect_forwarded_by_xdp(&self) -> Result<()> {
        for outcome in ["to_wire", "to_outside"] {
            let counts = self.cluster.nodes().iter().map(|node| node.count("xdp_wire", outcome));
            let forwarded: u64 = counts.sum::<Result<u64>>()?;
            ensure!(forwarded > 0, "xdp_wire {outcome}: no packet");
        }
        Ok(())
    }

    /// Checks that the host's SCTP packets to a backend on the same host were dropped as
    /// `host_loop`, if any of these cells sends such packets.
    ///
    /// With connect-time translation this drop happens for no other protocol.
    pub(crate) fn expect_loop_drops(&self, cells: &[Cell]) -> Result<()> {
        let is_loop = |cell: &Cell| {
            let Cell { client, backing, protocol, frontend, .. } = *cell;
            (client, backing, protocol, frontend)
                == (ClientKind::Host, Backing::Host, Protocol::Sctp, Frontend::ClusterIp)
        };
        if cells.iter().any(is_loop) {
            let dropped = self.cluster.nodes()[0].count("to_wire", "host_loop")?;
            ensure!(dropped > 0, "to_wire host_loop: no packet");
        }
        Ok(())
    }

    /// The agents' state and logs, for the message of a failure.
    pub(crate) fn evidence(&self) -> String {
        if self.mode == Mode::KubeProxy { String::new() } else { self.cluster.diagnostics() }
    }

    pub(crate) fn place(&self, client: ClientKind) -> &Place {
        match client {
            ClientKind::Pod => &self.pods[0].place,
            ClientKind::Host => self.cluster.nodes()[0].place(),
            ClientKind::External => &self.external,
        }
    }

    /// The name of the server at an address.
    pub(crate) fn name(&self, address: IpAddr) -> String {
        self.names.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }

    /// The address and port to which a cell's client connects.
    pub(crate) fn frontend(&self, cell: Cell) -> SocketAddr {
        let node = self.cluster.nodes()[cell.entry_node.index()].address(cell.family);
        services::frontend(cell, self.number(cell) as u16, node)
    }

    /// The verdict of the oracle.
    pub(crate) fn expected(&self, cell: Cell) -> Result<Verdict> {
        let nodes = self.cluster.nodes();
        let client = match cell.client {
            ClientKind::Pod => Client {
                location: Location::Pod(nodes[0].name()),
                address: self.pods[0].address(cell.family),
            },
            ClientKind::Host => {
                Client { location: Location::Host(nodes[0].name()), address: nodes[0].address(cell.family) }
            }
            ClientKind::External => Client {
                location: Location::Outside { via: nodes[cell.entry_node.index()].name() },
                address: outside(cell.family),
            },
        };
        let to = self.frontend(cell);
        let query = Destination { address: to.ip(), port: to.port(), protocol: cell.protocol };
        let rules = self.mode.rules();
        if let Frontend::HostPort(_) | Frontend::HostPortAtLoopback(_) = cell.frontend {
            let ports: Vec<HostPort<'_>> = host_ports::all(&self.pods, nodes);
            return at_host_ports(rules, &self.topology, &ports, &client, &query);
        }
        let TableService { service, slices, .. } = &self.services[self.number(cell)];
        oracle::verdict(rules, &self.topology, service, slices, &client, &query)
    }

    fn number(&self, cell: Cell) -> usize {
        let is_it = |entry: &TableService| entry.backing == cell.backing && entry.policy == cell.policy;
        self.services.iter().position(is_it).expect("a service for every policy and backing")
    }

    /// Adds routes to the gateway, for each frontend through its entry node.
    fn route_addresses(&self, frontends: &[Frontend]) -> Result<()> {
        let gateway = self.cluster.fabric().gateway();
        for entry_node in EntryNode::BOTH {
            let node = &self.cluster.nodes()[entry_node.index()];
            let via = |prefix: &IpNet| {
                if prefix.addr().is_ipv4() { IpAddr::V4(node.v4()) } else { node.v6().into() }
            };
            for prefix in services::prefixes(entry_node, frontends) {
                gateway.ip(&format!("route add {prefix} via {}", via(&prefix)))?;
            }
        }
        Ok(())
    }
}

/// Turns off the kernel's rate limits of ICMP errors: every client needs its own error.
fn disable_icmp_rate_limits(node: &Node) -> Result<()> {
    let namespace = node.place().namespace();
    namespace.sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
    // before Linux 6.11 these are global, and absent in a network namespace
    let _absent = namespace
        .sysctls(&[("net/ipv4/icmp_msgs_per_sec", "100000"), ("net/ipv4/icmp_msgs_burst", "100000")]);
    Ok(())
}

/// Nodes and pods, in the form of the oracle.
fn topology(cluster: &Cluster, pods: &[Server]) -> Topology {
    let node = |node: &Node| oracle::Node {
        name: node.name().to_owned(),
        addresses: node.addresses().to_vec(),
        zone: None,
        pods: pods.iter().filter(|pod| pod.node == node.name()).flat_map(|pod| pod.addresses).collect(),
    };
    Topology { nodes: cluster.nodes().iter().map(node).collect(), localhost_node_ports: false }
}
