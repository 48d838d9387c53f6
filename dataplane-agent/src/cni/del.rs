//! DEL and GC: a pod's device goes, and all that was made for it.

use std::collections::BTreeSet;

use dataplane_cni::protocol::{Del, Gc};

use super::{
    CniError,
    name::host_device,
    server::{Held, Shared},
};
use crate::netlink::Link;

impl Shared {
    /// A pod nobody knows is a pod that is gone: no error.
    pub(super) async fn del(&self, del: &Del) -> Result<(), CniError> {
        let _turn = self.turns.take(&del.attachment.container_id).await;
        self.release(&host_device(&del.attachment)).await
    }

    /// Removes what the runtime does not list, of the network it speaks of. One that cannot be removed does not keep
    /// the others.
    pub(super) async fn gc(&self, gc: &Gc) -> Result<(), CniError> {
        let valid: BTreeSet<String> = gc.valid.iter().map(host_device).collect();
        let stale = self.stale(&gc.network, &valid);
        let mut problems = Vec::new();
        for (container_id, device) in &stale {
            let _turn = self.turns.take(container_id).await;
            match self.release(device).await {
                Ok(()) => tracing::info!(container_id, device, "pod the runtime does not know was removed"),
                Err(error) => problems.push(format!("{device}: {error}")),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(CniError::Gc { total: stale.len(), problems }) }
    }

    /// Containers and devices of a network that are not valid.
    fn stale(&self, network: &str, valid: &BTreeSet<String>) -> Vec<(String, String)> {
        let state = self.state();
        let stale = |(device, held): (&String, &Held)| {
            let record = held.record.as_ref().filter(|record| record.network == network)?;
            let gone = !valid.contains(device);
            gone.then(|| (record.attachment.container_id.clone(), device.clone()))
        };
        state.pods.iter().filter_map(stale).collect()
    }

    /// Removes a device, its record, and then its claim to addresses: in this order, because an address is free only
    /// once nothing answers to it, and a record is gone only once there is nothing to find by it. Each step may be
    /// repeated.
    pub(super) async fn release(&self, device: &str) -> Result<(), CniError> {
        // one that was never made was never attached
        if let Some(held) = self.held(device).filter(|held| held.device.ifindex != 0) {
            self.wiring.detach(&held.device).await.map_err(|source| CniError::Datapath {
                operation: "detach",
                device: device.to_owned(),
                source,
            })?;
        }
        // by its name, not by what is known of it: the record may be lost. Its end in the pod, its addresses, and the
        // routes and neighbours on it go with it.
        if let Some(link) = self.netlink.link(device).await?.filter(Link::is_pod_device) {
            self.netlink.delete_link(&link).await?;
        }
        let name = device.to_owned();
        self.with_store(move |store| store.remove(&name)).await?;
        self.state().forget(device);
        Ok(())
    }
}
