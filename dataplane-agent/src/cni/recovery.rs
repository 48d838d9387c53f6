//! Recovery at start: compares the pod records on disk with the devices in the kernel.
//!
//! The device decides. If it does not exist, the pod's network namespace does not exist either, and
//! its addresses are free. Pods that were deleted while no agent ran lose their device first. A pod
//! device without a record is adopted, with the addresses of the kernel's routes to it.

use std::collections::BTreeMap;

use dataplane_cni::{
    pending_deletes::{DeletionQueue, PendingDeletes},
    protocol::Attachment,
};

use super::{
    CniError, PodDevice,
    name::host_device,
    pods::{Record, Store},
    server::{PodEntry, State},
};
use crate::netlink::{KernelRoute, Link, Netlink, NetlinkError};

/// The result of recovery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Pods with a device. The caller attaches the datapath to them.
    pub pods: Vec<PodDevice>,
    /// Names of pod devices that vanished while no agent ran. Their addresses are released.
    pub released: Vec<String>,
    /// What the operator should know, as sentences.
    pub problems: Vec<String>,
}

/// Compares records with devices, and removes the records of pods without a device.
pub(super) async fn recover(
    netlink: &Netlink,
    store: &Store,
    queue: &DeletionQueue,
) -> Result<(State, Recovery), CniError> {
    let (records, invalid) = store.load()?;
    let mut state = State::default();
    let mut recovery = Recovery::default();
    recovery.problems.extend(invalid.iter().map(ToString::to_string));
    let deleted = process_pending_deletes(netlink, queue, &mut recovery).await;
    let links = netlink.links().await?.into_iter().filter(Link::is_pod_device);
    let mut links: BTreeMap<String, Link> = links.map(|link| (link.name.clone(), link)).collect();
    for record in records {
        match links.remove(&record.device) {
            Some(link) => state.restore(record, &link, &mut recovery),
            None => {
                let Record { attachment, device, addresses, .. } = &record;
                tracing::info!(%attachment, device, ?addresses, "pod device no longer exists; addresses released");
                store.remove(&record.device)?;
                recovery.released.push(record.device);
            }
        }
    }
    if !links.is_empty() {
        let routes = netlink.agent_routes().await?;
        for link in links.values() {
            adopt_device(netlink, link, &routes, &mut state, &mut recovery).await?;
        }
    }
    // last, so that the next agent repeats a recovery that was interrupted
    for attachment in &deleted {
        if let Err(error) = queue.remove(attachment) {
            recovery.problems.push(error.to_string());
        }
    }
    for problem in &recovery.problems {
        tracing::error!(problem, "pod recovery: a record or device needs attention");
    }
    Ok((state, recovery))
}

impl State {
    fn restore(&mut self, record: Record, link: &Link, recovery: &mut Recovery) {
        self.sequence = self.sequence.max(record.sequence);
        self.insert_pod(PodEntry::new(record, link.ifindex), recovery);
    }

    fn insert_pod(&mut self, entry: PodEntry, recovery: &mut Recovery) {
        let device = entry.device.clone();
        for address in &device.addresses {
            if let Err(error) = self.ipam.assign(*address, &device.name) {
                recovery.problems.push(format!("pod device {}: {error}", device.name));
            }
        }
        self.pods.insert(device.name.clone(), entry);
        recovery.pods.push(device);
    }
}

/// Removes the devices of pods that were deleted while no agent ran, and returns these pods. A
/// deletion that failed stays in the queue: the next agent tries again.
async fn process_pending_deletes(
    netlink: &Netlink,
    queue: &DeletionQueue,
    recovery: &mut Recovery,
) -> Vec<Attachment> {
    let pending = queue.read().unwrap_or_else(|error| {
        recovery.problems.push(format!("cannot read pending deletions: {error}"));
        PendingDeletes::default()
    });
    let unknown = pending.unknown_files.iter();
    recovery.problems.extend(
        unknown.map(|path| format!("{} is not a pending deletion of a pod; remove the file", path.display())),
    );
    let mut deleted = Vec::new();
    for attachment in pending.attachments {
        match remove_device(netlink, &host_device(&attachment)).await {
            Ok(()) => deleted.push(attachment),
            Err(error) => recovery.problems.push(format!(
                "cannot remove the device of {attachment}, deleted while no agent ran: {error}; \
                 the next start of the agent tries again"
            )),
        }
    }
    deleted
}

async fn remove_device(netlink: &Netlink, device: &str) -> Result<(), NetlinkError> {
    match netlink.link(device).await?.filter(Link::is_pod_device) {
        Some(link) => {
            tracing::info!(device, "pod was deleted while no agent ran; removing its device");
            netlink.delete_link(&link).await
        }
        None => Ok(()),
    }
}

/// Adopts a pod device without a record, or removes it if no route leads to it.
async fn adopt_device(
    netlink: &Netlink,
    link: &Link,
    routes: &[KernelRoute],
    state: &mut State,
    recovery: &mut Recovery,
) -> Result<(), CniError> {
    let is_pod_route = |route: &&KernelRoute| {
        route.ifindex == link.ifindex && route.destination.prefix_len() == route.destination.max_prefix_len()
    };
    let addresses: Vec<_> =
        routes.iter().filter(is_pod_route).map(|route| route.destination.addr()).collect();
    let neighbours = netlink.permanent_neighbours(link.ifindex).await?;
    let Some(mac) = neighbours.first().map(|neighbour| neighbour.mac).filter(|_| !addresses.is_empty())
    else {
        // an agent crashed while it created or removed the device
        recovery.problems.push(format!("pod device {} has no record and no route to it; removed", link.name));
        return Ok(netlink.delete_link(link).await?);
    };
    recovery.problems.push(format!(
        "pod device {} has no record; keeping it with the addresses of its routes ({})",
        link.name,
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    ));
    let device = PodDevice {
        name: link.name.clone(),
        ifindex: link.ifindex,
        mac,
        netns: None,
        addresses,
        allowed_sources: Vec::new(),
        pod: None,
        port_mappings: Vec::new(),
        shaped: false,
    };
    state.insert_pod(PodEntry { record: None, device }, recovery);
    Ok(())
}
