//! Why a request of the plugin failed, and the code the runtime gets for it.

use dataplane_cni::protocol::{Attachment, Failure, PortMapping, code};

use super::{datapath::PodDatapathError, ipam::IpamError, pods::RecordError};
use crate::netlink::{NetlinkError, PodNetnsError};

/// A request that failed. Whatever it had made is gone again, unless the log says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("bad request: {0}")]
    Request(#[source] serde_json::Error),
    #[error("this node has no pod range yet: no Node object with its name and spec.podCIDRs has been seen")]
    NotConfigured,
    #[error("{0} is not known")]
    Unknown(Attachment),
    #[error("{attachment}: device name {device} is that of {other}")]
    NameTaken { attachment: Attachment, device: String, other: Attachment },
    #[error("hostPort {port} is pod {pod}'s")]
    PortTaken { port: PortMapping, pod: String },
    #[error("pod {pod}: {source}")]
    Wish { pod: String, source: PodDatapathError },
    #[error("CNI_NETNS: {0}")]
    Netns(#[source] PodNetnsError),
    #[error(transparent)]
    Address(#[from] IpamError),
    #[error(transparent)]
    Device(#[from] NetlinkError),
    #[error(transparent)]
    InPod(PodNetnsError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("datapath: {operation} {device}: {source}")]
    Datapath { operation: &'static str, device: String, source: PodDatapathError },
    /// Never empty.
    #[error("{}", .0.join("; "))]
    Check(Vec<String>),
    #[error("{} of {total} pods that are gone could not be removed: {}", problems.len(), problems.join("; "))]
    Gc { total: usize, problems: Vec<String> },
    #[error("the agent failed: {0}")]
    Panicked(#[source] tokio::task::JoinError),
}

impl CniError {
    /// What the plugin tells the runtime.
    pub(super) fn failure(&self) -> Failure {
        Failure { code: self.code(), message: self.to_string(), details: String::new() }
    }

    const fn code(&self) -> u32 {
        match self {
            Self::Request(_) => code::DECODE,
            Self::NotConfigured | Self::Address(IpamError::NoRange) => code::TRY_AGAIN,
            Self::Unknown(_) => code::UNKNOWN_CONTAINER,
            Self::Wish { .. }
            | Self::Address(
                IpamError::Wanted { .. } | IpamError::OutOfRange { .. } | IpamError::NoFamily { .. },
            ) => code::ADDRESS,
            Self::PortTaken { .. } => code::PORT_TAKEN,
            Self::Netns(_) => code::ENVIRONMENT,
            Self::Address(IpamError::Exhausted { .. }) => code::RANGE_EXHAUSTED,
            Self::Address(IpamError::Taken { .. }) | Self::NameTaken { .. } | Self::Record(_) => code::RECORD,
            Self::Device(_) | Self::InPod(_) | Self::Gc { .. } => code::DEVICE,
            Self::Datapath { .. } => code::DATAPATH,
            Self::Check(_) => code::CHECK,
            Self::Panicked(_) => code::IO,
        }
    }
}

impl From<PodNetnsError> for CniError {
    fn from(error: PodNetnsError) -> Self {
        match error {
            PodNetnsError::Open { .. }
            | PodNetnsError::NotNamespace { .. }
            | PodNetnsError::Host { .. }
            | PodNetnsError::Enter { .. } => Self::Netns(error),
            PodNetnsError::Netlink(error) => Self::Device(error),
            PodNetnsError::Sysctl(_) => Self::InPod(error),
        }
    }
}
