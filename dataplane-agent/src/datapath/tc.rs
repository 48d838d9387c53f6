//! How a classifier gets to a device and stays there: tcx links behind pins, clsact filters by priority and handle.
//!
//! Knows no device's role and none of the programs by name.

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

/// A program and the direction it is for, as tc sees directions.
pub(super) type Hook = (&'static str, TcAttachType);

/// Ours among the filters of a device: before everybody else's, and named by a handle nobody picks by chance.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0xda7a);

/// Gives the link behind the pin the new program. `false`: there is no such link, or its device is gone.
pub(super) fn adopt_tcx(
    program: &mut SchedClassifier,
    device: &str,
    (name, direction): Hook,
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
    // The kernel does not tell aya which device a link is on. If the link's program is not on the device of this name,
    // the link belongs to one that was renamed or is gone.
    let id = link.info().map_err(failed)?.program_id();
    let there = SchedClassifier::query_tcx(device, direction)
        .is_ok_and(|(_, programs)| programs.iter().any(|program| program.id() == id));
    if !there {
        unpin(pin)?;
        return Ok(false);
    }
    let link = SchedClassifierLink::try_from(link).map_err(failed)?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // closes our descriptor only: the pin holds the link
            drop(program.take_link(id));
            Ok(true)
        }
        // the device went this moment
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
    (name, direction): Hook,
    pin: &Path,
) -> Result<(), AttachError> {
    let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
    // first: nobody may change a packet before its flow is known
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(device, direction, options).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    let link = FdLink::try_from(link).map_err(|source| AttachError::Adopt {
        program: name,
        device: device.to_owned(),
        source,
    })?;
    // dropped at once: the pin holds the link
    link.pin(pin).map(drop).map_err(|source| AttachError::Pin {
        program: name,
        device: device.to_owned(),
        source,
    })
}

pub(super) fn attach_clsact(
    program: &mut SchedClassifier,
    device: &str,
    (name, direction): Hook,
) -> Result<Attachment, AttachError> {
    let failed = |source| AttachError::Attach { program: name, device: device.to_owned(), source };
    match qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(source) => return Err(AttachError::Qdisc { device: device.to_owned(), source }),
        Ok(()) => {}
    }
    let filter = SchedClassifierLink::attached(device, direction, FILTER_PRIORITY, FILTER_HANDLE, None)
        .map_err(|error| failed(TcError::IoError(error).into()))?;
    let (id, attachment) = match program.attach_to_link(filter) {
        Ok(id) => (id, Attachment::ClsactAdopted),
        Err(error) if errno(&error) == Some(libc::ENOENT) => {
            let options = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
            let options = TcAttachOptions::Netlink(options);
            (program.attach_with_options(device, direction, options).map_err(failed)?, Attachment::Clsact)
        }
        Err(error) => return Err(failed(error)),
    };
    // Dropped, the link would delete the filter. It is a few numbers and no descriptor, and the filter is to stay when
    // the agent ends: whoever detaches it names it by its priority and handle.
    mem::forget(program.take_link(id).map_err(failed)?);
    Ok(attachment)
}

/// Whether there was one. A device or qdisc that is gone has no filters.
pub(super) fn remove_filter(device: &str, direction: TcAttachType) -> Result<bool, AttachError> {
    use aya::programs::Link as _;

    let Ok(filter) = SchedClassifierLink::attached(device, direction, FILTER_PRIORITY, FILTER_HANDLE, None)
    else {
        return Ok(false);
    };
    match filter.detach() {
        Ok(()) => Ok(true),
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(false),
        Err(source) => Err(AttachError::Detach { direction, device: device.to_owned(), source }),
    }
}

/// Removes the pin of a link, and with it the link. Whether there was one.
pub(super) fn unpin(pin: &Path) -> Result<bool, PinsError> {
    let _detached_now = held(pin);
    Pins::remove(pin)
}

/// Holds the link behind a pin, if there is one, while the pin is removed. The kernel detaches a link that loses its pin
/// some time later, in a work queue, but one that loses its last descriptor at once.
pub(super) fn held(pin: &Path) -> Option<PinnedLink> {
    PinnedLink::from_pin(pin).ok()
}

/// What a kernel before 6.6 says to a link of a type it does not know.
pub(super) fn no_tcx(error: &ProgramError) -> bool {
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
