//! The `bpf` system call, for commands and flags that aya does not offer.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use anyhow::{Context as _, Result, ensure};
use aya::util::nr_cpus;

const PROG_TEST_RUN: libc::c_long = 10;
const MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Parameters of `BPF_PROG_TEST_RUN`.
#[derive(Clone, Copy, Debug)]
pub struct TestRun<'a> {
    pub repeat: u32,
    /// Bits of `BPF_F_TEST_..` (include/uapi/linux/bpf.h).
    pub flags: u32,
    /// Batch size for live frames; 0: the kernel's default.
    pub batch_size: u32,
    /// The program's context, as far as it may be set; empty: the kernel's default.
    pub context: &'a [u8],
}

/// The result of the last of the runs of a [`TestRun`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub returned: u32,
    pub frame: Vec<u8>,
}

impl TestRun<'_> {
    /// Runs the program on `frame` and discards the output.
    pub fn run(self, program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<()> {
        self.run_into(program, frame, &mut []).map(drop)
    }

    /// Runs the program on `frame`.
    pub fn output(self, program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<Output> {
        let mut out = vec![0; frame.len() + 256];
        let (returned, length) = self.run_into(program, frame, &mut out)?;
        out.truncate(length as usize);
        Ok(Output { returned, frame: out })
    }

    /// Returns the program's result and the length of the output.
    fn run_into(self, program: BorrowedFd<'_>, frame: &[u8], out: &mut [u8]) -> io::Result<(u32, u32)> {
        #[derive(Default)]
        #[repr(C)]
        struct Attributes {
            program: u32,
            returned: u32,
            data_size_in: u32,
            data_size_out: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            context_size_in: u32,
            context_size_out: u32,
            context_in: u64,
            context_out: u64,
            flags: u32,
            cpu: u32,
            batch_size: u32,
            padding: u32,
        }
        let mut attributes = Attributes {
            program: program.as_raw_fd().cast_unsigned(),
            data_size_in: frame.len() as u32,
            data_size_out: out.len() as u32,
            data_in: frame.as_ptr() as u64,
            data_out: if out.is_empty() { 0 } else { out.as_mut_ptr() as u64 },
            repeat: self.repeat,
            flags: self.flags,
            batch_size: self.batch_size,
            context_size_in: self.context.len() as u32,
            context_in: if self.context.is_empty() { 0 } else { self.context.as_ptr() as u64 },
            ..Attributes::default()
        };
        // SAFETY: frame and context are live memory of the stated lengths, which the kernel reads,
        // and `out` is memory of its length, which the kernel writes.
        unsafe { call(PROG_TEST_RUN, &mut attributes) }?;
        Ok((attributes.returned, attributes.data_size_out))
    }
}

/// Reads the first `count` values of a per-CPU array, each summed over all CPUs (Linux 5.13).
pub fn sums_of_array(map: BorrowedFd<'_>, count: u32) -> Result<Vec<u64>> {
    #[derive(Default)]
    #[repr(C)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        elem_flags: u64,
        flags: u64,
    }
    let cpus = nr_cpus().map_err(|(_, error)| error).context("number of cpus")?;
    let mut last_key = 0_u32;
    let mut keys = vec![0_u32; count as usize];
    let mut values = vec![0_u64; keys.len() * cpus];
    let mut attributes = Attributes {
        out_batch: std::ptr::from_mut(&mut last_key) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map: map.as_raw_fd().cast_unsigned(),
        ..Attributes::default()
    };
    // SAFETY: the kernel writes one key and a value per CPU for each of `count` entries, and the
    // last key; all three buffers have that size and outlive the call.
    unsafe { call(MAP_LOOKUP_BATCH, &mut attributes) }.context("BPF_MAP_LOOKUP_BATCH of an array")?;
    ensure!(attributes.count == count, "read {} of {count} array values", attributes.count);
    Ok(values.chunks(cpus).map(|value| value.iter().sum()).collect())
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `attributes` has the layout of the kernel's attributes for `command`, and every address in it
/// points to memory that the command may read or write.
pub unsafe fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: by the caller's contract; the kernel treats missing attributes as zero.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
