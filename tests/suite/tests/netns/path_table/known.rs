//! What is known not to be so, and why. An entry goes when its cells come right: a full run says which do.

use std::fmt;

use dataplane_oracle::Rules;
use dataplane_testkit::lab::Routing;

use super::cells::Cell;

/// How a cluster runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Ours {
        routing: Routing,
        connect_time: bool,
        /// In the driver.
        xdp: bool,
    },
    /// Linux routes, and kube-proxy has the services.
    KubeProxy,
}

impl Mode {
    /// What to expect.
    pub(crate) const fn rules(self) -> Rules {
        match self {
            Self::Ours { connect_time: true, .. } => Rules::DATAPATH_AT_CONNECT,
            Self::Ours { connect_time: false, .. } => Rules::DATAPATH,
            Self::KubeProxy => Rules::KUBE_PROXY,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours { routing, connect_time, xdp } => {
                let how = if *connect_time { "with connect-time translation" } else { "by packets alone" };
                let at = if *xdp { "in the driver" } else { "at tc" };
                write!(f, "routing {}, {how}, {at}", routing.name())
            }
            Self::KubeProxy => f.write_str("kube-proxy"),
        }
    }
}

/// Why a cell is not as the oracle has it. At present all are.
pub(crate) const fn known(_cell: Cell, _mode: Mode) -> Option<&'static str> {
    None
}
