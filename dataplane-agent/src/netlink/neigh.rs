//! Permanent neighbour entries: MAC addresses that the kernel does not resolve.

use std::net::IpAddr;

use dataplane_common::abi::MacAddr;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{Netlink, NetlinkError};

/// A permanent neighbour entry of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    pub mac: MacAddr,
}

impl Netlink {
    /// Adds or replaces a permanent neighbour.
    pub async fn ensure_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let request = self.handle.neighbours().add(neighbour.ifindex, neighbour.address);
        let request = request.link_layer_address(&neighbour.mac.bytes()).replace();
        request.execute().await.map_err(|error| NetlinkError::new("add neighbour", neighbour.address, &error))
    }

    /// Removes a neighbour. A missing neighbour is not an error.
    pub async fn remove_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = match address {
            IpAddr::V4(_) => rtnetlink::packet_route::AddressFamily::Inet,
            IpAddr::V6(_) => rtnetlink::packet_route::AddressFamily::Inet6,
        };
        message.header.ifindex = ifindex;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }));
        match self.handle.neighbours().del(message).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match NetlinkError::new("remove neighbour", address, &error) {
                error if matches!(error.errno(), Some(nix::libc::ENOENT | nix::libc::ENODEV)) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// The permanent neighbours of a device.
    pub async fn permanent_neighbours(&self, ifindex: u32) -> Result<Vec<Neighbour>, NetlinkError> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let all = self
            .dump("neighbours", &request, |message| match message {
                RouteNetlinkMessage::NewNeighbour(message) => read(&message),
                _ => None,
            })
            .await?;
        Ok(all.into_iter().filter(|neighbour| neighbour.ifindex == ifindex).collect())
    }
}

fn read(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    Some(Neighbour { ifindex: message.header.ifindex, address: address?, mac: MacAddr::new(mac?) })
}
