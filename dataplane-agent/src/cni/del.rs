//! DEL and GC: a pod's device goes, and all that was made for it. And the sweep, for pods that went without either.

use std::collections::BTreeSet;

use dataplane_cni::protocol::{Del, Gc};

use super::{
    CniError,
    name::host_device,
    pods::Record,
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

    /// Releases pods whose device is gone although nobody deleted them: their namespace was removed. One that somebody
    /// works on is left for the next time, and one whose record is lost for the next agent.
    pub(super) async fn sweep(&self) -> Result<(), CniError> {
        // in this order: a device that is made from here on is not missed
        let held = self.complete();
        let links = self.netlink.links().await?;
        let links: BTreeSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        for record in held.iter().filter(|record| !links.contains(record.device.as_str())) {
            let Some(_turn) = self.turns.try_take(&record.attachment.container_id) else { continue };
            // it may have been made anew before the turn was ours
            if self.netlink.link(&record.device).await?.is_some() {
                continue;
            }
            let Record { attachment, device, addresses, .. } = record;
            match self.release(device).await {
                Ok(()) => {
                    tracing::info!(%attachment, device, ?addresses, "pod went without a word: released");
                }
                Err(error) => tracing::warn!(%attachment, device, %error, "release a pod that is gone"),
            }
        }
        Ok(())
    }

    /// Records of the pods that have, or had, their device.
    fn complete(&self) -> Vec<Record> {
        let state = self.state();
        let made = state.pods.values().filter(|held| held.device.ifindex != 0);
        made.filter_map(|held| held.record.clone()).collect()
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
