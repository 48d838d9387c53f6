//! The views `flows` and `events`, and packet counters: what happened to packets.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A flow: a connection that is translated per packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// `TCP`, `UDP`, `ICMP`, ...
    pub protocol: String,
    /// Addresses of the packet as it arrives.
    pub source: PeerView,
    pub destination: PeerView,
    /// Addresses of the packet as it leaves.
    pub translated_source: PeerView,
    pub translated_destination: PeerView,
    /// `halfOpen`, `established`, `closing`, ...
    pub state: String,
    pub age_seconds: u32,
    pub idle_seconds: u32,
    /// ID of the service port; absent for masquerade.
    #[serde(rename = "serviceID")]
    pub service_id: Option<u32>,
    /// `namespace/name` of the service.
    pub service: Option<String>,
}

/// Address and port of one end of a connection. The port is the identifier for ICMP echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    pub address: IpAddr,
    pub port: u16,
}

/// A packet event: what happened to one packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventView {
    /// Nanoseconds of the monotonic clock.
    #[serde(rename = "timestampNanoseconds")]
    pub timestamp_ns: u64,
    /// Name of a `dataplane_common::reason::HookId`.
    pub hook: String,
    /// Name of the verdict or drop reason.
    pub outcome: String,
    /// The outcome is a drop reason.
    pub dropped: bool,
    /// The outcome explained in a sentence.
    pub text: String,
    pub protocol: String,
    /// Absent if the packet could not be parsed so far.
    pub source: Option<PeerView>,
    pub destination: Option<PeerView>,
    /// `Pod namespace/name` of the source, if it is on this node.
    pub source_name: Option<String>,
    /// `Service namespace/name` or `Pod namespace/name` of the destination.
    pub destination_name: Option<String>,
    /// Device the program is attached to; 0 for socket hooks.
    pub ifindex: u32,
    /// Name of that device.
    pub device: Option<String>,
    /// `namespace/name` of the pod behind that device: the sender, whatever the source address
    /// says.
    pub device_pod: Option<String>,
    /// Bytes.
    pub length: u32,
}

/// Number of packets of a hook that had the same outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountView {
    pub hook: String,
    pub outcome: String,
    pub dropped: bool,
    pub text: String,
    pub packets: u64,
}
