//! IPsec policies of a network namespace (`ip xfrm policy`).
//!
//! Implemented here, because no maintained crate reads them.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    time::Duration,
};

use ipnet::IpNet;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_XFRM};
use tokio::time::timeout;

use super::{
    NetlinkError,
    socket::{DONE, DUMP, ERROR, REQUEST},
    wire::{attribute, error_of, messages, put_message},
};

/// `linux/xfrm.h`: messages, the multicast group of policies (`XFRMNLGRP_POLICY`), attributes.
const NEW_POLICY: u16 = 0x13;
const GET_POLICY: u16 = 0x15;
const POLICY_GROUP: u32 = 4;
const TEMPLATES: u16 = 5;
const MARK: u16 = 21;
const INTERFACE_ID: u16 = 31;
/// Size of `struct xfrm_userpolicy_id`, the body of a request.
const ID_BYTES: usize = 64;
/// Size of `struct xfrm_userpolicy_info`, which attributes follow, and offsets in it.
const INFO_BYTES: usize = 168;
const DESTINATION: usize = 0;
const SOURCE: usize = 16;
const FAMILY: usize = 40;
const DESTINATION_LENGTH: usize = 42;
const SOURCE_LENGTH: usize = 43;
const DIRECTION: usize = 160;
const ACTION: usize = 161;
const OUT: u8 = 1;
const FORWARD: u8 = 2;
const BLOCK: u8 = 1;
/// The kernel responds at once.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The direction of an IPsec policy. Those for packets to the node itself, and those of sockets,
/// are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Packets that leave the node.
    Out,
    /// Packets that arrived and are forwarded.
    Forward,
}

/// A policy that encrypts, requires encryption, or drops. Those that let packets pass as they are
/// are not read, nor those for a device (`if_id`) or for packets with a mark.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IpsecPolicy {
    pub direction: Direction,
    pub source: IpNet,
    pub destination: IpNet,
}

/// A subscription to changes of policies.
pub struct IpsecMonitor {
    /// `None`: the kernel has no IPsec.
    socket: Option<TokioSocket>,
}

impl fmt::Debug for IpsecMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let socket = self.socket.as_ref().map(AsRawFd::as_raw_fd);
        f.debug_struct("IpsecMonitor").field("socket", &socket).finish()
    }
}

impl fmt::Display for IpsecPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Out => "out",
            Direction::Forward => "fwd",
        };
        write!(f, "src {} dst {} dir {direction}", self.source, self.destination)
    }
}

/// The policies of the calling thread's network namespace, sorted. None if the kernel has no IPsec.
pub async fn ipsec_policies() -> Result<Vec<IpsecPolicy>, NetlinkError> {
    let Some(mut socket) = open()? else { return Ok(Vec::new()) };
    let mut policies = list(&mut socket).await.map_err(|source| NetlinkError::Kernel {
        operation: "list",
        object: "IPsec policies".to_owned(),
        source,
    })?;
    policies.sort_unstable();
    policies.dedup();
    Ok(policies)
}

/// `None`: the kernel has no IPsec.
fn open() -> Result<Option<TokioSocket>, NetlinkError> {
    match TokioSocket::new(NETLINK_XFRM) {
        Ok(socket) => Ok(Some(socket)),
        // neither built in nor a module that could be loaded
        Err(error) if error.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => Ok(None),
        Err(error) => Err(NetlinkError::Open(error)),
    }
}

async fn list(socket: &mut TokioSocket) -> io::Result<Vec<IpsecPolicy>> {
    let mut request = Vec::new();
    put_message(&mut request, GET_POLICY, REQUEST | DUMP, 1, &[&[0; ID_BYTES]]);
    socket.send(&request).await?;
    let mut policies = Vec::new();
    loop {
        let (buffer, _) = timeout(RESPONSE_TIMEOUT, socket.recv_from_full()).await??;
        for message in messages(&buffer) {
            match message.kind {
                DONE | ERROR => match error_of(message.body) {
                    0 => return Ok(policies),
                    errno => return Err(io::Error::from_raw_os_error(errno)),
                },
                NEW_POLICY => policies.extend(read(message.body)),
                _ => {}
            }
        }
    }
}

/// Reads a `xfrm_userpolicy_info` and its attributes.
fn read(body: &[u8]) -> Option<IpsecPolicy> {
    let (info, attributes) = body.split_at_checked(INFO_BYTES)?;
    let direction = match info[DIRECTION] {
        OUT => Direction::Out,
        FORWARD => Direction::Forward,
        _ => return None,
    };
    let transforms = attribute(attributes, TEMPLATES).is_some_and(|templates| !templates.is_empty());
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    // value and mask
    let marked = attribute(attributes, MARK).is_some_and(|mark| word(mark, 0) & word(mark, 4) != 0);
    let of_device = attribute(attributes, INTERFACE_ID).is_some_and(|id| word(id, 0) != 0);
    if marked || of_device || !(transforms || info[ACTION] == BLOCK) {
        return None;
    }
    let prefix = |at: usize, length: u8| {
        let bytes: [u8; 16] = info[at..at + 16].try_into().ok()?;
        let address = match i32::from(u16::from_ne_bytes([info[FAMILY], info[FAMILY + 1]])) {
            nix::libc::AF_INET => IpAddr::from(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
            nix::libc::AF_INET6 => IpAddr::from(Ipv6Addr::from(bytes)),
            _ => return None,
        };
        Some(IpNet::new(address, length).ok()?.trunc())
    };
    Some(IpsecPolicy {
        direction,
        source: prefix(SOURCE, info[SOURCE_LENGTH])?,
        destination: prefix(DESTINATION, info[DESTINATION_LENGTH])?,
    })
}

impl IpsecMonitor {
    /// Subscribes in the network namespace of the calling thread.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = open()?;
        if let Some(socket) = &mut socket {
            socket.socket_mut().bind_auto().map_err(NetlinkError::Open)?;
            socket.socket_mut().add_membership(POLICY_GROUP).map_err(NetlinkError::Open)?;
        }
        Ok(Self { socket })
    }

    /// Waits for the next change. For ever if the kernel has no IPsec.
    pub async fn changed(&mut self) -> io::Result<()> {
        let Some(socket) = &mut self.socket else { return std::future::pending().await };
        match socket.recv_from_full().await {
            Ok(_) => Ok(()),
            // messages were lost: something has changed
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
