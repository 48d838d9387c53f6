//! DEL and GC remove pods. A periodic sweep releases pods whose device vanished without a DEL.

use std::collections::BTreeSet;

use dataplane_cni::protocol::{Del, Gc};

use super::{
    CniError,
    name::host_device,
    pods::Record,
    server::{PodEntry, Shared},
};
use crate::netlink::Link;

impl Shared {
    /// Removes a pod. An unknown pod is not an error.
    pub(super) async fn del(&self, del: &Del) -> Result<(), CniError> {
        let _guard = self.container_locks.lock(&del.attachment.container_id).await;
        self.release(&host_device(&del.attachment)).await
    }

    /// Removes every pod of the network that is not in the runtime's list. A pod that cannot be
    /// removed does not stop the removal of the others.
    pub(super) async fn gc(&self, gc: &Gc) -> Result<(), CniError> {
        let valid: BTreeSet<String> = gc.valid.iter().map(host_device).collect();
        let stale = self.stale(&gc.network, &valid);
        let mut problems = Vec::new();
        for (container_id, device) in &stale {
            let _guard = self.container_locks.lock(container_id).await;
            match self.release(device).await {
                Ok(()) => tracing::info!(
                    container_id,
                    device,
                    "CNI GC: pod is not in the runtime's list; device removed and addresses released"
                ),
                Err(error) => problems.push(format!("{device} of container {container_id}: {error}")),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(CniError::Gc { total: stale.len(), problems }) }
    }

    /// Container IDs and devices of a network that are not in `valid`.
    fn stale(&self, network: &str, valid: &BTreeSet<String>) -> Vec<(String, String)> {
        let state = self.state();
        let stale = |(device, entry): (&String, &PodEntry)| {
            let record = entry.record.as_ref().filter(|record| record.network == network)?;
            let is_stale = !valid.contains(device);
            is_stale.then(|| (record.attachment.container_id.clone(), device.clone()))
        };
        state.pods.iter().filter_map(stale).collect()
    }

    /// Releases pods whose device vanished without a DEL, because their network namespace was
    /// removed. A pod with a request in progress is left for the next call, and a pod without a
    /// record for the next start of the agent.
    pub(super) async fn release_vanished(&self) -> Result<(), CniError> {
        // records before links: a device that is created in between is in the list of links
        let records = self.records_with_device();
        let links = self.netlink.links().await?;
        let links: BTreeSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        for record in records.iter().filter(|record| !links.contains(record.device.as_str())) {
            let Some(_guard) = self.container_locks.try_lock(&record.attachment.container_id) else {
                continue;
            };
            // the device may have been created again before the lock was taken
            if self.netlink.link(&record.device).await?.is_some() {
                continue;
            }
            let Record { attachment, device, addresses, .. } = record;
            match self.release(device).await {
                Ok(()) => {
                    tracing::info!(
                        %attachment, device, ?addresses,
                        "pod device vanished without CNI DEL; addresses released"
                    );
                }
                Err(error) => tracing::warn!(
                    %attachment, device, ?addresses, %error,
                    "pod device vanished without CNI DEL; cannot release its addresses, retrying with the next sweep"
                ),
            }
        }
        Ok(())
    }

    /// Records of the pods whose device was created.
    fn records_with_device(&self) -> Vec<Record> {
        let state = self.state();
        let created = state.pods.values().filter(|entry| entry.device.ifindex != 0);
        created.filter_map(|entry| entry.record.clone()).collect()
    }

    /// Removes a pod's device, then its record, then releases its addresses. Each step may be
    /// repeated.
    ///
    /// The order matters: an address is free only when nothing answers to it, and a record is
    /// removed only when there is nothing left that it describes.
    pub(super) async fn release(&self, device: &str) -> Result<(), CniError> {
        // a device that was never created was never attached
        if let Some(entry) = self.pod(device).filter(|entry| entry.device.ifindex != 0) {
            self.datapath.detach(&entry.device).await.map_err(|source| CniError::Datapath {
                operation: "detach",
                device: device.to_owned(),
                source,
            })?;
        }
        // by name, because the record may be lost. The kernel also removes the peer in the pod, and
        // the device's addresses, routes and neighbours.
        if let Some(link) = self.netlink.link(device).await?.filter(Link::is_pod_device) {
            self.netlink.delete_link(&link).await?;
        }
        let name = device.to_owned();
        self.with_store(move |store| store.remove(&name)).await?;
        self.state().remove_pod(device);
        Ok(())
    }
}
