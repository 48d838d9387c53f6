//! XDP features of devices: the generic netlink family `netdev` (Linux 6.3).
//!
//! Implemented here because two messages do not justify a dependency.

use std::io;

use nix::sys::socket::SockProtocol;

use super::{
    socket::{ERROR, NetlinkSocket, REQUEST},
    wire::{attribute, error_of, messages, put_bytes, put_text},
};

/// Size of `genlmsghdr`, which precedes the attributes.
const GENERIC_BYTES: usize = 4;
/// `linux/genetlink.h`: the family that knows the others.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `linux/netdev.h`
const DEV_GET: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
const NDO_XMIT: u64 = 1 << 2;

/// A generic netlink socket of one network namespace.
#[derive(Debug)]
pub struct Netdev {
    socket: NetlinkSocket,
    /// ID of the family `netdev`; `None`: the kernel has none.
    family: Option<u16>,
}

impl Netdev {
    /// Opens the socket in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let socket = NetlinkSocket::open(SockProtocol::NetlinkGeneric)?;
        let mut netdev = Self { socket, family: None };
        let mut name = Vec::new();
        put_text(&mut name, FAMILY_NAME, "netdev");
        netdev.family = match netdev.request(CONTROL, GET_FAMILY, &name, FAMILY_ID) {
            Ok(id) => id.and_then(|id| Some(u16::from_ne_bytes(id.get(..2)?.try_into().ok()?))),
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => None,
            Err(error) => return Err(error),
        };
        Ok(netdev)
    }

    /// Whether the device transmits frames that XDP gives it (`NETDEV_XDP_ACT_NDO_XMIT`). For a
    /// veth device: whether its peer takes them. `None`: the kernel does not tell.
    pub fn transmits_xdp_frames(&mut self, ifindex: u32) -> io::Result<Option<bool>> {
        let Some(family) = self.family else { return Ok(None) };
        let mut device = Vec::new();
        put_bytes(&mut device, IFINDEX, &ifindex.to_ne_bytes());
        let features = self.request(family, DEV_GET, &device, XDP_FEATURES)?;
        let features = features.and_then(|bytes| Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?)));
        Ok(features.map(|features| features & NDO_XMIT != 0))
    }

    /// Sends a request with these attributes, and returns one attribute of the answer.
    fn request(
        &mut self,
        family: u16,
        command: u8,
        attributes: &[u8],
        searched: u16,
    ) -> io::Result<Option<Vec<u8>>> {
        self.socket.request(family, REQUEST, &[&[command, 1, 0, 0], attributes])?;
        loop {
            let buffer = self.socket.receive()?;
            let answer = messages(&buffer).find(|message| message.sequence == self.socket.sequence);
            let Some(answer) = answer else { continue };
            if answer.kind == ERROR {
                return Err(io::Error::from_raw_os_error(error_of(answer.body)));
            }
            let attributes = answer.body.get(GENERIC_BYTES..).unwrap_or_default();
            return Ok(attribute(attributes, searched).map(<[u8]>::to_vec));
        }
    }
}
