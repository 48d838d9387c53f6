//! The program in an uplink's driver: how it gets there and stays there.
//!
//! Native mode or none: the generic mode runs after the kernel has made its packet, later than tc's price has been paid. A device
//! without it works all the same, at tc. The link is pinned and given the new program in place, as those of tc are.

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
    /// Service packets from outside are handled at tc.
    #[default]
    Off,
    /// In the driver, where it can.
    Native,
}

/// How an uplink handles service packets from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XdpState {
    /// At tc, as configured.
    Off,
    /// In the driver.
    Native,
    /// At tc, though it should be in the driver: why.
    Refused(String),
}

impl XdpState {
    /// As `status` shows it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Native => "xdp",
            Self::Off | Self::Refused(_) => "tc",
        }
    }
}

impl Datapath {
    /// Gives an uplink the program in its driver, or takes it away: as configured.
    ///
    /// # Errors
    /// Only what concerns our own pins. A device that cannot have it is no error.
    pub fn attach_xdp(&mut self, device: &str) -> Result<XdpState, AttachError> {
        const NAME: &str = program::XDP_WIRE;
        let pin = self.pins.device_link(NAME, device);
        if self.xdp == XdpUse::Off {
            unpin(&pin)?;
            return Ok(XdpState::Off);
        }
        let failed = |source| AttachError::Attach { program: NAME, device: device.to_owned(), source };
        let program: &mut Xdp = match self.ebpf.program_mut(NAME) {
            Some(program) => program.try_into().map_err(failed)?,
            None => return Err(failed(ProgramError::NotLoaded)),
        };
        let adopting = |source| AttachError::Adopt { program: NAME, device: device.to_owned(), source };
        match PinnedLink::from_pin(&pin) {
            Ok(link) => {
                let link = XdpLink::try_from(FdLink::from(link)).map_err(adopting)?;
                match program.attach_to_link(link) {
                    Ok(id) => {
                        // closes our descriptor only: the pin holds the link
                        drop(program.take_link(id));
                        return Ok(XdpState::Native);
                    }
                    // its device is gone: this one is another of that name
                    Err(error) if errno(&error) == Some(nix::libc::ENOLINK) => {
                        unpin(&pin)?;
                    }
                    Err(source) => return Err(failed(source)),
                }
            }
            Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(adopting(source)),
        }
        let link = match program.attach(device, XdpMode::Driver) {
            Ok(id) => program.take_link(id).map_err(failed)?,
            Err(error) => return Ok(XdpState::Refused(error_chain(&error))),
        };
        let link = match FdLink::try_from(link) {
            Ok(link) => link,
            // attached without a link, which would not outlive the agent: detached again by now
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

    /// Takes the program out of a device's driver.
    pub(super) fn detach_xdp(&self, device: &str) -> Result<(), PinsError> {
        unpin(&self.pins.device_link(program::XDP_WIRE, device)).map(drop)
    }
}

/// The error and what caused it: the kernel's own words are the innermost.
fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut said: Vec<String> = causes.map(ToString::to_string).collect();
    // an outer one may repeat what it was made of
    said.dedup();
    said.join(": ")
}
