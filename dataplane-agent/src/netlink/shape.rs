//! Rate limits of devices: a token bucket filter as root qdisc (`sch_tbf`).
//!
//! A qdisc delays packets and so slows its senders down, where a policer would drop packets.

use futures::StreamExt as _;
use rtnetlink::{
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage, TcOption},
    },
};

use super::{Netlink, NetlinkError};

/// Attributes of the qdisc (`include/uapi/linux/pkt_sched.h`).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// With this link layer the kernel computes the transmission time, and needs no rate table.
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// Smallest bucket in bytes: a packet larger than the bucket could never be sent.
const MIN_BURST: u64 = 128 * 1024;
/// Largest bucket, in milliseconds at the rate. A larger burst would defeat the limit.
const MAX_BURST_MS: u64 = 50;
/// How long a packet may wait in the qdisc, in milliseconds.
const QUEUE_MS: u64 = 25;

/// The rate limit of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second, never 0.
    pub bytes: u64,
    /// Burst in bytes; values out of range are clamped.
    pub burst: Option<u64>,
}

impl Rate {
    /// Size of the bucket in bytes.
    fn bucket(self) -> u32 {
        let max = (self.bytes / 1_000 * MAX_BURST_MS).max(MIN_BURST);
        let bytes = self.burst.unwrap_or(max).clamp(MIN_BURST, max);
        u32::try_from(bytes).unwrap_or(u32::MAX)
    }

    /// Bytes that the qdisc may hold, including those of the bucket.
    fn limit(self) -> u32 {
        u32::try_from(u64::from(self.bucket()) + self.bytes / 1_000 * QUEUE_MS).unwrap_or(u32::MAX)
    }

    /// `struct tc_tbf_qopt`: two `struct tc_ratespec`, the second for the unused peak rate, then
    /// `limit`, `buffer` and `mtu`. Separate attributes replace the last two.
    fn parameters(self) -> Vec<u8> {
        let mut out = vec![0, TC_LINKLAYER_ETHERNET];
        // overhead, cell_align, mpu
        out.extend([0; 6]);
        // a rate above u32 is set by TCA_TBF_RATE64
        out.extend(u32::try_from(self.bytes).unwrap_or(u32::MAX).to_ne_bytes());
        out.extend([0; 12]);
        out.extend(self.limit().to_ne_bytes());
        out.extend([0; 8]);
        out
    }

    fn options(self) -> Vec<TcOption> {
        let option = |kind, value| TcOption::Other(DefaultNla::new(kind, value));
        let mut options = vec![
            option(TCA_TBF_PARMS, self.parameters()),
            option(TCA_TBF_BURST, self.bucket().to_ne_bytes().to_vec()),
        ];
        if u32::try_from(self.bytes).is_err() {
            options.push(option(TCA_TBF_RATE64, self.bytes.to_ne_bytes().to_vec()));
        }
        options
    }
}

impl Netlink {
    /// Replaces the root qdisc of a device by one that limits its rate.
    pub async fn shape(&self, device: &str, ifindex: u32, rate: Rate) -> Result<(), NetlinkError> {
        let mut message = TcMessage::with_index(ifindex as i32);
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![TcAttribute::Kind("tbf".to_owned()), TcAttribute::Options(rate.options())];
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let failed = |error: &rtnetlink::Error| NetlinkError::new("set rate limit of device", device, error);
        let mut responses = self.handle.clone().request(request).map_err(|error| failed(&error))?;
        while let Some(response) = responses.next().await {
            if let NetlinkPayload::Error(error) = response.payload
                && error.code.is_some()
            {
                return Err(failed(&rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_clamped_to_the_allowed_range() {
        let rate = |bytes, burst| Rate { bytes, burst };
        // a runtime's default where the pod sets none
        assert_eq!(rate(1_250_000, Some(u64::from(u32::MAX) / 8)).bucket(), 131_072);
        assert_eq!(rate(1_250_000_000, None).bucket(), 62_500_000);
        assert_eq!(rate(1_250_000_000, Some(1)).bucket(), 131_072);
        assert_eq!(rate(1_250_000_000, Some(1_000_000)).bucket(), 1_000_000);
        assert_eq!(rate(u64::MAX, None).limit(), u32::MAX);
    }

    #[test]
    fn tbf_parameters_have_the_size_of_the_kernels_struct() {
        assert_eq!(Rate { bytes: 1, burst: None }.parameters().len(), 36);
        assert_eq!(Rate { bytes: 5_000_000_000, burst: None }.options().len(), 3);
    }
}
