//! The verifier's limit for the BPF stack: 512 bytes over a chain of calls. Kernels before 6.8
//! round the frame of each function up to 32 bytes, later ones up to 16 or 8
//! (`kernel/bpf/verifier.c`, `check_max_stack_depth`), so a chain that this kernel accepts may be
//! refused elsewhere.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use dataplane_common::abi::names::program;
use object::{
    Endianness, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget,
    SectionIndex, SymbolKind, elf::R_BPF_64_32,
};

/// Bytes for all functions of a chain (`MAX_BPF_STACK`).
const LIMIT: u32 = 512;
/// Frames are rounded up to this.
const ROUNDING: u32 = 32;
/// Bytes of an instruction.
const INSTRUCTION: u64 = 8;

/// A function, by the section it is in and its offset there.
type Place = (usize, u64);

/// What a function needs.
#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Bytes of its own frame.
    frame: u32,
    calls: Vec<Place>,
}

/// An instruction (RFC 9669 §3).
struct Instruction {
    opcode: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const FRAME_POINTER: u8 = 10;
    /// `call` with this source register calls a function of the object (RFC 9669 §4.3).
    const PROGRAM_LOCAL: u8 = 1;

    fn decode(bytes: &[u8]) -> Self {
        Self {
            opcode: bytes[0],
            destination: bytes[1] & 15,
            source: bytes[1] >> 4,
            offset: i16::from_le_bytes([bytes[2], bytes[3]]),
            immediate: i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }

    fn is_local_call(&self) -> bool {
        self.opcode == 0x85 && self.source == Self::PROGRAM_LOCAL
    }

    /// The lowest offset from the frame pointer that the instruction uses. An address is made by
    /// adding to a copy of the frame pointer, and no other sum is negative by so little.
    fn depth(&self) -> u32 {
        const ADD_IMMEDIATE: u8 = 0x07;
        let base = match self.opcode & 7 {
            // loads; stores
            1 => self.source,
            2 | 3 => self.destination,
            _ if self.opcode == ADD_IMMEDIATE && (-(LIMIT as i32)..0).contains(&self.immediate) => {
                return self.immediate.unsigned_abs();
            }
            _ => return 0,
        };
        let is_frame = base == Self::FRAME_POINTER && self.offset < 0;
        if is_frame { self.offset.unsigned_abs().into() } else { 0 }
    }
}

/// The functions of the object.
fn functions() -> Result<BTreeMap<Place, Function>> {
    let object = object::File::parse(dataplane_agent::datapath::OBJECT).context("parse the object")?;
    anyhow::ensure!(object.endianness() == Endianness::Little, "BPF object of the other byte order");
    let mut functions = BTreeMap::new();
    for symbol in object.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let index = symbol.section_index().context("a function without a section")?;
        let section = object.section_by_index(index)?;
        let code = section.data()?;
        let relocated: BTreeMap<u64, Place> = section
            .relocations()
            .filter(|(_, relocation)| matches!(relocation.flags(), RelocationFlags::Elf { r_type } if r_type == R_BPF_64_32))
            .map(|(at, relocation)| {
                let RelocationTarget::Symbol(target) = relocation.target() else {
                    anyhow::bail!("a relocation without a symbol")
                };
                let target = object.symbol_by_index(target)?;
                let SectionIndex(section) = target.section_index().context("a call of nothing")?;
                let start = if target.kind() == SymbolKind::Section {
                    let call = Instruction::decode(&code[at as usize..]);
                    (i64::from(call.immediate) + 1).cast_unsigned() * INSTRUCTION
                } else {
                    target.address()
                };
                Ok((at, (section, start)))
            })
            .collect::<Result<_>>()?;
        let mut function = Function { name: symbol.name()?.to_owned(), ..Function::default() };
        let range = symbol.address()..symbol.address() + symbol.size();
        for at in range.step_by(INSTRUCTION as usize) {
            let instruction = Instruction::decode(&code[at as usize..]);
            function.frame = function.frame.max(instruction.depth());
            if instruction.is_local_call() {
                let direct =
                    at.cast_signed() + (i64::from(instruction.immediate) + 1) * INSTRUCTION.cast_signed();
                function.calls.push(*relocated.get(&at).unwrap_or(&(index.0, direct.cast_unsigned())));
            }
        }
        functions.insert((index.0, symbol.address()), function);
    }
    Ok(functions)
}

/// The deepest chain of calls that begins here: its bytes, and the functions with their frames.
fn deepest(functions: &BTreeMap<Place, Function>, at: Place) -> Result<(u32, Vec<String>)> {
    let function = functions.get(&at).with_context(|| format!("a call of {at:?}, which is no function"))?;
    let own = function.frame.max(1).next_multiple_of(ROUNDING);
    let mut deepest_call = (0, Vec::new());
    for call in &function.calls {
        let chain = deepest(functions, *call)?;
        if chain.0 > deepest_call.0 {
            deepest_call = chain;
        }
    }
    let mut names = vec![format!("{} ({})", function.name, function.frame)];
    names.extend(deepest_call.1);
    Ok((own + deepest_call.0, names))
}

#[test]
fn every_chain_of_calls_fits_on_the_stack_of_every_kernel() -> Result<()> {
    let functions = functions()?;
    let mut too_deep = Vec::new();
    for name in program::DEVICE.into_iter().chain(program::SOCKET) {
        let (at, _) = functions
            .iter()
            .find(|(_, function)| function.name == name)
            .with_context(|| format!("no function {name}"))?;
        let (bytes, chain) = deepest(&functions, *at)?;
        println!("{name:>14} {bytes:>4} of {LIMIT}");
        if bytes > LIMIT {
            too_deep.push(format!("{name}: {bytes} bytes: {}", chain.join(" → ")));
        }
    }
    assert!(too_deep.is_empty(), "{too_deep:#?}");
    Ok(())
}
