//! The dimensions of the table, and all cells they make. Knows no cluster.

use std::fmt;

use dataplane_tests::lab::Family;

/// Who asks. The first two are on the first node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Pod,
    /// A process of the host, and so a pod in its network.
    Host,
    Outside,
}

/// What stands behind a service.
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
    pub(crate) is_udp: bool,
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
}

impl Frontend {
    pub(crate) const ALL: [Self; 6] = [
        Self::ClusterIp,
        Self::ClusterIpFromOutside,
        Self::UnknownPort,
        Self::NodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
    ];
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
            (_, Frontend::NodePort) | (Asker::Outside, Frontend::LoadBalancer | Frontend::ExternalIp) => {
                &[Self::First, Self::Second]
            }
            (Asker::Outside, Frontend::ClusterIp | Frontend::UnknownPort)
            | (Asker::Pod | Asker::Host, Frontend::ClusterIpFromOutside) => &[],
            _ => &[Self::First],
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asker, backing, frontend, door, policy, is_udp, family } = self;
        let protocol = if *is_udp { "UDP" } else { "TCP" };
        write!(
            f,
            "{asker:?} → {frontend:?} at {door:?}, {policy:?}, backed by {backing:?}, {protocol}, {family}"
        )
    }
}

/// Every cell there is with these.
pub(crate) fn all(frontends: &[Frontend], policies: &[Policy]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (asker, frontend) in
        Asker::ALL.iter().flat_map(|asker| frontends.iter().map(move |frontend| (*asker, *frontend)))
    {
        for door in Door::of(asker, frontend) {
            for (backing, policy) in Backing::ALL.iter().flat_map(|b| policies.iter().map(move |p| (*b, *p)))
            {
                for (is_udp, family) in
                    [false, true].into_iter().flat_map(|udp| Family::BOTH.map(|f| (udp, f)))
                {
                    cells.push(Cell { asker, backing, frontend, door: *door, policy, is_udp, family });
                }
            }
        }
    }
    cells
}

/// So many of them, spread over all, the same every time.
pub(crate) fn sample(mut cells: Vec<Cell>, count: usize) -> Vec<Cell> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for place in (1..cells.len()).rev() {
        // xorshift: good enough to shuffle cards
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        cells.swap(place, (state % (place as u64 + 1)) as usize);
    }
    cells.truncate(count);
    cells
}
