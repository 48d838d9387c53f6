//! The differences between IPv4 and IPv6. Everything else is written once over [`IpFamily`] and
//! compiled for each family.

mod v4;
mod v6;

use dataplane_common::{
    abi::{Addr, ClusterRange, Device},
    checksum::Change,
    reason::DropReason,
};

pub(crate) use self::{v4::V4, v6::V6};
use super::{
    Frame,
    packet::{Extent, Packet},
};

/// TTL or hop limit of packets that a program makes (RFC 1700).
const DEFAULT_HOP_LIMIT: u8 = 64;

/// An IP family.
pub(crate) trait IpFamily: Sized {
    /// Whether it is IPv4.
    const IS_V4: bool;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// Whether the ICMP checksum covers the addresses (ICMPv6, RFC 4443 §2.3).
    const ICMP_COVERS_ADDRESSES: bool;
    /// Bytes of the IP header without options or extension headers.
    const HEADER: usize;
    /// ICMP type and code of "port unreachable".
    const PORT_UNREACHABLE: (u8, u8);
    /// ICMP type and code of "fragmentation needed" or "packet too big".
    const TOO_BIG: (u8, u8);

    /// ICMP type and code of "time to live exceeded in transit" or "hop limit exceeded".
    const TTL_EXPIRED: (u8, u8);
    /// ICMP types of an echo request and of its reply.
    const ECHO: (u8, u8);

    /// Reads and checks the IP header.
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason>;

    /// Bytes of the packet from offset `l4` of the frame on, as the IP header says: a frame may be
    /// padded.
    fn transport_len(ctx: &impl Frame, l4: usize) -> Result<u16, DropReason>;

    /// Whether what the fragments of a packet share includes its protocol.
    const FRAGMENTS_SHARE_PROTOCOL: bool;

    /// Which bytes a fragment carries.
    fn extent(ctx: &impl Frame, packet: &Packet<Self>) -> Result<Extent, DropReason>;

    /// Whether this is the number of an extension header, not of a protocol.
    fn is_extension(protocol: u8) -> bool;

    /// Whether routers may fragment it (IPv4 without DF).
    fn may_be_fragmented(ctx: &impl Frame) -> bool;

    /// Decrements TTL or hop limit, which must be above 1.
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason>;

    /// Turns the IP header of a request into that of its answer: addresses swapped, and the hop
    /// limit of a packet that has passed no router.
    fn answer_header(ctx: &impl Frame) -> Result<(), DropReason>;

    /// Replaces the addresses of the IP header at `offset`, updates the header's own checksum, and
    /// returns the change that transport checksums have to follow.
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason>;

    /// Writes the IP header of an ICMP message of `len` bytes. Returns the sum of the
    /// pseudo-header, 0 for IPv4.
    fn write_icmp_ip_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason>;

    /// One's-complement sum of the IP header, which must have no options or extension headers.
    fn header_sum(ctx: &impl Frame) -> Result<u64, DropReason>;

    /// Whether an ICMP message of this type is an error, which quotes a packet.
    fn icmp_is_error(kind: u8) -> bool;

    /// Whether it is an echo request or reply, which has an identifier.
    fn icmp_is_echo(kind: u8) -> bool;

    /// Whether it is an echo request.
    fn icmp_is_echo_request(kind: u8) -> bool;

    /// Whether it is neighbour discovery, which stays on its link.
    fn icmp_is_link_scoped(kind: u8) -> bool;

    /// Whether the address is link-local, loopback or multicast.
    fn is_link_scoped(addr: &Addr) -> bool;

    /// Whether the address is loopback.
    fn is_loopback(addr: &Addr) -> bool;

    /// Whether a link-local address is one that routers forward to all the same.
    fn is_forwardable_link_local(addr: &Addr) -> bool;

    /// The node's address that the source is translated to; `::` if there is none.
    fn node_address() -> Addr;

    /// The address of a device; `::` if it has none.
    fn device_address(device: &Device) -> Addr;

    /// A prefix that holds all cluster IPs.
    fn cluster_range() -> ClusterRange;
}
