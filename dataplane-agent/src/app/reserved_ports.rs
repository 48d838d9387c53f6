//! Ports that the kernel must not assign to local sockets (`ip_local_reserved_ports`).
//!
//! Replies to such a socket would be translated: as requests to the port's service or pod, or as
//! replies to a masqueraded connection.

use std::{collections::BTreeSet, ops::RangeInclusive};

use crate::{
    api::views::{Origin, ProblemView},
    config::Config,
    netlink::{ReservedPorts, ReservedPortsError, SysctlChange, reserved_ports},
    reconcile::HostPorts,
};

/// Reserves the ports of masquerading and of local frontends.
#[derive(Debug)]
pub(super) struct NodeReservedPorts {
    ports: ReservedPorts,
    /// Source ports of translated packets (`masquerade.ports`), used even if masquerading is off.
    source_ports: RangeInclusive<u16>,
    problem: Option<String>,
}

impl NodeReservedPorts {
    pub(super) fn new(config: &Config) -> Self {
        let source_ports = config.masquerade.ports.clone();
        Self { ports: ReservedPorts::open(&config.run_dir), source_ports, problem: None }
    }

    /// Writes the sysctl if it differs.
    pub(super) fn update(&mut self, wanted: &HostPorts) {
        self.problem = match self.write(wanted) {
            Ok(change) => {
                if let Some(change) = change {
                    tracing::info!("set sysctl {} from {} to {}", change.key, change.from, change.to);
                }
                None
            }
            Err(error) => {
                let reason = error.to_string();
                if self.problem.as_ref() != Some(&reason) {
                    tracing::warn!("cannot reserve ports; local sockets may get ports of services: {reason}");
                }
                Some(reason)
            }
        };
    }

    fn write(&mut self, wanted: &HostPorts) -> Result<Option<SysctlChange>, ReservedPortsError> {
        // the kernel assigns ports of this range only
        let local = reserved_ports::local_ports()?;
        let within = |port: &u16| local.as_ref().is_some_and(|local| local.contains(port));
        let frontends = wanted.ports.iter().copied().filter(within);
        let all: BTreeSet<u16> = self.source_ports.clone().chain(frontends).collect();
        if wanted.complete { self.ports.set(&all) } else { self.ports.add(&all) }
    }

    pub(super) fn problem(&self) -> Option<ProblemView> {
        let message = self.problem.clone()?;
        Some(ProblemView { origin: Origin::Datapath, subject: "reserved ports".to_owned(), message })
    }
}
