//! Attaches the XDP program to an uplink.
//!
//! In native mode only: generic XDP runs after the kernel has allocated the socket buffer, so it
//! saves nothing compared with tc. A device without native XDP is handled at tc. The link is
//! pinned, and its program is replaced in place.

use std::io;

use aya::programs::{
    ProgramError, Xdp, XdpMode,
    links::{FdLink, LinkError, PinnedLink},
    xdp::XdpLink,
};
use dataplane_common::abi::names::program;

use super::{
    attach::AttachError,
    loader::Datapath,
    pins::PinsError,
    tc::{errno, unpin},
};

/// Whether to use XDP on uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpUse {
    /// No XDP: service packets from outside are handled at tc.
    #[default]
    Off,
    /// Native XDP, on devices that support it.
    Native,
}

/// Where an uplink handles service packets from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XdpState {
    /// At tc, as configured.
    Off,
    /// In XDP, in native mode.
    Native,
    /// At tc, because XDP does not work on the device: the reason.
    Refused(String),
}

impl XdpState {
    /// The name that `status` shows.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Native => "xdp",
            Self::Off | Self::Refused(_) => "tc",
        }
    }
}

impl Datapath {
    /// Attaches the XDP program to an uplink, or detaches it, as configured.
    ///
    /// # Errors
    ///
    /// Errors of the agent's pins. A device without native XDP is not an error.
    pub fn attach_xdp(&mut self, device: &str) -> Result<XdpState, AttachError> {
        const NAME: &str = program::XDP_WIRE;
        let pin = self.pins.device_link(NAME, device);
        if self.xdp == XdpUse::Off {
            unpin(&pin)?;
            return Ok(XdpState::Off);
        }
        let failed = |source| AttachError::Attach { program: NAME, device: device.to_owned(), source };
        let program: &mut Xdp = match self.programs.get_mut(NAME) {
            Some(program) => program.try_into().map_err(failed)?,
            None => return Err(failed(ProgramError::NotLoaded)),
        };
        let adopt_error = |source| AttachError::Adopt { program: NAME, device: device.to_owned(), source };
        match PinnedLink::from_pin(&pin) {
            Ok(link) => {
                let link = XdpLink::try_from(FdLink::from(link)).map_err(adopt_error)?;
                match program.attach_to_link(link) {
                    Ok(id) => {
                        // closes the file descriptor only: the pin keeps the link
                        drop(program.take_link(id));
                        return Ok(XdpState::Native);
                    }
                    // the link's device was deleted: this is another one with the same name
                    Err(error) if errno(&error) == Some(nix::libc::ENOLINK) => {
                        unpin(&pin)?;
                    }
                    Err(source) => return Err(failed(source)),
                }
            }
            Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(adopt_error(source)),
        }
        let link = match program.attach(device, XdpMode::Driver) {
            Ok(id) => program.take_link(id).map_err(failed)?,
            Err(error) => return Ok(XdpState::Refused(error_chain(&error))),
        };
        let link = match FdLink::try_from(link) {
            Ok(link) => link,
            // the kernel attached without a BPF link, which cannot be pinned; dropping it detached
            // the program
            Err(error) => return Ok(XdpState::Refused(error.to_string())),
        };
        let pinned = link.pin(&pin);
        pinned.map(drop).map_err(|source| AttachError::Pin {
            program: NAME,
            device: device.to_owned(),
            source,
        })?;
        Ok(XdpState::Native)
    }

    /// Whether the configuration asks for XDP.
    pub fn uses_xdp(&self) -> bool {
        self.xdp == XdpUse::Native
    }

    /// Detaches the XDP program from a device on which it does not work.
    pub fn refuse_xdp(&self, device: &str, reason: String) -> Result<XdpState, AttachError> {
        self.detach_xdp(device)?;
        Ok(XdpState::Refused(reason))
    }

    /// Detaches the XDP program from a device.
    pub(super) fn detach_xdp(&self, device: &str) -> Result<(), PinsError> {
        unpin(&self.pins.device_link(program::XDP_WIRE, device)).map(drop)
    }
}

/// The error with its sources: the innermost is the kernel's error.
fn error_chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let mut messages: Vec<String> = sources.map(ToString::to_string).collect();
    // an error may have the same message as its source
    messages.dedup();
    messages.join(": ")
}
