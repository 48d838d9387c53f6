//! Mechanics of tc attachments: pinned tcx links, and clsact filters by priority and handle.
//!
//! Knows neither the roles of devices nor the programs.

use std::{io, mem, path::Path};

use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
    },
    sys::SyscallError,
};
use nix::libc;

use super::{
    attach::{AttachError, Attachment},
    pins::{Pins, PinsError},
};

/// A program of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct TcHook {
    pub program: &'static str,
    pub direction: TcAttachType,
    /// Priority of its clsact filter.
    pub priority: u16,
    /// The agent's program that runs in front of it: the next one in the order of tcx links. It is
    /// attached earlier.
    pub behind: Option<&'static str>,
}

impl TcHook {
    /// The only program of its direction, or the first.
    pub(super) const fn first(program: &'static str, direction: TcAttachType) -> Self {
        Self { program, direction, priority: FILTER_PRIORITIES[0], behind: None }
    }
}

/// Priorities and handle of the agent's filters: before all other filters, and with a distinctive
/// handle.
pub(super) const FILTER_PRIORITIES: [u16; 3] = [1, 2, 3];
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0xda7a);

/// Replaces the program of a pinned link. Returns false if the link or its device does not exist.
pub(super) fn adopt_tcx(
    program: &mut SchedClassifier,
    device: &str,
    TcHook { program: name, direction, .. }: TcHook,
    pin: &Path,
) -> Result<bool, AttachError> {
    let failed = |source| AttachError::Adopt { program: name, device: device.to_owned(), source };
    let link = match PinnedLink::from_pin(pin) {
        Ok(link) => FdLink::from(link),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(source) => return Err(failed(source)),
    };
    // aya does not return the device of a link. If the link's program is not attached to the device
    // with this name, the link belongs to a device that was renamed or deleted.
    let id = link.info().map_err(failed)?.program_id();
    let is_attached = SchedClassifier::query_tcx(device, direction)
        .is_ok_and(|(_, programs)| programs.iter().any(|program| program.id() == id));
    if !is_attached {
        unpin(pin)?;
        return Ok(false);
    }
    let link = SchedClassifierLink::try_from(link).map_err(failed)?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // closes the file descriptor only: the pin keeps the link
            drop(program.take_link(id));
            Ok(true)
        }
        // the device was deleted in between
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::ENOLINK) =>
        {
            unpin(pin)?;
            Ok(false)
        }
        Err(source) => Err(AttachError::Attach { program: name, device: device.to_owned(), source }),
    }
}

pub(super) fn attach_tcx(
    program: &mut SchedClassifier,
    device: &str,
    TcHook { program: name, direction, .. }: TcHook,
    order: LinkOrder,
    pin: &Path,
) -> Result<(), AttachError> {
    let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
    let options = TcAttachOptions::TcxOrder(order);
    let id = program.attach_with_options(device, direction, options).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    let link = FdLink::try_from(link).map_err(|source| AttachError::Adopt {
        program: name,
        device: device.to_owned(),
        source,
    })?;
    // the pin keeps the link
    link.pin(pin).map(drop).map_err(|source| AttachError::Pin {
        program: name,
        device: device.to_owned(),
        source,
    })
}

pub(super) fn attach_clsact(
    program: &mut SchedClassifier,
    device: &str,
    TcHook { program: name, direction, priority, .. }: TcHook,
) -> Result<Attachment, AttachError> {
    let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
    match qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(source) => return Err(AttachError::Qdisc { device: device.to_owned(), source }),
        Ok(()) => {}
    }
    let filter = SchedClassifierLink::attached(device, direction, priority, FILTER_HANDLE, None)
        .map_err(|error| failed(TcError::IoError(error).into()))?;
    let (id, attachment) = match program.attach_to_link(filter) {
        Ok(id) => (id, Attachment::ClsactAdopted),
        Err(error) if errno(&error) == Some(libc::ENOENT) => {
            let options = NlOptions { priority, handle: FILTER_HANDLE, classid: None };
            let options = TcAttachOptions::Netlink(options);
            (program.attach_with_options(device, direction, options).map_err(failed)?, Attachment::Clsact)
        }
        Err(error) => return Err(failed(error)),
    };
    // Dropping the link would delete the filter, which must stay when the agent ends. The link has
    // no file descriptor: the filter is later found by priority and handle.
    mem::forget(program.take_link(id).map_err(failed)?);
    Ok(attachment)
}

/// Removes a filter of the agent. Returns false if the filter, the qdisc or the device does not
/// exist.
pub(super) fn remove_filter(
    device: &str,
    direction: TcAttachType,
    priority: u16,
) -> Result<bool, AttachError> {
    use aya::programs::Link as _;

    let Ok(filter) = SchedClassifierLink::attached(device, direction, priority, FILTER_HANDLE, None) else {
        return Ok(false);
    };
    match filter.detach() {
        Ok(()) => Ok(true),
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(false),
        Err(source) => Err(AttachError::Detach { direction, device: device.to_owned(), source }),
    }
}

/// Removes the pin of a link, which detaches the link. Returns false if the pin does not exist.
pub(super) fn unpin(pin: &Path) -> Result<bool, PinsError> {
    let _link = open_link(pin);
    Pins::remove(pin)
}

/// Opens a pinned link, to keep a file descriptor while the pin is removed. When a pin was the last
/// reference, the kernel detaches the link later, in a work queue; when a file descriptor was, it
/// detaches the link at once.
pub(super) fn open_link(pin: &Path) -> Option<PinnedLink> {
    PinnedLink::from_pin(pin).ok()
}

/// Whether the error is that of a kernel before 6.6, which has no tcx links.
pub(super) fn tcx_unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::E2BIG))
}

pub(super) fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error()
        }
        _ => None,
    }
}
