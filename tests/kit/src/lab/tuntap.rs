//! Links of two tun or tap devices, whose packets a thread carries in user space: devices without
//! Ethernet header (tun), and frames as virtual machines send them (tap with a virtio header, in
//! which a large TCP packet is one frame).

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::OpenOptionsExt as _,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::netns::Namespace;

/// The larger of IPv4 and IPv6, an Ethernet header, a virtio header.
const MAX_FRAME: usize = 65_575 + 14 + VIRTIO_HEADER;
/// `struct virtio_net_hdr` (`include/uapi/linux/virtio_net.h`).
const VIRTIO_HEADER: usize = 10;
/// How long a thread waits for a packet before it looks whether to end.
const POLL_MS: u8 = 100;

/// What a device carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Ethernet frames.
    Tap,
    /// IP packets.
    Tun,
}

/// Two devices; the threads between them end, and the devices disappear, when this is dropped.
#[derive(Debug)]
pub struct TunTap {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl TunTap {
    /// Creates a device in each of two namespaces, sets both up and carries packets between them,
    /// with checksums and segmentation left to the receiver.
    pub fn create(layer: Layer, a: (&Namespace, &str), b: (&Namespace, &str)) -> Result<Self> {
        let (a, b) = (device(layer, a)?, device(layer, b)?);
        let stop = Arc::new(AtomicBool::new(false));
        let threads =
            vec![carry(a.try_clone()?, b.try_clone()?, Arc::clone(&stop)), carry(b, a, Arc::clone(&stop))];
        Ok(Self { stop, threads })
    }
}

impl Drop for TunTap {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // its panic is on standard error already
            drop(thread.join());
        }
    }
}

fn device(layer: Layer, (namespace, name): (&Namespace, &str)) -> Result<File> {
    let file = namespace.enter(|| open(layer, name))?.with_context(|| format!("create device {name}"))?;
    namespace.ip(&format!("link set {name} up"))?;
    Ok(file)
}

fn open(layer: Layer, name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    let layer = if layer == Layer::Tun { libc::IFF_TUN } else { libc::IFF_TAP };
    request.ifr_ifru.ifru_flags = (layer | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the request is live and initialised whole.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let offload = libc::c_ulong::from(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6);
    // SAFETY: the argument is a number.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) })?;
    Ok(file)
}

/// Writes to `to` what arrives at `from`. A packet that the other device refuses is lost, as on a
/// wire.
fn carry(mut from: File, mut to: File, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut frame = vec![0; MAX_FRAME];
        while !stop.load(Ordering::Relaxed) {
            match from.read(&mut frame) {
                Ok(length) => {
                    let _lost = to.write(&frame[..length]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut descriptors = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
                    let _interrupted = poll(&mut descriptors, PollTimeout::from(POLL_MS));
                }
                // the device is down, or gone
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(POLL_MS.into())),
            }
        }
    })
}
