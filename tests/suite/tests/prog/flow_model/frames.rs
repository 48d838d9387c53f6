//! Packets as bytes.

use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow};
use dataplane_testkit::prog::{Frame, Parsed, at};

use super::connection::{SCTP, Sign, TCP, Tuple, UDP};

/// The tuple of a packet, whose checksums are checked.
pub(crate) fn tuple(frame: &[u8]) -> Result<Tuple> {
    let parsed = Parsed::read(frame).map_err(|wrong| anyhow!(wrong))?;
    let (src, dst) = parsed.tuple();
    Ok(Tuple { protocol: parsed.protocol, src, dst })
}

/// The packet that an ICMP error quotes.
pub(crate) fn quoted_tuple(frame: &[u8]) -> Result<Tuple> {
    let is_v4 = frame[12..14] == [0x08, 0x00];
    let (at_ip, length) = if is_v4 { (14 + 20 + 8, 20) } else { (14 + 40 + 8, 40) };
    let header = frame.get(at_ip..at_ip + length + 8).context("short")?;
    let (protocol, src, dst) = if is_v4 {
        let ip = |from: usize| -> Result<IpAddr> { Ok(<[u8; 4]>::try_from(&header[from..from + 4])?.into()) };
        (header[9], ip(12)?, ip(16)?)
    } else {
        let ip =
            |from: usize| -> Result<IpAddr> { Ok(<[u8; 16]>::try_from(&header[from..from + 16])?.into()) };
        (header[6], ip(8)?, ip(24)?)
    };
    let port = |from: usize| u16::from_be_bytes([header[length + from], header[length + from + 1]]);
    let (src_port, dst_port) =
        if [1, 58].contains(&protocol) { (port(4), port(4)) } else { (port(0), port(2)) };
    Ok(Tuple { protocol, src: at(src, src_port), dst: at(dst, dst_port) })
}

/// A packet of this tuple.
pub(crate) fn build(Tuple { protocol, src, dst }: Tuple, sign: Sign) -> Vec<u8> {
    let frame = match (protocol, sign) {
        (TCP, _) => {
            let flags = match sign {
                Sign::Open => 0x02,
                Sign::OpenAnswer => 0x12,
                Sign::End => 0x11,
                Sign::Reset => 0x04,
                Sign::Void => 0,
                Sign::VoidEnd => 0x01,
                _ => 0x10,
            };
            Frame::tcp(src, dst, flags)
        }
        (SCTP, _) => {
            let chunk = match sign {
                Sign::Open => 1,
                Sign::OpenAnswer => 2,
                Sign::Reset => 6,
                Sign::End => 7,
                _ => 0,
            };
            Frame::sctp(src, dst, chunk)
        }
        (UDP, _) => Frame::udp(src, dst),
        (_, Sign::EchoReply) => Frame::pong(src.ip(), dst.ip(), src.port()),
        _ => Frame::ping(src.ip(), dst.ip(), src.port()),
    };
    frame.build()
}

/// What the sign is for a protocol.
pub(crate) fn normal(protocol: u8, sign: Sign) -> Sign {
    match (protocol, sign) {
        (TCP, _) | (SCTP, Sign::Open | Sign::OpenAnswer | Sign::End | Sign::Reset) => sign,
        (SCTP | UDP, _) => Sign::Data,
        (_, Sign::EchoReply) => Sign::EchoReply,
        _ => Sign::EchoRequest,
    }
}
