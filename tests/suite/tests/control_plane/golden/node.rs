//! The node whose tables are dumped: the agent's state and reconciler over tables in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::{
    compile::{
        endpoints::PodDevice,
        routes::{Overlay, RoutingMode},
    },
    config::{Config, NodePortAddresses, Routing},
    netlink::{KernelRoute, Uplink},
    reconcile::{KernelUpdate, LocalPod, NodeNetwork, Reconciler},
    state::{Changes, Object, SourceEvent, Store},
};
use dataplane_common::abi::MacAddr;
use ipnet::IpNet;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::case::{Case, NODE, Pod, Step};
use crate::service_tables::tables::Tables;

pub(super) const UPLINK: (u32, &str) = (2, "eth0");
pub(super) const OVERLAY: (u32, &str) = (3, "dataplane0");
/// Index of the first pod's device.
const FIRST_POD: u32 = 10;
const UPLINK_MTU: u32 = 1_500;
const OVERLAY_MTU: u32 = 1_450;
/// Prefix lengths of the uplink's subnets, IPv4 and IPv6.
const SUBNETS: [u8; 2] = [24, 64];

/// The order in which the objects of a step arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// One by one, as in the files. Pods come before objects.
    File,
    /// One by one, the last first. Pods come after objects.
    Reverse,
    /// Together.
    AtOnce,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) tables: Tables,
    pub(super) store: Store,
    pub(super) reconciler: Reconciler,
    pub(super) kernel_routes: BTreeMap<IpNet, KernelRoute>,
    /// Subject and text, sorted.
    pub(super) problems: BTreeSet<(String, String)>,
    config: Config,
    kernel: UnboundedReceiver<KernelUpdate>,
    pods: Vec<Pod>,
    now: Instant,
}

impl Node {
    /// The node after all steps of the case.
    pub(super) fn with(case: &Case, order: Order) -> Result<Self> {
        let tables = Tables::new();
        let (sender, kernel) = mpsc::unbounded_channel();
        let mut reconciler = Reconciler::new(&tables, sender);
        reconciler.adopt()?;
        let mut node = Self {
            tables,
            store: Store::default(),
            reconciler,
            kernel_routes: BTreeMap::new(),
            problems: BTreeSet::new(),
            config: case.config.clone(),
            kernel,
            pods: Vec::new(),
            now: Instant::now(),
        };
        for (number, step) in case.steps.iter().enumerate() {
            node.apply(step, order, number == 0)?;
        }
        for problem in &case.problems {
            node.problems.insert((problem.subject.clone(), problem.message.clone()));
        }
        for problem in node.reconciler.problems() {
            node.problems.insert((problem.subject, problem.message));
        }
        Ok(node)
    }

    fn apply(&mut self, step: &Step, order: Order, is_first: bool) -> Result<()> {
        // the agent waits for the Node object of its own node before it does anything else
        let is_own = |event: &&SourceEvent| matches!(event, SourceEvent::Upsert(Object::Node(node)) if node.name == NODE);
        let (own, mut others): (Vec<_>, Vec<_>) = step.events.iter().partition(is_own);
        for event in own {
            self.deliver([event.clone()])?;
            self.configure(&step.host)?;
        }
        if order == Order::Reverse {
            others.reverse();
        } else {
            self.set_pods(&step.pods, order, is_first)?;
        }
        let synced = is_first.then_some(SourceEvent::Synced);
        if order == Order::AtOnce {
            self.deliver(others.into_iter().cloned().chain(synced))?;
        } else {
            for event in others.into_iter().cloned().chain(synced) {
                self.deliver([event])?;
            }
        }
        if order == Order::Reverse {
            self.set_pods(&step.pods, order, is_first)?;
        }
        self.settle()
    }

    /// Gives the reconciler the node's network, as `app::datapath` does.
    fn configure(&mut self, host: &[IpAddr]) -> Result<()> {
        let own = self.store.node(NODE).context("the node's object")?;
        let subnet = |ip: &IpAddr| IpNet::new(*ip, SUBNETS[usize::from(ip.is_ipv6())]);
        let first_of = |family: fn(&IpAddr) -> bool| own.internal_ips.iter().copied().find(family);
        let primary: Vec<IpAddr> =
            [first_of(IpAddr::is_ipv4), first_of(IpAddr::is_ipv6)].into_iter().flatten().collect();
        let (mode, overlay) = match self.config.routing {
            Routing::Auto => (RoutingMode::Auto, true),
            Routing::Native => (RoutingMode::Native, false),
            Routing::Vxlan => (RoutingMode::Vxlan, true),
        };
        let network = NodeNetwork {
            own: NODE.to_owned(),
            uplinks: vec![Uplink {
                name: UPLINK.1.to_owned(),
                ifindex: UPLINK.0,
                mtu: UPLINK_MTU,
                mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
                addresses: own.internal_ips.iter().map(subnet).collect::<Result<_, _>>()?,
                sources: Vec::new(),
                bridge: false,
            }],
            mode,
            overlay: overlay.then_some(Overlay { ifindex: OVERLAY.0, mtu: OVERLAY_MTU }),
            overlay_device: OVERLAY.1.to_owned(),
            exceptions: self.config.masquerade.except.clone(),
            sources: primary.clone(),
            load_balancing: self.config.services.load_balancing,
            forwarding: self.config.services.forwarding,
        };
        let node_ports = match &self.config.node_ports.addresses {
            NodePortAddresses::All => None,
            NodePortAddresses::Primary => Some(primary.into_iter().collect()),
            NodePortAddresses::Within(ranges) => {
                let is_within = |ip: &&IpAddr| ranges.iter().any(|range| range.contains(*ip));
                Some(host.iter().filter(is_within).copied().collect())
            }
        };
        self.reconciler.set_node_port_addresses(node_ports);
        self.reconciler.set_host_addresses(host.iter().copied(), &self.store, self.now);
        self.reconciler.set_network(network, &self.store);
        self.settle()
    }

    /// Adds and removes pods as the CNI server does.
    fn set_pods(&mut self, pods: &[Pod], order: Order, is_first: bool) -> Result<()> {
        for pod in std::mem::take(&mut self.pods) {
            if !pods.contains(&pod) {
                self.reconciler.remove_pod(&pod.id(), self.now)?;
            }
        }
        let mut numbered: Vec<_> = (FIRST_POD..).zip(pods).collect();
        if order == Order::Reverse {
            numbered.reverse();
        }
        for (ifindex, pod) in numbered {
            if let Err(error) = self.reconciler.upsert_pod(&pod.id(), &pod.attached(ifindex), self.now) {
                self.problems.insert((format!("Pod {}", pod.id()), error.to_string()));
            }
        }
        self.pods = pods.to_vec();
        if is_first {
            self.reconciler.pods_loaded();
        }
        Ok(())
    }

    fn deliver(&mut self, events: impl IntoIterator<Item = SourceEvent>) -> Result<()> {
        let mut changes = Changes::default();
        for event in events {
            changes.merge(self.store.apply(event));
        }
        self.reconciler.apply_changes(&self.store, &changes);
        self.settle()
    }

    /// Works until nothing is due.
    fn settle(&mut self) -> Result<()> {
        for _ in 0..1_000 {
            let Some(due) = self.reconciler.work(self.now) else { break };
            self.now = self.now.max(due);
        }
        ensure!(self.reconciler.is_settled(), "not settled: {:?}", self.reconciler.problems());
        while let Ok(update) = self.kernel.try_recv() {
            match update {
                KernelUpdate::Ensure(route) => drop(self.kernel_routes.insert(route.destination, route)),
                KernelUpdate::Remove(destination) => drop(self.kernel_routes.remove(&destination)),
                // removes routes of an earlier agent
                KernelUpdate::Sweep(_) => {}
            }
        }
        Ok(())
    }
}

impl Pod {
    fn id(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn attached(&self, ifindex: u32) -> LocalPod {
        LocalPod {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            device_name: format!("dp{ifindex}"),
            device: PodDevice {
                addresses: self.addresses.clone(),
                ifindex,
                mac: MacAddr::new([2, 0, 0, 0, 1, ifindex as u8]),
                shaped: false,
                down: false,
            },
            port_mappings: self.port_mappings.clone(),
        }
    }
}
