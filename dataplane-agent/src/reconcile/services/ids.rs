//! Service IDs: one per Service port, shared by its frontends, stable while the port exists.

use std::collections::{HashMap, HashSet};

use crate::compile::services::ServicePortKey;

/// The allocated IDs. 0 is reserved for masquerade.
#[derive(Debug, Default)]
pub(super) struct ServiceIds {
    by_port: HashMap<ServicePortKey, u32>,
    in_use: HashSet<u32>,
    /// IDs of an earlier agent, reserved for the ports whose frontends use them.
    adopted: HashSet<u32>,
    last: u32,
}

impl ServiceIds {
    /// Reserves the IDs of an earlier agent.
    pub(super) fn adopt(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.adopted.extend(ids);
        self.last = self.adopted.iter().copied().max().unwrap_or(0);
    }

    /// Returns the ID of a port. A new port gets the first free ID of `found`, the IDs of its
    /// existing frontends, or else a new one.
    pub(super) fn allocate(&mut self, port: &ServicePortKey, found: impl IntoIterator<Item = u32>) -> u32 {
        if let Some(id) = self.get(port) {
            return id;
        }
        let found = found.into_iter().find(|id| *id != 0 && !self.in_use.contains(id));
        let id = found.unwrap_or_else(|| self.next_free());
        self.adopted.remove(&id);
        self.in_use.insert(id);
        self.by_port.insert(port.clone(), id);
        id
    }

    /// The least recently used ID, because flows contain it.
    fn next_free(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.in_use.contains(&self.last) && !self.adopted.contains(&self.last) {
                return self.last;
            }
        }
    }

    pub(super) fn get(&self, port: &ServicePortKey) -> Option<u32> {
        self.by_port.get(port).copied()
    }

    /// Frees the ID of a removed port.
    pub(super) fn release(&mut self, port: &ServicePortKey) {
        if let Some(id) = self.by_port.remove(port) {
            self.in_use.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{NamespacedName, TransportProtocol};

    fn port(port: u16) -> ServicePortKey {
        let service = NamespacedName::new("default", "web");
        ServicePortKey { service, port, protocol: TransportProtocol::Tcp }
    }

    #[test]
    fn id_is_stable_adopted_and_never_shared() {
        let mut ids = ServiceIds::default();
        ids.adopt([7, 9]);
        assert_eq!(ids.allocate(&port(80), [7]), 7);
        assert_eq!(ids.allocate(&port(80), [9]), 7, "kept");
        assert_eq!(ids.allocate(&port(81), [7, 0]), 10, "7 is in use, 0 is reserved");
        ids.release(&port(81));
        assert_eq!(ids.allocate(&port(82), []), 11, "not used again at once");
    }
}
