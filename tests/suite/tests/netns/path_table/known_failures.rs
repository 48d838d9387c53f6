//! Cells that are known to differ from the oracle, with the reason. Remove an entry when its cells
//! agree: a full run reports it.

use std::fmt;

use dataplane_oracle::Rules;
use dataplane_testkit::lab::Routing;

use super::cells::Cell;

/// The dataplane of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Dataplane {
        routing: Routing,
        connect_time: bool,
        /// Services are translated by the XDP program of the uplink.
        xdp: bool,
    },
    /// Linux routes packets, and kube-proxy translates services.
    KubeProxy,
}

impl Mode {
    /// The oracle's rules for this dataplane.
    pub(crate) const fn rules(self) -> Rules {
        match self {
            Self::Dataplane { connect_time: true, .. } => Rules::DATAPATH_AT_CONNECT,
            Self::Dataplane { connect_time: false, .. } => Rules::DATAPATH,
            Self::KubeProxy => Rules::KUBE_PROXY,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dataplane { routing, connect_time, xdp } => {
                let how = if *connect_time { "with connect-time translation" } else { "per packet" };
                let at = if *xdp { "by XDP" } else { "at tc" };
                write!(f, "routing {}, {how}, {at}", routing.name())
            }
            Self::KubeProxy => f.write_str("kube-proxy"),
        }
    }
}

/// Why a cell differs from the oracle. At present none does.
pub(crate) const fn known_failure(_cell: Cell, _mode: Mode) -> Option<&'static str> {
    None
}
