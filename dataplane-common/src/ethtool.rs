//! Driver and statistics of a network device: `SIOCETHTOOL` (`include/uapi/linux/ethtool.h`), as
//! netlink does not offer the driver's own statistics.

use std::{io, os::fd::AsRawFd as _, os::unix::net::UnixDatagram};

const GDRVINFO: u32 = 0x3;
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const SS_STATS: u32 = 1;
/// Offsets of `driver` and `n_stats` in `struct ethtool_drvinfo`, and its size.
const DRIVER: usize = 4;
const N_STATS: usize = 180;
const DRVINFO_BYTES: usize = 196;
/// `ETH_GSTRING_LEN`
const NAME_BYTES: usize = 32;
/// Room for statistics that appear between two calls, such as those of new queues.
const SPARE: usize = 4_096;
const WORD: usize = size_of::<u64>();

/// Name of the driver of a device in the calling thread's network namespace.
pub fn driver(device: &str) -> io::Result<String> {
    Ok(text(&bytes(&info(device)?)[DRIVER..DRIVER + NAME_BYTES]))
}

/// The statistics that the driver counts, with their names; none if it counts none.
pub fn statistics(device: &str) -> io::Result<Vec<(String, u64)>> {
    let count = u32_at(&info(device)?, N_STATS) as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    // struct ethtool_gstrings: cmd, string_set, len, data; 12 bytes before the data
    let mut names = vec![0; 2 + (count + SPARE) * NAME_BYTES / WORD];
    names[0] = words(GSTRINGS, SS_STATS);
    call(device, &mut names)?;
    // struct ethtool_stats: cmd, n_stats, data
    let mut values = vec![0; 1 + count + SPARE];
    values[0] = words(GSTATS, count as u32);
    call(device, &mut values)?;
    let named = u32_at(&names, 8) as usize;
    let valued = u32_at(&values, 4) as usize;
    let names = bytes(&names);
    let names = names.get(12..).unwrap_or_default().chunks_exact(NAME_BYTES).map(text);
    Ok(names.zip(values.into_iter().skip(1)).take(count.min(named).min(valued)).collect())
}

/// `struct ethtool_drvinfo`.
fn info(device: &str) -> io::Result<Vec<u64>> {
    let mut info = vec![0; DRVINFO_BYTES.div_ceil(WORD)];
    info[0] = words(GDRVINFO, 0);
    call(device, &mut info)?;
    Ok(info)
}

fn call(device: &str, buffer: &mut [u64]) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // SAFETY: an all-zero `ifreq` is a valid one.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    // the last byte stays 0
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: the socket is open. The kernel writes the answer of the command into the buffer,
    // which is aligned for it and at least as long; by `SPARE` entries longer where the length may
    // have changed since it was read.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Two 32-bit fields as they lie in memory.
const fn words(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn bytes(buffer: &[u64]) -> Vec<u8> {
    buffer.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn u32_at(buffer: &[u64], offset: usize) -> u32 {
    let bytes = buffer[offset / WORD].to_ne_bytes();
    let half = offset % WORD;
    u32::from_ne_bytes([bytes[half], bytes[half + 1], bytes[half + 2], bytes[half + 3]])
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_and_long_name_are_errors() {
        assert!(driver("no-such-device").is_err());
        assert!(driver("a-name-of-16-byt").is_err());
    }

    #[test]
    fn fields_lie_in_memory_as_in_the_structures() {
        let buffer = [words(1, 2), words(3, 4)];
        assert_eq!([0, 4, 8, 12].map(|offset| u32_at(&buffer, offset)), [1, 2, 3, 4]);
        assert_eq!(bytes(&buffer)[4..8], 2_u32.to_ne_bytes());
    }
}
