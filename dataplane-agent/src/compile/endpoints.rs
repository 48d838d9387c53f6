//! Local pods and the host's addresses → entries of `ENDPOINTS`.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::abi::{Addr, Endpoint, MacAddr};

/// The part of a pod's device that the datapath uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDevice {
    pub addresses: Vec<IpAddr>,
    /// Host-side device.
    pub ifindex: u32,
    /// MAC address of the device inside the pod.
    pub mac: MacAddr,
    /// Ingress bandwidth is limited by the queue of the host-side device.
    pub shaped: bool,
    /// The device is down at one end.
    pub down: bool,
}

/// The entries of a pod.
pub fn pod(device: &PodDevice) -> Vec<(Addr, Endpoint)> {
    let endpoint = endpoint(device);
    distinct(device.addresses.iter().copied()).map(|addr| (addr, endpoint)).collect()
}

/// The value shared by all entries of a pod.
pub fn endpoint(device: &PodDevice) -> Endpoint {
    let endpoint = Endpoint::pod(device.ifindex, device.mac);
    let endpoint = if device.shaped { endpoint.with_queue() } else { endpoint };
    if device.down { endpoint.with_device_down() } else { endpoint }
}

/// The entries of the host. An address on several devices is one entry.
pub fn host(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<(Addr, Endpoint)> {
    distinct(addresses).map(|addr| (addr, Endpoint::host())).collect()
}

fn distinct(addresses: impl IntoIterator<Item = IpAddr>) -> impl Iterator<Item = Addr> {
    addresses.into_iter().map(Addr::from).collect::<BTreeSet<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_has_entry_per_address_family() {
        let mac = MacAddr::new([2, 0, 0, 0, 0, 1]);
        let addresses = ["10.1.0.2", "fd01::2"].map(|ip| ip.parse().unwrap()).to_vec();
        let entries =
            pod(&PodDevice { addresses: addresses.clone(), ifindex: 7, mac, shaped: false, down: false });
        let mut listed: Vec<_> = entries.iter().map(|(addr, _)| addr.to_ip()).collect();
        listed.sort();
        assert_eq!(listed, addresses);
        assert!(entries.iter().all(|(_, endpoint)| *endpoint == Endpoint::pod(7, mac)));
    }

    #[test]
    fn host_address_on_two_devices_is_one_entry() {
        let ip = "10.0.0.1".parse().unwrap();
        assert_eq!(host([ip, ip]), [(ip.into(), Endpoint::host())]);
    }
}
