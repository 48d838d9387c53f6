//! The nodes that are compared: ours, Linux with kube-proxy's rules, Linux alone, and a program that does next to nothing.

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
    kernel::{Link, Program},
    programs::{self, Expected, Mac},
    wire::{Aim, Wire, parse_mac},
};
use crate::{
    network::{Owned, forward, mac_of},
    plan::{Variant, Wanted},
    rules::{iptables, nftables},
    services::{NODE_PORT, PORT_NAME, SERVICE_PORT, ServiceSet},
    site::PORT,
};

/// Who asks.
const CLIENT: Ipv4Addr = OUTSIDE_V4;
/// The node, the other node, and the router, of Linux alone.
const NODE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 254);
/// The pod that answers, on the other node; nothing ever gets there.
const POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 11), PORT);
/// Of pods of the other node.
const POD_RANGE: &str = "10.244.2.0/24";
/// The same in a cluster of ours.
const OUR_POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, 11), PORT);
/// Link address of the other node, where there is none.
const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 2];
const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 0xfe];
/// The uplink, everywhere.
const UPLINK: &str = "eth0";

/// Services besides the one that is asked, and it.
const SERVICES: u16 = 10;

/// A node and its network.
pub(super) struct Node {
    pub(super) wire: Wire,
    kind: Kind,
}

enum Kind {
    /// The hook that is to do it.
    Ours { cluster: Box<lab::Cluster>, hook: &'static str },
    /// Whether connections are tracked.
    Linux { node: Owned, _cable: Owned, tracks: bool },
    /// A program alone.
    Bare { _node: Owned, _cable: Owned, _program: Link },
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.way())
    }
}

impl Node {
    /// What is to send packets round here.
    pub(super) const fn way(&self) -> &'static str {
        match &self.kind {
            Kind::Ours { hook, .. } => hook,
            Kind::Linux { .. } => "the stack",
            Kind::Bare { .. } => "a program",
        }
    }

    /// Packets our datapath says it has sent to the other node where it is to.
    pub(super) fn sent_round(&self) -> Result<Option<u64>> {
        match &self.kind {
            Kind::Ours { cluster, hook } => cluster.nodes()[0].count(hook, "to_wire").map(Some),
            Kind::Linux { .. } | Kind::Bare { .. } => Ok(None),
        }
    }

    /// What must be true after traffic, or something else was compared.
    pub(super) fn check(&self) -> Result<()> {
        let Kind::Linux { node, tracks, .. } = &self.kind else { return Ok(()) };
        let count: u64 = node.read_proc("/proc/sys/net/netfilter/nf_conntrack_count")?.trim().parse()?;
        let most: u64 = node.read_proc("/proc/sys/net/netfilter/nf_conntrack_max")?.trim().parse()?;
        let flows = u64::from(FLOWS);
        let right = if *tracks { count >= flows / 2 && count < most } else { count == 0 };
        ensure!(right, "{} tracks {count} connections (at most {most}) of {flows}", node.name());
        Ok(())
    }
}

/// All nodes that are wanted, each asked in its ways.
#[derive(Debug)]
pub struct Nodes {
    forwarders: Vec<(Variant, Forwarder)>,
}

impl Nodes {
    pub fn create(wanted: &Wanted) -> Result<Self> {
        let mut forwarders = Vec::new();
        for variant in [Variant::Raw, Variant::Plain, Variant::Nftables, Variant::Iptables] {
            if wanted.has(variant) {
                let forwarder = peer(variant).with_context(|| format!("the node of {variant}"))?;
                forwarders.push((variant, forwarder));
            }
        }
        if wanted.has(Variant::Xdp) || wanted.has(Variant::XdpDsr) {
            let node = Rc::new(ours(true).context("our node with XDP")?);
            forwarders.push((Variant::Xdp, ask_ours(&node, Answer::Back)?));
            forwarders.push((Variant::XdpDsr, ask_ours(&node, Answer::Direct)?));
        }
        if wanted.has(Variant::Tc) {
            let node = Rc::new(ours(false).context("our node without XDP")?);
            forwarders.push((Variant::Tc, ask_ours(&node, Answer::Back)?));
        }
        Ok(Self { forwarders })
    }

    pub fn iter(&self) -> impl Iterator<Item = (Variant, Forwarder)> {
        self.forwarders.iter().cloned()
    }
}

/// What ours is compared with.
fn peer(variant: Variant) -> Result<Forwarder> {
    let node = Owned::create(&format!("forward-{variant}"))?;
    let cable = Owned::create(&format!("forward-{variant}-cable"))?;
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
    forward(&node)?;
    hear_frames(&node)?;
    let wire = Wire::lay(&cable, "port")?;
    let mac = parse_mac(&mac_of(&node, UPLINK)?)?;
    let asked = SocketAddrV4::new(NODE, NODE_PORT);
    let services = ServiceSet::asked_from_outside(SERVICES, POD);
    match variant {
        Variant::Nftables => nftables::apply(&node, &services, NODE)?,
        Variant::Iptables => iptables::apply(&node, &services, iptables::Backend::best())?,
        _ => {}
    }
    let (to, src, dst) = match variant {
        Variant::Raw => (asked, CLIENT, asked),
        // knows no services: is asked for the pod itself
        Variant::Plain => (POD, CLIENT, POD),
        _ => (asked, NODE, POD),
    };
    let kind = if variant == Variant::Raw {
        let program = Program::load("bounce", &programs::bounce(NODE_PORT, OTHER_MAC, mac))?;
        let link = node.enter(|| program.attach(if_nametoindex(UPLINK)?))??;
        Kind::Bare { _program: link, _node: node, _cable: cable }
    } else {
        let tracks = matches!(variant, Variant::Nftables | Variant::Iptables);
        Kind::Linux { node, _cable: cable, tracks }
    };
    let aim = Aim { sent: programs::frame(mac, CLIENT, to), expected: Expected { mac: OTHER_MAC, src, dst } };
    Ok(Forwarder { node: Rc::new(Node { wire, kind }), aim })
}

/// Lets a device hear what another driver sends, though no program is there: as a card's driver, it then makes a packet of
/// the kernel's of each frame, without a copy.
fn hear_frames(node: &Namespace) -> Result<()> {
    node.offload(UPLINK, "gro", "on")
}

/// A node of ours, with another one beside it.
fn ours(xdp: bool) -> Result<Node> {
    let spec = Spec { routing: Routing::Native, xdp, ..Spec::new(2) };
    let mut cluster = lab::Cluster::create(&spec)?;
    let names = [Answer::Back, Answer::Direct].map(|answer| {
        let (name, objects) = answer.service();
        (name.to_owned(), objects)
    });
    for (name, objects) in &names {
        cluster.apply_objects(name, objects)?;
    }
    let names = names.map(|(name, _)| name);
    let [node, other] = cluster.nodes_mut() else { bail!("there are not two nodes") };
    node.await_names(&names)?;
    let (namespace, others) = (node.place().namespace(), other.place().namespace());
    namespace.ip(&format!(
        "neigh replace {} lladdr {} dev {UPLINK} nud permanent",
        other.v4(),
        mac_of(others, UPLINK)?
    ))?;
    let devices = namespace.ip(&format!("link show dev {UPLINK}"))?;
    // "xdpgeneric" would be a program behind the driver
    ensure!(
        devices.split_whitespace().any(|word| word == "xdp") == xdp,
        "the uplink of {} is: {devices}",
        node.name()
    );
    if !xdp {
        hear_frames(namespace)?;
    }
    let port = node.name().to_owned();
    let wire = Wire::lay(cluster.fabric().take_port(&port)?, &port)?;
    let hook = if xdp { "xdp_wire" } else { "from_wire" };
    Ok(Node { wire, kind: Kind::Ours { cluster: Box::new(cluster), hook } })
}

/// Which way answers of ours take.
#[derive(Clone, Copy)]
enum Answer {
    /// By the node that was asked, which is why that is who the pod sees.
    Back,
    /// From the pod's node.
    Direct,
}

impl Answer {
    const fn node_port(self) -> u16 {
        match self {
            Self::Back => NODE_PORT,
            Self::Direct => NODE_PORT + 1,
        }
    }

    /// Its name and objects.
    fn service(self) -> (&'static str, Vec<Value>) {
        let (name, mode, address) = match self {
            Self::Back => ("back", "snat", Ipv4Addr::new(10, 96, 1, 1)),
            Self::Direct => ("direct", "dsr", Ipv4Addr::new(10, 96, 1, 2)),
        };
        let service = Service {
            name: name.to_owned(),
            addresses: vec![address.into()],
            ports: vec![ServicePort {
                name: PORT_NAME,
                port: SERVICE_PORT,
                protocol: Protocol::Udp,
                target: OUR_POD.port(),
            }],
            backends: vec![Backend {
                pod: format!("{name}-pod"),
                node: "node2".to_owned(),
                addresses: vec![IpAddr::V4(*OUR_POD.ip())],
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

/// Asks a node of ours for the service that is answered so.
fn ask_ours(node: &Rc<Node>, answer: Answer) -> Result<Forwarder> {
    let Kind::Ours { cluster, .. } = &node.kind else { bail!("this node is none of ours") };
    let [asked, other] = cluster.nodes() else { bail!("there are not two nodes") };
    let [mac, other_mac] = [asked, other].map(|node| parse_mac(&mac_of(node.place().namespace(), UPLINK)?));
    let to = SocketAddrV4::new(asked.v4(), answer.node_port());
    let (src, dst) = match answer {
        Answer::Back => (asked.v4(), OUR_POD),
        Answer::Direct => (CLIENT, to),
    };
    let aim =
        Aim { sent: programs::frame(mac?, CLIENT, to), expected: Expected { mac: other_mac?, src, dst } };
    Ok(Forwarder { node: Rc::clone(node), aim })
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
