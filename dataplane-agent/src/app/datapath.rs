//! The node at work: loaded programs, the devices they are on, and the tables behind them.

mod pods;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use dataplane_common::abi::NodeAddresses;
use tokio::sync::{mpsc, watch};

use super::{
    network_plan::NodeNetworkPlan,
    pods::{Directories, PodChannel, serve_pods},
    programs::LoadedPrograms,
    reserved::Reserved,
};
use crate::{
    api::{
        answer::Api,
        pinned::{PinnedDatapath, PinnedDatapathError},
        views::{EndpointView, NotReady, Origin, ProblemView, RouteView, ServiceView, Status, UplinkView},
    },
    cni::{CniError, PodDevice, PodNetwork},
    compile::routes::RoutingMode,
    config::{Config, NodePortAddresses, Routing},
    datapath::{
        AttachError, CgroupError, Datapath, LoadError, OpenError, XdpState, default_cgroup, table::TableError,
    },
    netlink::{Netlink, NetlinkError, Uplink},
    reconcile::{KernelRoutes, KernelSockets, NodeNetwork, Reconciler, SocketUpdate, Sockets},
    state::{Changes, Store},
};

/// Why the node does not run.
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
    #[error("adopt tables: {0}")]
    Adopt(#[from] TableError),
    #[error(transparent)]
    Kernel(#[from] PinnedDatapathError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// The node at work.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each says whether one thing is due, whatever the others say"
)]
pub(super) struct NodeDatapath {
    setup: NodeNetworkPlan,
    datapath: Datapath,
    /// What the programs were told of addresses.
    told: Option<NodeAddresses>,
    reconciler: Reconciler,
    reserved: Reserved,
    /// Attached pods by the name of their host-side device.
    pods: BTreeMap<String, PodDevice>,
    /// How uplinks handle what asks services from outside.
    xdp: BTreeMap<String, XdpState>,
    /// Devices that could not be attached, and why.
    unattached: BTreeMap<String, String>,
    /// Since new pods were told what they get.
    routes_changed: bool,
    kernel_problems: watch::Receiver<Vec<ProblemView>>,
    /// Who ends connected UDP sockets whose backend is gone.
    sockets: mpsc::UnboundedSender<SocketUpdate>,
    socket_problems: watch::Receiver<Vec<ProblemView>>,
    /// What new pods get.
    pod_network: watch::Sender<PodNetwork>,
    pins_adopted: u32,
    /// Pods that were there when the agent started: whether they are attached, or why they are not known.
    pods_loaded: Option<Result<(), CniError>>,
    /// The source has delivered everything.
    synced: bool,
    /// And all of it has been worked on: from then on the node is ready, whatever single key may wait for room.
    caught_up: bool,
    /// Which UDP backends there are has been said once.
    sockets_told_all: bool,
    news: bool,
}

impl NodeDatapath {
    /// Fills the tables of the datapath and hooks it to the node's devices, in this order.
    pub(super) fn start(
        config: &Config,
        loaded: LoadedPrograms,
        setup: NodeNetworkPlan,
        store: &Store,
    ) -> Result<Self, StartError> {
        let LoadedPrograms { datapath, pins_adopted } = loaded;
        let (updates, updates_heard) = mpsc::unbounded_channel();
        let mut reconciler = Reconciler::new(datapath.tables()?, updates);
        let adopted = reconciler.adopt()?;
        tracing::info!(?adopted, "tables");
        let (kernel, kernel_problems) = KernelRoutes::new(Netlink::connect()?, updates_heard);
        tokio::spawn(kernel.run());
        let (sockets, sockets_heard) = mpsc::unbounded_channel();
        let connected = KernelSockets::new(datapath.connected_peers()?);
        let (ending, socket_problems) = Sockets::new(connected, sockets_heard);
        tokio::spawn(ending.run());
        let mut running = Self {
            setup,
            datapath,
            told: None,
            reconciler,
            reserved: Reserved::new(config),
            pods: BTreeMap::new(),
            xdp: BTreeMap::new(),
            unattached: BTreeMap::new(),
            routes_changed: true,
            kernel_problems,
            sockets,
            socket_problems,
            pod_network: watch::Sender::default(),
            pins_adopted,
            pods_loaded: None,
            synced: store.is_synced(),
            caught_up: false,
            sockets_told_all: false,
            news: true,
        };
        // the node before its services, which are compiled for it
        running.tell_network(config, store);
        running.reconciler.changed(store, &store.everything());
        running.tell_programs()?;
        running.reserve_ports();
        // a new node's programs meet full tables; an adopted node's tables are full already
        while running.reconciler.work(Instant::now()).is_some_and(|due| due <= Instant::now()) {}
        running.attach_node(config, &[])?;
        running.tell_pods();
        Ok(running)
    }

    /// What changed of the node: devices that came or went, addresses.
    ///
    /// # Errors
    ///
    /// A device that cannot be hooked. What ran before goes on.
    pub(super) fn update(
        &mut self,
        config: &Config,
        setup: NodeNetworkPlan,
        store: &Store,
    ) -> Result<(), StartError> {
        self.news = true;
        let before = std::mem::replace(&mut self.setup, setup);
        self.tell_programs()?;
        if before.uplinks != self.setup.uplinks || before.overlay != self.setup.overlay {
            self.attach_node(config, &before.uplinks)?;
        }
        if before != self.setup {
            self.tell_network(config, store);
        }
        Ok(())
    }

    /// Tells the programs the addresses of the node, and where cluster IPs are.
    fn tell_programs(&mut self) -> Result<(), LoadError> {
        let addresses = self.setup.known_by.for_programs(self.reconciler.cluster_ranges());
        if self.told != Some(addresses) {
            self.datapath.set_addresses(addresses)?;
            self.told = Some(addresses);
        }
        Ok(())
    }

    /// Hooks uplinks, overlay and sockets; takes the programs off devices that are uplinks no more.
    fn attach_node(&mut self, config: &Config, before: &[Uplink]) -> Result<(), StartError> {
        let is_uplink = |name: &str| self.setup.uplinks.iter().any(|uplink| uplink.name == name);
        for gone in before.iter().filter(|uplink| !is_uplink(&uplink.name)) {
            self.datapath.detach_uplink(&gone.name)?;
            self.xdp.remove(&gone.name);
            tracing::info!(device = gone.name, "no uplink any more");
        }
        for uplink in &self.setup.uplinks {
            let how = self.datapath.attach_uplink(&uplink.name)?;
            // only now: what the driver leaves to tc must find tc there
            let xdp = self.datapath.attach_xdp(&uplink.name)?;
            tracing::info!(device = uplink.name, mtu = uplink.mtu, ?how, ?xdp, "uplink");
            self.xdp.insert(uplink.name.clone(), xdp);
        }
        if let Some(overlay) = self.setup.overlay {
            let how = self.datapath.attach_overlay(&self.setup.overlay_device)?;
            tracing::info!(device = self.setup.overlay_device, mtu = overlay.mtu, ?how, "overlay");
        }
        let cgroup = config.cgroup.clone().map_or_else(default_cgroup, Ok)?;
        self.datapath.attach_cgroup(&cgroup)?;
        tracing::info!(cgroup = %cgroup.display(), "sockets");
        Ok(())
    }

    /// Tells the reconciler what the node is, and new pods how large their packets may be.
    fn tell_network(&mut self, config: &Config, store: &Store) {
        let network = NodeNetwork {
            own: config.node_name.clone(),
            uplinks: self.setup.uplinks.clone(),
            mode: match config.routing {
                Routing::Auto => RoutingMode::Auto,
                Routing::Native => RoutingMode::Native,
                Routing::Vxlan => RoutingMode::Vxlan,
            },
            overlay: self.setup.overlay,
            overlay_device: self.setup.overlay_device.clone(),
            exceptions: config.masquerade.except.clone(),
            sources: self.setup.known_by.addresses().collect(),
            load_balancing: config.services.load_balancing,
            forwarding: config.services.forwarding,
        };
        self.reconciler.set_node_port_addresses(self.node_port_addresses(config));
        self.reconciler.set_host_addresses(self.setup.addresses.iter().copied(), store, Instant::now());
        self.reconciler.set_network(network, store);
        self.routes_changed = true;
    }

    /// Addresses of this node that take node ports; `None`: all.
    fn node_port_addresses(&self, config: &Config) -> Option<BTreeSet<IpAddr>> {
        match &config.node_ports.addresses {
            NodePortAddresses::All => None,
            NodePortAddresses::Primary => Some(self.setup.known_by.addresses().collect()),
            NodePortAddresses::Within(ranges) => {
                let within = |ip: &&IpAddr| ranges.iter().any(|range| range.contains(*ip));
                Some(self.setup.addresses.iter().filter(within).copied().collect())
            }
        }
    }

    /// What new pods get depends on how other nodes are reached.
    fn tell_pods(&self) {
        let network = PodNetwork {
            ranges: self.setup.own.pod_cidrs.clone(),
            mtu: self.setup.pod_mtu(self.reconciler.uses_overlay()),
            sources: self.setup.known_by.addresses().collect(),
        };
        self.pod_network.send_if_modified(|told| {
            let changed = *told != network;
            *told = network;
            changed
        });
    }

    /// Starts the CNI server: first the pods that are there, then whoever asks.
    pub(super) fn open_for_pods(
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

    /// What changed of the cluster.
    pub(super) fn changed(&mut self, store: &Store, changes: &Changes) {
        self.reconciler.changed(store, changes);
        self.routes_changed |= !changes.nodes.is_empty();
        self.synced |= changes.synced;
        self.news = true;
        if let Err(error) = self.tell_programs() {
            tracing::error!(%error, "tell the programs where cluster IPs are");
        }
    }

    /// Does what is due. Returns when there is more to do.
    pub(super) fn work(&mut self, now: Instant) -> Option<Instant> {
        if self.reconciler.take_host_ports_changed() {
            self.reserve_ports();
        }
        let before = (self.reconciler.changes(), self.reconciler.applied_revision());
        let due = self.reconciler.work(now);
        let after = (self.reconciler.changes(), self.reconciler.applied_revision());
        for moved in self.reconciler.take_moved() {
            self.tell_sockets(moved);
        }
        let settled = self.reconciler.is_settled();
        if settled && std::mem::take(&mut self.routes_changed) {
            self.tell_pods();
        }
        let caught_up = self.synced && due.is_none_or(|due| due > now);
        self.news |= before != after || (caught_up && !self.caught_up);
        self.caught_up |= caught_up;
        // what an earlier agent learnt of backends that went, it may not have lived to act upon
        if settled && self.caught_up && matches!(self.pods_loaded, Some(Ok(()))) && !self.sockets_told_all {
            self.sockets_told_all = true;
            self.tell_sockets(self.reconciler.udp_backends());
        }
        due
    }

    /// Before a port leads anywhere, and again from time to time: the kernel's list is everybody's.
    fn reserve_ports(&mut self) {
        // what changed until now is told with it
        self.reconciler.take_host_ports_changed();
        self.reserved.update(&self.reconciler.host_ports());
        self.news = true;
    }

    /// It lives as long as we do, unless it has panicked: then sockets stay as they are.
    fn tell_sockets(&self, update: SocketUpdate) {
        let _dead = self.sockets.send(update);
    }

    /// Revision of the state that is in the tables completely.
    pub(super) const fn applied_revision(&self) -> u64 {
        self.reconciler.applied_revision()
    }

    /// Compares a table with what it should hold; differences are repaired by later work. Returns whether every table
    /// has had its turn.
    pub(super) fn audit(&mut self) -> bool {
        let before = self.reconciler.statistics().drift;
        let round = self.reconciler.audit().unwrap_or_else(|error| {
            tracing::warn!(%error, "audit");
            false
        });
        if round {
            // who slipped through: somebody has a socket for days
            self.tell_sockets(self.reconciler.udp_backends());
        }
        self.reserve_ports();
        let drift = self.reconciler.statistics().drift - before;
        if drift > 0 {
            tracing::warn!(drift, "somebody else changed the tables: repaired");
        }
        round
    }

    pub(super) fn take_news(&mut self) -> bool {
        for problems in [&mut self.kernel_problems, &mut self.socket_problems] {
            if problems.has_changed().unwrap_or(false) {
                problems.mark_unchanged();
                self.news = true;
            }
        }
        std::mem::take(&mut self.news)
    }

    pub(super) fn services(&self, store: &Store) -> Vec<ServiceView> {
        self.reconciler.services(store)
    }

    pub(super) fn endpoints(&self) -> Vec<EndpointView> {
        self.reconciler.endpoints().unwrap_or_else(|error| {
            tracing::warn!(%error, "list endpoints");
            Vec::new()
        })
    }

    pub(super) fn routes(&self) -> Vec<RouteView> {
        self.reconciler.routes()
    }

    /// What keeps the node from being ready.
    pub(super) fn not_ready(&self) -> Vec<NotReady> {
        let mut reasons = Vec::new();
        let pods = match &self.pods_loaded {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(format!("pods cannot be added: {error}")),
            None => Some("pods that were there when the agent started are not attached yet".to_owned()),
        };
        reasons.extend(pods.map(|reason| NotReady { check: "pods".to_owned(), reason }));
        if !self.caught_up {
            let reason = "the tables do not hold everything yet".to_owned();
            reasons.push(NotReady { check: "reconcile".to_owned(), reason });
        }
        reasons
    }

    /// Fills in what the node knows of itself.
    pub(super) fn describe(&self, status: &mut Status, store: &Store) {
        status.uplinks = self.setup.uplinks.iter().map(|uplink| self.uplink_view(uplink)).collect();
        status.pins_adopted = self.pins_adopted;
        status.objects.pods = self.pods.len() as u64;
        status.applied_revision = self.reconciler.applied_revision();
        status.nodes = self.reconciler.nodes(store);
        status.tables = self.reconciler.tables();
        status.reconcile = self.reconciler.statistics();
        status.problems.extend(self.reconciler.problems());
        status.problems.extend(self.reserved.problem());
        status.problems.extend(self.kernel_problems.borrow().iter().cloned());
        status.problems.extend(self.socket_problems.borrow().iter().cloned());
        let kept = self.datapath.problems().iter().map(|message| ("capacity", message));
        let unattached = self.unattached.iter().map(|(device, message)| (device.as_str(), message));
        let slow = self.xdp.iter().filter_map(|(device, state)| match state {
            XdpState::Refused(reason) => Some((device.as_str(), reason)),
            XdpState::Off | XdpState::Native => None,
        });
        status.problems.extend(kept.chain(unattached).chain(slow).map(|(subject, message)| ProblemView {
            origin: Origin::Datapath,
            subject: subject.to_owned(),
            message: message.clone(),
        }));
    }
}

impl NodeDatapath {
    fn uplink_view(&self, uplink: &Uplink) -> UplinkView {
        UplinkView {
            device: uplink.name.clone(),
            ifindex: uplink.ifindex,
            mtu: uplink.mtu,
            addresses: uplink.addresses.clone(),
            services_at: self.xdp.get(&uplink.name).map_or("tc", XdpState::name).to_owned(),
        }
    }
}
