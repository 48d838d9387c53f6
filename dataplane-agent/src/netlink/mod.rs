//! Links, addresses, routes, neighbours, IPsec policies and sysctls of the node's network
//! namespace: the only module that uses rtnetlink.
//!
//! Everything acts on the network namespace of the thread that called [`Netlink::connect`], sysctls
//! on that of the calling thread. The agent's devices are known by their name, its routes by
//! protocol 218. Nothing else is removed, except kube-proxy's rules, by [`nftables`], at the
//! operator's request.

pub mod address;
mod device_choice;
pub mod device_patterns;
mod forwarding;
pub mod link;
pub mod neigh;
pub mod netdev;
pub mod nftables;
pub mod overlay;
pub mod pod;
pub mod reserved_ports;
pub mod route;
pub mod shape;
pub mod sock_diag;
mod socket;
pub mod sysctl;
pub mod uplink;
mod wire;
pub mod xfrm;

use std::{fmt, io, sync::Arc, time::Duration};

use futures::StreamExt as _;
use rtnetlink::{
    Handle, new_connection,
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
};
use tokio::{sync::Mutex, time::sleep};

pub use address::{Change, HostAddress, Monitor};
pub use device_patterns::{DevicePatterns, InvalidPattern};
pub use forwarding::ForwardingMonitor;
pub use link::{Link, LinkHeader};
pub use neigh::Neighbour;
pub use overlay::OverlayDevice;
pub use pod::{PodLink, PodNetns, PodNetnsError};
pub use reserved_ports::{ReservedPorts, ReservedPortsError};
pub use route::KernelRoute;
pub use shape::Rate;
pub use sock_diag::{SockDiag, SockDiagError};
pub use sysctl::{SysctlChange, SysctlError};
pub use uplink::{DeviceChoice, NodeDevices, Uplink};
pub use xfrm::{IpsecMonitor, IpsecPolicy};

/// Why the kernel's network configuration could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("open netlink socket: {0}")]
    Open(#[source] io::Error),
    #[error("{operation} {object}: {source}")]
    Kernel { operation: &'static str, object: String, source: io::Error },
    #[error("{operation} {object}: {detail}")]
    Protocol { operation: &'static str, object: String, detail: String },
    #[error("list {what}: the table changed during each of {DUMP_ATTEMPTS} dumps; retry later")]
    Interrupted { what: &'static str },
}

impl NetlinkError {
    /// The error number, if the kernel returned an error.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    fn new(operation: &'static str, object: impl fmt::Display, error: &rtnetlink::Error) -> Self {
        let object = object.to_string();
        match error {
            rtnetlink::Error::NetlinkError(message) => {
                Self::Kernel { operation, object, source: message.to_io() }
            }
            other => Self::Protocol { operation, object, detail: other.to_string() },
        }
    }
}

/// `NLM_F_DUMP_INTR` of linux/netlink.h: the table changed during the dump.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often an inconsistent dump is repeated.
const DUMP_ATTEMPTS: u32 = 8;
/// Wait for the end of an abandoned dump of the same socket.
const DUMP_BUSY: Duration = Duration::from_millis(20);

/// A connection to rtnetlink. Clones share it.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    /// A socket can have one dump at a time: the kernel refuses another with EBUSY
    /// (`net/netlink/af_netlink.c`, `__netlink_dump_start`).
    dump_lock: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread. A task of the current runtime
    /// serves it.
    pub fn connect() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle, dump_lock: Arc::default() })
    }

    /// The underlying rtnetlink handle.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Dumps a table. If the table changed during the dump, the kernel sets `NLM_F_DUMP_INTR` or
    /// fails with EINTR: rows may be missing or duplicated, so the dump is repeated.
    async fn dump<T>(
        &self,
        what: &'static str,
        request: &RouteNetlinkMessage,
        pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let _guard = self.dump_lock.lock().await;
        'attempt: for _ in 0..DUMP_ATTEMPTS {
            let mut message = NetlinkMessage::from(request.clone());
            message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut handle = self.handle.clone();
            let mut responses =
                handle.request(message).map_err(|error| NetlinkError::new("list", what, &error))?;
            let mut rows = Vec::new();
            let mut consistent = true;
            while let Some(response) = responses.next().await {
                consistent &= response.header.flags & NLM_F_DUMP_INTR == 0;
                match response.payload {
                    NetlinkPayload::InnerMessage(row) => rows.extend(pick(row)),
                    NetlinkPayload::Error(error) => {
                        let source = error.to_io();
                        if source.kind() == io::ErrorKind::Interrupted {
                            continue 'attempt;
                        }
                        // a cancelled dump of this socket has not ended yet
                        if source.kind() == io::ErrorKind::ResourceBusy {
                            sleep(DUMP_BUSY).await;
                            continue 'attempt;
                        }
                        return Err(NetlinkError::Kernel {
                            operation: "list",
                            object: what.to_owned(),
                            source,
                        });
                    }
                    _ => {}
                }
            }
            if consistent {
                return Ok(rows);
            }
        }
        Err(NetlinkError::Interrupted { what })
    }
}
