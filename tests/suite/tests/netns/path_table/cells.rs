//! The dimensions of the table, and all cells they make. Knows no cluster.

use std::fmt;

use dataplane_oracle::Protocol;
use dataplane_testkit::lab::Family;

/// Who asks. The first two are on the first node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Pod,
    /// A process of the host. It stands for a pod in the host's network as well: a pod's network is known by its namespace,
    /// which such a pod has none of its own of, and programs for sockets hold below the host's cgroup, so in every pod's.
    Host,
    Outside,
}

/// What stands behind a service, or whose a port of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A pod on the first node.
    SameNode,
    /// A pod on the second.
    OtherNode,
    /// The pod that asks: for a pod, itself.
    Asker,
    /// A process of the first node: for the host, itself.
    Host,
    /// Pods on all three nodes.
    Spread,
    /// As [`Self::Spread`], each meant for its own node.
    Hinted,
    /// As [`Self::Spread`]; balancers let nobody but the outside in.
    Guarded,
    /// On the first node one that ends and still serves, on the second one that is ready.
    Leaving,
    /// Nobody who is ready, or ever was.
    Nobody,
}

/// Which of a service's addresses is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frontend {
    /// By whoever is in the cluster.
    ClusterIp,
    /// By the outside, which the gateway leads to the first node: a thing of its own, for most clusters have no such way.
    ClusterIpFromOutside,
    /// The service's own address at a port it does not have.
    UnknownPort,
    NodePort,
    LoadBalancer,
    ExternalIp,
    /// A port of the door's node that leads to a pod, asked at the node's address. If the pod is on another node, that port is
    /// nobody's there.
    HostPort(Mapping),
    /// The same, asked at loopback by who is on the node: a pod's loopback is its own.
    HostPortAtLoopback(Mapping),
}

/// At which addresses of its node a pod has its port: `hostIP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// None given: at all.
    Everywhere,
    /// The node's IPv4 address, on the first node; its IPv6 address on the others.
    OneAddress,
    /// 127.0.0.1.
    Loopback,
}

/// The node through which a frontend is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// The first: where pods and hosts ask.
    First,
    Second,
}

/// Internal and external traffic policy of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Cluster,
    Local,
}

/// One question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) asker: Asker,
    pub(crate) backing: Backing,
    pub(crate) frontend: Frontend,
    pub(crate) door: Door,
    pub(crate) policy: Policy,
    pub(crate) protocol: Protocol,
    pub(crate) family: Family,
}

impl Asker {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Host, Self::Outside];
}

impl Backing {
    pub(crate) const ALL: [Self; 9] = [
        Self::SameNode,
        Self::OtherNode,
        Self::Asker,
        Self::Host,
        Self::Spread,
        Self::Hinted,
        Self::Guarded,
        Self::Leaving,
        Self::Nobody,
    ];

    /// Those there are behind a frontend.
    const fn of(frontend: Frontend) -> &'static [Self] {
        match frontend {
            Frontend::HostPort(_) => &[Self::SameNode, Self::OtherNode, Self::Asker],
            // the second node's loopback is nowhere else
            Frontend::HostPortAtLoopback(_) => &[Self::SameNode, Self::Asker],
            _ => &Self::ALL,
        }
    }
}

impl Mapping {
    pub(crate) const ALL: [Self; 3] = [Self::Everywhere, Self::OneAddress, Self::Loopback];
}

impl Frontend {
    pub(crate) const ALL: [Self; 12] = [
        Self::ClusterIp,
        Self::ClusterIpFromOutside,
        Self::UnknownPort,
        Self::NodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
        Self::HostPort(Mapping::Everywhere),
        Self::HostPort(Mapping::OneAddress),
        Self::HostPort(Mapping::Loopback),
        Self::HostPortAtLoopback(Mapping::Everywhere),
        Self::HostPortAtLoopback(Mapping::OneAddress),
        Self::HostPortAtLoopback(Mapping::Loopback),
    ];

    /// Those of services: all that kube-proxy knows.
    pub(crate) const SERVICES: [Self; 6] = [
        Self::ClusterIp,
        Self::ClusterIpFromOutside,
        Self::UnknownPort,
        Self::NodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
    ];

    /// The policies that make a difference: to ports of pods none does.
    fn policies(self, all: &[Policy]) -> &[Policy] {
        match self {
            Self::HostPort(_) | Self::HostPortAtLoopback(_) => all.get(..1).unwrap_or_default(),
            _ => all,
        }
    }
}

impl Policy {
    pub(crate) const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    /// As objects spell it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

impl Door {
    pub(crate) const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// Index of its node.
    pub(crate) const fn node(self) -> usize {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }

    /// Those at which it makes a difference.
    const fn of(asker: Asker, frontend: Frontend) -> &'static [Self] {
        match (asker, frontend) {
            (_, Frontend::NodePort | Frontend::HostPort(_))
            | (Asker::Outside, Frontend::LoadBalancer | Frontend::ExternalIp) => &[Self::First, Self::Second],
            (
                Asker::Outside,
                Frontend::ClusterIp | Frontend::UnknownPort | Frontend::HostPortAtLoopback(_),
            )
            | (Asker::Pod | Asker::Host, Frontend::ClusterIpFromOutside) => &[],
            _ => &[Self::First],
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asker, backing, frontend, door, policy, protocol, family } = self;
        let protocol = protocol.name();
        write!(
            f,
            "{asker:?} → {frontend:?} at {door:?}, {policy:?}, backed by {backing:?}, {protocol}, {family}"
        )
    }
}

/// Every cell there is with these.
pub(crate) fn all(frontends: &[Frontend], policies: &[Policy], protocols: &[Protocol]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (asker, frontend) in
        Asker::ALL.iter().flat_map(|asker| frontends.iter().map(move |frontend| (*asker, *frontend)))
    {
        for door in Door::of(asker, frontend) {
            let policies = frontend.policies(policies);
            for (backing, policy) in
                Backing::of(frontend).iter().flat_map(|b| policies.iter().map(move |p| (*b, *p)))
            {
                for (protocol, family) in protocols.iter().flat_map(|p| Family::BOTH.map(|f| (*p, f))) {
                    cells.push(Cell { asker, backing, frontend, door: *door, policy, protocol, family });
                }
            }
        }
    }
    cells
}

/// So many of them, the same every time: of each frontend by each protocol as many, give or take one.
pub(crate) fn sample(mut cells: Vec<Cell>, count: usize) -> Vec<Cell> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for place in (1..cells.len()).rev() {
        // xorshift: good enough to shuffle cards
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        cells.swap(place, (state % (place as u64 + 1)) as usize);
    }
    let mut dealt: Vec<((Frontend, Protocol), usize)> = Vec::new();
    let mut rounds = Vec::new();
    for cell in cells {
        let pile = (cell.frontend, cell.protocol);
        let place = dealt.iter().position(|(of, _)| *of == pile).unwrap_or_else(|| {
            dealt.push((pile, 0));
            dealt.len() - 1
        });
        rounds.push((dealt[place].1, cell));
        dealt[place].1 += 1;
    }
    rounds.sort_by_key(|(round, _)| *round);
    rounds.into_iter().map(|(_, cell)| cell).take(count).collect()
}
