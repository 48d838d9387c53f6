//! ADD creates a pod's device; CHECK verifies it.

use std::net::IpAddr;

use dataplane_cni::protocol::{
    Add, Added, Attachment, Bandwidth, Check, Limit, Pod, PodAddress, PortMapping,
};

use super::{
    CniError, PodAnnotations, PodDevice, PodNetwork,
    ipam::IpamError,
    name::{host_device, pod_mac},
    pods::Record,
    server::{PodEntry, Shared, State},
};
use crate::netlink::{PodLink, PodNetns, Rate, link::HOST_MAC, pod::gateway};

impl Shared {
    /// Adds a pod, or undoes everything if a step fails. A repeated ADD returns the same result.
    pub(super) async fn add(&self, add: Add) -> Result<Added, CniError> {
        let _guard = self.container_locks.lock(&add.attachment.container_id).await;
        let network = self.network()?;
        let netns = PodNetns::open(&add.netns)?;
        let device = host_device(&add.attachment);
        if let Some(added) = self.existing_result(&add.attachment, &netns, &device).await? {
            return Ok(added);
        }
        let annotations = self.pod_annotations(add.pod.as_ref()).await?;
        // the record comes before the device: after a crash, recovery finds it and cleans up
        let record = self.reserve(add, device, network.mtu, &annotations).await?;
        match self.set_up(&netns, &record, &network).await {
            Ok(()) => {
                let Record { attachment, device, pod, addresses, .. } = &record;
                tracing::info!(%attachment, device, pod = ?pod, ?addresses, "pod added");
                Ok(added(&record))
            }
            Err(error) => {
                if let Err(undo) = self.release(&record.device).await {
                    let Record { attachment, device, addresses, .. } = &record;
                    tracing::warn!(
                        %attachment, device, ?addresses, error = %undo,
                        "cannot undo a failed CNI ADD; the addresses stay in use until CNI DEL or GC succeeds"
                    );
                }
                Err(error)
            }
        }
    }

    /// The result for a pod that already has its device. A device that differs from its record is
    /// removed, and ADD creates it again.
    async fn existing_result(
        &self,
        attachment: &Attachment,
        netns: &PodNetns,
        device: &str,
    ) -> Result<Option<Added>, CniError> {
        let Some(entry) = self.pod(device) else { return Ok(None) };
        let problems = match &entry.record {
            None => vec!["its record is lost".to_owned()],
            Some(record) if record.attachment != *attachment => {
                let (attachment, other) = (attachment.clone(), record.attachment.clone());
                return Err(CniError::NameTaken { attachment, device: device.to_owned(), other });
            }
            Some(_) => self.netlink.pod_link_problems(netns, &pod_link(&entry, &attachment.ifname)).await?,
        };
        if problems.is_empty() {
            self.attach(&entry.device).await?;
            return Ok(entry.record.as_ref().map(added));
        }
        tracing::info!(%attachment, device, ?problems, "pod device differs from its record; creating it again");
        self.release(device).await?;
        Ok(None)
    }

    /// Allocates addresses and writes the record.
    async fn reserve(
        &self,
        add: Add,
        device: String,
        mtu: u32,
        annotations: &PodAnnotations,
    ) -> Result<Record, CniError> {
        let record = self.state().reserve(add, device, mtu, annotations)?;
        let saved = record.clone();
        if let Err(error) = self.with_store(move |store| store.save(&saved)).await {
            self.state().remove_pod(&record.device);
            return Err(error);
        }
        Ok(record)
    }

    async fn pod_annotations(&self, pod: Option<&Pod>) -> Result<PodAnnotations, CniError> {
        let Some(pod) = pod else { return Ok(PodAnnotations::default()) };
        let annotations = self.datapath.annotations(pod).await;
        annotations.map_err(|source| CniError::Annotations { pod: pod.to_string(), source })
    }

    /// Creates device, addresses and routes, then attaches the datapath: it never delivers to a pod
    /// that is not ready.
    async fn set_up(&self, netns: &PodNetns, record: &Record, network: &PodNetwork) -> Result<(), CniError> {
        let Some(entry) = self.pod(&record.device) else {
            return Err(CniError::Unknown(record.attachment.clone()));
        };
        let link = pod_link(&entry, &record.attachment.ifname);
        let host = self.netlink.add_pod_link(netns, &link).await?;
        let device = PodDevice { ifindex: host.ifindex, ..entry.device };
        if let Some(entry) = self.state().pods.get_mut(&record.device) {
            entry.device.ifindex = host.ifindex;
        }
        self.netlink.route_to_pod(host.ifindex, &link, &network.sources).await?;
        self.attach(&device).await
    }

    async fn attach(&self, device: &PodDevice) -> Result<(), CniError> {
        self.datapath.attach(device).await.map_err(|source| CniError::Datapath {
            operation: "attach",
            device: device.name.clone(),
            source,
        })
    }

    /// Compares the pod's network with its record and with `prevResult`, and reports every
    /// difference.
    pub(super) async fn check(&self, check: &Check) -> Result<(), CniError> {
        let Check { attachment, netns, addresses, mac } = check;
        let _guard = self.container_locks.lock(&attachment.container_id).await;
        let entry = self.pod(&host_device(attachment)).filter(|entry| entry.device.ifindex != 0);
        let entry = entry.ok_or_else(|| CniError::Unknown(attachment.clone()))?;
        let mut problems = prev_result_problems(&entry, addresses, mac.as_deref());
        let netns = PodNetns::open(netns)?;
        problems.extend(self.netlink.pod_link_problems(&netns, &pod_link(&entry, &attachment.ifname)).await?);
        if let Err(error) = self.datapath.check(&entry.device).await {
            problems.push(format!("datapath: {error}"));
        }
        if problems.is_empty() { Ok(()) } else { Err(CniError::Check(problems)) }
    }
}

impl State {
    fn reserve(
        &mut self,
        add: Add,
        device: String,
        mtu: u32,
        annotations: &PodAnnotations,
    ) -> Result<Record, CniError> {
        let Add { attachment, network, netns, pod, port_mappings, bandwidth } = add;
        self.check_host_ports(&port_mappings)?;
        let addresses = self
            .ipam
            .allocate(&device, &annotations.addresses)
            .map_err(|error| self.with_pod_as_owner(error))?;
        self.sequence += 1;
        let mac = pod_mac(&addresses);
        let sequence = self.sequence;
        let record = Record {
            attachment,
            network,
            netns,
            pod,
            device,
            mac,
            mtu,
            addresses,
            allowed_sources: annotations.allowed_sources.clone(),
            port_mappings,
            bandwidth,
            sequence,
        };
        self.pods.insert(record.device.clone(), PodEntry::new(record.clone(), 0));
        Ok(record)
    }

    /// Refuses a host port that another pod of this node has.
    fn check_host_ports(&self, requested: &[PortMapping]) -> Result<(), CniError> {
        for port in requested {
            let conflicts =
                |entry: &&PodEntry| entry.device.port_mappings.iter().any(|taken| taken.collides(port));
            if let Some(entry) = self.pods.values().find(conflicts) {
                return Err(CniError::PortTaken { port: *port, pod: entry.display_name() });
            }
        }
        Ok(())
    }

    /// Replaces the device that owns an address by its pod's name, which an operator knows.
    fn with_pod_as_owner(&self, error: IpamError) -> IpamError {
        match error {
            IpamError::RequestedInUse { address, owner } => {
                let owner =
                    self.pods.get(&owner).map_or(owner, |entry| format!("pod {}", entry.display_name()));
                IpamError::RequestedInUse { address, owner }
            }
            other => other,
        }
    }

    pub(super) fn remove_pod(&mut self, device: &str) {
        self.pods.remove(device);
        self.ipam.release(device);
    }
}

impl PodEntry {
    /// `namespace/name` of the pod, or the device's name if the pod is not known.
    fn display_name(&self) -> String {
        self.device.pod.as_ref().map_or_else(|| self.device.name.clone(), ToString::to_string)
    }

    pub(super) fn new(record: Record, ifindex: u32) -> Self {
        let device = PodDevice {
            name: record.device.clone(),
            ifindex,
            mac: record.mac,
            netns: Some(record.netns.clone()),
            addresses: record.addresses.clone(),
            allowed_sources: record.allowed_sources.clone(),
            pod: record.pod.clone(),
            port_mappings: record.port_mappings.clone(),
            shaped: record.bandwidth.ingress.is_some(),
        };
        Self { record: Some(record), device }
    }
}

/// The veth pair of a pod, as [`crate::netlink`] creates and checks it.
fn pod_link(entry: &PodEntry, ifname: &str) -> PodLink {
    let PodDevice { name, mac, addresses, .. } = entry.device.clone();
    let record = entry.record.as_ref();
    let Bandwidth { ingress, egress } = record.map(|record| record.bandwidth).unwrap_or_default();
    PodLink {
        host_device: name,
        ifname: ifname.to_owned(),
        mac,
        mtu: record.map_or(0, |record| record.mtu),
        addresses,
        ingress: ingress.map(rate),
        egress: egress.map(rate),
    }
}

/// Converts bits to bytes.
fn rate(limit: Limit) -> Rate {
    Rate { bytes: (limit.rate / 8).max(1), burst: limit.burst.map(|bits| bits / 8) }
}

fn added(record: &Record) -> Added {
    let address = |address: &IpAddr| PodAddress { address: (*address).into(), gateway: gateway(*address) };
    Added {
        host_device: record.device.clone(),
        host_mac: HOST_MAC.to_string(),
        pod_mac: record.mac.to_string(),
        mtu: record.mtu,
        addresses: record.addresses.iter().map(address).collect(),
    }
}

/// Differences between the runtime's `prevResult` and the pod's record.
fn prev_result_problems(entry: &PodEntry, addresses: &[IpAddr], mac: Option<&str>) -> Vec<String> {
    let PodDevice { addresses: recorded, mac: recorded_mac, .. } = &entry.device;
    let mut problems = Vec::new();
    for address in addresses.iter().filter(|address| !recorded.contains(address)) {
        problems.push(format!("prevResult: {address} is not an address of this pod"));
    }
    for address in recorded.iter().filter(|address| !addresses.contains(address)) {
        problems.push(format!("prevResult: {address} of this pod is missing"));
    }
    if let Some(mac) = mac.filter(|mac| !mac.eq_ignore_ascii_case(&recorded_mac.to_string())) {
        problems.push(format!("prevResult: MAC address {mac} is not that of this pod, {recorded_mac}"));
    }
    problems
}
