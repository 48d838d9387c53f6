//! Packets of every kind a node meets, and the frames they are. Knows no program.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{Family, Frame, World, at};
use proptest::{collection::vec, prelude::*, sample::select};

use super::wire::{self, ICMP, ICMPV6, SCTP, TCP, UDP};

/// A protocol without ports.
const GRE: u8 = 47;
/// Ports of services in the world of these tests (`stage`) at the address of a service, of a balancer and of the node; each
/// with one that nobody has.
const OF_SERVICE: [u16; 7] = [80, 81, 82, 83, 84, 85, 9];
const OF_BALANCER: [u16; 3] = [80, 80, 9];
const OF_NODE: [u16; 4] = [30_080, 30_080, HOST_PORT, 22];
/// Of a pod, at the node's address.
pub(crate) const HOST_PORT: u16 = 8_081;

/// A packet, and where it is met.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) family: Family,
    pub(crate) hook: HookId,
    pub(crate) protocol: u8,
    /// Which of those who may send here; to which of those who may be asked.
    from: usize,
    to: usize,
    ports: (u16, u16),
    tcp_flags: u8,
    chunk: u8,
    pub(crate) hop_limit: u8,
    payload: Vec<u8>,
    /// IPv4 options in words, IPv6 extension headers.
    extras: usize,
    no_checksum: bool,
    /// Behind the packet.
    padding: usize,
}

/// A packet at any place where packets are translated.
pub(crate) fn packet() -> impl Strategy<Value = Packet> {
    packet_at(&[HookId::FromPod, HookId::FromPod, HookId::FromWire, HookId::ToWire, HookId::FromOverlay])
}

/// A packet at one of these places.
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
        // IPv4 has room for ten words
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

    /// Who is known to speak where the packet is met.
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
            balancers(self.family)[0],
            balancers(self.family)[1],
            balancers(self.family)[2],
            balancers(self.family)[3],
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
            _ if address == service => &OF_SERVICE,
            _ if address == world.host => &OF_NODE,
            _ if balancers(self.family).contains(&address) => &OF_BALANCER,
            _ => &[80],
        };
        at(address, ports[usize::from(self.ports.1) % ports.len()])
    }

    fn described(&self, src: SocketAddr, dst: SocketAddr) -> Frame {
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
        let mut frame = self.described(self.src(), self.dst());
        match self.family {
            // "no operation", as often as it goes
            Family::V4 => frame.extra = vec![1; self.extras * 4],
            Family::V6 => (frame.extra, frame.first_extension) = extensions(self.extras, self.protocol),
        }
        let mut bytes = finished(frame.build());
        bytes.extend(vec![0xa5; self.padding]);
        bytes
    }

    /// The parts of a packet of the same content, of so many bytes each, to be multiplied by eight.
    pub(crate) fn parts(&self, units: usize) -> Vec<Vec<u8>> {
        let whole = finished(self.described(self.src(), self.dst()).build());
        let l4 = wire::Read::frame(&whole).expect("a packet of ours").l4;
        let pieces: Vec<&[u8]> = whole[l4..].chunks(units * 8).collect();
        let last = pieces.len() - 1;
        let part = |(number, piece): (usize, &&[u8])| {
            let place = ((number * units) as u16, number < last);
            cut(&whole, l4, self.protocol, place, piece)
        };
        pieces.iter().enumerate().map(part).collect()
    }

    /// A packet back, from who got it to whom it came from.
    pub(crate) fn reply(&self, got: &wire::Read) -> Vec<u8> {
        let mut frame = match self.protocol {
            ICMP | ICMPV6 => Frame::pong(got.dst.ip(), got.src.ip(), got.src.port()),
            protocol => Frame { protocol, ..Frame::udp(got.dst, got.src) },
        };
        // what is about to end must not begin, and the other way round
        frame.tcp_flags = if self.tcp_flags & 0x13 == 0x02 { 0x12 } else { 0x10 };
        frame.chunk = if self.chunk == 1 { 2 } else { 0 };
        frame.payload.clone_from(&self.payload);
        frame.payload.reverse();
        frame.no_checksum = self.no_checksum;
        finished(frame.build())
    }
}

/// Addresses of balancers: the second is of policy Local, the third of direct server return, the fourth for some clients only.
pub(crate) fn balancers(family: Family) -> [IpAddr; 4] {
    match family {
        Family::V4 => [9, 10, 11, 12].map(|last| IpAddr::from([203, 0, 113, last])),
        Family::V6 => [9, 10, 11, 12].map(|last| IpAddr::from([0x2001, 0xdb8, 0x200, 0, 0, 0, 0, last])),
    }
}

/// So many extension headers before `protocol`, and what the first is. Hop-by-hop options come first, if at all.
fn extensions(count: usize, protocol: u8) -> (Vec<u8>, Option<u8>) {
    const DESTINATION: u8 = 60;
    let kinds: Vec<u8> = (0..count).map(|number| if number == 0 { 0 } else { DESTINATION }).collect();
    let next = |number: usize| kinds.get(number + 1).copied().unwrap_or(protocol);
    let bytes = (0..count).flat_map(|number| [next(number), 0, 1, 4, 0, 0, 0, 0]).collect();
    (bytes, kinds.first().copied())
}

/// A UDP checksum that comes out as 0 is sent as 0xffff (RFC 768).
fn finished(mut frame: Vec<u8>) -> Vec<u8> {
    let read = wire::Read::frame(&frame).expect("a packet of ours");
    let at = read.l4 + 6;
    let field = frame.get(at..at + 2);
    if read.protocol == UDP && field.is_some_and(|field| field == [0, 0]) && !is_meant_without(&read, &frame)
    {
        frame[at..at + 2].copy_from_slice(&[0xff, 0xff]);
    }
    frame
}

/// A sum that is 0 by itself would be 0xffff with a field of 0: it is only then that 0 was computed.
fn is_meant_without(read: &wire::Read, frame: &[u8]) -> bool {
    let mut other = frame.to_vec();
    other[read.l4 + 6..read.l4 + 8].copy_from_slice(&[0xff, 0xff]);
    read.check_transport(&other[read.l4..read.end]).is_err()
}

fn cut(whole: &[u8], l4: usize, protocol: u8, (offset, more): (u16, bool), piece: &[u8]) -> Vec<u8> {
    let mut head = whole[..l4].to_vec();
    if l4 == 34 {
        head[16..18].copy_from_slice(&((20 + piece.len()) as u16).to_be_bytes());
        head[20..22].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
        head[24..26].copy_from_slice(&[0, 0]);
        let sum = !wire::sum(&head[14..34]);
        head[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        head[18..20].copy_from_slice(&((8 + piece.len()) as u16).to_be_bytes());
        head[20] = 44;
        head.extend([protocol, 0]);
        head.extend((offset << 3 | u16::from(more)).to_be_bytes());
        head.extend([0x42; 4]);
    }
    head.extend(piece);
    head
}
