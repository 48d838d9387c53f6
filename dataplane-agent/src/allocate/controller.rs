//! The allocation controller: watches nodes and writes their pod CIDRs while it leads.
//!
//! Each term starts from a new list of all nodes. It first *fences* nodes without a range: a write
//! that changes only an annotation, so that a delayed write of an earlier leader fails with a
//! conflict. Only then does it assign ranges. Every write carries the resourceVersion it was
//! computed from; on a conflict the node is read again. Nothing is written after the term ends.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{sleep_until, timeout},
};

use super::{
    election::Leadership,
    ledger::{Finding, NodeFacts, RangeLedger},
    metrics::AllocatorMetrics,
    nodes::{facts, trim},
    settings::Settings,
};
use crate::{
    cluster::explain,
    event_recorder::{EventRecorder, EventType, NewEvent, node as node_reference},
    reconcile::backoff::WorkQueue,
};

/// Interval at which problems of nodes are reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(300);
/// Annotation that a fencing write sets, to change the node's resourceVersion.
const FENCE_ANNOTATION: &str = "dataplane.local/allocator";

/// Why a node was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("no response within {0:?}")]
    Timeout(Duration),
    #[error("node was changed by another client")]
    Conflict,
    #[error("{0}")]
    Exhausted(Finding),
}

/// Assigns pod CIDRs to nodes.
#[derive(Debug)]
pub(super) struct Controller {
    nodes: Api<Node>,
    settings: Settings,
    leadership: watch::Receiver<Leadership>,
    recorder: EventRecorder,
    allocator_metrics: Arc<AllocatorMetrics>,
}

/// One term of leadership.
struct LeaderTerm<'a> {
    controller: &'a Controller,
    number: u64,
    ledger: RangeLedger,
    /// Nodes to sync.
    queue: WorkQueue<String>,
    /// Nodes of the running list; `None`: the list is complete.
    listed: Option<HashSet<String>>,
    /// UIDs of fenced nodes: no earlier leader can write them any more.
    fenced: HashMap<String, String>,
    /// Only nodes of the first list can have been seen by an earlier leader.
    first_list: bool,
    next_report: Instant,
    /// The findings last reported, by node.
    reported: HashMap<String, Vec<Finding>>,
}

impl Controller {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        leadership: watch::Receiver<Leadership>,
        recorder: EventRecorder,
        allocator_metrics: Arc<AllocatorMetrics>,
    ) -> Self {
        Self { nodes: Api::all(client), settings, leadership, recorder, allocator_metrics }
    }

    /// Assigns ranges whenever this allocator leads. Never returns while the election runs.
    pub(super) async fn run(mut self) {
        loop {
            let set_leading = self.leadership.wait_for(|current| current.is_leader(Instant::now())).await;
            let Ok(term) = set_leading.map(|current| current.term) else { return };
            self.run_term(term).await;
            self.allocator_metrics.set_not_leading();
        }
    }

    /// Runs one term until it ends.
    async fn run_term(&self, number: u64) {
        let config = watcher::Config::default();
        let nodes = watcher(self.nodes.clone(), config).modify(trim).default_backoff();
        let mut nodes = std::pin::pin!(nodes);
        let mut leadership = self.leadership.clone();
        let mut term = LeaderTerm {
            controller: self,
            number,
            ledger: RangeLedger::new(self.settings.pools.clone()),
            queue: WorkQueue::default(),
            listed: Some(HashSet::new()),
            fenced: HashMap::new(),
            first_list: true,
            next_report: Instant::now() + REPORT_INTERVAL,
            reported: HashMap::new(),
        };
        let mut last_error = None;
        while self.may_write(number) {
            let due = term.work().await;
            let until = self.leadership.borrow().until.unwrap_or_else(Instant::now);
            tokio::select! {
                event = nodes.next() => match event {
                    Some(Ok(event)) => {
                        term.on_event(event);
                        // take a burst of events at once
                        while let Some(Some(Ok(event))) = nodes.next().now_or_never() {
                            term.on_event(event);
                        }
                        last_error = None;
                    }
                    Some(Err(error)) => {
                        let reason = describe(&error);
                        if last_error.as_ref() != Some(&reason) {
                            tracing::warn!(reason, "cannot watch nodes; retrying");
                        }
                        last_error = Some(reason);
                    }
                    None => return,
                },
                _ = leadership.changed() => {}
                () = sleep_until(due.min(until).into()) => {}
            }
        }
    }

    /// Whether this term is still valid.
    fn may_write(&self, term: u64) -> bool {
        let current = self.leadership.borrow();
        current.term == term && current.is_leader(Instant::now())
    }
}

impl LeaderTerm<'_> {
    fn on_event(&mut self, event: watcher::Event<Node>) {
        let now = Instant::now();
        match event {
            watcher::Event::Init => self.listed = Some(HashSet::new()),
            watcher::Event::InitApply(node) => {
                let node = facts(&node);
                self.listed.get_or_insert_default().insert(node.name.clone());
                self.observe(&node, now);
            }
            watcher::Event::InitDone => self.on_list_done(now),
            watcher::Event::Apply(node) => self.observe(&facts(&node), now),
            watcher::Event::Delete(node) => {
                let name = node.metadata.name.unwrap_or_default();
                // a recreated node may be known already
                if self.ledger.uid(&name) == node.metadata.uid.as_deref() {
                    self.forget(&name, now);
                }
            }
        }
    }

    fn observe(&mut self, node: &NodeFacts, now: Instant) {
        self.ledger.observe(node, now);
        if !self.first_list {
            // created during this term: no fencing needed
            self.fenced.entry(node.name.clone()).or_insert_with(|| node.uid.clone());
        }
        self.queue.push(node.name.clone());
    }

    fn forget(&mut self, name: &str, now: Instant) {
        self.ledger.remove(name, now);
        self.fenced.remove(name);
        self.reported.remove(name);
        self.queue.done(&name.to_owned());
        // the freed range may serve a node without one
        let unassigned: Vec<_> = self
            .ledger
            .names()
            .filter(|name| self.ledger.unassigned(name).is_some())
            .map(str::to_owned)
            .collect();
        for name in unassigned {
            self.queue.push(name);
        }
    }

    /// Removes nodes that the completed list did not contain.
    fn on_list_done(&mut self, now: Instant) {
        let Some(listed) = self.listed.take() else { return };
        let removed: Vec<_> =
            self.ledger.names().filter(|name| !listed.contains(*name)).map(str::to_owned).collect();
        for name in removed {
            self.forget(&name, now);
        }
        if std::mem::take(&mut self.first_list) {
            tracing::info!(
                nodes = listed.len(),
                term = self.number,
                "listed nodes; their pod CIDRs are in use"
            );
        }
    }

    /// Syncs the nodes that are due. Returns when to call it again.
    async fn work(&mut self) -> Instant {
        let now = Instant::now();
        if now >= self.next_report {
            self.next_report = now + REPORT_INTERVAL;
            let names: Vec<_> = self.ledger.names().map(str::to_owned).collect();
            for name in names {
                self.queue.push(name);
            }
        }
        self.controller.allocator_metrics.set_leading(self.ledger.pools());
        // assign nothing before the list is complete
        if self.listed.is_some() {
            return self.next_report;
        }
        while self.controller.may_write(self.number) {
            let Some(name) = self.queue.pop(Instant::now()) else { break };
            match self.sync_node(&name).await {
                Ok(()) => self.queue.done(&name),
                Err(error) => {
                    if !matches!(error, WriteError::Conflict | WriteError::Exhausted(_)) {
                        tracing::warn!(node = name, %error, "cannot assign pod CIDR; retrying");
                    }
                    self.queue.fail(name, error.to_string(), Instant::now());
                }
            }
        }
        self.controller.allocator_metrics.set_leading(self.ledger.pools());
        self.queue.next_due(Instant::now()).map_or(self.next_report, |due| due.min(self.next_report))
    }

    /// Makes delayed writes of earlier leaders to the node fail.
    async fn fence_node(&mut self, name: &str) -> Result<(), WriteError> {
        let Some((uid, version)) = self.ledger.unassigned(name) else { return Ok(()) };
        if self.fenced.get(name).is_some_and(|fenced| fenced == uid) {
            return Ok(());
        }
        let mark = format!("{}/{}", self.controller.settings.identity, self.number);
        let uid = uid.to_owned();
        let patch = json!({
            "metadata": { "uid": uid, "resourceVersion": version, "annotations": { FENCE_ANNOTATION: mark } },
        });
        let node = self.write(name, &patch).await?;
        self.fenced.insert(name.to_owned(), uid);
        // a range assigned before would have changed the version: the write would have failed
        self.ledger.set_resource_version(name, node.resource_version);
        Ok(())
    }

    /// Reports the problems of a node and assigns its ranges if it has none.
    async fn sync_node(&mut self, name: &str) -> Result<(), WriteError> {
        if self.ledger.unassigned(name).is_none() {
            self.report_node(name);
            return Ok(());
        }
        // fence every node an earlier leader may still write before any range is assigned
        while let Some(unfenced_node) = self.unfenced() {
            self.fence_node(&unfenced_node).await?;
        }
        let ranges = match self.ledger.reserve(name, Instant::now()) {
            Ok(ranges) => ranges,
            Err(finding) => {
                let mut findings = self.ledger.findings(name);
                findings.push(finding.clone());
                self.report(name, findings);
                return Err(WriteError::Exhausted(finding));
            }
        };
        let Some((uid, version)) = self.ledger.unassigned(name) else { return Ok(()) };
        let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
        let patch = json!({
            "metadata": { "uid": uid, "resourceVersion": version },
            "spec": { "podCIDR": ranges.first(), "podCIDRs": ranges },
        });
        let node = self.write(name, &patch).await?;
        tracing::info!(node = name, pod_cidrs = ?node.pod_cidrs, "assigned pod CIDRs");
        self.controller.allocator_metrics.count_assignment();
        self.ledger.observe(&node, Instant::now());
        self.report_node(name);
        Ok(())
    }

    /// A node without a range that is not fenced.
    fn unfenced(&self) -> Option<String> {
        let unfenced_node = |name: &&str| {
            self.ledger
                .unassigned(name)
                .is_some_and(|(uid, _)| self.fenced.get(*name).is_none_or(|fenced| fenced != uid))
        };
        self.ledger.names().find(unfenced_node).map(str::to_owned)
    }

    /// Patches a node at the known resourceVersion; on a conflict, reads it again.
    async fn write(&mut self, name: &str, patch: &serde_json::Value) -> Result<NodeFacts, WriteError> {
        let nodes = &self.controller.nodes;
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        let request = nodes.patch(name, &params, &patch);
        if !self.controller.may_write(self.number) {
            return Err(WriteError::Conflict);
        }
        let request_timeout = self.controller.settings.lease_timing.request_timeout;
        match timeout(request_timeout, request).await {
            Ok(Ok(node)) => Ok(facts(&node)),
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => {
                let count_finding = timeout(request_timeout, nodes.get_opt(name))
                    .await
                    .map_err(|_late| WriteError::Timeout(request_timeout))??;
                let now = Instant::now();
                match count_finding {
                    Some(node) => self.ledger.observe(&facts(&node), now),
                    None => self.ledger.remove(name, now),
                }
                Err(if status.code == 422 { kube::Error::Api(status).into() } else { WriteError::Conflict })
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_elapsed) => Err(WriteError::Timeout(request_timeout)),
        }
    }

    /// Reports the findings of a node, and of the other node of an overlap.
    fn report_node(&mut self, name: &str) {
        let findings = self.ledger.findings(name);
        let others: Vec<_> = findings.iter().filter_map(Finding::other).map(str::to_owned).collect();
        self.report(name, findings);
        for other in others {
            let findings = self.ledger.findings(&other);
            self.report(&other, findings);
        }
    }

    /// Reports the findings of a node. Each is counted and logged once; Events are aggregated by
    /// their recorder.
    fn report(&mut self, name: &str, findings: Vec<Finding>) {
        let Some(uid) = self.ledger.uid(name) else { return };
        let known = self.reported.get(name).map_or(&[][..], Vec::as_slice);
        for finding in &findings {
            if !known.contains(finding) {
                self.controller.allocator_metrics.count_finding(finding);
                tracing::warn!(node = name, reason = finding.reason(), %finding, "invalid pod CIDR configuration of node");
            }
            self.controller.recorder.record(NewEvent {
                regarding: node_reference(name, uid),
                event_type: EventType::Warning,
                reason: finding.reason(),
                action: "AllocatePodCIDRs",
                note: finding.to_string(),
            });
        }
        if findings.is_empty() {
            self.reported.remove(name);
        } else {
            self.reported.insert(name.to_owned(), findings);
        }
    }
}

fn describe(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => explain(error),
        other => other.to_string(),
    }
}
