//! Limits of a device's rate: a token bucket as its queue (`sch_tbf`).
//!
//! A queue that is full holds its senders back, where a policer would make them lose packets and guess.

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

/// Attributes of the queue (`include/uapi/linux/pkt_sched.h`).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// The kernel computes the time of a packet itself, instead of reading it from a table we would have to bring.
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// No packet may be larger than the bucket, or it would never leave.
const LEAST_BURST: u64 = 128 * 1024;
/// A longer burst than this many milliseconds of the rate is no limit.
const BURST_MS: u64 = 50;
/// As long as this may a packet wait.
const QUEUE_MS: u64 = 25;

/// How fast a device may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second, never 0.
    pub bytes: u64,
    /// Bytes that may go at once; what is asked for beyond reason is cut.
    pub burst: Option<u64>,
}

impl Rate {
    /// Bytes that go at once.
    fn bucket(self) -> u32 {
        let most = (self.bytes / 1_000 * BURST_MS).max(LEAST_BURST);
        let asked = self.burst.unwrap_or(most).clamp(LEAST_BURST, most);
        u32::try_from(asked).unwrap_or(u32::MAX)
    }

    /// Bytes that may wait, those of the bucket included.
    fn limit(self) -> u32 {
        u32::try_from(u64::from(self.bucket()) + self.bytes / 1_000 * QUEUE_MS).unwrap_or(u32::MAX)
    }

    /// `struct tc_tbf_qopt`: two `struct tc_ratespec`, of which the second (the peak rate) is not used, then `limit`,
    /// `buffer` and `mtu`, of which the last two are given by an attribute of their own.
    fn parameters(self) -> Vec<u8> {
        let mut out = vec![0, TC_LINKLAYER_ETHERNET];
        // overhead, cell_align, mpu
        out.extend([0; 6]);
        // a faster one is told by its own attribute
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
    /// Gives a device a queue that sends no faster than `rate`, in place of what it had.
    pub async fn shape(&self, device: &str, ifindex: u32, rate: Rate) -> Result<(), NetlinkError> {
        let mut message = TcMessage::with_index(ifindex as i32);
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![TcAttribute::Kind("tbf".to_owned()), TcAttribute::Options(rate.options())];
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let failed = |error: &rtnetlink::Error| NetlinkError::new("limit the rate of", device, error);
        let mut answers = self.handle.clone().request(request).map_err(|error| failed(&error))?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
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
    fn a_burst_is_neither_too_small_for_a_packet_nor_too_large_for_a_limit() {
        let rate = |bytes, burst| Rate { bytes, burst };
        // what a runtime writes if the pod did not say
        assert_eq!(rate(1_250_000, Some(u64::from(u32::MAX) / 8)).bucket(), 131_072);
        assert_eq!(rate(1_250_000_000, None).bucket(), 62_500_000);
        assert_eq!(rate(1_250_000_000, Some(1)).bucket(), 131_072);
        assert_eq!(rate(1_250_000_000, Some(1_000_000)).bucket(), 1_000_000);
        assert_eq!(rate(u64::MAX, None).limit(), u32::MAX);
    }

    #[test]
    fn parameters_are_as_long_as_the_kernel_wants_them() {
        assert_eq!(Rate { bytes: 1, burst: None }.parameters().len(), 36);
        assert_eq!(Rate { bytes: 5_000_000_000, burst: None }.options().len(), 3);
    }
}
