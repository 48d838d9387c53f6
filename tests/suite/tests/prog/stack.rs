//! The verifier's limit for the BPF stack: 512 bytes over a chain of calls. Linux 5.10 and 6.1
//! round the frame of each function up to 32 bytes (`kernel/bpf/verifier.c`,
//! `check_max_stack_depth`), newer kernels to less, so a chain that this kernel accepts may be
//! refused there.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_common::abi::names::program;
use object::{
    Endianness, File, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget,
    Section, SectionIndex, SectionKind, SymbolKind, elf::R_BPF_64_32,
};

/// Bytes for all functions of a chain (`MAX_BPF_STACK`).
const LIMIT: u32 = 512;
/// Frames are rounded up to this.
const ROUNDING: u32 = 32;

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
    /// Bytes of one.
    const LEN: u64 = 8;
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

    /// Where a call goes whose immediate counts from the instruction behind `at`.
    fn offset_behind(&self, at: u64) -> u64 {
        at.wrapping_add_signed((i64::from(self.immediate) + 1) * Self::LEN.cast_signed())
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
    let object = File::parse(dataplane_agent::datapath::OBJECT).context("parse the object")?;
    ensure!(object.endianness() == Endianness::Little, "the object has the other byte order");
    let mut functions = BTreeMap::new();
    for section in object.sections().filter(|section| section.kind() == SectionKind::Text) {
        let code = section.data()?;
        let targets = relocated_calls(&object, &section)?;
        let own = object.symbols().filter(|symbol| symbol.section_index() == Some(section.index()));
        for symbol in own.filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
            let mut function = Function { name: symbol.name()?.to_owned(), ..Function::default() };
            for at in (symbol.address()..symbol.address() + symbol.size()).step_by(Instruction::LEN as usize)
            {
                let instruction = Instruction::decode(&code[at as usize..]);
                function.frame = function.frame.max(instruction.depth());
                if instruction.is_local_call() {
                    let direct = (section.index().0, instruction.offset_behind(at));
                    function.calls.push(*targets.get(&at).unwrap_or(&direct));
                }
            }
            functions.insert((section.index().0, symbol.address()), function);
        }
    }
    Ok(functions)
}

/// What the calls of a section call that have a relocation, by their offset.
fn relocated_calls(object: &File<'_>, section: &Section<'_, '_>) -> Result<BTreeMap<u64, Place>> {
    const CALL: RelocationFlags = RelocationFlags::Elf { r_type: R_BPF_64_32 };
    let code = section.data()?;
    let mut targets = BTreeMap::new();
    for (at, relocation) in section.relocations().filter(|(_, relocation)| relocation.flags() == CALL) {
        let RelocationTarget::Symbol(target) = relocation.target() else {
            bail!("the call at {at:#x} of {} has a relocation without a symbol", section.name()?)
        };
        let target = object.symbol_by_index(target)?;
        let SectionIndex(index) = target.section_index().context("a call of a symbol without a section")?;
        let start = if target.kind() == SymbolKind::Section {
            Instruction::decode(&code[at as usize..]).offset_behind(0)
        } else {
            target.address()
        };
        targets.insert(at, (index, start));
    }
    Ok(targets)
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
