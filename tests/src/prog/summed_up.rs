//! `BPF_PROG_TEST_RUN` with the flag that aya has no word for.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

const PROG_TEST_RUN: libc::c_long = 10;
const SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Runs a program on a packet whose sum is known.
///
/// # Errors
/// `EBADMSG` if the sum is another afterwards, `EINVAL` from kernels without the flag.
pub(super) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<()> {
    #[derive(Default)]
    #[repr(C)]
    struct Attributes {
        program: u32,
        result: u32,
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
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        flags: SKB_CHECKSUM_COMPLETE,
        ..Attributes::default()
    };
    // SAFETY: attributes and frame are live, of the stated lengths; the kernel writes to the attributes only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut attributes, size_of::<Attributes>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
