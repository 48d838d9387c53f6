//! Verifies that uplinks deliver what XDP sends back out of them, which the kernel's result of
//! attaching the program does not say.
//!
//! veth drops every such frame unless its peer has an XDP program or GRO, whose receive queue takes
//! them (`drivers/net/veth.c`, `veth_xdp_xmit`). The kernel tells from Linux 6.3 on. What it does
//! not tell shows in the statistics of the driver.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use dataplane_common::ethtool;

use crate::netlink::{Uplink, netdev::Netdev};

/// How often the statistics are read while a device runs XDP.
const INTERVAL: Duration = Duration::from_secs(1);
/// Fewer lost frames in an interval are no reason to fall back.
const LOST_MIN: u64 = 8;
const VETH: &str = "veth";

const PEER_DROPS: &str = "XDP is not used: the device is a veth whose peer has neither an XDP program nor GRO, \
                          and so drops what XDP sends; services are handled at tc";

/// Frames that XDP sent back out of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sent {
    delivered: u64,
    lost: u64,
}

/// Checks of the devices that run XDP.
#[derive(Debug, Default)]
pub(super) struct XdpCheck {
    /// Counters of the last check, by device.
    last: BTreeMap<String, Sent>,
    /// Devices that lost what XDP sent, by index, with the reason.
    lossy: BTreeMap<u32, String>,
    next: Option<Instant>,
}

impl XdpCheck {
    /// Why XDP cannot be used on the device. `None`: nothing is known against it.
    pub(super) fn refusal(&self, uplink: &Uplink) -> Option<String> {
        self.lossy.get(&uplink.ifindex).cloned().or_else(|| Self::peer_refusal(uplink))
    }

    fn peer_refusal(uplink: &Uplink) -> Option<String> {
        let is_veth = ethtool::driver(&uplink.name).is_ok_and(|driver| driver == VETH);
        let transmits = || Netdev::open().and_then(|mut netdev| netdev.transmits_xdp_frames(uplink.ifindex));
        match is_veth.then(transmits)? {
            Ok(Some(false)) => Some(PEER_DROPS.to_owned()),
            Ok(Some(true) | None) => None,
            Err(error) => {
                tracing::warn!(device = uplink.name, %error, "cannot read the XDP features of {}", uplink.name);
                None
            }
        }
    }

    /// Checks the devices that run XDP, if it is time. Returns those that must not, with the
    /// reason.
    pub(super) fn check<'a>(
        &mut self,
        devices: impl Iterator<Item = &'a Uplink>,
        now: Instant,
    ) -> Vec<(String, String)> {
        if self.next.is_some_and(|next| now < next) {
            return Vec::new();
        }
        let mut last = BTreeMap::new();
        let mut failed = Vec::new();
        for uplink in devices {
            // no statistics: nothing to compare
            let sent = ethtool::statistics(&uplink.name).map(|all| Sent::of(&all)).unwrap_or_default();
            let losses = self.last.get(&uplink.name).and_then(|before| sent.losses_since(*before));
            if let Some(reason) = Self::peer_refusal(uplink) {
                failed.push((uplink.name.clone(), reason));
            } else if let Some(reason) = losses {
                self.lossy.insert(uplink.ifindex, reason.clone());
                failed.push((uplink.name.clone(), reason));
            } else {
                last.insert(uplink.name.clone(), sent);
            }
        }
        self.next = (!last.is_empty()).then(|| now + INTERVAL);
        self.last = last;
        failed
    }

    /// When to call [`Self::check`] again; `None`: no device runs XDP.
    pub(super) const fn next_due(&self) -> Option<Instant> {
        self.next
    }
}

impl Sent {
    /// From the driver's statistics. Their names differ between drivers, as in
    /// `rx_queue_0_xdp_tx_errors` (veth) and `rx_xdp_tx_err` (mlx5); a total may be listed beside
    /// the queues.
    fn of(statistics: &[(String, u64)]) -> Self {
        let mut sent = Self::default();
        for (name, value) in statistics {
            let Some((_, what)) = name.split_once("xdp_tx") else { continue };
            // a full ring is overload, not a device that cannot send
            if what.contains("err") || what.contains("drop") {
                sent.lost += value;
            } else if !what.contains("full") {
                sent.delivered += value;
            }
        }
        sent
    }

    /// A description of the losses, if at least half of the frames since `before` were lost.
    fn losses_since(self, before: Self) -> Option<String> {
        let lost = self.lost.saturating_sub(before.lost);
        let delivered = self.delivered.saturating_sub(before.delivered);
        (lost >= LOST_MIN && lost >= delivered).then(|| {
            format!(
                "XDP is not used: the device lost {lost} of the last {} packets that XDP sent; services are handled \
                 at tc until the agent restarts",
                lost.saturating_add(delivered)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(statistics: &[(&str, u64)]) -> Sent {
        Sent::of(&statistics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect::<Vec<_>>())
    }

    #[test]
    fn statistics_of_drivers_are_recognised() {
        let veth = [
            ("peer_ifindex", 9),
            ("rx_queue_0_xdp_packets", 50),
            ("rx_queue_0_xdp_drops", 4),
            ("rx_queue_0_xdp_tx", 3),
            ("rx_queue_0_xdp_tx_errors", 2),
            ("rx_queue_1_xdp_tx_errors", 1),
            ("tx_queue_0_xdp_xmit_errors", 7),
        ];
        assert_eq!(sent(&veth), Sent { delivered: 3, lost: 3 });
        let mlx5 = [("rx_xdp_tx_xmit", 10), ("rx_xdp_tx_full", 5), ("rx_xdp_tx_err", 1), ("tx_xdp_err", 9)];
        assert_eq!(sent(&mlx5), Sent { delivered: 10, lost: 1 });
    }

    #[test]
    fn only_a_device_that_loses_most_of_its_frames_falls_back() {
        let before = Sent { delivered: 100, lost: 100 };
        for (delivered, lost, falls_back) in
            [(0, 7, false), (0, 8, true), (8, 8, true), (9, 8, false), (1_000, 0, false)]
        {
            let after = Sent { delivered: before.delivered + delivered, lost: before.lost + lost };
            assert_eq!(after.losses_since(before).is_some(), falls_back, "{delivered} {lost}");
        }
        // the counters start again with a new device
        assert_eq!(Sent::default().losses_since(before), None);
    }
}
