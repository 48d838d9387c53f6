//! The node task: it owns the state, and is the only one that changes tables and programs.
//!
//! It receives events of the source, the CNI server, the API and the kernel, and runs due work
//! between them. The programs are loaded while the source syncs; [`NodeDatapath`] takes them over
//! once the Node object is known.

mod status;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinHandle, block_in_place, spawn_blocking},
    time::sleep_until,
};

use super::{
    config_watch::LiveConfig,
    datapath::{NodeDatapath, StartError},
    latency::ProgrammingLatency,
    network_plan::NodeNetworkPlan,
    pending_pods::PendingPodLookups,
    pods::{PodChannel, PodRequest},
    programs::LoadedPrograms,
};
use crate::{
    api::{answer::Api, query::Query, views::Status},
    config::{Config, Source},
    lifecycle::{self, HealthChecks},
    metrics::Metrics,
    netlink::{IpsecMonitor, Monitor, Netlink},
    source,
    state::{Changes, SourceEvent, Store},
};

/// Most source events taken at once, so that a burst is compiled once.
const EVENT_BURST: usize = 4_096;
/// Debounces kernel notifications of network changes.
const NETWORK_DEBOUNCE: Duration = Duration::from_millis(50);
/// As above, if only routes changed: a node with a routing protocol may have many, often.
const ROUTE_DEBOUNCE: Duration = Duration::from_millis(500);
/// First and longest wait between attempts to set up the network.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// One table is audited each time.
const AUDIT_INTERVAL: Duration = Duration::from_secs(60);
/// Shortest time between two published statuses.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(20);

/// Error that stops the agent.
#[derive(Debug, thiserror::Error)]
pub(super) enum NodeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("netlink monitor of network changes has ended")]
    Monitor,
    #[error("cannot read changes of IPsec policies from netlink: {0}")]
    Ipsec(#[source] io::Error),
    #[error("the source of cluster objects has ended")]
    Source,
    #[error("task that loads the eBPF programs failed: {0}")]
    Loading(#[from] JoinError),
}

/// Receivers of the node task.
pub(super) struct Inputs {
    pub events: mpsc::Receiver<SourceEvent>,
    pub problems: watch::Receiver<Vec<source::Problem>>,
    pub node_problems: lifecycle::Problems,
    pub progress: source::Progress,
    pub behind: watch::Receiver<Option<SystemTime>>,
    pub queries: mpsc::Receiver<Query>,
    pub monitor: Monitor,
    pub ipsec: IpsecMonitor,
    pub config: watch::Receiver<LiveConfig>,
}

/// Senders of the node task.
pub(super) struct Outputs {
    pub status: watch::Sender<Status>,
    pub health_checks: watch::Sender<HealthChecks>,
}

/// The node task.
pub(super) struct NodeTask {
    config: Config,
    netlink: Netlink,
    api: Arc<Api>,
    outputs: Outputs,
    store: Store,
    /// Loaded programs, until the Node object is known.
    loaded: Option<LoadedPrograms>,
    datapath: Option<NodeDatapath>,
    pods: PodChannel,
    pending_lookups: PendingPodLookups,
    latency: ProgrammingLatency,
    /// When to set up the network; `None`: at the next change.
    next_setup: Option<Instant>,
    /// The last setup error, and the wait before the next attempt.
    setup_failure: Option<(String, Duration)>,
    last_event: Option<Instant>,
    last_audit: Option<Instant>,
    next_audit: Instant,
    next_publish: Instant,
    /// The status must be published again.
    dirty: bool,
}

impl NodeTask {
    pub(super) fn new(
        config: Config,
        netlink: Netlink,
        api: Arc<Api>,
        outputs: Outputs,
        metrics: &Metrics,
    ) -> (Self, mpsc::Receiver<PodRequest>) {
        let (pods, requests) = PodChannel::new();
        let pending_lookups = PendingPodLookups::new(config.allowed_sources_namespaces.clone());
        let now = Instant::now();
        let task = Self {
            config,
            netlink,
            api,
            outputs,
            store: Store::default(),
            loaded: None,
            datapath: None,
            pods,
            pending_lookups,
            latency: ProgrammingLatency::new(metrics.latency()),
            next_setup: Some(now),
            setup_failure: None,
            last_event: None,
            last_audit: None,
            next_audit: now + AUDIT_INTERVAL,
            next_publish: now,
            dirty: true,
        };
        (task, requests)
    }

    /// Runs until an input that must stay open is closed.
    pub(super) async fn run(
        mut self,
        mut inputs: Inputs,
        mut requests: mpsc::Receiver<PodRequest>,
    ) -> Result<(), NodeError> {
        let config = self.config.clone();
        let mut loading = Some(spawn_blocking(move || LoadedPrograms::load(&config)));
        loop {
            let due = self.poll(&inputs).await?;
            tokio::select! {
                loaded = join(&mut loading), if loading.is_some() => {
                    loading = None;
                    self.loaded = Some(loaded??);
                    self.schedule_setup(Instant::now());
                }
                event = inputs.events.recv() => {
                    self.on_event(event.ok_or(NodeError::Source)?, &mut inputs.events);
                }
                Some(request) = requests.recv() => self.on_pod_request(request),
                Some(query) = inputs.queries.recv() => self.on_query(query),
                change = inputs.monitor.changed() => {
                    let change = change.ok_or(NodeError::Monitor)?;
                    let is_route = !(change.links || change.addresses);
                    let debounce = if is_route { ROUTE_DEBOUNCE } else { NETWORK_DEBOUNCE };
                    self.schedule_setup(Instant::now() + debounce);
                }
                changed = inputs.ipsec.changed() => {
                    changed.map_err(NodeError::Ipsec)?;
                    self.schedule_setup(Instant::now() + NETWORK_DEBOUNCE);
                }
                Ok(()) = inputs.config.changed() => {
                    self.config.egress = inputs.config.borrow_and_update().egress;
                    self.dirty = true;
                    self.schedule_setup(Instant::now());
                }
                Ok(()) = inputs.problems.changed() => self.dirty = true,
                () = inputs.node_problems.changed() => self.dirty = true,
                Ok(()) = inputs.behind.changed() => self.dirty = true,
                () = sleep_until(due.into()) => {}
            }
        }
    }

    /// Runs everything that is due. Returns when to call it again.
    async fn poll(&mut self, inputs: &Inputs) -> Result<Instant, NodeError> {
        if self.next_setup.is_some_and(|at| at <= Instant::now()) {
            self.next_setup = None;
            self.set_up().await?;
        }
        let now = Instant::now();
        let mut due = self.next_audit;
        if let Some(datapath) = &mut self.datapath {
            due = datapath.poll(now).map_or(due, |next| next.min(due));
            self.latency.on_applied(datapath.applied_revision(), Instant::now(), SystemTime::now());
            if now >= self.next_audit {
                if datapath.audit() {
                    self.last_audit = Some(now);
                }
                self.next_audit = now + AUDIT_INTERVAL;
            }
            self.dirty |= datapath.take_dirty();
        }
        if self.dirty {
            if now >= self.next_publish {
                self.publish_status(inputs);
                self.dirty = false;
                self.next_publish = now + PUBLISH_INTERVAL;
            } else {
                due = due.min(self.next_publish);
            }
        }
        let lookups = self.pending_lookups.poll(&self.store, now);
        Ok([self.next_setup, lookups].into_iter().flatten().fold(due, Instant::min))
    }

    /// Sets up the node's network, and the first time starts the datapath. Network errors are
    /// retried.
    async fn set_up(&mut self) -> Result<(), NodeError> {
        self.dirty = true;
        let Some(node) = self.store.node(&self.config.node_name) else {
            // its arrival schedules a setup; a running datapath survives its deletion
            return Ok(());
        };
        let others: Vec<_> = self.store.nodes().filter(|other| other.name != node.name).collect();
        let before = match (&self.datapath, &self.loaded) {
            (Some(datapath), _) => datapath.uplink_indexes(),
            (None, Some(loaded)) => loaded.uplink_indexes()?,
            (None, None) => return Ok(()),
        };
        let plan = match NodeNetworkPlan::set_up(&self.config, node, &others, &before, &self.netlink).await {
            Ok(plan) => plan,
            Err(error) => {
                self.retry_setup(error.to_string());
                return Ok(());
            }
        };
        match &mut self.datapath {
            Some(datapath) => match block_in_place(|| datapath.update(&self.config, plan, &self.store)) {
                Ok(()) => self.setup_failure = None,
                Err(error) => self.retry_setup(error.to_string()),
            },
            None => {
                let Some(loaded) = self.loaded.take() else { return Ok(()) };
                let datapath =
                    block_in_place(|| NodeDatapath::start(&self.config, loaded, plan, &self.store))?;
                datapath.start_cni_server(&self.config, &self.netlink, &self.api, &self.pods)?;
                self.setup_failure = None;
                if let Err(error) = datapath.attached() {
                    self.retry_setup(error.to_string());
                }
                self.datapath = Some(datapath);
            }
        }
        Ok(())
    }

    fn retry_setup(&mut self, reason: String) {
        let last = self.setup_failure.as_ref();
        let wait = last.map_or(FIRST_RETRY, |(_, wait)| (*wait * 2).min(LAST_RETRY));
        if last.is_none_or(|(logged, _)| *logged != reason) {
            tracing::warn!("node network setup failed, retrying in {wait:?}: {reason}");
        }
        self.setup_failure = Some((reason, wait));
        self.schedule_setup(Instant::now() + wait);
    }

    fn schedule_setup(&mut self, at: Instant) {
        self.next_setup = Some(self.next_setup.map_or(at, |next| next.min(at)));
    }

    fn on_event(&mut self, event: SourceEvent, events: &mut mpsc::Receiver<SourceEvent>) {
        let now = Instant::now();
        let mut changes = self.apply(event, now);
        for _ in 1..EVENT_BURST {
            let Ok(event) = events.try_recv() else { break };
            changes.merge(self.apply(event, now));
        }
        self.last_event = Some(now);
        self.dirty = true;
        self.on_changes(&changes);
    }

    fn apply(&mut self, event: SourceEvent, now: Instant) -> Changes {
        let trigger = ProgrammingLatency::trigger(&event);
        let was_synced = self.store.is_synced();
        let changes = self.store.apply(event);
        if was_synced && !changes.is_empty() {
            self.latency.on_event(self.store.revision(), now, trigger);
        }
        changes
    }

    fn on_changes(&mut self, changes: &Changes) {
        if changes.nodes.contains(&self.config.node_name) {
            self.schedule_setup(Instant::now());
        } else if !changes.nodes.is_empty() {
            // which uplinks lead to other nodes decides the MTU
            self.schedule_setup(Instant::now() + NETWORK_DEBOUNCE);
        }
        if !changes.services.is_empty() {
            self.publish_health_checks(&changes.services);
        }
        if let Some(datapath) = &mut self.datapath {
            datapath.on_changes(&self.store, changes);
        }
    }

    fn on_pod_request(&mut self, request: PodRequest) {
        if let PodRequest::Annotations(pod, reply) = request {
            let may_wait = self.config.source == Source::Kubernetes;
            return self.pending_lookups.push(pod, reply, may_wait);
        }
        self.dirty = true;
        // always there: it starts the CNI server
        if let Some(datapath) = &mut self.datapath {
            datapath.on_pod_request(request);
        }
    }

    fn on_query(&mut self, query: Query) {
        // a reply fails if the client has gone
        let datapath = self.datapath.as_ref();
        match query {
            Query::Ping(reply) => drop(reply.send(())),
            Query::Services(reply) => {
                let services = datapath.map(|datapath| datapath.services(&self.store));
                drop(reply.send(services.unwrap_or_default()));
            }
            Query::Endpoints(reply) => {
                drop(reply.send(datapath.map(NodeDatapath::endpoints).unwrap_or_default()));
            }
            Query::Routes(reply) => drop(reply.send(datapath.map(NodeDatapath::routes).unwrap_or_default())),
        }
    }
}

/// Result of loading the programs; pending for ever if no task runs.
async fn join(
    loading: &mut Option<JoinHandle<Result<LoadedPrograms, StartError>>>,
) -> Result<Result<LoadedPrograms, StartError>, JoinError> {
    match loading {
        Some(loading) => loading.await,
        None => std::future::pending().await,
    }
}
