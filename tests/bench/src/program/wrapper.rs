//! The generated programs of program runs: the wrapper that calls the measured program, and the
//! limits.
//!
//! The kernel repeats a program on one packet and does not restore it (`net/bpf/test_run.c`): a
//! program that translates would see its own output. So each run begins with a wrapper, which
//! writes the packet anew, with the next flow's port, and calls the program (`bpf_tail_call`). The
//! same wrapper without the call is the overhead.

use anyhow::{Result, ensure};
use dataplane_common::checksum;
use dataplane_testkit::sys_bpf::Output;

use crate::bpf::{
    assembly::{Assembly, Helper, Instruction, Op, Reg, Size},
    kernel::{Kind, Program, Slot, TailCall},
};

/// Bytes of a frame: 64 with the Ethernet FCS. Ethernet, IPv4, TCP and some payload.
pub(super) const FRAME: usize = 60;
/// Number of source ports, a power of two.
const PORTS: u32 = 1 << 14;

const IPV4_CHECKSUM: usize = 24;
/// The last bytes of both addresses.
pub(super) const SRC_BYTE: usize = 29;
pub(super) const DST_BYTE: usize = 33;
const SRC_PORT: usize = 34;
const TCP_CHECKSUM: usize = 50;

pub(super) const XDP_PASS: u32 = 2;
pub(super) const XDP_TX: u32 = 3;
pub(super) const TC_OK: u32 = 0;
pub(super) const TC_REDIRECT: u32 = 7;
/// Returned by a wrapper that could not call: no program returns it.
const FAILED: u32 = 99;

/// How the flow of a packet follows from its number: by the source port, and for more than
/// [`PORTS`] flows by the last byte of an address. Both count from those of the first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rotation {
    /// Number of flows, a power of two.
    pub(super) flows: u32,
    /// [`SRC_BYTE`] or [`DST_BYTE`].
    pub(super) address_byte: usize,
}

impl Rotation {
    /// Returns how much port and address of the packet with this number are above the first ones.
    const fn of(self, number: u64) -> (u16, u8) {
        let flow = number & (self.flows as u64 - 1);
        ((flow % PORTS as u64) as u16, (flow / PORTS as u64) as u8)
    }

    /// Returns the frame of the packet with this number.
    pub(super) fn frame(self, frame: &[u8], number: u64) -> Vec<u8> {
        let (port, byte) = self.of(number);
        let port = first_port(frame) + port;
        let byte = frame[self.address_byte] + byte;
        let mut frame = frame.to_vec();
        let (ipv4, tcp) = self.partial_sums(&frame);
        let words = [u64::from(port.to_be()), u64::from(u16::from(byte).to_be())];
        frame[self.address_byte] = byte;
        frame[SRC_PORT..][..2].copy_from_slice(&port.to_be_bytes());
        let sum = |base: u16, words: &[u64]| !checksum::fold(u64::from(base) + words.iter().sum::<u64>());
        frame[IPV4_CHECKSUM..][..2].copy_from_slice(&sum(ipv4, &words[1..]).to_ne_bytes());
        frame[TCP_CHECKSUM..][..2].copy_from_slice(&sum(tcp, &words).to_ne_bytes());
        frame
    }

    /// Returns what both checksums of `frame` sum up, without port and last byte of the address.
    fn partial_sums(self, frame: &[u8]) -> (u16, u16) {
        let at = |offset: usize| u16::from_ne_bytes([frame[offset], frame[offset + 1]]);
        let byte = u16::from(frame[self.address_byte]).to_be();
        // the sum is what makes it all ones, and a word is taken away by adding its complement
        let ipv4 = checksum::fold(u64::from(!at(IPV4_CHECKSUM)) + u64::from(!byte));
        let tcp = u64::from(!at(TCP_CHECKSUM)) + u64::from(!byte) + u64::from(!at(SRC_PORT));
        (ipv4, checksum::fold(tcp))
    }
}

fn first_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[SRC_PORT], frame[SRC_PORT + 1]])
}

/// A wrapper with the program that it calls.
#[derive(Debug)]
pub(super) struct Wrapper {
    program: Program,
    /// The number of the next packet.
    _next: Slot,
    _called: Option<TailCall>,
}

impl Wrapper {
    /// Loads a wrapper that writes `frame` and calls `program`, or nothing.
    pub(super) fn load(
        kind: Kind,
        frame: &[u8],
        rotation: Rotation,
        program: Option<std::os::fd::BorrowedFd<'_>>,
    ) -> Result<Self> {
        let next = Slot::create(size_of::<u64>())?;
        let called = program.map(|program| -> Result<TailCall> {
            let call = TailCall::create()?;
            call.set(program)?;
            Ok(call)
        });
        let called = called.transpose()?;
        let call = called.as_ref().map(TailCall::descriptor);
        let program =
            Program::load("wrapper", kind, &wrapper(kind, frame, rotation, next.descriptor(), call))?;
        Ok(Self { program, _next: next, _called: called })
    }

    /// Runs it `count` times.
    pub(super) fn run(&self, frame: &[u8], context: &[u8], count: u32) -> Result<Output> {
        let output = self.program.run(frame, context, count)?;
        ensure!(output.returned != FAILED, "the wrapper could not write the packet or call the program");
        Ok(output)
    }
}

fn wrapper(kind: Kind, frame: &[u8], rotation: Rotation, next: i32, call: Option<i32>) -> Vec<Instruction> {
    let mut assembly = Assembly::default();
    assembly.register(Op::Move, Reg::R9, Reg::R1);
    let (data, data_end) = data_fields(kind);
    if kind == Kind::Xdp {
        // a program may have prepended a header
        assembly
            .load(Size::U32, Reg::R3, Reg::R1, data)
            .load(Size::U32, Reg::R2, Reg::R1, data_end)
            .register(Op::Subtract, Reg::R2, Reg::R3)
            .constant(Op::Subtract, Reg::R2, FRAME as i32)
            .jump_if_zero(Reg::R2, "whole")
            .call(Helper::AdjustHead)
            .label("whole");
    } else {
        assembly.constant(Op::Move, Reg::R2, 0).store(Size::U32, Reg::R9, SKB_MARK, Reg::R2);
    }
    assembly
        .constant(Op::Move, Reg::R2, 0)
        .store(Size::U32, Reg::R10, -4, Reg::R2)
        .register(Op::Move, Reg::R2, Reg::R10)
        .constant(Op::Add, Reg::R2, -4)
        .map(Reg::R1, next)
        .call(Helper::MapLookup)
        .jump_if_zero(Reg::R0, "failed")
        .load(Size::U64, Reg::R7, Reg::R0, 0)
        .register(Op::Move, Reg::R2, Reg::R7)
        .constant(Op::Add, Reg::R2, 1)
        .store(Size::U64, Reg::R0, 0, Reg::R2);
    bounds(&mut assembly, Reg::R9, (data, data_end));
    write(&mut assembly, frame);
    // the flow: R2 port, R3 byte of the address, both as words of a checksum
    assembly
        .constant(Op::And, Reg::R7, rotation.flows as i32 - 1)
        .register(Op::Move, Reg::R2, Reg::R7)
        .constant(Op::And, Reg::R2, PORTS as i32 - 1)
        .constant(Op::Add, Reg::R2, i32::from(first_port(frame)))
        .network_order_16(Reg::R2)
        .store(Size::U16, Reg::R6, SRC_PORT as i16, Reg::R2)
        .register(Op::Move, Reg::R3, Reg::R7)
        .constant(Op::ShiftRight, Reg::R3, PORTS.ilog2() as i32)
        .constant(Op::Add, Reg::R3, i32::from(frame[rotation.address_byte]))
        .store(Size::U8, Reg::R6, rotation.address_byte as i16, Reg::R3)
        .network_order_16(Reg::R3);
    let (ipv4, tcp) = rotation.partial_sums(frame);
    assembly.register(Op::Add, Reg::R2, Reg::R3).constant(Op::Add, Reg::R2, i32::from(tcp));
    assembly.constant(Op::Add, Reg::R3, i32::from(ipv4));
    for (sum, offset) in [(Reg::R2, TCP_CHECKSUM), (Reg::R3, IPV4_CHECKSUM)] {
        for _ in 0..2 {
            assembly
                .register(Op::Move, Reg::R0, sum)
                .constant(Op::ShiftRight, Reg::R0, 16)
                .constant(Op::And, sum, 0xffff)
                .register(Op::Add, sum, Reg::R0);
        }
        assembly.constant(Op::Xor, sum, 0xffff).store(Size::U16, Reg::R6, offset as i16, sum);
    }
    match call {
        Some(call) => {
            assembly
                .register(Op::Move, Reg::R1, Reg::R9)
                .map(Reg::R2, call)
                .constant(Op::Move, Reg::R3, 0)
                .call(Helper::TailCall);
        }
        None => {
            assembly.constant(Op::Move, Reg::R0, XDP_PASS as i32).exit();
        }
    }
    assembly.label("failed").constant(Op::Move, Reg::R0, FAILED as i32).exit();
    assembly.finish()
}

/// A program without maps that checks that a packet is TCP to the address and port of `from`, and
/// makes it `to`: all addresses, ports and checksums.
pub(super) fn rewrite(kind: Kind, from: &[u8], to: &[u8], action: u32) -> Vec<Instruction> {
    const ETHER_TYPE: usize = 12;
    const PROTOCOL: usize = 23;
    const DST: usize = 30;
    const DST_PORT: usize = 36;
    let mut assembly = Assembly::default();
    bounds(&mut assembly, Reg::R1, data_fields(kind));
    for (size, offset) in
        [(Size::U16, ETHER_TYPE), (Size::U8, PROTOCOL), (Size::U32, DST), (Size::U16, DST_PORT)]
    {
        let mut bytes = [0; 4];
        let length = match size {
            Size::U8 => 1,
            Size::U16 => 2,
            _ => 4,
        };
        bytes[..length].copy_from_slice(&from[offset..offset + length]);
        let value = u32::from_ne_bytes(bytes);
        assembly.load(size, Reg::R2, Reg::R6, offset as i16).jump_if_not(Reg::R2, value, "failed");
    }
    // link addresses; TTL and IPv4 checksum; addresses and ports; TCP checksum
    for (start, end) in [(0, 12), (22, 26), (26, 38), (50, 52)] {
        let mut at = start;
        while at < end {
            let length = if end - at >= 4 { 4 } else { 2 };
            let mut bytes = [0; 4];
            bytes[..length].copy_from_slice(&to[at..at + length]);
            let size = if length == 4 { Size::U32 } else { Size::U16 };
            assembly.constant(Op::Move, Reg::R2, i32::from_ne_bytes(bytes));
            assembly.store(size, Reg::R6, at as i16, Reg::R2);
            at += length;
        }
    }
    assembly.constant(Op::Move, Reg::R0, action as i32).exit();
    assembly.label("failed").constant(Op::Move, Reg::R0, FAILED as i32).exit();
    assembly.finish()
}

/// Offset of `mark` in `struct __sk_buff`.
const SKB_MARK: i16 = 8;

/// Offsets of `data` and `data_end` in the context.
const fn data_fields(kind: Kind) -> (i16, i16) {
    match kind {
        Kind::Xdp => (0, 4),
        Kind::Tc => (76, 80),
    }
}

/// Loads the start of the frame into `R6`, and checks that the frame is whole.
fn bounds(assembly: &mut Assembly, context: Reg, (data, data_end): (i16, i16)) {
    assembly
        .load(Size::U32, Reg::R6, context, data)
        .load(Size::U32, Reg::R3, context, data_end)
        .register(Op::Move, Reg::R2, Reg::R6)
        .constant(Op::Add, Reg::R2, FRAME as i32)
        .jump_if_greater(Reg::R2, Reg::R3, "failed");
}

/// Writes the whole frame.
fn write(assembly: &mut Assembly, frame: &[u8]) {
    let (words, rest) = frame.as_chunks::<8>();
    for (word, offset) in words.iter().zip((0..).step_by(8)) {
        assembly.wide(Reg::R2, u64::from_ne_bytes(*word)).store(Size::U64, Reg::R6, offset, Reg::R2);
    }
    if let [a, b, c, d] = rest {
        assembly.constant(Op::Move, Reg::R2, i32::from_ne_bytes([*a, *b, *c, *d]));
        assembly.store(Size::U32, Reg::R6, (FRAME - 4) as i16, Reg::R2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_testkit::prog::{Frame, Parsed};

    fn frame() -> Vec<u8> {
        let [src, dst] = ["198.18.0.0:1", "10.96.1.0:80"].map(|text| text.parse().expect("an address"));
        Frame { payload: vec![b'.'; 6], ..Frame::tcp(src, dst, 0x10) }.build()
    }

    #[test]
    fn frame_has_the_size_that_the_wrapper_writes() {
        assert_eq!(frame().len(), FRAME);
    }

    #[test]
    fn checksums_of_every_flow_are_correct() {
        for address_byte in [SRC_BYTE, DST_BYTE] {
            let rotation = Rotation { flows: 1 << 22, address_byte };
            for number in (0..1 << 22).step_by(997) {
                let parsed = Parsed::read(&rotation.frame(&frame(), number)).expect("a valid frame");
                assert_eq!(parsed.src_port, 1 + rotation.of(number).0);
            }
        }
    }

    #[test]
    fn flows_differ_until_all_were_used() {
        let rotation = Rotation { flows: 1 << 16, address_byte: SRC_BYTE };
        let flows: std::collections::HashSet<_> = (0..1 << 16).map(|number| rotation.of(number)).collect();
        assert_eq!(flows.len(), 1 << 16);
        assert_eq!(rotation.of(1 << 16), rotation.of(0));
        let one = Rotation { flows: 1, address_byte: SRC_BYTE };
        assert_eq!((one.of(0), one.of(7)), ((0, 0), (0, 0)));
    }
}
