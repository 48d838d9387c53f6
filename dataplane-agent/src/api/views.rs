//! What the agent shows of itself: the rows behind `status`, `services`, `endpoints`, `routes`, `flows` and `events`.
//!
//! Plain serialisable types, the same for the agent that fills them and the CLI that prints them. A row says what is
//! in the datapath in the words of the objects it came from. Knows no map, no socket and no Kubernetes type.

use std::{
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A moment of this machine's monotonic clock; on the wire the seconds that have passed since.
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
        // a moment before the clock's zero: the machine was booted since
        Ok(Self(now.checked_sub(elapsed).unwrap_or(now)))
    }
}

/// How the agent is: published (`tokio::sync::watch`) by the task that owns the state, whenever something in it changes.
///
/// Its size does not grow with the number of services, so that publishing costs the same in every cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Version of the tables' layout.
    pub abi: u32,
    /// Name of this node.
    pub node: String,
    pub pid: u32,
    #[serde(rename = "uptime_seconds")]
    pub started: Moment,
    /// What keeps the agent from being ready; empty: it is ready.
    pub not_ready: Vec<NotReady>,
    pub uplinks: Vec<UplinkView>,
    /// Other nodes, and how their pods are reached.
    pub nodes: Vec<NodeView>,
    /// Revision of the state.
    pub revision: u64,
    /// Revision that is in the tables completely.
    pub applied_revision: u64,
    /// The source has delivered everything once.
    pub synced: bool,
    /// Why this node leaves the cluster, if it does: load balancers are to send it nothing new.
    #[serde(default)]
    pub leaving: Option<String>,
    pub source: SourceView,
    pub problems: Vec<ProblemView>,
    pub tables: Vec<TableView>,
    pub reconcile: ReconcileView,
    pub objects: ObjectsView,
    /// Pins of an earlier agent that were taken over.
    pub pins_adopted: u32,
    /// Last event of the source.
    #[serde(rename = "last_event_seconds_ago")]
    pub last_event: Option<Moment>,
    /// Last comparison of the tables with what they should hold.
    #[serde(rename = "last_audit_seconds_ago")]
    pub last_audit: Option<Moment>,
}

/// Where the objects come from, and how that goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceView {
    /// `manifests` or `kubernetes`.
    pub name: String,
    /// When the state was last known to be that of the cluster, in seconds of Unix time; `None`: it is now.
    #[serde(rename = "behind_since_unix_seconds")]
    pub behind_since: Option<u64>,
    /// How often everything of a kind was asked for again.
    pub relists: u64,
    /// Requests to the API server that failed, watches that broke off.
    pub watch_errors: u64,
    /// How often another API server was taken.
    pub failovers: u64,
}

/// As `date +%s` has it.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Status {
    /// A starting agent: not ready, nothing known.
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
            nodes: Vec::new(),
            revision: 0,
            applied_revision: 0,
            synced: false,
            leaving: None,
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

/// A condition that is not met yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReady {
    /// A stable word: `source`, `datapath`, `uplink`, `reconcile`, ...
    pub check: String,
    /// A sentence.
    pub reason: String,
}

/// A device to the other nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkView {
    pub device: String,
    pub ifindex: u32,
    pub mtu: u32,
    pub addresses: Vec<IpNet>,
    /// Where packets from outside to services are handled: `xdp` (in the driver) or `tc`.
    pub services_at: String,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    pub name: String,
    /// How its pods are reached: `native`, `vxlan`, or `none` and why.
    pub routing: String,
    pub internal_ips: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNet>,
}

/// Something that is wrong now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemView {
    pub origin: Origin,
    /// File, object, table key or device: what it is about.
    pub subject: String,
    /// A sentence.
    pub message: String,
}

/// Which part of the agent has a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// An object that cannot be used as it is.
    Source,
    /// A table entry, route or device that cannot be made as it should be.
    Reconcile,
    /// A program that is not attached, a map that cannot be read.
    Datapath,
    /// Something on the node: files of the CNI, what others left, the Node object.
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

/// Use of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableView {
    /// As in `dataplane_common::abi::names`.
    pub name: String,
    pub used: u64,
    pub capacity: u64,
    /// Entries written since the agent started.
    pub writes: u64,
    /// Entries removed since the agent started.
    pub removals: u64,
}

/// The reconciler since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReconcileView {
    /// Writes that failed.
    pub errors: u64,
    /// Writes repeated after a failure.
    pub retries: u64,
    /// Entries an audit found to differ from what was written.
    pub drift: u64,
    /// Keys that wait for a retry now.
    pub pending: u64,
}

/// How many objects the agent knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectsView {
    pub nodes: u64,
    pub services: u64,
    pub endpoint_slices: u64,
    /// Pods of this node.
    pub pods: u64,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    pub namespace: String,
    pub name: String,
    /// Empty if it has none.
    pub port_name: String,
    pub cluster_ips: Vec<IpAddr>,
    /// Where it is asked, its cluster addresses among them, and what holds there.
    #[serde(default)]
    pub frontends: Vec<FrontendView>,
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `dataplane_common::abi::Service::id`.
    pub id: u32,
    /// The highest of its frontends' generations.
    pub generation: u32,
    /// `random` or `maglev`.
    pub load_balancing: String,
    /// How clients from outside get to backends on other nodes: `snat` or `dsr`.
    #[serde(default)]
    pub forwarding: String,
    /// Seconds; absent without session affinity.
    pub affinity_timeout: Option<u32>,
    /// What new connections can get, of both families.
    pub backends: Vec<BackendView>,
}

/// Where a port of a service is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendView {
    pub kind: FrontendKind,
    /// Of a node port: the unspecified one of its family, which stands for every address of the node that takes node ports.
    pub address: IpAddr,
    pub port: u16,
    /// Whom the row is for.
    pub clients: ClientsView,
    /// It leads to backends on this node only, and keeps the client's address.
    pub local: bool,
    /// Only clients in the service's `loadBalancerSourceRanges` may ask.
    pub guarded: bool,
    /// How many backends it leads to.
    pub backends: u32,
}

/// Which field a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    Cluster,
    /// `spec.externalIPs`.
    External,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    Node,
    /// A pod's `hostPort`.
    Host,
}

/// Who asks at a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientsView {
    /// Everyone.
    All,
    /// Pods and processes of this node, where others get something else.
    Here,
    /// Everyone else.
    Outside,
}

/// What stands behind a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackendView {
    pub address: IpAddr,
    pub port: u16,
}

/// An address of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    pub address: IpAddr,
    /// The pod it belongs to; absent for an address of the host.
    pub pod: Option<PodView>,
    /// Name of the pod's host-side device.
    pub device: Option<String>,
    pub ifindex: u32,
    /// Link address inside the pod.
    pub mac: Option<String>,
    /// Protocols whose replies to this address may need a reverse translation: `tcp`, `udp`, `icmp`, `other`.
    pub flow_hints: Vec<String>,
    /// An address of the host that takes node ports.
    #[serde(default)]
    pub node_ports: bool,
}

/// Names a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
}

/// An entry of the route table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteView {
    pub prefix: IpNet,
    pub kind: RouteKindView,
    pub next_hop: Option<IpAddr>,
    pub device: Option<String>,
    /// Node the prefix belongs to.
    pub node: Option<String>,
    /// Bytes; 0 if unknown.
    pub mtu: u32,
}

/// What is done with a packet to the prefix (`dataplane_common::abi::RouteKind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteKindView {
    Native,
    Overlay,
    NoMasquerade,
    Local,
    Services,
}

/// A connection that is translated per packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// `TCP`, `UDP`, `ICMP`, ...
    pub protocol: String,
    /// The packet as it arrives.
    pub source: PeerView,
    pub destination: PeerView,
    /// The packet as it leaves.
    pub translated_source: PeerView,
    pub translated_destination: PeerView,
    /// `half_open`, `established` or `closing`.
    pub state: String,
    pub age_seconds: u32,
    pub idle_seconds: u32,
    /// Number of the service port; absent for masquerade.
    pub service_id: Option<u32>,
    /// `namespace/name` of the service.
    pub service: Option<String>,
}

/// An end of a connection. The port is the identifier for ICMP echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    pub address: IpAddr,
    pub port: u16,
}

/// What happened to a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// Nanoseconds of the monotonic clock.
    pub timestamp_ns: u64,
    /// `dataplane_common::reason::HookId`.
    pub hook: String,
    /// Name of the verdict or drop reason.
    pub outcome: String,
    /// The packet ended there.
    pub dropped: bool,
    /// What the outcome means.
    pub text: String,
    pub protocol: String,
    /// Absent as far as the packet could not be parsed.
    pub source: Option<PeerView>,
    pub destination: Option<PeerView>,
    /// Pod `namespace/name` of the source, if it lives here.
    pub source_name: Option<String>,
    /// Service or pod the destination is.
    pub destination_name: Option<String>,
    /// Device the program was attached to; 0 for socket hooks.
    pub ifindex: u32,
    /// Its name.
    pub device: Option<String>,
    pub length: u32,
}

/// Packets of a hook that ended one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountView {
    pub hook: String,
    pub outcome: String,
    pub dropped: bool,
    pub text: String,
    pub packets: u64,
}

/// Addresses of a pod range of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamView {
    pub cidr: IpNet,
    pub used: u64,
    /// Free to hand out, those that cool down included.
    pub free: u64,
}

/// What `status` answers: what the agent published, and what was read for the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    #[serde(flatten)]
    pub status: Status,
    pub ready: bool,
    /// Not only drops; the largest first.
    pub outcomes: Vec<CountView>,
    pub ipam: Vec<IpamView>,
}
