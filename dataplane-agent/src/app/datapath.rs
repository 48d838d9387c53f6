//! The running datapath of this node: loaded programs, the devices they are attached to, and their
//! tables.

mod pods;
mod status;
mod uplinks;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use dataplane_common::abi::NodeVariables;
use tokio::sync::{mpsc, watch};

use super::{
    egress::EgressPlan,
    forwarding_watch::ForwardingWatch,
    network_plan::NodeNetworkPlan,
    pods::{Directories, PodChannel, serve_pods},
    programs::LoadedPrograms,
    reserved_ports::NodeReservedPorts,
    xdp_check::XdpCheck,
};
use crate::{
    api::{
        answer::Api,
        pinned::{PinnedDatapath, PinnedDatapathError},
        views::ProblemView,
    },
    cni::{CniError, PodDevice, PodNetwork},
    compile::routes::RoutingMode,
    config::{Config, NodePortAddresses, Routing},
    datapath::{AttachError, CgroupError, Datapath, LoadError, OpenError, XdpState, table::TableError},
    netlink::{ForwardingMonitor, Netlink, NetlinkError},
    reconcile::{
        AllowedSources, Devices, KernelRoutes, KernelSockets, NodeNetwork, Reconciler, SocketUpdate, Sockets,
    },
    state::{Changes, Store},
};

pub(super) use uplinks::log_new;

/// Error that stops the agent: the datapath cannot be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot adopt the pinned tables: {0}")]
    Adopt(#[from] TableError),
    #[error(transparent)]
    Pinned(#[from] PinnedDatapathError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("cannot attach the programs to uplink {device}: {reason}")]
    Uplink { device: String, reason: String },
}

/// An uplink with programs.
#[derive(Debug)]
struct AttachedUplink {
    name: String,
    xdp: XdpState,
}

/// The running datapath of this node.
#[expect(clippy::struct_excessive_bools, reason = "independent flags, each for one pending action")]
pub(super) struct NodeDatapath {
    plan: NodeNetworkPlan,
    datapath: Datapath,
    _forwarding_watch: ForwardingWatch,
    /// What was last written for the programs.
    published_variables: Option<NodeVariables>,
    reconciler: Reconciler,
    reserved_ports: NodeReservedPorts,
    /// Attached pods by the name of their host-side device.
    pods: BTreeMap<String, PodDevice>,
    xdp_check: XdpCheck,
    /// Rows of the uplinks for the programs.
    devices: Devices,
    /// Rows of the pods that route for others.
    allowed_sources: AllowedSources,
    /// Namespaces whose pods may have allowed sources.
    allowed_sources_namespaces: Vec<String>,
    /// Uplinks that have programs, by index.
    attached: BTreeMap<u32, AttachedUplink>,
    /// Errors of uplinks that have no programs, by device name.
    uplink_errors: BTreeMap<String, String>,
    /// Attach errors of pods, by device name.
    attach_errors: BTreeMap<String, String>,
    /// Routes changed since the pod network was last published.
    routes_changed: bool,
    kernel_problems: watch::Receiver<Vec<ProblemView>>,
    /// To the task that closes connected UDP sockets whose backend is gone.
    socket_updates: mpsc::UnboundedSender<SocketUpdate>,
    socket_problems: watch::Receiver<Vec<ProblemView>>,
    /// Network settings of new pods.
    pod_network: watch::Sender<PodNetwork>,
    pins_adopted: u32,
    /// Result of attaching the pods that existed when the agent started; `None`: not finished.
    recovery: Option<Result<(), CniError>>,
    /// The source has delivered every object once.
    synced: bool,
    /// Every key has been tried once since `synced`. It stays true, even if a key waits for room
    /// later.
    initial_sync_done: bool,
    /// The complete set of UDP backends has been sent to the socket task.
    udp_backends_sent: bool,
    /// Something changed since the last [`Self::take_dirty`].
    dirty: bool,
}

impl NodeDatapath {
    /// Fills the tables, then attaches the programs to the node's devices.
    pub(super) fn start(
        config: &Config,
        loaded: LoadedPrograms,
        plan: NodeNetworkPlan,
        store: &Store,
    ) -> Result<Self, StartError> {
        let LoadedPrograms { datapath, pins_adopted } = loaded;
        let (kernel_updates, kernel_receiver) = mpsc::unbounded_channel();
        let mut reconciler = Reconciler::new(datapath.tables()?, kernel_updates);
        let adopted = reconciler.adopt()?;
        tracing::info!(
            endpoints = adopted.endpoints,
            routes = adopted.routes,
            services = adopted.services,
            backends = adopted.backends,
            broken = adopted.broken,
            "adopted pinned table rows"
        );
        let (kernel_routes, kernel_problems) = KernelRoutes::new(Netlink::connect()?, kernel_receiver);
        reconciler.set_installed_routes(kernel_routes.installed());
        tokio::spawn(kernel_routes.run());
        let (socket_updates, socket_receiver) = mpsc::unbounded_channel();
        let connected = KernelSockets::new(datapath.connected_peers()?);
        let (sockets, socket_problems) = Sockets::new(connected, socket_receiver);
        tokio::spawn(sockets.run());
        let forwarding_watch =
            ForwardingWatch::start(ForwardingMonitor::open()?, datapath.forwarding_generation());
        let devices = Devices::adopt(Box::new(datapath.devices()?))?;
        let allowed_sources = AllowedSources::adopt(Box::new(datapath.allowed_sources()?))?;
        let mut node = Self {
            plan,
            devices,
            allowed_sources,
            allowed_sources_namespaces: config.allowed_sources_namespaces.clone(),
            attached: BTreeMap::new(),
            uplink_errors: BTreeMap::new(),
            datapath,
            _forwarding_watch: forwarding_watch,
            published_variables: None,
            reconciler,
            reserved_ports: NodeReservedPorts::new(config),
            pods: BTreeMap::new(),
            xdp_check: XdpCheck::default(),
            attach_errors: BTreeMap::new(),
            routes_changed: true,
            kernel_problems,
            socket_updates,
            socket_problems,
            pod_network: watch::Sender::default(),
            pins_adopted,
            recovery: None,
            synced: store.is_synced(),
            initial_sync_done: false,
            udp_backends_sent: false,
            dirty: true,
        };
        // the node first: its services are compiled for it
        node.configure_reconciler(config, store);
        node.reconciler.apply_changes(store, &store.everything());
        node.publish_variables()?;
        node.reserve_ports();
        // full tables before the programs are attached
        while node.reconciler.work(Instant::now()).is_some_and(|due| due <= Instant::now()) {}
        node.detach_others()?;
        node.attach_uplinks();
        node.attach_host(config)?;
        node.log_warnings(&[]);
        node.plan.egress.log(&EgressPlan::default());
        node.publish_pod_network();
        Ok(node)
    }

    /// Applies a new plan: devices that appeared or disappeared, changed addresses.
    ///
    /// # Errors
    ///
    /// A program cannot be attached to a device. Devices that are attached already keep working.
    pub(super) fn update(
        &mut self,
        config: &Config,
        plan: NodeNetworkPlan,
        store: &Store,
    ) -> Result<(), StartError> {
        self.dirty = true;
        let before = std::mem::replace(&mut self.plan, plan);
        self.publish_variables()?;
        if before.uplinks != self.plan.uplinks || !self.uplink_errors.is_empty() {
            self.attach_uplinks();
        }
        if before.overlay != self.plan.overlay {
            self.attach_host(config)?;
        }
        if before != self.plan {
            self.configure_reconciler(config, store);
        }
        self.reconciler.set_down_pods(&self.plan.down_pods, Instant::now());
        self.log_warnings(&before.warnings);
        self.plan.egress.log(&before.egress);
        self.attached()
    }

    /// Writes the node's addresses, the ranges of cluster IPs and the way of egress for the
    /// programs.
    fn publish_variables(&mut self) -> Result<(), LoadError> {
        let variables = self.plan.variables(self.reconciler.cluster_ranges());
        if self.published_variables != Some(variables) {
            self.datapath.set_variables(variables)?;
            self.published_variables = Some(variables);
        }
        Ok(())
    }

    /// Gives the reconciler the node's network: devices, addresses and service settings.
    fn configure_reconciler(&mut self, config: &Config, store: &Store) {
        let network = NodeNetwork {
            own: config.node_name.clone(),
            uplinks: self.plan.uplinks.clone(),
            mode: match config.routing {
                Routing::Auto => RoutingMode::Auto,
                Routing::Native => RoutingMode::Native,
                Routing::Vxlan => RoutingMode::Vxlan,
            },
            overlay: self.plan.overlay,
            overlay_device: self.plan.overlay_device.clone(),
            exceptions: config.masquerade.except.clone(),
            sources: self.plan.primary_ips.iter().collect(),
            load_balancing: config.services.load_balancing,
            forwarding: config.services.forwarding,
        };
        self.reconciler.set_node_port_addresses(self.node_port_addresses(config));
        self.reconciler.set_host_addresses(self.plan.addresses.iter().copied(), store, Instant::now());
        self.reconciler.set_network(network, store);
        self.routes_changed = true;
    }

    /// Addresses of this node that accept node ports; `None`: all.
    fn node_port_addresses(&self, config: &Config) -> Option<BTreeSet<IpAddr>> {
        match &config.node_ports.addresses {
            NodePortAddresses::All => None,
            NodePortAddresses::Primary => Some(self.plan.primary_ips.iter().collect()),
            NodePortAddresses::Within(ranges) => {
                let within = |ip: &&IpAddr| ranges.iter().any(|range| range.contains(*ip));
                Some(self.plan.addresses.iter().filter(within).copied().collect())
            }
        }
    }

    /// Publishes the network settings of new pods. The MTU depends on whether the overlay is used.
    fn publish_pod_network(&self) {
        let network = PodNetwork {
            ranges: self.plan.node.pod_cidrs.clone(),
            mtu: self.plan.pod_mtu(self.reconciler.uses_overlay()),
            sources: self.plan.primary_ips.iter().collect(),
        };
        self.pod_network.send_if_modified(|published| {
            let changed = *published != network;
            *published = network;
            changed
        });
    }

    /// Starts the CNI server, which attaches existing pods before it serves requests.
    pub(super) fn start_cni_server(
        &self,
        config: &Config,
        netlink: &Netlink,
        api: &Arc<Api>,
        channel: &PodChannel,
    ) -> Result<(), StartError> {
        api.set_datapath_reader(Arc::new(PinnedDatapath::open(self.datapath.pins())?));
        let network = self.pod_network.subscribe();
        let directories =
            Directories { state_dir: config.state_dir.clone(), run_dir: config.run_dir.clone() };
        tokio::spawn(serve_pods(channel.clone(), netlink.clone(), directories, network, Arc::clone(api)));
        Ok(())
    }

    /// Takes in changes of the cluster state; [`Self::poll`] applies them.
    pub(super) fn on_changes(&mut self, store: &Store, changes: &Changes) {
        self.reconciler.apply_changes(store, changes);
        self.routes_changed |= !changes.nodes.is_empty();
        self.synced |= changes.synced;
        self.dirty = true;
        if let Err(error) = self.publish_variables() {
            tracing::error!(%error, "cannot write node addresses, service CIDRs and egress for the programs");
        }
    }

    /// Runs reconciliation that is due. Returns when to call it again.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Instant> {
        if self.reconciler.take_host_ports_changed() {
            self.reserve_ports();
        }
        let before = (self.reconciler.changes(), self.reconciler.applied_revision());
        self.check_xdp(now);
        let due = self.reconciler.work(now);
        let after = (self.reconciler.changes(), self.reconciler.applied_revision());
        for update in self.reconciler.take_udp_backend_updates() {
            self.send_socket_update(update);
        }
        let settled = self.reconciler.is_settled();
        if settled && std::mem::take(&mut self.routes_changed) {
            self.publish_pod_network();
        }
        let all_tried = self.synced && due.is_none_or(|due| due > now);
        self.dirty |= before != after || (all_tried && !self.initial_sync_done);
        self.initial_sync_done |= all_tried;
        // an earlier agent may have stopped before it closed the sockets of removed backends
        let recovered = matches!(self.recovery, Some(Ok(())));
        if settled && self.initial_sync_done && recovered && !self.udp_backends_sent {
            self.udp_backends_sent = true;
            self.send_socket_update(self.reconciler.udp_backends());
        }
        [due, self.xdp_check.next_due()].into_iter().flatten().min()
    }

    /// Reserves host ports in the kernel: before a port is served, and periodically, because others
    /// write the sysctl too.
    fn reserve_ports(&mut self) {
        // the update below covers every change so far
        self.reconciler.take_host_ports_changed();
        self.reserved_ports.update(&self.reconciler.host_ports());
        self.dirty = true;
    }

    /// Fails only if the socket task has panicked: then no sockets are closed.
    fn send_socket_update(&self, update: SocketUpdate) {
        let _panicked = self.socket_updates.send(update);
    }

    /// Revision of the state that the tables hold completely.
    pub(super) const fn applied_revision(&self) -> u64 {
        self.reconciler.applied_revision()
    }

    /// Compares the next table with its desired rows; [`Self::poll`] repairs differences. Returns
    /// true after the last table.
    pub(super) fn audit(&mut self) -> bool {
        let before = self.reconciler.statistics().drift;
        let round_done = self.reconciler.audit().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot audit a table; retrying at the next audit");
            false
        });
        if round_done {
            // sockets may live for days: catch those whose backend's removal was missed
            self.send_socket_update(self.reconciler.udp_backends());
        }
        self.reserve_ports();
        let devices = self.devices.audit(&self.plan.uplinks).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot audit the table of devices; retrying at the next audit");
            0
        });
        let allowed_sources = self.allowed_sources.audit().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot audit the table of allowed sources; retrying at the next audit");
            0
        });
        let drift = self.reconciler.statistics().drift - before + devices + allowed_sources;
        if drift > 0 {
            tracing::warn!(drift, "audit found table rows changed by another process; repairing them");
        }
        round_done
    }

    /// True if the status must be published again; resets the flag.
    pub(super) fn take_dirty(&mut self) -> bool {
        for problems in [&mut self.kernel_problems, &mut self.socket_problems] {
            if problems.has_changed().unwrap_or(false) {
                problems.mark_unchanged();
                self.dirty = true;
            }
        }
        std::mem::take(&mut self.dirty)
    }
}
