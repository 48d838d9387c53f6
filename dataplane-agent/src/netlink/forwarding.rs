//! Notifications of everything that decides where the kernel would forward a packet.

use futures::{FutureExt as _, StreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, new_multicast_connection, packet_core::NetlinkMessage, packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio::task::JoinHandle;

use super::NetlinkError;

/// A subscription to changes of links, addresses, routes, routing rules and neighbours, until it is
/// dropped.
#[derive(Debug)]
pub struct ForwardingMonitor {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl ForwardingMonitor {
    /// Subscribes in the network namespace of the calling thread.
    pub fn open() -> Result<Self, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _, messages) = new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
        Ok(Self { messages, task: tokio::spawn(connection) })
    }

    /// Waits for the next change; takes all that are pending, or lost because there were too many.
    /// False: the socket is closed.
    pub async fn changed(&mut self) -> bool {
        if self.messages.next().await.is_none() {
            return false;
        }
        while let Some(Some(_)) = self.messages.next().now_or_never() {}
        true
    }
}

impl Drop for ForwardingMonitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}
