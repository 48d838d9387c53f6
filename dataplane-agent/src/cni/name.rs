//! Device names and MAC addresses that are computed, so that they need not be stored.

use std::net::IpAddr;

use dataplane_cni::protocol::Attachment;
use dataplane_common::abi::MacAddr;

use crate::netlink::link::{POD_DEVICE_DIGITS, POD_DEVICE_PREFIX};

/// Name of an attachment's host device. It must be the same in all versions of the agent: DEL finds
/// the device by this name even if the record is lost.
pub(super) fn host_device(attachment: &Attachment) -> String {
    let Attachment { container_id, ifname } = attachment;
    // neither can contain a slash
    let hash = fnv1a(format!("{container_id}/{ifname}").as_bytes());
    let digits = format!("{hash:016x}");
    format!("{POD_DEVICE_PREFIX}{}", &digits[digits.len() - POD_DEVICE_DIGITS..])
}

/// MAC address of the device inside the pod: locally administered, unicast, and unique on the node
/// because it contains the pod's address.
pub(super) fn pod_mac(addresses: &[IpAddr]) -> MacAddr {
    let [a, b, c, d] = match addresses.first() {
        Some(IpAddr::V4(v4)) => v4.octets(),
        Some(IpAddr::V6(v6)) => {
            let [.., a, b, c, d] = v6.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    MacAddr::new([0x0a, 0xda, a, b, c, d])
}

/// FNV-1a, 64 bits. Not the standard library's hash, which may change between versions.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_name_is_stable_across_versions() {
        let attachment = Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() };
        let name = host_device(&attachment);
        assert_eq!(name.len(), 13, "a device name has at most 15 bytes");
        assert_eq!(name, host_device(&attachment));
        assert_ne!(name, host_device(&Attachment { ifname: "eth1".to_owned(), ..attachment }));
        // the reference value of the algorithm (draft-eastlake-fnv)
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn mac_is_locally_administered_and_unicast() {
        for address in ["10.1.2.3", "fd00::1"] {
            let [first, ..] = pod_mac(&[address.parse().unwrap()]).bytes();
            assert_eq!(first & 0b11, 0b10, "{address}");
        }
    }
}
