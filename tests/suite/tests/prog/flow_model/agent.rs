//! Writes services as the agent does.

use anyhow::Result;
use dataplane_common::abi::ServiceFlags;
use proptest::sample::Index;

use super::drive::Sequence;

/// First row of `BACKENDS` for the model's services; those before are of [`World`].
pub(crate) const FIRST_BACKEND: u32 = 110;
const LAST_BACKEND: u32 = 500;

impl Sequence<'_> {
    /// First the new list, then the generation of a removed backend.
    pub(crate) fn set_backend(&mut self, service: usize, backend: Index, is_ready: bool) -> Result<()> {
        let row = &mut self.node.services[service];
        let backend = backend.index(row.backends.len());
        let (addr, was_ready) = row.backends[backend];
        if was_ready == is_ready || self.next_backend > LAST_BACKEND {
            return Ok(());
        }
        row.backends[backend].1 = is_ready;
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
