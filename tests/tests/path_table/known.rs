//! What is known not to be so, and why. An entry goes when its cells come right: a full run says which do.

use std::fmt;

use dataplane_tests::{lab::Routing, oracle::Rules};

use super::cells::{Asker, Backing, Cell};

/// How a cluster runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Ours {
        routing: Routing,
        connect_time: bool,
    },
    /// Linux routes, and kube-proxy has the services.
    KubeProxy,
}

impl Mode {
    /// What to expect.
    pub(crate) const fn rules(self) -> Rules {
        match self {
            Self::Ours { connect_time: true, .. } => Rules::OURS_AT_CONNECT,
            Self::Ours { connect_time: false, .. } => Rules::OURS,
            Self::KubeProxy => Rules::KUBE_PROXY,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours { routing, connect_time } => {
                let how = if *connect_time { "with connect-time translation" } else { "by packets alone" };
                write!(f, "routing {}, {how}", routing.name())
            }
            Self::KubeProxy => f.write_str("kube-proxy"),
        }
    }
}

/// Why a cell is not as the oracle has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    Always(&'static str),
    /// A matter of chance: that all its cells came right once proves nothing.
    Sometimes(&'static str),
}

impl Known {
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Always(reason) | Self::Sometimes(reason) => reason,
        }
    }
}

pub(crate) fn known(cell: Cell, mode: Mode) -> Option<Known> {
    let Cell { asker, backing, .. } = cell;
    let Mode::Ours { connect_time, routing } = mode else { return None };
    let is_host_by_packets = asker == Asker::Host && !connect_time;
    if is_host_by_packets && backing == Backing::Host {
        let reason =
            "a host process whose packets are translated does not reach another of its node (host_loop)";
        return Some(Known::Always(reason));
    }
    // redirect_neigh with a next hop leaves the packet its route, which is the one to the service; a packet that waits
    // for the neighbour's link address is sent by that route when it is known
    if is_host_by_packets
        && routing == Routing::Native
        && !matches!(backing, Backing::SameNode | Backing::Asker)
    {
        return Some(Known::Sometimes(
            "a host's first translated packet to a node not yet resolved goes to its gateway",
        ));
    }
    None
}
