//! Builds packets for tests, and parses packets for comparison.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::{checksum, crc32c, net::Protocol};

/// Destination MAC address of test frames; source MAC address of packets to pods.
pub const HOST_MAC: [u8; 6] = [0x0e, 0xda, 0x7a, 0, 0, 1];
/// MAC address of every node's overlay device.
pub const OVERLAY_MAC: [u8; 6] = [0x0e, 0xda, 0x7a, 0, 0, 2];
const SENDER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

/// A packet to build. Fields that a test does not set have the values of a plain packet.
#[derive(Clone, Debug)]
pub struct Frame {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub protocol: u8,
    pub hop_limit: u8,
    pub tcp_flags: u8,
    /// Type of the only SCTP chunk.
    pub chunk: u8,
    pub payload: Vec<u8>,
    /// ICMP type and code; the echo identifier is the source port.
    pub icmp: (u8, u8),
    /// IPv4: options; IPv6: extension headers, the first of which `first_extension` names.
    pub extra: Vec<u8>,
    pub first_extension: Option<u8>,
    /// Fragment offset in units of 8 bytes, and whether more follow.
    pub fragment: Option<(u16, bool)>,
    pub id: u16,
    /// IPv4: DF, do not fragment. IPv6 routers never fragment.
    pub dont_fragment: bool,
    /// UDP over IPv4 without a checksum; SCTP with one that the device has yet to compute.
    pub no_checksum: bool,
}

/// The fields of a valid frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    pub eth_dst: [u8; 6],
    pub eth_src: [u8; 6],
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub hop_limit: u8,
    /// 0 for protocols without ports; echo: both are the identifier.
    pub src_port: u16,
    pub dst_port: u16,
    /// The bytes after the transport header.
    pub payload: Vec<u8>,
}

impl Frame {
    fn new(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        assert_eq!(src.is_ipv4(), dst.is_ipv4(), "a packet has one family");
        Self {
            src,
            dst,
            protocol,
            hop_limit: 64,
            tcp_flags: 0x10,
            chunk: 0,
            payload: b"payload".to_vec(),
            icmp: (0, 0),
            extra: Vec::new(),
            first_extension: None,
            fragment: None,
            id: 0x4242,
            dont_fragment: false,
            no_checksum: false,
        }
    }

    pub fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        Self::new(Protocol::UDP, src, dst)
    }

    pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self { tcp_flags: flags, ..Self::new(Protocol::TCP, src, dst) }
    }

    pub fn sctp(src: SocketAddr, dst: SocketAddr, chunk: u8) -> Self {
        Self { chunk, ..Self::new(Protocol::SCTP, src, dst) }
    }

    /// An echo request with the identifier `id`.
    pub fn ping(src: IpAddr, dst: IpAddr, id: u16) -> Self {
        let protocol = if src.is_ipv4() { Protocol::ICMP } else { Protocol::ICMPV6 };
        let icmp = if src.is_ipv4() { (8, 0) } else { (128, 0) };
        Self { icmp, ..Self::new(protocol, SocketAddr::new(src, id), SocketAddr::new(dst, id)) }
    }

    /// An echo reply with the identifier `id`.
    pub fn pong(src: IpAddr, dst: IpAddr, id: u16) -> Self {
        let icmp = if src.is_ipv4() { (0, 0) } else { (129, 0) };
        Self { icmp, ..Self::ping(src, dst, id) }
    }

    /// "Fragmentation needed" or "packet too big" from `router` to `dst` about the packet `about`.
    pub fn too_big(router: IpAddr, dst: IpAddr, about: &[u8]) -> Self {
        let icmp = if router.is_ipv4() { (3, 4) } else { (2, 0) };
        let carried = &about[14..about.len().min(14 + 68)];
        Self { icmp, payload: carried.to_vec(), ..Self::ping(router, dst, 0) }
    }

    /// The bytes, from the Ethernet header on.
    pub fn build(&self) -> Vec<u8> {
        let transport = self.transport();
        let mut frame = [HOST_MAC, SENDER_MAC].concat();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                frame.extend(0x0800_u16.to_be_bytes());
                let header_len = 20 + self.extra.len();
                let fragment = self.fragment.map_or(0, |(offset, more)| offset | u16::from(more) << 13)
                    | u16::from(self.dont_fragment) << 14;
                let mut header = vec![0x40 | (header_len / 4) as u8, 0];
                header.extend(((header_len + transport.len()) as u16).to_be_bytes());
                header.extend(self.id.to_be_bytes());
                header.extend(fragment.to_be_bytes());
                header.extend([self.hop_limit, self.protocol, 0, 0]);
                header.extend(src.octets());
                header.extend(dst.octets());
                header.extend(&self.extra);
                let sum = checksum::of(&header);
                header[10..12].copy_from_slice(&sum.to_ne_bytes());
                frame.extend(header);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                frame.extend(0x86dd_u16.to_be_bytes());
                let mut extensions = self.extra.clone();
                if let Some((offset, more)) = self.fragment {
                    extensions.extend([self.protocol, 0]);
                    extensions.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    extensions.extend(u32::from(self.id).to_be_bytes());
                }
                let first = match (self.first_extension, self.fragment) {
                    (Some(first), _) => first,
                    (None, Some(_)) => Protocol::FRAGMENT,
                    (None, None) => self.protocol,
                };
                frame.extend([0x60, 0, 0, 0]);
                frame.extend(((extensions.len() + transport.len()) as u16).to_be_bytes());
                frame.extend([first, self.hop_limit]);
                frame.extend(src.octets());
                frame.extend(dst.octets());
                frame.extend(extensions);
            }
            _ => unreachable!("checked in `new`"),
        }
        frame.extend(transport);
        frame
    }

    fn transport(&self) -> Vec<u8> {
        if self.fragment.is_some_and(|(offset, _)| offset > 0) {
            return self.payload.clone();
        }
        let (src_port, dst_port) = (self.src.port().to_be_bytes(), self.dst.port().to_be_bytes());
        let mut bytes = Vec::new();
        let checksum_at = match self.protocol {
            Protocol::TCP => {
                bytes.extend([src_port, dst_port].concat());
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, self.tcp_flags, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
            Protocol::UDP => {
                bytes.extend([src_port, dst_port].concat());
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0, 0]);
                6
            }
            Protocol::ICMP | Protocol::ICMPV6 => {
                bytes.extend([self.icmp.0, self.icmp.1, 0, 0]);
                bytes.extend(src_port);
                bytes.extend([0, 1]);
                2
            }
            Protocol::SCTP => return self.sctp_packet(),
            _ => {
                bytes.extend(&self.payload);
                return bytes;
            }
        };
        bytes.extend(&self.payload);
        if !self.no_checksum {
            let sum = pseudo_sum(self.src.ip(), self.dst.ip(), self.protocol, bytes.len());
            let sum = !checksum::fold(checksum::sum(&bytes) + sum);
            bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_ne_bytes());
        }
        bytes
    }

    /// SCTP header and chunk. The verification tag of INIT is zero.
    fn sctp_packet(&self) -> Vec<u8> {
        let mut bytes = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        bytes.extend(if self.chunk == 1 { [0; 4] } else { [0xca, 0xfe, 0xba, 0xbe] });
        bytes.extend([0, 0, 0, 0, self.chunk, 0]);
        bytes.extend(((4 + self.payload.len()) as u16).to_be_bytes());
        bytes.extend(&self.payload);
        if !self.no_checksum {
            let sum = sctp_checksum(&bytes);
            bytes[8..12].copy_from_slice(&sum);
        }
        bytes
    }
}

/// The SCTP checksum of a packet; its checksum field counts as zero.
fn sctp_checksum(transport: &[u8]) -> [u8; 4] {
    let (head, tail) = transport.split_at(8);
    crc32c::of(&[head, &[0; 4], &tail[4..]].concat()).to_le_bytes()
}

/// Checksum of the pseudo-header; zero for ICMP over IPv4, which has none.
pub(crate) fn pseudo_sum(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u64 {
    if protocol == Protocol::ICMP {
        return 0;
    }
    let mut bytes = Vec::new();
    for ip in [src, dst] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    checksum::sum(&bytes)
}

impl Parsed {
    /// Parses a frame without fragments or extension headers.
    ///
    /// # Errors
    /// A description of a wrong length or checksum.
    pub fn read(frame: &[u8]) -> Result<Self, String> {
        let ether_type = u16::from_be_bytes([frame[12], frame[13]]);
        let (src, dst, protocol, hop_limit, transport) = match ether_type {
            0x0800 => {
                let header = &frame[14..14 + usize::from(frame[14] & 15) * 4];
                if checksum::fold(checksum::sum(header)) != 0xffff {
                    return Err("IPv4 header checksum is wrong".to_owned());
                }
                let src: [u8; 4] = header[12..16].try_into().map_err(|_length| "short")?;
                let dst: [u8; 4] = header[16..20].try_into().map_err(|_length| "short")?;
                let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
                let transport = &frame[14 + header.len()..14 + total];
                (IpAddr::from(src), IpAddr::from(dst), header[9], header[8], transport)
            }
            0x86dd => {
                let header = &frame[14..54];
                let src: [u8; 16] = header[8..24].try_into().map_err(|_length| "short")?;
                let dst: [u8; 16] = header[24..40].try_into().map_err(|_length| "short")?;
                let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
                (IpAddr::from(src), IpAddr::from(dst), header[6], header[7], &frame[54..54 + len])
            }
            other => return Err(format!("ether type {other:#06x}")),
        };
        let header_len = match protocol {
            Protocol::TCP => usize::from(transport[12] >> 4) * 4,
            Protocol::UDP | Protocol::ICMP | Protocol::ICMPV6 => 8,
            Protocol::SCTP => 16,
            _ => 0,
        };
        if protocol == Protocol::SCTP {
            let field = &transport[8..12];
            if field != [0; 4] && field != sctp_checksum(transport) {
                return Err("SCTP checksum is wrong".to_owned());
            }
        }
        let no_checksum =
            protocol == Protocol::SCTP || protocol == Protocol::UDP && transport[6..8] == [0, 0];
        let sum = checksum::sum(transport) + pseudo_sum(src, dst, protocol, transport.len());
        if header_len > 0 && !no_checksum && checksum::fold(sum) != 0xffff {
            return Err(format!("transport checksum of protocol {protocol} is wrong"));
        }
        let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
        let (src_port, dst_port) = match protocol {
            Protocol::TCP | Protocol::UDP | Protocol::SCTP => (port(0), port(2)),
            Protocol::ICMP | Protocol::ICMPV6 => (port(4), port(4)),
            _ => (0, 0),
        };
        Ok(Self {
            eth_dst: frame[0..6].try_into().map_err(|_length| "short")?,
            eth_src: frame[6..12].try_into().map_err(|_length| "short")?,
            src,
            dst,
            protocol,
            hop_limit,
            src_port,
            dst_port,
            payload: transport[header_len..].to_vec(),
        })
    }

    /// Source and destination address and port.
    pub fn tuple(&self) -> (SocketAddr, SocketAddr) {
        (SocketAddr::new(self.src, self.src_port), SocketAddr::new(self.dst, self.dst_port))
    }
}
