//! The commands of the `bpf` system call that the benchmark needs: load a generated program, attach
//! it to a device, run it, read its counters.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result};

use dataplane_testkit::sys_bpf::{Output, TestRun, call};

use super::assembly::Instruction;

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;

const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_PROG_ARRAY: u32 = 3;
const MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const MAP_TYPE_LRU_HASH: u32 = 9;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
/// Linux 6.6.
const ATTACH_TYPE_TCX_INGRESS: u32 = 46;
/// `XDP_FLAGS_DRV_MODE`: fails if the driver has no native XDP.
const DRIVER_MODE: u32 = 1 << 2;
const LIVE_FRAMES: u32 = 1 << 1;
/// Frames per batch, as in one poll of a device (`NAPI_POLL_WEIGHT`).
const BATCH: u32 = 64;
const LOG_SIZE: usize = 1 << 16;
/// Bytes of an array's key.
const KEY: u32 = size_of::<u32>() as u32;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Xdp,
    Tc,
}

/// A loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    descriptor: OwnedFd,
    kind: Kind,
}

impl Program {
    /// # Errors
    /// The error contains the verifier's log.
    pub(crate) fn load(name: &str, kind: Kind, instructions: &[Instruction]) -> Result<Self> {
        #[derive(Default)]
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; 16],
            ifindex: u32,
            attach_type: u32,
        }
        let mut log = vec![0_u8; LOG_SIZE];
        // programs of a tail call have the same attach type (Linux 6.18): that of aya's
        let (program_type, attach_type) = match kind {
            Kind::Xdp => (PROG_TYPE_XDP, ATTACH_TYPE_XDP),
            Kind::Tc => (PROG_TYPE_SCHED_CLS, 0),
        };
        let mut attributes = Attributes {
            kind: program_type,
            attach_type,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 1,
            log_size: LOG_SIZE as u32,
            log: log.as_mut_ptr() as u64,
            ..Attributes::default()
        };
        // SAFETY: the pointers are to live memory of the stated lengths, which the kernel reads, or
        // (the log) writes.
        let loaded = unsafe { descriptor(PROG_LOAD, &mut attributes) };
        loaded.map(|descriptor| Self { descriptor, kind }).with_context(|| {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG_SIZE);
            format!("cannot load program {name}: {}", String::from_utf8_lossy(&log[..end]).trim())
        })
    }

    /// Attaches the program to a device of this thread's namespace: native, or at tc ingress.
    pub(crate) fn attach(&self, ifindex: u32) -> Result<Link> {
        let (attach_type, flags, place) = match self.kind {
            Kind::Xdp => (ATTACH_TYPE_XDP, DRIVER_MODE, "an XDP program to the driver"),
            Kind::Tc => (ATTACH_TYPE_TCX_INGRESS, 0, "a program to tc ingress (tcx, Linux 6.6)"),
        };
        let program = self.descriptor.as_raw_fd() as u32;
        // the kernel takes what follows as zero: tcx appends the program
        let mut attributes = [program, ifindex, attach_type, flags, 0, 0, 0, 0];
        // SAFETY: no pointers.
        let link = unsafe { descriptor(LINK_CREATE, &mut attributes) };
        Ok(Link(link.with_context(|| format!("cannot attach {place} of device {ifindex}"))?))
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Runs the program `count` times on one frame, which it gets back as the run before left it.
    pub(crate) fn run(&self, frame: &[u8], context: &[u8], count: u32) -> Result<Output> {
        TestRun { repeat: count, flags: 0, batch_size: 0, context }
            .output(self.descriptor.as_fd(), frame)
            .context("cannot run a program on a frame")
    }

    /// Runs the program on `count` live frames that begin with `frame`; the frames are sent as its
    /// verdict says. Their input device is the loopback device of this thread's namespace. A
    /// recycled frame keeps its changed content.
    pub(crate) fn run_live(&self, frame: &[u8], count: u32) -> Result<()> {
        TestRun { repeat: count, flags: LIVE_FRAMES, batch_size: BATCH, context: &[] }
            .run(self.descriptor.as_fd(), frame)
            .context("cannot run a program on live frames")
    }
}

/// An attached program; dropping it detaches the program.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

impl Link {
    /// Replaces the attached program.
    pub(crate) fn update(&self, program: &Program) -> Result<()> {
        let mut attributes = [self.0.as_raw_fd() as u32, program.descriptor.as_raw_fd() as u32, 0, 0];
        // SAFETY: no pointers.
        unsafe { call(LINK_UPDATE, &mut attributes) }.context("cannot replace an attached program")?;
        Ok(())
    }
}

/// Per-CPU counters.
#[derive(Debug)]
pub(crate) struct Counters {
    map: OwnedFd,
    processors: usize,
}

impl Counters {
    pub(crate) fn create(count: u32) -> Result<Self> {
        let map = create_map(MAP_TYPE_PERCPU_ARRAY, KEY, size_of::<u64>() as u32, count)?;
        Ok(Self { map, processors: possible_processors()? })
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.map.as_raw_fd()
    }

    /// Returns the values of a counter, one for each possible CPU.
    pub(crate) fn read(&self, index: u32) -> Result<Vec<u64>> {
        let mut values = vec![0_u64; self.processors];
        // SAFETY: a per-CPU array of `u64` writes one for every possible processor, which the
        // buffer has room for.
        unsafe { lookup(&self.map, index, values.as_mut_ptr().cast())? };
        Ok(values)
    }
}

/// A map with one program, for a tail call.
#[derive(Debug)]
pub(crate) struct TailCall(OwnedFd);

impl TailCall {
    pub(crate) fn create() -> Result<Self> {
        Ok(Self(create_map(MAP_TYPE_PROG_ARRAY, KEY, size_of::<u32>() as u32, 1)?))
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Sets the program; its kind is that of the program that calls it.
    pub(crate) fn set(&self, program: BorrowedFd<'_>) -> Result<()> {
        set_descriptor(self.0.as_fd(), 0, program)
    }
}

/// Sets the map or program at `key` of a map of maps or programs.
pub(crate) fn set_descriptor(map: BorrowedFd<'_>, key: u32, value: BorrowedFd<'_>) -> Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = value.as_raw_fd() as u32;
    let mut attributes = Attributes {
        map: map.as_raw_fd() as u64,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: key and value are live `u32`s, which is what such maps have.
    unsafe { call(MAP_UPDATE_ELEM, &mut attributes) }.context("cannot set an entry of a map of maps")?;
    Ok(())
}

/// A hash table that evicts what was used least recently.
#[derive(Debug)]
pub(crate) struct LruHash(OwnedFd);

impl LruHash {
    pub(crate) fn create(key_size: u32, value_size: u32, entries: u32) -> Result<Self> {
        Ok(Self(create_map(MAP_TYPE_LRU_HASH, key_size, value_size, entries)?))
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A map that holds one frame.
#[derive(Debug)]
pub(crate) struct Slot {
    map: OwnedFd,
    size: usize,
}

impl Slot {
    pub(crate) fn create(size: usize) -> Result<Self> {
        Ok(Self { map: create_map(MAP_TYPE_ARRAY, KEY, size as u32, 1)?, size })
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.map.as_raw_fd()
    }

    pub(crate) fn read(&self) -> Result<Vec<u8>> {
        // the kernel writes a multiple of 8 bytes
        let mut bytes = vec![0_u8; self.size.next_multiple_of(8)];
        // SAFETY: the map's only value has `size` bytes, which the buffer has room for.
        unsafe { lookup(&self.map, 0, bytes.as_mut_ptr())? };
        bytes.truncate(self.size);
        Ok(bytes)
    }
}

fn create_map(kind: u32, key_size: u32, value_size: u32, entries: u32) -> Result<OwnedFd> {
    let mut attributes = [kind, key_size, value_size, entries];
    // SAFETY: no pointers.
    unsafe { descriptor(MAP_CREATE, &mut attributes) }.context("cannot create a BPF map")
}

/// # Safety
/// `value` has room for what the map keeps at `key`.
unsafe fn lookup(map: &OwnedFd, key: u32, value: *mut u8) -> Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attributes = Attributes {
        map: map.as_raw_fd() as u64,
        key: (&raw const key) as u64,
        value: value as u64,
        flags: 0,
    };
    // SAFETY: the key is a live `u32`, which is what our maps have; the value is the caller's
    // promise.
    unsafe { call(MAP_LOOKUP_ELEM, &mut attributes) }.context("cannot read a BPF map")?;
    Ok(())
}

/// # Safety
/// As for [`call`], of a command that returns a descriptor of the caller's own.
unsafe fn descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let result = unsafe { call(command, attributes)? };
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Returns the number of possible CPUs; a per-CPU map has a value for each.
fn possible_processors() -> Result<usize> {
    let path = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    // "0-1", or "0"
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<usize>().ok());
    Ok(last.with_context(|| format!("{path} is {text:?}"))? + 1)
}
