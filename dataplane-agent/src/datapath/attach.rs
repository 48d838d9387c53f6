//! Classifiers on devices: which programs a device carries, and how they stay there.
//!
//! On a kernel that takes them, tcx links pinned in bpffs; else clsact filters of a fixed priority and handle. Which of
//! the two is found by trying. Both stay when the agent ends, and both are given the new program in place, so that no
//! packet of a restart passes a device without a program.

use std::{
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
    tc::{Hook, adopt_tcx, attach_clsact, attach_tcx, held, no_tcx, remove_filter, unpin},
};

/// Which hooks of tc to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcHooks {
    /// tcx, and clsact where the kernel has no tcx.
    #[default]
    Auto,
    /// clsact filters only.
    Clsact,
}

/// How a program came to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// A tcx link, new.
    Tcx,
    /// A tcx link an earlier agent had pinned, given the new program.
    TcxAdopted,
    /// A clsact filter, new.
    Clsact,
    /// A clsact filter of an earlier agent, given the new program.
    ClsactAdopted,
}

/// Why a program is not attached (or not detached).
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("attach {program} to {device}: {source}")]
    Attach { program: &'static str, device: String, source: ProgramError },
    #[error("adopt the link of {program} on {device}: {source}")]
    Adopt { program: &'static str, device: String, source: LinkError },
    #[error("pin the link of {program} on {device}: {source}")]
    Pin { program: &'static str, device: String, source: PinError },
    #[error("add the qdisc clsact to {device}: {source}")]
    Qdisc { device: String, source: TcError },
    #[error("remove our {direction:?} filter from {device}: {source}")]
    Detach { direction: TcAttachType, device: String, source: ProgramError },
    #[error("list the devices: {0}")]
    Devices(#[source] io::Error),
    #[error(transparent)]
    Pins(#[from] PinsError),
}

/// Egress first: a device whose second attachment fails must not translate packets it will not translate back.
const POD: [Hook; 2] = [(program::TO_POD, TcAttachType::Egress), (program::FROM_POD, TcAttachType::Ingress)];
const UPLINK: [Hook; 2] =
    [(program::TO_WIRE, TcAttachType::Egress), (program::FROM_WIRE, TcAttachType::Ingress)];
const OVERLAY: [Hook; 2] =
    [(program::TO_OVERLAY, TcAttachType::Egress), (program::FROM_OVERLAY, TcAttachType::Ingress)];

impl Datapath {
    /// Hooks the host side of a pod's device, in the network namespace of the calling thread.
    pub fn attach_pod(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, POD)
    }

    /// Takes the programs off a pod's device. That the device is gone already is no error.
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

    pub fn attach_overlay(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, OVERLAY)
    }

    pub fn detach_overlay(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_device(device, OVERLAY)
    }

    /// Removes the pins of devices that no longer exist (a pod that went while no agent ran), and returns their names.
    pub fn sweep_devices(&mut self) -> Result<Vec<String>, AttachError> {
        let present = device_names()?;
        let mut gone = Vec::new();
        for device in self.pins.all_devices()? {
            if !present.contains(&device) {
                remove_links(&self.pins, &device, program::DEVICE)?;
                gone.push(device);
            }
        }
        Ok(gone)
    }

    /// Removes the pins of agents with tables of another version, which detaches their programs: for when ours are on
    /// every device. Returns what was removed.
    pub fn remove_other_versions(&self) -> Result<Vec<PathBuf>, AttachError> {
        Ok(self.pins.remove_other_versions()?)
    }

    fn attach_device(&mut self, device: &str, hooks: [Hook; 2]) -> Result<Attachment, AttachError> {
        let mut fresh: Vec<Hook> = Vec::new();
        let mut attachment = Attachment::Tcx;
        for hook in hooks {
            match self.attach(device, hook) {
                Ok(done) => {
                    attachment = done;
                    if matches!(done, Attachment::Tcx | Attachment::Clsact) {
                        fresh.push(hook);
                    }
                }
                Err(error) => {
                    // only what this call added: an adopted link was at work before and stays so
                    for (program, direction) in fresh {
                        unpin(&self.pins.device_link(program, device))?;
                        remove_filter(device, direction)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(attachment)
    }

    fn detach_device(&mut self, device: &str, hooks: [Hook; 2]) -> Result<(), AttachError> {
        remove_links(&self.pins, device, hooks.map(|(program, _)| program))?;
        for (_, direction) in hooks {
            remove_filter(device, direction)?;
        }
        Ok(())
    }

    fn attach(&mut self, device: &str, (name, direction): Hook) -> Result<Attachment, AttachError> {
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
                    // an agent told to use clsact may have been here before
                    remove_filter(device, direction)?;
                    return Ok(Attachment::Tcx);
                }
                Err(AttachError::Attach { source, .. }) if no_tcx(&source) => {
                    tracing::debug!(device, program = name, "no tcx, using clsact: {source}");
                }
                Err(error) => return Err(error),
            }
        }
        let attachment = attach_clsact(program, device, (name, direction))?;
        unpin(&pin)?;
        Ok(attachment)
    }
}

/// Removes everything any agent ever attached or pinned below `bpffs`, and its filters on the devices of the calling
/// thread's network namespace. Returns what was removed.
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
    let detached_now: Vec<_> = pins.all_links()?.iter().map(|pin| held(pin)).collect();
    let pins = pins.remove_all()?;
    drop(detached_now);
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
