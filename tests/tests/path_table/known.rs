//! What is known not to be so, and why. An entry goes when its cells come right: a full run says which do.

use std::fmt;

use dataplane_tests::lab::Routing;

use super::cells::{Asker, Backing, Cell};

/// How a cluster runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) routing: Routing,
    pub(crate) connect_time: bool,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.connect_time { "with connect-time translation" } else { "by packets alone" };
        write!(f, "routing {}, {how}", self.routing.name())
    }
}

/// Why a cell is not as the oracle has it.
pub(crate) fn known(cell: &Cell, mode: Mode) -> Option<&'static str> {
    let Cell { asker, backing, .. } = *cell;
    let is_on_first = matches!(
        backing,
        Backing::SameNode | Backing::Asker | Backing::Host | Backing::Spread | Backing::Hinted
    );
    if backing == Backing::Nobody {
        return Some("a service without endpoints is silent or not permitted, not refused");
    }
    if asker == Asker::Host && !mode.connect_time && is_on_first {
        return Some(
            "a host process whose packets are translated does not reach its own node's backends (host_loop)",
        );
    }
    if backing == Backing::Hinted {
        return Some("hints are not obeyed");
    }
    None
}
