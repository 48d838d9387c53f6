//! The commands of the `bpf` system call that the forwarding rows need: load a generated program,
//! attach it to a device's driver, run it on live frames, read its counters.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result};

use super::assembly::Instruction;
use dataplane_testkit::sys_bpf::{TestRun, call};

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;

const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`: fails if the driver has no native XDP.
const DRIVER_MODE: u32 = 1 << 2;
const LIVE_FRAMES: u32 = 1 << 1;
/// Frames per batch, as in one poll of a device (`NAPI_POLL_WEIGHT`).
const BATCH: u32 = 64;
const LOG_SIZE: usize = 1 << 16;

/// A loaded XDP program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl Program {
    /// # Errors
    /// The error contains the verifier's log.
    pub(super) fn load(name: &str, instructions: &[Instruction]) -> Result<Self> {
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
        }
        let mut log = vec![0_u8; LOG_SIZE];
        let mut attributes = Attributes {
            kind: PROG_TYPE_XDP,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 1,
            log_size: LOG_SIZE as u32,
            log: log.as_mut_ptr() as u64,
        };
        // SAFETY: the pointers are to live memory of the stated lengths, which the kernel reads, or
        // (the log) writes.
        let loaded = unsafe { descriptor(PROG_LOAD, &mut attributes) };
        loaded.map(Self).with_context(|| {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG_SIZE);
            format!("cannot load program {name}: {}", String::from_utf8_lossy(&log[..end]).trim())
        })
    }

    /// Attaches the program in native mode to a device of this thread's namespace.
    pub(super) fn attach(&self, ifindex: u32) -> Result<Link> {
        let mut attributes = [self.0.as_raw_fd() as u32, ifindex, ATTACH_TYPE_XDP, DRIVER_MODE];
        // SAFETY: no pointers.
        let link = unsafe { descriptor(LINK_CREATE, &mut attributes) };
        Ok(Link(
            link.with_context(|| format!("cannot attach an XDP program to the driver of device {ifindex}"))?,
        ))
    }

    /// Runs the program on `count` live frames that begin with `frame`; the frames are sent as its
    /// verdict says. Their input device is the loopback device of this thread's namespace. A
    /// recycled frame keeps its changed content.
    pub(super) fn run_live(&self, frame: &[u8], count: u32) -> Result<()> {
        TestRun { repeat: count, flags: LIVE_FRAMES, batch_size: BATCH, context: &[] }
            .run(self.0.as_fd(), frame)
            .context("cannot run a program on live frames")
    }
}

/// An attached program; dropping it detaches the program.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Replaces the attached program.
    pub(super) fn update(&self, program: &Program) -> Result<()> {
        let mut attributes = [self.0.as_raw_fd() as u32, program.0.as_raw_fd() as u32, 0, 0];
        // SAFETY: no pointers.
        unsafe { call(LINK_UPDATE, &mut attributes) }.context("cannot replace an attached program")?;
        Ok(())
    }
}

/// Per-CPU counters.
#[derive(Debug)]
pub(super) struct Counters {
    map: OwnedFd,
    processors: usize,
}

impl Counters {
    pub(super) fn create(count: u32) -> Result<Self> {
        let map = create_map(MAP_TYPE_PERCPU_ARRAY, size_of::<u64>() as u32, count)?;
        Ok(Self { map, processors: possible_processors()? })
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.map.as_raw_fd()
    }

    /// Returns the values of a counter, one for each possible CPU.
    pub(super) fn read(&self, index: u32) -> Result<Vec<u64>> {
        let mut values = vec![0_u64; self.processors];
        // SAFETY: a per-CPU array of `u64` writes one for every possible processor, which the
        // buffer has room for.
        unsafe { lookup(&self.map, index, values.as_mut_ptr().cast())? };
        Ok(values)
    }
}

/// A map that holds one frame.
#[derive(Debug)]
pub(super) struct Slot {
    map: OwnedFd,
    size: usize,
}

impl Slot {
    pub(super) fn create(size: usize) -> Result<Self> {
        Ok(Self { map: create_map(MAP_TYPE_ARRAY, size as u32, 1)?, size })
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.map.as_raw_fd()
    }

    pub(super) fn read(&self) -> Result<Vec<u8>> {
        // the kernel writes a multiple of 8 bytes
        let mut bytes = vec![0_u8; self.size.next_multiple_of(8)];
        // SAFETY: the map's only value has `size` bytes, which the buffer has room for.
        unsafe { lookup(&self.map, 0, bytes.as_mut_ptr())? };
        bytes.truncate(self.size);
        Ok(bytes)
    }
}

fn create_map(kind: u32, value_size: u32, entries: u32) -> Result<OwnedFd> {
    let mut attributes = [kind, size_of::<u32>() as u32, value_size, entries];
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
