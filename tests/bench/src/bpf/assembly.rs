//! An assembler for small eBPF programs that the benchmark generates at run time. Encoding:
//! RFC 9669.

use std::collections::BTreeMap;

/// A register; `R10` is the frame pointer, and `R6` to `R9` survive a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R6 = 6,
    R7 = 7,
    R9 = 9,
    R10 = 10,
}

/// The size of a load or store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Size {
    U8,
    U16,
    U32,
    U64,
}

impl Size {
    const fn bits(self) -> u8 {
        match self {
            Self::U32 => 0x00,
            Self::U16 => 0x08,
            Self::U8 => 0x10,
            Self::U64 => 0x18,
        }
    }
}

/// A 64-bit operation on a register.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Add = 0x00,
    Subtract = 0x10,
    And = 0x50,
    ShiftRight = 0x70,
    Xor = 0xa0,
    Move = 0xb0,
}

/// Kernel helpers by number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Helper {
    MapLookup = 1,
    Random = 7,
    TailCall = 12,
    Redirect = 23,
    AdjustHead = 44,
    RedirectPeer = 155,
}

/// The name of a position in a program.
pub(crate) type Label = &'static str;

/// An instruction in the kernel's encoding (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u8,
    /// Destination register in the low 4 bits, source register in the high 4 bits.
    registers: u8,
    offset: i16,
    value: i32,
}

const CLASS_LD: u8 = 0x00;
const CLASS_LDX: u8 = 0x01;
const CLASS_STX: u8 = 0x03;
const CLASS_JMP: u8 = 0x05;
const CLASS_JMP32: u8 = 0x06;
const CLASS_ALU64: u8 = 0x07;
const MODE_IMM: u8 = 0x00;
const MODE_MEM: u8 = 0x60;
const FROM_REGISTER: u8 = 0x08;
const TO_BIG_ENDIAN: u8 = 0xd4 | FROM_REGISTER;
const JUMP_IF_GREATER: u8 = 0x20;
const JUMP_IF_EQUAL: u8 = 0x10;
const JUMP_IF_NOT_EQUAL: u8 = 0x50;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// `BPF_PSEUDO_MAP_FD`: the constant is a map's file descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// A program under construction.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    instructions: Vec<Instruction>,
    labels: BTreeMap<Label, usize>,
    jumps: Vec<(usize, Label)>,
}

impl Assembly {
    fn push(&mut self, code: u8, dst: Reg, src: u8, offset: i16, value: i32) -> &mut Self {
        self.instructions.push(Instruction { code, registers: dst as u8 | src << 4, offset, value });
        self
    }

    /// `dst op= value`
    pub(crate) fn constant(&mut self, op: Op, dst: Reg, value: i32) -> &mut Self {
        self.push(CLASS_ALU64 | op as u8, dst, 0, 0, value)
    }

    /// `dst op= src`
    pub(crate) fn register(&mut self, op: Op, dst: Reg, src: Reg) -> &mut Self {
        self.push(CLASS_ALU64 | FROM_REGISTER | op as u8, dst, src as u8, 0, 0)
    }

    /// `dst = value`
    pub(crate) fn wide(&mut self, dst: Reg, value: u64) -> &mut Self {
        self.push(CLASS_LD | MODE_IMM | Size::U64.bits(), dst, 0, 0, value as i32);
        self.push(0, Reg::R0, 0, 0, (value >> 32) as i32)
    }

    /// `dst = map`
    pub(crate) fn map(&mut self, dst: Reg, descriptor: i32) -> &mut Self {
        self.push(CLASS_LD | MODE_IMM | Size::U64.bits(), dst, MAP_DESCRIPTOR, 0, descriptor);
        self.push(0, Reg::R0, 0, 0, 0)
    }

    /// `dst = *(src + offset)`
    pub(crate) fn load(&mut self, size: Size, dst: Reg, src: Reg, offset: i16) -> &mut Self {
        self.push(CLASS_LDX | MODE_MEM | size.bits(), dst, src as u8, offset, 0)
    }

    /// `*(dst + offset) = src`
    pub(crate) fn store(&mut self, size: Size, dst: Reg, offset: i16, src: Reg) -> &mut Self {
        self.push(CLASS_STX | MODE_MEM | size.bits(), dst, src as u8, offset, 0)
    }

    /// `dst = htons(dst)`
    pub(crate) fn network_order_16(&mut self, dst: Reg) -> &mut Self {
        self.push(TO_BIG_ENDIAN, dst, 0, 0, 16)
    }

    /// Jumps to `label` if `a > b`.
    pub(crate) fn jump_if_greater(&mut self, a: Reg, b: Reg, label: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), label));
        self.push(CLASS_JMP | FROM_REGISTER | JUMP_IF_GREATER, a, b as u8, 0, 0)
    }

    /// Jumps to `label` if the low 32 bits of `a` are not `value`.
    pub(crate) fn jump_if_not(&mut self, a: Reg, value: u32, label: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), label));
        self.push(CLASS_JMP32 | JUMP_IF_NOT_EQUAL, a, 0, 0, value as i32)
    }

    /// Jumps to `label` if `a` is null or zero.
    pub(crate) fn jump_if_zero(&mut self, a: Reg, label: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), label));
        self.push(CLASS_JMP | JUMP_IF_EQUAL, a, 0, 0, 0)
    }

    pub(crate) fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(CLASS_JMP | CALL, Reg::R0, 0, 0, helper as i32)
    }

    /// Exits with the value of `R0`.
    pub(crate) fn exit(&mut self) -> &mut Self {
        self.push(CLASS_JMP | EXIT, Reg::R0, 0, 0, 0)
    }

    /// Defines a label at the next instruction.
    pub(crate) fn label(&mut self, label: Label) -> &mut Self {
        self.labels.insert(label, self.instructions.len());
        self
    }

    /// Returns the program with resolved jumps.
    ///
    /// # Panics
    /// Panics if a label is not defined.
    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in &self.jumps {
            let to = self.labels.get(label).unwrap_or_else(|| panic!("label {label} is not defined"));
            // relative to the next instruction
            self.instructions[*at].offset = (*to as i64 - *at as i64 - 1) as i16;
        }
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected bytes are those that clang generates for the same program.
    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let mut assembly = Assembly::default();
        assembly
            .load(Size::U32, Reg::R2, Reg::R1, 4)
            .jump_if_not(Reg::R2, 0xffff_fffe, "end")
            .wide(Reg::R3, 0x1122_3344_5566_7788)
            .label("end")
            .constant(Op::Move, Reg::R0, 2)
            .exit();
        let encoded: Vec<[u8; 8]> = assembly.finish().into_iter().map(bytes).collect();
        assert_eq!(
            encoded,
            [
                [0x61, 0x12, 4, 0, 0, 0, 0, 0],
                [0x56, 0x02, 2, 0, 0xfe, 0xff, 0xff, 0xff],
                [0x18, 0x03, 0, 0, 0x88, 0x77, 0x66, 0x55],
                [0x00, 0x00, 0, 0, 0x44, 0x33, 0x22, 0x11],
                [0xb7, 0x00, 0, 0, 2, 0, 0, 0],
                [0x95, 0x00, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    fn bytes(instruction: Instruction) -> [u8; 8] {
        let [low, high] = instruction.offset.to_le_bytes();
        let [a, b, c, d] = instruction.value.to_le_bytes();
        [instruction.code, instruction.registers, low, high, a, b, c, d]
    }
}
