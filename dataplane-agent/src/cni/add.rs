//! ADD: a pod gets a device. And CHECK, which asks whether it still has it.

use std::net::IpAddr;

use dataplane_cni::protocol::{
    Add, Added, Attachment, Bandwidth, Check, Limit, Pod, PodAddress, PortMapping,
};

use super::{
    CniError, PodAnnotations, PodDevice, PodNetwork,
    ipam::IpamError,
    name::{host_device, pod_mac},
    pods::Record,
    server::{Held, Shared, State},
};
use crate::netlink::{PodLink, PodNetns, Rate, link::HOST_MAC, pod::gateway};

impl Shared {
    /// Everything or nothing: what was made is removed again if a later step fails. Asked again, it answers the same.
    pub(super) async fn add(&self, add: Add) -> Result<Added, CniError> {
        let _turn = self.turns.take(&add.attachment.container_id).await;
        let network = self.network()?;
        let netns = PodNetns::open(&add.netns)?;
        let device = host_device(&add.attachment);
        if let Some(added) = self.repeat(&add.attachment, &netns, &device).await? {
            return Ok(added);
        }
        // first of all the record: from here on a crash leaves a trace
        let wishes = self.wishes(add.pod.as_ref()).await?;
        let record = self.reserve(add, device, network.mtu, &wishes).await?;
        match self.build(&netns, &record, &network).await {
            Ok(()) => {
                let Record { attachment, device, pod, addresses, .. } = &record;
                tracing::info!(%attachment, device, pod = ?pod, ?addresses, "pod added");
                Ok(added(&record))
            }
            Err(error) => {
                if let Err(undo) = self.release(&record.device).await {
                    // the addresses stay taken until DEL or GC succeeds
                    tracing::warn!(device = record.device, error = %undo, "what was made for a pod cannot be removed");
                }
                Err(error)
            }
        }
    }

    /// The answer for a pod that has its device already. One whose device is not as it should be loses it, to get
    /// another.
    async fn repeat(
        &self,
        attachment: &Attachment,
        netns: &PodNetns,
        device: &str,
    ) -> Result<Option<Added>, CniError> {
        let Some(held) = self.held(device) else { return Ok(None) };
        let problems = match &held.record {
            None => vec!["its record is lost".to_owned()],
            Some(record) if record.attachment != *attachment => {
                let (attachment, other) = (attachment.clone(), record.attachment.clone());
                return Err(CniError::NameTaken { attachment, device: device.to_owned(), other });
            }
            Some(_) => self.netlink.pod_link_problems(netns, &link(&held, &attachment.ifname)).await?,
        };
        if problems.is_empty() {
            self.attach(&held.device).await?;
            return Ok(held.record.as_ref().map(added));
        }
        tracing::info!(%attachment, device, ?problems, "device of a pod is made anew");
        self.release(device).await?;
        Ok(None)
    }

    /// Takes addresses and writes the record.
    async fn reserve(
        &self,
        add: Add,
        device: String,
        mtu: u32,
        wishes: &PodAnnotations,
    ) -> Result<Record, CniError> {
        let record = self.state().reserve(add, device, mtu, wishes)?;
        let saved = record.clone();
        if let Err(error) = self.with_store(move |store| store.save(&saved)).await {
            self.state().forget(&record.device);
            return Err(error);
        }
        Ok(record)
    }

    async fn wishes(&self, pod: Option<&Pod>) -> Result<PodAnnotations, CniError> {
        let Some(pod) = pod else { return Ok(PodAnnotations::default()) };
        self.wiring.wishes(pod).await.map_err(|source| CniError::Wish { pod: pod.to_string(), source })
    }

    /// Device, addresses, routes; then the datapath, so that it never knows a pod that cannot hear.
    async fn build(&self, netns: &PodNetns, record: &Record, network: &PodNetwork) -> Result<(), CniError> {
        let Some(held) = self.held(&record.device) else {
            return Err(CniError::Unknown(record.attachment.clone()));
        };
        let link = link(&held, &record.attachment.ifname);
        let host = self.netlink.add_pod_link(netns, &link).await?;
        let device = PodDevice { ifindex: host.ifindex, ..held.device };
        if let Some(held) = self.state().pods.get_mut(&record.device) {
            held.device.ifindex = host.ifindex;
        }
        self.netlink.route_to_pod(host.ifindex, &link, &network.sources).await?;
        self.attach(&device).await
    }

    async fn attach(&self, device: &PodDevice) -> Result<(), CniError> {
        self.wiring.attach(device).await.map_err(|source| CniError::Datapath {
            operation: "attach",
            device: device.name.clone(),
            source,
        })
    }

    /// Looks at everything that was made, and says all that is wrong with it.
    pub(super) async fn check(&self, check: &Check) -> Result<(), CniError> {
        let Check { attachment, netns, addresses, mac } = check;
        let _turn = self.turns.take(&attachment.container_id).await;
        let held = self.held(&host_device(attachment)).filter(|held| held.device.ifindex != 0);
        let held = held.ok_or_else(|| CniError::Unknown(attachment.clone()))?;
        let mut problems = remembered_otherwise(&held, addresses, mac.as_deref());
        let netns = PodNetns::open(netns)?;
        problems.extend(self.netlink.pod_link_problems(&netns, &link(&held, &attachment.ifname)).await?);
        if let Err(error) = self.wiring.check(&held.device).await {
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
        wishes: &PodAnnotations,
    ) -> Result<Record, CniError> {
        let Add { attachment, network, netns, pod, port_mappings, bandwidth } = add;
        self.check_ports(&port_mappings)?;
        let addresses =
            self.ipam.allocate(&device, &wishes.addresses).map_err(|error| self.with_pod(error))?;
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
            port_mappings,
            bandwidth,
            sequence,
        };
        self.pods.insert(record.device.clone(), Held::new(record.clone(), 0));
        Ok(record)
    }

    /// A port of the node leads to one pod.
    fn check_ports(&self, wanted: &[PortMapping]) -> Result<(), CniError> {
        for port in wanted {
            let holds = |held: &&Held| held.device.port_mappings.iter().any(|taken| taken.collides(port));
            if let Some(held) = self.pods.values().find(holds) {
                return Err(CniError::PortTaken { port: *port, pod: held.pod() });
            }
        }
        Ok(())
    }

    /// An address is owned by a device: people know it by its pod.
    fn with_pod(&self, error: IpamError) -> IpamError {
        match error {
            IpamError::Wanted { address, owner } => {
                let owner = self.pods.get(&owner).map_or(owner, |held| format!("pod {}", held.pod()));
                IpamError::Wanted { address, owner }
            }
            other => other,
        }
    }

    pub(super) fn forget(&mut self, device: &str) {
        self.pods.remove(device);
        self.ipam.release(device);
    }
}

impl Held {
    /// Whose device it is, for people.
    fn pod(&self) -> String {
        self.device.pod.as_ref().map_or_else(|| self.device.name.clone(), ToString::to_string)
    }

    pub(super) fn new(record: Record, ifindex: u32) -> Self {
        let device = PodDevice {
            name: record.device.clone(),
            ifindex,
            mac: record.mac,
            netns: Some(record.netns.clone()),
            addresses: record.addresses.clone(),
            pod: record.pod.clone(),
            port_mappings: record.port_mappings.clone(),
            shaped: record.bandwidth.ingress.is_some(),
        };
        Self { record: Some(record), device }
    }
}

/// What the kernel is to make of a pod's device, or has made.
fn link(held: &Held, inside: &str) -> PodLink {
    let PodDevice { name, mac, addresses, .. } = held.device.clone();
    let record = held.record.as_ref();
    let Bandwidth { ingress, egress } = record.map(|record| record.bandwidth).unwrap_or_default();
    PodLink {
        host: name,
        inside: inside.to_owned(),
        mac,
        mtu: record.map_or(0, |record| record.mtu),
        addresses,
        ingress: ingress.map(rate),
        egress: egress.map(rate),
    }
}

/// From bits to bytes.
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

/// Where the runtime's memory of the device and ours differ.
fn remembered_otherwise(held: &Held, addresses: &[IpAddr], mac: Option<&str>) -> Vec<String> {
    let PodDevice { addresses: ours, mac: our_mac, .. } = &held.device;
    let mut problems = Vec::new();
    for address in addresses.iter().filter(|address| !ours.contains(address)) {
        problems.push(format!("prevResult: {address} is not an address of this pod"));
    }
    for address in ours.iter().filter(|address| !addresses.contains(address)) {
        problems.push(format!("prevResult: {address} of this pod is missing"));
    }
    if let Some(mac) = mac.filter(|mac| !mac.eq_ignore_ascii_case(&our_mac.to_string())) {
        problems.push(format!("prevResult: link address {mac} is not that of this pod, which is {our_mac}"));
    }
    problems
}
