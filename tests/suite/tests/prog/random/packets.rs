//! Strategies for packets of every kind, and their frames. Uses no program.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{Family, Frame, World, at};
use proptest::{collection::vec, prelude::*, sample::select};

use super::decode::{self, ICMP, ICMPV6, SCTP, TCP, UDP};

/// A protocol without ports.
const GRE: u8 = 47;
/// Ports of the services of `TestNode` at a cluster IP, a load balancer IP and the node's address;
/// each list has a closed port.
const SERVICE_PORTS: [u16; 7] = [80, 81, 82, 83, 84, 85, 9];
const LOAD_BALANCER_PORTS: [u16; 3] = [80, 80, 9];
const NODE_PORTS: [u16; 4] = [30_080, 30_080, HOST_PORT, 22];
/// A host port at the node's address.
pub(crate) const HOST_PORT: u16 = 8_081;

/// A packet and its first hook.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) family: Family,
    pub(crate) hook: HookId,
    pub(crate) protocol: u8,
    /// Index into the sources and the destinations of the hook.
    from: usize,
    to: usize,
    ports: (u16, u16),
    tcp_flags: u8,
    chunk: u8,
    pub(crate) hop_limit: u8,
    payload: Vec<u8>,
    /// Number of IPv4 option words or IPv6 extension headers.
    extras: usize,
    no_checksum: bool,
    /// Bytes of link padding after the packet.
    padding: usize,
}

/// A packet at any hook that translates packets.
pub(crate) fn packet() -> impl Strategy<Value = Packet> {
    packet_at(&[HookId::FromPod, HookId::FromPod, HookId::FromWire, HookId::ToWire, HookId::FromOverlay])
}

/// A packet at one of these hooks.
pub(crate) fn packet_at(hooks: &[HookId]) -> impl Strategy<Value = Packet> + use<> {
    let family = select(Family::BOTH.to_vec());
    let hook = select(hooks.to_vec());
    let protocol = select(vec![TCP, TCP, UDP, UDP, SCTP, ICMP, GRE]);
    let ends = (0..8_usize, 0..22_usize, (1..=u16::MAX, 0..21_u16));
    let tcp_flags = select(vec![0x02_u8, 0x02, 0x10, 0x12, 0x18, 0x11, 0x04, 0xc2, 0x00]);
    let chunk = select(vec![1_u8, 1, 0, 3, 4, 6, 10]);
    let hop_limit = prop_oneof![8 => Just(64_u8), 1 => any::<u8>()];
    let payload = prop_oneof![8 => vec(any::<u8>(), 0..90), 1 => vec(any::<u8>(), 300..1_300)];
    let extras = prop_oneof![4 => Just(0_usize), 1 => 1..8_usize];
    let padding = prop_oneof![4 => Just(0_usize), 1 => 1..20_usize];
    let rest = (tcp_flags, chunk, hop_limit, payload, extras, any::<bool>(), padding);
    (family, hook, protocol, ends, rest).prop_map(|(family, hook, protocol, (from, to, ports), rest)| {
        let (tcp_flags, chunk, hop_limit, payload, extras, no_checksum, padding) = rest;
        let protocol = if protocol == ICMP && family == Family::V6 { ICMPV6 } else { protocol };
        // only these checksums are optional
        let no_checksum = no_checksum && (protocol == SCTP || protocol == UDP && family == Family::V4);
        Packet {
            family,
            hook,
            protocol,
            from,
            to,
            ports,
            tcp_flags,
            chunk,
            hop_limit,
            payload,
            extras,
            no_checksum,
            padding,
        }
    })
}

impl Packet {
    fn world(&self) -> World {
        World::new(self.family)
    }

    /// The source: one that occurs at this hook.
    pub(crate) fn src(&self) -> SocketAddr {
        let world = self.world();
        let senders: &[IpAddr] = match self.hook {
            HookId::FromPod => &[world.pod, world.other_pod],
            HookId::FromWire | HookId::XdpWire => {
                &[world.outside, world.wire_pod, world.wire_node, world.exempt]
            }
            HookId::FromOverlay => &[world.overlay_pod],
            _ => &[world.host, world.pod],
        };
        at(senders[self.from % senders.len()], self.ports.0)
    }

    pub(crate) fn dst(&self) -> SocketAddr {
        let world = self.world();
        let service = world.service.ip();
        let everywhere = [
            service,
            service,
            service,
            service,
            service,
            service,
            service,
            service,
            load_balancer_ips(self.family)[0],
            load_balancer_ips(self.family)[1],
            load_balancer_ips(self.family)[2],
            load_balancer_ips(self.family)[3],
            world.host,
            world.host,
            world.pod,
            world.other_pod,
            world.wire_pod,
            world.overlay_pod,
            world.outside,
            world.exempt,
            world.unassigned,
            world.wire_node,
        ];
        let address = everywhere[self.to];
        let ports: &[u16] = match address {
            _ if address == service => &SERVICE_PORTS,
            _ if address == world.host => &NODE_PORTS,
            _ if load_balancer_ips(self.family).contains(&address) => &LOAD_BALANCER_PORTS,
            _ => &[80],
        };
        at(address, ports[usize::from(self.ports.1) % ports.len()])
    }

    fn frame(&self, src: SocketAddr, dst: SocketAddr) -> Frame {
        let mut frame = match self.protocol {
            ICMP | ICMPV6 => Frame::ping(src.ip(), dst.ip(), self.ports.0),
            protocol => Frame { protocol, ..Frame::udp(src, dst) },
        };
        frame.tcp_flags = self.tcp_flags;
        frame.chunk = self.chunk;
        frame.hop_limit = self.hop_limit;
        frame.payload.clone_from(&self.payload);
        frame.no_checksum = self.no_checksum;
        frame
    }

    /// The frame.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut frame = self.frame(self.src(), self.dst());
        match self.family {
            // "no operation" options
            Family::V4 => frame.extra = vec![1; self.extras * 4],
            Family::V6 => (frame.extra, frame.first_extension) = extensions(self.extras, self.protocol),
        }
        let mut bytes = with_valid_udp_checksum(frame.build());
        bytes.extend(vec![0xa5; self.padding]);
        bytes
    }

    /// Fragments of a packet with the same content, of `units` × 8 bytes each.
    pub(crate) fn fragments(&self, units: usize) -> Vec<Vec<u8>> {
        let whole = with_valid_udp_checksum(self.frame(self.src(), self.dst()).build());
        let l4 = decode::Decoded::frame(&whole).expect("a valid packet").l4;
        let payloads: Vec<&[u8]> = whole[l4..].chunks(units * 8).collect();
        let last = payloads.len() - 1;
        let fragment = |(number, payload): (usize, &&[u8])| {
            let position = ((number * units) as u16, number < last);
            build_fragment(&whole, l4, self.protocol, position, payload)
        };
        payloads.iter().enumerate().map(fragment).collect()
    }

    /// A reply to a packet, from its receiver to its sender.
    pub(crate) fn reply(&self, received: &decode::Decoded) -> Vec<u8> {
        let mut frame = match self.protocol {
            ICMP | ICMPV6 => Frame::pong(received.dst.ip(), received.src.ip(), received.src.port()),
            protocol => Frame { protocol, ..Frame::udp(received.dst, received.src) },
        };
        // a SYN gets a SYN-ACK and an INIT an INIT ACK, all others an ACK or DATA
        frame.tcp_flags = if self.tcp_flags & 0x13 == 0x02 { 0x12 } else { 0x10 };
        frame.chunk = if self.chunk == 1 { 2 } else { 0 };
        frame.payload.clone_from(&self.payload);
        frame.payload.reverse();
        frame.no_checksum = self.no_checksum;
        with_valid_udp_checksum(frame.build())
    }
}

/// Load balancer IPs: with policy Cluster, with policy Local, with DSR, and with source ranges.
pub(crate) fn load_balancer_ips(family: Family) -> [IpAddr; 4] {
    match family {
        Family::V4 => [9, 10, 11, 12].map(|last| IpAddr::from([203, 0, 113, last])),
        Family::V6 => [9, 10, 11, 12].map(|last| IpAddr::from([0x2001, 0xdb8, 0x200, 0, 0, 0, 0, last])),
    }
}

/// `count` extension headers before `protocol`, and the type of the first. Hop-by-hop options come
/// first.
fn extensions(count: usize, protocol: u8) -> (Vec<u8>, Option<u8>) {
    const DESTINATION: u8 = 60;
    let kinds: Vec<u8> = (0..count).map(|number| if number == 0 { 0 } else { DESTINATION }).collect();
    let next = |number: usize| kinds.get(number + 1).copied().unwrap_or(protocol);
    let bytes = (0..count).flat_map(|number| [next(number), 0, 1, 4, 0, 0, 0, 0]).collect();
    (bytes, kinds.first().copied())
}

/// A UDP checksum that comes out as 0 is sent as 0xffff (RFC 768).
fn with_valid_udp_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    let decoded = decode::Decoded::frame(&frame).expect("a valid packet");
    let at = decoded.l4 + 6;
    let field = frame.get(at..at + 2);
    if decoded.protocol == UDP
        && field.is_some_and(|field| field == [0, 0])
        && !has_no_checksum(&decoded, &frame)
    {
        frame[at..at + 2].copy_from_slice(&[0xff, 0xff]);
    }
    frame
}

/// Whether the 0 means no checksum. If the computed checksum is 0, the packet is valid with 0xffff
/// as well.
fn has_no_checksum(decoded: &decode::Decoded, frame: &[u8]) -> bool {
    let mut other = frame.to_vec();
    other[decoded.l4 + 6..decoded.l4 + 8].copy_from_slice(&[0xff, 0xff]);
    decoded.check_transport(&other[decoded.l4..decoded.end]).is_err()
}

fn build_fragment(
    whole: &[u8],
    l4: usize,
    protocol: u8,
    (offset, more): (u16, bool),
    payload: &[u8],
) -> Vec<u8> {
    let mut head = whole[..l4].to_vec();
    if l4 == 34 {
        head[16..18].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
        head[20..22].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
        head[24..26].copy_from_slice(&[0, 0]);
        let sum = !decode::sum(&head[14..34]);
        head[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        head[18..20].copy_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
        head[20] = 44;
        head.extend([protocol, 0]);
        head.extend((offset << 3 | u16::from(more)).to_be_bytes());
        head.extend([0x42; 4]);
    }
    head.extend(payload);
    head
}
