//! Ports of the node that its own sockets are not to get by chance: answers to such a socket would be taken for requests to
//! what the port leads to, or for answers to somebody else.

use std::{collections::BTreeSet, ops::RangeInclusive};

use crate::{
    api::views::{Origin, ProblemView},
    config::Config,
    netlink::{ReservedPorts, ReservedPortsError, SysctlChange, reserved_ports},
    reconcile::HostPorts,
};

/// What the kernel was told of them.
#[derive(Debug)]
pub(super) struct Reserved {
    ports: ReservedPorts,
    /// What translated packets come from: masqueraded ones, and others whatever is masqueraded.
    sources: RangeInclusive<u16>,
    problem: Option<String>,
}

impl Reserved {
    pub(super) fn new(config: &Config) -> Self {
        let sources = config.masquerade.ports.clone();
        Self { ports: ReservedPorts::open(&config.run_dir), sources, problem: None }
    }

    /// Tells the kernel, if its list says something else.
    pub(super) fn update(&mut self, wanted: &HostPorts) {
        self.problem = match self.tell(wanted) {
            Ok(change) => {
                if let Some(change) = change {
                    tracing::info!(key = change.key, from = change.from, to = change.to, "sysctl");
                }
                None
            }
            Err(error) => {
                let reason = error.to_string();
                if self.problem.as_ref() != Some(&reason) {
                    tracing::warn!(reason, "ports are not reserved as they are to be");
                }
                Some(reason)
            }
        };
    }

    fn tell(&mut self, wanted: &HostPorts) -> Result<Option<SysctlChange>, ReservedPortsError> {
        // no socket gets a port outside of that range by chance
        let local = reserved_ports::local_ports()?;
        let within = |port: &u16| local.as_ref().is_some_and(|local| local.contains(port));
        let frontends = wanted.ports.iter().copied().filter(within);
        let all: BTreeSet<u16> = self.sources.clone().chain(frontends).collect();
        if wanted.complete { self.ports.set(&all) } else { self.ports.add(&all) }
    }

    pub(super) fn problem(&self) -> Option<ProblemView> {
        let message = self.problem.clone()?;
        Some(ProblemView { origin: Origin::Datapath, subject: "reserved ports".to_owned(), message })
    }
}
