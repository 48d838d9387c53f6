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
    programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, links::LinkError, tc::TcError},
};
use dataplane_common::abi::names::program;
use nix::net::if_::if_nameindex;

use super::{
    loader::Datapath,
    pins::{Pins, PinsError},
    tc::{
        FILTER_PRIORITIES, TcHook, adopt_tcx, attach_clsact, attach_tcx, open_link, remove_filter,
        tcx_unsupported, unpin,
    },
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
const POD: [TcHook; 2] = pair(program::TO_POD, program::FROM_POD);
const UPLINK: [TcHook; 2] = pair(program::TO_WIRE, program::FROM_WIRE);
const OVERLAY: [TcHook; 2] = pair(program::TO_OVERLAY, program::FROM_OVERLAY);
/// An uplink without Ethernet header. In this order no packet meets an incomplete chain: `leave_l3`
/// leaves a packet without header as it is, and `to_wire` comes behind `to_l3`.
const UPLINK_L3: [TcHook; 5] = [
    TcHook { priority: FILTER_PRIORITIES[2], ..TcHook::first(program::LEAVE_L3, TcAttachType::Egress) },
    TcHook::first(program::TO_L3, TcAttachType::Egress),
    TcHook {
        priority: FILTER_PRIORITIES[1],
        behind: Some(program::TO_L3),
        ..TcHook::first(program::TO_WIRE, TcAttachType::Egress)
    },
    TcHook::first(program::FROM_L3, TcAttachType::Ingress),
    TcHook {
        priority: FILTER_PRIORITIES[1],
        behind: Some(program::FROM_L3),
        ..TcHook::first(program::FROM_WIRE, TcAttachType::Ingress)
    },
];

const fn pair(egress: &'static str, ingress: &'static str) -> [TcHook; 2] {
    [TcHook::first(egress, TcAttachType::Egress), TcHook::first(ingress, TcAttachType::Ingress)]
}

impl Datapath {
    /// Attaches the programs to the host side of a pod device, in the network namespace of the
    /// calling thread.
    pub fn attach_pod(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, &POD)
    }

    /// Detaches the programs from a pod device. A missing device is not an error.
    pub fn detach_pod(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_device(device, &POD)
    }

    pub fn attach_uplink(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, &UPLINK)
    }

    /// As [`Self::attach_uplink`], for a device whose packets have no Ethernet header.
    pub fn attach_l3_uplink(&mut self, device: &str) -> Result<Attachment, AttachError> {
        let pinned = UPLINK_L3.iter().filter(|hook| self.pins.device_link(hook.program, device).exists());
        if (1..UPLINK_L3.len()).contains(&pinned.count()) {
            // an interrupted attempt left them, and the order of the missing links would be wrong
            self.detach_device(device, &UPLINK_L3)?;
        }
        self.attach_device(device, &UPLINK_L3)
    }

    /// Detaches the programs of either kind of uplink.
    pub fn detach_uplink(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_xdp(device)?;
        self.detach_device(device, &UPLINK_L3)
    }

    /// Devices with a pinned link of an uplink program.
    pub fn pinned_uplinks(&self) -> Result<BTreeSet<String>, AttachError> {
        let mut devices = BTreeSet::new();
        for name in program::UPLINK {
            devices.append(&mut self.pins.devices(name)?);
        }
        Ok(devices)
    }

    /// Follows the renaming of a device: the pins have its name. Its programs stay attached.
    pub fn rename_uplink(&mut self, from: &str, to: &str) -> Result<(), AttachError> {
        for name in program::UPLINK {
            self.pins.rename_device(name, from, to)?;
        }
        Ok(())
    }

    pub fn attach_overlay(&mut self, device: &str) -> Result<Attachment, AttachError> {
        self.attach_device(device, &OVERLAY)
    }

    pub fn detach_overlay(&mut self, device: &str) -> Result<(), AttachError> {
        self.detach_device(device, &OVERLAY)
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

    fn attach_device(&mut self, device: &str, hooks: &[TcHook]) -> Result<Attachment, AttachError> {
        let mut added: Vec<TcHook> = Vec::new();
        let mut attachment = Attachment::Tcx;
        for &hook in hooks {
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
                    self.detach_device(device, &added)?;
                    return Err(error);
                }
            }
        }
        Ok(attachment)
    }

    /// In reverse order of [`Self::attach_device`].
    fn detach_device(&mut self, device: &str, hooks: &[TcHook]) -> Result<(), AttachError> {
        for hook in hooks.iter().rev() {
            unpin(&self.pins.device_link(hook.program, device))?;
            remove_filter(device, hook.direction, hook.priority)?;
        }
        Ok(())
    }

    fn attach(&mut self, device: &str, hook: TcHook) -> Result<Attachment, AttachError> {
        let TcHook { program: name, direction, priority, behind } = hook;
        let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
        let order = self.order(behind).map_err(failed)?;
        let pin = self.pins.device_link(name, device);
        let program: &mut SchedClassifier = match self.programs.get_mut(name) {
            Some(program) => program.try_into().map_err(failed)?,
            None => return Err(failed(ProgramError::NotLoaded)),
        };
        if self.tc == TcHooks::Auto {
            if adopt_tcx(program, device, hook, &pin)? {
                return Ok(Attachment::TcxAdopted);
            }
            match attach_tcx(program, device, hook, order, &pin) {
                Ok(()) => {
                    // an earlier agent may have been configured to use clsact
                    remove_filter(device, direction, priority)?;
                    return Ok(Attachment::Tcx);
                }
                Err(AttachError::Attach { source, .. }) if tcx_unsupported(&source) => {
                    tracing::debug!(device, program = name, error = %source, "kernel has no tcx, using a clsact filter");
                }
                Err(error) => return Err(error),
            }
        }
        let attachment = attach_clsact(program, device, hook)?;
        unpin(&pin)?;
        Ok(attachment)
    }

    /// Before the programs of others, which must not change a packet before its flow lookup.
    fn order(&self, behind: Option<&str>) -> Result<LinkOrder, ProgramError> {
        let Some(name) = behind else { return Ok(LinkOrder::first()) };
        let program = self.programs.get(name).ok_or(ProgramError::NotLoaded)?;
        LinkOrder::after_program(<&SchedClassifier>::try_from(program)?)
    }
}

/// Removes all pins of all agents below `bpffs`, which detaches their programs, and the agent's
/// filters on devices of the calling thread's network namespace. Returns what was removed.
pub fn cleanup(bpffs: &Path) -> Result<Vec<String>, AttachError> {
    let mut removed = Vec::new();
    for device in device_names()? {
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            for priority in FILTER_PRIORITIES {
                if remove_filter(&device, direction, priority)? {
                    removed.push(format!("{direction:?} filter of {device}"));
                }
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
