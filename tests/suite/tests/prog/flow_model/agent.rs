//! Writes services as the agent does.

use anyhow::Result;
use dataplane_common::abi::ServiceFlags;
use proptest::sample::Index;

use super::{connection::Tuple, drive::Sequence};

/// First row of `BACKENDS` for the model's services; those before are of `World`.
pub(crate) const FIRST_BACKEND: u32 = 110;
const LAST_BACKEND: u32 = 500;

impl Sequence<'_> {
    /// Adds or removes a backend of the service that the packet is addressed to, if it is one:
    /// first the new list, then the generation of a removed backend.
    pub(crate) fn toggle_backend(&mut self, packet: Tuple, backend: Index) -> Result<()> {
        let Some(service) = self.node.service_of(packet) else { return Ok(()) };
        if self.next_backend > LAST_BACKEND {
            return Ok(());
        }
        let (addr, is_ready) = backend.get_mut(&mut self.node.services[service].backends);
        *is_ready = !*is_ready;
        let (addr, is_ready) = (*addr, *is_ready);
        self.write_service(service)?;
        if !is_ready {
            for id in self.backend_ids.remove(&(service, addr)).unwrap_or_default() {
                self.rig.raise_generation(id)?;
            }
            self.node.table.remove_backend(service, addr);
        }
        Ok(())
    }

    pub(crate) fn write_service(&mut self, number: usize) -> Result<()> {
        let service = &self.node.services[number];
        let ready: Vec<_> =
            service.backends.iter().filter(|(_, is_ready)| *is_ready).map(|(addr, _)| *addr).collect();
        let first = self.next_backend;
        self.rig.service_with(service.frontend, service.protocol, first, &ready, |key, row| {
            if service.is_node_port {
                *key = key.at_node();
            }
            if service.is_local {
                row.flags |= ServiceFlags::LOCAL;
            }
            if service.direct_return {
                row.flags |= ServiceFlags::HASH | ServiceFlags::DSR;
            }
        })?;
        for (id, addr) in (first..).zip(&ready) {
            self.backend_ids.entry((number, *addr)).or_default().push(id);
        }
        self.next_backend += ready.len() as u32;
        Ok(())
    }
}
