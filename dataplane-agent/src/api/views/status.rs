//! The view `status`: readiness, node, source, problems, table usage.

use std::{
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::CountView;

/// A time of this machine's monotonic clock, serialised as the seconds elapsed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Instant);

impl Moment {
    pub fn now() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

impl From<Instant> for Moment {
    fn from(instant: Instant) -> Self {
        Self(instant)
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.elapsed().as_secs_f64())
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        let elapsed = Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)?;
        let now = Instant::now();
        // `None`: earlier than this machine's boot
        Ok(Self(now.checked_sub(elapsed).unwrap_or(now)))
    }
}

/// State of the agent, published by the node task (`tokio::sync::watch`) whenever something in it
/// changes.
///
/// Its size does not grow with the number of services, so publishing costs the same in every
/// cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Version of the table layout (`dataplane_common::ABI_VERSION`).
    pub abi: u32,
    /// Name of this node.
    pub node: String,
    pub pid: u32,
    #[serde(rename = "uptimeSeconds")]
    pub started: Moment,
    /// Checks that fail; the agent is ready if it is empty.
    pub not_ready: Vec<NotReady>,
    pub uplinks: Vec<UplinkView>,
    /// Devices that are no uplinks, without those of pods.
    #[serde(default)]
    pub other_devices: Vec<OtherDeviceView>,
    /// Way of packets between pods and machines outside of the cluster.
    #[serde(default)]
    pub egress: EgressView,
    /// The other nodes.
    pub nodes: Vec<NodeView>,
    /// Revision of the state.
    pub revision: u64,
    /// Revision that the tables hold completely.
    pub applied_revision: u64,
    /// The source has delivered every object once.
    pub synced: bool,
    /// Why this node is leaving the cluster, if it is: load balancers must stop sending it new
    /// connections.
    #[serde(default)]
    pub leaving_reason: Option<String>,
    pub source: SourceView,
    pub problems: Vec<ProblemView>,
    pub tables: Vec<TableView>,
    pub reconcile: ReconcileView,
    pub objects: ObjectsView,
    /// Pinned tables adopted from an earlier agent.
    pub pins_adopted: u32,
    /// Last event of the source.
    #[serde(rename = "lastEventSecondsAgo")]
    pub last_event: Option<Moment>,
    /// Last completed audit of all tables.
    #[serde(rename = "lastAuditSecondsAgo")]
    pub last_audit: Option<Moment>,
}

/// State of the source of cluster objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SourceView {
    /// `manifests` or `kubernetes`.
    pub name: String,
    /// Unix time in seconds since which the state may be stale; `None`: it is current.
    #[serde(rename = "behindSinceUnixSeconds")]
    pub behind_since: Option<u64>,
    /// Complete lists of a kind after the first.
    pub relists: u64,
    /// Failed requests to the API server, and broken watches.
    pub watch_errors: u64,
    /// Changes to another API server.
    pub failovers: u64,
}

/// Seconds since the Unix epoch.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Status {
    /// Status of an agent that has just started: not ready, everything else empty.
    pub fn starting(node: &str) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: dataplane_common::ABI_VERSION,
            node: node.to_owned(),
            pid: std::process::id(),
            started: Moment::now(),
            not_ready: vec![NotReady {
                check: "start".to_owned(),
                reason: "the agent is starting".to_owned(),
            }],
            uplinks: Vec::new(),
            other_devices: Vec::new(),
            egress: EgressView::default(),
            nodes: Vec::new(),
            revision: 0,
            applied_revision: 0,
            synced: false,
            leaving_reason: None,
            source: SourceView::default(),
            problems: Vec::new(),
            tables: Vec::new(),
            reconcile: ReconcileView::default(),
            objects: ObjectsView::default(),
            pins_adopted: 0,
            last_event: None,
            last_audit: None,
        }
    }

    pub fn is_ready(&self) -> bool {
        self.not_ready.is_empty()
    }
}

/// A readiness check that fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReady {
    /// Stable name: `source`, `datapath`, `network`, `reconcile`, ...
    pub check: String,
    /// A sentence.
    pub reason: String,
}

/// A device that carries the node's traffic to and from other machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UplinkView {
    pub device: String,
    pub ifindex: u32,
    pub mtu: u32,
    pub addresses: Vec<IpNet>,
    /// Hook that translates service packets from outside: `xdp` (in the driver), `tc`, or `none` if
    /// the programs cannot be attached.
    pub service_hook: String,
    /// Why it is an uplink.
    #[serde(default)]
    pub reason: String,
}

/// A device that is no uplink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OtherDeviceView {
    pub device: String,
    pub ifindex: u32,
    /// Why it is no uplink.
    pub reason: String,
}

/// Way of packets between pods and machines outside of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressView {
    /// `direct`, past the kernel's stack, or `stack`, through it; empty: not known yet.
    pub way: String,
    /// Why it is not the configured way; empty if it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    pub name: String,
    /// Route to its pods: `native`, `vxlan`, or `none` with the reason.
    pub routing: String,
    #[serde(rename = "internalIPs")]
    pub internal_ips: Vec<IpAddr>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
}

/// A current problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemView {
    pub origin: Origin,
    /// The file, object, table key or device it is about.
    pub subject: String,
    /// A sentence.
    pub message: String,
}

/// The part of the agent that found a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// An object of the cluster is invalid or unusable.
    Source,
    /// A table row, kernel route or device cannot be written.
    Reconcile,
    /// A program cannot be attached, or a map cannot be read.
    Datapath,
    /// The node itself: CNI files, leftovers of other networks, the Node object.
    Node,
}

impl Origin {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Reconcile => "reconcile",
            Self::Datapath => "datapath",
            Self::Node => "node",
        }
    }
}

/// Usage of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableView {
    /// A name of `dataplane_common::abi::names`.
    pub name: String,
    pub used: u64,
    pub capacity: u64,
    /// Rows written since the agent started.
    pub writes: u64,
    /// Rows removed since the agent started.
    pub removals: u64,
}

/// Counters of the reconciler since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReconcileView {
    /// Failed writes.
    pub errors: u64,
    /// Writes repeated after a failure.
    pub retries: u64,
    /// Rows that an audit found changed.
    pub drift: u64,
    /// Keys that wait for a retry now.
    pub pending: u64,
}

/// Number of objects in the agent's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectsView {
    pub nodes: u64,
    pub services: u64,
    pub endpoint_slices: u64,
    /// Pods of this node.
    pub pods: u64,
}

/// Usage of a pod CIDR of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamView {
    pub cidr: IpNet,
    pub used: u64,
    /// Free addresses, including recently released ones.
    pub free: u64,
}

/// The answer of `status`: the published status, and what is read at the time of the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    #[serde(flatten)]
    pub status: Status,
    pub ready: bool,
    /// Packet counters of every outcome, drops or not; the largest first.
    pub outcomes: Vec<CountView>,
    pub ipam: Vec<IpamView>,
}
