//! What is left of an earlier agent's pods: records on disk against devices in the kernel.
//!
//! The device decides. One that is gone took its pod along (its end is in the pod's namespace), whatever the record
//! says: the addresses are free. So a pod that was deleted while no agent ran loses its device first, and is then as any
//! that is gone. One without a record is a pod all the same: the kernel's routes tell its addresses.

use std::collections::BTreeMap;

use dataplane_cni::{
    pending_deletes::{DeletionQueue, Found},
    protocol::Attachment,
};

use super::{
    CniError, PodDevice,
    name::host_device,
    pods::{Record, Store},
    server::{Held, State},
};
use crate::netlink::{KernelRoute, Link, Netlink, NetlinkError};

/// What was found at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Pods that are alive: the datapath is to know them.
    pub pods: Vec<PodDevice>,
    /// Names of devices that went while no agent ran. Their addresses are free.
    pub released: Vec<String>,
    /// Sentences for a person.
    pub problems: Vec<String>,
}

/// Reads the records and looks at the devices. Records of pods that are gone are removed.
pub(super) async fn recover(
    netlink: &Netlink,
    store: &Store,
    notes: &DeletionQueue,
) -> Result<(State, Recovery), CniError> {
    let (records, broken) = store.load()?;
    let mut state = State::default();
    let mut recovery = Recovery::default();
    recovery.problems.extend(broken.iter().map(ToString::to_string));
    let gone = remove_gone(netlink, notes, &mut recovery).await;
    let links = netlink.links().await?.into_iter().filter(Link::is_pod_device);
    let mut links: BTreeMap<String, Link> = links.map(|link| (link.name.clone(), link)).collect();
    for record in records {
        match links.remove(&record.device) {
            Some(link) => state.keep(record, &link, &mut recovery),
            None => {
                tracing::info!(device = record.device, addresses = ?record.addresses, "pod is gone");
                store.remove(&record.device)?;
                recovery.released.push(record.device);
            }
        }
    }
    if !links.is_empty() {
        let routes = netlink.our_routes().await?;
        for link in links.values() {
            adopt(netlink, link, &routes, &mut state, &mut recovery).await?;
        }
    }
    // last of all: until here, the next agent would begin again
    for attachment in &gone {
        if let Err(error) = notes.remove(attachment) {
            recovery.problems.push(error.to_string());
        }
    }
    for problem in &recovery.problems {
        tracing::error!(problem, "pod records");
    }
    Ok((state, recovery))
}

impl State {
    fn keep(&mut self, record: Record, link: &Link, recovery: &mut Recovery) {
        self.sequence = self.sequence.max(record.sequence);
        self.hold(Held::new(record, link.ifindex), recovery);
    }

    fn hold(&mut self, held: Held, recovery: &mut Recovery) {
        let device = held.device.clone();
        for address in &device.addresses {
            if let Err(error) = self.ipam.claim(*address, &device.name) {
                recovery.problems.push(format!("{}: {error}", device.name));
            }
        }
        self.pods.insert(device.name.clone(), held);
        recovery.pods.push(device);
    }
}

/// Removes the devices of pods that were deleted while no agent ran. DeletionQueue of those that are left are kept: the next
/// agent tries again.
async fn remove_gone(netlink: &Netlink, notes: &DeletionQueue, recovery: &mut Recovery) -> Vec<Attachment> {
    let found = notes.read().unwrap_or_else(|error| {
        recovery.problems.push(error.to_string());
        Found::default()
    });
    let strangers = found.strangers.iter();
    recovery.problems.extend(strangers.map(|path| format!("{} is no note of a pod", path.display())));
    let mut gone = Vec::new();
    for attachment in found.gone {
        match remove_device(netlink, &host_device(&attachment)).await {
            Ok(()) => gone.push(attachment),
            Err(error) => {
                recovery.problems.push(format!("{attachment} was deleted and is still here: {error}"));
            }
        }
    }
    gone
}

async fn remove_device(netlink: &Netlink, device: &str) -> Result<(), NetlinkError> {
    match netlink.link(device).await?.filter(Link::is_pod_device) {
        Some(link) => {
            tracing::info!(device, "pod was deleted while no agent ran");
            netlink.delete_link(&link).await
        }
        None => Ok(()),
    }
}

/// Takes over a pod's device that has no record.
async fn adopt(
    netlink: &Netlink,
    link: &Link,
    routes: &[KernelRoute],
    state: &mut State,
    recovery: &mut Recovery,
) -> Result<(), CniError> {
    let is_host = |route: &&KernelRoute| {
        route.ifindex == link.ifindex && route.destination.prefix_len() == route.destination.max_prefix_len()
    };
    let addresses: Vec<_> = routes.iter().filter(is_host).map(|route| route.destination.addr()).collect();
    let neighbours = netlink.permanent_neighbours(link.ifindex).await?;
    let Some(mac) = neighbours.first().map(|neighbour| neighbour.mac).filter(|_| !addresses.is_empty())
    else {
        // nothing leads to it: somebody died while making or removing it
        recovery.problems.push(format!("device {} has no record and no address: removed", link.name));
        return Ok(netlink.delete_link(link).await?);
    };
    recovery.problems.push(format!(
        "device {} has no record: it keeps the addresses its routes tell ({})",
        link.name,
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    ));
    let device = PodDevice {
        name: link.name.clone(),
        ifindex: link.ifindex,
        mac,
        netns: None,
        addresses,
        pod: None,
        port_mappings: Vec::new(),
        shaped: false,
    };
    state.hold(Held { record: None, device }, recovery);
    Ok(())
}
