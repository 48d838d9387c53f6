//! Errors of CNI requests: message, CNI error code, and what the operator can do.

use dataplane_cni::protocol::{Attachment, Failure, PortMapping, code};

use super::{datapath::PodDatapathError, ipam::IpamError, pods::RecordError};
use crate::netlink::{NetlinkError, PodNetnsError};

/// Why a CNI request failed. What the request created is removed again, unless the log says
/// otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("invalid request from the CNI plugin: {0}")]
    Request(#[source] serde_json::Error),
    #[error("this node has no pod range yet: no Node object with its name and spec.podCIDRs has been seen")]
    NotConfigured,
    #[error("no pod is known for {0}")]
    Unknown(Attachment),
    #[error("{attachment}: device name {device} is in use by {other} (hash collision)")]
    NameTaken { attachment: Attachment, device: String, other: Attachment },
    #[error("hostPort {port} is in use by pod {pod}")]
    PortTaken { port: PortMapping, pod: String },
    #[error("pod {pod}: {source}")]
    Annotations { pod: String, source: PodDatapathError },
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
    #[error("cannot remove {} of {total} stale pods: {}", problems.len(), problems.join("; "))]
    Gc { total: usize, problems: Vec<String> },
    #[error("the request panicked in the agent: {0}")]
    Panicked(#[source] tokio::task::JoinError),
}

impl CniError {
    /// The failure as the plugin reports it to the runtime.
    pub(super) fn failure(&self) -> Failure {
        Failure { code: self.code(), message: self.to_string(), details: self.advice().to_owned() }
    }

    /// What the operator can do: `details` of the CNI error. Empty where the message says it all.
    pub(super) const fn advice(&self) -> &'static str {
        match self {
            Self::NotConfigured | Self::Address(IpamError::NoRange) => {
                "check spec.podCIDRs of this node: the controller manager or dataplane-allocator sets it"
            }
            Self::Unknown(_) => "delete the pod; the runtime's record of it is out of date",
            Self::NameTaken { .. } | Self::PortTaken { .. } => "delete one of the two pods",
            Self::Annotations { .. } => "correct the pod's annotation, or the agent's configuration",
            Self::Netns(_) => {
                "check that the runtime's directory of network namespaces is mounted in the agent's container"
            }
            Self::Address(IpamError::Exhausted { .. }) => {
                "delete pods of this node, or give the node a larger range"
            }
            Self::Address(
                IpamError::RequestedInUse { .. } | IpamError::OutOfRange { .. } | IpamError::NoFamily { .. },
            ) => "change the pod's annotation dataplane.local/ipv4 or dataplane.local/ipv6",
            Self::Record(_) => "check free space and permissions of the agent's state directory",
            Self::Check(_) => "delete the pod: its successor gets a new device",
            Self::Gc { .. } => "the runtime's next GC tries again",
            Self::Panicked(_) => "see the agent's log",
            Self::Request(_) | Self::Address(IpamError::Taken { .. }) | Self::Device(_) | Self::InPod(_) => {
                ""
            }
            Self::Datapath { .. } => "see the problems in `dataplane-agent status` of this node",
        }
    }

    const fn code(&self) -> u32 {
        match self {
            Self::Request(_) => code::DECODE,
            Self::NotConfigured | Self::Address(IpamError::NoRange) => code::TRY_AGAIN,
            Self::Unknown(_) => code::UNKNOWN_CONTAINER,
            Self::Annotations { .. }
            | Self::Address(
                IpamError::RequestedInUse { .. } | IpamError::OutOfRange { .. } | IpamError::NoFamily { .. },
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
