//! `SERVICE_PORTS`, `FLOW_PORTS`: ports of the node's own addresses that may be translated.
//!
//! A packet to another port is the host's own, without a lookup of a flow or frontend. Each map is
//! an array of chunks of [`PortSet::CHUNK`] ports, one byte for each; not 0: some frontend had the
//! port (whatever its address), or a flow. Bytes are set and never cleared. They are bytes, because
//! CPUs set neighbouring ones at the same time.

use super::Port;
use crate::net::Protocol;

/// Where a port is in `SERVICE_PORTS` and `FLOW_PORTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSet;

/// The chunk, and the byte in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPlace {
    /// Index into the array.
    pub chunk: u32,
    /// Index into the chunk, below [`PortSet::CHUNK`].
    pub byte: usize,
}

impl PortSet {
    /// Ports of a chunk.
    pub const CHUNK: usize = 1_024;
    /// Protocols with ports: TCP, UDP, SCTP.
    const PROTOCOLS: u32 = 3;
    /// Chunks of a protocol.
    const OF_PROTOCOL: u32 = 65_536 / Self::CHUNK as u32;
    /// The chunk behind all ports. Its first byte is not 0 once the agent has prepared the map: all
    /// ports are set in one that is newer than the flows and frontends.
    pub const PREPARED: u32 = Self::PROTOCOLS * Self::OF_PROTOCOL;
    /// Entries of the array.
    pub const ENTRIES: u32 = Self::PREPARED + 1;

    /// The place of a port; `None` for a protocol without ports.
    #[inline(always)]
    pub const fn place(protocol: u8, port: Port) -> Option<PortPlace> {
        let of_protocol = match protocol {
            Protocol::TCP => 0,
            Protocol::UDP => 1,
            Protocol::SCTP => 2,
            _ => return None,
        };
        let port = port.get();
        Some(PortPlace {
            chunk: of_protocol * Self::OF_PROTOCOL + port as u32 / Self::CHUNK as u32,
            byte: port as usize % Self::CHUNK,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_of_each_protocol_has_a_byte_of_its_own() {
        let mut places = std::collections::HashSet::new();
        for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
            for port in 0..=u16::MAX {
                let place = PortSet::place(protocol, Port::new(port)).unwrap();
                assert!(place.chunk < PortSet::PREPARED && place.byte < PortSet::CHUNK);
                assert!(places.insert((place.chunk, place.byte)));
            }
        }
        assert_eq!(PortSet::place(Protocol::ICMP, Port::new(1)), None);
    }
}
