//! Network devices (links).

use std::pin::pin;

use dataplane_common::abi::MacAddr;
use futures::TryStreamExt as _;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec,
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    },
};

use super::{Netlink, NetlinkError};

/// Prefix of the names of pod devices.
pub const POD_DEVICE_PREFIX: &str = "dp";
/// Number of hexadecimal digits after the prefix.
pub const POD_DEVICE_DIGITS: usize = 11;
/// MAC address of the host side of every pod device.
pub const HOST_MAC: MacAddr = MacAddr::new([0x0e, 0xda, 0x7a, 0, 0, 1]);

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of the kernel")]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
    pub mtu: u32,
    /// `None` for devices without Ethernet addresses (tunnels).
    pub mac: Option<MacAddr>,
    /// Administrative state.
    pub up: bool,
    /// The other end of the link is up, too.
    pub carrier: bool,
    pub loopback: bool,
    pub link_header: LinkHeader,
    /// Index of the bridge, bond, team or VRF that the device is a port of.
    pub controller: Option<u32>,
    /// The device does not resolve neighbours (`IFF_NOARP`).
    pub noarp: bool,
    pub(super) kind: Option<InfoKind>,
    pub(super) data: Option<InfoData>,
}

/// What is in front of the IP header of a packet that passes a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkHeader {
    Ethernet,
    /// Nothing: `WireGuard`, tun, IPIP.
    None,
    /// What the datapath does not know (InfiniBand, PPP, GRE).
    Other,
}

impl LinkHeader {
    /// By the type of the device. Without a header: those whose header the kernel takes off a
    /// redirected packet (`dev_is_mac_header_xmit`, Linux 5.10), but for GRE, which may have one of
    /// its own.
    const fn of(link_type: LinkLayerType) -> Self {
        match link_type {
            LinkLayerType::Ether => Self::Ethernet,
            LinkLayerType::None
            | LinkLayerType::Rawip
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit => Self::None,
            _ => Self::Other,
        }
    }
}

impl Netlink {
    /// All devices.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump("devices", &request, |message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(Link::read(message)),
            _ => None,
        })
        .await
    }

    /// The device with this name, if it exists.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        // not from a dump of all devices: there may be hundreds, and a dump is repeated when pods
        // are added meanwhile
        let mut answer = pin!(self.handle.link().get().match_name(name).execute());
        match answer.try_next().await {
            Ok(message) => Ok(message.map(Link::read)),
            Err(error) => match NetlinkError::new("find device", name, &error) {
                error if error.errno() == Some(nix::libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Sets a device up.
    pub async fn set_up(&self, link: &Link) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.ifindex).up().build();
        self.set_link("set up device", link, message).await
    }

    /// Deletes a device. A missing device is not an error.
    pub async fn delete_link(&self, link: &Link) -> Result<(), NetlinkError> {
        match self.handle.link().del(link.ifindex).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match NetlinkError::new("delete device", &link.name, &error) {
                error if error.errno() == Some(nix::libc::ENODEV) => Ok(()),
                error => Err(error),
            },
        }
    }

    pub(super) async fn set_link(
        &self,
        operation: &'static str,
        link: &Link,
        message: LinkMessage,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.link().set(message);
        request.execute().await.map_err(|error| NetlinkError::new(operation, &link.name, &error))
    }

    pub(super) async fn add_link<T>(
        &self,
        name: &str,
        message: LinkMessageBuilder<T>,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.link().add(message.build());
        request.execute().await.map_err(|error| NetlinkError::new("create device", name, &error))
    }
}

impl Link {
    /// Whether this is the host side of a pod device: a veth named `dp` and 11 hexadecimal digits,
    /// with the MAC address of all pod devices. One of the three alone could be a coincidence.
    pub fn is_pod_device(&self) -> bool {
        let named = self.name.strip_prefix(POD_DEVICE_PREFIX).is_some_and(|rest| {
            rest.len() == POD_DEVICE_DIGITS && rest.bytes().all(|digit| digit.is_ascii_hexdigit())
        });
        named && self.kind == Some(InfoKind::Veth) && self.mac == Some(HOST_MAC)
    }

    pub fn is_vxlan(&self) -> bool {
        self.kind == Some(InfoKind::Vxlan)
    }

    /// Whether packets that are redirected to it arrive at the other end.
    pub const fn delivers(&self) -> bool {
        self.up && self.carrier
    }

    /// An Ethernet device of which only the name is set.
    #[cfg(test)]
    pub(crate) fn named(name: &str) -> Self {
        let mut link = Self::read(LinkMessage::default());
        name.clone_into(&mut link.name);
        link.link_header = LinkHeader::Ethernet;
        link
    }

    fn read(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            ifindex: message.header.index,
            name: String::new(),
            mtu: 0,
            mac: None,
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            link_header: LinkHeader::of(message.header.link_layer_type),
            controller: None,
            loopback: flags.contains(LinkFlags::Loopback),
            noarp: flags.contains(LinkFlags::Noarp),
            kind: None,
            data: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(bytes) => link.mac = <[u8; 6]>::try_from(bytes).ok().map(MacAddr::new),
                LinkAttribute::Controller(ifindex) => {
                    link.controller = Some(ifindex).filter(|index| *index != 0);
                }
                LinkAttribute::LinkInfo(infos) => link.read_info(infos),
                _ => {}
            }
        }
        link
    }

    fn read_info(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = Some(kind),
                LinkInfo::Data(data) => self.data = Some(data),
                _ => {}
            }
        }
    }
}
