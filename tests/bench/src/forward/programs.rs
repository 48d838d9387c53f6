//! The XDP programs of the forwarding rows: packet generator, packet counter, and the minimal
//! forwarder.

use std::net::{Ipv4Addr, SocketAddrV4};

use dataplane_common::{checksum, net::Protocol};

use crate::bpf::{
    assembly::{Assembly, Helper, Instruction, Label, Op, Reg, Size},
    kernel::{Counters, Slot},
};
use dataplane_testkit::prog::Frame;

/// Bytes of a frame: 64 with the Ethernet FCS.
pub(super) const FRAME: usize = 60;
/// Bytes of Ethernet, IPv4 and UDP headers.
const HEADERS: i16 = 42;
/// Number of source ports, each with one flow. A power of two.
pub const FLOWS: u16 = 1 << 10;
/// The first source port.
const FIRST_PORT: u16 = 20_000;

const ETHER_TYPE: i16 = 12;
const PROTOCOL: i16 = 23;
const IPV4_SRC: i16 = 26;
const IPV4_DST: i16 = 30;
const SRC_PORT: i16 = 34;
const DST_PORT: i16 = 36;
const CHECKSUM: i16 = 40;

/// `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;

const XDP_ABORTED: i32 = 0;
const XDP_DROP: i32 = 1;
pub(super) const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;

/// Counter of expected packets.
pub(super) const EXPECTED: u32 = 0;
/// Counter of all other packets.
pub(super) const OTHERS: u32 = 1;

pub(super) type Mac = [u8; 6];

/// An expected packet; any source port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) mac: Mac,
    pub(super) src: Ipv4Addr,
    pub(super) dst: SocketAddrV4,
}

/// The frame that the client sends from its first port.
pub(super) fn frame(mac: Mac, from: Ipv4Addr, to: SocketAddrV4) -> Vec<u8> {
    let src = SocketAddrV4::new(from, FIRST_PORT);
    let payload = vec![b'.'; FRAME - HEADERS as usize];
    let mut frame = Frame { payload, ..Frame::udp(src.into(), to.into()) }.build();
    frame[..6].copy_from_slice(&mac);
    frame
}

/// Whether `port` is a source port of the client.
pub(super) const fn is_client_port(port: u16) -> bool {
    port >= FIRST_PORT && port < FIRST_PORT + FLOWS
}

/// Writes the headers of `frame` with a random one of the [`FLOWS`] source ports and redirects the
/// frame to `ifindex`. All headers are rewritten, as recycled frames are as the node left them.
pub(super) fn generator(frame: &[u8], ifindex: u32) -> Vec<Instruction> {
    let mut assembly = of_frame("short");
    let headers = &frame[..HEADERS as usize];
    let (words, rest) = headers.as_chunks::<8>();
    for (word, offset) in words.iter().zip((0..).step_by(8)) {
        assembly.wide(Reg::R2, u64::from_ne_bytes(*word)).store(Size::U64, Reg::R6, offset, Reg::R2);
    }
    debug_assert_eq!(rest.len(), 2, "what is left is the checksum");
    assembly
        .call(Helper::Random)
        .register(Op::Move, Reg::R2, Reg::R0)
        .constant(Op::And, Reg::R2, i32::from(FLOWS - 1))
        .constant(Op::Add, Reg::R2, i32::from(FIRST_PORT))
        .network_order_16(Reg::R2)
        .store(Size::U16, Reg::R6, SRC_PORT, Reg::R2)
        // add the port to the sum of the rest, fold twice, complement
        .constant(Op::Add, Reg::R2, i32::from(sum_without_port(frame)));
    for _ in 0..2 {
        assembly
            .register(Op::Move, Reg::R3, Reg::R2)
            .constant(Op::ShiftRight, Reg::R3, 16)
            .constant(Op::And, Reg::R2, 0xffff)
            .register(Op::Add, Reg::R2, Reg::R3);
    }
    assembly
        .constant(Op::Xor, Reg::R2, 0xffff)
        .store(Size::U16, Reg::R6, CHECKSUM, Reg::R2)
        .constant(Op::Move, Reg::R1, ifindex as i32)
        .constant(Op::Move, Reg::R2, 0)
        .call(Helper::Redirect)
        .exit()
        .label("short")
        .constant(Op::Move, Reg::R0, XDP_ABORTED)
        .exit();
    assembly.finish()
}

/// Returns the UDP checksum of `frame` without the source port, folded and not complemented.
fn sum_without_port(frame: &[u8]) -> u16 {
    let at = |offset: i16| u16::from_ne_bytes([frame[offset as usize], frame[offset as usize + 1]]);
    // the sum is what makes it all ones, and a port is taken away by adding its complement
    checksum::fold(u64::from(!at(CHECKSUM)) + u64::from(!at(SRC_PORT)))
}

/// Counts packets, drops those that match `expected`, and passes others. Stores the last one in
/// `slot`.
pub(super) fn sink(expected: &Expected, counters: &Counters, slot: Option<&Slot>) -> Vec<Instruction> {
    const OTHER: Label = "other";
    let mut assembly = of_frame(OTHER);
    let [a, b, c, d, e, f] = expected.mac;
    let halves = |bytes: [u8; 2]| u32::from(u16::from_ne_bytes(bytes));
    for (size, offset, value) in [
        (Size::U32, 0, u32::from_ne_bytes([a, b, c, d])),
        (Size::U16, 4, halves([e, f])),
        (Size::U16, ETHER_TYPE, halves([8, 0])),
        (Size::U8, PROTOCOL, u32::from(Protocol::UDP)),
        (Size::U32, IPV4_SRC, u32::from_ne_bytes(expected.src.octets())),
        (Size::U32, IPV4_DST, u32::from_ne_bytes(expected.dst.ip().octets())),
        (Size::U16, DST_PORT, halves(expected.dst.port().to_be_bytes())),
    ] {
        assembly.load(size, Reg::R2, Reg::R6, offset).jump_if_not(Reg::R2, value, OTHER);
    }
    if let Some(slot) = slot {
        look_up(&mut assembly, slot.descriptor(), 0, "kept");
        for offset in (0..FRAME as i16).step_by(4) {
            assembly.load(Size::U32, Reg::R2, Reg::R6, offset).store(Size::U32, Reg::R0, offset, Reg::R2);
        }
        assembly.label("kept");
    }
    count(&mut assembly, counters, EXPECTED, "counted");
    assembly.constant(Op::Move, Reg::R0, XDP_DROP).exit().label(OTHER);
    count(&mut assembly, counters, OTHERS, "counted too");
    assembly.constant(Op::Move, Reg::R0, XDP_PASS).exit();
    assembly.finish()
}

/// The minimal forwarder: rewrites the MAC addresses of packets to `port` and sends them back.
pub(super) fn bounce(port: u16, to: Mac, from: Mac) -> Vec<Instruction> {
    const PASS: Label = "pass";
    let mut assembly = of_frame(PASS);
    assembly.load(Size::U16, Reg::R2, Reg::R6, DST_PORT).jump_if_not(
        Reg::R2,
        u32::from(u16::from_ne_bytes(port.to_be_bytes())),
        PASS,
    );
    let addresses: Vec<u8> = [to, from].concat();
    for (bytes, offset) in addresses.chunks_exact(4).zip((0..).step_by(4)) {
        let word = i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        assembly.constant(Op::Move, Reg::R2, word).store(Size::U32, Reg::R6, offset, Reg::R2);
    }
    assembly.constant(Op::Move, Reg::R0, XDP_TX).exit().label(PASS).constant(Op::Move, Reg::R0, XDP_PASS);
    assembly.exit();
    assembly.finish()
}

/// Begins a program: the frame is at `R6`, and whole, or it goes on at `otherwise`.
fn of_frame(otherwise: Label) -> Assembly {
    let mut assembly = Assembly::default();
    assembly
        .load(Size::U32, Reg::R6, Reg::R1, DATA)
        .load(Size::U32, Reg::R3, Reg::R1, DATA_END)
        .register(Op::Move, Reg::R2, Reg::R6)
        .constant(Op::Add, Reg::R2, FRAME as i32)
        .jump_if_greater(Reg::R2, Reg::R3, otherwise);
    assembly
}

/// Loads a pointer to the value at `key` into `R0`; jumps to `otherwise` if there is none.
fn look_up(assembly: &mut Assembly, map: i32, key: u32, otherwise: Label) {
    assembly
        .constant(Op::Move, Reg::R2, key as i32)
        .store(Size::U32, Reg::R10, -4, Reg::R2)
        .register(Op::Move, Reg::R2, Reg::R10)
        .constant(Op::Add, Reg::R2, -4)
        .map(Reg::R1, map)
        .call(Helper::MapLookup)
        .jump_if_zero(Reg::R0, otherwise);
}

fn count(assembly: &mut Assembly, counters: &Counters, index: u32, done: Label) {
    look_up(assembly, counters.descriptor(), index, done);
    assembly
        .load(Size::U64, Reg::R1, Reg::R0, 0)
        .constant(Op::Add, Reg::R1, 1)
        .store(Size::U64, Reg::R0, 0, Reg::R1)
        .label(done);
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_testkit::prog::Parsed;

    /// The generator's partial checksum, completed for each port, is correct.
    #[test]
    fn checksum_is_correct_for_every_source_port() {
        let to = "192.0.2.2:30080".parse().expect("an address");
        let mut frame = frame([2; 6], Ipv4Addr::new(192, 0, 2, 1), to);
        let sum = sum_without_port(&frame);
        assert_eq!(frame.len(), FRAME);
        for port in FIRST_PORT..FIRST_PORT + FLOWS {
            let port = port.to_be_bytes();
            frame[SRC_PORT as usize..][..2].copy_from_slice(&port);
            let sum = !checksum::fold(u64::from(sum) + u64::from(u16::from_ne_bytes(port)));
            frame[CHECKSUM as usize..][..2].copy_from_slice(&sum.to_ne_bytes());
            let parsed = Parsed::read(&frame).expect("a valid frame");
            assert!(is_client_port(parsed.src_port));
        }
    }
}
