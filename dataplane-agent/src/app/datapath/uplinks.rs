//! Attaches the node's programs: to uplinks, which come and go, to the overlay device and the
//! cgroup.

use std::{collections::BTreeSet, time::Instant};

use super::{AttachedUplink, NodeDatapath, StartError};
use crate::{
    config::Config,
    datapath::{AttachError, XdpState, default_cgroup, table::TableError},
    netlink::Uplink,
};

/// Why an uplink has no programs.
#[derive(Debug, thiserror::Error)]
enum UplinkError {
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Table(#[from] TableError),
}

impl NodeDatapath {
    /// Detaches the programs of an earlier agent from devices that are no uplinks: the
    /// configuration, or the devices, may have changed in between.
    pub(super) fn detach_others(&mut self) -> Result<(), StartError> {
        let uplinks: BTreeSet<&str> = self.plan.uplinks.iter().map(|uplink| uplink.name.as_str()).collect();
        for device in self.datapath.pinned_uplinks()? {
            if !uplinks.contains(device.as_str()) {
                self.datapath.detach_uplink(&device)?;
                tracing::info!("detached from {device}: not an uplink");
            }
        }
        // clsact filters have no pins
        let others = self.plan.choices.iter().filter(|choice| !choice.is_uplink);
        for other in others.filter(|choice| choice.name != self.plan.overlay_device) {
            self.datapath.detach_uplink(&other.name)?;
        }
        Ok(())
    }

    /// Attaches programs to new uplinks, and detaches them from devices that are none any more.
    /// Errors are kept in `uplink_errors`.
    pub(super) fn attach_uplinks(&mut self) {
        self.uplink_errors.clear();
        let uplinks = self.plan.uplinks.clone();
        let kept = self.uplink_indexes();
        let gone: Vec<u32> =
            self.attached.keys().filter(|ifindex| !kept.contains(ifindex)).copied().collect();
        for ifindex in gone {
            self.detach_gone(ifindex);
        }
        if let Err(error) = self.follow_renames(&uplinks) {
            tracing::warn!(%error, "cannot move the pins of a renamed uplink");
        }
        for uplink in &uplinks {
            if let Err(error) = self.attach_uplink(uplink) {
                self.uplink_errors.insert(uplink.name.clone(), error.to_string());
            }
        }
        // after the programs of their devices
        if let Err(error) = self.devices.retain(&uplinks) {
            tracing::warn!(%error, "cannot remove the row of a former uplink from DEVICES; retrying at the next audit");
        }
    }

    fn detach_gone(&mut self, ifindex: u32) {
        let Some(AttachedUplink { name, .. }) = self.attached.remove(&ifindex) else { return };
        // another device may have the name now
        if self.plan.uplinks.iter().any(|uplink| uplink.name == name) {
            return;
        }
        match self.datapath.detach_uplink(&name) {
            Ok(()) => tracing::info!("detached from {name}: no longer an uplink"),
            Err(error) => drop(self.uplink_errors.insert(name, error.to_string())),
        }
    }

    /// Pins have the names of devices.
    fn follow_renames(&mut self, uplinks: &[Uplink]) -> Result<(), AttachError> {
        let renamed: Vec<(u32, String, &str)> = uplinks
            .iter()
            .filter_map(|uplink| {
                let before = &self.attached.get(&uplink.ifindex)?.name;
                (*before != uplink.name).then(|| (uplink.ifindex, before.clone(), uplink.name.as_str()))
            })
            .collect();
        let has_pins = |name: &str| self.attached.values().any(|attached| attached.name == name);
        // two devices have exchanged their names: attach them again
        let exchanged = renamed.iter().any(|(_, _, after)| has_pins(after));
        for (ifindex, before, after) in renamed {
            tracing::info!("uplink {before} was renamed to {after}");
            if exchanged {
                self.datapath.detach_uplink(&before)?;
                self.attached.remove(&ifindex);
            } else {
                self.datapath.rename_uplink(&before, after)?;
                if let Some(attached) = self.attached.get_mut(&ifindex) {
                    after.clone_into(&mut attached.name);
                }
            }
        }
        Ok(())
    }

    fn attach_uplink(&mut self, uplink: &Uplink) -> Result<(), UplinkError> {
        let Uplink { name, ifindex, mtu, .. } = uplink;
        // the programs read it
        self.devices.set(uplink)?;
        if self.attached.contains_key(ifindex) {
            return Ok(());
        }
        let tc = if uplink.mac.is_some() {
            self.datapath.attach_uplink(name)?
        } else {
            self.datapath.attach_l3_uplink(name)?
        };
        // tc first: the XDP program passes packets on to it
        let xdp = if uplink.mac.is_none() || uplink.bridge {
            XdpState::Off
        } else if let Some(reason) = self.xdp_refusal(uplink) {
            self.datapath.refuse_xdp(name, reason)?
        } else {
            self.datapath.attach_xdp(name)?
        };
        tracing::info!(mtu, tc = tc.name(), services = xdp.name(), "attached to uplink {name}");
        self.attached.insert(*ifindex, AttachedUplink { name: name.clone(), xdp });
        Ok(())
    }

    fn xdp_refusal(&self, uplink: &Uplink) -> Option<String> {
        self.datapath.uses_xdp().then(|| self.xdp_check.refusal(uplink)).flatten()
    }

    /// Detaches the XDP program from devices that lose what it sends; tc does its work.
    pub(super) fn check_xdp(&mut self, now: Instant) {
        let is_native = |uplink: &&Uplink| {
            self.attached.get(&uplink.ifindex).is_some_and(|attached| attached.xdp == XdpState::Native)
        };
        for (ifindex, reason) in self.xdp_check.check(self.plan.uplinks.iter().filter(is_native), now) {
            let Some(attached) = self.attached.get_mut(&ifindex) else { continue };
            let device = &attached.name;
            tracing::warn!(device, "{device}: {reason}");
            match self.datapath.refuse_xdp(device, reason) {
                Ok(state) => attached.xdp = state,
                Err(error) => tracing::error!(%error, "cannot detach the XDP program from {device}"),
            }
            self.dirty = true;
        }
    }

    /// Attaches programs to the overlay device and the cgroup.
    pub(super) fn attach_host(&mut self, config: &Config) -> Result<(), StartError> {
        if let Some(overlay) = self.plan.overlay {
            let device = &self.plan.overlay_device;
            let tc = self.datapath.attach_overlay(device)?;
            tracing::info!(mtu = overlay.mtu, tc = tc.name(), "attached to overlay device {device}");
        }
        let cgroup = config.cgroup.clone().map_or_else(default_cgroup, Ok)?;
        self.datapath.attach_cgroup(&cgroup)?;
        tracing::info!("attached socket programs to cgroup {}", cgroup.display());
        Ok(())
    }

    pub(super) fn log_warnings(&self, before: &[String]) {
        log_new(&self.plan.warnings, before);
    }

    /// Indexes of the uplinks.
    pub(in crate::app) fn uplink_indexes(&self) -> BTreeSet<u32> {
        self.plan.uplinks.iter().map(|uplink| uplink.ifindex).collect()
    }

    /// Whether every uplink has its programs.
    ///
    /// # Errors
    ///
    /// The first uplink that has none; [`Self::update`] tries again.
    pub(in crate::app) fn attached(&self) -> Result<(), StartError> {
        self.uplink_errors.iter().next().map_or(Ok(()), |(device, reason)| {
            Err(StartError::Uplink { device: device.clone(), reason: reason.clone() })
        })
    }
}

/// Logs the messages that were not there before.
pub(in crate::app) fn log_new(messages: &[String], before: &[String]) {
    for message in messages.iter().filter(|message| !before.contains(message)) {
        tracing::warn!("{message}");
    }
}
