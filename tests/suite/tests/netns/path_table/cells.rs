//! The dimensions of the table, and all cells. Uses no cluster.

use std::fmt;

use dataplane_oracle::Protocol;
use dataplane_testkit::lab::Family;

/// The kind of client. `Pod` and `Host` are on the first node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientKind {
    Pod,
    /// A process of the host. A pod with `hostNetwork` is the same case: it has the host's network
    /// namespace, and socket programs are attached to the root cgroup, so they run for all pods.
    Host,
    External,
}

/// The backends of a service, or the pod of a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A pod on the first node.
    SameNode,
    /// A pod on the second.
    OtherNode,
    /// The client pod; for that pod itself this is a hairpin.
    Client,
    /// A process of the first node; for the host itself this is a hairpin.
    Host,
    /// Pods on all three nodes.
    Spread,
    /// As [`Self::Spread`], each endpoint with a hint for its own node.
    TopologyHints,
    /// As [`Self::Spread`]; the source ranges of the load balancer allow only the external client.
    SourceRanges,
    /// On the first node one that is terminating and serving, on the second one that is ready.
    Terminating,
    /// One that is not ready.
    NotReady,
}

/// The kind of frontend to which the client connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frontend {
    /// The cluster IP, from pods and hosts.
    ClusterIp,
    /// The cluster IP, from the external client through the first node. Most clusters have no such
    /// route.
    ExternalClusterIp,
    /// A port of the cluster IP that the service does not have.
    UnknownPort,
    NodePort,
    LoadBalancer,
    ExternalIp,
    /// A host port, at an address of the entry node. If the pod is on another node, the port is
    /// unused there.
    HostPort(Mapping),
    /// A host port, at a loopback address. In a pod this is the pod's own loopback.
    HostPortAtLoopback(Mapping),
}

/// The node addresses of a host port: `hostIP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// No `hostIP`: all addresses.
    AllAddresses,
    /// The node's IPv4 address, on the first node; its IPv6 address on the others.
    OneAddress,
    /// 127.0.0.1.
    Loopback,
}

/// The node at which the client's packets arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryNode {
    /// The first node, where the clients `Pod` and `Host` are.
    First,
    Second,
}

/// Internal and external traffic policy of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Cluster,
    Local,
}

/// One combination of all dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) client: ClientKind,
    pub(crate) backing: Backing,
    pub(crate) frontend: Frontend,
    pub(crate) entry_node: EntryNode,
    pub(crate) policy: Policy,
    pub(crate) protocol: Protocol,
    pub(crate) family: Family,
}

impl ClientKind {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Host, Self::External];
}

impl Backing {
    pub(crate) const ALL: [Self; 9] = [
        Self::SameNode,
        Self::OtherNode,
        Self::Client,
        Self::Host,
        Self::Spread,
        Self::TopologyHints,
        Self::SourceRanges,
        Self::Terminating,
        Self::NotReady,
    ];

    /// The backings that a frontend can have.
    const fn of(frontend: Frontend) -> &'static [Self] {
        match frontend {
            Frontend::HostPort(_) => &[Self::SameNode, Self::OtherNode, Self::Client],
            // a loopback address never leads to another node
            Frontend::HostPortAtLoopback(_) => &[Self::SameNode, Self::Client],
            _ => &Self::ALL,
        }
    }
}

impl Mapping {
    pub(crate) const ALL: [Self; 3] = [Self::AllAddresses, Self::OneAddress, Self::Loopback];
}

impl Frontend {
    pub(crate) const ALL: [Self; 12] = [
        Self::ClusterIp,
        Self::ExternalClusterIp,
        Self::UnknownPort,
        Self::NodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
        Self::HostPort(Mapping::AllAddresses),
        Self::HostPort(Mapping::OneAddress),
        Self::HostPort(Mapping::Loopback),
        Self::HostPortAtLoopback(Mapping::AllAddresses),
        Self::HostPortAtLoopback(Mapping::OneAddress),
        Self::HostPortAtLoopback(Mapping::Loopback),
    ];

    /// The frontends of services, which kube-proxy implements, too.
    pub(crate) const SERVICES: [Self; 6] = [
        Self::ClusterIp,
        Self::ExternalClusterIp,
        Self::UnknownPort,
        Self::NodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
    ];

    /// The policies that apply to this frontend: only one for host ports, which have no policy.
    fn policies(self, all: &[Policy]) -> &[Policy] {
        match self {
            Self::HostPort(_) | Self::HostPortAtLoopback(_) => all.get(..1).unwrap_or_default(),
            _ => all,
        }
    }
}

impl Policy {
    pub(crate) const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    /// The value in the spec of a Service.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

impl EntryNode {
    pub(crate) const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// The index of the node.
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }

    /// The entry nodes that are possible for this client and frontend.
    const fn of(client: ClientKind, frontend: Frontend) -> &'static [Self] {
        match (client, frontend) {
            (_, Frontend::NodePort | Frontend::HostPort(_))
            | (ClientKind::External, Frontend::LoadBalancer | Frontend::ExternalIp) => {
                &[Self::First, Self::Second]
            }
            (
                ClientKind::External,
                Frontend::ClusterIp | Frontend::UnknownPort | Frontend::HostPortAtLoopback(_),
            )
            | (ClientKind::Pod | ClientKind::Host, Frontend::ExternalClusterIp) => &[],
            _ => &[Self::First],
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, backing, frontend, entry_node, policy, protocol, family } = self;
        let protocol = protocol.name();
        write!(
            f,
            "{client:?} → {frontend:?} at {entry_node:?}, {policy:?}, backed by {backing:?}, {protocol}, {family}"
        )
    }
}

/// All cells of these frontends, policies and protocols.
pub(crate) fn all(frontends: &[Frontend], policies: &[Policy], protocols: &[Protocol]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (client, frontend) in
        ClientKind::ALL.iter().flat_map(|client| frontends.iter().map(move |frontend| (*client, *frontend)))
    {
        for entry_node in EntryNode::of(client, frontend) {
            let policies = frontend.policies(policies);
            for (backing, policy) in
                Backing::of(frontend).iter().flat_map(|b| policies.iter().map(move |p| (*b, *p)))
            {
                for (protocol, family) in protocols.iter().flat_map(|p| Family::BOTH.map(|f| (*p, f))) {
                    cells.push(Cell {
                        client,
                        backing,
                        frontend,
                        entry_node: *entry_node,
                        policy,
                        protocol,
                        family,
                    });
                }
            }
        }
    }
    cells
}

/// A sample of `count` cells, the same every time. Each frontend and protocol has the same share,
/// give or take one.
pub(crate) fn sample(mut cells: Vec<Cell>, count: usize) -> Vec<Cell> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..cells.len()).rev() {
        // xorshift is good enough for a shuffle
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        cells.swap(last, (state % (last as u64 + 1)) as usize);
    }
    let mut group_sizes: Vec<((Frontend, Protocol), usize)> = Vec::new();
    let mut rounds = Vec::new();
    for cell in cells {
        let group = (cell.frontend, cell.protocol);
        let index = group_sizes.iter().position(|(of, _)| *of == group).unwrap_or_else(|| {
            group_sizes.push((group, 0));
            group_sizes.len() - 1
        });
        rounds.push((group_sizes[index].1, cell));
        group_sizes[index].1 += 1;
    }
    rounds.sort_by_key(|(round, _)| *round);
    rounds.into_iter().map(|(_, cell)| cell).take(count).collect()
}
