//! Numbers of service ports: the same for all frontends of a port, and for as long as it exists.

use std::collections::{HashMap, HashSet};

use crate::compile::services::ServicePortKey;

/// The numbers given out. 0 is masquerade's.
#[derive(Debug, Default)]
pub(super) struct ServiceIds {
    by_port: HashMap<ServicePortKey, u32>,
    owned: HashSet<u32>,
    /// Of an earlier agent: kept for the ports whose frontends carry them.
    adopted: HashSet<u32>,
    last: u32,
}

impl ServiceIds {
    /// Numbers an earlier agent gave out.
    pub(super) fn adopt(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.adopted.extend(ids);
        self.last = self.adopted.iter().copied().max().unwrap_or(0);
    }

    /// The number of a port. A new one gets the first of `found`, what its frontends carry, that is no other port's.
    pub(super) fn number(&mut self, port: &ServicePortKey, found: impl IntoIterator<Item = u32>) -> u32 {
        if let Some(id) = self.get(port) {
            return id;
        }
        let found = found.into_iter().find(|id| *id != 0 && !self.owned.contains(id));
        let id = found.unwrap_or_else(|| self.fresh());
        self.adopted.remove(&id);
        self.owned.insert(id);
        self.by_port.insert(port.clone(), id);
        id
    }

    /// The one that was not used for the longest time: flows are named by it.
    fn fresh(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.owned.contains(&self.last) && !self.adopted.contains(&self.last) {
                return self.last;
            }
        }
    }

    pub(super) fn get(&self, port: &ServicePortKey) -> Option<u32> {
        self.by_port.get(port).copied()
    }

    /// The port does not exist any more.
    pub(super) fn forget(&mut self, port: &ServicePortKey) {
        if let Some(id) = self.by_port.remove(port) {
            self.owned.remove(&id);
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
    fn a_number_is_kept_found_again_and_never_shared() {
        let mut ids = ServiceIds::default();
        ids.adopt([7, 9]);
        assert_eq!(ids.number(&port(80), [7]), 7);
        assert_eq!(ids.number(&port(80), [9]), 7, "kept");
        assert_eq!(ids.number(&port(81), [7, 0]), 10, "another's, and masquerade's");
        ids.forget(&port(81));
        assert_eq!(ids.number(&port(82), []), 11, "not used again at once");
    }
}
