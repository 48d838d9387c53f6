//! The task that owns the state: everything that changes tables or programs happens here, one thing after the other.
//!
//! It hears the source, the CNI server, the API and the kernel, and between two of them does what is due. The programs
//! are loaded while the source begins to speak; once the node's own object is known, [`NodeDatapath`] has them.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinHandle, block_in_place, spawn_blocking},
    time::sleep_until,
};

use super::{
    datapath::{NodeDatapath, StartError},
    latency::ProgrammingLatency,
    network_plan::NodeNetworkPlan,
    pending_pods::PendingPodLookups,
    pods::{PodChannel, PodRequest},
    programs::LoadedPrograms,
};
use crate::{
    api::{
        answer::Api,
        query::Query,
        views::{NotReady, Origin, ProblemView, SourceView, Status, unix_seconds},
    },
    compile::{self, services::NodeContext},
    config::{Config, Source},
    lifecycle::{self, HealthCheck, HealthChecks},
    metrics::Metrics,
    netlink::{Monitor, Netlink},
    source,
    state::{Changes, NamespacedName, Node, SourceEvent, Store},
};

/// Events of the source taken in one go, so that a burst is compiled once.
const BURST: usize = 4_096;
/// Changes of the network come in flocks: they are looked at together.
const NETWORK_SETTLES: Duration = Duration::from_millis(50);
/// Waits between attempts to make the network as it is to be.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// A table is compared with what it should hold this often, one after the other.
const AUDIT: Duration = Duration::from_secs(60);
/// The status is not made more often than this.
const PUBLISH: Duration = Duration::from_millis(20);

/// How the cluster autoscaler marks a node it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Why the agent ends by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum NodeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the kernel's word of changes of the network has ended")]
    Monitor,
    #[error("the source has ended")]
    Source,
    #[error("load the programs: {0}")]
    Loading(#[from] JoinError),
}

/// What the task hears.
pub(super) struct Inputs {
    pub events: mpsc::Receiver<SourceEvent>,
    pub problems: watch::Receiver<Vec<source::Problem>>,
    pub node_problems: lifecycle::Problems,
    pub progress: source::Progress,
    pub behind: watch::Receiver<Option<SystemTime>>,
    pub queries: mpsc::Receiver<Query>,
    pub monitor: Monitor,
}

/// What the task tells.
pub(super) struct Outputs {
    pub status: watch::Sender<Status>,
    pub health_checks: watch::Sender<HealthChecks>,
}

/// The task.
pub(super) struct NodeTask {
    config: Config,
    netlink: Netlink,
    api: Arc<Api>,
    outputs: Outputs,
    store: Store,
    /// Programs that wait for their node to be known.
    loaded: Option<LoadedPrograms>,
    running: Option<NodeDatapath>,
    pods: PodChannel,
    /// Pods that are being added.
    waiting: PendingPodLookups,
    /// Events on their way into the tables.
    programming: ProgrammingLatency,
    /// When the network is to be looked at; `None`: when the kernel says that something changed.
    look: Option<Instant>,
    /// Why the network is not as it is to be, and how long to wait before trying again.
    trouble: Option<(String, Duration)>,
    last_event: Option<Instant>,
    last_audit: Option<Instant>,
    next_audit: Instant,
    next_publish: Instant,
    /// Something was heard or done since the status was published.
    news: bool,
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
        let now = Instant::now();
        let task = Self {
            config,
            netlink,
            api,
            outputs,
            store: Store::default(),
            loaded: None,
            running: None,
            pods,
            waiting: PendingPodLookups::default(),
            programming: ProgrammingLatency::new(metrics.programming()),
            look: Some(now),
            trouble: None,
            last_event: None,
            last_audit: None,
            next_audit: now + AUDIT,
            next_publish: now,
            news: true,
        };
        (task, requests)
    }

    /// Until something ends that must not.
    pub(super) async fn run(
        mut self,
        mut inputs: Inputs,
        mut requests: mpsc::Receiver<PodRequest>,
    ) -> Result<(), NodeError> {
        let config = self.config.clone();
        let mut loading = Some(spawn_blocking(move || LoadedPrograms::load(&config)));
        loop {
            let due = self.work(&inputs).await?;
            tokio::select! {
                loaded = done(&mut loading), if loading.is_some() => {
                    loading = None;
                    self.loaded = Some(loaded??);
                    self.look_by(Instant::now());
                }
                event = inputs.events.recv() => {
                    self.hear(event.ok_or(NodeError::Source)?, &mut inputs.events);
                }
                Some(request) = requests.recv() => self.pod(request),
                Some(query) = inputs.queries.recv() => self.answer(query),
                change = inputs.monitor.changed() => {
                    change.ok_or(NodeError::Monitor)?;
                    self.look_by(Instant::now() + NETWORK_SETTLES);
                }
                Ok(()) = inputs.problems.changed() => self.news = true,
                () = inputs.node_problems.changed() => self.news = true,
                Ok(()) = inputs.behind.changed() => self.news = true,
                () = sleep_until(due.into()) => {}
            }
        }
    }

    /// Does what is due. Returns when there is more to do.
    async fn work(&mut self, inputs: &Inputs) -> Result<Instant, NodeError> {
        if self.look.is_some_and(|at| at <= Instant::now()) {
            self.look = None;
            self.set_up().await?;
        }
        let now = Instant::now();
        let mut due = self.next_audit;
        if let Some(running) = &mut self.running {
            due = running.work(now).map_or(due, |more| more.min(due));
            self.programming.applied(running.applied_revision(), Instant::now(), SystemTime::now());
            if now >= self.next_audit {
                if running.audit() {
                    self.last_audit = Some(now);
                }
                self.next_audit = now + AUDIT;
            }
            self.news |= running.take_news();
        }
        if self.news {
            if now >= self.next_publish {
                self.publish(inputs);
                self.news = false;
                self.next_publish = now + PUBLISH;
            } else {
                due = due.min(self.next_publish);
            }
        }
        let wishes = self.waiting.look(&self.store, now);
        Ok([self.look, wishes].into_iter().flatten().fold(due, Instant::min))
    }

    /// Makes the node's network as it is to be; loads the datapath the first time. What may pass is tried again.
    async fn set_up(&mut self) -> Result<(), NodeError> {
        self.news = true;
        let Some(own) = self.store.node(&self.config.node_name) else {
            // nothing to do until it comes; what runs keeps running if it goes
            return Ok(());
        };
        if self.running.is_none() && self.loaded.is_none() {
            return Ok(());
        }
        let setup = match NodeNetworkPlan::make(&self.config, own, &self.netlink).await {
            Ok(setup) => setup,
            Err(error) => {
                self.try_again(error.to_string());
                return Ok(());
            }
        };
        match &mut self.running {
            Some(running) => match block_in_place(|| running.update(&self.config, setup, &self.store)) {
                Ok(()) => self.trouble = None,
                Err(error) => self.try_again(error.to_string()),
            },
            None => {
                let Some(loaded) = self.loaded.take() else { return Ok(()) };
                let running =
                    block_in_place(|| NodeDatapath::start(&self.config, loaded, setup, &self.store))?;
                running.open_for_pods(&self.config, &self.netlink, &self.api, &self.pods)?;
                self.running = Some(running);
                self.trouble = None;
            }
        }
        Ok(())
    }

    fn try_again(&mut self, reason: String) {
        let wait = self.trouble.as_ref().map_or(FIRST_RETRY, |(_, wait)| (*wait * 2).min(LAST_RETRY));
        if self.trouble.as_ref().is_none_or(|(known, _)| *known != reason) {
            tracing::warn!(reason, "the node's network is not as it is to be");
        }
        self.trouble = Some((reason, wait));
        self.look_by(Instant::now() + wait);
    }

    fn look_by(&mut self, at: Instant) {
        self.look = Some(self.look.map_or(at, |look| look.min(at)));
    }

    fn hear(&mut self, event: SourceEvent, events: &mut mpsc::Receiver<SourceEvent>) {
        let now = Instant::now();
        let mut changes = self.apply(event, now);
        for _ in 1..BURST {
            let Ok(event) = events.try_recv() else { break };
            changes.merge(self.apply(event, now));
        }
        self.last_event = Some(now);
        self.news = true;
        self.take_in(&changes);
    }

    fn apply(&mut self, event: SourceEvent, now: Instant) -> Changes {
        let trigger = ProgrammingLatency::trigger(&event);
        let follow = self.store.is_synced();
        let changes = self.store.apply(event);
        if follow && !changes.is_empty() {
            self.programming.heard(self.store.revision(), now, trigger);
        }
        changes
    }

    fn take_in(&mut self, changes: &Changes) {
        if changes.nodes.contains(&self.config.node_name) {
            self.look_by(Instant::now());
        }
        if !changes.services.is_empty() {
            self.tell_health_checks(&changes.services);
        }
        if let Some(running) = &mut self.running {
            running.changed(&self.store, changes);
        }
    }

    /// What load balancers ask of these services.
    fn tell_health_checks(&self, names: &BTreeSet<NamespacedName>) {
        let node_context = NodeContext { node: self.config.node_name.clone(), ..NodeContext::default() };
        let check = |name: &NamespacedName| {
            let service = self.store.service(name)?;
            let port = service.health_check_port?;
            let endpoints = compile::services::local_ready(self.store.slices_of(name), &node_context);
            Some(HealthCheck { port, endpoints })
        };
        self.outputs.health_checks.send_if_modified(|told| {
            let changed: Vec<_> = names
                .iter()
                .map(|name| (name, check(name)))
                .filter(|(name, check)| told.get(name) != check.as_ref())
                .collect();
            for (name, check) in &changed {
                let told = Arc::make_mut(told);
                match check {
                    Some(check) => drop(told.insert((*name).clone(), check.clone())),
                    None => drop(told.remove(name)),
                }
            }
            !changed.is_empty()
        });
    }

    fn pod(&mut self, request: PodRequest) {
        if let PodRequest::PodAnnotations(pod, asker) = request {
            let patient = self.config.source == Source::Kubernetes;
            return self.waiting.ask(pod, asker, patient);
        }
        self.news = true;
        // the CNI server starts when the datapath runs
        if let Some(running) = &mut self.running {
            running.pod(request);
        }
    }

    fn answer(&mut self, query: Query) {
        // somebody who asks and went away is nobody's trouble
        let running = self.running.as_ref();
        match query {
            Query::Ping(asker) => drop(asker.send(())),
            Query::Services(asker) => {
                let services = running.map(|running| running.services(&self.store));
                drop(asker.send(services.unwrap_or_default()));
            }
            Query::Endpoints(asker) => {
                drop(asker.send(running.map(NodeDatapath::endpoints).unwrap_or_default()))
            }
            Query::Routes(asker) => drop(asker.send(running.map(NodeDatapath::routes).unwrap_or_default())),
        }
    }

    fn publish(&self, inputs: &Inputs) {
        let mut status = Status {
            started: self.outputs.status.borrow().started,
            not_ready: self.not_ready(),
            revision: self.store.revision(),
            synced: self.store.is_synced(),
            leaving: self.store.node(&self.config.node_name).and_then(leaving).map(str::to_owned),
            last_event: self.last_event.map(Into::into),
            last_audit: self.last_audit.map(Into::into),
            source: SourceView {
                name: self.config.source.name().to_owned(),
                behind_since: inputs.progress.behind_since().map(unix_seconds),
                relists: inputs.progress.relists(),
                watch_errors: inputs.progress.watch_errors(),
                failovers: inputs.progress.failovers(),
            },
            ..Status::starting(&self.config.node_name)
        };
        status.problems.extend(inputs.problems.borrow().iter().map(|problem| ProblemView {
            origin: Origin::Source,
            subject: problem.subject.clone(),
            message: problem.message.clone(),
        }));
        status.problems.extend(inputs.node_problems.now());
        if let Some((reason, _)) = &self.trouble {
            status.problems.push(ProblemView {
                origin: Origin::Datapath,
                subject: "network".to_owned(),
                message: reason.clone(),
            });
        }
        status.objects.nodes = self.store.nodes().count() as u64;
        status.objects.services = self.store.services().count() as u64;
        status.objects.endpoint_slices = self.store.slice_count() as u64;
        if let Some(running) = &self.running {
            running.describe(&mut status, &self.store);
        }
        let was_ready = self.outputs.status.borrow().is_ready();
        if status.is_ready() && !was_ready {
            tracing::info!("ready");
        }
        // nobody reads it: the agent is stopping
        let _stopping = self.outputs.status.send(status);
    }

    fn not_ready(&self) -> Vec<NotReady> {
        let mut reasons = Vec::new();
        let mut wait_for = |check: &str, reason: String| {
            reasons.push(NotReady { check: check.to_owned(), reason });
        };
        if !self.store.is_synced() {
            wait_for("source", "the source has not delivered everything yet".to_owned());
        }
        match (&self.running, &self.trouble) {
            (Some(running), _) => reasons.extend(running.not_ready()),
            (None, Some((reason, _))) => wait_for("network", reason.clone()),
            (None, None) => {
                let name = &self.config.node_name;
                if self.store.node(name).is_none() {
                    wait_for("node", format!("there is no Node object {name} yet"));
                }
                if self.loaded.is_none() {
                    wait_for("datapath", "the programs are being loaded".to_owned());
                }
            }
        }
        reasons
    }
}

/// What came of loading the programs; never, if nobody loads.
async fn done(
    loading: &mut Option<JoinHandle<Result<LoadedPrograms, StartError>>>,
) -> Result<Result<LoadedPrograms, StartError>, JoinError> {
    match loading {
        Some(loading) => loading.await,
        None => std::future::pending().await,
    }
}

/// Why a node leaves the cluster, as kube-proxy sees it (`ProxyHealthServer.SyncNode`).
fn leaving(node: &Node) -> Option<&'static str> {
    if node.deleting {
        return Some("its Node object is being deleted");
    }
    let tainted = node.taints.iter().any(|key| key == TO_BE_DELETED);
    tainted.then_some("the cluster autoscaler takes it away")
}
