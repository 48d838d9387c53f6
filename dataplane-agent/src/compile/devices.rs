//! Uplinks → rows of `DEVICES`.

use std::net::IpAddr;

use dataplane_common::abi::{Addr, Device, DeviceFlags};

use crate::netlink::Uplink;

/// The row of an uplink.
pub fn device(uplink: &Uplink) -> Device {
    let source = |family: fn(&IpAddr) -> bool| {
        uplink.sources.iter().find(|ip| family(ip)).map_or(Addr::UNSPECIFIED, |ip| Addr::from(*ip))
    };
    Device {
        ipv4: source(IpAddr::is_ipv4),
        ipv6: source(IpAddr::is_ipv6),
        flags: if uplink.mac.is_some() { DeviceFlags::ETHERNET } else { 0 },
        mac: uplink.mac.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::abi::MacAddr;

    use super::*;

    #[test]
    fn device_without_an_address_of_a_family_has_none_in_its_row() {
        let ip: IpAddr = "10.0.0.5".parse().unwrap();
        let uplink = Uplink {
            name: "eth0".to_owned(),
            ifindex: 2,
            mtu: 1_500,
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
            addresses: Vec::new(),
            sources: vec![ip],
            bridge: false,
        };
        let row = device(&uplink);
        assert_eq!((row.ipv4, row.ipv6, row.is_ethernet()), (ip.into(), Addr::UNSPECIFIED, true));
        assert_eq!(Some(row.mac), uplink.mac);
        let row = device(&Uplink { mac: None, ..uplink });
        assert_eq!((row.is_ethernet(), row.mac), (false, MacAddr::default()));
    }
}
