//! The compared nodes: the datapath, Linux with kube-proxy's rules, plain Linux, and a minimal XDP
//! program.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
    rc::Rc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

use dataplane_testkit::lab::{
    self, Backend, Namespace, OUTSIDE_V4, Protocol, Routing, Service, ServicePort, Spec,
};

use super::{
    FLOWS, Forwarder,
    programs::{self, Expected, Mac},
    wire::{TestPacket, Wire, parse_mac},
};
use crate::{
    bpf::kernel::{Kind as ProgramKind, Link, Program},
    network::{OwnedNamespace, enable_forwarding, mac_of},
    path::PORT,
    plan::{Selection, Variant},
    rules::{iptables, nftables},
    services::{NODE_PORT, PORT_NAME, SERVICE_PORT, ServiceSet},
};

/// The client outside.
const CLIENT: Ipv4Addr = OUTSIDE_V4;
/// The node, the other node, and the router, except in the datapath's cluster.
const NODE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 254);
/// The backend pod on the other node; no packet reaches it.
const POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 11), PORT);
/// The pod CIDR of the other node.
const POD_RANGE: &str = "10.244.2.0/24";
/// The backend pod in the datapath's cluster.
const DATAPLANE_POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, 11), PORT);
/// MAC address of the other node, which does not exist in the baselines.
const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 2];
const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 0xfe];
/// The uplink of all nodes.
const UPLINK: &str = "eth0";

/// Number of Services, the measured one included.
const SERVICES: u16 = 10;

/// A node and its network.
pub(super) struct Node {
    pub(super) wire: Wire,
    kind: Kind,
}

enum Kind {
    /// A node of the datapath, and the hook that must forward.
    Dataplane { cluster: Box<lab::Cluster>, hook: &'static str },
    /// `tracks`: connections are tracked.
    Linux { node: OwnedNamespace, _cable: OwnedNamespace, tracks: bool },
    /// An XDP program without a stack.
    Bare { _node: OwnedNamespace, _cable: OwnedNamespace, _program: Link },
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.forwarded_by())
    }
}

impl Node {
    /// Returns what must forward the packets on this node.
    pub(super) const fn forwarded_by(&self) -> &'static str {
        match &self.kind {
            Kind::Dataplane { hook, .. } => hook,
            Kind::Linux { .. } => "the stack",
            Kind::Bare { .. } => "a program",
        }
    }

    /// Returns the datapath's counter of packets that its hook has forwarded to the other node.
    pub(super) fn forwarded_packets(&self) -> Result<Option<u64>> {
        match &self.kind {
            Kind::Dataplane { cluster, hook } => cluster.nodes()[0].count(hook, "to_wire").map(Some),
            Kind::Linux { .. } | Kind::Bare { .. } => Ok(None),
        }
    }

    /// Checks after traffic that connection tracking was used as intended.
    pub(super) fn check(&self) -> Result<()> {
        let Kind::Linux { node, tracks, .. } = &self.kind else { return Ok(()) };
        let count: u64 = node.read_proc("/proc/sys/net/netfilter/nf_conntrack_count")?.trim().parse()?;
        let most: u64 = node.read_proc("/proc/sys/net/netfilter/nf_conntrack_max")?.trim().parse()?;
        let flows = u64::from(FLOWS);
        let is_expected = if *tracks { count >= flows / 2 && count < most } else { count == 0 };
        ensure!(is_expected, "{} tracks {count} connections (at most {most}) of {flows}", node.name());
        Ok(())
    }
}

/// The forwarders of all selected variants.
#[derive(Debug)]
pub struct Nodes {
    forwarders: Vec<(Variant, Forwarder)>,
}

impl Nodes {
    pub fn create(selection: &Selection) -> Result<Self> {
        let mut forwarders = Vec::new();
        for variant in [Variant::Raw, Variant::Plain, Variant::Nftables, Variant::Iptables] {
            if selection.has(variant) {
                let forwarder = baseline(variant)
                    .with_context(|| format!("cannot create the node of variant {variant}"))?;
                forwarders.push((variant, forwarder));
            }
        }
        if selection.has(Variant::Xdp) || selection.has(Variant::XdpDsr) {
            let node = Rc::new(dataplane_node(true).context("cannot create the datapath's node with XDP")?);
            forwarders.push((Variant::Xdp, dataplane_forwarder(&node, ReplyPath::Snat)?));
            forwarders.push((Variant::XdpDsr, dataplane_forwarder(&node, ReplyPath::Dsr)?));
        }
        if selection.has(Variant::Tc) {
            let node =
                Rc::new(dataplane_node(false).context("cannot create the datapath's node without XDP")?);
            forwarders.push((Variant::Tc, dataplane_forwarder(&node, ReplyPath::Snat)?));
        }
        Ok(Self { forwarders })
    }

    pub fn iter(&self) -> impl Iterator<Item = (Variant, Forwarder)> {
        self.forwarders.iter().cloned()
    }
}

/// Creates the forwarder of a baseline.
fn baseline(variant: Variant) -> Result<Forwarder> {
    let node = OwnedNamespace::create(&format!("forward-{variant}"))?;
    let cable = OwnedNamespace::create(&format!("forward-{variant}-cable"))?;
    node.ip(&format!(
        "link add {UPLINK} type veth peer name port netns {}\n\
         link set {UPLINK} up\n\
         addr add {NODE}/24 dev {UPLINK}\n\
         neigh add {OTHER} lladdr {} dev {UPLINK} nud permanent\n\
         neigh add {ROUTER} lladdr {} dev {UPLINK} nud permanent\n\
         route add default via {ROUTER}\n\
         route add {POD_RANGE} via {OTHER}",
        cable.name(),
        text(OTHER_MAC),
        text(ROUTER_MAC),
    ))?;
    cable.ip("link set port up")?;
    enable_forwarding(&node)?;
    enable_native_receive(&node)?;
    let wire = Wire::attach(&cable, "port")?;
    let mac = parse_mac(&mac_of(&node, UPLINK)?)?;
    let node_address = SocketAddrV4::new(NODE, NODE_PORT);
    let services = ServiceSet::with_node_port(SERVICES, POD);
    match variant {
        Variant::Nftables => nftables::apply(&node, &services, NODE)?,
        Variant::Iptables => iptables::apply(&node, &services, iptables::Backend::best())?,
        _ => {}
    }
    let (to, src, dst) = match variant {
        Variant::Raw => (node_address, CLIENT, node_address),
        // without Services: the client sends to the pod
        Variant::Plain => (POD, CLIENT, POD),
        _ => (node_address, NODE, POD),
    };
    let kind = if variant == Variant::Raw {
        let program =
            Program::load("bounce", ProgramKind::Xdp, &programs::bounce(NODE_PORT, OTHER_MAC, mac))?;
        let link = node.enter(|| program.attach(if_nametoindex(UPLINK)?))??;
        Kind::Bare { _program: link, _node: node, _cable: cable }
    } else {
        let tracks = matches!(variant, Variant::Nftables | Variant::Iptables);
        Kind::Linux { node, _cable: cable, tracks }
    };
    let packet = TestPacket {
        sent: programs::frame(mac, CLIENT, to),
        expected: Expected { mac: OTHER_MAC, src, dst },
    };
    Ok(Forwarder { node: Rc::new(Node { wire, kind }), packet })
}

/// Lets a veth receive XDP frames without a program: with GRO its driver builds an skb of each
/// frame without a copy, as a network card's driver does.
fn enable_native_receive(node: &Namespace) -> Result<()> {
    node.offload(UPLINK, "gro", "on")
}

/// Creates the datapath's cluster of two nodes.
fn dataplane_node(xdp: bool) -> Result<Node> {
    let spec = Spec { routing: Routing::Native, xdp, ..Spec::new(2) };
    let mut cluster = lab::Cluster::create(&spec)?;
    let names = [ReplyPath::Snat, ReplyPath::Dsr].map(|reply_path| {
        let (name, objects) = reply_path.service();
        (name.to_owned(), objects)
    });
    for (name, objects) in &names {
        cluster.apply_objects(name, objects)?;
    }
    let names = names.map(|(name, _)| name);
    let [node, other] = cluster.nodes_mut() else { bail!("the cluster does not have two nodes") };
    node.await_names(&names)?;
    let (namespace, others) = (node.place().namespace(), other.place().namespace());
    namespace.ip(&format!(
        "neigh replace {} lladdr {} dev {UPLINK} nud permanent",
        other.v4(),
        mac_of(others, UPLINK)?
    ))?;
    let devices = namespace.ip(&format!("link show dev {UPLINK}"))?;
    // "xdpgeneric" is not in the driver
    ensure!(
        devices.split_whitespace().any(|word| word == "xdp") == xdp,
        "unexpected XDP state of the uplink of {}: {devices}",
        node.name()
    );
    if !xdp {
        enable_native_receive(namespace)?;
    }
    let port = node.name().to_owned();
    let wire = Wire::attach(cluster.fabric().release_port(&port)?, &port)?;
    let hook = if xdp { "xdp_wire" } else { "from_wire" };
    Ok(Node { wire, kind: Kind::Dataplane { cluster: Box::new(cluster), hook } })
}

/// How replies return to the client.
#[derive(Clone, Copy)]
enum ReplyPath {
    /// Through the node that received the request; the pod sees that node's address.
    Snat,
    /// Directly from the pod's node.
    Dsr,
}

impl ReplyPath {
    const fn node_port(self) -> u16 {
        match self {
            Self::Snat => NODE_PORT,
            Self::Dsr => NODE_PORT + 1,
        }
    }

    /// Returns the Service's name and objects.
    fn service(self) -> (&'static str, Vec<Value>) {
        let (name, mode, address) = match self {
            Self::Snat => ("back", "snat", Ipv4Addr::new(10, 96, 1, 1)),
            Self::Dsr => ("direct", "dsr", Ipv4Addr::new(10, 96, 1, 2)),
        };
        let service = Service {
            name: name.to_owned(),
            addresses: vec![address.into()],
            ports: vec![ServicePort {
                name: PORT_NAME,
                port: SERVICE_PORT,
                protocol: Protocol::Udp,
                target: DATAPLANE_POD.port(),
            }],
            backends: vec![Backend {
                pod: format!("{name}-pod"),
                node: "node2".to_owned(),
                addresses: vec![IpAddr::V4(*DATAPLANE_POD.ip())],
            }],
        };
        let mut objects = service.objects();
        let object = &mut objects[0];
        object["spec"]["type"] = json!("NodePort");
        object["spec"]["externalTrafficPolicy"] = json!("Cluster");
        object["spec"]["ports"][0]["nodePort"] = json!(self.node_port());
        object["metadata"]["annotations"] = json!({"dataplane.local/forwarding-mode": mode});
        (name, objects)
    }
}

/// Creates the forwarder for the Service with this reply path.
fn dataplane_forwarder(node: &Rc<Node>, reply_path: ReplyPath) -> Result<Forwarder> {
    let Kind::Dataplane { cluster, .. } = &node.kind else { bail!("this node does not run the datapath") };
    let [first, other] = cluster.nodes() else { bail!("the cluster does not have two nodes") };
    let [mac, other_mac] = [first, other].map(|node| parse_mac(&mac_of(node.place().namespace(), UPLINK)?));
    let to = SocketAddrV4::new(first.v4(), reply_path.node_port());
    let (src, dst) = match reply_path {
        ReplyPath::Snat => (first.v4(), DATAPLANE_POD),
        ReplyPath::Dsr => (CLIENT, to),
    };
    let packet = TestPacket {
        sent: programs::frame(mac?, CLIENT, to),
        expected: Expected { mac: other_mac?, src, dst },
    };
    Ok(Forwarder { node: Rc::clone(node), packet })
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
