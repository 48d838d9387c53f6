//! Decodes a frame with code that is independent of the datapath and the kit: addresses, ports, and
//! a check of every length and checksum.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

/// The header fields of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// Ports; for echo the identifier, twice; 0 without ports and in later fragments.
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) protocol: u8,
    /// Offset of the IP header.
    pub(crate) l3: usize,
    /// Offset of the transport header, after all IP headers.
    pub(crate) l4: usize,
    /// End of the packet by its length field.
    pub(crate) end: usize,
    /// Fragment offset, and whether more follow; (0, false) if not a fragment.
    pub(crate) fragment: (usize, bool),
}

impl Decoded {
    /// Decodes the packet of a frame.
    pub(crate) fn frame(frame: &[u8]) -> Result<Self, String> {
        Self::packet(frame, ETHERNET, word(frame, 12)?)
    }

    /// As [`Self::frame`], with a check of all checksums.
    pub(crate) fn checked(frame: &[u8]) -> Result<Self, String> {
        let read = Self::frame(frame)?;
        if read.fragment == (0, false) {
            read.check_transport(&frame[read.l4..read.end])?;
        }
        Ok(read)
    }

    /// The packet that an ICMP error quotes; `end` is the end of the error.
    pub(crate) fn quoted(&self, frame: &[u8]) -> Result<Self, String> {
        let ether_type = if self.src.is_ipv4() { 0x0800 } else { 0x86dd };
        let mut quoted =
            Self::packet(&[&frame[..self.end], &vec![0; 0xffff]].concat(), self.l4 + 8, ether_type)?;
        quoted.end = quoted.end.min(self.end);
        Ok(quoted)
    }

    fn packet(bytes: &[u8], l3: usize, ether_type: u16) -> Result<Self, String> {
        match ether_type {
            0x0800 => Self::ipv4(bytes, l3),
            0x86dd => Self::ipv6(bytes, l3),
            other => Err(format!("ether type {other:#06x}")),
        }
    }

    fn ipv4(bytes: &[u8], l3: usize) -> Result<Self, String> {
        let first = byte(bytes, l3)?;
        let l4 = l3 + usize::from(first & 15) * 4;
        let header = bytes.get(l3..l4).ok_or("truncated IPv4 header")?;
        if first >> 4 != 4 || header.len() < 20 || sum(header) != 0xffff {
            return Err(format!("wrong IPv4 header: {header:02x?}"));
        }
        let flags = word(bytes, l3 + 6)?;
        let fragment = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&header[at..at + 4]).expect("four bytes"));
        let end = l3 + usize::from(word(bytes, l3 + 2)?);
        Self { l3, l4, end, fragment, ..Self::between(address(12), address(16), header[9]) }.with_ports(bytes)
    }

    fn ipv6(bytes: &[u8], l3: usize) -> Result<Self, String> {
        let header = bytes.get(l3..l3 + 40).ok_or("truncated IPv6 header")?;
        if header[0] >> 4 != 6 {
            return Err(format!("wrong IPv6 header: {header:02x?}"));
        }
        let address =
            |at: usize| IpAddr::from(<[u8; 16]>::try_from(&header[at..at + 16]).expect("sixteen bytes"));
        let end = l3 + 40 + usize::from(word(bytes, l3 + 4)?);
        let (mut protocol, mut l4, mut fragment) = (header[6], l3 + 40, (0, false));
        // hop-by-hop options, routing, fragment, destination options
        while [0, 43, 44, 60].contains(&protocol) && fragment.0 == 0 {
            let len = if protocol == 44 { 8 } else { (usize::from(byte(bytes, l4 + 1)?) + 1) * 8 };
            if protocol == 44 {
                let offset = word(bytes, l4 + 2)?;
                fragment = (usize::from(offset & 0xfff8), offset & 1 != 0);
            }
            protocol = byte(bytes, l4)?;
            l4 += len;
        }
        Self { l3, l4, end, fragment, ..Self::between(address(8), address(24), protocol) }.with_ports(bytes)
    }

    fn between(src: IpAddr, dst: IpAddr, protocol: u8) -> Self {
        let (src, dst) = (SocketAddr::new(src, 0), SocketAddr::new(dst, 0));
        Self { src, dst, protocol, l3: 0, l4: 0, end: 0, fragment: (0, false) }
    }

    fn with_ports(mut self, bytes: &[u8]) -> Result<Self, String> {
        if self.end > bytes.len() || self.l4 > self.end {
            return Err(format!("a packet of {} bytes in a frame of {}", self.end, bytes.len()));
        }
        let (src, dst) = match self.protocol {
            _ if self.fragment.0 > 0 => (0, 0),
            TCP | UDP | SCTP => (word(bytes, self.l4)?, word(bytes, self.l4 + 2)?),
            ICMP | ICMPV6 if self.is_echo(byte(bytes, self.l4)?) => {
                let id = word(bytes, self.l4 + 4)?;
                (id, id)
            }
            _ => (0, 0),
        };
        self.src.set_port(src);
        self.dst.set_port(dst);
        Ok(self)
    }

    fn is_echo(&self, kind: u8) -> bool {
        if self.protocol == ICMP { [0, 8].contains(&kind) } else { [128, 129].contains(&kind) }
    }

    /// Checks the transport checksum of a complete transport packet.
    pub(crate) fn check_transport(&self, transport: &[u8]) -> Result<(), String> {
        let field = self.checksum().and_then(|field| transport.get(field));
        let is_right = match (self.protocol, field) {
            (_, None) => return if self.checksum().is_none() { Ok(()) } else { Err("truncated".to_owned()) },
            // optional in IPv4 (RFC 768), mandatory in IPv6 (RFC 8200 §8.1)
            (UDP, Some([0, 0])) => self.src.is_ipv4(),
            // 0: left to the device
            (SCTP, Some(field)) => *field == [0; 4] || *field == crc32c(transport).to_le_bytes(),
            (ICMP, _) => sum(transport) == 0xffff,
            _ => sum(&[&self.pseudo_header(transport.len()), transport].concat()) == 0xffff,
        };
        if is_right { Ok(()) } else { Err(format!("wrong checksum: {self:?}: {field:02x?}")) }
    }

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for address in [self.src.ip(), self.dst.ip()] {
            match address {
                IpAddr::V4(v4) => bytes.extend(v4.octets()),
                IpAddr::V6(v6) => bytes.extend(v6.octets()),
            }
        }
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([0, 0, 0, self.protocol]);
        bytes
    }

    /// Position of the checksum, relative to [`Self::l4`].
    fn checksum(&self) -> Option<Range<usize>> {
        match self.protocol {
            TCP => Some(16..18),
            UDP => Some(6..8),
            ICMP | ICMPV6 => Some(2..4),
            SCTP => Some(8..12),
            _ => None,
        }
    }

    /// The checksum field, if there is one.
    pub(crate) fn checksum_of<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let field = self.checksum()?;
        frame.get(self.l4 + field.start..self.l4 + field.end)
    }

    /// Bytes that a translation may change: addresses, hop limit, ports, and checksums.
    pub(crate) fn changeable(&self) -> Vec<Range<usize>> {
        let Self { l3, l4, .. } = self;
        let mut ranges = if self.src.is_ipv4() {
            vec![l3 + 8..l3 + 9, l3 + 10..l3 + 20]
        } else {
            std::iter::once(l3 + 7..l3 + 40).collect()
        };
        if self.fragment.0 == 0 {
            let ports = match self.protocol {
                TCP | UDP | SCTP => Some(0..4),
                ICMP | ICMPV6 => Some(4..6),
                _ => None,
            };
            ranges
                .extend([ports, self.checksum()].into_iter().flatten().map(|it| l4 + it.start..l4 + it.end));
        }
        ranges
    }

    /// Bytes that forwarding changes: hop limit, and the IPv4 checksum.
    pub(crate) fn changed_by_forwarding(&self) -> Vec<Range<usize>> {
        let l3 = self.l3;
        if self.src.is_ipv4() {
            vec![l3 + 8..l3 + 9, l3 + 10..l3 + 12]
        } else {
            std::iter::once(l3 + 7..l3 + 8).collect()
        }
    }
}

/// Positions at which two frames differ, except Ethernet headers and these ranges.
pub(crate) fn differences(one: &[u8], other: &[u8], except: &[Range<usize>]) -> Vec<usize> {
    let counts = |at: &usize| *at >= ETHERNET && !except.iter().any(|range| range.contains(at));
    let length = one.len().max(other.len());
    (0..length).filter(counts).filter(|at| one.get(*at) != other.get(*at)).collect()
}

fn byte(bytes: &[u8], at: usize) -> Result<u8, String> {
    bytes.get(at).copied().ok_or_else(|| format!("no byte at {at}"))
}

fn word(bytes: &[u8], at: usize) -> Result<u16, String> {
    Ok(u16::from_be_bytes([byte(bytes, at)?, byte(bytes, at + 1)?]))
}

/// The one's complement sum (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The CRC-32C of an SCTP packet; its checksum field counts as zero (RFC 9260 appendix A).
fn crc32c(packet: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        crc ^= u32::from(if (8..12).contains(&at) { 0 } else { *byte });
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}
