//! Attaches tc programs to devices.
//!
//! With tcx links pinned in bpffs where the kernel supports them (6.6 and later), else with clsact
//! filters of a fixed priority and handle. Both stay attached when the agent ends, and the next
//! agent replaces the program in place, so that no packet passes a device without a program.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use aya::{
    pin::PinError,
    programs::{ProgramError, SchedClassifier, TcAttachType, links::LinkError, tc::TcError},
};
use dataplane_common::abi::names::program;
use nix::net::if_::if_nameindex;

use super::{
    loader::Datapath,
    pins::{Pins, PinsError},
    tc::{TcHook, adopt_tcx, attach_clsact, attach_tcx, open_link, remove_filter, tcx_unsupported, unpin},
};

/// Which tc attach mechanism to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcHooks {
    /// tcx, or clsact if the kernel has no tcx.
    #[default]
    Auto,
    /// clsact filters only.
    Clsact,
}

/// How a program was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// A new tcx link.
    Tcx,
    /// An existing tcx link, pinned by an earlier agent, whose program was replaced.
    TcxAdopted,
    /// A new clsact filter.
    Clsact,
    /// An existing clsact filter of an earlier agent, whose program was replaced.
    ClsactAdopted,
}

impl Attachment {
    /// Its name in log lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::TcxAdopted => "tcx, adopted",
            Self::Clsact => "clsact",
            Self::ClsactAdopted => "clsact, adopted",
        }
    }
}

/// Why a program could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("attach {program} to {device}: {source}")]
    Attach { program: &'static str, device: String, source: ProgramError },
    #[error("adopt the pinned link of {program} on {device}: {source}")]
    Adopt { program: &'static str, device: String, source: LinkError },
    #[error("pin the link of {program} on {device}: {source}")]
    Pin { program: &'static str, device: String, source: PinError },
    #[error("add qdisc clsact to {device}: {source}")]
    Qdisc { device: String, source: TcError },
    #[error("remove the {direction:?} filter of the agent from {device}: {source}")]
    Detach { direction: TcAttachType, device: String, source: ProgramError },
    #[error("list network devices: {0}")]
    Devices(#[source] io::Error),
    #[error(transparent)]
    Pins(#[from] PinsError),
}

/// Egress first: if the second attachment fails, the device must not translate packets without
/// restoring replies.
const POD: [TcHook; 2] =
    [(program::TO_POD, TcAttachType::Egress), (program::FROM_POD, TcAttachType::Ingress)];
const UPLINK: [TcHook; 2] =
    [(program::TO_WIRE, TcAttachType::Egress), (program::FROM_WIRE, TcAttachType::Ingress)];
const OVERLAY: [TcHook; 2] =
    [(program::TO_OVERLAY, TcAttachType::Egress), (program::FROM_OVERLAY, TcAttachType::Ingress)];

impl Datapath {
    /// Attaches the programs to the host side of a pod device, in the network namespace of the
    /// calling thread.
    pub fn attach_pod(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, POD)
    }

    /// Detaches the programs from a pod device. A missing device is not an error.
    pub fn detach_pod(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_device(device, POD)
    }

    pub fn attach_uplink(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, UPLINK)
    }

    pub fn detach_uplink(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_xdp(device)?;
        self.detach_device(device, UPLINK)
    }

    /// Devices with a pinned link of an uplink program.
    pub fn pinned_uplinks(&self) -> Result<BTreeSet<String>, AttachError> {
        let mut devices = BTreeSet::new();
        for name in [program::FROM_WIRE, program::TO_WIRE, program::XDP_WIRE] {
            devices.append(&mut self.pins.devices(name)?);
        }
        Ok(devices)
    }

    /// Follows the renaming of a device: the pins have its name. Its programs stay attached.
    pub fn rename_uplink(&mut self, from: &str, to: &str) -> Result<(), AttachError> {
        for name in [program::FROM_WIRE, program::TO_WIRE, program::XDP_WIRE] {
            self.pins.rename_device(name, from, to)?;
        }
        Ok(())
    }

    pub fn attach_overlay(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, OVERLAY)
    }

    pub fn detach_overlay(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_device(device, OVERLAY)
    }

    /// Removes the pins of devices that no longer exist, and returns the names of these devices.
    pub fn remove_stale_links(&mut self) -> Result<Vec<String>, AttachError> {
        let present = device_names()?;
        let mut stale = Vec::new();
        for device in self.pins.all_devices()? {
            if !present.contains(&device) {
                remove_links(&self.pins, &device, program::DEVICE)?;
                stale.push(device);
            }
        }
        Ok(stale)
    }

    /// Removes the pins of other ABI versions, which detaches their programs. Call it when this
    /// version's programs are attached to every device. Returns the removed paths.
    pub fn remove_other_versions(&self) -> Result<Vec<PathBuf>, AttachError> {
        Ok(self.pins.remove_other_versions()?)
    }

    fn attach_device(&mut self, device: &str, hooks: [TcHook; 2]) -> Result<Attachment, AttachError> {
        let mut added: Vec<TcHook> = Vec::new();
        let mut attachment = Attachment::Tcx;
        for hook in hooks {
            match self.attach(device, hook) {
                Ok(done) => {
                    attachment = done;
                    if matches!(done, Attachment::Tcx | Attachment::Clsact) {
                        added.push(hook);
                    }
                }
                Err(error) => {
                    // only what this call added: an adopted link was in use before and stays
                    // attached
                    for (program, direction) in added {
                        unpin(&self.pins.device_link(program, device))?;
                        remove_filter(device, direction)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(attachment)
    }

    fn detach_device(&mut self, device: &str, hooks: [TcHook; 2]) -> Result<(), AttachError> {
        remove_links(&self.pins, device, hooks.map(|(program, _)| program))?;
        for (_, direction) in hooks {
            remove_filter(device, direction)?;
        }
        Ok(())
    }

    fn attach(&mut self, device: &str, (name, direction): TcHook) -> Result<Attachment, AttachError> {
        let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
        let pin = self.pins.device_link(name, device);
        let program: &mut SchedClassifier = match self.ebpf.program_mut(name) {
            Some(program) => program.try_into().map_err(failed)?,
            None => return Err(failed(ProgramError::NotLoaded)),
        };
        if self.tc == TcHooks::Auto {
            if adopt_tcx(program, device, (name, direction), &pin)? {
                return Ok(Attachment::TcxAdopted);
            }
            match attach_tcx(program, device, (name, direction), &pin) {
                Ok(()) => {
                    // an earlier agent may have been configured to use clsact
                    remove_filter(device, direction)?;
                    return Ok(Attachment::Tcx);
                }
                Err(AttachError::Attach { source, .. }) if tcx_unsupported(&source) => {
                    tracing::debug!(device, program = name, error = %source, "kernel has no tcx, using a clsact filter");
                }
                Err(error) => return Err(error),
            }
        }
        let attachment = attach_clsact(program, device, (name, direction))?;
        unpin(&pin)?;
        Ok(attachment)
    }
}

/// Removes all pins of all agents below `bpffs`, which detaches their programs, and the agent's
/// filters on devices of the calling thread's network namespace. Returns what was removed.
pub fn cleanup(bpffs: &Path) -> Result<Vec<String>, AttachError> {
    let mut removed = Vec::new();
    for device in device_names()? {
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            if remove_filter(&device, direction)? {
                removed.push(format!("{direction:?} filter of {device}"));
            }
        }
    }
    let pins = Pins::new(bpffs);
    let links: Vec<_> = pins.all_links()?.iter().map(|pin| open_link(pin)).collect();
    let pins = pins.remove_all()?;
    // detaches them now: see `open_link`
    drop(links);
    removed.extend(pins.iter().map(|path| path.display().to_string()));
    Ok(removed)
}

fn remove_links<const N: usize>(pins: &Pins, device: &str, programs: [&str; N]) -> Result<(), PinsError> {
    for program in programs {
        unpin(&pins.device_link(program, device))?;
    }
    Ok(())
}

fn device_names() -> Result<Vec<String>, AttachError> {
    let devices = if_nameindex().map_err(|errno| AttachError::Devices(errno.into()))?;
    Ok(devices.iter().map(|device| device.name().to_string_lossy().into_owned()).collect())
}
